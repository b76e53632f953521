/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The states of a run. Events are a child's readiness, exit and finish, a signal, the state's
 * deadline. The first failure is kept; whatever follows from it isn't reported again.
 */
#include "client/run/run-private.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RETRY_NS (10 * AE_NS_PER_MS) /* handles of the last attempt close in between */
#define CODE_NOT_FOUND 127
#define CODE_NOT_RUN 126

static const int signal_numbers[AE_RUN_N_SIGNALS] = { SIGCHLD, SIGINT, SIGTERM, SIGHUP };

#define TO(state) (1u << AE_RUN_##state)
static const unsigned moves[AE_RUN_N_STATES] = {
        [AE_RUN_STARTING] = TO(RETRYING) | TO(RUNNING) | TO(ENDING),
        [AE_RUN_RETRYING] = TO(STARTING) | TO(ENDING),
        [AE_RUN_RUNNING] = TO(STOPPING) | TO(ENDING),
        [AE_RUN_STOPPING] = TO(ENDING),
        [AE_RUN_ENDING] = TO(DONE),
        [AE_RUN_DONE] = 0,
};

static void on_deadline(uv_timer_t *timer);

/* @deadline_ns from now is the new state's; 0: it has none. */
static void run_move(struct ae_run *run, enum ae_run_state to, uint64_t deadline_ns)
{
        assert(moves[run->state] & (1u << to));
        run->state = to;
        (void)uv_timer_stop(&run->timer);
        if (deadline_ns > 0)
                (void)uv_timer_start(&run->timer, on_deadline, deadline_ns / AE_NS_PER_MS, 0);
}

__attribute__((format(printf, 3, 4)))
static void note_failure(struct ae_run *run, int code, const char *format, ...)
{
        va_list args;

        if (run->failed)
                return;
        run->failed = true;
        run->outcome->code = code;
        va_start(args, format);
        (void)vsnprintf(run->outcome->reason, sizeof(run->outcome->reason), format, args);
        va_end(args);
}

static int start_code(int status)
{
        return status == AE_ENOENT ? CODE_NOT_FOUND : CODE_NOT_RUN;
}

static void kill_all(struct ae_run_child *children, uint32_t n, int signal)
{
        for (uint32_t i = 0; i < n; i++)
                ae_run_child_kill(&children[i], signal);
}

static void kill_daemons(struct ae_run *run, int signal)
{
        kill_all(run->daemons, run->options->n_nodes, signal);
}

static void kill_workers(struct ae_run *run, int signal)
{
        kill_all(run->workers, run->options->world, signal);
}

static void close_loop(struct ae_run *run)
{
        for (int i = 0; i < AE_RUN_N_SIGNALS; i++)
                uv_close((uv_handle_t *)&run->signals[i], NULL);
        uv_close((uv_handle_t *)&run->timer, NULL);
}

static void end_when_alone(struct ae_run *run)
{
        if (run->n_live_daemons > 0 || run->n_live_workers > 0)
                return;
        run_move(run, AE_RUN_DONE, 0);
        close_loop(run);
}

/* No worker lives: the daemons' turn. */
static void begin_end(struct ae_run *run)
{
        assert(run->n_live_workers == 0);
        run_move(run, AE_RUN_ENDING, AE_RUN_END_NS);
        kill_daemons(run, SIGTERM);
        end_when_alone(run);
}

/* From any state but the last two; the failure that causes it is noted already. */
static void begin_stop(struct ae_run *run, int signal)
{
        if (run->state == AE_RUN_STOPPING || run->state == AE_RUN_ENDING)
                return;
        if (run->n_live_workers == 0) {
                begin_end(run);
                return;
        }
        run_move(run, AE_RUN_STOPPING, AE_RUN_STOP_NS);
        kill_workers(run, signal);
}

static void show_line(void *arg, const char *line, size_t len)
{
        ae_run_line_write(STDERR_FILENO, arg, line, len);
}

static void show_tail(struct ae_run_child *child)
{
        char prefix[24];

        (void)snprintf(prefix, sizeof(prefix), "[node %u] ", child->index);
        ae_run_tail_take(&child->tail, show_line, prefix);
}

/* ---- how a child ended ----------------------------------------------------------------- */

static bool ended_well(const struct ae_run_child *child)
{
        return child->signal == 0 && child->code == 0;
}

static int code_of(const struct ae_run_child *child)
{
        if (child->signal)
                return 128 + child->signal;
        return child->code ? child->code : 1;
}

/* "rank 3 (pid 123) was killed by signal 9 (Killed) after 4.2 s" */
static void describe(const struct ae_run_child *child, char *ret_text, size_t size)
{
        double seconds = (double)(child->exited_ns - child->started_ns) / (double)AE_NS_PER_S;
        const char *who = child->role == AE_RUN_DAEMON ? "the daemon of node" : "rank";

        if (child->signal)
                (void)snprintf(ret_text, size, "%s %u (pid %d) was killed by signal %d (%s) after "
                               "%.1f s", who, child->index, (int)child->pid, child->signal,
                               strsignal(child->signal), seconds);
        else
                (void)snprintf(ret_text, size, "%s %u (pid %d) exited with %d after %.1f s", who,
                               child->index, (int)child->pid, child->code, seconds);
}

/*
 * Which of several that were found ended at once is the cause? A daemon's death makes workers fail,
 * and one worker's death by a signal makes others exit with an error; never the other way round.
 */
static int weight(const struct ae_run_child *child)
{
        if (!child || (child->role == AE_RUN_WORKER && ended_well(child)))
                return 0;
        return 1 + (child->signal != 0) + 2 * (child->role == AE_RUN_DAEMON);
}

static void judge_failure(struct ae_run *run, struct ae_run_child *child)
{
        bool stops = child->role == AE_RUN_DAEMON || !run->options->keep_going;
        const char *others = stops ? "; the others were stopped" : "; the others went on";
        char text[256];

        describe(child, text, sizeof(text));
        /* Beside a daemon there are always workers. */
        if (child->role == AE_RUN_WORKER && run->options->world == 1)
                others = "";
        child->blamed = !run->failed;
        note_failure(run, code_of(child), "%s%s", text, others);
        if (stops)
                begin_stop(run, SIGTERM);
}

static struct ae_run_child *check_all(struct ae_run_child *children, uint32_t n,
                                      struct ae_run_child *culprit)
{
        for (uint32_t i = 0; i < n; i++) {
                if (ae_run_child_check(&children[i]) && weight(&children[i]) > weight(culprit))
                        culprit = &children[i];
        }
        return culprit;
}

static void on_child(struct ae_run *run)
{
        struct ae_run_child *culprit = NULL;

        culprit = check_all(run->daemons, run->options->n_nodes, culprit);
        culprit = check_all(run->workers, run->options->world, culprit);
        /* In the other states the finish tells more, or nobody asks. */
        if (run->state == AE_RUN_RUNNING && weight(culprit) > 0)
                judge_failure(run, culprit);
}

/* ---- daemons ---------------------------------------------------------------------------- */

static void start_daemons(struct ae_run *run)
{
        int r = ae_run_start_daemons(run);

        if (r < 0) {
                note_failure(run, start_code(r), "%s", ae_error_text());
                begin_stop(run, SIGTERM);
        }
}

static void start_workers(struct ae_run *run)
{
        int r;

        run_move(run, AE_RUN_RUNNING, 0);
        r = ae_run_start_workers(run);
        if (r < 0) {
                note_failure(run, start_code(r), "%s", ae_error_text());
                begin_stop(run, SIGTERM);
        }
}

void ae_run_on_ready(struct ae_run_child *child)
{
        struct ae_run *run = child->owner;

        run->n_ready++;
        if (run->state == AE_RUN_STARTING && run->n_ready == run->options->n_nodes)
                start_workers(run);
}

static bool port_was_taken(const struct ae_run *run, const struct ae_run_child *child)
{
        return strcmp(run->options->transport, "tcp") == 0 && run->n_attempts < AE_RUN_ATTEMPTS &&
               child->port_taken;
}

static void daemon_ended_early(struct ae_run *run, struct ae_run_child *child)
{
        char text[256];

        if (port_was_taken(run, child)) {
                run_move(run, AE_RUN_RETRYING, 0);
                kill_daemons(run, SIGKILL);
                return;
        }
        describe(child, text, sizeof(text));
        show_tail(child);
        note_failure(run, code_of(child), "%s, before it was ready", text);
        begin_stop(run, SIGTERM);
}

static void daemon_ended_last(struct ae_run *run, struct ae_run_child *child)
{
        char text[256];

        /* A program without a handler dies of the signal that we sent; that is in order. */
        if (ended_well(child) || child->signal == SIGTERM || run->failed)
                return;
        describe(child, text, sizeof(text));
        show_tail(child);
        note_failure(run, code_of(child), "%s, while it was stopping", text);
}

static void daemon_finished(struct ae_run *run, struct ae_run_child *child)
{
        run->n_live_daemons--;
        if (child->blamed)
                show_tail(child);
        switch (run->state) {
        case AE_RUN_STARTING:
                daemon_ended_early(run, child);
                break;
        case AE_RUN_RUNNING: /* it ended before the others were ready */
                judge_failure(run, child);
                show_tail(child);
                break;
        case AE_RUN_ENDING:
                daemon_ended_last(run, child);
                break;
        case AE_RUN_RETRYING:
        case AE_RUN_STOPPING:
        case AE_RUN_DONE:
        case AE_RUN_N_STATES:
                break;
        }
        if (run->state == AE_RUN_RETRYING && run->n_live_daemons == 0)
                (void)uv_timer_start(&run->timer, on_deadline, RETRY_NS / AE_NS_PER_MS, 0);
}

static void worker_finished(struct ae_run *run)
{
        run->n_live_workers--;
        if (run->n_live_workers == 0 &&
            (run->state == AE_RUN_RUNNING || run->state == AE_RUN_STOPPING))
                begin_end(run);
}

void ae_run_on_finished(struct ae_run_child *child)
{
        struct ae_run *run = child->owner;

        if (child->role == AE_RUN_DAEMON)
                daemon_finished(run, child);
        else
                worker_finished(run);
        if (run->state == AE_RUN_ENDING)
                end_when_alone(run);
}

/* ---- deadlines and signals -------------------------------------------------------------- */

static void daemons_are_late(struct ae_run *run)
{
        double seconds = (double)run->options->ready_ns / (double)AE_NS_PER_S;

        for (uint32_t i = 0; i < run->options->n_nodes; i++) {
                struct ae_run_child *child = &run->daemons[i];

                if (!child->live || child->ready)
                        continue;
                show_tail(child);
                note_failure(run, 1, "the daemon of node %u (pid %d) was not ready within %.1f s%s"
                             "%s", i, (int)child->pid, seconds,
                             child->said[0] ? "; its last word: " : "", child->said);
        }
        begin_stop(run, SIGTERM);
}

static void daemons_dont_end(struct ae_run *run)
{
        for (uint32_t i = 0; i < run->options->n_nodes; i++) {
                const struct ae_run_child *child = &run->daemons[i];

                if (child->live && !child->exited)
                        note_failure(run, 1, "the daemon of node %u (pid %d) did not end within "
                                     "%d s of SIGTERM and was killed", i, (int)child->pid,
                                     (int)(AE_RUN_END_NS / AE_NS_PER_S));
        }
        kill_daemons(run, SIGKILL);
}

static void on_deadline(uv_timer_t *timer)
{
        struct ae_run *run = timer->data;

        switch (run->state) {
        case AE_RUN_STARTING:
                daemons_are_late(run);
                break;
        case AE_RUN_RETRYING:
                run_move(run, AE_RUN_STARTING, run->options->ready_ns);
                start_daemons(run);
                break;
        case AE_RUN_STOPPING:
                kill_workers(run, SIGKILL);
                break;
        case AE_RUN_ENDING:
                daemons_dont_end(run);
                break;
        case AE_RUN_RUNNING:
        case AE_RUN_DONE:
        case AE_RUN_N_STATES:
                assert(!"a state without a deadline");
        }
}

static void on_interrupt(struct ae_run *run, int signal)
{
        if (run->n_interrupts++ > 0) {
                kill_workers(run, SIGKILL);
                kill_daemons(run, SIGKILL);
                return;
        }
        note_failure(run, 128 + signal, "stopped by signal %d (%s)", signal, strsignal(signal));
        begin_stop(run, signal);
}

static void on_signal(uv_signal_t *handle, int signal)
{
        struct ae_run *run = handle->data;

        if (signal == SIGCHLD)
                on_child(run);
        else
                on_interrupt(run, signal);
}

/* ---- begin and end ---------------------------------------------------------------------- */

static void loop_init(struct ae_run *run)
{
        int r = uv_loop_init(&run->loop);

        assert(r == 0 && "a loop and its timer take a few descriptors");
        (void)uv_timer_init(&run->loop, &run->timer);
        run->timer.data = run;
        for (int i = 0; i < AE_RUN_N_SIGNALS; i++) {
                (void)uv_signal_init(&run->loop, &run->signals[i]);
                run->signals[i].data = run;
                r = uv_signal_start(&run->signals[i], on_signal, signal_numbers[i]);
                assert(r == 0);
        }
}

static void run_loop(struct ae_run *run)
{
        int r;

        loop_init(run);
        (void)uv_timer_start(&run->timer, on_deadline, run->options->ready_ns / AE_NS_PER_MS, 0);
        start_daemons(run);
        (void)uv_run(&run->loop, UV_RUN_DEFAULT);
        assert(run->state == AE_RUN_DONE);
        r = uv_loop_close(&run->loop);
        assert(r == 0 && "every handle was closed");
        for (uint32_t i = 0; i < run->options->n_nodes; i++)
                ae_run_child_deinit(&run->daemons[i]);
        for (uint32_t i = 0; i < run->options->world; i++)
                ae_run_child_deinit(&run->workers[i]);
}

static int set_up(struct ae_run *run)
{
        int r = ae_run_prepare(run);

        if (r < 0)
                return r;
        r = ae_run_place_new(run->dir);
        if (r < 0)
                return r;
        run->guard.dir = run->dir;
        return ae_run_guard_start(run->dir, &run->guard);
}

void ae_run(const struct ae_run_options *options, struct ae_run_outcome *ret_outcome)
{
        struct ae_run *run = calloc(1, sizeof(*run));
        int r;

        *ret_outcome = (struct ae_run_outcome){ .code = 0 };
        if (!run) {
                *ret_outcome = (struct ae_run_outcome){ .code = 1, .reason = "out of memory" };
                return;
        }
        run->options = options;
        run->outcome = ret_outcome;
        run->guard = (struct ae_run_guard)AE_RUN_GUARD_INIT;
        r = set_up(run);
        if (r == 0)
                run_loop(run);
        else
                note_failure(run, start_code(r), "%s", ae_error_text());
        ae_run_guard_finish(&run->guard);
        free(run->daemon_path);
        free(run);
}
