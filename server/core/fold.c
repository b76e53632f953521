/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scatter on the worker's node: pieces of gradients are folded into the sum of their group in the
 * contract's order, (micro-batch, rank, use). Each cell of a unit's gradient image goes at its own
 * pace: it folds the longest run of pieces whose turn it is, several in one pass. A piece may go
 * when every lane before it in that order is settled: has scattered, or said that it won't.
 *
 * A piece whose turn is not near leaves the worker's ring for overflow memory once half a ring has
 * been written since, or its worker wants its place. The other half always has room for the next
 * piece and for what its worker leaves out before it (AE_LOCAL_RING_MIN), so a ring never stays
 * full for want of another rank: that is what keeps a scatter from blocking on others. A worker
 * that wants room for more at once says so. Without room in overflow memory the round is redone.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct ae_local_page *page_of(const struct ae_worker *worker)
{
        return (struct ae_local_page *)worker->page->base;
}

struct ae_sum *ae_job_sum(const struct ae_job *job, uint32_t local_group, uint32_t unit)
{
        return &job->sums[(size_t)local_group * job->layout->n_units + unit];
}

int ae_fold_new(struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;

        job->sums = ae_table_new(job->core, (size_t)job->n_local_groups * layout->n_units,
                                 sizeof(*job->sums));
        for (uint32_t g = 0; g < job->n_local_groups; g++) {
                for (uint32_t u = 0; u < layout->n_units; u++) {
                        struct ae_sum *sum = ae_job_sum(job, g, u);

                        sum->job = job;
                        sum->group = g;
                        sum->unit = u;
                        sum->n_uses = job->n_uses[u];
                        sum->n_lanes = job->groups[job->local_groups[g]].n_ranks * sum->n_uses;
                        sum->lane_micro = ae_table_new(job->core, sum->n_lanes,
                                                       sizeof(*sum->lane_micro));
                        sum->n_open = sum->n_lanes;
                        sum->n_cells = ae_u32(ae_div_up(layout->units[u].n_grad, AE_LOCAL_PIECE_N));
                        sum->cells = ae_table_new(job->core, sum->n_cells, sizeof(*sum->cells));
                        for (uint32_t c = 0; c < sum->n_cells; c++) {
                                sum->cells[c].sum = sum;
                                sum->cells[c].index = c;
                                ae_list_init(&sum->cells[c].pending);
                                ae_list_init(&sum->cells[c].folding);
                        }
                }
        }
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                struct ae_job_peer *peer = &job->peers[node];
                uint32_t slots = job->model->message->slots;

                peer->free_slots = ae_table_new(job->core, slots, sizeof(*peer->free_slots));
                for (peer->n_free = 0; peer->n_free < slots; peer->n_free++)
                        peer->free_slots[peer->n_free] = slots - 1 - peer->n_free;
        }
        return 0;
}

void ae_fold_free(struct ae_job *job)
{
        size_t n = job->sums ? (size_t)job->n_local_groups * job->layout->n_units : 0;

        for (size_t i = 0; i < n; i++) {
                for (uint32_t c = 0; c < job->sums[i].n_cells; c++) {
                        struct ae_list *entry;

                        while ((entry = ae_list_pop(&job->sums[i].cells[c].pending)))
                                ae_pool_give(&job->core->pieces, entry);
                }
                ae_table_free(job->core, job->sums[i].cells);
                ae_table_free(job->core, job->sums[i].lane_micro);
        }
        ae_table_free(job->core, job->sums);
        for (uint32_t node = 0; job->peers && node < job->core->options.n_nodes; node++) {
                struct ae_list *entry;

                while ((entry = ae_list_pop(&job->peers[node].sends)))
                        ae_pool_give(&job->core->sends, entry);
        }
}

/* The first lane that the turn (micro, lane) waits for; n_lanes when it has come. */
static uint32_t lane_before(const struct ae_sum *sum, uint32_t micro, uint32_t lane)
{
        for (uint32_t l = 0; l < sum->n_lanes; l++) {
                uint32_t settled = sum->lane_micro[l];

                if (l < lane ? settled <= micro : settled < micro)
                        return l;
        }
        return sum->n_lanes;
}

static bool is_turn(const struct ae_sum *sum, uint32_t micro, uint32_t lane)
{
        return lane_before(sum, micro, lane) == sum->n_lanes;
}

/* ---- the ring's bytes ------------------------------------------------------------------- */

/* Frees the ring up to the first piece that is still in it, and what was left out before that. */
static void free_ring(struct ae_worker *worker)
{
        struct ae_local_page *page = page_of(worker);
        uint64_t before = worker->grad_free;
        uint64_t wanted;

        while (worker->order_head != worker->order_tail) {
                struct ae_piece *piece = worker->order[worker->order_head % worker->order_cap];

                if (piece->in_ring) {
                        worker->grad_free = piece->ring_pos;
                        break;
                }
                worker->grad_free = piece->ring_pos + piece->len;
                worker->order_head++;
                piece->in_order = false;
                if (piece->done)
                        ae_pool_give(&worker->core->pieces, piece);
        }
        if (worker->grad_free == before)
                return;
        atomic_store_explicit(&page->grad_tail, worker->grad_free, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst); /* pairs with the worker's of grad_wanted */
        wanted = atomic_load_explicit(&page->grad_wanted, memory_order_relaxed);
        if (wanted && wanted <= worker->grad_free)
                ae_worker_wake(worker);
}

static void push_order(struct ae_worker *worker, struct ae_piece *piece)
{
        if (worker->order_tail - worker->order_head == worker->order_cap) {
                uint32_t cap = AE_MAX(2 * worker->order_cap, 64u);
                struct ae_piece **order = ae_table_new(worker->core, cap, sizeof(*order));

                for (uint32_t i = worker->order_head; i != worker->order_tail; i++)
                        order[i % cap] = worker->order[i % worker->order_cap];
                ae_table_free(worker->core, worker->order);
                worker->order = order;
                worker->order_cap = cap;
        }
        worker->order[worker->order_tail++ % worker->order_cap] = piece;
}

/* The piece is in no list and not needed any more: its memory may be used again. */
static void release_piece(struct ae_job *job, struct ae_piece *piece)
{
        if (piece->state == AE_PIECE_OVERFLOW)
                ae_extents_give(&job->overflow_free, (uint64_t)(piece->data - job->overflow->base),
                                piece->len);
        piece->in_ring = false;
        piece->done = true;
        if (piece->in_order)
                free_ring(piece->worker);
        else
                ae_pool_give(&job->core->pieces, piece);
}

static void advance(struct ae_cell *cell);

/* See PROTOCOL.md, section 8. */
static const bool legal_moves[AE_PIECE_N_STATES][AE_PIECE_N_STATES] = {
        [AE_PIECE_RING] = { [AE_PIECE_MOVING] = true, [AE_PIECE_FOLDING] = true },
        [AE_PIECE_MOVING] = { [AE_PIECE_OVERFLOW] = true },
};

static void piece_move(struct ae_piece *piece, enum ae_piece_state to)
{
        assert(legal_moves[piece->state][to]);
        piece->state = to;
}

static void on_moved(struct ae_task *task)
{
        struct ae_piece *piece = task->owner;
        struct ae_worker *worker = piece->worker;

        piece_move(piece, AE_PIECE_OVERFLOW);
        piece->data = task->copy.to;
        piece->in_ring = false;
        if (piece->in_order)
                free_ring(worker);
        if (task->job->state < AE_JOB_FAILED)
                advance(piece->cell);
}

static void give_up(struct ae_job *job, const struct ae_piece *piece)
{
        const struct ae_sum *sum = piece->cell->sum;
        const struct ae_sum_group *group = &job->groups[job->local_groups[sum->group]];
        uint32_t lane = lane_before(sum, piece->micro, piece->lane);

        assert(lane < sum->n_lanes); /* whose turn has come stays in the ring */
        if (job->redo)
                return;
        job->redo = true;
        job->bad = (struct ae_wire_bad){ .rank = AE_WIRE_NONE, .unit = piece->unit,
                                         .tensor = AE_WIRE_NONE };
        (void)snprintf(job->bad.text, sizeof(job->bad.text),
                       "overflow memory of node %u is full: unit '%s' of rank %u waits for rank %u",
                       job->core->options.node, job->layout->units[sum->unit].name,
                       group->ranks[piece->lane / sum->n_uses],
                       group->ranks[lane / sum->n_uses]);
}

static void drop(struct ae_piece *piece)
{
        struct ae_sum *sum = piece->cell->sum;

        ae_list_unlink(&piece->link);
        sum->n_pending--;
        release_piece(sum->job, piece);
}

static void move_out(struct ae_job *job, struct ae_piece *piece)
{
        struct ae_task *task;
        uint64_t off;

        if (!ae_extents_take(&job->overflow_free, piece->len, &off)) {
                give_up(job, piece);
                drop(piece); /* the round will be redone, so its sums no longer count */
                return;
        }
        piece_move(piece, AE_PIECE_MOVING);
        task = ae_job_task(job, AE_TASK_COPY, on_moved, piece);
        task->copy.to = job->overflow->base + off;
        task->copy.from = piece->data;
        task->copy.len = piece->len;
        ae_job_run(task);
}

/* Pieces that begin before @end and can't go now make room. */
static void relieve(struct ae_worker *worker, uint64_t end)
{
        struct ae_job *job = worker->job;

        for (uint32_t i = worker->order_head; i != worker->order_tail; i++) {
                struct ae_piece *piece = worker->order[i % worker->order_cap];

                if (piece->ring_pos >= end)
                        return;
                if (piece->state != AE_PIECE_RING || piece->done ||
                    is_turn(piece->cell->sum, piece->micro, piece->lane))
                        continue;
                move_out(job, piece);
                if ((int32_t)(worker->order_head - i) > 0)
                        i = worker->order_head - 1; /* the order was shortened */
        }
}

/* ---- folding ---------------------------------------------------------------------------- */

static uint64_t cell_first(const struct ae_cell *cell)
{
        return (uint64_t)cell->index * AE_LOCAL_PIECE_N;
}

static uint64_t cell_n(const struct ae_job *job, const struct ae_cell *cell)
{
        return AE_MIN((uint64_t)AE_LOCAL_PIECE_N,
                      job->layout->units[cell->sum->unit].n_grad - cell_first(cell));
}

static float *acc_of(const struct ae_job *job, uint32_t group, uint32_t unit, uint64_t first)
{
        float *acc = (float *)job->acc->base + (uint64_t)group * job->layout->n_grad;

        return acc + job->layout->units[unit].grad_first + first;
}

static void check_final(struct ae_sum *sum);

static void on_folded(struct ae_task *task)
{
        struct ae_cell *cell = task->owner;
        struct ae_job *job = task->job;
        struct ae_sum *sum = cell->sum;
        struct ae_list *entry;

        for (uint32_t i = 0; (entry = ae_list_pop(&cell->folding)); i++) {
                struct ae_piece *piece = ae_list_entry(entry, struct ae_piece, link);

                if (task->sum.sum.nonfinite & 1u << i)
                        ae_round_bad(job, piece);
                release_piece(job, piece);
                sum->n_pending--;
        }
        cell->busy = false;
        cell->started = true;
        if (job->state >= AE_JOB_FAILED)
                return;
        advance(cell);
        check_final(sum);
}

static bool same_range(const struct ae_piece *a, const struct ae_piece *b)
{
        return a->first == b->first && a->n == b->n;
}

/* Takes the run of pieces whose turn it is, all over the same elements, out of the list. */
static size_t take_run(struct ae_cell *cell, struct ae_task_sum *sum)
{
        const struct ae_piece *first = NULL;
        struct ae_piece *piece;
        size_t n = 0;

        ae_list_for_each_safe(piece, &cell->pending, link) {
                if (n == AE_OPS_SUM_MAX || piece->state == AE_PIECE_MOVING ||
                    !is_turn(cell->sum, piece->micro, piece->lane) ||
                    (first && !same_range(first, piece)))
                        break;
                first = first ? first : piece;
                ae_list_unlink(&piece->link);
                ae_list_push(&cell->folding, &piece->link);
                if (piece->state == AE_PIECE_RING)
                        piece_move(piece, AE_PIECE_FOLDING);
                sum->inputs[n++] = (struct ae_ops_input){ piece->data, piece->dtype };
        }
        return n;
}

static void advance(struct ae_cell *cell)
{
        struct ae_sum *sum = cell->sum;
        struct ae_job *job = sum->job;
        const struct ae_piece *first;
        struct ae_task *task;

        if (cell->busy || ae_list_empty(&cell->pending))
                return;
        task = ae_job_task(job, AE_TASK_SUM, on_folded, cell);
        task->sum.sum.n_inputs = take_run(cell, &task->sum);
        if (task->sum.sum.n_inputs == 0) {
                ae_pool_give(&job->core->tasks, task);
                return;
        }
        cell->busy = true;
        first = ae_list_entry(cell->folding.next, struct ae_piece, link);
        task->sum.sum.acc = acc_of(job, sum->group, sum->unit, first->first);
        task->sum.sum.n = first->n;
        task->sum.sum.check = true;
        task->sum.sum.keep = cell->started;
        if (!cell->started && first->n != cell_n(job, cell)) {
                task->sum.zero = acc_of(job, sum->group, sum->unit, cell_first(cell));
                task->sum.n_zero = cell_n(job, cell);
                task->sum.sum.keep = true;
        }
        ae_job_run(task);
}

static void advance_all(struct ae_sum *sum)
{
        for (uint32_t c = 0; c < sum->n_cells; c++)
                advance(&sum->cells[c]);
        check_final(sum);
}

/* A cell that nobody wrote although the unit has a sum: an alias alone was scattered. */
static void zero_rest(struct ae_sum *sum)
{
        struct ae_job *job = sum->job;

        for (uint32_t c = 0; c < sum->n_cells; c++) {
                struct ae_cell *cell = &sum->cells[c];

                if (!cell->started)
                        memset(acc_of(job, sum->group, sum->unit, cell_first(cell)), 0,
                               cell_n(job, cell) * sizeof(float));
                cell->started = true;
        }
}

static void queue_send(struct ae_job *job, uint32_t group, uint32_t slice)
{
        uint32_t node = job->layout->slices[slice].node;
        struct ae_send *send;

        if (node == job->core->options.node) {
                ae_owner_local_final(job, group, slice);
                return;
        }
        send = ae_pool_take(&job->core->sends);
        send->job = job;
        send->group = group;
        send->slice = slice;
        ae_list_push(&job->peers[node].sends, &send->link);
}

/* Sends what may go now: parts of this sum, or of higher groups that waited for it, see may_send().
 */
static void send_all(struct ae_job *job)
{
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++)
                ae_fold_send(job, node);
}

static void send_sum(struct ae_sum *sum)
{
        struct ae_job *job = sum->job;
        const struct ae_layout_unit *unit = &job->layout->units[sum->unit];

        sum->final = true;
        for (uint32_t s = unit->segment_first; s < unit->segment_first + unit->n_segments; s++) {
                const struct ae_layout_segment *segment = &job->layout->segments[s];

                for (uint32_t i = 0; segment->trainable && i < segment->n_slices; i++)
                        queue_send(job, sum->group, segment->slice_first + i);
        }
        send_all(job);
        ae_round_progress(job);
}

static void on_rounded(struct ae_task *task)
{
        if (task->job->state < AE_JOB_FAILED)
                send_sum(task->owner);
}

/* All lanes are done and every piece is folded: the unit's sum goes to its owners. Where sums
 * travel as bf16 each is rounded here, once, whoever owns it. */
static void check_final(struct ae_sum *sum)
{
        struct ae_job *job = sum->job;
        struct ae_task *task;

        if (sum->final || sum->queued || sum->n_open || sum->n_pending)
                return;
        if (!sum->any || job->redo) {
                sum->final = true;
                send_all(job);
                if (sum->any)
                        ae_owner_settle(job); /* after our END, nothing else tells our own parts */
                ae_round_progress(job);
                return;
        }
        sum->queued = true;
        zero_rest(sum);
        if (job->model->message->grad_wire != AE_DTYPE_BF16 || job->n_groups == 1) {
                send_sum(sum);
                return;
        }
        task = ae_job_task(job, AE_TASK_ROUND, on_rounded, sum);
        task->copy.to = acc_of(job, sum->group, sum->unit, 0);
        task->copy.len = job->layout->units[sum->unit].n_grad * sizeof(float);
        ae_job_run(task);
}

/* ---- ring entries ----------------------------------------------------------------------- */

static int check_lane(struct ae_worker *worker, const struct ae_local_sqe *sqe,
                      struct ae_sum **ret_sum, uint32_t *ret_lane)
{
        struct ae_job *job = worker->job;
        struct ae_sum *sum;
        uint32_t lane;

        if (sqe->unit >= job->layout->n_units || sqe->use >= job->n_uses[sqe->unit])
                return ae_fail(AE_EPROTO, "it scatters unit %u use %u, which is not there",
                               sqe->unit, sqe->use);
        sum = ae_job_sum(job, worker->group, sqe->unit);
        lane = worker->lane0 * sum->n_uses + sqe->use;
        if (worker->closed || sqe->micro != worker->micro || sum->lane_micro[lane] > sqe->micro)
                return ae_fail(AE_EPROTO,
                               "it scatters unit %u in micro-batch %u, which is over for it",
                               sqe->unit, sqe->micro);
        *ret_sum = sum;
        *ret_lane = lane;
        return 0;
}

static int check_piece(const struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        const struct ae_layout_unit *unit = &worker->job->layout->units[sqe->unit];
        uint64_t size = ae_dtype_size(sqe->dtype);

        if (sqe->dtype != AE_DTYPE_F32 && sqe->dtype != AE_DTYPE_BF16)
                return ae_fail(AE_EPROTO, "it scatters elements of type %u", sqe->dtype);
        if (sqe->n == 0 || !ae_range_ok(sqe->first, sqe->n, unit->n_grad) ||
            sqe->first / AE_LOCAL_PIECE_N != (sqe->first + sqe->n - 1) / AE_LOCAL_PIECE_N ||
            sqe->len != sqe->n * size)
                return ae_fail(AE_EPROTO, "its piece of unit %u is out of bounds", sqe->unit);
        if (sqe->pos < worker->grad_head || sqe->pos - worker->grad_head > AE_LOCAL_PIECE_LEN ||
            sqe->pos - worker->grad_free > worker->grad->len - sqe->len ||
            !ae_range_ok(sqe->pos % worker->grad->len, sqe->len, worker->grad->len) ||
            sqe->pos % size != 0)
                return ae_fail(AE_EPROTO, "its piece lies outside its ring");
        return 0;
}

static void insert_piece(struct ae_cell *cell, struct ae_piece *piece)
{
        struct ae_list *at = cell->pending.prev;

        while (at != &cell->pending) {
                const struct ae_piece *other = ae_list_entry(at, struct ae_piece, link);

                if (other->micro < piece->micro ||
                    (other->micro == piece->micro && other->lane <= piece->lane))
                        break;
                at = at->prev;
        }
        ae_list_push_front(at, &piece->link);
}

int ae_fold_piece(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_piece *piece;
        struct ae_sum *sum = NULL;
        uint32_t lane = 0;
        int r;

        r = check_lane(worker, sqe, &sum, &lane);
        if (r < 0)
                return r;
        r = check_piece(worker, sqe);
        if (r < 0)
                return r;
        piece = ae_pool_take(&worker->core->pieces);
        *piece = (struct ae_piece){
                .link = piece->link,
                .worker = worker,
                .cell = &sum->cells[sqe->first / AE_LOCAL_PIECE_N],
                .state = AE_PIECE_RING,
                .unit = sqe->unit,
                .micro = sqe->micro,
                .lane = lane,
                .dtype = sqe->dtype,
                .first = sqe->first,
                .n = sqe->n,
                .data = worker->grad->base + sqe->pos % worker->grad->len,
                .ring_pos = sqe->pos,
                .len = sqe->len,
                .in_ring = true,
                .in_order = true,
        };
        ae_list_init(&piece->link);
        worker->grad_head = sqe->pos + sqe->len;
        push_order(worker, piece);
        if (worker->order_tail - worker->order_head == 1)
                free_ring(worker);
        insert_piece(piece->cell, piece);
        sum->n_pending++;
        sum->any = true;
        advance(piece->cell);
        if (worker->grad_head > worker->grad->len / 2)
                relieve(worker, worker->grad_head - worker->grad->len / 2 + 1);
        return 0;
}

void ae_fold_make_room(struct ae_worker *worker)
{
        uint64_t wanted = atomic_load_explicit(&page_of(worker)->grad_wanted, memory_order_relaxed);

        if (wanted > worker->grad_free)
                relieve(worker, wanted);
}

static void settle_lane(struct ae_sum *sum, uint32_t lane, uint32_t micro)
{
        if (sum->lane_micro[lane] == AE_LANE_DONE || sum->lane_micro[lane] >= micro)
                return;
        sum->lane_micro[lane] = micro;
        if (micro == AE_LANE_DONE)
                sum->n_open--;
        advance_all(sum);
}

int ae_fold_scattered(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_sum *sum = NULL;
        uint32_t lane = 0;
        int r;

        r = check_lane(worker, sqe, &sum, &lane);
        if (r < 0)
                return r;
        sum->any = true;
        settle_lane(sum, lane, sqe->flags & AE_SQ_LAST ? AE_LANE_DONE : sqe->micro + 1);
        return 0;
}

static void settle_rank(struct ae_worker *worker, uint32_t micro)
{
        struct ae_job *job = worker->job;

        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                struct ae_sum *sum = ae_job_sum(job, worker->group, u);

                for (uint32_t use = 0; use < sum->n_uses; use++)
                        settle_lane(sum, worker->lane0 * sum->n_uses + use, micro);
        }
}

int ae_fold_micro_end(struct ae_worker *worker, uint32_t micro)
{
        if (worker->closed || micro != worker->micro || micro >= AE_LANE_DONE - 1)
                return ae_fail(AE_EPROTO, "it ends micro-batch %u in micro-batch %u", micro,
                               worker->micro);
        worker->micro++;
        settle_rank(worker, worker->micro);
        return 0;
}

void ae_fold_close(struct ae_worker *worker)
{
        settle_rank(worker, AE_LANE_DONE);
}

bool ae_fold_started(const struct ae_job *job)
{
        size_t n = (size_t)job->n_local_groups * job->layout->n_units;

        for (size_t i = 0; i < n; i++) {
                if (job->sums[i].any)
                        return true;
        }
        return false;
}

bool ae_fold_ended(const struct ae_job *job)
{
        size_t n = (size_t)job->n_local_groups * job->layout->n_units;

        for (size_t i = 0; i < n; i++) {
                if (!job->sums[i].final)
                        return false;
        }
        return true;
}

void ae_fold_reset(struct ae_job *job)
{
        size_t n = (size_t)job->n_local_groups * job->layout->n_units;

        for (size_t i = 0; i < n; i++) {
                struct ae_sum *sum = &job->sums[i];

                assert(sum->n_pending == 0);
                memset(sum->lane_micro, 0, sum->n_lanes * sizeof(*sum->lane_micro));
                sum->n_open = sum->n_lanes;
                sum->any = sum->final = sum->queued = false;
                for (uint32_t c = 0; c < sum->n_cells; c++)
                        sum->cells[c].started = false;
        }
}

/* The job has failed or the rank has left between rounds. Its ring stays until the job is freed. */
void ae_fold_worker_gone(struct ae_worker *worker)
{
        for (uint32_t i = worker->order_head; i != worker->order_tail; i++) {
                struct ae_piece *piece = worker->order[i % worker->order_cap];

                piece->in_order = false;
                if (piece->done)
                        ae_pool_give(&worker->core->pieces, piece);
        }
        worker->order_head = worker->order_tail;
}

/* ---- parts to owners -------------------------------------------------------------------- */

static void put_part(struct ae_send *send, uint32_t part, uint32_t slot, struct ae_region *src,
                     uint64_t src_off, uint64_t len)
{
        struct ae_job *job = send->job;
        uint32_t node = job->layout->slices[send->slice].node;

        atomic_fetch_add_explicit(&job->page->scatter_sent_len, len, memory_order_relaxed);
        ae_job_put(job, node, AE_COOKIE_PART, NULL, &job->peers[node].inbox, slot * job->slot_len,
                   src, src_off, len,
                   ae_note_part(job->id, job->round, send->group, send->slice, part));
}

static void on_narrowed(struct ae_task *task)
{
        struct ae_send *send = task->owner;
        struct ae_job *job = task->job;
        uint64_t off = (uint64_t)((char *)task->copy.to - job->out->base);

        if (job->state < AE_JOB_FAILED)
                put_part(send, (uint32_t)task->arg[0], (uint32_t)task->arg[1], job->out, off,
                         task->copy.len / 2);
        ae_pool_give(&job->core->sends, send);
}

static void send_part(struct ae_send *send, uint32_t part, uint32_t slot)
{
        struct ae_job *job = send->job;
        const struct ae_layout_slice *slice = &job->layout->slices[send->slice];
        const struct ae_layout_segment *segment = &job->layout->segments[slice->segment];
        uint64_t first = (uint64_t)part * job->part_n;
        uint64_t n = AE_MIN((uint64_t)job->part_n, slice->n - first);
        const float *acc = acc_of(job, send->group, segment->unit,
                                  segment->unit_grad_first + slice->first + first);
        struct ae_send *copy;
        struct ae_task *task;

        if (!job->out) {
                put_part(send, part, slot, job->acc, (uint64_t)((const char *)acc - job->acc->base),
                         n * sizeof(float));
                return;
        }
        copy = ae_pool_take(&job->core->sends);
        copy->job = job;
        copy->group = send->group;
        copy->slice = send->slice;
        task = ae_job_task(job, AE_TASK_NARROW, on_narrowed, copy);
        task->arg[0] = part;
        task->arg[1] = slot;
        task->copy.to =
                job->out->base + ae_memory_inbox_off(job, slice->node) + slot * job->slot_len;
        task->copy.from = acc;
        task->copy.len = n * sizeof(float);
        ae_job_run(task);
}

/* Whether every lower group of this node has all its sums of the round on their way to @node. */
static bool is_lowest(const struct ae_job *job, uint32_t node, uint32_t group)
{
        const struct ae_send *send;

        for (uint32_t i = 0; i < group * job->layout->n_units; i++) {
                if (!job->sums[i].final)
                        return false;
        }
        ae_list_for_each(send, &job->peers[node].sends, link) {
                if (send->group < group)
                        return false;
        }
        return true;
}

/*
 * Groups of one node share its slots, and a part waits in its slot for those of all lower groups,
 * also of other nodes. So the last slot is kept for the lowest group that is not through: of all
 * nodes together, the lowest group can always send and is always folded.
 */
static bool may_send(const struct ae_job *job, uint32_t node, const struct ae_send *send)
{
        uint32_t n_free = job->peers[node].n_free;

        return n_free > 1 || (n_free == 1 && is_lowest(job, node, send->group));
}

void ae_fold_send(struct ae_job *job, uint32_t node)
{
        struct ae_job_peer *peer = &job->peers[node];
        struct ae_send *send;
        bool ended = true;

        while (ended && peer->n_free && !ae_list_empty(&peer->sends)) {
                ended = false;
                ae_list_for_each_safe(send, &peer->sends, link) {
                        uint32_t n_parts = ae_u32(ae_div_up(job->layout->slices[send->slice].n,
                                                            job->part_n));

                        while (send->part < n_parts && may_send(job, node, send))
                                send_part(send, send->part++, peer->free_slots[--peer->n_free]);
                        if (send->part < n_parts && peer->n_free == 0)
                                return;
                        if (send->part < n_parts)
                                continue;
                        ended |= job->n_local_groups > 1; /* a higher group may be the lowest now */
                        ae_list_unlink(&send->link);
                        ae_pool_give(&job->core->sends, send);
                }
        }
}

void ae_fold_put_slot(struct ae_job *job, uint32_t node, uint32_t slot)
{
        struct ae_job_peer *peer = &job->peers[node];

        assert(peer->n_free < job->model->message->slots);
        peer->free_slots[peer->n_free++] = slot;
}
