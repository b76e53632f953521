/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A wait never outlives its deadline, whatever happens to a worker or a daemon of two nodes: every
 * waiting call ends in time, with words that name who is missing, and the daemons that are left go
 * on to serve.
 */
#include "tests/integration/story.h"
#include "proto/wire/local.h"
#include "tests/lib/test.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define DEADLINE_MS 700
#define LATE_MS 150
#define BIG_N 5000000u /* its fp32 gradient is larger than the smallest ring */

/* A waiting call and how its arguments stand. */
struct waiting {
        const char *name;
        story_fn *fn;
        struct story_args args;
};

static const struct waiting calls[] = {
        { "gather", story_gather, { .unit = 0 } },
        { "gather_range", story_gather_range, { .unit = 0, .n = 1000 } },
        { "scatter", story_scatter, { .unit = 1 } },
        { "step", story_step, { 0 } },
        { "exchange", story_exchange, { 0 } },
        { "get", story_get, { .unit = 0, .n = 300000 } },
        { "put", story_put, { .unit = 0, .n = 300000 } },
        { "leave", story_leave, { 0 } },
};
#define N_CALLS (sizeof(calls) / sizeof(calls[0]))

static void init_job(struct story *story, const char *name)
{
        story_job_init(&story->job, &story->bed, name, 4);
        for (uint32_t rank = 0; rank < 4; rank++) {
                story->job.workers[rank].self.unit_n[1] = BIG_N;
                story->job.workers[rank].self.ring_len = AE_LOCAL_RING_MIN;
        }
}

static void check_in_time(const char *name, uint32_t rank, const struct story_result *result)
{
        if (result->ms > DEADLINE_MS + LATE_MS)
                fail_msg("%s of rank %u took %d ms of %d: %d: %s", name, rank, result->ms,
                         DEADLINE_MS, result->status, result->text);
}

/* What is right without the others: a unit in the node's cache, and a leave. */
static bool is_alone(const struct waiting *call)
{
        return call->fn == story_gather || call->fn == story_gather_range ||
               call->fn == story_leave;
}

static bool names_any(const char *text, const char *const *words)
{
        for (; *words; words++)
                if (strstr(text, *words))
                        return true;
        return false;
}

/* Posts the call on all ranks but @except (AUTOEP_NONE: on all) and takes what comes of it. */
static void call_all(struct story *story, const struct waiting *call, uint32_t except,
                     struct story_result *results)
{
        struct story_args args = call->args;

        args.timeout_ms = DEADLINE_MS;
        for (uint32_t rank = 0; rank < story->job.world; rank++)
                if (rank != except)
                        story_post(&story->job.workers[rank], call->fn, args);
        for (uint32_t rank = 0; rank < story->job.world; rank++)
                if (rank != except)
                        results[rank] = story_take(&story->job.workers[rank], 5 * DEADLINE_MS);
}

static void check_failed(const char *name, uint32_t rank, const struct story_result *result,
                         const char *const *words)
{
        check_in_time(name, rank, result);
        if (result->status != AUTOEP_ETIMEDOUT && result->status != AUTOEP_ELOST)
                fail_msg("%s of rank %u ended with %d: %s", name, rank, result->status,
                         result->text);
        if (!names_any(result->text, words))
                fail_msg("%s of rank %u does not name '%s': %s", name, rank, words[0],
                         result->text);
}

/* The same of a job that was live: the round is named too. */
static void check_lost(const char *name, uint32_t rank, const struct story_result *result,
                       const char *const *words)
{
        static const char *const rounds[] = { "round 3", "round 4", NULL }; /* 4: after a put */

        check_failed(name, rank, result, words);
        if (!names_any(result->text, rounds))
                fail_msg("%s of rank %u does not name the round: %s", name, rank, result->text);
}

/* A new job of the same name, with all its steps, on the daemons as they are. */
static void serve_again(struct story *story)
{
        story_job_end(&story->job);
        story_job_init(&story->job, &story->bed, "story", 4);
        story_job_up(&story->job);
        story_job_steps(&story->job, 2);
        story_job_leave(&story->job);
        story_job_end(&story->job);
}

static void up(struct story *story)
{
        init_job(story, "story");
        story_job_up(&story->job);
        story_job_steps(&story->job, 2);
}

/* ---- a worker ---------------------------------------------------------------------------- */

static void test_worker_killed(void **state)
{
        static const char *const words[] = { "rank 3", NULL };
        struct story *story = *state;
        struct story_result results[4];

        for (size_t i = 0; i < N_CALLS; i += story_thin()) {
                up(story);
                for (uint32_t rank = 0; rank < 3; rank++) {
                        struct story_args args = calls[i].args;

                        args.timeout_ms = DEADLINE_MS;
                        story_post(&story->job.workers[rank], calls[i].fn, args);
                }
                story_worker_end(&story->job.workers[3]);
                for (uint32_t rank = 0; rank < 3; rank++) {
                        results[rank] = story_take(&story->job.workers[rank], 5 * DEADLINE_MS);
                        /* done before the kill, or refused: puts go one at a time */
                        if (results[rank].status == 0 ||
                            (calls[i].fn == story_put && results[rank].status == AUTOEP_ESTATE))
                                check_in_time(calls[i].name, rank, &results[rank]);
                        else
                                check_lost(calls[i].name, rank, &results[rank], words);
                }
                /* and what comes after it fails at once, for good */
                call_all(story, &calls[i], 3, results);
                for (uint32_t rank = 0; rank < 3; rank++) {
                        if (is_alone(&calls[i]) && (results[rank].status == 0 ||
                                                    results[rank].status == AUTOEP_ECLOSED))
                                continue; /* it has left; the cache is right for ever */
                        assert_int_equal(results[rank].status, AUTOEP_ELOST);
                        check_lost(calls[i].name, rank, &results[rank], words);
                }
                serve_again(story);
        }
}

static void test_worker_stopped(void **state)
{
        static const char *const words[] = { "rank 3", "3 (node 1)", NULL };
        struct story *story = *state;
        struct story_result results[4];
        bool needs_rank;

        for (size_t i = 2 % story_thin(); i < N_CALLS; i += story_thin()) {
                up(story);
                kill(story->job.workers[3].pid, SIGSTOP);
                call_all(story, &calls[i], 3, results);
                needs_rank = calls[i].fn == story_step || calls[i].fn == story_exchange;
                for (uint32_t rank = 0; rank < 3; rank++) {
                        check_in_time(calls[i].name, rank, &results[rank]);
                        if (needs_rank)
                                check_lost(calls[i].name, rank, &results[rank], words);
                        else if (calls[i].fn == story_put)
                                assert_true(results[rank].status == 0 ||
                                            results[rank].status == AUTOEP_ESTATE);
                        else if (results[rank].status != 0)
                                fail_msg("%s of rank %u needs no other rank, but: %d: %s",
                                         calls[i].name, rank, results[rank].status,
                                         results[rank].text);
                }
                serve_again(story);
        }
}

/* ---- a daemon ---------------------------------------------------------------------------- */

static void daemon_gone(struct story *story, uint32_t node, int signal)
{
        const char *const words[] = { node ? "node 1" : "node 0", NULL };
        struct story_result results[4];
        struct story_args args;

        for (size_t i = (2 * node + (signal == SIGSTOP)) % story_thin(); i < N_CALLS;
             i += story_thin()) {
                up(story);
                proc_daemon_signal(&story->bed, node, signal);
                call_all(story, &calls[i], AUTOEP_NONE, results);
                for (uint32_t rank = 0; rank < 4; rank++) {
                        check_in_time(calls[i].name, rank, &results[rank]);
                        if (results[rank].status == 0) {
                                /* or a ring that the own daemon empties */
                                assert_true(is_alone(&calls[i]) || calls[i].fn == story_scatter);
                                continue;
                        }
                        check_lost(calls[i].name, rank, &results[rank], words);
                }
                args = (struct story_args){ .timeout_ms = DEADLINE_MS };
                for (uint32_t rank = 0; rank < 4 && signal == SIGKILL; rank++) {
                        results[rank] = story_call(&story->job.workers[rank], story_redo, args);
                        if (results[rank].status != AUTOEP_ECLOSED || calls[i].fn != story_leave)
                                check_lost("a later step", rank, &results[rank], words);
                }
                if (signal == SIGSTOP)
                        proc_daemon_signal(&story->bed, node, SIGCONT);
                else
                        proc_daemon_start(&story->bed, node);
                serve_again(story);
        }
}

static void test_daemon_killed(void **state)
{
        daemon_gone(*state, 1, SIGKILL);
}

static void test_daemon_stopped(void **state)
{
        daemon_gone(*state, 1, SIGSTOP);
}

static void test_decider_killed(void **state)
{
        daemon_gone(*state, 0, SIGKILL);
}

static void test_decider_stopped(void **state)
{
        daemon_gone(*state, 0, SIGSTOP);
}

/* ---- what the words name ----------------------------------------------------------------- */

static void tweak_cache(const struct story_self *self, struct autoep_model *model,
                        struct autoep_tensor *tensors)
{
        (void)self;
        (void)tensors;
        model->cache_len = 1300000; /* two of the three units */
}

/* Two ranks, a node each, that have gathered two units; the third isn't in their caches. */
static void up_small(struct story *story)
{
        story_job_init(&story->job, &story->bed, "story", 2);
        for (uint32_t rank = 0; rank < 2; rank++) {
                struct story_self *self = &story->job.workers[rank].self;

                for (uint32_t unit = 0; unit < STORY_UNITS; unit++)
                        self->unit_n[unit] = 300000;
                self->hold_len = 610000;
                self->tweak = tweak_cache;
        }
        story_job_up(&story->job);
        for (uint32_t unit = 0; unit < 2; unit++) {
                const struct story_args args = { .unit = unit, .timeout_ms = 5000 };

                story_job_must(&story->job, story_gather, args);
                story_job_must(&story->job, story_release, args);
        }
}

/* A daemon that stands still keeps its connections: each wait for it ends at its own deadline and
 * says for which node, unit and round it waited. */
static void stopped_is_named(struct story *story, uint32_t node)
{
        const struct story_args args = { .unit = 2, .timeout_ms = DEADLINE_MS };
        struct story_worker *other = &story->job.workers[!node];
        struct story_worker *own = &story->job.workers[node];
        const char *const word = node ? "node 1" : "node 0";
        struct story_result result;

        up_small(story);
        proc_daemon_signal(&story->bed, node, SIGSTOP);
        result = story_call(other, story_gather, args);
        check_in_time("gather", !node, &result);
        story_expect(&result, AUTOEP_ETIMEDOUT, "'u2'", word, "round 1", NULL);
        result = story_call(own, story_gather, args);
        check_in_time("gather", node, &result);
        story_expect(&result, AUTOEP_ETIMEDOUT, "'u2'", word, "round 1", NULL);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&story->job.workers[rank], story_step, args);
        for (uint32_t rank = 0; rank < 2; rank++) {
                result = story_take(&story->job.workers[rank], 5 * DEADLINE_MS);
                check_in_time("step", rank, &result);
                story_expect(&result, AUTOEP_ETIMEDOUT, word, "round 1", NULL);
        }
        proc_daemon_signal(&story->bed, node, SIGCONT);
        serve_again(story);
}

/* A daemon that dies under a wait ends it at once, with the same words. */
static void killed_is_named(struct story *story, uint32_t node, story_fn *gather)
{
        const struct story_args args = { .unit = 2, .n = 1000, .timeout_ms = 10 * DEADLINE_MS };
        const char *const word = node ? "node 1" : "node 0";
        struct story_result result;

        up_small(story);
        proc_daemon_signal(&story->bed, node, SIGSTOP);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&story->job.workers[rank], gather, args);
        proc_sleep_ms(LATE_MS); /* both wait */
        proc_daemon_signal(&story->bed, node, SIGKILL);
        for (uint32_t rank = 0; rank < 2; rank++) {
                result = story_take(&story->job.workers[rank], 5 * DEADLINE_MS);
                check_in_time("gather", rank, &result);
                story_expect(&result, AUTOEP_ELOST, "'u2'", word, "round 1", NULL);
        }
        proc_daemon_start(&story->bed, node);
        serve_again(story);
}

static void test_killed_is_named(void **state)
{
        killed_is_named(*state, 1, story_gather);
        killed_is_named(*state, 0, story_gather_range);
}

static void test_stopped_is_named(void **state)
{
        stopped_is_named(*state, 1);
        stopped_is_named(*state, 0);
}

/* ---- a pause ----------------------------------------------------------------------------- */

/* What a rank says before long work makes the deadlines of all grow, on its node and on the other:
 * of who waits already, and of who begins to wait while it works. */
static void test_pause(void **state)
{
        const struct story_args args = { .timeout_ms = DEADLINE_MS };
        struct story *story = *state;
        struct story_worker *workers = story->job.workers;
        struct story_result result;

        up(story);
        for (uint32_t rank = 0; rank < 3; rank += 2)
                story_post(&workers[rank], story_step, args);
        story_must(&workers[3], story_pause, (struct story_args){ .n = 5 });
        proc_sleep_ms(DEADLINE_MS / 2); /* all have heard of it */
        story_post(&workers[1], story_step, args);
        proc_sleep_ms(2 * DEADLINE_MS);
        story_post(&workers[3], story_step, args);
        for (uint32_t rank = 0; rank < 4; rank++) {
                result = story_take(&workers[rank], 5 * DEADLINE_MS);
                story_expect(&result, 0, NULL);
        }
        /* and when its step is through the pause is over, however long it was to be */
        for (uint32_t rank = 0; rank < 3; rank++)
                story_post(&workers[rank], story_step, args);
        for (uint32_t rank = 0; rank < 3; rank++) {
                result = story_take(&workers[rank], 5 * DEADLINE_MS);
                check_in_time("step", rank, &result);
                story_expect(&result, AUTOEP_ETIMEDOUT, "rank 3", NULL);
        }
        story_post(&workers[3], story_step, args);
        for (uint32_t rank = 0; rank < 3; rank++)
                story_post(&workers[rank], story_step, args);
        for (uint32_t rank = 0; rank < 4; rank++) {
                result = story_take(&workers[rank], 5 * DEADLINE_MS);
                story_expect(&result, 0, NULL);
        }
        story_job_leave(&story->job);
}

/* The tool waits for its daemon no longer than it was told. */
static void test_tool_and_stopped_daemon(void **state)
{
        struct story *story = *state;
        const char *const argv[] = { getenv("AUTOEP_CTL"), "--socket",
                                     story->bed.daemons[0].socket, "--timeout", "1", "jobs",
                                     NULL };
        char output[1024];

        assert_non_null(argv[0]);
        assert_int_equal(proc_run(argv, 20000, output, sizeof(output)), 0);
        proc_daemon_signal(&story->bed, 0, SIGSTOP);
        assert_int_equal(proc_run(argv, 20000, output, sizeof(output)), 5);
        if (!strstr(output, story->bed.daemons[0].socket) || !strstr(output, "in time"))
                fail_msg("'%s' does not name the daemon that has not answered", output);
        proc_daemon_signal(&story->bed, 0, SIGCONT);
        assert_int_equal(proc_run(argv, 20000, output, sizeof(output)), 0);
}

/* ---- before there is a job --------------------------------------------------------------- */

/* Ranks whose node is @node open and register, one of them or the others' daemon is away. */
static void test_forming(void **state)
{
        struct story *story = *state;
        struct story_result result;

        /* a rank that never comes */
        init_job(story, "story");
        for (uint32_t rank = 0; rank < 3; rank++) {
                story_worker_start(&story->job.workers[rank]);
                story_must(&story->job.workers[rank], story_open, (struct story_args){ 0 });
                story_post(&story->job.workers[rank], story_register,
                           (struct story_args){ .timeout_ms = DEADLINE_MS });
        }
        for (uint32_t rank = 0; rank < 3; rank++) {
                result = story_take(&story->job.workers[rank], 5 * DEADLINE_MS);
                check_in_time("register", rank, &result);
                story_expect(&result, AUTOEP_ETIMEDOUT, "rank 3", "story", NULL);
        }
        story_job_end(&story->job);

        /* a rank that comes and never registers */
        init_job(story, "story");
        for (uint32_t rank = 0; rank < 4; rank++) {
                story_worker_start(&story->job.workers[rank]);
                story_must(&story->job.workers[rank], story_open, (struct story_args){ 0 });
        }
        for (uint32_t rank = 0; rank < 3; rank++)
                story_post(&story->job.workers[rank], story_register,
                           (struct story_args){ .timeout_ms = DEADLINE_MS });
        for (uint32_t rank = 0; rank < 3; rank++) {
                result = story_take(&story->job.workers[rank], 5 * DEADLINE_MS);
                check_in_time("register", rank, &result);
                story_expect(&result, AUTOEP_ETIMEDOUT, "rank", "3", NULL);
        }
        serve_again(story);
}

static void form_without(struct story *story, uint32_t node, int signal)
{
        const char *const words[] = { node ? "node 1" : "node 0", NULL };
        struct story_result result;

        proc_daemon_signal(&story->bed, node, signal);
        init_job(story, "story");
        for (uint32_t rank = 0; rank < 4; rank++) {
                struct story_worker *worker = &story->job.workers[rank];

                worker->self.timeout_ms = DEADLINE_MS;
                story_worker_start(worker);
                story_post(worker, story_open, (struct story_args){ 0 });
                result = story_take(worker, 5 * DEADLINE_MS);
                check_in_time("open", rank, &result);
                if (signal == SIGKILL && worker->self.node == node)
                        story_expect(&result, AUTOEP_ENOENT, "no daemon listens", NULL);
                else if (result.status < 0)
                        check_failed("open", rank, &result,
                                     worker->self.node == node ?
                                             (const char *const[]){ "daemon", NULL } :
                                             words);
                else
                        story_post(worker, story_register,
                                   (struct story_args){ .timeout_ms = DEADLINE_MS });
                if (result.status < 0)
                        continue;
                result = story_take(worker, 5 * DEADLINE_MS);
                check_failed("register", rank, &result,
                             (const char *const[]){ words[0], "rank", NULL });
        }
        story_job_end(&story->job);
        /* what the ranks that gave up had asked for is not in their successors' way */
        if (signal == SIGSTOP)
                proc_daemon_signal(&story->bed, node, SIGCONT);
        else
                proc_daemon_start(&story->bed, node);
        serve_again(story);
}

static void test_forming_without_daemon(void **state)
{
        form_without(*state, 1, SIGKILL);
        form_without(*state, 0, SIGKILL);
        form_without(*state, 1, SIGSTOP);
        form_without(*state, 0, SIGSTOP);
}

#define STORY(test, setup) cmocka_unit_test_setup_teardown(test, setup, story_teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                STORY(test_worker_killed, story_setup_shm),
                STORY(test_worker_stopped, story_setup_tcp),
                STORY(test_daemon_killed, story_setup_tcp),
                STORY(test_daemon_stopped, story_setup_shm),
                STORY(test_decider_killed, story_setup_shm),
                STORY(test_decider_stopped, story_setup_tcp),
                STORY(test_stopped_is_named, story_setup_tcp),
                STORY(test_stopped_is_named, story_setup_shm),
                STORY(test_killed_is_named, story_setup_tcp),
                STORY(test_pause, story_setup_tcp),
                STORY(test_tool_and_stopped_daemon, story_setup_tcp),
                STORY(test_forming, story_setup_tcp),
                STORY(test_forming_without_daemon, story_setup_shm),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
