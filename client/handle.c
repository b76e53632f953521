/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opening, leaving and closing a handle; what a fork does to it; the checks that every call begins
 * with.
 */
#include "client/handle.h"

#include "client/env.h"
#include "client/error.h"
#include "client/exchange.h"
#include "client/holds.h"
#include "client/plan.h"
#include "client/queue.h"
#include "client/session.h"
#include "proto/base/cleanup.h"
#include "proto/base/num.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>

#define HANDLE_TIMEOUT_MS (600 * 1000)
#define HANDLE_RING_DEFAULT (UINT64_C(32) << 20)

/* ---- fork ------------------------------------------------------------------------------- */

_Atomic uint32_t ae_handle_generation = 1;

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static struct ae_list all = AE_LIST_INIT(all); /* every handle of the process, under all_lock */
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static int fork_status;

static void close_fds(struct autoep *h)
{
        int *const fds[] = { &h->socket, &h->bell, &h->kick };

        for (size_t i = 0; i < AE_ARRAY_LEN(fds); i++) {
                ae_cleanup_close(fds[i]);
                *fds[i] = -1;
        }
}

static void before_fork(void)
{
        pthread_mutex_lock(&all_lock);
}

static void after_fork_parent(void)
{
        pthread_mutex_unlock(&all_lock);
}

/* The child lets go of the sockets, or a parent that dies would seem to live on. Only calls that
 * are safe in a signal handler: other threads may have stopped in the middle of anything. */
static void after_fork_child(void)
{
        struct autoep *h;

        ae_list_for_each(h, &all, link)
                close_fds(h);
        ae_list_init(&all);
        atomic_fetch_add_explicit(&ae_handle_generation, 1, memory_order_relaxed);
        pthread_mutex_unlock(&all_lock);
}

static void watch_forks(void)
{
        fork_status = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

static bool is_forked(const struct autoep *h)
{
        return h->generation != atomic_load_explicit(&ae_handle_generation, memory_order_relaxed);
}

/* ---- entering --------------------------------------------------------------------------- */

int ae_handle_enter_slow(const struct autoep *h)
{
        if (!h)
                return ae_fail(AE_EINVAL, "the handle is NULL");
        if (is_forked(h))
                return ae_fail(AE_EFORKED, "the handle was opened before a fork and belongs to the "
                               "parent process: open another one here");
        switch ((enum ae_gate)atomic_load_explicit(&h->gate, memory_order_acquire)) {
        case AE_GATE_LIVE:
                return 0;
        case AE_GATE_NEW:
                return ae_fail(AE_ESTATE, "the model is not committed: call autoep_register() "
                               "first");
        case AE_GATE_LOST:
                return ae_fail(h->broken_status, "%s", h->broken_text);
        case AE_GATE_LEFT:
                return ae_fail(AE_ECLOSED, "rank %d has left the job", (int)h->rank);
        }
        assert(!"a gate is one of those");
        return AE_ESTATE;
}

int ae_handle_enter_rank(struct autoep *h, const char *what)
{
        int r = ae_handle_enter(h);

        if (r < 0)
                return r;
        return h->reader ? ae_fail(AE_ESTATE, "a reader does not %s", what) : ae_pump_check_job(h);
}

bool ae_handle_is_lost(const struct autoep *h)
{
        return h && !is_forked(h) &&
               atomic_load_explicit(&h->gate, memory_order_acquire) == AE_GATE_LOST;
}

uint64_t ae_handle_round(const struct autoep *h)
{
        return h->params ? atomic_load_explicit(&h->params->round, memory_order_acquire) : 0;
}

const char *ae_handle_unit_name(const struct autoep *h, uint32_t unit)
{
        return h->layout && unit < h->layout->n_units ? h->layout->units[unit].name : "?";
}

const char *ae_handle_tensor_name(const struct autoep *h, uint32_t tensor)
{
        return h->layout && tensor < h->layout->n_tensors ? h->layout->tensors[tensor].name : "?";
}

int ae_handle_check_unit(const struct autoep *h, uint32_t unit)
{
        return unit < h->layout->n_units ? 0 : ae_fail(AE_ENOENT, "there is no unit %u: the model "
                                                       "has %u", unit, h->layout->n_units);
}

int ae_handle_check_tensor(const struct autoep *h, uint32_t tensor)
{
        return tensor < h->layout->n_tensors ? 0 :
               ae_fail(AE_ENOENT, "there is no tensor %u: the model has %u", tensor,
                       h->layout->n_tensors);
}

/* ---- making and freeing ----------------------------------------------------------------- */

static int init_locks(struct autoep *h)
{
        pthread_condattr_t attr;
        int err;

        err = pthread_condattr_init(&attr);
        if (err)
                return ae_fail_sys(err, "cannot make a condition variable");
        err = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
        if (!err)
                err = pthread_cond_init(&h->wake, &attr);
        pthread_condattr_destroy(&attr);
        if (err)
                return ae_fail_sys(err, "cannot make a condition variable");
        /* With default attributes these cannot fail on Linux, see pthread_mutex_init(3). */
        (void)pthread_mutex_init(&h->lock, NULL);
        (void)pthread_mutex_init(&h->send_lock, NULL);
        return 0;
}

static struct autoep *handle_free(struct autoep *h)
{
        if (!h)
                return NULL;
        close_fds(h);
        ae_session_in_deinit(&h->in);
        if (h->plans)
                ae_plan_free(h);
        ae_exchange_free(h);
        ae_holds_free(h);
        ae_queue_free(h);
        ae_layout_free(h->layout);
        ae_model_free(h->model);
        free(h->rank_node);
        free(h->job);
        ae_map_close(&h->params_map);
        ae_map_close(&h->xout_map);
        ae_map_close(&h->xin_map);
        ae_map_close(&h->grad_map);
        ae_map_close(&h->page_map);
        /* In a child the locks may be held by threads that it doesn't have. */
        if (!is_forked(h)) {
                pthread_cond_destroy(&h->wake);
                pthread_mutex_destroy(&h->lock);
                pthread_mutex_destroy(&h->send_lock);
        }
        free(h);
        return NULL;
}

static void handle_free_p(struct autoep **h)
{
        handle_free(*h);
}

static int handle_new(const struct ae_env *env, const struct autoep_options *options,
                      struct autoep **ret_handle)
{
        struct autoep *h = calloc(1, sizeof(*h));
        int r;

        if (!h)
                return ae_fail(AE_ENOMEM, "no memory for a handle");
        r = init_locks(h);
        if (r < 0) {
                free(h);
                return r;
        }
        h->generation = atomic_load_explicit(&ae_handle_generation, memory_order_relaxed);
        atomic_init(&h->gate, AE_GATE_NEW);
        h->rank = env->rank;
        h->world = env->world;
        h->reader = options->reader != 0;
        h->timeout_ms = options->timeout_ms ? options->timeout_ms : HANDLE_TIMEOUT_MS;
        h->socket = h->bell = h->kick = -1;
        h->next_id = 1;
        atomic_flag_clear(&h->sq_lock);
        ae_list_init(&h->waiters);
        ae_list_init(&h->replies);
        ae_list_init(&h->link);
        h->job = strdup(env->job);
        r = h->job ? ae_queue_new(h) : ae_fail(AE_ENOMEM, "no memory for a handle");
        if (r < 0) {
                handle_free(h);
                return r;
        }
        *ret_handle = h;
        return 0;
}

/* ---- open ------------------------------------------------------------------------------- */

static int check_hello_ok(struct autoep *h, const Autoep__HelloOk *ok, uint32_t n_fds)
{
        if (ok->version != AE_WIRE_VERSION)
                return ae_fail(AE_EVERSION, "the daemon speaks protocol version %u, this library "
                               "%d", ok->version, AE_WIRE_VERSION);
        if (n_fds != 3)
                return ae_fail(AE_EPROTO, "the daemon passed %u descriptors where 3 are needed",
                               n_fds);
        if (ok->n_nodes < 1 || ok->n_nodes > AE_LAYOUT_MAX_NODES || ok->node >= ok->n_nodes)
                return ae_fail(AE_EPROTO, "the daemon says that it is node %u of %u", ok->node,
                               ok->n_nodes);
        if (ok->page_len < sizeof(struct ae_local_page) || ok->grad_len < AE_LOCAL_RING_MIN)
                return ae_fail(AE_EPROTO, "the daemon passed a page of %llu bytes and a ring of "
                               "%llu, needed are %zu and %llu", (unsigned long long)ok->page_len,
                               (unsigned long long)ok->grad_len, sizeof(struct ae_local_page),
                               (unsigned long long)AE_LOCAL_RING_MIN);
        h->node = ok->node;
        h->n_nodes = ok->n_nodes;
        (void)snprintf(h->transport, sizeof(h->transport), "%s", ok->transport);
        return 0;
}

static int check_page(const struct autoep *h, const struct ae_local_page *page)
{
        if (page->magic != AE_LOCAL_MAGIC)
                return ae_fail(AE_EPROTO, "the worker's page that the daemon passed is not one");
        if (page->version != AE_WIRE_VERSION)
                return ae_fail(AE_EVERSION, "the worker's page has version %u, this library knows "
                               "%d", page->version, AE_WIRE_VERSION);
        if (page->grad_len != h->grad_map.len || (!h->reader && page->rank != h->rank))
                return ae_fail(AE_EPROTO, "the worker's page is for rank %u with a ring of %llu "
                               "bytes, not for rank %d with one of %zu", page->rank,
                               (unsigned long long)page->grad_len, (int)h->rank, h->grad_map.len);
        return 0;
}

static int take_hello_ok(struct autoep *h, struct ae_session_reply *reply)
{
        const Autoep__HelloOk *ok = (const Autoep__HelloOk *)reply->message;
        struct ae_local_page *page;
        int r;

        r = check_hello_ok(h, ok, reply->n_fds);
        if (r < 0)
                return r;
        r = ae_map_open("the worker's page", reply->fds[0], ok->page_len, true, true, &h->page_map);
        if (r == 0)
                r = ae_map_open("the gradient ring", reply->fds[1], ok->grad_len, true, true,
                                &h->grad_map);
        if (r < 0)
                return r;
        page = h->page_map.base;
        r = check_page(h, page);
        if (r < 0)
                return r;
        h->grad = (struct ae_ring){ .base = h->grad_map.base, .len = h->grad_map.len,
                                    .tail = &page->grad_tail };
        h->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (h->kick < 0)
                return ae_fail_sys(errno, "cannot make an eventfd");
        h->bell = ae_steal_fd(&reply->fds[2]);
        h->page = page;
        return 0;
}

static int say_hello(struct autoep *h, const struct ae_env *env,
                     const struct autoep_options *options, const struct ae_deadline *deadline)
{
        AE_CLEANUP(ae_session_reply_deinit) struct ae_session_reply reply = { .message = NULL };
        Autoep__Hello hello = AUTOEP__HELLO__INIT;
        int r;

        if (getrandom(&hello.incarnation, sizeof(hello.incarnation), 0) !=
            sizeof(hello.incarnation))
                return ae_fail_sys(errno, "cannot draw a random number");
        hello.version = AE_WIRE_VERSION;
        hello.job = h->job;
        hello.token = (char *)(uintptr_t)(env->token ? env->token : ""); /* only packed */
        hello.rank = h->reader ? 0 : h->rank;
        hello.world = h->world;
        hello.reader = h->reader;
        hello.hold_len = options->hold_len;
        hello.ring_len = options->ring_len ? options->ring_len : HANDLE_RING_DEFAULT;
        r = ae_session_call(h, &(struct ae_session_call){ AE_CONTROL_HELLO, &hello.base, -1, 0,
                                                          AE_CONTROL_HELLO_OK }, deadline, &reply);
        return r < 0 ? r : take_hello_ok(h, &reply);
}

static int check_options(const struct autoep_options *options, const struct ae_env *env)
{
        if (options->timeout_ms < 0)
                return ae_fail(AE_EINVAL, "timeout_ms is %d: use a positive number, or 0 for %d",
                               options->timeout_ms, HANDLE_TIMEOUT_MS);
        if (options->ring_len && (options->ring_len < AE_LOCAL_RING_MIN ||
                                  options->ring_len > AE_LOCAL_RING_MAX))
                return ae_fail(AE_EINVAL, "ring_len is %llu: use %llu to %llu bytes, or 0 for %llu",
                               (unsigned long long)options->ring_len,
                               (unsigned long long)AE_LOCAL_RING_MIN,
                               (unsigned long long)AE_LOCAL_RING_MAX,
                               (unsigned long long)HANDLE_RING_DEFAULT);
        if (strlen(env->job) >= AE_LAYOUT_NAME_MAX ||
            (env->token && strlen(env->token) >= AE_LAYOUT_NAME_MAX))
                return ae_fail(AE_EINVAL, "the job's name or token is longer than %d bytes",
                               AE_LAYOUT_NAME_MAX - 1);
        return 0;
}

static void enlist(struct autoep *h)
{
        pthread_mutex_lock(&all_lock);
        ae_list_push(&all, &h->link);
        pthread_mutex_unlock(&all_lock);
}

static void delist(struct autoep *h)
{
        pthread_mutex_lock(&all_lock);
        ae_list_unlink(&h->link);
        pthread_mutex_unlock(&all_lock);
}

static int connect_handle(struct autoep *h, const struct ae_env *env,
                          const struct autoep_options *options)
{
        struct ae_deadline deadline;
        int r;

        ae_deadline_init(h, AUTOEP_DEFAULT_TIMEOUT, &deadline);
        r = ae_session_connect(h, env->socket, &deadline);
        if (r == 0)
                r = say_hello(h, env, options, &deadline);
        if (r < 0)
                return ae_pump_prefix(r, "cannot join job '%s' at '%s' as %s %d", env->job,
                                      env->socket,
                                      h->reader ? "reader" : "rank", h->reader ? 0 : (int)h->rank);
        return 0;
}

static int open_handle(const struct autoep_options *given, struct autoep **ret_handle)
{
        AE_CLEANUP(handle_free_p) struct autoep *h = NULL;
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        struct ae_env env;
        int r;

        if (!ret_handle)
                return ae_fail(AE_EINVAL, "there is nowhere to put the handle");
        r = given ? ae_check_size("autoep_options", given->size, sizeof(*given)) : 0;
        if (r < 0)
                return r;
        if (given)
                options = *given;
        r = ae_env_resolve(&options, &env);
        if (r == 0)
                r = check_options(&options, &env);
        if (r < 0)
                return r;
        (void)pthread_once(&fork_once, watch_forks); /* fails for a bad argument only */
        if (fork_status)
                return ae_fail_sys(fork_status, "cannot watch for forks");
        r = handle_new(&env, &options, &h);
        if (r == 0)
                r = connect_handle(h, &env, &options);
        if (r < 0)
                return r;
        enlist(h);
        *ret_handle = ae_steal(h);
        return 0;
}

int autoep_open(const struct autoep_options *options, autoep **ret_handle)
{
        return ae_api("autoep_open", open_handle(options, ret_handle));
}

/* ---- leave and close -------------------------------------------------------------------- */

static int leave(struct autoep *h, int timeout_ms)
{
        Autoep__Leave message = AUTOEP__LEAVE__INIT;
        struct ae_session_reply reply;
        struct ae_deadline deadline;
        int r = ae_handle_enter(h);

        /* One may leave before the model is committed. */
        if (r < 0 && (r != AE_ESTATE || !h || is_forked(h)))
                return r;
        r = ae_deadline_check(timeout_ms);
        if (r == 0 && h->holds)
                r = ae_holds_check_none(h);
        if (r < 0)
                return r;
        message.id = ae_session_next_id(h);
        ae_deadline_init(h, timeout_ms, &deadline);
        r = ae_session_call(h, &(struct ae_session_call){ AE_CONTROL_LEAVE, &message.base, -1,
                                                          message.id,
                                                          AE_CONTROL_DONE }, &deadline, &reply);
        ae_session_reply_deinit(&reply);
        if (r < 0 && r != AE_ECLOSED) /* that all have left may be heard before the answer */
                return ae_pump_prefix(r, "cannot leave the job in round %llu",
                                      (unsigned long long)ae_handle_round(h));
        pthread_mutex_lock(&h->lock);
        atomic_store_explicit(&h->gate, AE_GATE_LEFT, memory_order_release);
        pthread_mutex_unlock(&h->lock);
        return 0;
}

int autoep_leave(autoep *h, int timeout_ms)
{
        return ae_api("autoep_leave", leave(h, timeout_ms));
}

void autoep_close(autoep *h)
{
        if (!h)
                return;
        if (!is_forked(h))
                delist(h);
        handle_free(h);
}
