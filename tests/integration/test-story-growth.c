/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Nothing grows: descriptors, threads and memory of daemons, workers and a reader are the same
 * after a thousand steps with all there is in a step, and of daemons after fifty jobs one after
 * another. $STORY_STEPS gives another number of steps.
 */
#include "tests/integration/story.h"
#include "tests/lib/test.h"

#include "client/experts/comm-daemon.h"
#include "client/experts/optimizer.h"
#include "proto/base/clock.h"
#include "proto/base/dtype.h"

#include <stdlib.h>
#include <string.h>

#define STEPS 1000
#define WARM 100     /* steps before the first look: rings, caches and learnt orders are filled */
#define VISITS 20    /* of a reader, meanwhile */
#define EXPERT_N 500 /* elements of the expert tensor */
#define GET_N 1000
#define WAIT_MS 20000
#define JOBS 50
#define SLACK_KIB 1024 /* of pages that the allocator gives back late */

static void check_flat(const char *who, const struct proc_stat *before,
                       const struct proc_stat *after)
{
        if (after->n_fds > before->n_fds || after->n_threads > before->n_threads ||
            after->anon_kib > before->anon_kib + SLACK_KIB)
                fail_msg(
                        "%s grew: descriptors %ld to %ld, threads %ld to %ld, memory %ld to %ld "
                        "KiB",
                        who, before->n_fds, after->n_fds, before->n_threads, after->n_threads,
                        before->anon_kib, after->anon_kib);
}

/* ---- in the worker ---------------------------------------------------------------------- */

static struct {
        struct ae_comm_daemon edp;
        struct ae_expert_opt *opt;
        float weight[EXPERT_N];
} experts;

static uint64_t deadline(void)
{
        return ae_now_ns() + (uint64_t)WAIT_MS * AE_NS_PER_MS;
}

static void add_expert(const struct story_self *self, struct autoep_model *model,
                       struct autoep_tensor *tensors)
{
        (void)self;
        tensors[model->n_tensors++] = (struct autoep_tensor){
                .size = sizeof(*tensors), .name = "expert.w", .unit = "experts",
                .dtype = AUTOEP_F32, .n_dims = 2, .tensor_class = AUTOEP_EXPERT,
                .dims = { 1, EXPERT_N },
        };
}

static int open_experts(struct story_self *self, const struct story_args *args,
                        struct story_result *result)
{
        const struct ae_expert_opt_config config = { .rule = AE_EXPERT_ADAMW, .n_groups = 1 };
        const struct ae_expert_tensor tensor = { .name = "expert.w", .dtype = AE_DTYPE_F32,
                                                 .weight = experts.weight, .n = EXPERT_N };
        uint32_t index;
        int r = ae_comm_daemon_init(&experts.edp, self->handle, AUTOEP_GROUP_EDP, 0);

        (void)args;
        (void)result;
        if (r == 0)
                r = ae_expert_opt_new(&config, &experts.opt);
        if (r == 0)
                r = ae_expert_opt_add(experts.opt, &tensor, &index);
        return r == 0 ? ae_expert_opt_seal(experts.opt, &experts.edp.comm, deadline()) : r;
}

static int dense_part(struct story_self *self, struct story_result *result)
{
        static const uint32_t units[STORY_UNITS] = { 0, 1, 2 };
        int r = autoep_prefetch(self->handle, units, STORY_UNITS);

        for (uint32_t unit = 0; unit < STORY_UNITS && r == 0; unit++) {
                const struct story_args args = { .unit = unit, .timeout_ms = WAIT_MS };

                r = story_gather(self, &args, result);
                if (r == 0)
                        r = story_release(self, &args, result);
                if (r == 0)
                        r = story_scatter(self, &args, result);
        }
        return r;
}

static int ask(struct story_self *self, const struct ae_longacc *expert_norm2)
{
        const struct autoep_hyper hyper = { .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8 };
        struct autoep_step step = { .size = sizeof(step), .hyper = &hyper, .n_groups = 1,
                                    .max_norm = 1 };
        const struct ae_expert_group_step group = {
                .hyper = { hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay },
        };
        struct ae_expert_verdict experts_verdict = { .groups = &group, .n_groups = 1 };
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        int r;

        memcpy(&step.expert_norm2, expert_norm2, sizeof(*expert_norm2));
        r = autoep_step(self->handle, &step, WAIT_MS, &verdict);
        if (r < 0)
                return r;
        experts_verdict.applied = verdict.kind == AUTOEP_APPLIED;
        experts_verdict.grad_scale = verdict.grad_scale;
        r = ae_expert_opt_step(experts.opt, &experts_verdict);
        return r < 0 || experts_verdict.applied ? r : (int)verdict.kind;
}

/* n steps with all there is: prefetch, gather, scatter, experts, exchange, a step, a get. */
static int whole_steps(struct story_self *self, const struct story_args *args,
                       struct story_result *result)
{
        static float state[GET_N];
        struct ae_expert_report report;
        int r = 0;

        for (uint32_t i = 0; i < args->n && r == 0; i++) {
                r = dense_part(self, result);
                for (size_t k = 0; k < EXPERT_N; k++)
                        ae_expert_opt_grad(experts.opt, 0)[k] += 1;
                if (r == 0)
                        r = story_exchange(self, &(struct story_args){ .timeout_ms = WAIT_MS },
                                           result);
                if (r == 0)
                        r = ae_expert_opt_reduce(experts.opt, &experts.edp.comm, deadline(),
                                                 &report);
                if (r == 0)
                        r = ask(self, &report.norm2);
                if (r == 0 && i % 4 == self->rank)
                        r = autoep_get(self->handle, i % 3, AUTOEP_MASTER, 0, GET_N, state,
                                       WAIT_MS);
        }
        return r;
}

static int close_experts(struct story_self *self, const struct story_args *args,
                         struct story_result *result)
{
        (void)self;
        (void)args;
        (void)result;
        experts.opt = ae_expert_opt_free(experts.opt);
        ae_comm_daemon_deinit(&experts.edp);
        return 0;
}

/* A reader comes, reads everything, and goes, n times. */
static int visits(struct story_self *self, const struct story_args *args,
                  struct story_result *result)
{
        int r = 0;

        for (uint32_t i = 0; i < args->n && r == 0; i++) {
                r = story_open(self, args, result);
                if (r == 0)
                        r = story_register(self, args, result);
                for (uint32_t unit = 0; unit < STORY_UNITS && r == 0; unit++) {
                        const struct story_args one = { .unit = unit, .timeout_ms = WAIT_MS };

                        r = story_gather(self, &one, result);
                        if (r == 0)
                                r = story_release(self, &one, result);
                }
                if (r == 0)
                        r = story_leave(self, &(struct story_args){ 0 }, result);
                if (r == 0)
                        r = story_close(self, args, result);
        }
        return r;
}

/* ---- a thousand steps ------------------------------------------------------------------- */

static void start(struct story *story)
{
        struct story_self *reader = &story->other.workers[0].self;

        story_job_init(&story->job, &story->bed, "long", 2);
        for (uint32_t rank = 0; rank < 2; rank++) {
                story->job.workers[rank].self.unit_n[0] = 150000; /* cut over both nodes */
                story->job.workers[rank].self.unit_n[1] = 5000;
                story->job.workers[rank].self.tweak = add_expert;
        }
        story_job_up(&story->job);
        story_job_must(&story->job, open_experts, (struct story_args){ 0 });
        story_job_init(&story->other, &story->bed, "long", 1);
        reader->rank = AUTOEP_NONE;
        reader->world = 2;
        story_worker_start(&story->other.workers[0]);
}

/* All at once; a reader's views make nobody wait. */
static void run(struct story *story, uint32_t n_steps, uint32_t n_visits)
{
        struct story_result result;

        story_post(&story->other.workers[0], visits, (struct story_args){ .n = n_visits });
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&story->job.workers[rank], whole_steps,
                           (struct story_args){ .n = n_steps });
        for (uint32_t rank = 0; rank < 3; rank++) {
                struct story_worker *worker =
                        rank < 2 ? &story->job.workers[rank] : &story->other.workers[0];

                result = story_take(worker, 60000 + (int)n_steps * 100);
                if (result.status)
                        fail_msg("%s %u: %d: %s", rank < 2 ? "rank" : "the reader, number", rank,
                                 result.status, result.text);
        }
}

static void look(const struct story *story, struct proc_stat stats[5])
{
        for (uint32_t i = 0; i < 2; i++) {
                stats[i] = proc_stat_of(story->bed.daemons[i].pid);
                stats[2 + i] = proc_stat_of(story->job.workers[i].pid);
        }
        stats[4] = proc_stat_of(story->other.workers[0].pid);
}

static void test_steps(void **state)
{
        static const char *const who[5] = { "daemon 0", "daemon 1", "worker 0", "worker 1",
                                            "the reader" };
        struct story *story = *state;
        const char *given = getenv("STORY_STEPS");
        uint32_t n = given ? (uint32_t)strtoul(given, NULL, 10) : STEPS;
        struct proc_stat before[5], after[5];

        start(story);
        run(story, WARM, VISITS);
        look(story, before);
        run(story, n, VISITS);
        look(story, after);
        for (uint32_t i = 0; i < 5; i++)
                check_flat(who[i], &before[i], &after[i]);
        story_job_must(&story->job, close_experts, (struct story_args){ 0 });
        story_job_leave(&story->job);
}

/* ---- fifty jobs ------------------------------------------------------------------------- */

static void one_job(struct story *story)
{
        story_job_init(&story->job, &story->bed, "short", 2);
        for (uint32_t rank = 0; rank < 2; rank++)
                story->job.workers[rank].self.unit_n[0] = 70000;
        story_job_up(&story->job);
        story_job_steps(&story->job, 2);
        story_job_leave(&story->job);
        story_job_end(&story->job);
}

static void test_jobs(void **state)
{
        struct story *story = *state;
        struct proc_stat before[2], now;

        for (uint32_t i = 0; i < 5; i++)
                one_job(story);
        proc_sleep_ms(100); /* sessions end when their sockets say so */
        for (uint32_t node = 0; node < 2; node++)
                before[node] = proc_stat_of(story->bed.daemons[node].pid);
        for (uint32_t i = 0; i < JOBS; i++)
                one_job(story);
        for (uint32_t node = 0; node < 2; node++) {
                now = proc_stat_of(story->bed.daemons[node].pid);
                for (int i = 0; i < 200 && now.n_fds > before[node].n_fds; i++) {
                        proc_sleep_ms(5);
                        now = proc_stat_of(story->bed.daemons[node].pid);
                }
                check_flat(node ? "daemon 1" : "daemon 0", &before[node], &now);
                assert_in_range(now.rss_kib, 0, before[node].rss_kib + 2 * SLACK_KIB);
        }
}

#define STORY(test, setup) cmocka_unit_test_setup_teardown(test, setup, story_teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                STORY(test_steps, story_setup_tcp),
                STORY(test_steps, story_setup_shm),
                STORY(test_jobs, story_setup_tcp),
                STORY(test_jobs, story_setup_shm),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
