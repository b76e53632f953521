/* SPDX-License-Identifier: Apache-2.0 */
/* Starts a cluster by autoep-run with this program as its workers, and reads rank 0's rows. */
#include "client/bench/suites.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define CANNOT_RUN 127

/* Beside this program as installed, or as built; otherwise the name alone, for PATH. */
static void find_run(const char *self, char ret_path[PATH_MAX])
{
        static const char *const places[] = { "autoep-run", "../run/autoep-run" };
        const char *given = getenv("AUTOEP_RUN");
        const char *slash = strrchr(self, '/');

        assert(slash);
        for (size_t i = 0; !given && i < AE_ARRAY_LEN(places); i++) {
                int len = snprintf(ret_path, PATH_MAX, "%.*s/%s", (int)(slash - self), self,
                                   places[i]);

                if (len < PATH_MAX && access(ret_path, X_OK) == 0)
                        return;
        }
        (void)snprintf(ret_path, PATH_MAX, "%s", given ? given : "autoep-run");
}

struct command {
        char self[PATH_MAX], run[PATH_MAX];
        char nodes[16], workers[16], len[32];
        const char *argv[24];
};

static int make_command(const struct ae_bench *bench, const struct ae_bench_cluster *cluster,
                        struct command *command)
{
        ssize_t self_len = readlink("/proc/self/exe", command->self, PATH_MAX - 1);
        size_t n = 0;

        if (self_len < 0)
                return ae_fail_sys(errno, "cannot find this program");
        command->self[self_len] = '\0';
        find_run(command->self, command->run);
        (void)snprintf(command->nodes, sizeof(command->nodes), "%u", cluster->nodes);
        (void)snprintf(command->workers, sizeof(command->workers), "%u", cluster->workers);
        (void)snprintf(command->len, sizeof(command->len), "%" PRIu64, cluster->len);
        {
                const char *const words[] = {
                        command->run, "--nodes", command->nodes, "--workers", command->workers,
                        "--transport", cluster->transport, "--job", "autoep-bench", "--",
                        command->self, "--worker", cluster->which, "--size", command->len,
                        "--workers", command->workers, "--transport", cluster->transport,
                        bench->options->quick ? "--quick" : NULL,
                };

                static_assert(AE_ARRAY_LEN(words) < AE_ARRAY_LEN(command->argv), "and a NULL");
                for (; n < AE_ARRAY_LEN(words) && words[n]; n++)
                        command->argv[n] = words[n];
        }
        command->argv[n] = NULL;
        return 0;
}

static void child_main(const struct command *command, int out)
{
        (void)prctl(PR_SET_PDEATHSIG, SIGTERM); /* the launcher then stops its children */
        if (dup2(out, STDOUT_FILENO) < 0)
                _exit(CANNOT_RUN);
        (void)execvp(command->run, (char *const *)(uintptr_t)command->argv);
        fprintf(stderr, "autoep-bench: cannot run %s: %s\n", command->run, strerror(errno));
        _exit(CANNOT_RUN);
}

/* Lines that are no rows pass on to standard error. */
static int take_rows(struct ae_bench *bench, FILE *lines)
{
        AE_CLEANUP(ae_cleanup_free) char *line = NULL;
        struct ae_bench_row row;
        size_t size = 0;
        ssize_t len;

        while ((len = getline(&line, &size, lines)) > 0) {
                int r;

                if (line[len - 1] == '\n')
                        line[len - 1] = '\0';
                r = ae_bench_row_parse(line, &row);
                if (r > 0)
                        fprintf(stderr, "%s\n", line);
                else if (r == 0)
                        r = ae_bench_add(bench, &row);
                if (r < 0)
                        return r;
        }
        return 0;
}

static int take_end(pid_t pid, const struct ae_bench_cluster *cluster)
{
        int status = 0;

        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
                continue;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
                return 0;
        if (WIFEXITED(status) && WEXITSTATUS(status) == CANNOT_RUN)
                return ae_fail(AE_ENOENT, "cannot start the cluster of case '%s': set AUTOEP_RUN "
                               "to autoep-run, or put it in PATH", cluster->which);
        return ae_fail(AE_ELOST, "the cluster of case '%s' (%u nodes, %u workers each, %s) failed "
                       "with %s %d; the lines above say why", cluster->which, cluster->nodes,
                       cluster->workers, cluster->transport,
                       WIFEXITED(status) ? "code" : "signal",
                       WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
}

int ae_bench_launch(struct ae_bench *bench, const struct ae_bench_cluster *cluster)
{
        AE_CLEANUP(ae_cleanup_free) struct command *command = calloc(1, sizeof(*command));
        FILE *lines;
        int ends[2], r;
        pid_t pid;

        if (!command)
                return ae_fail(AE_ENOMEM, "no memory for a command line");
        r = make_command(bench, cluster, command);
        if (r < 0)
                return r;
        if (pipe2(ends, O_CLOEXEC) < 0)
                return ae_fail_sys(errno, "cannot make a pipe");
        (void)fflush(NULL);
        pid = fork();
        if (pid == 0)
                child_main(command, ends[1]);
        (void)close(ends[1]);
        lines = pid > 0 ? fdopen(ends[0], "r") : NULL;
        if (!lines) {
                r = ae_fail_sys(errno, "cannot start the cluster of case '%s'", cluster->which);
                (void)close(ends[0]);
                return r;
        }
        r = take_rows(bench, lines);
        (void)fclose(lines);
        if (r < 0)
                (void)kill(pid, SIGTERM);
        return r < 0 ? (void)take_end(pid, cluster), r : take_end(pid, cluster);
}
