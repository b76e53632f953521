/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A job's memory on this node: how much of what, against which budget, and what peers may put
 * into. Sizes follow from the layout alone, so that every node and a planner reckon alike.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define SLOT_LEN_MIN (64 * AE_KIB)
#define SLOT_LEN_MAX (4 * AE_MIB)
#define XHEAD sizeof(struct ae_local_xhead)

/* Bytes, by what they are for. */
struct plan {
        uint64_t params, cache, shard, acc, total, inbox, overflow, out;
        uint64_t sum;
        uint64_t initial; /* while the initial values are staged; not in the sum */
};

static uint32_t grad_wire(const struct ae_job *job)
{
        return job->model->message->grad_wire;
}

static uint64_t image_len(const struct ae_layout *layout)
{
        uint64_t len = 0;

        for (uint32_t u = 0; u < layout->n_units; u++)
                len += ae_align_up(AE_MAX(layout->units[u].len, UINT64_C(1)), AE_EXTENT_ALIGN);
        return len;
}

/* The sum of the two largest units, and the largest. */
static uint64_t two_largest(const struct ae_layout *layout, uint64_t *ret_largest)
{
        uint64_t first = 0;
        uint64_t second = 0;

        for (uint32_t u = 0; u < layout->n_units; u++) {
                uint64_t len = ae_align_up(layout->units[u].len, AE_EXTENT_ALIGN);

                if (len > first) {
                        second = first;
                        first = len;
                } else if (len > second) {
                        second = len;
                }
        }
        *ret_largest = first;
        return first + second;
}

uint64_t ae_memory_allowance(const struct ae_job *job)
{
        uint64_t largest;

        return two_largest(job->layout, &largest);
}

static int plan_cache(struct ae_job *job, struct plan *plan)
{
        uint64_t largest;
        uint64_t allowance = two_largest(job->layout, &largest);
        uint64_t whole = image_len(job->layout);
        uint64_t need = largest;

        for (uint32_t i = 0; i < job->n_local; i++) {
                if (!job->locals[i])
                        continue;
                if (!job->locals[i]->hold_len)
                        job->locals[i]->hold_len = allowance;
                /* nobody holds more than there is, so that no sum wraps */
                need += AE_MIN(job->locals[i]->hold_len, whole);
                need = AE_MIN(need, whole);
        }
        need = AE_MIN(need, whole);
        plan->cache = job->model->message->cache_len;
        if (plan->cache == 0)
                plan->cache = whole + 2 * largest; /* room for readers of an old version, ranges */
        plan->cache = ae_align_up(plan->cache, 4096);
        if (plan->cache < need)
                return ae_fail(
                        AE_EBUDGET,
                        "cache_len %" PRIu64
                        " on node %u is less than its workers may hold plus the largest unit:"
                        " %" PRIu64 " bytes",
                        plan->cache, job->core->options.node, need);
        return 0;
}

static void plan_slots(struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;
        uint64_t wire = ae_dtype_size(grad_wire(job));
        uint64_t len = job->model->message->slot_len;
        uint64_t largest = 0;

        for (uint32_t i = 0; i < layout->n_slices; i++) {
                if (layout->segments[layout->slices[i].segment].trainable)
                        largest = AE_MAX(largest, layout->slices[i].n * wire);
        }
        if (len == 0)
                len = AE_MIN(largest, SLOT_LEN_MAX);
        job->slot_len = ae_align_up(AE_MAX(len, SLOT_LEN_MIN), AE_OPS_NORM_BLOCK * wire);
        job->part_n = ae_u32(job->slot_len / wire);
}

static int plan_overflow(const struct ae_job *job, struct plan *plan)
{
        uint64_t len = job->model->message->overflow_len;

        if (len == 0 && (ae_mul_overflows(job->layout->n_grad, job->n_local * sizeof(float),
                                          &len) || len > AE_MODEL_MEMORY_MAX))
                return ae_fail(AE_EINVAL,
                               "overflow memory for %" PRIu64 " gradients of each of %u ranks on"
                               " node %u is more than 2^56 bytes: set overflow_len",
                               job->layout->n_grad, job->n_local, job->core->options.node);
        plan->overflow = ae_align_up(len, 4096);
        return 0;
}

/* What a worker chose was bounded when its model was read, the rest follows from the layout, which
 * has at most AE_LAYOUT_MAX_LEN bytes: a sum that wraps would be a fault of ours. */
static void add_up(struct plan *plan)
{
        const uint64_t parts[] = { plan->params, plan->cache, plan->shard, plan->acc,
                                   plan->total, plan->inbox, plan->overflow, plan->out };

        for (size_t i = 0; i < AE_ARRAY_LEN(parts); i++) {
                bool wraps = ae_add_overflows(plan->sum, parts[i], &plan->sum);

                assert(!wraps);
        }
}

/* What the put of the initial values takes: a region at rank 0's node, its part at each owner. */
static uint64_t plan_initial(const struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;
        uint32_t self = job->core->options.node;
        uint64_t len = 0;

        for (uint32_t s = 0; s < layout->n_slices; s++) {
                const struct ae_layout_segment *segment =
                        &layout->segments[layout->slices[s].segment];
                uint64_t size = segment->trainable ? sizeof(float) : ae_dtype_size(segment->dtype);
                uint32_t n = (layout->slices[s].node == self) + (job->rank_node[0] == self);

                len += n * layout->slices[s].n * size;
        }
        return ae_align_up(len, 4096) + 4096;
}

static int make_plan(struct ae_job *job, struct plan *plan)
{
        const struct ae_layout *layout = job->layout;
        uint32_t node = job->core->options.node;
        uint64_t n_peers = job->core->options.n_nodes - 1;
        uint64_t slots = job->model->message->slots;
        int r;

        *plan = (struct plan){ 0 };
        r = plan_cache(job, plan);
        if (r < 0)
                return r;
        plan_slots(job);
        /* a unit's newest and the version before, and what each rank may hold besides */
        job->n_slots = AE_MIN(2 * layout->n_units + 64 + job->n_local * AE_LOCAL_RANGES_MAX,
                              AE_LOCAL_SLOTS_MAX);
        plan->params = ae_align_up(sizeof(struct ae_local_params), 64);
        plan->params += (uint64_t)layout->n_units * 8;
        plan->params = ae_align_up(plan->params, 64) + job->n_slots * sizeof(struct ae_local_slot);
        plan->params = ae_align_up(plan->params, 4096);
        plan->shard = ae_shard_len(layout->node_state_n[node], layout->node_weight_len[node],
                                   job->core->options.n_undo);
        plan->acc = job->n_local_groups * layout->n_grad * sizeof(float);
        plan->total = layout->node_state_n[node] * sizeof(float);
        plan->inbox = n_peers * slots * job->slot_len;
        plan->out = grad_wire(job) == AE_DTYPE_BF16 ? plan->inbox : 0;
        r = plan_overflow(job, plan);
        if (r < 0)
                return r;
        add_up(plan);
        plan->initial = plan_initial(job);
        return 0;
}

/* What is left for the job: of the daemon's memory, and of its own budget. */
static uint64_t budget_left(const struct ae_job *job, uint64_t *ret_budget)
{
        const struct ae_core *core = job->core;
        uint64_t all = core->options.memory_len;
        uint64_t others = AE_MIN(core->memory_len - job->memory_len, all);
        uint64_t budget = all - others;

        if (job->model->message->budget_len)
                budget = AE_MIN(budget, job->model->message->budget_len);
        *ret_budget = budget;
        return budget - AE_MIN(job->memory_len, budget);
}

static int check_budget(struct ae_job *job, const struct plan *plan)
{
        const struct ae_core *core = job->core;
        const uint64_t mib = AE_MIB;
        uint64_t budget;

        (void)budget_left(job, &budget);
        ae_core_log(job->core, 2,
                    "memory of job '%s' on node %u: %" PRIu64 " MiB = cache %" PRIu64
                    " + shard %" PRIu64 " + node sums %" PRIu64 " + owner sums %" PRIu64
                    " + inbox %" PRIu64 " + overflow %" PRIu64 " + out %" PRIu64 "; budget %" PRIu64
                    " MiB",
                    job->name, core->options.node, plan->sum / mib, plan->cache / mib,
                    plan->shard / mib, plan->acc / mib, plan->total / mib, plan->inbox / mib,
                    plan->overflow / mib, plan->out / mib, budget / mib);
        if (plan->sum <= budget && plan->initial <= budget - plan->sum)
                return 0;
        return ae_fail(AE_EBUDGET,
                       "job '%s' needs %" PRIu64 " bytes on node %u (cache %" PRIu64
                       ", shard %" PRIu64 ", sums %" PRIu64 ", inbox %" PRIu64 ", overflow %" PRIu64
                       ") and %" PRIu64 " more for its initial values, its budget is %" PRIu64
                       ": raise %s, or take more nodes",
                       job->name, plan->sum, core->options.node, plan->cache, plan->shard,
                       plan->acc + plan->total, plan->inbox + plan->out, plan->overflow,
                       plan->initial, budget,
                       budget == job->model->message->budget_len ? "budget_len"
                                                                 : "the daemon's memory");
}

static int make_region(struct ae_job *job, const char *name, uint64_t len, unsigned flags,
                       struct ae_region **ret_region)
{
        const struct ae_core_options *options = &job->core->options;
        struct ae_region_spec spec = { .name = name,
                                       .len = AE_MAX(ae_align_up(len, 4096), UINT64_C(4096)),
                                       .shared = flags & 1,
                                       .net = flags & 2,
                                       .data = flags & 4,
                                       .read_only = flags & 8 };

        return options->ops->region_new(options->user, &spec, ret_region);
}

static void lay_params(struct ae_job *job, const struct plan *plan)
{
        struct ae_local_params *page = (struct ae_local_params *)job->params->base;

        page->magic = AE_LOCAL_MAGIC;
        page->version = AE_WIRE_VERSION;
        page->n_units = job->layout->n_units;
        page->units_off = ae_align_up(sizeof(*page), 64);
        page->slots_off = ae_align_up(page->units_off + (uint64_t)page->n_units * 8, 64);
        page->n_slots = job->n_slots;
        page->world = job->world;
        page->cache_off = plan->params;
        page->cache_len = plan->cache;
        atomic_store(&page->epoch, job->epoch);
        job->page = page;
        job->entries = (_Atomic uint64_t *)(job->params->base + page->units_off);
        job->slot_table = (struct ae_local_slot *)(job->params->base + page->slots_off);
        for (uint32_t u = 0; u < page->n_units; u++)
                atomic_store(&job->entries[u], ae_local_entry(0, AE_LOCAL_SLOT_NONE));
        ae_extents_init(&job->cache_free, plan->cache);
}

static int make_regions(struct ae_job *job, const struct plan *plan)
{
        uint32_t node = job->core->options.node;
        int r;

        r = make_region(job, "autoep-params", plan->params + plan->cache, 1 | 2 | 8, &job->params);
        if (r < 0)
                return r;
        lay_params(job, plan);
        r = make_region(job, "autoep-shard", plan->shard, 1 | 2, &job->shard_region);
        if (r < 0)
                return r;
        ae_shard_format(job->shard_region->base, job->layout->node_state_n[node],
                        job->layout->node_weight_len[node], job->core->options.n_undo, &job->shard);
        r = make_region(job, "autoep-acc", plan->acc, 1 | 2 | 4, &job->acc);
        if (r < 0)
                return r;
        r = make_region(job, "autoep-total", plan->total, 1 | 2 | 4, &job->total);
        if (r < 0)
                return r;
        r = make_region(job, "autoep-inbox", plan->inbox, 1 | 2 | 4, &job->inbox);
        if (r < 0)
                return r;
        r = make_region(job, "autoep-overflow", plan->overflow, 1 | 4, &job->overflow);
        if (r < 0)
                return r;
        ae_extents_init(&job->overflow_free, plan->overflow);
        return plan->out ? make_region(job, "autoep-out", plan->out, 1 | 2 | 4, &job->out) : 0;
}

int ae_memory_new(struct ae_job *job)
{
        struct plan plan;
        int r;

        r = make_plan(job, &plan);
        if (r < 0)
                return r;
        r = check_budget(job, &plan);
        if (r < 0)
                return r;
        job->memory_len += plan.sum;
        job->core->memory_len += plan.sum;
        return make_regions(job, &plan);
}

int ae_memory_transfer(struct ae_job *job, const char *name, uint64_t len,
                       struct ae_region **ret_region)
{
        const struct ae_core_options *options = &job->core->options;
        struct ae_region_spec spec = { .name = name, .shared = true, .net = true };
        uint64_t budget;
        uint64_t left = budget_left(job, &budget);
        int r;

        spec.len = ae_align_up(AE_MIN(AE_MAX(len, UINT64_C(1)), AE_NET_PUT_MAX), 4096);
        if (len > left || spec.len > left || len > AE_NET_PUT_MAX)
                return ae_fail(AE_EBUDGET,
                               "a transfer of %" PRIu64 " bytes of state does not fit on node %u: "
                               "job '%s' has %" PRIu64 " of its budget of %" PRIu64
                               " bytes in use; transfer less at a time",
                               len, options->node, job->name, job->memory_len, budget);
        r = options->ops->region_new(options->user, &spec, ret_region);
        if (r < 0)
                return r;
        job->memory_len += spec.len;
        job->core->memory_len += spec.len;
        return 0;
}

void ae_memory_transferred(struct ae_job *job, struct ae_region *region)
{
        const struct ae_core_options *options = &job->core->options;

        job->memory_len -= region->len;
        job->core->memory_len -= region->len;
        options->ops->region_free(options->user, region);
}

static void revoke_all(struct ae_job *job, uint32_t node)
{
        const struct ae_core_options *options = &job->core->options;
        struct ae_job_peer *peer = &job->peers[node];

        if (!peer->own)
                return;
        options->ops->revoke(options->user, node, &peer->own_cache);
        options->ops->revoke(options->user, node, &peer->own_inbox);
        for (uint32_t i = 0; i < job->n_local; i++)
                options->ops->revoke(options->user, node, &peer->own_xin[i]);
        peer->own = false;
}

void ae_memory_free(struct ae_job *job)
{
        const struct ae_core_options *options = &job->core->options;
        struct ae_region *const regions[] = { job->params, job->shard_region, job->acc, job->total,
                                              job->inbox, job->overflow, job->out };

        for (uint32_t node = 0; job->peers && node < options->n_nodes; node++)
                revoke_all(job, node);
        for (size_t i = 0; i < AE_ARRAY_LEN(regions); i++) {
                if (regions[i])
                        options->ops->region_free(options->user, regions[i]);
        }
        for (uint32_t i = 0; i < job->n_buried; i++)
                options->ops->region_free(options->user, job->buried[i]);
        ae_table_free(job->core, job->buried);
        ae_extents_deinit(&job->cache_free);
        ae_extents_deinit(&job->overflow_free);
        job->core->memory_len -= job->memory_len;
}

int ae_memory_worker(struct ae_worker *worker)
{
        struct ae_job *job = worker->job;
        const struct ae_core_options *options = &job->core->options;
        uint64_t slot_len = ae_align_up(
                AE_MAX(job->model->message->exchange_len / AE_LOCAL_XSLOTS, UINT64_C(4096)), 64);
        struct ae_region_spec in = { .name = "autoep-xin", .shared = true,
                                     .read_only = true, .net = true };
        struct ae_region_spec out = { .name = "autoep-xout", .shared = true, .net = true };
        struct ae_local_xin *xin;
        int r;

        in.len = ae_align_up(sizeof(*xin) + job->world * sizeof(struct ae_local_xflow), 4096) +
                 ae_align_up((uint64_t)job->world * AE_LOCAL_XSLOTS * slot_len, 4096);
        /* room for a message to each rank at the same time, and never a tight ring */
        out.len = ae_align_up(AE_MAX(8 * slot_len, 2 * job->world * XHEAD), 4096);
        r = options->ops->region_new(options->user, &in, &worker->xin);
        if (r < 0)
                return r;
        r = options->ops->region_new(options->user, &out, &worker->xout);
        if (r < 0)
                return r;
        xin = (struct ae_local_xin *)worker->xin->base;
        xin->magic = AE_LOCAL_MAGIC;
        xin->slot_len = slot_len;
        xin->slots_off =
                ae_align_up(sizeof(*xin) + job->world * sizeof(struct ae_local_xflow), 4096);
        ((struct ae_local_page *)worker->page->base)->xout_len = out.len;
        ae_flow_new(worker);
        return 0;
}

/* ---- grants ----------------------------------------------------------------------------- */

/* Where a sender's slots lie in the inbox: senders in node order, without us. */
uint64_t ae_memory_inbox_off(const struct ae_job *job, uint32_t node)
{
        uint32_t place = node - (node > job->core->options.node);

        return place * job->model->message->slots * job->slot_len;
}

static int grant(struct ae_job *job, uint32_t node, struct ae_region *region, uint64_t off,
                 uint64_t len, Autoep__Key *key, struct ae_net_key *ret_key)
{
        const struct ae_core_options *options = &job->core->options;
        int r;

        r = options->ops->grant(options->user, node, region, off, len, ret_key);
        if (r < 0)
                return r;
        autoep__key__init(key);
        key->key.data = ret_key->bytes;
        key->key.len = sizeof(ret_key->bytes);
        return 0;
}

int ae_memory_grant(struct ae_job *job, uint32_t node)
{
        AE_CLEANUP(ae_cleanup_free) Autoep__Key *xin = ae_core_alloc(job->n_local, sizeof(*xin));
        AE_CLEANUP(ae_cleanup_free) Autoep__Key **xins = ae_core_alloc(job->n_local, sizeof(*xins));
        Autoep__Grants grants = AUTOEP__GRANTS__INIT;
        Autoep__Key cache;
        Autoep__Key inbox;
        struct ae_job_peer *peer = &job->peers[node];
        uint64_t slots = job->model->message->slots;
        int r;

        peer->own_xin = ae_table_new(job->core, job->n_local, sizeof(*peer->own_xin));
        r = grant(job, node, job->params, job->page->cache_off, job->page->cache_len, &cache,
                  &peer->own_cache);
        if (r < 0)
                return r;
        r = grant(job, node, job->inbox, ae_memory_inbox_off(job, node), slots * job->slot_len,
                  &inbox, &peer->own_inbox);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < job->n_local; i++) {
                if (!job->locals[i])
                        return ae_fail(AE_ELOST, "a rank left while job '%s' started", job->name);
                xins[i] = &xin[i];
                r = grant(job, node, job->locals[i]->xin, 0, job->locals[i]->xin->len, &xin[i],
                          &peer->own_xin[i]);
                if (r < 0)
                        return r;
        }
        peer->own = true;
        grants.cache = &cache;
        grants.inbox = &inbox;
        grants.xin = xins;
        grants.n_xin = job->n_local;
        grants.n_slots = (uint32_t)slots;
        grants.slot_len = job->slot_len;
        ae_job_control(job, node, AE_CONTROL_GRANTS, &grants.base);
        return 0;
}

static bool take_key(const Autoep__Key *key, struct ae_net_key *ret_key)
{
        if (!key || key->key.len != sizeof(ret_key->bytes))
                return false;
        memcpy(ret_key->bytes, key->key.data, sizeof(ret_key->bytes));
        return true;
}

void ae_memory_granted(struct ae_job *job, uint32_t node, const Autoep__Grants *grants)
{
        struct ae_job_peer *peer = &job->peers[node];
        bool sound;

        sound = take_key(grants->cache, &peer->cache) && take_key(grants->inbox, &peer->inbox) &&
                grants->n_xin == peer->n_ranks && grants->slot_len == job->slot_len &&
                !peer->granted;
        peer->xin = ae_table_new(job->core, peer->n_ranks, sizeof(*peer->xin));
        for (uint32_t i = 0; sound && i < peer->n_ranks; i++)
                sound = take_key(grants->xin[i], &peer->xin[i]);
        if (!sound) {
                ae_job_fail(job, AE_EPROTO, "node %u sent grants that do not fit job '%s'", node,
                            job->name);
                return;
        }
        peer->granted = true;
        job->n_granted++;
        ae_form_granted(job);
}
