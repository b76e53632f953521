/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gather at the requester: the node's cache. A unit has one fetch at a time, which belongs to the
 * cache and not to who began it; when its slices are here at one version it is published, and
 * workers find it without a message. A slot is used again when its entry is withdrawn and nobody
 * holds or pins it.
 *
 * Each wanted slice brings exactly one arrival, also when the version has moved on meanwhile; a
 * fetch ends only with its last arrival, so that no late byte falls into a slot used again.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* In one msg. */
#define WANTS_MAX                                                                                  \
        ((AE_NET_MSG_MAX - sizeof(struct ae_wire_want)) / sizeof(struct ae_wire_want_item))

static struct ae_local_page *page_of(const struct ae_worker *worker)
{
        return (struct ae_local_page *)worker->page->base;
}

int ae_cache_new(struct ae_job *job)
{
        const struct ae_layout *layout = job->layout;

        job->slots = ae_table_new(job->core, job->n_slots, sizeof(*job->slots));
        job->units = ae_table_new(job->core, layout->n_units, sizeof(*job->units));
        job->updated = ae_table_new(job->core, layout->n_units, sizeof(*job->updated));
        job->here = ae_table_new(job->core, layout->n_slices / 8 + 1, 1);
        job->n_fetches = layout->n_units + 256;
        job->fetches = ae_table_new(job->core, job->n_fetches, sizeof(*job->fetches));
        job->cap_order = 4 * layout->n_units + 64;
        job->order = ae_table_new(job->core, job->cap_order, sizeof(*job->order));
        job->next_order = ae_table_new(job->core, job->cap_order, sizeof(*job->next_order));
        for (uint32_t u = 0; u < layout->n_units; u++) {
                struct ae_cache_unit *unit = &job->units[u];

                unit->slot = AE_LOCAL_SLOT_NONE;
                unit->fetch = AE_WIRE_NONE;
                unit->frozen = true;
                ae_list_init(&unit->waiters);
                for (uint32_t s = 0; s < layout->units[u].n_segments; s++) {
                        const struct ae_layout_segment *segment =
                                &layout->segments[layout->units[u].segment_first + s];

                        unit->frozen &= !segment->trainable && !segment->buffer;
                }
        }
        for (uint32_t i = 0; i < job->n_fetches; i++)
                ae_list_init(&job->fetches[i].waiters);
        return 0;
}

static void drop_waiters(struct ae_job *job, struct ae_list *waiters)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(waiters)))
                ae_pool_give(&job->core->waiters, entry);
}

void ae_cache_free(struct ae_job *job)
{
        for (uint32_t u = 0; job->units && u < job->layout->n_units; u++)
                drop_waiters(job, &job->units[u].waiters);
        for (uint32_t i = 0; i < job->n_fetches; i++)
                drop_waiters(job, &job->fetches[i].waiters);
        drop_waiters(job, &job->ranges);
        ae_table_free(job->core, job->slots);
        ae_table_free(job->core, job->units);
        ae_table_free(job->core, job->updated);
        ae_table_free(job->core, job->here);
        ae_table_free(job->core, job->fetches);
        ae_table_free(job->core, job->order);
        ae_table_free(job->core, job->next_order);
}

/* ---- slots ------------------------------------------------------------------------------ */

/* Whether anybody may be looking at a slot whose entry is withdrawn. */
static bool slot_in_use(const struct ae_job *job, uint32_t slot)
{
        struct ae_worker *worker;

        if (job->slots[slot].n_pins)
                return true;
        /* the entry's withdrawal stands before the look at the holds; pairs with the worker's fence
         * between its hold and its second look at the entry */
        atomic_thread_fence(memory_order_seq_cst);
        ae_list_for_each(worker, &job->core->workers, link) {
                if (worker->job == job && worker->page &&
                    atomic_load_explicit(&page_of(worker)->holds[slot], memory_order_acquire))
                        return true;
        }
        return false;
}

/* See PROTOCOL.md, section 8. */
static const bool legal_moves[AE_SLOT_N_STATES][AE_SLOT_N_STATES] = {
        [AE_SLOT_FREE] = { [AE_SLOT_FILLING] = true },
        [AE_SLOT_FILLING] = { [AE_SLOT_PUBLISHED] = true, [AE_SLOT_RETIRED] = true },
        [AE_SLOT_PUBLISHED] = { [AE_SLOT_PUBLISHED] = true, [AE_SLOT_RETIRED] = true },
        [AE_SLOT_RETIRED] = { [AE_SLOT_FREE] = true, [AE_SLOT_FILLING] = true,
                              [AE_SLOT_PUBLISHED] = true, [AE_SLOT_RETIRED] = true },
};

static void slot_move(struct ae_job *job, uint32_t slot, enum ae_slot_state to)
{
        enum ae_slot_state from = job->slots[slot].state;

        assert(legal_moves[from][to]);
        job->n_retired += (to == AE_SLOT_RETIRED) - (from == AE_SLOT_RETIRED);
        job->slots[slot].state = to;
}

static void withdraw(struct ae_job *job, uint32_t u)
{
        struct ae_cache_unit *unit = &job->units[u];

        if (unit->slot == AE_LOCAL_SLOT_NONE)
                return;
        atomic_store_explicit(&job->entries[u], ae_local_entry(0, AE_LOCAL_SLOT_NONE),
                              memory_order_seq_cst);
        slot_move(job, unit->slot, AE_SLOT_RETIRED);
}

static void publish(struct ae_job *job, uint32_t u)
{
        struct ae_cache_unit *unit = &job->units[u];
        uint64_t version = unit->frozen ? AE_LOCAL_VERSION_ANY : job->version;

        slot_move(job, unit->slot, AE_SLOT_PUBLISHED);
        atomic_store_explicit(&job->entries[u], ae_local_entry(version, unit->slot),
                              memory_order_release);
}

static void free_slot(struct ae_job *job, uint32_t slot)
{
        struct ae_cache_slot *s = &job->slots[slot];

        ae_extents_give(&job->cache_free, s->off, s->len);
        if (s->unit != AE_WIRE_NONE && job->units[s->unit].slot == slot)
                job->units[s->unit].slot = AE_LOCAL_SLOT_NONE;
        slot_move(job, slot, AE_SLOT_FREE);
        *s = (struct ae_cache_slot){ .state = AE_SLOT_FREE };
        job->slot_hint = AE_MIN(job->slot_hint, slot);
}

/* Retired slots that nobody holds any more become free. */
static void sweep(struct ae_job *job)
{
        for (uint32_t i = 0; job->n_retired && i < job->n_slots; i++) {
                if (job->slots[i].state == AE_SLOT_RETIRED && !slot_in_use(job, i))
                        free_slot(job, i);
        }
}

/* Where @unit stands in the learnt order; the order's length when it isn't in it. */
static uint32_t order_place(const struct ae_job *job, uint32_t unit)
{
        for (uint32_t i = 0; i < job->n_order; i++) {
                if (job->order[i] == unit)
                        return i;
        }
        return job->n_order;
}

/* The published unit that nobody holds whose place in the order is farthest, past @unit's. */
static uint32_t pick_victim(struct ae_job *job, uint32_t unit, bool needed)
{
        uint32_t best = AE_WIRE_NONE;
        uint32_t best_place = needed ? 0 : order_place(job, unit);

        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                struct ae_cache_unit *other = &job->units[u];
                uint32_t place;

                if (u == unit || other->slot == AE_LOCAL_SLOT_NONE ||
                    other->fetch != AE_WIRE_NONE ||
                    job->slots[other->slot].state != AE_SLOT_PUBLISHED)
                        continue;
                place = order_place(job, u);
                if ((best == AE_WIRE_NONE && needed) || place > best_place) {
                        if (slot_in_use(job, other->slot))
                                continue;
                        best = u;
                        best_place = place;
                }
        }
        return best;
}

/* The first free slot; as many as there are when none is. */
static uint32_t find_slot(struct ae_job *job)
{
        uint32_t slot = job->slot_hint;

        while (slot < job->n_slots && job->slots[slot].state != AE_SLOT_FREE)
                slot++;
        job->slot_hint = slot;
        return slot;
}

static uint32_t take_slot(struct ae_job *job, uint32_t unit, uint64_t len, bool needed)
{
        uint64_t off;
        uint32_t slot;

        sweep(job);
        while (find_slot(job) == job->n_slots || !ae_extents_take(&job->cache_free, len, &off)) {
                uint32_t victim = pick_victim(job, unit, needed);

                if (victim == AE_WIRE_NONE)
                        return AE_LOCAL_SLOT_NONE;
                withdraw(job, victim);
                if (slot_in_use(job, job->units[victim].slot)) {
                        publish(job, victim); /* taken between our two looks */
                        return AE_LOCAL_SLOT_NONE;
                }
                free_slot(job, job->units[victim].slot);
        }
        slot = job->slot_hint;
        slot_move(job, slot, AE_SLOT_FILLING);
        job->slots[slot] = (struct ae_cache_slot){ .state = AE_SLOT_FILLING, .unit = AE_WIRE_NONE,
                                                   .off = off, .len = len };
        job->slot_table[slot] = (struct ae_local_slot){ .off = off, .len = len };
        return slot;
}

/* ---- fetches ---------------------------------------------------------------------------- */

void ae_cache_flush(struct ae_job *job, uint32_t node)
{
        struct ae_wire_want *want = job->peers[node].want;

        if (!want || !want->n_items)
                return;
        want->head = ae_job_head(job, AE_WIRE_WANT);
        want->head.round = job->version;
        ae_job_msg(job, node, want, sizeof(*want) + want->n_items * sizeof(want->items[0]));
        want->n_items = 0;
}

static void push_want(struct ae_job *job, uint32_t node, const struct ae_wire_want_item *item)
{
        struct ae_job_peer *peer = &job->peers[node];

        if (peer->want && peer->want->n_items == WANTS_MAX)
                ae_cache_flush(job, node);
        if (!peer->want || peer->want->n_items == peer->cap_wants) {
                uint32_t cap = AE_MIN(AE_MAX(2 * peer->cap_wants, 8u), (uint32_t)WANTS_MAX);
                size_t size = sizeof(*peer->want) + cap * sizeof(peer->want->items[0]);

                peer->want = ae_table_grow(job->core, peer->want, size);
                peer->cap_wants = cap;
        }
        memcpy(&peer->want->items[peer->want->n_items], item, sizeof(*item));
        peer->want->n_items++;
        ae_job_unsent(job, node);
}

struct count {
        struct ae_fetch *fetch;
        const struct ae_wire_want_item *item;
};

static void count_slice(struct ae_job *job, uint32_t slice, void *user)
{
        struct count *count = user;
        uint32_t node = job->layout->slices[slice].node;
        struct ae_job_peer *peer = &job->peers[node];

        if (count->fetch->n_left++ == 0)
                count->fetch->first_slice = slice;
        if (!count->fetch->range)
                job->here[slice / 8] &= (uint8_t)~(1u << (slice % 8));
        /* one item per owner, whatever it owns of the unit */
        if (peer->want && peer->want->n_items &&
            peer->want->items[peer->want->n_items - 1].token == count->item->token)
                return;
        push_want(job, node, count->item);
}

static void fetch_done(struct ae_job *job, struct ae_fetch *fetch);

/* Sends the wants of a fetch whose slot is set. */
static void run_fetch(struct ae_job *job, struct ae_fetch *fetch, bool changed_only)
{
        struct ae_wire_want_item item = {
                .unit = fetch->unit, .token = (uint32_t)(fetch - job->fetches),
                .cache_off = job->slots[fetch->slot].off, .first = fetch->first, .len = fetch->len,
                .changed_only = changed_only,
        };
        struct count count = { .fetch = fetch, .item = &item };

        fetch->content = job->units[fetch->unit].content;
        fetch->mixed = false;
        fetch->n_left = 0;
        fetch->arrived = 0;
        ae_serve_each(job, &item, count_slice, &count);
        if (fetch->n_left == 0)
                fetch_done(job, fetch); /* a unit without bytes */
}

static void end_fetch(struct ae_job *job, struct ae_fetch *fetch)
{
        fetch->used = false;
        job->fetch_hint = AE_MIN(job->fetch_hint, (uint32_t)(fetch - job->fetches));
}

static struct ae_fetch *new_fetch(struct ae_job *job, uint32_t unit)
{
        for (uint32_t i = job->fetch_hint; i < job->n_fetches; i++) {
                struct ae_fetch *fetch = &job->fetches[i];

                if (fetch->used)
                        continue;
                job->fetch_hint = i;
                fetch->used = true;
                fetch->unit = unit;
                fetch->range = false;
                fetch->first = 0;
                fetch->len = job->layout->units[unit].len;
                return fetch;
        }
        return NULL;
}

/*
 * Begins to fetch a unit if it is neither here nor on its way. @needed: somebody waits for it, so
 * others may be evicted for it whatever the order says.
 */
static bool want_unit(struct ae_job *job, uint32_t u, bool needed)
{
        struct ae_cache_unit *unit = &job->units[u];
        struct ae_fetch *fetch;
        bool again = false;

        if (unit->fetch != AE_WIRE_NONE ||
            (unit->slot != AE_LOCAL_SLOT_NONE && job->slots[unit->slot].state == AE_SLOT_PUBLISHED))
                return true;
        fetch = new_fetch(job, u);
        if (!fetch)
                return false;
        if (unit->slot != AE_LOCAL_SLOT_NONE && !slot_in_use(job, unit->slot)) {
                again = job->slots[unit->slot].whole; /* its frozen part is still there */
        } else {
                unit->slot = take_slot(job, u, fetch->len, needed);
        }
        if (unit->slot == AE_LOCAL_SLOT_NONE) {
                end_fetch(job, fetch);
                return false;
        }
        if (job->slots[unit->slot].state != AE_SLOT_FILLING)
                slot_move(job, unit->slot, AE_SLOT_FILLING);
        job->slots[unit->slot].unit = u;
        fetch->slot = unit->slot;
        unit->fetch = (uint32_t)(fetch - job->fetches);
        run_fetch(job, fetch, again);
        return true;
}

static void answer(struct ae_worker *worker, uint64_t token, int status, const struct ae_job *job,
                   uint32_t slot)
{
        struct ae_local_cqe cqe = { .token = token, .status = status, .slot = AE_LOCAL_SLOT_NONE };

        if (status == 0) {
                if (!worker->pins)
                        worker->pins = ae_table_new(worker->core, job->n_slots,
                                                    sizeof(*worker->pins));
                job->slots[slot].n_pins++;
                worker->pins[slot]++;
                worker->n_pins++;
                cqe.slot = slot;
                cqe.version = job->version;
                cqe.off = job->slots[slot].off;
                cqe.len = job->slots[slot].len;
        }
        assert(worker->n_waiting > 0);
        worker->n_waiting--;
        if (status == 0 && worker->told && worker->n_waiting == 0) {
                ae_local_text_set(&((struct ae_local_page *)worker->page->base)->why, "");
                worker->told = false;
        }
        ae_ring_answer(worker, &cqe);
}

static void answer_all(struct ae_job *job, struct ae_list *waiters, int status, uint32_t slot)
{
        struct ae_waiter *waiter;

        ae_list_for_each_safe(waiter, waiters, link) {
                ae_list_unlink(&waiter->link);
                answer(waiter->worker, waiter->token, status, job, slot);
                ae_pool_give(&job->core->waiters, waiter);
        }
}

static void fetch_done(struct ae_job *job, struct ae_fetch *fetch)
{
        struct ae_cache_unit *unit = &job->units[fetch->unit];
        struct ae_cache_slot *slot = &job->slots[fetch->slot];

        if (fetch->mixed || fetch->content != unit->content) {
                run_fetch(job, fetch, slot->whole && !fetch->range); /* the version moved on */
                return;
        }
        end_fetch(job, fetch);
        slot->content = fetch->content;
        if (fetch->range) {
                /* never published; freed with its last pin */
                slot_move(job, fetch->slot, AE_SLOT_RETIRED);
                answer_all(job, &fetch->waiters, 0, fetch->slot);
                return;
        }
        slot->whole = true;
        unit->fetch = AE_WIRE_NONE;
        publish(job, fetch->unit);
        answer_all(job, &fetch->waiters, 0, fetch->slot);
}

void ae_cache_arrived(struct ae_job *job, uint32_t token, uint32_t slice, uint32_t stamp)
{
        const struct ae_layout_segment *segment;
        struct ae_fetch *fetch;

        if (slice >= job->layout->n_slices || token >= job->n_fetches ||
            !job->fetches[token].used || job->fetches[token].n_left == 0) {
                ae_job_fail(job, AE_EPROTO, "a slice arrived that nobody on node %u wanted",
                            job->core->options.node);
                return;
        }
        fetch = &job->fetches[token];
        segment = &job->layout->segments[job->layout->slices[slice].segment];
        if (stamp != (fetch->content & 0xff) && (segment->trainable || segment->buffer))
                fetch->mixed = true;
        if (!fetch->range)
                job->here[slice / 8] |= (uint8_t)(1u << (slice % 8));
        else if (slice - fetch->first_slice < 64)
                fetch->arrived |= UINT64_C(1) << (slice - fetch->first_slice);
        if (--fetch->n_left == 0)
                fetch_done(job, fetch);
        if (job->starved && !fetch->used)
                ae_cache_retry(job); /* it may give way now */
}

struct missing {
        const struct ae_fetch *fetch;
        uint32_t node;
};

static bool is_here(const struct ae_job *job, const struct ae_fetch *fetch, uint32_t slice)
{
        uint32_t nth = slice - fetch->first_slice;

        if (fetch->range)
                return nth < 64 && (fetch->arrived >> nth & 1);
        return job->here[slice / 8] >> (slice % 8) & 1;
}

static void first_missing(struct ae_job *job, uint32_t slice, void *user)
{
        struct missing *missing = user;

        if (missing->node == AE_WIRE_NONE && !is_here(job, missing->fetch, slice))
                missing->node = job->layout->slices[slice].node;
}

/* An owner that a fetch waits for. */
uint32_t ae_cache_missing_node(struct ae_job *job, const struct ae_fetch *fetch)
{
        struct ae_wire_want_item item = { .unit = fetch->unit, .first = fetch->first,
                                          .len = fetch->len };
        struct missing missing = { fetch, AE_WIRE_NONE };

        ae_serve_each(job, &item, first_missing, &missing);
        return missing.node;
}

/* ---- requests --------------------------------------------------------------------------- */

/* The order of use is that of the node's first rank. */
static void learn(struct ae_worker *worker, uint32_t unit)
{
        struct ae_job *job = worker->job;

        if (job->n_next < job->cap_order)
                job->next_order[job->n_next++] = unit;
}

static struct ae_waiter *wait_for(struct ae_worker *worker, struct ae_list *waiters,
                                  uint64_t token)
{
        struct ae_waiter *waiter = ae_pool_take(&worker->core->waiters);

        waiter->worker = worker;
        waiter->token = token;
        ae_list_push(waiters, &waiter->link);
        return waiter;
}

/* Whoever asks without end would fill the daemon's memory. */
static int count_request(struct ae_worker *worker)
{
        if (worker->n_waiting + worker->n_pins >= AE_LOCAL_REQUESTS_MAX)
                return ae_fail(AE_EPROTO, "it has %u requests open, more than %u",
                               worker->n_waiting + worker->n_pins + 1, AE_LOCAL_REQUESTS_MAX);
        worker->n_waiting++;
        return 0;
}

int ae_cache_gather(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;
        struct ae_cache_unit *unit;
        int r;

        if (sqe->unit >= job->layout->n_units)
                return ae_fail(AE_EPROTO, "it gathers unit %u of %u", sqe->unit,
                               job->layout->n_units);
        r = count_request(worker);
        if (r < 0)
                return r;
        unit = &job->units[sqe->unit];
        unit->n_misses++;
        learn(worker, sqe->unit);
        if (unit->slot != AE_LOCAL_SLOT_NONE && unit->fetch == AE_WIRE_NONE &&
            job->slots[unit->slot].state == AE_SLOT_PUBLISHED) {
                answer(worker, sqe->token, 0, job, unit->slot);
                return 0;
        }
        (void)wait_for(worker, &unit->waiters, sqe->token);
        if (want_unit(job, sqe->unit, true) && unit->fetch != AE_WIRE_NONE) {
                struct ae_list *waiters = &job->fetches[unit->fetch].waiters;
                struct ae_list *entry;

                while ((entry = ae_list_pop(&unit->waiters)))
                        ae_list_push(waiters, entry);
        } else if (unit->slot != AE_LOCAL_SLOT_NONE && unit->fetch == AE_WIRE_NONE) {
                answer_all(job, &unit->waiters, 0, unit->slot); /* was there at once */
        } else {
                unit->wanted = true;
                job->starved = true;
        }
        return 0;
}

/* One that brings the very same bytes. */
static struct ae_fetch *find_range(const struct ae_job *job, const struct ae_waiter *waiter)
{
        for (uint32_t i = 0; i < job->n_fetches; i++) {
                struct ae_fetch *fetch = &job->fetches[i];

                if (fetch->used && fetch->range && fetch->unit == waiter->unit &&
                    fetch->first == waiter->first && fetch->len == waiter->len)
                        return fetch;
        }
        return NULL;
}

static bool begin_range(struct ae_job *job, struct ae_waiter *waiter)
{
        struct ae_fetch *fetch = find_range(job, waiter);

        if (fetch) {
                ae_list_unlink(&waiter->link);
                ae_list_push(&fetch->waiters, &waiter->link);
                return true;
        }
        fetch = new_fetch(job, waiter->unit);
        if (!fetch)
                return false;
        fetch->range = true;
        fetch->first = waiter->first;
        fetch->len = waiter->len;
        fetch->slot =
                take_slot(job, AE_WIRE_NONE, waiter->len, true); /* may evict the unit itself */
        if (fetch->slot == AE_LOCAL_SLOT_NONE) {
                end_fetch(job, fetch);
                return false;
        }
        ae_list_unlink(&waiter->link);
        ae_list_push(&fetch->waiters, &waiter->link);
        run_fetch(job, fetch, false);
        return true;
}

/* One after the other, so that small ones don't keep a large one waiting for ever. */
static void begin_ranges(struct ae_job *job)
{
        while (!ae_list_empty(&job->ranges)) {
                if (begin_range(job, ae_list_entry(job->ranges.next, struct ae_waiter, link)))
                        continue;
                job->starved = true;
                return;
        }
}

int ae_cache_range(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;
        struct ae_waiter *waiter;
        int r;

        if (sqe->unit >= job->layout->n_units ||
            !ae_range_ok(sqe->first, sqe->n, job->layout->units[sqe->unit].len) || sqe->n == 0)
                return ae_fail(AE_EPROTO, "it gathers a range beyond unit %u", sqe->unit);
        r = count_request(worker);
        if (r < 0)
                return r;
        waiter = wait_for(worker, &job->ranges, sqe->token);
        waiter->unit = sqe->unit;
        waiter->first = sqe->first;
        waiter->len = sqe->n;
        begin_ranges(job);
        return 0;
}

int ae_cache_unpin(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;

        if (sqe->slot >= job->n_slots || !worker->pins || worker->pins[sqe->slot] == 0)
                return ae_fail(AE_EPROTO, "it unpins slot %u, which it has not pinned", sqe->slot);
        worker->pins[sqe->slot]--;
        worker->n_pins--;
        job->slots[sqe->slot].n_pins--;
        if (job->starved)
                ae_cache_retry(job);
        return 0;
}

int ae_cache_prefetch(struct ae_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_job *job = worker->job;

        if (sqe->unit >= job->layout->n_units)
                return ae_fail(AE_EPROTO, "it prefetches unit %u of %u", sqe->unit,
                               job->layout->n_units);
        (void)want_unit(job, sqe->unit, false); /* a hint: without room nothing happens */
        return 0;
}

/* Units and ranges that could not begin for want of room. */
void ae_cache_retry(struct ae_job *job)
{
        job->starved = false;
        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                struct ae_cache_unit *unit = &job->units[u];
                struct ae_list *entry;

                if (!unit->wanted)
                        continue;
                if (!want_unit(job, u, true)) {
                        job->starved = true;
                        continue;
                }
                unit->wanted = false;
                if (unit->fetch == AE_WIRE_NONE) {
                        answer_all(job, &unit->waiters, 0, unit->slot);
                        continue;
                }
                while ((entry = ae_list_pop(&unit->waiters)))
                        ae_list_push(&job->fetches[unit->fetch].waiters, entry);
        }
        begin_ranges(job);
}

/* ---- versions --------------------------------------------------------------------------- */

/* The units in the order they were used, then the others; each once. */
static void want_all(struct ae_job *job)
{
        for (uint32_t i = 0; i < job->n_order; i++)
                (void)want_unit(job, job->order[i], false); /* as far as there is room */
        for (uint32_t u = 0; u < job->layout->n_units; u++)
                (void)want_unit(job, u, false);
}

void ae_cache_commit(struct ae_job *job)
{
        for (uint32_t i = 0; job->verdict.kind == AE_VERDICT_PUT && i < job->n_slots; i++)
                job->slots[i].whole = false; /* it may have changed what is frozen */
        if (job->n_next) {
                memcpy(job->order, job->next_order, job->n_next * sizeof(*job->order));
                job->n_order = job->n_next;
        }
        job->n_next = 0;
        for (uint32_t u = 0; u < job->layout->n_units; u++) {
                struct ae_cache_unit *unit = &job->units[u];

                if (job->updated[u]) {
                        unit->content = job->version;
                        if (unit->fetch == AE_WIRE_NONE)
                                withdraw(job, u);
                } else if (unit->slot != AE_LOCAL_SLOT_NONE &&
                           job->slots[unit->slot].state == AE_SLOT_PUBLISHED) {
                        publish(job, u); /* the same bytes at the new version */
                }
        }
        want_all(job);
}

void ae_cache_fail(struct ae_job *job)
{
        for (uint32_t u = 0; job->units && u < job->layout->n_units; u++)
                answer_all(job, &job->units[u].waiters, job->fail_status, 0);
        for (uint32_t i = 0; i < job->n_fetches; i++)
                answer_all(job, &job->fetches[i].waiters, job->fail_status, 0);
        answer_all(job, &job->ranges, job->fail_status, 0);
}

static void forget(struct ae_list *waiters, const struct ae_worker *worker)
{
        struct ae_waiter *waiter;

        ae_list_for_each_safe(waiter, waiters, link) {
                if (waiter->worker == worker) {
                        ae_list_unlink(&waiter->link);
                        ae_pool_give(&worker->core->waiters, waiter);
                }
        }
}

void ae_cache_worker_gone(struct ae_worker *worker)
{
        struct ae_job *job = worker->job;

        for (uint32_t u = 0; job->units && u < job->layout->n_units; u++)
                forget(&job->units[u].waiters, worker);
        for (uint32_t i = 0; i < job->n_fetches; i++)
                forget(&job->fetches[i].waiters, worker);
        forget(&job->ranges, worker);
        for (uint32_t slot = 0; worker->pins && slot < job->n_slots; slot++) {
                assert(job->slots[slot].n_pins >= worker->pins[slot]);
                job->slots[slot].n_pins -= worker->pins[slot];
        }
}
