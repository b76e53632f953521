/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bad input to the library gives an error that says what is wrong, and harms nobody: beside every
 * story here a healthy job goes on stepping on the same two daemons.
 */
#include "tests/integration/story.h"
#include "tests/lib/test.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define NOBODY 65534

static const struct story_args none;

/* ---- the healthy job --------------------------------------------------------------------- */

static int group_setup(void **state)
{
        struct story *story;

        if (story_setup_tcp(state) < 0)
                return -1;
        story = *state;
        story_job_init(&story->other, &story->bed, "healthy", 2);
        story_job_up(&story->other);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&story->other.workers[rank], story_until,
                           (struct story_args){ .timeout_ms = 10000 });
        return 0;
}

/* The healthy job ends well. */
static int group_teardown(void **state)
{
        struct story *story = *state;

        story_until_stop();
        for (uint32_t rank = 0; rank < 2; rank++) {
                const struct story_result result = story_take(&story->other.workers[rank], 20000);

                if (result.status != 0)
                        fail_msg("the healthy job: %s", result.text);
        }
        story_job_leave(&story->other);
        return story_teardown(state);
}

static int setup(void **state)
{
        struct story *story = *state;

        story_job_end(&story->job);
        story_job_init(&story->job, &story->bed, "bad", 2);
        return 0;
}

/* Nobody was harmed: the healthy job has made a step since. */
static int teardown(void **state)
{
        struct story *story = *state;
        uint64_t n = story_until_count();
        uint64_t until = proc_now_ms() + 10000;

        story_job_end(&story->job);
        while (story_until_count() < n + 2 && proc_now_ms() < until)
                proc_sleep_ms(2);
        if (story_until_count() < n + 2) {
                proc_bed_show(&story->bed);
                fail_msg("the healthy job stands still at its step %llu", (unsigned long long)n);
        }
        return 0;
}

/* ---- joining ----------------------------------------------------------------------------- */

static void start(struct story_job *job, uint32_t rank)
{
        story_worker_start(&job->workers[rank]);
}

static void open_all(struct story_job *job)
{
        for (uint32_t rank = 0; rank < job->world; rank++)
                start(job, rank);
        story_job_must(job, story_open, none);
}

static void test_reader_of_unknown_job(void **state)
{
        struct story *story = *state;
        struct story_result result;

        story->job.workers[0].self.rank = AUTOEP_NONE;
        start(&story->job, 0);
        result = story_call(&story->job.workers[0], story_open, none);
        story_expect(&result, AUTOEP_ENOENT, "unknown job 'bad'", "node 0", NULL);
}

static void test_wrong_token(void **state)
{
        struct story *story = *state;
        struct story_result result;

        story->job.workers[0].self.token = "right";
        story->job.workers[1].self.token = "wrong";
        start(&story->job, 0);
        start(&story->job, 1);
        story_must(&story->job.workers[0], story_open, none);
        result = story_call(&story->job.workers[1], story_open, none);
        story_expect(&result, AUTOEP_EAUTH, "wrong token for job 'bad'", NULL);
        assert_null(strstr(result.text, "right"));
        /* on the same node too */
        story->job.workers[1].self.node = 0;
        story_worker_end(&story->job.workers[1]);
        start(&story->job, 1);
        result = story_call(&story->job.workers[1], story_open, none);
        story_expect(&result, AUTOEP_EAUTH, "wrong token for job 'bad'", NULL);
}

static void test_wrong_user(void **state)
{
        struct story *story = *state;
        struct story_result result;

        if (getuid() != 0)
                skip(); /* only root can become somebody else */
        /* the socket's mode keeps strangers out; one who may write is told whose job it is */
        story->job.workers[1].self.uid = NOBODY;
        story->job.workers[1].self.node = 0;
        start(&story->job, 0);
        story_must(&story->job.workers[0], story_open, none);
        start(&story->job, 1);
        result = story_call(&story->job.workers[1], story_open, none);
        story_expect(&result, AUTOEP_EAUTH, "node-0.sock", NULL);
        assert_int_equal(chmod(story->bed.dir, 0755), 0);
        assert_int_equal(chmod(story->bed.daemons[0].socket, 0666), 0);
        result = story_call(&story->job.workers[1], story_open, none);
        assert_int_equal(chmod(story->bed.daemons[0].socket, 0660), 0);
        story_expect(&result, AUTOEP_EAUTH, "belongs to uid 0", "uid 65534", NULL);
}

static void test_rank_claimed_twice(void **state)
{
        struct story *story = *state;
        struct story_result result;
        char pid[32];

        start(&story->job, 0);
        start(&story->job, 1);
        story_must(&story->job.workers[0], story_open, none);
        (void)snprintf(pid, sizeof(pid), "pid %d", (int)story->job.workers[0].pid);
        for (uint32_t node = 0; node < 2; node++) {
                story->job.workers[1].self.rank = 0;
                story->job.workers[1].self.node = node;
                story_worker_end(&story->job.workers[1]);
                start(&story->job, 1);
                result = story_call(&story->job.workers[1], story_open, none);
                story_expect(&result, AUTOEP_EEXIST, "rank 0 of job 'bad'", pid, "node 0", NULL);
        }
}

static void test_other_world(void **state)
{
        struct story *story = *state;
        struct story_result result;

        story->job.workers[1].self.world = 3;
        start(&story->job, 0);
        start(&story->job, 1);
        story_must(&story->job.workers[0], story_open, none);
        result = story_call(&story->job.workers[1], story_open, none);
        story_expect(&result, AUTOEP_EMISMATCH, "has 2 ranks", "rank 1 says 3", NULL);
}

static void test_no_daemon(void **state)
{
        struct story *story = *state;
        struct proc_bed elsewhere = story->bed;
        struct story_result result;
        int fd;

        story->job.workers[0].self.bed = &elsewhere;
        (void)snprintf(elsewhere.daemons[0].socket, sizeof(elsewhere.daemons[0].socket),
                       "%s/nobody.sock", story->bed.dir);
        start(&story->job, 0);
        result = story_call(&story->job.workers[0], story_open, none);
        story_expect(&result, AUTOEP_ENOENT, "nobody.sock", "start autoepd", NULL);
        fd = open(elsewhere.daemons[0].socket, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        assert_true(fd >= 0);
        close(fd);
        result = story_call(&story->job.workers[0], story_open, none);
        story_expect(&result, AUTOEP_ENOENT, "nobody.sock", "not a socket", NULL);
}

/* ---- registering ------------------------------------------------------------------------- */

/* Both register @tweak's model, or only rank 1 does. */
static void refuse_model(struct story *story, bool both,
                         void (*tweak)(const struct story_self *, struct autoep_model *,
                                       struct autoep_tensor *),
                         struct story_result *ret)
{
        story->job.workers[0].self.tweak = both ? tweak : NULL;
        story->job.workers[1].self.tweak = tweak;
        open_all(&story->job);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&story->job.workers[rank], story_register,
                           (struct story_args){ .timeout_ms = 3000 });
        for (uint32_t rank = 0; rank < 2; rank++)
                ret[rank] = story_take(&story->job.workers[rank], 10000);
}

static void tweak_duplicate(const struct story_self *self, struct autoep_model *model,
                            struct autoep_tensor *tensors)
{
        (void)self;
        (void)model;
        tensors[1].name = tensors[0].name;
}

static void tweak_ep_size(const struct story_self *self, struct autoep_model *model,
                          struct autoep_tensor *tensors)
{
        (void)self;
        (void)tensors;
        model->ep_size = 3;
}

static void tweak_tp_size(const struct story_self *self, struct autoep_model *model,
                          struct autoep_tensor *tensors)
{
        (void)self;
        (void)tensors;
        model->tp_size = 2;
}

static void tweak_fp16(const struct story_self *self, struct autoep_model *model,
                       struct autoep_tensor *tensors)
{
        (void)self;
        (void)tensors;
        model->grad_wire = 99;
}

static void tweak_dtype(const struct story_self *self, struct autoep_model *model,
                        struct autoep_tensor *tensors)
{
        (void)self;
        (void)model;
        tensors[2].dtype = 5;
}

static void tweak_overflow(const struct story_self *self, struct autoep_model *model,
                           struct autoep_tensor *tensors)
{
        (void)self;
        (void)model;
        tensors[1].n_dims = 3;
        tensors[1].dims[0] = tensors[1].dims[1] = tensors[1].dims[2] = UINT64_C(1) << 40;
}

static void tweak_budget(const struct story_self *self, struct autoep_model *model,
                         struct autoep_tensor *tensors)
{
        (void)self;
        (void)tensors;
        model->budget_len = 1 << 20;
}

static void test_models(void **state)
{
        static const struct {
                void (*tweak)(const struct story_self *, struct autoep_model *,
                              struct autoep_tensor *);
                int status;
                const char *words[3];
        } cases[] = {
                { tweak_duplicate, AUTOEP_EINVAL, { "u0.w", "taken", "" } },
                { tweak_ep_size, AUTOEP_EINVAL, { "ep_size", "3", "1, 2" } },
                { tweak_tp_size, AUTOEP_EUNSUPPORTED, { "tp_size", "2", "" } },
                { tweak_fp16, AUTOEP_EUNSUPPORTED, { "grad_wire", "99", "" } },
                { tweak_dtype, AUTOEP_EINVAL, { "u2.w", "dtype", "5" } },
                { tweak_overflow, AUTOEP_EINVAL, { "u1.w", "", "" } },
                { tweak_budget, AUTOEP_EBUDGET, { "node 0", "1048576", "raise budget_len" } },
        };
        struct story *story = *state;
        struct story_result results[2];

        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
                story_job_end(&story->job);
                refuse_model(story, true, cases[i].tweak, results);
                for (uint32_t rank = 0; rank < 2; rank++)
                        story_expect(&results[rank], cases[i].status, cases[i].words[0],
                                     cases[i].words[1], cases[i].words[2], NULL);
        }
}

static void tweak_shape(const struct story_self *self, struct autoep_model *model,
                        struct autoep_tensor *tensors)
{
        (void)self;
        (void)model;
        tensors[1].dims[0]++;
}

static void test_ranks_disagree(void **state)
{
        struct story *story = *state;
        struct story_result results[2];

        refuse_model(story, false, tweak_shape, results);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_expect(&results[rank], AUTOEP_EMISMATCH, "dims[0] of u1.w", "rank 0",
                             "rank 1", "200000", "200001", NULL);
}

static void tweak_values(const struct story_self *self, struct autoep_model *model,
                         struct autoep_tensor *tensors)
{
        static float other[1000] = { 1 };

        model->init = AUTOEP_INIT_ALL_EQUAL;
        if (self->rank == 1)
                tensors[2].init = other;
}

static void test_initial_values_differ(void **state)
{
        struct story *story = *state;
        struct story_result results[2];

        refuse_model(story, true, tweak_values, results);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_expect(&results[rank], AUTOEP_EMISMATCH, "'u2'", "rank 1", NULL);
}

/* ---- a job that runs --------------------------------------------------------------------- */

/* How rank 2 differs: its two sums stand in the other order, or one is of another kind or size. */
enum difference { IN_ORDER, IN_KIND, IN_SIZE, N_DIFFERENCES };

static int two_sums(struct story_self *self, const struct story_args *args,
                    struct story_result *result)
{
        bool odd = self->rank == 2;
        int r = 0;

        for (uint32_t i = 1; r == 0 && i <= 2; i++) {
                uint32_t id = odd && args->what == IN_ORDER ? 3 - i : i;
                uint64_t len = odd && args->what == IN_SIZE ? 260 : 256;

                r = autoep_announce(self->handle, AUTOEP_GROUP_WORLD,
                                    odd && args->what == IN_KIND ? AUTOEP_ALL_GATHER
                                                                 : AUTOEP_ALL_REDUCE, id, len);
                if (r == 0)
                        r = story_exchange(self, args, result);
        }
        return r;
}

static void test_collectives_in_another_order(void **state)
{
        static const char *const words[N_DIFFERENCES][2] = {
                [IN_ORDER] = { "all-reduce 0 of the world group (id 1, 256 bytes)",
                               "all-reduce 0 of the world group (id 2, 256 bytes)" },
                [IN_KIND] = { "all-reduce 0 of the world", "all-gather 0 of the world" },
                [IN_SIZE] = { "(id 1, 256 bytes)", "(id 1, 260 bytes)" },
        };
        struct story *story = *state;
        struct story_args args = { .timeout_ms = 4000 };

        for (uint32_t i = 0; i < N_DIFFERENCES; i++) {
                story_job_init(&story->job, &story->bed, "order", 4);
                story_job_up(&story->job);
                args.what = i;
                for (uint32_t rank = 0; rank < 4; rank++)
                        story_post(&story->job.workers[rank], two_sums, args);
                for (uint32_t rank = 0; rank < 4; rank++) {
                        struct story_result result =
                                story_take(&story->job.workers[rank], 3 * args.timeout_ms);

                        story_expect(&result, AUTOEP_EMISMATCH, "rank 2", words[i][0], words[i][1],
                                     "same order", NULL);
                }
                story_job_end(&story->job);
        }
}

static int gather_too_much(struct story_self *self, const struct story_args *args,
                           struct story_result *result)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;
        int r = story_gather(self, &(struct story_args){ .unit = 2, .timeout_ms = 2000 }, result);

        (void)args;
        if (r < 0)
                return r;
        r = autoep_gather(self->handle, 1, 2000, &view);
        (void)autoep_release(self->handle, &self->view);
        return r;
}

static void test_calls(void **state)
{
        struct story *story = *state;
        struct story_worker *worker = &story->job.workers[0];
        struct story_args scatter = { .unit = 2, .timeout_ms = 2000 };
        struct story_result result;

        for (uint32_t rank = 0; rank < 2; rank++)
                story->job.workers[rank].self.hold_len = 401500;
        open_all(&story->job);
        result = story_call(worker, story_gather, (struct story_args){ .timeout_ms = 500 });
        story_expect(&result, AUTOEP_ESTATE, "autoep_register", NULL);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&story->job.workers[rank], story_register,
                           (struct story_args){ .timeout_ms = 3000 });
        for (uint32_t rank = 0; rank < 2; rank++) {
                result = story_take(&story->job.workers[rank], 10000);
                story_expect(&result, 0, NULL);
        }
        result = story_call(worker, story_gather, (struct story_args){ .unit = 9 });
        story_expect(&result, AUTOEP_ENOENT, "unit 9", "3", NULL);
        result = story_call(worker, story_get, (struct story_args){ .unit = 9, .n = 1 });
        story_expect(&result, AUTOEP_ENOENT, "tensor 9", "3", NULL);
        result = story_call(worker, story_get, (struct story_args){ .unit = 2, .n = 1001 });
        story_expect(&result, AUTOEP_EINVAL, "'u2.w'", "1001", "1000", NULL);
        story_must(worker, story_scatter, scatter);
        result = story_call(worker, story_scatter, scatter);
        story_expect(&result, AUTOEP_EEXIST, "'u2'", "micro-batch 0", NULL);
        result = story_call(worker, gather_too_much, none);
        story_expect(&result, AUTOEP_EBUDGET, "'u1'", "401500", NULL);
        result = story_call(worker, story_gather,
                            (struct story_args){ .timeout_ms = 2000, .unit = 1 });
        story_expect(&result, 0, NULL);
        result = story_call(worker, story_step, none);
        story_expect(&result, AUTOEP_EHELD, "'u1'", NULL);
        story_must(worker, story_release, none);
        result = story_call(worker, story_release, none);
        story_expect(&result, AUTOEP_EINVAL, "not held", NULL);
}

/* The child of a worker gets errors, the worker goes on. */
static int fork_and_gather(struct story_self *self, const struct story_args *args,
                           struct story_result *result)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;
        int status = 0;
        pid_t pid = fork();

        (void)args;
        if (pid == 0) {
                int r = autoep_gather(self->handle, 0, 1000, &view);
                bool named = strstr(autoep_last_error(), "fork") != NULL;

                autoep_close(self->handle);
                _exit(r == AUTOEP_EFORKED && named ? 0 : 1);
        }
        if (waitpid(pid, &status, 0) != pid || status != 0)
                return -100;
        return story_gather(self, &(struct story_args){ .timeout_ms = 2000 }, result);
}

static void test_fork(void **state)
{
        struct story *story = *state;

        story_job_up(&story->job);
        story_must(&story->job.workers[0], fork_and_gather, none);
        story_must(&story->job.workers[0], story_release, none);
        story_job_steps(&story->job, 2);
        story_job_leave(&story->job);
}

/* ---- leaving ----------------------------------------------------------------------------- */

static void test_one_leaves(void **state)
{
        struct story *story = *state;
        struct story_result result;

        story_job_up(&story->job);
        story_job_steps(&story->job, 1);
        story_must(&story->job.workers[1], story_leave, none);
        /* not a death: what needs no other rank goes on */
        story_must(&story->job.workers[0], story_gather, (struct story_args){ .timeout_ms = 2000 });
        story_must(&story->job.workers[0], story_release, none);
        result = story_call(&story->job.workers[1], story_gather, none);
        story_expect(&result, AUTOEP_ECLOSED, "has left", NULL);
        result = story_call(&story->job.workers[0], story_step,
                            (struct story_args){ .timeout_ms = 2000 });
        story_expect(&result, AUTOEP_ELOST, "rank 1 has left", "round 2", NULL);
        assert_in_range(result.ms, 0, 1000);
}

/* What it is when nothing ends any more: sessions end when their sockets say so. */
static struct proc_stat settled(pid_t pid)
{
        struct proc_stat stat = proc_stat_of(pid);

        for (int quiet = 0, i = 0; quiet < 20 && i < 400; i++) {
                long n_fds = stat.n_fds;

                proc_sleep_ms(5);
                stat = proc_stat_of(pid);
                quiet = stat.n_fds == n_fds ? quiet + 1 : 0;
        }
        return stat;
}

static void test_last_leave_frees(void **state)
{
        struct story *story = *state;
        struct proc_stat before[2], after;

        for (uint32_t i = 0; i < 4; i++) {
                for (uint32_t node = 0; node < 2 && i == 2; node++)
                        before[node] = settled(story->bed.daemons[node].pid);
                story_job_init(&story->job, &story->bed, "bad", 2);
                story_job_up(&story->job);
                story_job_steps(&story->job, 2);
                story_job_leave(&story->job);
                story_job_end(&story->job);
        }
        for (uint32_t node = 0; node < 2; node++) {
                after = settled(story->bed.daemons[node].pid);
                assert_int_equal(after.n_fds, before[node].n_fds);
                assert_int_equal(after.n_threads, before[node].n_threads);
                assert_in_range(after.rss_kib, 0, before[node].rss_kib + 2048);
        }
}

#define STORY(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                STORY(test_reader_of_unknown_job),
                STORY(test_wrong_token),
                STORY(test_wrong_user),
                STORY(test_rank_claimed_twice),
                STORY(test_other_world),
                STORY(test_no_daemon),
                STORY(test_models),
                STORY(test_ranks_disagree),
                STORY(test_initial_values_differ),
                STORY(test_collectives_in_another_order),
                STORY(test_calls),
                STORY(test_fork),
                STORY(test_one_leaves),
                STORY(test_last_leave_frees),
        };

        return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
