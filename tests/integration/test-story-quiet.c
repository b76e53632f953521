/* SPDX-License-Identifier: Apache-2.0 */
/*
 * No lock and no allocation on the data path: in 100 steps, after some to warm up, the daemons'
 * loop and compute threads call neither malloc nor a mutex, and a worker doesn't in gather, release
 * and scatter. $INTERPOSE is the preloaded counter, tests/lib/interpose.c.
 */
#include "tests/integration/story.h"
#include "tests/lib/test.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static void test_daemons(void **state)
{
        struct story *story = *state;
        unsigned long n = 0;

        story_job_init(&story->job, &story->bed, "quiet", 2);
        story_job_up(&story->job);
        story_job_steps(&story->job, WARM);
        story_mark(&story->bed, SIGUSR1);
        story_job_steps(&story->job, STEPS);
        story_mark(&story->bed, SIGUSR2);
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

/* ---- the worker -------------------------------------------------------------------------- */

/* A whole step, of which only gathers that the cache answers, releases and scatters are looked at;
 * the value is what the counter in this process has seen. */
static int counted_step(struct story_self *self, const struct story_args *args,
                        struct story_result *result)
{
        const struct story_counter counter = story_counter();
        unsigned long n = 0;
        int r = 0;

        for (uint32_t pass = 0; pass < 2; pass++) {
                if (pass == 1)
                        counter.begin();
                for (uint32_t unit = 0; unit < STORY_UNITS && r == 0; unit++) {
                        const struct story_args at = { .unit = unit, .timeout_ms = 10000 };

                        r = story_gather(self, &at, result);
                        if (r == 0)
                                r = story_release(self, &at, result);
                        if (r == 0 && pass == 1)
                                r = story_scatter(self, &at, result);
                }
                if (pass == 1)
                        n = counter.end(STDERR_FILENO);
        }
        if (r == 0)
                r = story_step(self, args, result);
        result->value = n;
        return r;
}

static void test_worker(void **state)
{
        struct story *story = *state;
        unsigned long n = 0;

        story_job_init(&story->job, &story->bed, "quiet", 2);
        story_job_up(&story->job);
        story_job_steps(&story->job, WARM);
        for (uint32_t i = 0; i < STEPS; i++) {
                for (uint32_t rank = 0; rank < 2; rank++)
                        story_post(&story->job.workers[rank], counted_step,
                                   (struct story_args){ .timeout_ms = 10000 });
                for (uint32_t rank = 0; rank < 2; rank++) {
                        const struct story_result result =
                                story_take(&story->job.workers[rank], 20000);

                        story_expect(&result, 0, NULL);
                        n += result.value;
                }
        }
        story_job_leave(&story->job);
        if (n)
                fail_msg("%lu allocations and locks in workers' gathers and scatters", n);
}

#define STORY(test, setup) cmocka_unit_test_setup_teardown(test, setup, story_teardown)

static int run(void)
{
        const struct CMUnitTest tests[] = {
                STORY(test_daemons, setup_shm),
                STORY(test_daemons, setup_tcp),
                STORY(test_worker, setup_shm),
                STORY(test_worker, setup_tcp),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}

int main(void)
{
        story_preload("test-story-quiet");
        return run();
}
