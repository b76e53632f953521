/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of autoep-run that need no processes: options, lines, environments, places. */
#include "client/run/child.h"
#include "client/run/env.h"
#include "client/run/guard.h"
#include "client/run/lines.h"
#include "client/run/options.h"
#include "client/run/place.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/test.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- options ---------------------------------------------------------------------------- */

static char words[512];
static char *argv_of_words[32];

/* Parses "autoep-run LINE"; what it borrows lives until the next call. */
static int parse(const char *line, struct ae_run_options *ret_options)
{
        int argc = 0;

        assert_true(strlen(line) < sizeof(words));
        strcpy(words, line);
        argv_of_words[argc++] = (char *)"autoep-run";
        for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
                argv_of_words[argc++] = word;
        argv_of_words[argc] = NULL;
        return ae_run_options_parse(argc, argv_of_words, ret_options);
}

static void defaults(void **state)
{
        struct ae_run_options options;

        (void)state;
        assert_int_equal(parse("/usr/bin/moe-lm --nodes 7 x", &options), 0);
        assert_int_equal(options.n_nodes, 1);
        assert_int_equal(options.world, 1);
        assert_string_equal(options.job, "moe-lm");
        assert_string_equal(options.transport, "shm");
        assert_int_equal(options.memory_len, 0);
        assert_int_equal(options.level, AE_LOG_WARN);
        assert_false(options.keep_going);
        assert_int_equal(options.ready_ns, 10 * AE_NS_PER_S);
        assert_string_equal(options.program[0], "/usr/bin/moe-lm");
        assert_string_equal(options.program[1], "--nodes");
        assert_string_equal(options.program[3], "x");
        assert_null(options.program[4]);
}

static void everything_given(void **state)
{
        struct ae_run_options options;

        (void)state;
        assert_int_equal(parse("--workers 3,0,1 --nodes=3 --job j --transport tcp --memory 2GiB "
                               "--log-level debug --keep-going yes --ready-timeout 0.5 -- p -- q",
                               &options), 0);
        assert_int_equal(options.n_nodes, 3);
        assert_int_equal(options.world, 4);
        assert_int_equal(options.workers[0], 3);
        assert_int_equal(options.workers[1], 0);
        assert_int_equal(options.workers[2], 1);
        assert_string_equal(options.job, "j");
        assert_string_equal(options.transport, "tcp");
        assert_int_equal(options.memory_len, 2 * AE_GIB);
        assert_int_equal(options.level, AE_LOG_DEBUG);
        assert_true(options.keep_going);
        assert_int_equal(options.ready_ns, AE_NS_PER_S / 2);
        assert_string_equal(options.program[0], "p");
        assert_string_equal(options.program[1], "--");
        assert_int_equal(parse("--nodes 4 --workers 2 --memory 100 p", &options), 0);
        assert_int_equal(options.world, 8);
        assert_int_equal(options.memory_len, 100);
        assert_int_equal(parse("--memory 16T p", &options), 0);
        assert_int_equal(options.memory_len, 16 * 1024 * AE_GIB);
        assert_int_equal(parse("--help --nodes 2", &options), 0);
        assert_true(options.help);
        assert_int_equal(parse("--version", &options), 0);
        assert_true(options.version);
}

static void refused(void **state)
{
        static const struct {
                const char *line, *text;
        } rows[] = {
                { "", "no program given" },
                { "--nodes 2", "no program given" },
                { "--nodes 0 p", "--nodes is '0'" },
                { "--nodes 65 p", "--nodes is '65'" },
                { "--nodes -1 p", "--nodes is '-1'" },
                { "--nodes 2x p", "--nodes is '2x'" },
                { "--workers 0 p", "makes 0 workers" },
                { "--workers 1,2 p", "more than the 1 nodes" },
                { "--nodes 3 --workers 1,2 p", "lists 2 counts for 3 nodes" },
                { "--nodes 2 --workers 1, p", "--workers is '1,'" },
                { "--nodes 2 --workers ,1 p", "--workers is ',1'" },
                { "--nodes 2 --workers 200 p", "makes 400 workers" },
                { "--workers 18446744073709551616 p", "--workers is" },
                { "--transport verbs p", "--transport is 'verbs'" },
                { "--memory 0 p", "--memory is '0'" },
                { "--memory 5X p", "--memory is '5X'" },
                { "--memory 5GB p", "--memory is '5GB'" },
                { "--memory 17179869184G p", "beyond 64 bits" },
                { "--log-level loud p", "unknown log level 'loud'" },
                { "--keep-going maybe p", "--keep-going is 'maybe'" },
                { "--ready-timeout 0 p", "--ready-timeout is '0'" },
                { "--job", "--job needs a value" },
                { "--frobnicate p", "unknown option '--frobnicate'" },
                { "-x p", "unknown option '-x'" },
                { "--help=1", "'--help=1': the option takes no value" },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                struct ae_run_options options = { .n_nodes = 77 };

                assert_int_equal(parse(rows[i].line, &options), AE_EINVAL);
                if (!strstr(ae_error_text(), rows[i].text))
                        fail_msg("'%s' gives '%s', not '%s'", rows[i].line, ae_error_text(),
                                 rows[i].text);
                assert_int_equal(options.n_nodes, 77); /* untouched */
        }
}

static void the_manual_has_every_option(void **state)
{
        const char *page = SOURCE_ROOT "/client/run/autoep-run.1.scd";
        FILE *file = fopen(page, "r");
        char text[16384] = "", want[256];

        (void)state;
        assert_non_null(file);
        assert_true(fread(text, 1, sizeof(text) - 1, file) < sizeof(text) - 1);
        fclose(file);
        for (size_t i = 0; i < AE_RUN_N_OPTIONS; i++) {
                const struct ae_run_option_row *row = &ae_run_option_rows[i];

                (void)snprintf(want, sizeof(want), "\n*--%s*%s%s%s\n\t%s\n", row->word,
                               row->argument ? " _" : "", row->argument ? row->argument : "",
                               row->argument ? "_" : "", row->help);
                if (!strstr(text, want))
                        fail_msg("%s lacks '%s'", page, want);
        }
}

/* ---- lines ------------------------------------------------------------------------------ */

static void collect(void *arg, const char *line, size_t len)
{
        fprintf(arg, "<%.*s>", (int)len, line);
}

/* What comes out when @data comes in pieces of @piece bytes; the caller frees. */
static char *lines_of(const char *data, size_t piece)
{
        struct ae_run_lines lines = { 0 };
        size_t len = strlen(data), out_len;
        char *text;
        FILE *out = open_memstream(&text, &out_len);

        for (size_t i = 0; i < len; i += piece)
                ae_run_lines_feed(&lines, data + i, AE_MIN(piece, len - i), collect, out);
        ae_run_lines_finish(&lines, collect, out);
        assert_null(lines.data);
        fclose(out);
        return text;
}

static void lines_whatever_the_pieces(void **state)
{
        static const struct {
                const char *data, *lines;
        } rows[] = {
                { "", "" },
                { "\n", "<>" },
                { "one\ntwo\n", "<one><two>" },
                { "one\n\nrest", "<one><><rest>" },
                { "dos\r\n", "<dos>" },
                { "10 %\r20 %\r30 %\nend", "<30 %><end>" },
                { "10 %\r20 %\r", "<20 %>" },
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                for (size_t piece = 1; piece < 12; piece++) {
                        AE_CLEANUP(ae_cleanup_free) char *got = lines_of(rows[i].data, piece);

                        assert_string_equal(got, rows[i].lines);
                }
        }
}

static void count(void *arg, const char *line, size_t len)
{
        size_t *sum = arg;

        (void)line;
        assert_true(len <= AE_RUN_LINE_MAX);
        *sum += len;
}

static void endless_lines_are_cut(void **state)
{
        struct ae_run_lines lines = { 0 };
        char data[1000];
        size_t sum = 0;

        (void)state;
        memset(data, 'x', sizeof(data));
        for (int i = 0; i < 200; i++)
                ae_run_lines_feed(&lines, data, sizeof(data), count, &sum);
        assert_int_equal(sum, 3 * AE_RUN_LINE_MAX);
        assert_true(lines.size <= AE_RUN_LINE_MAX);
        ae_run_lines_finish(&lines, count, &sum);
        assert_int_equal(sum, 200 * sizeof(data));
}

static enum ae_log_level level_of(const char *line)
{
        return ae_run_line_level(line, strlen(line));
}

static void levels(void **state)
{
        (void)state;
        assert_int_equal(level_of("12:34:56.789 autoepd info: hello"), AE_LOG_INFO);
        assert_int_equal(level_of("12:34:56.789 autoepd debug: error: no"), AE_LOG_DEBUG);
        assert_int_equal(level_of("12:34:56.789 autoepd warn: x"), AE_LOG_WARN);
        assert_int_equal(level_of("12:34:56.789 autoepd error: x"), AE_LOG_ERROR);
        assert_int_equal(level_of("==12==ERROR: AddressSanitizer info: x"), AE_LOG_ERROR);
        assert_int_equal(level_of("12 files info; what"), AE_LOG_ERROR);
        assert_int_equal(level_of("12 files"), AE_LOG_ERROR);
        assert_int_equal(level_of(""), AE_LOG_ERROR);
        assert_true(ae_run_line_has("x Address already IN use", 24, "already in use"));
        assert_false(ae_run_line_has("x already in us", 15, "already in use"));
}

static void a_tail_keeps_the_last(void **state)
{
        struct ae_run_tail tail = { 0 };
        char *text;
        size_t len;
        FILE *out = open_memstream(&text, &len);

        (void)state;
        ae_run_tail_take(&tail, collect, out);
        for (int i = 0; i < AE_RUN_TAIL_LINES + 2; i++) {
                char line[] = { (char)('a' + i), '!' };

                ae_run_tail_add(&tail, line, 1);
        }
        ae_run_tail_take(&tail, collect, out);
        ae_run_tail_take(&tail, collect, out);
        fclose(out);
        assert_string_equal(text, "<c><d><e><f><g><h><i><j><k><l><m><n>");
        free(text);
}

static void a_line_is_written_whole(void **state)
{
        int ends[2];
        char got[64] = "";

        (void)state;
        assert_int_equal(pipe(ends), 0);
        ae_run_line_write(ends[1], "[3] ", "hello", 5);
        assert_int_equal(read(ends[0], got, sizeof(got) - 1), 10);
        assert_string_equal(got, "[3] hello\n");
        close(ends[0]);
        close(ends[1]);
}

/* ---- environments and places ------------------------------------------------------------ */

static void environment(void **state)
{
        struct ae_run_env env;

        (void)state;
        setenv("TEST_RUN_A", "1", 1);
        setenv("TEST_RUN_AB", "2", 1);
        assert_int_equal(ae_run_env_init(&env), 0);
        assert_string_equal(ae_run_env_get(&env, "TEST_RUN_A"), "1");
        assert_int_equal(ae_run_env_set(&env, "TEST_RUN_A", "%d", 10), 0);
        assert_int_equal(ae_run_env_default(&env, "TEST_RUN_AB", "20"), 0);
        assert_int_equal(ae_run_env_default(&env, "TEST_RUN_C", "30"), 0);
        assert_string_equal(ae_run_env_get(&env, "TEST_RUN_A"), "10");
        assert_string_equal(ae_run_env_get(&env, "TEST_RUN_AB"), "2");
        assert_string_equal(ae_run_env_get(&env, "TEST_RUN_C"), "30");
        ae_run_env_unset(&env, "TEST_RUN_A");
        assert_null(ae_run_env_get(&env, "TEST_RUN_A"));
        assert_string_equal(ae_run_env_get(&env, "TEST_RUN_AB"), "2");
        for (int i = 0; i < 200; i++)
                assert_int_equal(ae_run_env_set(&env, "TEST_RUN_D", "%d", i), 0);
        assert_null(env.vars[env.n]);
        assert_string_equal(getenv("TEST_RUN_A"), "1"); /* ours is as it was */
        ae_run_env_deinit(&env);
        ae_run_env_deinit(&env);
}

static void a_private_place(void **state)
{
        char root[] = "/tmp/test-run.XXXXXX", dir[AE_RUN_PATH_MAX], path[AE_RUN_PATH_MAX];
        char *peers;
        char long_root[200];
        struct stat info;

        (void)state;
        assert_non_null(mkdtemp(root));
        memset(long_root, 'x', sizeof(long_root) - 1);
        long_root[0] = '/';
        long_root[sizeof(long_root) - 1] = '\0';
        setenv("XDG_RUNTIME_DIR", long_root, 1); /* no room for sockets: the next one is taken */
        setenv("TMPDIR", root, 1);
        assert_int_equal(ae_run_place_new(dir), 0);
        assert_int_equal(strncmp(dir, root, strlen(root)), 0);
        assert_int_equal(stat(dir, &info), 0);
        assert_int_equal(info.st_mode & 07777, 0700);
        ae_run_place_socket(dir, "node", 12, path);
        assert_int_equal(strncmp(path, dir, strlen(dir)), 0);
        assert_string_equal(path + strlen(dir), "/node-12.sock");
        assert_int_equal(ae_run_place_peers("shm", "/d", 2, &peers), 0);
        assert_string_equal(peers, "/d/peer-0.sock,/d/peer-1.sock");
        free(peers);
        assert_int_equal(rmdir(dir), 0);
        assert_int_equal(rmdir(root), 0);
}

static void readiness(void **state)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        char dir[] = "/tmp/test-run.XXXXXX", said[16] = "";
        int fd, sender = socket(AF_UNIX, SOCK_DGRAM, 0);

        (void)state;
        assert_non_null(mkdtemp(dir));
        (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s/s", dir);
        assert_int_equal(ae_run_notify_open(address.sun_path, &fd), 0);
        close(fd);
        assert_int_equal(ae_run_notify_open(address.sun_path, &fd), 0); /* over the old one */
        assert_int_equal(connect(sender, (void *)&address, sizeof(address)), 0);
        assert_false(ae_run_notify_read(fd, said, sizeof(said)));
        assert_int_equal(send(sender, "STATUS=loading 3 of many many\nX=1", 33, 0), 33);
        assert_int_equal(send(sender, "READY=10", 8, 0), 8);
        assert_int_equal(send(sender, "", 0, 0), 0);
        assert_false(ae_run_notify_read(fd, said, sizeof(said)));
        assert_string_equal(said, "loading 3 of ma");
        assert_int_equal(send(sender, "STATUS=up\nREADY=1\n", 18, 0), 18);
        assert_int_equal(send(sender, "STATUS=busy", 11, 0), 11);
        assert_true(ae_run_notify_read(fd, said, sizeof(said)));
        assert_string_equal(said, "busy");
        close(sender);
        close(fd);
        unlink(address.sun_path);
        rmdir(dir);
}

/* ---- what the guard hears ---------------------------------------------------------------- */

/* As guard.c writes it. */
struct told {
        int32_t pid, lives;
};

static void on_sigchld(uv_signal_t *watch, int number)
{
        (void)number;
        (void)ae_run_child_check(watch->data);
}

static void on_finished(struct ae_run_child *child)
{
        uv_signal_t *watch = child->owner;

        uv_close((uv_handle_t *)watch, NULL);
}

static void ignore_line(void *arg, const char *line, size_t len)
{
        (void)arg;
        (void)line;
        (void)len;
}

/* A number that is free again may be somebody else's group by the time the guard kills. */
static void a_child_that_ended_is_not_guarded(void **state)
{
        char *argv[] = { (char *)(uintptr_t)"true", NULL }, *vars[] = { NULL };
        struct ae_run_child child = { .on_finished = on_finished,
                                      .on_line = { ignore_line, ignore_line }, .notify_fd = -1 };
        struct ae_run_start start = { .argv = argv, .vars = vars, .in = -1, .out = -1 };
        struct told told[3];
        uv_signal_t watch;
        uv_loop_t loop;
        int ends[2];

        (void)state;
        assert_int_equal(pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
        assert_int_equal(uv_loop_init(&loop), 0);
        assert_int_equal(uv_signal_init(&loop, &watch), 0);
        watch.data = &child;
        child.owner = &watch;
        assert_int_equal(uv_signal_start(&watch, on_sigchld, SIGCHLD), 0);
        start.loop = &loop;
        start.guard_fd = ends[1];
        assert_int_equal(ae_run_child_start(&child, &start), 0);
        assert_int_equal(uv_run(&loop, UV_RUN_DEFAULT), 0);
        assert_int_equal(uv_loop_close(&loop), 0);
        assert_int_equal(child.code, 0);
        assert_int_equal(read(ends[0], told, sizeof(told)), 2 * sizeof(*told));
        assert_int_equal(told[0].pid, child.pid);
        assert_int_equal(told[0].lives, 1);
        assert_int_equal(told[1].pid, child.pid);
        assert_int_equal(told[1].lives, 0);
        ae_run_child_deinit(&child);
        close(ends[0]);
        close(ends[1]);
}

static pid_t start_group(void)
{
        pid_t pid = fork();

        if (pid == 0) {
                (void)setpgid(0, 0);
                for (;;)
                        pause();
        }
        assert_true(pid > 0);
        assert_int_equal(setpgid(pid, pid), 0);
        return pid;
}

static void the_guard_kills_what_lives(void **state)
{
        char dir[] = "/tmp/test-run.XXXXXX";
        struct ae_run_guard guard = AE_RUN_GUARD_INIT;
        pid_t lives, gone;
        int status;

        (void)state;
        assert_non_null(mkdtemp(dir));
        lives = start_group();
        gone = start_group();
        assert_int_equal(ae_run_guard_start(dir, &guard), 0);
        ae_run_guard_born(guard.fd, gone);
        ae_run_guard_born(guard.fd, lives);
        ae_run_guard_gone(guard.fd, gone);
        ae_run_guard_finish(&guard);
        assert_int_equal(waitpid(lives, &status, 0), lives);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        assert_int_equal(waitpid(gone, &status, WNOHANG), 0);
        assert_int_equal(kill(gone, SIGTERM), 0);
        assert_int_equal(waitpid(gone, &status, 0), gone);
        assert_int_equal(WTERMSIG(status), SIGTERM); /* by us, not by the guard */
        assert_int_equal(access(dir, F_OK), -1);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(a_child_that_ended_is_not_guarded),
                cmocka_unit_test(the_guard_kills_what_lives),
                cmocka_unit_test(defaults),
                cmocka_unit_test(everything_given),
                cmocka_unit_test(refused),
                cmocka_unit_test(the_manual_has_every_option),
                cmocka_unit_test(lines_whatever_the_pieces),
                cmocka_unit_test(endless_lines_are_cut),
                cmocka_unit_test(levels),
                cmocka_unit_test(a_tail_keeps_the_last),
                cmocka_unit_test(a_line_is_written_whole),
                cmocka_unit_test(environment),
                cmocka_unit_test(a_private_place),
                cmocka_unit_test(readiness),
        };

        return cmocka_run_group_tests_name("run", tests, NULL, NULL);
}
