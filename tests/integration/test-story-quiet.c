/* SPDX-License-Identifier: Apache-2.0 */
/*
 * No lock and no allocation on the data path: in 100 steps, after some to warm up, the daemons'
 * loop and compute threads call neither malloc nor a mutex, and a worker doesn't in gather, release
 * and scatter; where it has to wait, in a miss, an exchange and a step, it allocates nothing. Nodes
 * have two workers, steps two micro-batches, and the cache is too small for all units. $INTERPOSE
 * is the preloaded counter, tests/lib/interpose.c.
 */
#include "tests/integration/story.h"
#include "tests/lib/test.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define WARM 20
#define STEPS 100

static int setup_tcp(void **state)
{
        return story_setup_counted(state, "tcp");
}

static int setup_shm(void **state)
{
        return story_setup_counted(state, "shm");
}

/* ---- the job ----------------------------------------------------------------------------- */

#define UNITS 7
#define UNIT_N 100000u
#define UNIT_LEN (2 * UNIT_N + 256)

static void add_units(const struct story_self *self, struct autoep_model *model,
                      struct autoep_tensor *tensors)
{
        static const char *const names[UNITS] = { "u0", "u1", "u2", "u3", "u4", "u5", "u6" };

        for (uint32_t i = 0; i < UNITS; i++) {
                tensors[i] = tensors[0];
                tensors[i].name = tensors[i].unit = names[i];
                tensors[i].init = self->data;
        }
        model->n_tensors = UNITS;
        model->cache_len = UINT64_C(5) * UNIT_LEN; /* the least: two of each worker, and one */
        model->slots = 2;
}

static void up(struct story *story)
{
        story_job_init(&story->job, &story->bed, "quiet", 4);
        for (uint32_t rank = 0; rank < 4; rank++) {
                struct story_self *self = &story->job.workers[rank].self;

                for (uint32_t unit = 0; unit < STORY_UNITS; unit++)
                        self->unit_n[unit] = UNIT_N;
                self->hold_len = UINT64_C(2) * UNIT_LEN;
                self->tweak = add_units;
        }
        story_job_up(&story->job);
}

static int exchange(struct story_self *self, struct story_result *result)
{
        return story_exchange(self, &(struct story_args){ .timeout_ms = 10000 }, result);
}

/* One micro-batch, the units in turn and then as many exchanges. */
static int micro_batch(struct story_self *self, struct story_result *result)
{
        int r = 0;

        for (uint32_t unit = 0; unit < UNITS && r == 0; unit++) {
                const struct story_args args = { .unit = unit, .timeout_ms = 10000 };

                r = story_gather(self, &args, result);
                if (r == 0)
                        r = story_release(self, &args, result);
                if (r == 0)
                        r = story_scatter(self, &args, result);
        }
        if (r == 0)
                r = exchange(self, result);
        return r == 0 ? autoep_micro_batch_end(self->handle) : r;
}

static int whole_step(struct story_self *self, struct story_result *result)
{
        int r = micro_batch(self, result);

        if (r == 0)
                r = micro_batch(self, result);
        if (r == 0)
                r = story_step(self, &(struct story_args){ .timeout_ms = 10000 }, result);
        return r;
}

/* n steps, of which the value is how many gathers the cache didn't have. */
static int whole_steps(struct story_self *self, const struct story_args *args,
                       struct story_result *result)
{
        struct autoep_stats before = { .size = sizeof(before) }, after = before;
        int r = autoep_stats(self->handle, &before);

        for (uint32_t i = 0; i < args->n && r == 0; i++)
                r = whole_step(self, result);
        if (r == 0)
                r = autoep_stats(self->handle, &after);
        result->value = after.gathers - after.gather_hits - (before.gathers - before.gather_hits);
        return r;
}

static uint64_t run_steps(struct story *story, uint32_t n)
{
        uint64_t misses = 0;

        for (uint32_t rank = 0; rank < 4; rank++)
                story_post(&story->job.workers[rank], whole_steps, (struct story_args){ .n = n });
        for (uint32_t rank = 0; rank < 4; rank++) {
                const struct story_result result = story_take(&story->job.workers[rank], 60000);

                story_expect(&result, 0, NULL);
                misses += result.value;
        }
        return misses;
}

/* ---- the daemons ------------------------------------------------------------------------- */

static void test_daemons(void **state)
{
        struct story *story = *state;
        unsigned long n = 0;
        uint64_t misses;

        up(story);
        (void)run_steps(story, WARM);
        story_mark(&story->bed, SIGUSR1);
        misses = run_steps(story, STEPS);
        story_mark(&story->bed, SIGUSR2);
        assert_in_range(misses, STEPS, UINT64_MAX);
        for (uint32_t node = 0; node < 2; node++) {
                static char text[65536];
                unsigned long of_node = story_report_of(&story->bed, node, "total", text,
                                                        sizeof(text));

                if (of_node)
                        fprintf(stderr, "---- node %u, %s, in %d steps:\n%s", node,
                                story->bed.transport, STEPS, text);
                n += of_node;
        }
        story_job_leave(&story->job);
        if (n)
                fail_msg("%lu allocations and locks in %d steps over %s", n, STEPS,
                         story->bed.transport);
}

/* ---- the workers ------------------------------------------------------------------------- */

/* What the counter sees in gathers that the cache answers, releases and scatters. The first gather
 * of each unit is often a miss; so is the second, once in a while, when the daemon has just picked
 * the unit to go and puts it back since it is held. Neither is counted. */
static int counted_hits(struct story_self *self, const struct story_args *args,
                        struct story_result *result)
{
        struct autoep_stats before = { .size = sizeof(before) }, after = before;
        const struct story_counter counter = story_counter();
        unsigned long n = 0, n_one;
        int r = 0;

        (void)args;
        for (uint32_t unit = 0; unit < UNITS && r == 0; unit++) {
                const struct story_args at = { .unit = unit, .timeout_ms = 10000 };
                struct autoep_view held = AUTOEP_VIEW_INIT; /* so that it stays in the cache */

                r = autoep_gather(self->handle, unit, 10000, &held);
                if (r == 0)
                        r = autoep_stats(self->handle, &before);
                if (r < 0)
                        return r;
                counter.begin();
                r = story_gather(self, &at, result);
                if (r == 0)
                        r = story_release(self, &at, result);
                if (r == 0)
                        r = story_scatter(self, &at, result);
                n_one = counter.end(STDERR_FILENO);
                if (r == 0)
                        r = autoep_stats(self->handle, &after);
                n += after.gather_hits > before.gather_hits ? n_one : 0;
                (void)autoep_release(self->handle, &held);
        }
        if (r == 0)
                r = story_step(self, &(struct story_args){ .timeout_ms = 10000 }, result);
        result->value = n;
        return r;
}

/* Allocations and maps of a whole step, with all its waits. */
static int counted_step(struct story_self *self, const struct story_args *args,
                        struct story_result *result)
{
        const struct story_counter counter = story_counter();
        int r;

        (void)args;
        counter.begin();
        r = whole_step(self, result);
        (void)counter.end(-1);
        result->value = counter.memory();
        return r;
}

static unsigned long count(struct story *story, story_fn *fn)
{
        struct story_result results[4];
        unsigned long n = 0;

        for (uint32_t i = 0; i < STEPS; i++) {
                for (uint32_t rank = 0; rank < 4; rank++)
                        story_post(&story->job.workers[rank], fn, (struct story_args){ 0 });
                for (uint32_t rank = 0; rank < 4; rank++) {
                        results[rank] = story_take(&story->job.workers[rank], 20000);
                        n += results[rank].value;
                }
                for (uint32_t rank = 0; rank < 4; rank++)
                        if (results[rank].status)
                                print_error("rank %u: %s\n", rank, results[rank].text);
                for (uint32_t rank = 0; rank < 4; rank++)
                        story_expect(&results[rank], 0, NULL);
        }
        return n;
}

static void test_workers(void **state)
{
        struct story *story = *state;
        unsigned long n;

        up(story);
        (void)run_steps(story, WARM);
        n = count(story, counted_hits);
        if (n)
                fail_msg("%lu allocations and locks in workers' gathers and scatters", n);
        n = count(story, counted_step);
        if (n)
                fail_msg("%lu allocations in workers' steps", n);
        story_job_leave(&story->job);
}

#define STORY(test, setup) cmocka_unit_test_setup_teardown(test, setup, story_teardown)

static int run(void)
{
        const struct CMUnitTest tests[] = {
                STORY(test_daemons, setup_shm),
                STORY(test_daemons, setup_tcp),
                STORY(test_workers, setup_shm),
                STORY(test_workers, setup_tcp),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}

int main(void)
{
        story_preload("test-story-quiet");
        return run();
}
