/* SPDX-License-Identifier: Apache-2.0 */
/* A child's life on the loop. */
#include "client/run/child.h"

#include "client/run/guard.h"

#include "proto/base/cleanup.h"
#include "proto/base/list.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void give_lines(struct ae_run_child *child, unsigned stream, const char *data, size_t len)
{
        ae_run_lines_feed(&child->lines[stream], data, len, child->on_line[stream], child);
}

/* Called when there may be nothing left to wait for. */
static void maybe_finish(struct ae_run_child *child);

static void pipe_end(struct ae_run_child *child, unsigned stream)
{
        ae_run_lines_finish(&child->lines[stream], child->on_line[stream], child);
        assert(child->n_open > 0);
        child->n_open--;
        uv_close((uv_handle_t *)&child->pipes[stream], NULL);
}

static unsigned stream_of(const struct ae_run_child *child, const uv_stream_t *pipe)
{
        return (const uv_stream_t *)&child->pipes[0] == pipe ? 0 : 1;
}

/* libuv hands a buffer back in the same turn, so that one serves all pipes of the thread. */
static void lend_buffer(uv_handle_t *pipe, size_t size, uv_buf_t *ret_buffer)
{
        static char buffer[65536];

        (void)pipe;
        (void)size;
        *ret_buffer = uv_buf_init(buffer, sizeof(buffer));
}

static void on_read(uv_stream_t *pipe, ssize_t n, const uv_buf_t *buffer)
{
        struct ae_run_child *child = pipe->data;
        unsigned stream = stream_of(child, pipe);

        if (n > 0)
                give_lines(child, stream, buffer->base, (size_t)n);
        if (n >= 0)
                return;
        pipe_end(child, stream);
        maybe_finish(child);
}

/* Everything that is in the pipe now, whoever else may still hold its other end. */
static void drain(struct ae_run_child *child, unsigned stream)
{
        uv_handle_t *pipe = (uv_handle_t *)&child->pipes[stream];
        char data[4096];
        uv_os_fd_t fd;
        ssize_t n;

        if (uv_is_closing(pipe) || uv_fileno(pipe, &fd) < 0)
                return;
        while ((n = read(fd, data, sizeof(data))) > 0)
                give_lines(child, stream, data, (size_t)n);
        pipe_end(child, stream);
}

static void notify_close(struct ae_run_child *child)
{
        if (child->notify_fd < 0)
                return;
        (void)uv_poll_stop(&child->notify);
        uv_close((uv_handle_t *)&child->notify, NULL);
        close(ae_steal_fd(&child->notify_fd));
}

static void finish(struct ae_run_child *child)
{
        assert(child->live && child->exited);
        (void)kill(-child->pid, SIGKILL); /* the group may be empty, that is the usual case */
        drain(child, 0);
        drain(child, 1);
        while (waitpid(child->pid, NULL, 0) < 0 && errno == EINTR)
                continue;
        ae_run_guard_gone(child->guard_fd, child->pid);
        notify_close(child);
        uv_close((uv_handle_t *)&child->linger, NULL);
        child->live = false;
        child->on_finished(child);
}

static void maybe_finish(struct ae_run_child *child)
{
        if (child->live && child->exited && child->n_open == 0)
                finish(child);
}

static void on_linger(uv_timer_t *timer)
{
        finish(timer->data);
}

static void on_notify(uv_poll_t *poll, int status, int events)
{
        struct ae_run_child *child = poll->data;
        bool ready;

        (void)events;
        if (status < 0)
                return;
        /* Also what comes later, the watchdog's: left unread it would wake this loop for ever. */
        ready = ae_run_notify_read(child->notify_fd, child->said, sizeof(child->said));
        if (child->ready || !ready)
                return;
        child->ready = true;
        child->on_ready(child);
}

/* Both ends are made before anything is started, so that little can fail behind it. */
static int pipe_open(int *ret_reader, int *ret_writer)
{
        int ends[2];

        if (pipe2(ends, O_CLOEXEC) < 0)
                return ae_fail_sys(errno, "cannot open a pipe");
        (void)fcntl(ends[0], F_SETFL, O_NONBLOCK);
        *ret_reader = ends[0];
        *ret_writer = ends[1];
        return 0;
}

static void watch_pipe(struct ae_run_child *child, uv_loop_t *loop, unsigned stream, int fd)
{
        uv_pipe_t *pipe = &child->pipes[stream];
        int r = uv_pipe_init(loop, pipe, 0);

        pipe->data = child;
        if (r == 0)
                r = uv_pipe_open(pipe, fd);
        if (r == 0)
                r = uv_read_start((uv_stream_t *)pipe, lend_buffer, on_read);
        assert(r == 0 && "a pipe of our own can be read");
        child->n_open++;
}

static void watch(struct ae_run_child *child, uv_loop_t *loop, int out, int err)
{
        int r = uv_timer_init(loop, &child->linger);

        assert(r == 0);
        child->linger.data = child;
        if (out >= 0)
                watch_pipe(child, loop, 0, out);
        watch_pipe(child, loop, 1, err);
        if (child->notify_fd < 0)
                return;
        r = uv_poll_init(loop, &child->notify, child->notify_fd);
        child->notify.data = child;
        if (r == 0)
                r = uv_poll_start(&child->notify, UV_READABLE, on_notify);
        assert(r == 0 && "a socket of our own can be watched");
}

int ae_run_child_start(struct ae_run_child *child, const struct ae_run_start *start)
{
        AE_CLEANUP(ae_cleanup_close) int out = -1;
        AE_CLEANUP(ae_cleanup_close) int out_writer = -1;
        AE_CLEANUP(ae_cleanup_close) int err = -1;
        AE_CLEANUP(ae_cleanup_close) int err_writer = -1;
        AE_CLEANUP(ae_cleanup_close) int notify = -1;
        struct ae_run_spawn spawn = { .argv = start->argv, .vars = start->vars, .in = start->in,
                                      .guard_fd = start->guard_fd };
        pid_t pid;
        int r;

        assert(!child->live);
        r = pipe_open(&err, &err_writer);
        if (r == 0 && start->out < 0)
                r = pipe_open(&out, &out_writer);
        if (r == 0 && start->notify)
                r = ae_run_notify_open(start->notify, &notify);
        if (r < 0)
                return r;
        spawn.out = start->out < 0 ? out_writer : start->out;
        spawn.err = err_writer;
        r = ae_run_spawn(&spawn, &pid);
        if (r < 0)
                return r;
        child->pid = pid;
        child->live = true;
        child->exited = child->ready = child->port_taken = child->blamed = false;
        child->code = child->signal = 0;
        child->started_ns = ae_now_ns();
        child->guard_fd = start->guard_fd;
        child->notify_fd = ae_steal_fd(&notify);
        watch(child, start->loop, ae_steal_fd(&out), ae_steal_fd(&err));
        return 0;
}

bool ae_run_child_check(struct ae_run_child *child)
{
        siginfo_t info = { .si_pid = 0 };

        if (!child->live || child->exited)
                return false;
        /* Left a zombie: see the head of child.h. */
        if (waitid(P_PID, (id_t)child->pid, &info, WEXITED | WNOHANG | WNOWAIT) < 0 ||
            info.si_pid == 0)
                return false;
        child->exited = true;
        child->exited_ns = ae_now_ns();
        if (info.si_code == CLD_EXITED)
                child->code = info.si_status;
        else
                child->signal = info.si_status;
        (void)uv_timer_start(&child->linger, on_linger,
                             child->n_open ? AE_RUN_LINGER_NS / AE_NS_PER_MS : 0, 0);
        return true;
}

void ae_run_child_kill(struct ae_run_child *child, int signal)
{
        if (!child->live)
                return;
        /* A stopped one would not notice. Not after it: a leak sanitizer at the child's end stops
         * the process by ptrace(2), and a late SIGCONT would take that stop away. */
        (void)kill(-child->pid, SIGCONT);
        (void)kill(-child->pid, signal);
}

void ae_run_child_deinit(struct ae_run_child *child)
{
        assert(!child->live);
        ae_run_tail_deinit(&child->tail);
}
