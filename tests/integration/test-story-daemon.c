/* SPDX-License-Identifier: Apache-2.0 */
/*
 * autoepd as one starts it: what it says to bad settings and to a socket path that is taken,
 * daemons whose peer lists differ, and too little memory.
 */
#include "tests/integration/story.h"
#include "tests/lib/test.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define START_MS 5000

static int setup(void **state)
{
        static struct proc_bed bed;

        proc_bed_init(&bed, 2, "tcp");
        *state = &bed;
        return 0;
}

static int teardown(void **state)
{
        proc_bed_deinit(*state);
        return 0;
}

static void write_file(const char *path, const char *text)
{
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

        assert_true(fd >= 0);
        assert_int_equal(write(fd, text, strlen(text)), strlen(text));
        close(fd);
}

/* ---- settings ---------------------------------------------------------------------------- */

struct bad_start {
        const char *argv[8];
        const char *words[3];
};

static void refuse(const struct bad_start *start, int code)
{
        const char *argv[12] = { proc_autoepd() };
        char output[2048];
        int r;

        for (size_t i = 0; i < 8 && start->argv[i]; i++)
                argv[i + 1] = start->argv[i];
        r = proc_run(argv, START_MS, output, sizeof(output));
        if (r != code)
                fail_msg("%s: exit code %d, not %d: %s", argv[1], r, code, output);
        for (size_t i = 0; i < 3 && start->words[i]; i++)
                if (!strstr(output, start->words[i]))
                        fail_msg("%s: '%s' does not say '%s'", argv[1], output, start->words[i]);
}

static void test_bad_flags(void **state)
{
        static const struct bad_start starts[] = {
                { { "--dev", "--colour", "red" }, { "colour", "--help" } },
                { { "--dev", "--threads", "many" }, { "threads", "'many'", "number" } },
                { { "--dev", "--memory", "12Q" }, { "memory", "'12Q'" } },
                { { "--dev", "--memory", "-1" }, { "memory", "'-1'" } },
                { { "--dev", "--memory", "999999999T" }, { "memory" } },
                { { "--dev", "--node", "2", "--peers", "127.0.0.1:1,127.0.0.1:2" },
                  { "node 2", "2 peers" } },
                { { "--dev", "--transport", "pigeon", "--peers", "127.0.0.1:1,127.0.0.1:2" },
                  { "pigeon" } },
                { { "--dev", "--transport", "pigeon" }, { "pigeon" } },
                { { "--dev", "--log-level", "loud" }, { "log_level", "loud" } },
                { { "--dev", "--threads", "1000" }, { "1000", "256" } },
                { { "--dev", "word" }, { "'word'" } },
                { { "--dev", "--node" }, { "node" } },
        };

        (void)state;
        for (size_t i = 0; i < sizeof(starts) / sizeof(starts[0]); i++)
                refuse(&starts[i], 2);
}

/* Between hosts daemons would have to authenticate: tcp listens on loopback addresses only. */
static void test_tcp_stays_on_the_machine(void **state)
{
        static const char *const addresses[] = { "0.0.0.0:4700", "192.0.2.1:4700", "[::]:4700" };
        struct proc_bed *bed = *state;
        char peers[64];

        for (size_t i = 0; i < sizeof(addresses) / sizeof(addresses[0]); i++) {
                (void)snprintf(peers, sizeof(peers), "%s,127.0.0.1:4701", addresses[i]);
                refuse(&(struct bad_start){ { "--dev", "--socket", bed->daemons[0].socket,
                                              "--transport", "tcp", "--peers", peers },
                                            { addresses[i], "loopback", "authenticate" } },
                       1);
        }
}

static void test_bad_files(void **state)
{
        static const struct {
                const char *text, *words[2];
        } files[] = {
                { "colour = red\n", { "colour", "story.conf" } },
                { "threads = many\n", { "threads", "'many'" } },
                { "[garden]\nnode = 0\n", { "garden", "story.conf" } },
                { "node\n", { "line 1", "story.conf" } },
        };
        struct proc_bed *bed = *state;
        char path[128];

        (void)snprintf(path, sizeof(path), "%s/story.conf", bed->dir);
        for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
                const struct bad_start start = { { "--dev", "--config", path },
                                                 { files[i].words[0], files[i].words[1] } };

                write_file(path, files[i].text);
                refuse(&start, 2);
        }
        refuse(&(struct bad_start){ { "--config", "/does/not/exist" }, { "/does/not/exist" } }, 1);
}

/* Kernels that are not there are refused before anybody has gathered, not at the first task. */
static void test_bad_kernels(void **state)
{
        struct proc_bed *bed = *state;

        setenv("AUTOEP_CPU", "abacus", 1);
        refuse(&(struct bad_start){ { "--dev", "--socket", bed->daemons[0].socket },
                                    { "AUTOEP_CPU=abacus" } },
               1);
        unsetenv("AUTOEP_CPU");
}

/* ---- limits ------------------------------------------------------------------------------ */

/* A shell's soft limit is there for programs that select(); the daemon takes all that it may. */
static void test_takes_all_descriptors(void **state)
{
        struct proc_bed *bed = *state;
        struct rlimit old, low, got;
        char text[128];

        assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
        assert_true(old.rlim_max > 256);
        low = (struct rlimit){ .rlim_cur = 256, .rlim_max = old.rlim_max };
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
        bed->n_nodes = 1;
        proc_daemon_start(bed, 0);
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
        assert_int_equal(prlimit(bed->daemons[0].pid, RLIMIT_NOFILE, NULL, &got), 0);
        assert_int_equal(got.rlim_cur, old.rlim_max);
        assert_int_equal(got.rlim_max, old.rlim_max);
        (void)snprintf(text, sizeof(text), "raised its limit of open files from=256 to=%llu",
                       (unsigned long long)old.rlim_max);
        assert_true(proc_daemon_log_has(bed, 0, text));
        assert_int_equal(proc_daemon_signal(bed, 0, SIGTERM), 0);
}

/* ---- the socket -------------------------------------------------------------------------- */

static void test_plain_file_is_left_alone(void **state)
{
        struct proc_bed *bed = *state;
        const char *path = bed->daemons[0].socket;
        char text[16] = "";
        int fd;

        write_file(path, "precious");
        refuse(&(struct bad_start){ { "--dev", "--socket", path },
                                    { path, "not a socket", "left alone" } },
               1);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        assert_true(fd >= 0);
        assert_int_equal(read(fd, text, sizeof(text) - 1), 8);
        close(fd);
        assert_string_equal(text, "precious");
}

static void test_two_daemons_at_one_socket(void **state)
{
        struct proc_bed *bed = *state;
        const char *path = bed->daemons[0].socket;
        struct story_job job;

        bed->n_nodes = 1;
        proc_daemon_start(bed, 0);
        refuse(&(struct bad_start){ { "--dev", "--socket", path }, { path, "another daemon" } }, 1);
        /* and the first one still serves */
        story_job_init(&job, bed, "one", 1);
        story_job_up(&job);
        story_job_steps(&job, 2);
        story_job_leave(&job);
        story_job_end(&job);
        assert_int_equal(proc_daemon_signal(bed, 0, SIGTERM), 0);
        assert_int_equal(access(path, F_OK), -1);
}

static void test_stale_socket_is_replaced(void **state)
{
        struct proc_bed *bed = *state;
        struct stat stat;

        bed->n_nodes = 1;
        proc_daemon_start(bed, 0);
        proc_daemon_signal(bed, 0, SIGKILL);
        assert_int_equal(lstat(bed->daemons[0].socket, &stat), 0);
        proc_daemon_start(bed, 0);
        assert_int_equal(lstat(bed->daemons[0].socket, &stat), 0);
        assert_int_equal(stat.st_mode & 0777, 0660);
        assert_int_equal(proc_daemon_signal(bed, 0, SIGTERM), 0);
}

/* ---- the cluster ------------------------------------------------------------------------- */

static void test_peer_lists_differ(void **state)
{
        struct proc_bed *bed = *state;
        char same[sizeof(bed->peers)];
        struct story_job job;
        struct story_result result;

        (void)snprintf(same, sizeof(same), "%s", bed->peers);
        proc_daemon_start(bed, 0);
        (void)snprintf(bed->peers + strlen(bed->peers), sizeof(bed->peers) - strlen(bed->peers),
                       ",127.0.0.1:1");
        proc_daemon_start(bed, 1);
        proc_daemon_await_log(bed, 1, "peer lists differ", 3000);
        (void)snprintf(bed->peers, sizeof(bed->peers), "%s", same);
        story_job_init(&job, bed, "split", 2);
        story_worker_start(&job.workers[0]);
        story_must(&job.workers[0], story_open, (struct story_args){ 0 });
        result = story_call(&job.workers[0], story_register,
                            (struct story_args){ .timeout_ms = 700 });
        story_expect(&result, AUTOEP_ETIMEDOUT, "node 1", "peer lists differ", NULL);
        story_job_end(&job);
}

/* Bytes that the tool shows as the job's. */
static unsigned long long memory_shown(const struct proc_daemon *daemon)
{
        static const char key[] = "\"memory_len\":";
        const char *const argv[] = { getenv("AUTOEP_CTL"), "--socket", daemon->socket,
                                     "-o", "json", "jobs", NULL };
        char output[4096];
        const char *at;

        assert_non_null(argv[0]);
        assert_int_equal(proc_run(argv, 5000, output, sizeof(output)), 0);
        at = strstr(output, key);
        if (!at)
                fail_msg("'%s' does not say %s", output, key);
        return strtoull(at + strlen(key), NULL, 10);
}

/* At registration each daemon says what a job takes of its memory, which is what the tool shows as
 * soon as the memory for the initial values is given back. */
static void check_told(struct proc_bed *bed, uint32_t node)
{
        const uint64_t until = proc_now_ms() + 5000;
        unsigned long long parts[7], sum, budget, parts_sum = 0, shown;
        char line[512];

        proc_daemon_log_line(bed, node, "memory of job 'told' on node ", line, sizeof(line));
        if (sscanf(line,
                   "memory of job 'told' on node %*u: %llu MiB = cache %llu + shard %llu + node "
                   "sums %llu + owner sums %llu + inbox %llu + overflow %llu + out %llu; budget "
                   "%llu MiB",
                   &sum, &parts[0], &parts[1], &parts[2], &parts[3], &parts[4], &parts[5],
                   &parts[6], &budget) != 9)
                fail_msg("'%s' is not as expected", line);
        for (size_t i = 0; i < 7; i++)
                parts_sum += parts[i];
        assert_in_range(sum, parts_sum, parts_sum + 7); /* each is cut to whole MiB */
        assert_int_equal(budget, 300);
        do
                shown = memory_shown(&bed->daemons[node]);
        while (shown >> 20 != sum && proc_now_ms() < until);
        assert_int_equal(shown >> 20, sum);
}

static void test_memory_is_told(void **state)
{
        struct proc_bed *bed = *state;
        struct story_job job;

        bed->flags[0] = "--memory";
        bed->flags[1] = "300M";
        proc_daemon_start_all(bed);
        story_job_init(&job, bed, "told", 2);
        for (uint32_t rank = 0; rank < 2; rank++)
                job.workers[rank].self.unit_n[0] = 4000000;
        story_job_up(&job);
        for (uint32_t node = 0; node < 2; node++)
                check_told(bed, node);
        story_job_leave(&job);
        story_job_end(&job);
}

static void test_too_little_memory(void **state)
{
        struct proc_bed *bed = *state;
        struct story_job job;
        struct story_result results[2];

        bed->flags[0] = "--memory";
        bed->flags[1] = "4M";
        proc_daemon_start_all(bed);
        story_job_init(&job, bed, "large", 2);
        for (uint32_t rank = 0; rank < 2; rank++)
                story_worker_start(&job.workers[rank]);
        story_job_must(&job, story_open, (struct story_args){ 0 });
        for (uint32_t rank = 0; rank < 2; rank++)
                story_post(&job.workers[rank], story_register, (struct story_args){ 0 });
        for (uint32_t rank = 0; rank < 2; rank++) {
                results[rank] = story_take(&job.workers[rank], 10000);
                story_expect(&results[rank], AUTOEP_EBUDGET, "needs", "node", "4194304",
                             "raise the daemon's memory", NULL);
        }
        story_job_end(&job);
}

#define STORY(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
        const struct CMUnitTest tests[] = {
                STORY(test_bad_flags),
                STORY(test_tcp_stays_on_the_machine),
                STORY(test_bad_files),
                STORY(test_bad_kernels),
                STORY(test_takes_all_descriptors),
                STORY(test_plain_file_is_left_alone),
                STORY(test_two_daemons_at_one_socket),
                STORY(test_stale_socket_is_replaced),
                STORY(test_peer_lists_differ),
                STORY(test_memory_is_told),
                STORY(test_too_little_memory),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
