/* SPDX-License-Identifier: Apache-2.0 */
/* Submission, completions and the requests that join them, see queue.h. */
#include "client/queue.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* Fewer than the completion queue has entries, so that the daemon always has room to answer. */
#define QUEUE_REQUESTS AE_LOCAL_REQUESTS_MAX
#define QUEUE_SPINS 100
static_assert(QUEUE_REQUESTS <= AE_LOCAL_CQ_LEN, "every request has room for its answer");

enum request_state {
        REQUEST_FREE,
        REQUEST_PENDING,   /* somebody waits for the answer */
        REQUEST_ANSWERED,  /* the answer is there, and so may be a pin */
        REQUEST_ABANDONED, /* nobody waits any longer */
        REQUEST_UNPIN,     /* the pin is to be taken off when the queue has room */
        N_REQUEST_STATES
};

struct request {
        enum request_state state;
        uint32_t generation; /* how often it was used; the upper half of the token */
        struct ae_local_cqe cqe;
};

/* Under the handle's lock. */
struct ae_requests {
        uint32_t n_free, n_unpin;
        struct request items[QUEUE_REQUESTS];
};

static void request_move(struct ae_requests *all, struct request *request, enum request_state to)
{
        static const bool legal[N_REQUEST_STATES][N_REQUEST_STATES] = {
                [REQUEST_FREE] = { [REQUEST_PENDING] = true },
                [REQUEST_PENDING] = { [REQUEST_ANSWERED] = true, [REQUEST_ABANDONED] = true,
                                      [REQUEST_FREE] = true },
                [REQUEST_ANSWERED] = { [REQUEST_FREE] = true, [REQUEST_UNPIN] = true },
                [REQUEST_ABANDONED] = { [REQUEST_FREE] = true, [REQUEST_UNPIN] = true },
                [REQUEST_UNPIN] = { [REQUEST_FREE] = true },
        };

        assert(legal[request->state][to]);
        all->n_free += (to == REQUEST_FREE) - (request->state == REQUEST_FREE);
        all->n_unpin += (to == REQUEST_UNPIN) - (request->state == REQUEST_UNPIN);
        request->state = to;
}

int ae_queue_new(struct autoep *h)
{
        h->requests = calloc(1, sizeof(*h->requests));
        if (!h->requests)
                return ae_fail(AE_ENOMEM, "no memory for the table of requests");
        h->requests->n_free = QUEUE_REQUESTS;
        return 0;
}

void ae_queue_free(struct autoep *h)
{
        free(h->requests);
        h->requests = NULL;
}

/* ---- submission ------------------------------------------------------------------------- */

static void spin_lock(atomic_flag *lock)
{
        for (int spins = 0; atomic_flag_test_and_set_explicit(lock,
                                                              memory_order_acquire); spins++) {
                if (spins >= QUEUE_SPINS)
                        (void)sched_yield(); /* its holder isn't running */
        }
}

static int fits_at(const struct autoep *h, uint32_t tail, uint32_t n)
{
        uint32_t used = tail - atomic_load(&h->page->sq_head); /* pairs with the daemon's release */

        if (used > AE_LOCAL_SQ_LEN)
                return ae_fail(AE_EPROTO, "the daemon says that it has read %u entries of its "
                               "queue that were not written", (uint32_t)-used);
        return AE_LOCAL_SQ_LEN - used >= n;
}

bool ae_queue_is_read(struct autoep *h)
{
        return atomic_load(&h->page->sq_head) == atomic_load(&h->page->sq_tail);
}

int ae_queue_fits(struct autoep *h, uint32_t n)
{
        int r;

        spin_lock(&h->sq_lock);
        r = fits_at(h, h->sq_tail, n);
        atomic_flag_clear_explicit(&h->sq_lock, memory_order_release);
        return r;
}

void ae_queue_wake(const struct autoep *h)
{
        /* seq_cst, after the store to sq_tail; pairs with the daemon's store to daemon_sleeps and
         * its look at sq_tail. */
        if (!atomic_load(&h->page->daemon_sleeps))
                return;
        /* Full: it rings already. Broken: the socket will say so too. */
        (void)!send(h->bell, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
}

int ae_queue_post(struct autoep *h, const struct ae_local_sqe *sqe, bool wake)
{
        int r;

        spin_lock(&h->sq_lock);
        r = fits_at(h, h->sq_tail, 1);
        if (r > 0) {
                h->page->sq[h->sq_tail % AE_LOCAL_SQ_LEN] = *sqe;
                atomic_store(&h->page->sq_tail, ++h->sq_tail); /* pairs with the daemon's acquire */
        }
        atomic_flag_clear_explicit(&h->sq_lock, memory_order_release);
        if (r < 0)
                return r;
        if (r == 0)
                return AE_QUEUE_FULL;
        if (wake)
                ae_queue_wake(h);
        return 0;
}

static bool has_room(struct autoep *h, const struct ae_wait *wait)
{
        (void)wait;
        return ae_queue_fits(h, 1) != 0;
}

int ae_queue_post_wait(struct autoep *h, const struct ae_local_sqe *sqe,
                       const struct ae_deadline *deadline)
{
        for (;;) {
                struct ae_wait wait = { .done = has_room, .deadline = deadline };
                int r = ae_queue_post(h, sqe, true);

                if (r <= 0)
                        return r;
                ae_queue_wake(h);
                r = ae_pump_wait(h, &wait);
                if (r < 0)
                        return ae_pump_prefix(r, "the daemon of node %u does not read its queue",
                                              h->node);
        }
}

/* ---- completions ------------------------------------------------------------------------ */

/* Ends an answered request: its pin goes, now or when the queue has room. Lock held. */
static void finish(struct autoep *h, struct request *request)
{
        struct ae_local_sqe sqe = { .op = AE_SQ_UNPIN, .slot = request->cqe.slot };

        if (request->cqe.status == 0 && ae_queue_post(h, &sqe, false) != 0) {
                if (request->state != REQUEST_UNPIN)
                        request_move(h->requests, request, REQUEST_UNPIN);
                return;
        }
        request_move(h->requests, request, REQUEST_FREE);
}

static void retry_unpins(struct autoep *h)
{
        for (uint32_t i = 0; i < QUEUE_REQUESTS && h->requests->n_unpin > 0; i++) {
                if (h->requests->items[i].state == REQUEST_UNPIN)
                        finish(h, &h->requests->items[i]);
        }
}

static int take_cqe(struct autoep *h, const struct ae_local_cqe *cqe)
{
        uint32_t index = (uint32_t)cqe->token;
        struct request *request = index < QUEUE_REQUESTS ? &h->requests->items[index] : NULL;

        if (!request || request->generation != cqe->token >> 32 ||
            (request->state != REQUEST_PENDING && request->state != REQUEST_ABANDONED))
                return ae_fail(AE_EPROTO, "the daemon answered a request that was not made (token "
                               "%llx)", (unsigned long long)cqe->token);
        if (cqe->status > 0 || cqe->status < AE_EOVERFLOW ||
            (cqe->status == 0 && cqe->slot >= h->n_slots))
                return ae_fail(AE_EPROTO, "the daemon answered with status %d and slot %u of %u",
                               cqe->status, cqe->slot, h->n_slots);
        request->cqe = *cqe;
        if (request->state == REQUEST_ABANDONED)
                finish(h, request);
        else
                request_move(h->requests, request, REQUEST_ANSWERED);
        return 0;
}

void ae_queue_drain(struct autoep *h)
{
        uint32_t tail;

        if (!h->page || atomic_load_explicit(&h->gate, memory_order_relaxed) == AE_GATE_LOST)
                return;
        tail = atomic_load(&h->page->cq_tail); /* pairs with the daemon's release */
        if (tail - h->cq_head > AE_LOCAL_CQ_LEN) {
                (void)ae_pump_break_locked(h, ae_fail(AE_EPROTO, "the daemon's completion queue "
                                                      "has %u entries", tail - h->cq_head));
                return;
        }
        while (h->cq_head != tail) {
                struct ae_local_cqe cqe = h->page->cq[h->cq_head % AE_LOCAL_CQ_LEN];
                int r = take_cqe(h, &cqe);

                if (r < 0) {
                        (void)ae_pump_break_locked(h, r);
                        return;
                }
                atomic_store_explicit(&h->page->cq_head, ++h->cq_head, memory_order_release);
        }
        if (h->requests->n_unpin > 0)
                retry_unpins(h);
}

/* ---- requests --------------------------------------------------------------------------- */

static bool has_free(struct autoep *h, const struct ae_wait *wait)
{
        (void)wait;
        return h->requests->n_free > 0;
}

static uint32_t try_begin(struct autoep *h)
{
        uint32_t found = QUEUE_REQUESTS;

        pthread_mutex_lock(&h->lock);
        for (uint32_t i = 0; i < QUEUE_REQUESTS && h->requests->n_free > 0; i++) {
                struct request *request = &h->requests->items[i];

                if (request->state != REQUEST_FREE)
                        continue;
                request->generation++;
                request_move(h->requests, request, REQUEST_PENDING);
                found = i;
                break;
        }
        pthread_mutex_unlock(&h->lock);
        return found;
}

static int begin(struct autoep *h, const struct ae_deadline *deadline, uint32_t *ret_index)
{
        for (;;) {
                struct ae_wait wait = { .done = has_free, .deadline = deadline };
                int r;

                *ret_index = try_begin(h);
                if (*ret_index < QUEUE_REQUESTS)
                        return 0;
                r = ae_pump_wait(h, &wait);
                if (r < 0)
                        return ae_pump_prefix(r, "%u gathers are waiting already", QUEUE_REQUESTS);
        }
}

static bool is_answered(struct autoep *h, const struct ae_wait *wait)
{
        const struct request *request = wait->arg;

        (void)h;
        return request->state == REQUEST_ANSWERED;
}

/* Whoever asked is done with it: its answer, if that is there, is dropped, otherwise the request
 * becomes @to. A thread that waits for a free one hears of it. */
static void let_go(struct autoep *h, struct request *request, enum request_state to)
{
        bool was_full;

        pthread_mutex_lock(&h->lock);
        was_full = h->requests->n_free == 0;
        if (request->state == REQUEST_ANSWERED)
                finish(h, request);
        else
                request_move(h->requests, request, to);
        pthread_mutex_unlock(&h->lock);
        if (was_full)
                ae_pump_kick(h);
}

static int ask(struct autoep *h, struct ae_local_sqe *sqe, const struct ae_deadline *deadline,
               struct request *request)
{
        struct ae_wait wait = { .done = is_answered, .arg = request, .deadline = deadline };
        int r;

        sqe->token = (uint64_t)request->generation << 32 | (uint32_t)(request - h->requests->items);
        r = ae_queue_post_wait(h, sqe, deadline);
        if (r < 0) {
                let_go(h, request, REQUEST_FREE);
                return r;
        }
        r = ae_pump_wait(h, &wait);
        if (r < 0)
                let_go(h, request, REQUEST_ABANDONED);
        return r;
}

int ae_queue_request(struct autoep *h, struct ae_local_sqe *sqe, const struct ae_deadline *deadline,
                     struct ae_local_cqe *ret_cqe, uint32_t *ret_request)
{
        char why[sizeof(h->page->why.text)];
        struct ae_local_cqe cqe;
        struct request *request;
        uint32_t index;
        int r;

        r = begin(h, deadline, &index);
        if (r < 0)
                return r;
        request = &h->requests->items[index];
        r = ask(h, sqe, deadline, request);
        if (r < 0)
                return r;
        cqe = request->cqe; /* ours until the request is finished */
        if (cqe.status < 0) {
                ae_local_text_get(&h->page->why, why);
                ae_queue_unpin(h, index);
                return ae_fail(cqe.status, "%s", why[0] ? why : ae_status_words(cqe.status));
        }
        *ret_cqe = cqe;
        *ret_request = index;
        return 0;
}

void ae_queue_unpin(struct autoep *h, uint32_t index)
{
        let_go(h, &h->requests->items[index], REQUEST_FREE);
}
