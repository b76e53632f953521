/* SPDX-License-Identifier: Apache-2.0 */
/* What simulated workers send each other: messages that the plan draws, through the rings and slots
 * of the exchange. */
#include "tests/lib/simjob-private.h"

#include <inttypes.h>

/* Whether all messages that a rank has for this one in the round have come. */
static bool has_all(const struct simworker *worker, uint32_t from)
{
        return worker->xgot[from] - worker->xgot_before[from] >=
               simplan_n_messages(worker->job, worker->attempt, from, worker->rank);
}

/* The library acknowledges every second message, and the last. */
static void acknowledge(struct simworker *worker, uint32_t from)
{
        uint64_t n = worker->xgot[from] - worker->xacked[from];

        if (worker->job->params.wild && n < 2 && !has_all(worker, from))
                return;
        worker->xacked[from] = worker->xgot[from];
        simworker_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_XACK, .rank = from,
                                                       .n = worker->xgot[from] });
}

static bool receive_one(struct simworker *worker, uint32_t src)
{
        const struct ae_local_xin *xin = (const struct ae_local_xin *)worker->worker->xin->base;
        uint64_t seq = worker->xgot[src];
        uint32_t s = (uint32_t)(seq % AE_LOCAL_XSLOTS);
        uint32_t len = simplan_message_len(worker->job, src, worker->rank, seq);
        const char *from = (const char *)xin + xin->slots_off +
                           (src * AE_LOCAL_XSLOTS + s) * xin->slot_len;
        uint64_t ready = atomic_load_explicit(&xin->flows[src].ready[s], memory_order_acquire);
        struct ae_local_xhead head;

        if (ready < seq + 1)
                return false;
        if (ready != seq + 1)
                simjob_fail(worker->job,
                            "rank %u: message %" PRIu64 " from rank %u was overwritten by %" PRIu64,
                            worker->rank, seq, src, ready - 1);
        head = simplan_header(worker->job, worker->attempt, src, worker->rank,
                              seq > worker->xgot_before[src], len);
        if (memcmp(from, &head, sizeof(head)) != 0)
                simjob_fail(worker->job, "rank %u: the header of message %" PRIu64
                            " from rank %u differs", worker->rank, seq, src);
        for (uint32_t i = sizeof(head); i < len; i++) {
                if ((uint8_t)from[i] != simplan_message_byte(src, worker->rank, seq, i))
                        simjob_fail(worker->job,
                                    "rank %u: byte %u of message %" PRIu64 " from rank %u differs",
                                    worker->rank, i, seq, src);
        }
        worker->xgot[src]++;
        acknowledge(worker, src);
        return true;
}

/* As the library does while its ring has no room. */
static void receive_all(struct simworker *worker)
{
        for (uint32_t from = 0; from < worker->job->params.n_ranks; from++) {
                while (!has_all(worker, from) && receive_one(worker, from))
                        continue;
        }
}

bool simworker_xsend(struct simworker *worker, const struct simaction *a)
{
        struct ae_local_xhead head;
        uint64_t ring = worker->page->xout_len;
        uint64_t tail = atomic_load_explicit(&worker->page->xout_tail, memory_order_acquire);
        uint64_t seq = worker->xsent[a->rank];
        uint32_t len = simplan_message_len(worker->job, worker->rank, a->rank, seq);
        char *to;

        worker->xout_pos = ae_align_up(worker->xout_pos, 64);
        if (worker->xout_pos % ring + len > ring)
                worker->xout_pos = (worker->xout_pos / ring + 1) * ring;
        if (worker->xout_pos + len - tail > ring) {
                if (worker->job->params.wild)
                        receive_all(worker);
                return false;
        }
        to = worker->worker->xout->base + worker->xout_pos % ring;
        head = simplan_header(worker->job, worker->attempt, worker->rank, a->rank,
                              seq > worker->xsent_before[a->rank], len);
        memcpy(to, &head, sizeof(head));
        for (uint32_t i = sizeof(head); i < len; i++)
                to[i] = (char)simplan_message_byte(worker->rank, a->rank, seq, i);
        simworker_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_XSEND,
                                                       .rank = a->rank,
                                                       .len = len,
                                                       .pos = worker->xout_pos });
        worker->xout_pos += len;
        worker->xsent[a->rank]++;
        return true;
}

bool simworker_xreceive(struct simworker *worker, const struct simaction *a)
{
        return (worker->job->params.wild && has_all(worker, a->rank)) ||
               receive_one(worker, a->rank);
}
