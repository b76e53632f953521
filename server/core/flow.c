/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exchange between CPU workers: messages in order from rank to rank, each pair with slots of its
 * own in the receiver's inbox, so that no sender can fill another's. The daemon carries bytes,
 * counts slots and compares which collectives the headers name (order.c); what the bytes mean is
 * the libraries' business. What a rank has posted before it leaves is sent; a message to one that
 * has left means that its sender waits for it, and fails the job.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <string.h>

static struct ae_local_page *page_of(const struct ae_worker *worker)
{
        return (struct ae_local_page *)worker->page->base;
}

static struct ae_local_xin *xin_of(const struct ae_worker *worker)
{
        return (struct ae_local_xin *)worker->xin->base;
}

static struct ae_worker *local_rank(const struct ae_job *job, uint32_t rank)
{
        if (job->rank_node[rank] != job->core->options.node)
                return NULL;
        return job->locals[job->rank_local[rank]];
}

static uint64_t slot_off(const struct ae_local_xin *xin, uint32_t src, uint64_t seq)
{
        return xin->slots_off + (src * AE_LOCAL_XSLOTS + seq % AE_LOCAL_XSLOTS) * xin->slot_len;
}

/* Message @seq of the flow from @src lies in @worker's inbox. */
static void deliver(struct ae_worker *worker, uint32_t src, uint64_t seq)
{
        struct ae_local_xflow *flow = &xin_of(worker)->flows[src];

        ae_order_see(worker->job, worker->xin->base + slot_off(xin_of(worker), src, seq), src,
                     worker->rank);
        if (worker->job->state >= AE_JOB_FAILED)
                return;

        worker->flow_in[src] = AE_MAX(worker->flow_in[src], seq + 1);
        atomic_store_explicit(&flow->ready[seq % AE_LOCAL_XSLOTS], seq + 1, memory_order_release);
        ae_worker_wake(worker);
}

/* Frees the exchange ring up to the first message that is still being sent. */
static void free_ring(struct ae_outbox *outbox)
{
        bool freed = false;

        while (!ae_list_empty(&outbox->order)) {
                struct ae_flow_msg *message =
                        ae_list_entry(outbox->order.next, struct ae_flow_msg, order);

                if (!message->done)
                        break;
                outbox->free = message->pos + message->len;
                ae_list_unlink(&message->order);
                ae_pool_give(&outbox->job->core->flow_msgs, message);
                freed = true;
        }
        if (!freed || !outbox->worker)
                return;
        atomic_store_explicit(&page_of(outbox->worker)->xout_tail, outbox->free,
                              memory_order_release);
        ae_worker_wake(outbox->worker);
}

void ae_flow_put_done(struct ae_flow_msg *message)
{
        message->done = true;
        free_ring(message->outbox);
}

/* @dst takes part in no exchange any more, but rank @src has begun one with it. */
static void has_left(struct ae_job *job, uint32_t dst, uint32_t src)
{
        ae_job_fail(job, AE_ELOST,
                    "rank %u has left job '%s', and rank %u is in an exchange with it", dst,
                    job->name, src);
}

static void on_copied(struct ae_task *task)
{
        struct ae_flow_msg *message = task->owner;
        struct ae_job *job = task->job;
        struct ae_worker *to = local_rank(job, message->dst);

        if (job->state < AE_JOB_FAILED && to && !to->left)
                deliver(to, message->outbox->rank, message->seq);
        else if (job->state < AE_JOB_FAILED)
                has_left(job, message->dst, message->outbox->rank);
        ae_flow_put_done(message);
}

static void send_local(struct ae_outbox *outbox, struct ae_flow_msg *message, struct ae_worker *to)
{
        struct ae_task *task = ae_job_task(outbox->job, AE_TASK_COPY, on_copied, message);

        task->copy.to = to->xin->base + slot_off(xin_of(to), outbox->rank, message->seq);
        task->copy.from = outbox->xout->base + message->pos % outbox->xout->len;
        task->copy.len = message->len;
        ae_job_run(task);
}

static void send_remote(struct ae_outbox *outbox, struct ae_flow_msg *message)
{
        struct ae_job *job = outbox->job;
        uint32_t node = job->rank_node[message->dst];
        uint64_t off = slot_off((const struct ae_local_xin *)outbox->xin->base, outbox->rank,
                                message->seq); /* alike on every rank */

        atomic_fetch_add_explicit(&job->page->exchange_sent_len, message->len,
                                  memory_order_relaxed);
        ae_job_put(job, node, AE_COOKIE_FLOW, message,
                   &job->peers[node].xin[job->rank_local[message->dst]], off, outbox->xout,
                   message->pos % outbox->xout->len, message->len,
                   ae_note_flow(job->id, job->epoch, message->seq, outbox->rank, message->dst));
}

/* Sends what the flow's free slots allow. */
static void pump(struct ae_outbox *outbox, uint32_t dst)
{
        struct ae_job *job = outbox->job;
        struct ae_flow_out *flow = &outbox->flows[dst];
        struct ae_worker *to = local_rank(job, dst);
        struct ae_list *entry;

        if (ae_list_empty(&flow->pending) || job->state >= AE_JOB_FAILED)
                return;
        if (job->rank_node[dst] == job->core->options.node && (!to || to->left)) {
                has_left(job, dst, outbox->rank);
                return;
        }
        while (flow->sent - flow->consumed < AE_LOCAL_XSLOTS &&
               (entry = ae_list_pop(&flow->pending))) {
                struct ae_flow_msg *message = ae_list_entry(entry, struct ae_flow_msg, link);

                message->seq = flow->sent++;
                if (to)
                        send_local(outbox, message, to);
                else
                        send_remote(outbox, message);
        }
}

int ae_flow_send(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;
        struct ae_outbox *outbox = worker->outbox;
        struct ae_flow_msg *message;

        if (sqe->rank >= job->world || sqe->rank == worker->rank)
                return ae_fail(AE_EPROTO, "it sends to rank %u of %u", sqe->rank, job->world);
        if (sqe->len < sizeof(struct ae_local_xhead) || sqe->len > xin_of(worker)->slot_len ||
            sqe->pos < outbox->free || sqe->pos - outbox->free > worker->xout->len ||
            !ae_range_ok(sqe->pos % worker->xout->len, sqe->len, worker->xout->len))
                return ae_fail(AE_EPROTO, "its message of %u bytes lies outside its exchange ring",
                               sqe->len);
        ae_order_see(job, worker->xout->base + sqe->pos % worker->xout->len, worker->rank,
                     sqe->rank);
        if (job->state >= AE_JOB_FAILED)
                return 0;
        message = ae_pool_take(&worker->core->flow_msgs);
        message->outbox = outbox;
        message->dst = sqe->rank;
        message->pos = sqe->pos;
        message->len = sqe->len;
        ae_list_init(&message->order);
        ae_list_push(&outbox->order, &message->order);
        ae_list_push(&outbox->flows[sqe->rank].pending, &message->link);
        pump(outbox, sqe->rank);
        return 0;
}

static int consumed(struct ae_job *job, uint32_t src, uint32_t dst, uint64_t n)
{
        struct ae_outbox *outbox = NULL;
        struct ae_flow_out *flow;

        if (job->rank_node[src] == job->core->options.node)
                outbox = job->outboxes[job->rank_local[src]];
        if (!outbox)
                return ae_fail(AE_EPROTO, "rank %u has consumed messages of rank %u, which is not "
                               "on this node", dst, src);
        flow = &outbox->flows[dst];
        if (n < flow->consumed || n > flow->sent)
                return ae_fail(AE_EPROTO, "rank %u has consumed %llu of %llu messages from rank %u",
                               dst, (unsigned long long)n, (unsigned long long)flow->sent, src);
        flow->consumed = n;
        pump(outbox, dst);
        return 0;
}

int ae_flow_ack(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;
        struct ae_wire_xcredit credit = { .head = ae_job_head(job, AE_WIRE_XCREDIT),
                                          .src = sqe->rank, .dst = worker->rank,
                                          .consumed = sqe->n };

        if (sqe->rank >= job->world || sqe->n > worker->flow_in[sqe->rank] ||
            sqe->n < worker->flow_acked[sqe->rank])
                return ae_fail(AE_EPROTO, "it acknowledges messages of rank %u that did not come",
                               sqe->rank);
        worker->flow_acked[sqe->rank] = sqe->n;
        if (job->rank_node[sqe->rank] == job->core->options.node)
                return consumed(job, sqe->rank, worker->rank, sqe->n);
        ae_job_msg(job, job->rank_node[sqe->rank], &credit, sizeof(credit));
        return 0;
}

int ae_flow_credit(struct ae_job *job, const struct ae_wire_xcredit *credit, size_t len)
{
        if (len < sizeof(*credit) || credit->src >= job->world || credit->dst >= job->world)
                return ae_fail(AE_EPROTO, "XCREDIT does not fit");
        return consumed(job, credit->src, credit->dst, credit->consumed);
}

int ae_flow_arrived(struct ae_job *job, uint64_t note)
{
        uint32_t src = (note >> 16) & 0xffff;
        uint32_t dst = note & 0xffff;
        uint32_t low = (note >> 32) & 0x3fff;
        struct ae_worker *worker;
        uint64_t seq;

        if (src >= job->world || dst >= job->world ||
            job->rank_node[dst] != job->core->options.node)
                return ae_fail(AE_EPROTO, "an exchange message from rank %u to %u went astray", src,
                               dst);
        worker = local_rank(job, dst);
        if (!worker || worker->left) {
                has_left(job, dst, src);
                return 0;
        }
        /* at most AE_LOCAL_XSLOTS are under way, so the low bits tell which it is */
        seq = worker->flow_in[src] + ((low - worker->flow_in[src]) & 0x3fff);
        if (seq - worker->flow_in[src] >= 0x2000)
                seq -= 0x4000; /* it overtook none, it was overtaken */
        deliver(worker, src, seq);
        return 0;
}

void ae_flow_new(struct ae_worker *worker)
{
        struct ae_job *job = worker->job;
        struct ae_outbox *outbox = ae_table_new(job->core, 1, sizeof(*outbox));

        outbox->job = job;
        outbox->worker = worker;
        outbox->rank = worker->rank;
        outbox->xout = worker->xout;
        outbox->xin = worker->xin;
        outbox->flows = ae_table_new(job->core, job->world, sizeof(*outbox->flows));
        ae_list_init(&outbox->order);
        for (uint32_t rank = 0; rank < job->world; rank++)
                ae_list_init(&outbox->flows[rank].pending);
        worker->outbox = job->outboxes[worker->local] = outbox;
        worker->flow_in = ae_table_new(job->core, job->world, sizeof(*worker->flow_in));
        worker->flow_acked = ae_table_new(job->core, job->world, sizeof(*worker->flow_acked));
}

void ae_flow_leave(struct ae_worker *worker)
{
        struct ae_job *job = worker->job;

        for (uint32_t src = 0; worker->flow_in && src < job->world; src++) {
                if (worker->flow_in[src] > worker->flow_acked[src])
                        has_left(job, worker->rank, src);
        }
}

void ae_flow_worker_gone(struct ae_worker *worker)
{
        if (worker->outbox)
                worker->outbox->worker = NULL;
}

void ae_flow_free(struct ae_job *job)
{
        for (uint32_t i = 0; job->outboxes && i < job->n_local; i++) {
                struct ae_outbox *outbox = job->outboxes[i];
                struct ae_flow_msg *message;

                if (!outbox)
                        continue;
                ae_list_for_each_safe(message, &outbox->order, order) {
                        ae_list_unlink(&message->order);
                        ae_list_unlink(&message->link);
                        ae_pool_give(&job->core->flow_msgs, message);
                }
                ae_table_free(job->core, outbox->flows);
                ae_table_free(job->core, outbox);
        }
        ae_table_free(job->core, job->outboxes);
}
