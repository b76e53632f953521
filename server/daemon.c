/* SPDX-License-Identifier: Apache-2.0 */
/* The daemon's loop. Its thread owns node, sessions and the core; compute threads have tasks. */
#include "server/daemon.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/inspect.h"
#include "server/node.h"
#include "server/notify.h"
#include "server/pool.h"
#include "server/region.h"
#include "server/session.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

#include <uv.h>

#define TICK_MS 20
#define WATCHDOG_NS (5 * AE_NS_PER_S)
/* Copies up to this size, and so many bytes of them in one turn of the loop, are made on the loop:
 * waking a compute thread and being woken by it takes longer than they do. */
#define SMALL_LEN (64 * AE_KIB)
#define SMALL_TURN_LEN (256 * AE_KIB)

struct ae_daemon {
        const struct ae_config *config; /* borrowed */
        uint64_t start_ns, watchdog_ns;
        uv_loop_t loop;
        bool loop_open;
        uv_async_t wake;        /* tasks are done */
        uv_async_t stop;
        uv_timer_t tick;
        uv_prepare_t prepare;   /* before the loop sleeps */
        uv_check_t check;       /* after */
        uv_idle_t idle;         /* keeps it from sleeping while there is work */
        struct ae_pool_threads *threads;
        struct ae_list copied;  /* struct ae_task: run on the loop, not yet told to the core */
        uint64_t copied_len;    /* bytes of these and of those told in this turn */
        struct ae_node *node;
        struct ae_sessions *sessions;
        bool notify, ready, stopping;
};

/* ---- what the node asks of us ----------------------------------------------------------- */

/* On a compute thread. */
static void tasks_wake(void *user)
{
        struct ae_daemon *daemon = user;

        uv_async_send(&daemon->wake);
}

static void node_wake(void *user)
{
        (void)user; /* on the loop: on_prepare() polls the node before the loop sleeps again */
}

static void node_task(void *user, struct ae_task *task)
{
        struct ae_daemon *daemon = user;

        if (task->kind != AE_TASK_COPY || task->copy.len > SMALL_LEN ||
            daemon->copied_len + task->copy.len > SMALL_TURN_LEN) {
                ae_threads_run(daemon->threads, task);
                return;
        }
        ae_task_run(task, 0); /* a copy has no use for an undo record, whichever it is */
        daemon->copied_len += task->copy.len;
        ae_list_push(&daemon->copied, &task->link);
}

/* Tells the core of the copies made on the loop, and of those that this causes. */
static void tell_copied(struct ae_daemon *daemon)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(&daemon->copied)))
                ae_node_task_done(daemon->node, ae_list_entry(entry, struct ae_task, link));
}

static int node_region_new(void *user, const struct ae_region_spec *spec, struct ae_region **ret)
{
        (void)user;
        return ae_region_new(spec, ret);
}

static void node_region_free(void *user, struct ae_region *region)
{
        (void)user;
        ae_region_free(region);
}

static void node_worker_send(void *user, struct ae_worker *worker, uint32_t type,
                             const ProtobufCMessage *message, const int *fds, size_t n_fds)
{
        (void)user;
        ae_sessions_send(worker, type, message, fds, n_fds);
}

static void node_worker_wake(void *user, struct ae_worker *worker)
{
        (void)user;
        ae_sessions_wake(worker);
}

static void node_log(void *user, int level, const char *text)
{
        (void)user;
        ae_log((enum ae_log_level)level, "%s", text);
}

static int inspect(void *user, const Autoep__CtlRequest *request, char **ret_text)
{
        struct ae_daemon *daemon = user;
        struct ae_inspect inspect = {
                .node = daemon->node, .config = daemon->config,
                .uptime_ns = ae_now_ns() - daemon->start_ns,
        };

        return ae_inspect(&inspect, request, ret_text);
}

/* ---- the loop --------------------------------------------------------------------------- */

/* All that can be done now. Returns whether something may be left. */
static bool work(struct ae_daemon *daemon)
{
        struct ae_task *task;
        bool more;

        daemon->copied_len = 0;
        while ((task = ae_threads_take(daemon->threads)))
                ae_node_task_done(daemon->node, task);
        ae_sessions_drain(daemon->sessions);
        do {
                tell_copied(daemon);
                more = ae_node_poll(daemon->node);
        } while (!ae_list_empty(&daemon->copied));
        return more;
}

static void on_idle(uv_idle_t *idle)
{
        (void)idle; /* an active idle handle is what keeps the loop's timeout at 0 */
}

static void on_prepare(uv_prepare_t *prepare)
{
        struct ae_daemon *daemon = prepare->data;
        bool more = work(daemon);

        if (more || !ae_sessions_sleep(daemon->sessions))
                uv_idle_start(&daemon->idle, on_idle);
        else
                uv_idle_stop(&daemon->idle);
}

static void on_check(uv_check_t *check)
{
        struct ae_daemon *daemon = check->data;

        ae_sessions_awake(daemon->sessions);
}

static void on_wake(uv_async_t *async)
{
        (void)async; /* on_prepare() does the work */
}

static void tell_ready(struct ae_daemon *daemon)
{
        char text[256];

        daemon->ready = true;
        (void)snprintf(text, sizeof(text), "READY=1\nSTATUS=node %u of %u serves at %s",
                       daemon->config->node, daemon->config->n_peers, daemon->config->socket);
        ae_log_info(
                "serves node=%u nodes=%u socket=%s transport=%s address=%s memory=%llu threads=%u",
                daemon->config->node, daemon->config->n_peers, daemon->config->socket,
                daemon->config->n_peers > 1 ? daemon->config->transport : "none",
                ae_node_address(daemon->node), (unsigned long long)daemon->config->memory,
                daemon->config->threads);
        if (daemon->notify)
                ae_notify(text);
}

static void on_tick(uv_timer_t *timer)
{
        struct ae_daemon *daemon = timer->data;
        uint64_t now = ae_now_ns();

        ae_node_tick(daemon->node, now);
        ae_sessions_tick(daemon->sessions, now);
        /* it serves before its peers are there: workers are told whom they wait for */
        if (!daemon->ready)
                tell_ready(daemon);
        if (daemon->notify && now - daemon->watchdog_ns > WATCHDOG_NS) {
                daemon->watchdog_ns = now;
                ae_notify("WATCHDOG=1");
        }
}

static void on_stop(uv_async_t *async)
{
        struct ae_daemon *daemon = async->data;

        daemon->stopping = true;
        uv_stop(&daemon->loop);
}

void ae_daemon_stop(struct ae_daemon *daemon)
{
        uv_async_send(&daemon->stop);
}

/* ---- life ------------------------------------------------------------------------------- */

static int open_loop(struct ae_daemon *daemon)
{
        int r = uv_loop_init(&daemon->loop);

        if (r < 0)
                return ae_fail(AE_ESYS, "cannot make a loop: %s", uv_strerror(r));
        daemon->loop_open = true;
        uv_async_init(&daemon->loop, &daemon->wake, on_wake);
        uv_async_init(&daemon->loop, &daemon->stop, on_stop);
        uv_timer_init(&daemon->loop, &daemon->tick);
        uv_prepare_init(&daemon->loop, &daemon->prepare);
        uv_check_init(&daemon->loop, &daemon->check);
        uv_idle_init(&daemon->loop, &daemon->idle);
        daemon->wake.data = daemon->stop.data = daemon->tick.data = daemon;
        daemon->prepare.data = daemon->check.data = daemon;
        return 0;
}

static int open_node(struct ae_daemon *daemon)
{
        const struct ae_config *config = daemon->config;
        struct ae_node_options options = {
                .node = config->node, .n_nodes = config->n_peers,
                .peers = (const char *const *)config->peer_list, .transport = config->transport,
                .loop = &daemon->loop, .memory_len = config->memory, .n_threads = config->threads,
                .wake = node_wake, .task = node_task, .region_new = node_region_new,
                .region_free = node_region_free, .worker_send = node_worker_send,
                .worker_wake = node_worker_wake, .log = node_log, .user = daemon,
        };

        if (getrandom(&options.incarnation, sizeof(options.incarnation), 0) < 0)
                return ae_fail_sys(errno, "cannot draw an incarnation");
        return ae_node_new(&options, &daemon->node);
}

static int open_sessions(struct ae_daemon *daemon)
{
        struct ae_sessions_options options = {
                .loop = &daemon->loop, .path = daemon->config->socket,
                .core = ae_node_core(daemon->node), .node = daemon->config->node,
                .inspect = inspect, .user = daemon,
        };

        return ae_sessions_new(&options, &daemon->sessions);
}

static int open_all(struct ae_daemon *daemon)
{
        int r;

        r = open_loop(daemon);
        if (r < 0)
                return r;
        r = ae_threads_new(daemon->config->threads, tasks_wake, daemon, &daemon->threads);
        if (r < 0)
                return r;
        r = open_node(daemon);
        if (r < 0)
                return r;
        return open_sessions(daemon);
}

AE_DEFINE_CLEANUP(struct ae_daemon *, ae_daemon_free)

int ae_daemon_new(const struct ae_config *config, struct ae_daemon **ret_daemon)
{
        AE_CLEANUP(ae_daemon_free_p) struct ae_daemon *daemon = calloc(1, sizeof(*daemon));
        int r;

        if (!daemon)
                return ae_fail(AE_ENOMEM, "no memory for a daemon");
        daemon->config = config;
        ae_list_init(&daemon->copied);
        daemon->start_ns = ae_now_ns();
        r = open_all(daemon);
        if (r < 0)
                return r;
        *ret_daemon = ae_steal(daemon);
        return 0;
}

static void close_loop(struct ae_daemon *daemon)
{
        uv_handle_t *const handles[] = {
                (uv_handle_t *)&daemon->wake, (uv_handle_t *)&daemon->stop,
                (uv_handle_t *)&daemon->tick, (uv_handle_t *)&daemon->prepare,
                (uv_handle_t *)&daemon->check, (uv_handle_t *)&daemon->idle,
        };
        int r;

        for (size_t i = 0; i < AE_ARRAY_LEN(handles); i++)
                uv_close(handles[i], NULL);
        uv_run(&daemon->loop, UV_RUN_DEFAULT);
        r = uv_loop_close(&daemon->loop);
        assert(r == 0);
}

/* Tasks first come to rest, for they touch the memory that goes next. */
static void finish_tasks(struct ae_daemon *daemon)
{
        struct ae_task *task;

        while (daemon->threads &&
               (ae_threads_running(daemon->threads) || !ae_list_empty(&daemon->copied))) {
                tell_copied(daemon);
                task = ae_threads_take(daemon->threads);
                if (task)
                        ae_node_task_done(daemon->node, task);
                else if (ae_threads_running(daemon->threads))
                        uv_sleep(1); /* a task runs to its end; there is nothing to wait on */
        }
}

struct ae_daemon *ae_daemon_free(struct ae_daemon *daemon)
{
        if (!daemon)
                return NULL;
        ae_sessions_free(daemon->sessions);
        finish_tasks(daemon);
        ae_node_free(daemon->node);
        ae_threads_free(daemon->threads);
        if (daemon->loop_open)
                close_loop(daemon);
        free(daemon);
        return NULL;
}

void ae_daemon_run(struct ae_daemon *daemon, int notify)
{
        daemon->notify = notify;
        uv_timer_start(&daemon->tick, on_tick, 0, TICK_MS);
        uv_prepare_start(&daemon->prepare, on_prepare);
        uv_check_start(&daemon->check, on_check);
        while (!daemon->stopping)
                uv_run(&daemon->loop, UV_RUN_DEFAULT);
        if (notify)
                ae_notify("STOPPING=1");
}
