/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scatter at the owner: sums of groups are folded into the owner's sum in the order of the groups,
 * part by part, the longest prefix that is there in one pass. A group that scattered nothing is
 * skipped once its node has said so. The norm is taken in the pass that folds the last group in;
 * parts begin between its blocks, whose sums are added exactly, so that neither the cut into slices
 * and parts nor the order in which they are complete can be seen in it.
 *
 * Slots cannot block each other: the first group's parts are always foldable, so its node's slots
 * come free, then the second's, and so on; what waits, waits in its sender's own sum.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static_assert(AE_LAYOUT_CUT % AE_OPS_NORM_BLOCK == 0, "slices begin between blocks of the norm");

static void new_parts(struct ae_job *job, struct ae_owned *owned, uint64_t n)
{
        assert(job->part_n % AE_OPS_NORM_BLOCK == 0);
        owned->n_parts = ae_u32(ae_div_up(n, job->part_n));
        owned->parts = ae_table_new(job->core, owned->n_parts, sizeof(*owned->parts));
}

/* The owned slices stand in the order of the layout, so those of a unit lie together. */
static void index_units(struct ae_job *job)
{
        uint32_t n = 0;

        job->owned_of_unit = ae_table_new(job->core, job->layout->n_units + 1,
                                          sizeof(*job->owned_of_unit));
        for (uint32_t unit = 0; unit < job->layout->n_units; unit++) {
                job->owned_of_unit[unit] = n;
                while (n < job->n_owned && job->owned[n].unit == unit)
                        n++;
        }
        job->owned_of_unit[job->layout->n_units] = n;
        assert(n == job->n_owned);
}

int ae_owner_new(struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;
        uint32_t node = job->core->options.node;
        uint32_t slots = job->model->message->slots;

        if (layout->n_slices >= AE_WIRE_MAX_SLICES)
                return ae_fail(AE_EOVERFLOW, "%u slices, the limit is %u", layout->n_slices,
                               AE_WIRE_MAX_SLICES);
        job->owned_of_slice = ae_table_new(job->core, layout->n_slices,
                                           sizeof(*job->owned_of_slice));
        for (uint32_t s = 0; s < layout->n_slices; s++)
                job->n_owned += layout->slices[s].node == node;
        job->owned = ae_table_new(job->core, job->n_owned, sizeof(*job->owned));
        for (uint32_t s = 0, i = 0; s < layout->n_slices; s++) {
                const struct ae_layout_slice *slice = &layout->slices[s];
                const struct ae_layout_segment *segment = &layout->segments[slice->segment];
                struct ae_owned *owned;

                job->owned_of_slice[s] = AE_WIRE_NONE;
                if (slice->node != node)
                        continue;
                job->owned_of_slice[s] = i;
                owned = &job->owned[i++];
                owned->job = job;
                owned->slice = s;
                owned->unit = segment->unit;
                owned->trainable = segment->trainable;
                ae_list_init(&owned->waiting);
                if (segment->trainable)
                        new_parts(job, owned, slice->n);
                if (owned->n_parts > AE_WIRE_MAX_PARTS)
                        return ae_fail(
                                AE_EOVERFLOW,
                                "unit '%s' has slices of %u parts, the limit is %u: raise slot_len",
                                layout->units[segment->unit].name, owned->n_parts,
                                AE_WIRE_MAX_PARTS);
        }
        index_units(job);
        for (uint32_t i = 0; i < job->core->options.n_nodes; i++) {
                struct ae_job_peer *peer = &job->peers[i];

                peer->credit = ae_table_new(job->core, slots, sizeof(*peer->credit));
                peer->arrived = ae_table_new(job->core, slots, sizeof(*peer->arrived));
        }
        return 0;
}

void ae_owner_free(struct ae_job *job)
{
        for (uint32_t i = 0; i < job->n_owned && job->owned; i++) {
                struct ae_owned *owned = &job->owned[i];
                struct ae_list *entry;

                while ((entry = ae_list_pop(&owned->waiting)))
                        ae_pool_give(&job->core->serves, entry);
                ae_table_free(job->core, owned->parts);
        }
        ae_table_free(job->core, job->owned);
        ae_table_free(job->core, job->owned_of_slice);
        ae_table_free(job->core, job->owned_of_unit);
}

/* ---- credits ---------------------------------------------------------------------------- */

static void send_credit(struct ae_job *job, uint32_t node)
{
        struct ae_job_peer *peer = &job->peers[node];
        uint64_t
                buffer[(sizeof(struct ae_wire_credit) + AE_MODEL_SLOTS_MAX * sizeof(uint32_t)) / 8 +
                       1];
        struct ae_wire_credit *credit = (struct ae_wire_credit *)buffer;
        size_t len = peer->n_credit * sizeof(*peer->credit);

        credit->head = ae_job_head(job, AE_WIRE_CREDIT);
        credit->n_slots = peer->n_credit;
        memcpy(credit + 1, peer->credit, len);
        ae_job_msg(job, node, credit, sizeof(*credit) + len);
        peer->n_credit = 0;
}

/* Credits go back when half of the slots are empty again, and with the vote. */
void ae_owner_flush(struct ae_job *job, uint32_t node)
{
        const struct ae_job_peer *peer = &job->peers[node];
        uint32_t slots = job->model->message->slots;

        /* all of its slots are here: it cannot send anything until it hears of the empty ones */
        if (peer->n_credit >= AE_MAX(slots / 2, 1u) ||
            (peer->n_credit && (job->round_state >= AE_ROUND_VOTED ||
                                peer->n_credit + peer->n_held == slots)))
                send_credit(job, node);
}

void ae_owner_voted(struct ae_job *job)
{
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                if (job->peers[node].n_credit)
                        ae_job_unsent(job, node);
        }
}

static void give_slot(struct ae_job *job, uint32_t node, struct ae_arrival *arrival)
{
        struct ae_job_peer *peer = &job->peers[node];

        assert(peer->n_credit < job->model->message->slots);
        peer->credit[peer->n_credit++] = (uint32_t)(arrival - peer->arrived);
        peer->n_held--;
        arrival->part = NULL;
        ae_job_unsent(job, node);
}

/* ---- folding ---------------------------------------------------------------------------- */

static void advance(struct ae_owned *owned, uint32_t part);

static const struct ae_layout_slice *slice_of(const struct ae_owned *owned)
{
        return &owned->job->layout->slices[owned->slice];
}

static uint64_t part_n(const struct ae_owned *owned, uint32_t part)
{
        uint64_t first = (uint64_t)part * owned->job->part_n;

        return AE_MIN((uint64_t)owned->job->part_n, slice_of(owned)->n - first);
}

static float *total_of(const struct ae_owned *owned, uint32_t part)
{
        return (float *)owned->job->total->base + slice_of(owned)->shard_first +
               (uint64_t)part * owned->job->part_n;
}

static const void *local_input(const struct ae_owned *owned, uint32_t local_group, uint32_t part)
{
        const struct ae_job *job = owned->job;
        const struct ae_layout_segment *segment = &job->layout->segments[slice_of(owned)->segment];

        return (const float *)job->acc->base + (uint64_t)local_group * job->layout->n_grad +
               job->layout->units[owned->unit].grad_first + segment->unit_grad_first +
               slice_of(owned)->first + (uint64_t)part * job->part_n;
}

/* What a group has sent of a part: it lies in one of the few slots of the group's node. */
static struct ae_arrival *arrival_of(const struct ae_job *job, const struct ae_part *part,
                                     uint32_t group)
{
        const struct ae_job_peer *peer = &job->peers[job->groups[group].node];

        for (uint32_t i = 0; peer->n_held && i < job->model->message->slots; i++) {
                struct ae_arrival *arrival = &peer->arrived[i];

                if (arrival->part == part && arrival->group == group)
                        return arrival;
        }
        return NULL;
}

static void complete(struct ae_owned *owned, struct ae_part *part)
{
        assert(!part->complete);
        part->complete = true;
        owned->n_incomplete--;
        if (--owned->job->n_incomplete == 0)
                ae_round_progress(owned->job);
}

static void on_folded(struct ae_task *task)
{
        struct ae_owned *owned = task->owner;
        struct ae_job *job = task->job;
        struct ae_part *part = &owned->parts[task->arg[0]];

        part->busy = false;
        part->started = true;
        for (uint32_t group = (uint32_t)task->arg[2]; group < part->next; group++) {
                struct ae_arrival *arrival = arrival_of(job, part, group);

                if (arrival)
                        give_slot(job, job->groups[group].node, arrival);
        }
        if (job->state >= AE_JOB_FAILED)
                return;
        if (task->sum.sum.norm) {
                ae_longacc_join(&job->norm2, &task->sum.sum.norm2);
                job->infinite |= task->sum.sum.infinite;
                complete(owned, part);
                return;
        }
        advance(owned, (uint32_t)task->arg[0]);
}

/* One input for the next group if it is there: 1 taken, 0 it has nothing, -1 not known or not here.
 */
static int next_input(struct ae_owned *owned, uint32_t p, uint32_t group,
                      struct ae_ops_input *ret_input)
{
        struct ae_job *job = owned->job;
        const struct ae_sum_group *g = &job->groups[group];
        int scattered = ae_round_scattered(job, group, owned->unit);
        const struct ae_arrival *arrival;

        if (scattered == 0)
                return 0;
        if (g->node == job->core->options.node) {
                if (scattered < 0)
                        return -1;
                *ret_input = (struct ae_ops_input){ local_input(owned, g->local, p), AE_DTYPE_F32 };
                return 1;
        }
        arrival = arrival_of(job, &owned->parts[p], group);
        if (!arrival)
                return -1;
        ret_input->data = job->inbox->base + ae_memory_inbox_off(job, g->node) +
                          (uint64_t)(arrival - job->peers[g->node].arrived) * job->slot_len;
        ret_input->dtype = job->model->message->grad_wire;
        return 1;
}

/* Takes what is there, in the order of the groups, into a fold. */
static void advance(struct ae_owned *owned, uint32_t p)
{
        struct ae_job *job = owned->job;
        struct ae_part *part = &owned->parts[p];
        struct ae_task *task;
        uint32_t group = part->next;
        size_t n = 0;

        if (part->busy || part->complete || owned->n_tasks)
                return; /* n_tasks: the last step's apply still reads these sums */
        task = ae_job_task(job, AE_TASK_SUM, on_folded, owned);
        task->arg[0] = p;
        task->arg[2] = group;
        while (group < job->n_groups && n < AE_OPS_SUM_MAX) {
                int got = next_input(owned, p, group, &task->sum.inputs[n]);

                if (got < 0)
                        break;
                n += (size_t)got;
                group++;
        }
        part->next = (uint16_t)group;
        if (n == 0 && group < job->n_groups) {
                ae_pool_give(&job->core->tasks, task);
                return;
        }
        /* Where nobody scattered the unit, a sum of nothing sets last round's gradient to zero. */
        part->busy = true;
        task->sum.sum.acc = total_of(owned, p);
        task->sum.sum.n = part_n(owned, p);
        task->sum.sum.n_inputs = n;
        task->sum.sum.keep = part->started;
        task->sum.sum.norm = group == job->n_groups;
        ae_job_run(task);
}

int ae_owner_arrived(struct ae_job *job, uint32_t node, uint64_t note, uint64_t off, uint64_t len)
{
        uint32_t slice = (note >> 20) & (AE_WIRE_MAX_SLICES - 1);
        uint32_t p = note & (AE_WIRE_MAX_PARTS - 1);
        uint32_t local = (note >> 42) & 0xf;
        uint32_t slots = job->model->message->slots;
        struct ae_job_peer *peer = &job->peers[node];
        uint64_t slot = (off - ae_memory_inbox_off(job, node)) / job->slot_len;
        struct ae_owned *owned;
        uint32_t group;

        if (ae_note_stamp(note) == ((job->round + 1) & 0xff) && ae_round_next_may_come(job))
                return ae_early_note(&job->early, node, note, off, len); /* heard Commit already */
        if (ae_note_stamp(note) != (job->round & 0xff))
                return ae_fail(AE_EPROTO, "a part of round %u came in round %llu",
                               ae_note_stamp(note), (unsigned long long)job->round);
        if (slice >= job->layout->n_slices || job->owned_of_slice[slice] == AE_WIRE_NONE)
                return ae_fail(AE_EPROTO, "a part of slice %u came, which is not ours", slice);
        owned = &job->owned[job->owned_of_slice[slice]];
        group = local < peer->n_groups ? peer->groups[local] : job->n_groups;
        if (p >= owned->n_parts || group == job->n_groups || off % job->slot_len != 0 ||
            slot >= slots || peer->n_held + peer->n_credit >= slots || peer->arrived[slot].part ||
            len != part_n(owned, p) * ae_dtype_size(job->model->message->grad_wire) ||
            group < owned->parts[p].next || arrival_of(job, &owned->parts[p], group))
                return ae_fail(AE_EPROTO,
                               "part %u of slice %u from group %u in slot %" PRIu64
                               " does not fit", p, slice, local, slot);
        peer->arrived[slot] = (struct ae_arrival){ &owned->parts[p], group };
        peer->n_held++;
        ae_job_unsent(job, node);
        advance(owned, p);
        return 0;
}

void ae_owner_local_final(struct ae_job *job, uint32_t group, uint32_t slice)
{
        (void)group; /* next_input() asks ae_round_scattered() for it */
        ae_owner_pump(&job->owned[job->owned_of_slice[slice]]);
}

void ae_owner_pump(struct ae_owned *owned)
{
        for (uint32_t p = 0; p < owned->n_parts; p++)
                advance(owned, p);
}

void ae_owner_settle(struct ae_job *job)
{
        for (uint32_t i = 0; i < job->n_owned; i++)
                ae_owner_pump(&job->owned[i]);
}

void ae_owner_reset(struct ae_job *job)
{
        job->n_incomplete = 0;
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++)
                assert(job->peers[node].n_held == 0);
        job->norm2 = (struct ae_longacc){ { 0 } };
        job->infinite = false;
        for (uint32_t i = 0; i < job->n_owned; i++) {
                struct ae_owned *owned = &job->owned[i];

                owned->n_incomplete = owned->n_parts;
                job->n_incomplete += owned->n_parts;
                for (uint32_t p = 0; p < owned->n_parts; p++) {
                        struct ae_part *part = &owned->parts[p];

                        assert(!part->busy);
                        part->next = 0;
                        part->started = part->complete = false;
                }
        }
}
