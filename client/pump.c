/* SPDX-License-Identifier: Apache-2.0 */
/* Leader and followers, see pump.h. Any thread. */
#include "client/pump.h"

#include "client/error.h"
#include "client/queue.h"
#include "client/session.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static uint64_t pause_of(const struct autoep *h)
{
        return h->params ? atomic_load(&h->params->pause_ns) : 0;
}

/* What is left of a pause that was announced before @now_ns; read after pause_of(). */
static uint64_t pause_left(const struct autoep *h, uint64_t now_ns)
{
        uint64_t until = h->params ? atomic_load(&h->params->pause_until_ns) : 0;

        return until > now_ns ? until - now_ns : 0;
}

int ae_deadline_check(int timeout_ms)
{
        if (timeout_ms < AUTOEP_DEFAULT_TIMEOUT)
                return ae_fail(AE_EINVAL, "timeout of %d ms: use 0, a positive number or "
                               "AUTOEP_DEFAULT_TIMEOUT", timeout_ms);
        return 0;
}

void ae_deadline_init(const struct autoep *h, int timeout_ms, struct ae_deadline *ret_deadline)
{
        int ms = timeout_ms == AUTOEP_DEFAULT_TIMEOUT ? h->timeout_ms : timeout_ms;

        assert(ms >= 0);
        *ret_deadline = (struct ae_deadline){ .start_ns = ae_now_ns(), .pause_ns = pause_of(h),
                                              .timeout_ns = (uint64_t)ms * AE_NS_PER_MS };
        ret_deadline->paused_ns = pause_left(h, ret_deadline->start_ns);
}

uint64_t ae_deadline_left_ns(const struct autoep *h, const struct ae_deadline *deadline)
{
        uint64_t waited = ae_now_ns() - deadline->start_ns;
        uint64_t pause = pause_of(h);
        uint64_t more = deadline->paused_ns;
        uint64_t allowed = deadline->timeout_ns;

        /* It begins again at 0 with a new epoch, and no pause makes a poll wait. */
        if (pause > deadline->pause_ns &&
            ae_add_overflows(more, pause - deadline->pause_ns, &more))
                more = UINT64_MAX;
        if (allowed && ae_add_overflows(allowed, more, &allowed))
                allowed = UINT64_MAX;
        return waited < allowed ? allowed - waited : 0;
}

static bool job_failed(const struct autoep *h)
{
        return h->params && atomic_load(&h->params->state) == AE_LOCAL_FAILED;
}

static int fail_with_job(struct autoep *h)
{
        char why[sizeof(h->params->why.text)];
        int status = h->params->fail_status;

        ae_local_text_get(&h->params->why, why);
        if (status >= 0 || status < AE_EOVERFLOW)
                status = AE_ELOST;
        return ae_fail(status, "the job has failed in round %llu: %s",
                       (unsigned long long)ae_handle_round(h), why[0] ? why : "no reason given");
}

int ae_pump_check_job(struct autoep *h)
{
        return job_failed(h) ? fail_with_job(h) : 0;
}

static int fail_with_time(struct autoep *h, const struct ae_wait *wait)
{
        unsigned long long ms = wait->deadline->timeout_ns / AE_NS_PER_MS;
        char why[sizeof(h->page->why.text)] = "";

        if (!h->page)
                return ae_fail(AE_ETIMEDOUT, "%llu ms have passed: the daemon has not answered; it "
                               "may wait for node 0, which admits ranks, or stand still", ms);
        if (wait->reason == AE_REASON_ROUND && h->params)
                ae_local_text_get(&h->params->waiting, why);
        else
                ae_local_text_get(&h->page->why, why);
        if (why[0] && ae_queue_is_read(h))
                return ae_fail(AE_ETIMEDOUT, "%llu ms have passed: %s", ms, why);
        return ae_fail(AE_ETIMEDOUT, "%llu ms have passed: the daemon of node %u has not %s%s%s",
                       ms, h->node, ae_queue_is_read(h) ? "answered" : "read its queue",
                       why[0] ? "; it said last: " : "", why);
}

/* Whether @wait needn't sleep any longer, for better or worse. */
static bool is_over(struct autoep *h, const struct ae_wait *wait)
{
        return wait->done(h, wait) ||
               atomic_load_explicit(&h->gate, memory_order_relaxed) == AE_GATE_LOST ||
               job_failed(h);
}

static void wake_finished(struct autoep *h, const struct ae_wait *self)
{
        struct ae_wait *wait;

        ae_list_for_each(wait, &h->waiters, link) {
                if (wait != self && is_over(h, wait)) {
                        pthread_cond_broadcast(&h->wake);
                        return;
                }
        }
}

static struct timespec timespec_of(uint64_t ns)
{
        return (struct timespec){ .tv_sec = (time_t)(ns / AE_NS_PER_S),
                                  .tv_nsec = (long)(ns % AE_NS_PER_S) };
}

/* Called without the lock. */
static int sleep_on_fds(struct pollfd *fds, nfds_t n, uint64_t left_ns)
{
        struct timespec timeout = timespec_of(left_ns);
        int r = ppoll(fds, n, &timeout, NULL);

        if (r < 0 && errno != EINTR)
                return ae_fail_sys(errno, "cannot wait for the daemon");
        for (nfds_t i = 0; r <= 0 && i < n; i++)
                fds[i].revents = 0;
        return 0;
}

/* A daemon that dies may close its end of the bell before the socket. */
static int take_rings(const struct autoep *h, const struct pollfd *bell)
{
        char rings[512];
        ssize_t n;

        if (!bell->revents)
                return 0;
        n = recv(bell->fd, rings, sizeof(rings), MSG_DONTWAIT);
        if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
                return 0;
        if (n < 0 && errno != ECONNRESET)
                return ae_fail(AE_EPROTO, "the bell that the daemon passed is none: %s",
                               strerror(errno));
        return ae_fail(AE_ELOST, "the daemon of node %u has closed its bell in round %llu: see "
                       "its log", h->node, (unsigned long long)ae_handle_round(h));
}

static void take_kicks(const struct pollfd *kick)
{
        uint64_t count;

        if (kick->revents)
                (void)!read(kick->fd, &count, sizeof(count)); /* only that it came counts */
}

/* Sleeps for all, until something comes or @left_ns have passed; takes it in. */
static void lead(struct autoep *h, const struct ae_wait *self, uint64_t left_ns)
{
        struct pollfd fds[3] = { { .fd = h->socket, .events = POLLIN },
                                 { .fd = h->bell, .events = POLLIN },
                                 { .fd = h->kick, .events = POLLIN } }; /* -1: left out */
        int r = 0;

        h->pumping = true;
        if (h->page)
                atomic_store(&h->page->worker_waits, 1); /* pairs with the daemon's look at it */
        ae_queue_drain(h);
        wake_finished(h, self);
        if (!is_over(h, self)) {
                pthread_mutex_unlock(&h->lock);
                r = sleep_on_fds(fds, AE_ARRAY_LEN(fds), left_ns);
                take_kicks(&fds[2]);
                pthread_mutex_lock(&h->lock);
        }
        if (h->page)
                atomic_store_explicit(&h->page->worker_waits, 0, memory_order_relaxed);
        if (r == 0 && fds[0].revents)
                r = ae_session_receive(h);
        if (r == 0)
                r = take_rings(h, &fds[1]);
        if (r < 0)
                (void)ae_pump_break_locked(h, r);
        h->pumping = false;
        ae_queue_drain(h);
        wake_finished(h, self);
}

static void follow(struct autoep *h, uint64_t left_ns)
{
        uint64_t now = ae_now_ns();
        uint64_t end;
        struct timespec until;

        if (ae_add_overflows(now, left_ns, &end) || end > INT64_MAX)
                end = INT64_MAX;
        until = timespec_of(end);
        (void)pthread_cond_timedwait(&h->wake, &h->lock, &until); /* the caller looks again */
}

static int wait_locked(struct autoep *h, struct ae_wait *wait)
{
        bool last_look = false; /* at the descriptors, so that a poll too sees a lost daemon */

        for (;;) {
                uint64_t left_ns;

                ae_queue_drain(h);
                if (wait->done(h, wait))
                        return 0;
                if (atomic_load_explicit(&h->gate, memory_order_relaxed) == AE_GATE_LOST)
                        return ae_fail(h->broken_status, "%s", h->broken_text);
                if (job_failed(h))
                        return fail_with_job(h);
                left_ns = ae_deadline_left_ns(h, wait->deadline);
                if (left_ns == 0 && (last_look || h->pumping))
                        return fail_with_time(h, wait);
                last_look = left_ns == 0;
                if (h->pumping)
                        follow(h, left_ns);
                else
                        lead(h, wait, left_ns);
        }
}

int ae_pump_wait(struct autoep *h, struct ae_wait *wait)
{
        uint64_t start_ns = wait->waited_ns ? ae_now_ns() : 0;
        int r;

        pthread_mutex_lock(&h->lock);
        ae_list_push(&h->waiters, &wait->link);
        atomic_fetch_add(&h->n_waiting, 1); /* pairs with ae_pump_kick() */
        r = wait_locked(h, wait);
        atomic_fetch_sub(&h->n_waiting, 1);
        ae_list_unlink(&wait->link);
        if (!h->pumping && !ae_list_empty(&h->waiters))
                pthread_cond_broadcast(&h->wake); /* another one leads */
        pthread_mutex_unlock(&h->lock);
        if (wait->waited_ns)
                ae_count(wait->waited_ns, ae_now_ns() - start_ns);
        return r;
}

void ae_pump_kick(struct autoep *h)
{
        uint64_t one = 1;
        bool pumping;

        if (atomic_load(&h->n_waiting) == 0)
                return;
        pthread_mutex_lock(&h->lock);
        pthread_cond_broadcast(&h->wake);
        pumping = h->pumping && h->kick >= 0;
        pthread_mutex_unlock(&h->lock);
        if (pumping)
                (void)!write(h->kick, &one, sizeof(one)); /* full: the leader wakes up anyway */
}

int ae_pump_break_locked(struct autoep *h, int status)
{
        if (atomic_load_explicit(&h->gate, memory_order_relaxed) == AE_GATE_LOST)
                return status;
        h->broken_status = status;
        (void)snprintf(h->broken_text, sizeof(h->broken_text), "%s", ae_error_text());
        atomic_store_explicit(&h->gate, AE_GATE_LOST, memory_order_release);
        pthread_cond_broadcast(&h->wake);
        return status;
}

int ae_pump_break(struct autoep *h, int status)
{
        pthread_mutex_lock(&h->lock);
        (void)ae_pump_break_locked(h, status);
        pthread_mutex_unlock(&h->lock);
        ae_pump_kick(h);
        return status;
}

int ae_pump_prefix(int status, const char *format, ...)
{
        char prefix[512];
        va_list args;

        va_start(args, format);
        (void)vsnprintf(prefix, sizeof(prefix), format, args);
        va_end(args);
        return ae_fail(status, "%s: %s", prefix, ae_error_text());
}
