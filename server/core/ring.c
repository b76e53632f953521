/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A worker's submission ring. Entries are copied before they are checked, indices are checked
 * against the ring on every look; nonsense ends the worker's session and nobody else's.
 */
#include "proto/base/status.h"
#include "server/core/job.h"

static struct ae_local_page *page_of(const struct ae_worker *worker)
{
        return (struct ae_local_page *)worker->page->base;
}

static int entry(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        switch (sqe->op) {
        case AE_SQ_GATHER:
                return ae_cache_gather(worker, sqe);
        case AE_SQ_RANGE:
                return ae_cache_range(worker, sqe);
        case AE_SQ_UNPIN:
                return ae_cache_unpin(worker, sqe);
        case AE_SQ_PREFETCH:
                return ae_cache_prefetch(worker, sqe);
        }
        if (worker->reader)
                return ae_fail(AE_EPROTO, "a reader may not post entry %u", sqe->op);
        switch (sqe->op) {
        case AE_SQ_PIECE:
                return ae_fold_piece(worker, sqe);
        case AE_SQ_SCATTERED:
                return ae_fold_scattered(worker, sqe);
        case AE_SQ_MICRO_END:
                return ae_fold_micro_end(worker, sqe->micro);
        case AE_SQ_STEP:
                return ae_round_step(worker, sqe->token);
        case AE_SQ_XSEND:
                return ae_flow_send(worker, sqe);
        case AE_SQ_XACK:
                return ae_flow_ack(worker, sqe);
        }
        return ae_fail(AE_EPROTO, "unknown ring entry %u", sqe->op);
}

static bool waits_for_put(const struct ae_worker *worker)
{
        return worker->job && worker->job->put_prepared && worker->job->state < AE_JOB_FAILED;
}

static bool may_take(const struct ae_worker *worker)
{
        return worker->job && worker->job->state < AE_JOB_FAILED && worker->registered;
}

/* 1: took an entry, 0: there is none that may be taken now. */
static int take(struct ae_worker *worker, struct ae_local_sqe *ret_sqe)
{
        struct ae_local_page *page = page_of(worker);
        /* pairs with the worker's release of sq_tail */
        uint32_t tail = atomic_load_explicit(&page->sq_tail, memory_order_acquire);

        if (tail == worker->sq_head || waits_for_put(worker))
                return 0; /* what comes during a put belongs to the round after it */
        if (tail - worker->sq_head > AE_LOCAL_SQ_LEN)
                return ae_fail(AE_EPROTO, "its ring index jumped from %u to %u", worker->sq_head,
                               tail);
        if (!may_take(worker)) {
                worker->sq_head = tail; /* it will learn of the failure from its page */
                return 0;
        }
        *ret_sqe = page->sq[worker->sq_head % AE_LOCAL_SQ_LEN];
        worker->sq_head++;
        return 1;
}

int ae_ring_drain(struct ae_worker *worker)
{
        struct ae_local_page *page = page_of(worker);
        uint32_t before = worker->sq_head;
        struct ae_local_sqe sqe;
        int r;

        while ((r = take(worker, &sqe)) > 0) {
                atomic_store_explicit(&page->sq_head, worker->sq_head, memory_order_release);
                r = entry(worker, &sqe);
                if (r < 0)
                        return r;
        }
        if (r == 0 && worker->order_head != worker->order_tail && may_take(worker))
                ae_fold_make_room(worker);
        if (worker->sq_head == before)
                return r;
        atomic_store_explicit(&page->sq_head, worker->sq_head, memory_order_release);
        /* It waits for room only if it found the ring full behind a head that moved here; pairs
         * with its seq_cst store of worker_waits before it looks at the head again. */
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&page->sq_tail, memory_order_relaxed) - before >= AE_LOCAL_SQ_LEN)
                ae_worker_wake(worker);
        return r;
}

void ae_ring_answer(struct ae_worker *worker, const struct ae_local_cqe *cqe)
{
        struct ae_local_page *page = page_of(worker);
        uint32_t head = atomic_load_explicit(&page->cq_head, memory_order_acquire);

        /* A worker has at most as many requests open as its ring holds; one that does not take its
         * answers loses them, and its own waits end at their deadlines. */
        if (worker->cq_tail - head >= AE_LOCAL_CQ_LEN)
                return;
        page->cq[worker->cq_tail % AE_LOCAL_CQ_LEN] = *cqe;
        worker->cq_tail++;
        atomic_store_explicit(&page->cq_tail, worker->cq_tail, memory_order_release);
        ae_worker_wake(worker);
}

bool ae_ring_empty(const struct ae_worker *worker)
{
        return atomic_load_explicit(&page_of(worker)->sq_tail, memory_order_acquire) ==
               worker->sq_head;
}

bool ae_core_worker_pending(const struct ae_worker *worker)
{
        uint32_t tail = atomic_load_explicit(&page_of(worker)->sq_tail, memory_order_acquire);

        return tail != worker->sq_head && !waits_for_put(worker);
}
