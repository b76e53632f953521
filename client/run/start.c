/* SPDX-License-Identifier: Apache-2.0 */
/* Command lines, environments and output of the children. */
#include "client/run/env.h"
#include "client/run/run-private.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

static const char *const level_words[] = { "error", "warn", "info", "debug" };

static void worker_line(struct ae_run_child *child, int fd, const char *line, size_t len)
{
        const struct ae_run *run = child->owner;
        char prefix[16] = "";

        if (run->options->world > 1)
                (void)snprintf(prefix, sizeof(prefix), "[%u] ", child->index);
        ae_run_line_write(fd, prefix, line, len);
}

static void worker_out(void *arg, const char *line, size_t len)
{
        worker_line(arg, STDOUT_FILENO, line, len);
}

static void worker_err(void *arg, const char *line, size_t len)
{
        worker_line(arg, STDERR_FILENO, line, len);
}

static void daemon_line(void *arg, const char *line, size_t len)
{
        struct ae_run_child *child = arg;
        const struct ae_run *run = child->owner;
        char prefix[24];

        child->port_taken |= ae_run_line_has(line, len, "already in use");
        if (ae_run_line_level(line, len) > run->options->level) {
                ae_run_tail_add(&child->tail, line, len);
                return;
        }
        (void)snprintf(prefix, sizeof(prefix), "[node %u] ", child->index);
        ae_run_line_write(STDERR_FILENO, prefix, line, len);
}

static void child_init(struct ae_run *run, struct ae_run_child *child, enum ae_run_role role,
                       uint32_t index)
{
        *child = (struct ae_run_child){
                .role = role,
                .index = index,
                .owner = run,
                .on_ready = ae_run_on_ready,
                .on_finished = ae_run_on_finished,
                .on_line = { role == AE_RUN_DAEMON ? daemon_line : worker_out,
                             role == AE_RUN_DAEMON ? daemon_line : worker_err },
                .notify_fd = -1,
        };
}

static int make_token(char ret_token[33])
{
        uint8_t bytes[16];

        if (getrandom(bytes, sizeof(bytes), 0) != (ssize_t)sizeof(bytes))
                return ae_fail_sys(errno, "cannot get random bytes for the job's token");
        for (size_t i = 0; i < sizeof(bytes); i++)
                (void)snprintf(ret_token + 2 * i, 3, "%02x", bytes[i]);
        return 0;
}

int ae_run_prepare(struct ae_run *run)
{
        int r;

        for (uint32_t i = 0; i < run->options->n_nodes; i++)
                child_init(run, &run->daemons[i], AE_RUN_DAEMON, i);
        for (uint32_t i = 0; i < run->options->world; i++)
                child_init(run, &run->workers[i], AE_RUN_WORKER, i);
        r = make_token(run->token);
        if (r < 0)
                return r;
        return ae_run_place_daemon(&run->daemon_path);
}

static int start_daemon(struct ae_run *run, uint32_t node, const char *peers,
                        struct ae_run_env *env)
{
        const struct ae_run_options *options = run->options;
        char socket[AE_RUN_PATH_MAX], notify[AE_RUN_PATH_MAX], number[16], memory[24];
        /* Info is always written, for the lines that explain a failure. */
        const char *level = level_words[AE_MAX((int)options->level, (int)AE_LOG_INFO)];
        char *argv[] = { run->daemon_path, (char *)"--dev",
                         (char *)"--node", number,
                         (char *)"--peers", (char *)peers,
                         (char *)"--socket", socket,
                         (char *)"--transport", (char *)options->transport,
                         (char *)"--log-level", (char *)level,
                         options->memory_len ? (char *)"--memory" : NULL, memory, NULL };
        struct ae_run_start start = { .loop = &run->loop, .argv = argv, .in = -1, .out = -1,
                                      .notify = notify, .guard_fd = run->guard.fd };
        int r;

        ae_run_place_socket(run->dir, "node", node, socket);
        ae_run_place_socket(run->dir, "notify", node, notify);
        (void)snprintf(number, sizeof(number), "%u", node);
        (void)snprintf(memory, sizeof(memory), "%" PRIu64, options->memory_len);
        r = ae_run_env_set(env, "NOTIFY_SOCKET", "%s", notify);
        if (r < 0)
                return r;
        start.vars = env->vars;
        (void)unlink(socket); /* of a start that failed */
        r = ae_run_child_start(&run->daemons[node], &start);
        if (r < 0)
                return r;
        run->n_live_daemons++;
        return 0;
}

/* What the launcher's own manager told it isn't meant for its children. */
static int child_env(struct ae_run_env *env)
{
        static const char *const names[] = { "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
                                             "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",
                                             "JOURNAL_STREAM" };
        int r = ae_run_env_init(env);

        for (size_t i = 0; r == 0 && i < AE_ARRAY_LEN(names); i++)
                ae_run_env_unset(env, names[i]);
        return r;
}

int ae_run_start_daemons(struct ae_run *run)
{
        AE_CLEANUP(ae_cleanup_free) char *peers = NULL;
        AE_CLEANUP(ae_run_env_deinit) struct ae_run_env env = { 0 };
        int r;

        assert(run->n_live_daemons == 0);
        run->n_ready = 0;
        run->n_attempts++;
        r = child_env(&env);
        if (r < 0)
                return r;
        r = ae_run_place_peers(run->options->transport, run->dir, run->options->n_nodes, &peers);
        for (uint32_t i = 0; r == 0 && i < run->options->n_nodes; i++)
                r = start_daemon(run, i, peers, &env);
        return r;
}

struct seat {
        uint32_t rank, node, local;
};

static int seat_env(const struct ae_run *run, const struct seat *seat, struct ae_run_env *env)
{
        const struct ae_run_options *options = run->options;
        const struct {
                const char *name;
                uint32_t value;
        } numbers[] = {
                { "AUTOEP_RANK", seat->rank },
                { "AUTOEP_WORLD", options->world },
                { "AUTOEP_NODE", seat->node },
                { "AUTOEP_LOCAL_RANK", seat->local },
                { "RANK", seat->rank },
                { "WORLD_SIZE", options->world },
                { "LOCAL_RANK", seat->local },
                { "LOCAL_WORLD_SIZE", options->workers[seat->node] },
        };
        char socket[AE_RUN_PATH_MAX];
        int r;

        ae_run_place_socket(run->dir, "node", seat->node, socket);
        r = ae_run_env_set(env, "AUTOEP_SOCKET", "%s", socket);
        for (size_t i = 0; r == 0 && i < AE_ARRAY_LEN(numbers); i++)
                r = ae_run_env_set(env, numbers[i].name, "%u", numbers[i].value);
        return r;
}

static int worker_env(const struct ae_run *run, struct ae_run_env *env)
{
        int r = child_env(env);

        if (r == 0)
                r = ae_run_env_set(env, "AUTOEP_JOB", "%s", run->options->job);
        if (r == 0)
                r = ae_run_env_set(env, "AUTOEP_TOKEN", "%s", run->token);
        /* Ranks share the cores; each with all of them would only get in the others' way. */
        if (r == 0)
                r = ae_run_env_default(env, "OPENBLAS_NUM_THREADS", "1");
        if (r == 0)
                r = ae_run_env_default(env, "OMP_NUM_THREADS", "1");
        return r;
}

static int start_worker(struct ae_run *run, const struct seat *seat, struct ae_run_env *env)
{
        struct ae_run_start start = { .loop = &run->loop, .argv = run->options->program, .in = -1,
                                      .out = -1, .guard_fd = run->guard.fd };
        int r = seat_env(run, seat, env);

        if (r < 0)
                return r;
        start.vars = env->vars;
        if (seat->rank == 0) {
                start.out = STDOUT_FILENO;
                /* From a background group, as the workers are, a terminal can't be read. */
                start.in = isatty(STDIN_FILENO) ? -1 : STDIN_FILENO;
        }
        r = ae_run_child_start(&run->workers[seat->rank], &start);
        if (r < 0)
                return r;
        run->n_live_workers++;
        return 0;
}

int ae_run_start_workers(struct ae_run *run)
{
        AE_CLEANUP(ae_run_env_deinit) struct ae_run_env env = { 0 };
        struct seat seat = { 0 };
        int r = worker_env(run, &env);

        for (; r == 0 && seat.node < run->options->n_nodes; seat.node++) {
                uint32_t n = run->options->workers[seat.node];

                for (seat.local = 0; r == 0 && seat.local < n; seat.local++, seat.rank++)
                        r = start_worker(run, &seat, &env);
        }
        return r;
}
