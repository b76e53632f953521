/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Nothing grows: descriptors, threads, memory and what is allocated in daemons, workers and a
 * reader are the same after a thousand rounds with all there is in one, and those of daemons after
 * fifty jobs one after another. $STORY_STEPS gives another number of rounds; $INTERPOSE counts.
 */
#include "tests/integration/story.h"
#include "tests/lib/test.h"

#include "client/experts/comm-daemon.h"
#include "client/experts/optimizer.h"
#include "proto/base/clock.h"
#include "proto/base/dtype.h"

#include <math.h>
#include <signal.h>
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
#define LIVE_SLACK 1024 /* bytes in all the rounds: what is on its way when one looks */

enum { ROUND_THREE = 1, ROUND_SKIPPED = 3, ROUND_REDONE = 5, ROUND_REFUSED = 7, ROUND_PUT = 9,
       ROUND_KINDS };

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
        const struct story_args range = { .unit = 0, .n = GET_N, .timeout_ms = WAIT_MS };
        int r = autoep_prefetch(self->handle, units, STORY_UNITS);

        if (r == 0)
                r = story_gather_range(self, &range, result);
        if (r == 0)
                r = story_release(self, &range, result);
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

/* Returns the verdict's kind unless it is applied. */
static int ask(struct story_self *self, const struct ae_longacc *expert_norm2, uint32_t flags,
               double max_norm)
{
        const struct autoep_hyper hyper = { .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8 };
        struct autoep_step step = { .size = sizeof(step), .hyper = &hyper, .n_groups = 1,
                                    .flags = flags, .max_norm = max_norm };
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

static int meet(struct story_self *self, struct story_result *result)
{
        return story_exchange(self, &(struct story_args){ .timeout_ms = WAIT_MS }, result);
}

/* Some elements of one tensor, from rank 0, while no rank has begun to scatter. */
static int put_some(struct story_self *self, struct story_result *result)
{
        const struct story_args args = { .unit = 2, .n = GET_N, .timeout_ms = WAIT_MS };
        int r = meet(self, result);

        if (r == 0 && self->rank == 0)
                r = story_put(self, &args, result);
        return r == 0 ? meet(self, result) : r;
}

/* One to three micro-batches; with @bad a gradient isn't finite. */
static int forward_backward(struct story_self *self, uint32_t n_micro, bool bad,
                            struct story_result *result)
{
        int r = 0;

        self->data[0] = bad ? NAN : 0;
        for (uint32_t micro = 0; micro < n_micro && r == 0; micro++) {
                r = dense_part(self, result);
                for (size_t k = 0; k < EXPERT_N; k++)
                        ae_expert_opt_grad(experts.opt, 0)[k] += 1;
                if (r == 0)
                        r = meet(self, result);
                if (r == 0)
                        r = autoep_micro_batch_end(self->handle);
        }
        self->data[0] = 0;
        return r;
}

/* One of each ten rounds is skipped, redone, refused at first, or ends with a put. */
static int whole_step(struct story_self *self, uint32_t i, struct story_result *result)
{
        static float state[GET_N];
        const uint32_t kind = i % ROUND_KINDS;
        const bool mine = self->rank == i / ROUND_KINDS % 2;
        uint32_t want = kind == ROUND_SKIPPED  ? AUTOEP_SKIPPED
                        : kind == ROUND_REDONE ? AUTOEP_REDO
                                               : 0;
        struct ae_expert_report report;
        int r = forward_backward(self, kind == ROUND_THREE ? 3 : 1, mine && kind == ROUND_SKIPPED,
                                 result);

        if (r == 0)
                r = ae_expert_opt_reduce(experts.opt, &experts.edp.comm, deadline(), &report);
        if (r == 0 && kind == ROUND_REFUSED) {
                r = ask(self, &report.norm2, 0, mine ? 2 : 1);
                r = r == AUTOEP_EMISMATCH ? 0 : -100;
        }
        if (r == 0)
                r = ask(self, &report.norm2, mine && kind == ROUND_REDONE ? AUTOEP_STEP_REDO : 0,
                        1);
        r = r == (int)want ? 0 : r ? r : -101;
        if (r == 0 && i % 4 == self->rank)
                r = autoep_get(self->handle, i % 3, AUTOEP_MASTER, 0, GET_N, state, WAIT_MS);
        return r == 0 && kind == ROUND_PUT ? put_some(self, result) : r;
}

/* n rounds with all there is: prefetch, gather, range, scatter, experts, exchange, step, get. */
static int whole_steps(struct story_self *self, const struct story_args *args,
                       struct story_result *result)
{
        int r = 0;

        for (uint32_t i = 0; i < args->n && r == 0; i++)
                r = whole_step(self, i, result);
        return r;
}

static int tell_live(struct story_self *self, const struct story_args *args,
                     struct story_result *result)
{
        (void)self;
        (void)args;
        result->value = story_counter().live();
        return 0;
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

struct look {
        struct proc_stat stat;
        unsigned long live; /* bytes allocated */
};

static void look(struct story *story, struct look looks[5])
{
        static char text[65536];
        struct proc_stat stats[5];

        for (uint32_t i = 0; i < 2; i++) {
                stats[i] = proc_stat_of(story->bed.daemons[i].pid);
                stats[2 + i] = proc_stat_of(story->job.workers[i].pid);
        }
        stats[4] = proc_stat_of(story->other.workers[0].pid);
        story_mark(&story->bed, SIGUSR2); /* after that: the report is a descriptor too */
        for (uint32_t i = 0; i < 5; i++) {
                looks[i].stat = stats[i];
                looks[i].live =
                        i < 2 ? story_report_of(&story->bed, i, "live", text, sizeof(text))
                              : story_call(i < 4 ? &story->job.workers[i - 2]
                                                 : &story->other.workers[0],
                                           tell_live, (struct story_args){ 0 })
                                        .value;
        }
}

static void test_steps(void **state)
{
        static const char *const who[5] = { "daemon 0", "daemon 1", "worker 0", "worker 1",
                                            "the reader" };
        struct story *story = *state;
        const char *given = getenv("STORY_STEPS");
        uint32_t n = given ? (uint32_t)strtoul(given, NULL, 10) : STEPS;
        struct look before[5], after[5];

        start(story);
        run(story, WARM, VISITS);
        look(story, before);
        run(story, n, VISITS);
        look(story, after);
        for (uint32_t i = 0; i < 5; i++) {
                check_flat(who[i], &before[i].stat, &after[i].stat);
                if (after[i].live > before[i].live + LIVE_SLACK)
                        fail_msg("%s has %lu bytes after %u steps, %lu before", who[i],
                                 after[i].live, n, before[i].live);
        }
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

static int counted_tcp(void **state)
{
        return story_setup_counted(state, "tcp");
}

static int counted_shm(void **state)
{
        return story_setup_counted(state, "shm");
}

#define STORY(test, setup) cmocka_unit_test_setup_teardown(test, setup, story_teardown)

int main(void)
{
        story_preload("test-story-growth");
        const struct CMUnitTest tests[] = {
                STORY(test_steps, counted_tcp),
                STORY(test_steps, counted_shm),
                STORY(test_jobs, story_setup_tcp),
                STORY(test_jobs, story_setup_shm),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
