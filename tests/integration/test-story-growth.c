/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Nothing grows: descriptors, threads and memory of daemons and workers are the same after hundreds
 * of steps, and of daemons after fifty jobs one after another. $STORY_STEPS gives another number of
 * steps.
 */
#include "tests/integration/story.h"
#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>

#define STEPS 300
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

static void test_steps(void **state)
{
        struct story *story = *state;
        const char *given = getenv("STORY_STEPS");
        uint32_t n = given ? (uint32_t)strtoul(given, NULL, 10) : STEPS;
        struct proc_stat daemons[2], workers[2], now;

        story_job_init(&story->job, &story->bed, "long", 2);
        story_job_up(&story->job);
        story_job_steps(&story->job, 40);
        for (uint32_t i = 0; i < 2; i++) {
                daemons[i] = proc_stat_of(story->bed.daemons[i].pid);
                workers[i] = proc_stat_of(story->job.workers[i].pid);
        }
        story_job_steps(&story->job, n);
        for (uint32_t i = 0; i < 2; i++) {
                now = proc_stat_of(story->bed.daemons[i].pid);
                check_flat(i ? "daemon 1" : "daemon 0", &daemons[i], &now);
                now = proc_stat_of(story->job.workers[i].pid);
                check_flat(i ? "worker 1" : "worker 0", &workers[i], &now);
        }
        story_job_leave(&story->job);
}

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
