/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exchange between CPU workers: messages in order from rank to rank, each pair with slots of its
 * own in the receiver's inbox, so that no sender can fill another's. The daemon carries bytes and
 * counts slots; what they mean is the libraries' business.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
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

        worker->flow_in[src] = AE_MAX(worker->flow_in[src], seq + 1);
        atomic_store_explicit(&flow->ready[seq % AE_LOCAL_XSLOTS], seq + 1, memory_order_release);
        ae_worker_wake(worker);
}

/* Frees the exchange ring up to the first message that is still being sent. */
static void free_ring(struct ae_worker *worker)
{
        bool freed = false;

        while (!ae_list_empty(&worker->flow_order)) {
                struct ae_flow_msg *message =
                        ae_list_entry(worker->flow_order.next, struct ae_flow_msg, order);

                if (!message->done)
                        break;
                worker->xout_free = message->pos + message->len;
                ae_list_unlink(&message->order);
                ae_pool_give(&worker->core->flow_msgs, message);
                freed = true;
        }
        if (!freed)
                return;
        atomic_store_explicit(&page_of(worker)->xout_tail, worker->xout_free, memory_order_release);
        ae_worker_wake(worker);
}

void ae_flow_put_done(struct ae_flow_msg *message)
{
        message->done = true;
        if (message->worker)
                free_ring(message->worker);
        else
                ae_pool_give(&message->core->flow_msgs, message);
}

static void on_copied(struct ae_task *task)
{
        struct ae_flow_msg *message = task->owner;
        struct ae_worker *to = local_rank(task->job, message->dst);

        if (to && task->job->state < AE_JOB_FAILED)
                deliver(to, message->src, message->seq); /* also when the sender has left */
        ae_flow_put_done(message);
}

static void send_local(struct ae_worker *worker, struct ae_flow_msg *message, struct ae_worker *to)
{
        struct ae_local_xin *xin = xin_of(to);
        struct ae_task *task = ae_job_task(worker->job, AE_TASK_COPY, on_copied, message);

        task->copy.to = to->xin->base + slot_off(xin, worker->rank, message->seq);
        task->copy.from = worker->xout->base + message->pos % worker->xout->len;
        task->copy.len = message->len;
        ae_job_run(task);
}

static void send_remote(struct ae_worker *worker, struct ae_flow_msg *message)
{
        struct ae_job *job = worker->job;
        uint32_t node = job->rank_node[message->dst];
        uint64_t off =
                slot_off(xin_of(worker), worker->rank, message->seq); /* alike on every rank */

        atomic_fetch_add_explicit(&job->page->exchange_sent_len, message->len,
                                  memory_order_relaxed);
        ae_job_put(job, node, AE_COOKIE_FLOW, message,
                   &job->peers[node].xin[job->rank_local[message->dst]], off, worker->xout,
                   message->pos % worker->xout->len, message->len,
                   ae_note_flow(job->id, job->epoch, message->seq, worker->rank, message->dst));
}

/* Sends what the flow's free slots allow. */
static void pump(struct ae_worker *worker, uint32_t dst)
{
        struct ae_flow_out *flow = &worker->flows[dst];
        struct ae_worker *to = local_rank(worker->job, dst);
        struct ae_list *entry;

        while (flow->sent - flow->consumed < AE_LOCAL_XSLOTS &&
               (entry = ae_list_pop(&flow->pending))) {
                struct ae_flow_msg *message = ae_list_entry(entry, struct ae_flow_msg, link);

                message->seq = flow->sent++;
                if (to)
                        send_local(worker, message, to);
                else if (worker->job->rank_node[dst] != worker->core->options.node)
                        send_remote(worker, message);
                else
                        ae_flow_put_done(message); /* that rank is gone: the job is failing */
        }
}

int ae_flow_send(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;
        struct ae_flow_msg *message;

        if (sqe->rank >= job->world || sqe->rank == worker->rank)
                return ae_fail(AE_EPROTO, "it sends to rank %u of %u", sqe->rank, job->world);
        if (sqe->len < sizeof(struct ae_local_xhead) || sqe->len > xin_of(worker)->slot_len ||
            sqe->pos < worker->xout_free || sqe->pos - worker->xout_free > worker->xout->len ||
            !ae_range_ok(sqe->pos % worker->xout->len, sqe->len, worker->xout->len))
                return ae_fail(AE_EPROTO, "its message of %u bytes lies outside its exchange ring",
                               sqe->len);
        message = ae_pool_take(&worker->core->flow_msgs);
        message->core = worker->core;
        message->worker = worker;
        message->src = worker->rank;
        message->dst = sqe->rank;
        message->pos = sqe->pos;
        message->len = sqe->len;
        ae_list_init(&message->order);
        ae_list_push(&worker->flow_order, &message->order);
        ae_list_push(&worker->flows[sqe->rank].pending, &message->link);
        pump(worker, sqe->rank);
        return 0;
}

static int consumed(struct ae_job *job, uint32_t src, uint32_t dst, uint64_t n)
{
        struct ae_worker *sender = local_rank(job, src);
        struct ae_flow_out *flow;

        if (!sender)
                return 0; /* gone */
        flow = &sender->flows[dst];
        if (n < flow->consumed || n > flow->sent)
                return ae_fail(AE_EPROTO, "rank %u has consumed %llu of %llu messages from rank %u",
                               dst, (unsigned long long)n, (unsigned long long)flow->sent, src);
        flow->consumed = n;
        pump(sender, dst);
        return 0;
}

int ae_flow_ack(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;
        struct ae_wire_xcredit credit = { .head = ae_job_head(job, AE_WIRE_XCREDIT),
                                          .src = sqe->rank, .dst = worker->rank,
                                          .consumed = sqe->n };

        if (sqe->rank >= job->world || sqe->n > worker->flow_in[sqe->rank])
                return ae_fail(AE_EPROTO, "it acknowledges messages of rank %u that did not come",
                               sqe->rank);
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
        if (!worker)
                return 0; /* gone: the job is failing */
        /* at most AE_LOCAL_XSLOTS are under way, so the low bits tell which it is */
        seq = worker->flow_in[src] + ((low - worker->flow_in[src]) & 0x3fff);
        if (seq - worker->flow_in[src] >= 0x2000)
                seq -= 0x4000; /* it overtook none, it was overtaken */
        deliver(worker, src, seq);
        return 0;
}

void ae_flow_free(struct ae_worker *worker)
{
        while (!ae_list_empty(&worker->flow_order)) {
                struct ae_flow_msg *message =
                        ae_list_entry(worker->flow_order.next, struct ae_flow_msg, order);
                bool queued = !ae_list_empty(&message->link);

                ae_list_unlink(&message->order);
                ae_list_unlink(&message->link);
                message->worker = NULL;
                if (queued || message->done)
                        ae_pool_give(&worker->core->flow_msgs, message);
        }
}
