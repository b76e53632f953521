/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gather and release. A unit that the node's cache has at the job's version costs a look into
 * shared memory and two counts; everything else is a request to the daemon. Any thread.
 */
#include "client/error.h"
#include "client/holds.h"
#include "client/queue.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"

#define GATHER_MISS 1 /* not in the cache at this version, or not for this allowance */
#define GATHER_TRIES 16

/* What is wanted: bytes [first, first + len) of a unit's image. */
struct want {
        uint32_t unit;
        uint64_t first, len;
        bool whole;
        bool versioned; /* it changes with steps, so an answer has at least the job's version */
};

/* A slot that is held in page.holds. */
struct found {
        uint32_t slot;
        uint64_t version;
};

static uint64_t job_version(const struct autoep *h)
{
        return atomic_load_explicit(&h->params->job_version, memory_order_acquire);
}

/* The unit's slot with a hold in page.holds, or GATHER_MISS. */
static int hold_cached(struct autoep *h, uint32_t unit, struct found *ret_found)
{
        for (int try = 0; try < GATHER_TRIES; try++) {
                uint64_t version = job_version(h);
                uint64_t entry = atomic_load_explicit(&h->units[unit], memory_order_acquire);
                uint64_t entry_version = ae_local_entry_version(entry);
                uint32_t slot = ae_local_entry_slot(entry);

                if (slot == AE_LOCAL_SLOT_NONE ||
                    (entry_version != version && entry_version != AE_LOCAL_VERSION_ANY))
                        return GATHER_MISS;
                if (slot >= h->n_slots)
                        return ae_pump_break(h, ae_fail(AE_EPROTO, "the daemon published slot %u "
                                                        "of %u", slot, h->n_slots));
                /* Both seq_cst; pair with the daemon, which withdraws the entry and then reads
                 * holds: either it sees the hold, or we see the entry gone. */
                atomic_fetch_add(&h->page->holds[slot], 1);
                if (atomic_load(&h->units[unit]) == entry) {
                        *ret_found = (struct found){ .slot = slot, .version = version };
                        return 0;
                }
                atomic_fetch_sub_explicit(&h->page->holds[slot], 1, memory_order_release);
        }
        return GATHER_MISS;
}

static void unhold(struct autoep *h, uint32_t slot)
{
        atomic_fetch_sub_explicit(&h->page->holds[slot], 1, memory_order_release);
}

static void fill_view(const struct autoep *h, const struct want *want, const struct found *found,
                      uint64_t off, struct autoep_view *ret_view)
{
        ret_view->data = h->cache + off;
        ret_view->len = want->len;
        ret_view->version = found->version;
        ret_view->unit = want->unit;
        ret_view->slot = found->slot;
}

static int check_slot(const struct autoep *h, const struct want *want, uint64_t off, uint64_t len,
                      uint64_t needed)
{
        if (!ae_range_ok(off, len, h->cache_len) || len < needed ||
            (want->whole && off % AE_LAYOUT_TENSOR_ALIGN))
                return ae_fail(AE_EPROTO, "the daemon placed unit '%s' at byte %llu of a cache of "
                               "%llu, %llu bytes long where %llu are needed",
                               ae_handle_unit_name(h, want->unit), (unsigned long long)off,
                               (unsigned long long)h->cache_len, (unsigned long long)len,
                               (unsigned long long)needed);
        return 0;
}

/* A hit takes no lock, makes no system call and sends nothing. */
static int gather_cached(struct autoep *h, const struct want *want, struct autoep_view *ret_view)
{
        struct ae_local_slot slot;
        struct found found = { .slot = AE_LOCAL_SLOT_NONE };
        int r;

        r = hold_cached(h, want->unit, &found);
        if (r != 0)
                return r;
        slot = h->slots[found.slot]; /* at rest while it is held */
        r = check_slot(h, want, slot.off, slot.len, h->layout->units[want->unit].len);
        if (r < 0) {
                unhold(h, found.slot);
                return ae_pump_break(h, r);
        }
        r = ae_holds_take(h, found.slot, want->unit, slot.len, false);
        if (r == AE_HOLDS_OVER) {
                unhold(h, found.slot);
                /* A range alone may fit where the whole unit doesn't. */
                return want->whole ? ae_holds_fail_over(h, want->unit, slot.len) : GATHER_MISS;
        }
        fill_view(h, want, &found, slot.off + want->first, ret_view);
        ae_count(&h->counters.gather_hits, 1);
        return 0;
}

/* What a slot of @len bytes takes from the allowance: of the cache ranges take whole cells. */
static uint64_t slot_len(const struct want *want, uint64_t len)
{
        return want->whole ? len : ae_align_up(len, AE_LAYOUT_TENSOR_ALIGN);
}

static int fail_over(const struct autoep *h, const struct want *want, uint64_t len)
{
        int r = want->whole ? 0 : ae_holds_check_ranges(h);

        return r < 0 ? r : ae_holds_fail_over(h, want->unit, slot_len(want, len));
}

static int take_answer(struct autoep *h, const struct want *want, uint64_t wanted_version,
                       const struct ae_local_cqe *cqe, struct autoep_view *ret_view)
{
        struct found found = { .slot = cqe->slot, .version = cqe->version };
        int r;

        r = check_slot(h, want, cqe->off, cqe->len, want->len);
        if (r == 0 && want->versioned && cqe->version < wanted_version)
                r = ae_fail(AE_EPROTO, "the daemon answered with version %llu of unit '%s' at "
                            "version %llu", (unsigned long long)cqe->version,
                            ae_handle_unit_name(h, want->unit), (unsigned long long)wanted_version);
        if (r < 0)
                return ae_pump_break(h, r);
        if (found.version == AE_LOCAL_VERSION_ANY)
                found.version = wanted_version;
        atomic_fetch_add(&h->page->holds[found.slot], 1); /* the request's pin stands until then */
        r = ae_holds_take(h, found.slot, want->unit, slot_len(want, cqe->len), !want->whole);
        if (r == AE_HOLDS_OVER) {
                unhold(h, found.slot);
                return fail_over(h, want, cqe->len);
        }
        fill_view(h, want, &found, cqe->off, ret_view);
        return 0;
}

static int gather_asked(struct autoep *h, const struct want *want,
                        const struct ae_deadline *deadline, struct autoep_view *ret_view)
{
        struct ae_local_sqe sqe = { .op = want->whole ? AE_SQ_GATHER : AE_SQ_RANGE,
                                    .unit = want->unit, .first = want->first, .n = want->len };
        uint64_t version = job_version(h);
        struct ae_local_cqe cqe;
        uint32_t request;
        int r;

        if (want->whole)
                sqe.first = sqe.n = 0;
        r = ae_queue_request(h, &sqe, deadline, &cqe, &request);
        if (r < 0)
                return ae_pump_prefix(r, "unit '%s' (%u) at version %llu in round %llu did not "
                                      "come", ae_handle_unit_name(h, want->unit), want->unit,
                                      (unsigned long long)version,
                                      (unsigned long long)ae_handle_round(h));
        r = take_answer(h, want, version, &cqe, ret_view);
        ae_queue_unpin(h, request);
        return r;
}

static int gather_missed(struct autoep *h, const struct want *want, int timeout_ms,
                         struct autoep_view *ret_view)
{
        struct ae_local_sqe hint = { .op = AE_SQ_PREFETCH, .unit = want->unit };
        struct ae_deadline deadline;
        int r;

        if (!want->whole && ae_holds_check_ranges(h) < 0)
                return fail_over(h, want, want->len);
        /* One that is held already takes nothing more: the daemon withdraws entries for a moment
         * to see whether anybody holds them. */
        if (ae_holds_over(h, slot_len(want, want->len)) &&
            !(want->whole && ae_holds_has(h, want->unit)))
                return fail_over(h, want, want->len);
        if (timeout_ms == 0) {
                r = want->whole ? ae_queue_post(h, &hint, true) : 0;
                if (r < 0)
                        return r;
                return ae_fail(AE_ETIMEDOUT, "unit '%s' (%u) is not in the cache of node %u at "
                               "version %llu", ae_handle_unit_name(h, want->unit), want->unit,
                               h->node, (unsigned long long)job_version(h));
        }
        ae_deadline_init(h, timeout_ms, &deadline);
        r = gather_asked(h, want, &deadline, ret_view);
        ae_count(&h->counters.gather_wait_ns, ae_now_ns() - deadline.start_ns);
        return r;
}

static int gather(struct autoep *h, const struct want *want, int timeout_ms,
                  struct autoep_view *ret_view)
{
        int r = gather_cached(h, want, ret_view);

        if (r == GATHER_MISS)
                r = gather_missed(h, want, timeout_ms, ret_view);
        if (r < 0)
                return r;
        ae_count(&h->counters.gathers, 1);
        ae_count(&h->counters.gather_len, want->len);
        return 0;
}

/* A unit without bytes of its own (experts, aliases): nothing to hold. */
static void empty_view(const struct autoep *h, uint32_t unit, struct autoep_view *ret_view)
{
        const struct want want = { .unit = unit };
        const struct found found = { .slot = AE_LOCAL_SLOT_NONE, .version = job_version(h) };

        fill_view(h, &want, &found, 0, ret_view);
}

static bool is_versioned(const struct autoep *h, uint32_t unit)
{
        const struct ae_layout_unit *u = &h->layout->units[unit];

        for (uint32_t i = 0; i < u->n_segments; i++) {
                if (h->layout->segments[u->segment_first + i].trainable)
                        return true;
        }
        return false;
}

static int check_gather(struct autoep *h, int timeout_ms, const struct autoep_view *view)
{
        int r = ae_handle_enter(h);

        if (r < 0)
                return r;
        if (!view)
                return ae_fail(AE_EINVAL, "there is no view to fill");
        r = ae_check_size("autoep_view", view->size, sizeof(*view));
        return r < 0 ? r : ae_deadline_check(timeout_ms);
}

static int gather_unit(struct autoep *h, uint32_t unit, int timeout_ms,
                       struct autoep_view *ret_view)
{
        struct want want = { .unit = unit, .whole = true };
        int r;

        r = check_gather(h, timeout_ms, ret_view);
        if (r < 0)
                return r;
        r = ae_handle_check_unit(h, unit);
        if (r < 0)
                return r;
        want.len = h->layout->units[unit].len;
        if (want.len == 0) {
                empty_view(h, unit, ret_view);
                return 0;
        }
        want.versioned = is_versioned(h, unit);
        return gather(h, &want, timeout_ms, ret_view);
}

int autoep_gather(autoep *h, uint32_t unit, int timeout_ms, struct autoep_view *ret_view)
{
        return ae_api("autoep_gather", gather_unit(h, unit, timeout_ms, ret_view));
}

static int want_range(const struct autoep *h, uint32_t tensor, uint64_t first, uint64_t n,
                      struct want *ret_want)
{
        const struct ae_layout_tensor *t;
        const struct ae_layout_segment *segment;
        uint64_t size;
        int r;

        r = ae_handle_check_tensor(h, tensor);
        if (r < 0)
                return r;
        t = &h->layout->tensors[tensor];
        if (t->segment == AE_LAYOUT_NONE)
                return ae_fail(AE_EINVAL, "tensor '%s' is an expert's: its values are in the "
                               "workers", t->name);
        if (n == 0 || !ae_range_ok(first, n, t->n))
                return ae_fail(AE_EINVAL, "%llu elements from %llu on are not a part of tensor "
                               "'%s' with %llu elements", (unsigned long long)n,
                               (unsigned long long)first, t->name, (unsigned long long)t->n);
        segment = &h->layout->segments[t->segment];
        size = ae_dtype_size(segment->dtype);
        *ret_want = (struct want){ .unit = segment->unit, .len = n * size,
                                   .first = segment->unit_off + (t->first + first) * size,
                                   .versioned = segment->trainable };
        return 0;
}

static int gather_range(struct autoep *h, uint32_t tensor, uint64_t first, uint64_t n,
                        int timeout_ms, struct autoep_view *ret_view)
{
        struct want want;
        int r;

        r = check_gather(h, timeout_ms, ret_view);
        if (r < 0)
                return r;
        r = want_range(h, tensor, first, n, &want);
        return r < 0 ? r : gather(h, &want, timeout_ms, ret_view);
}

int autoep_gather_range(autoep *h, uint32_t tensor, uint64_t first, uint64_t n, int timeout_ms,
                        struct autoep_view *ret_view)
{
        return ae_api("autoep_gather_range",
                      gather_range(h, tensor, first, n, timeout_ms, ret_view));
}

/* Also on a handle whose daemon was lost, so that cleaning up works; not in a forked child. */
static int release(struct autoep *h, struct autoep_view *view)
{
        int r = ae_handle_enter(h);

        if (r < 0 && !ae_handle_is_lost(h))
                return r;
        if (!view || !view->data || !h->holds)
                return ae_fail(AE_EINVAL, "the view is not held: it was never gathered, or was "
                               "released before");
        if (view->slot != AE_LOCAL_SLOT_NONE) {
                r = ae_holds_drop(h, view->slot);
                if (r < 0)
                        return r;
        }
        *view = (struct autoep_view)AUTOEP_VIEW_INIT;
        return 0;
}

int autoep_release(autoep *h, struct autoep_view *view)
{
        return ae_api("autoep_release", release(h, view));
}

const void *autoep_view_tensor(const autoep *h, const struct autoep_view *view, uint32_t tensor)
{
        const struct ae_layout_segment *segment;
        const struct ae_layout_tensor *t;

        if (ae_handle_enter(h) < 0 || !view || !view->data || tensor >= h->layout->n_tensors)
                return NULL;
        t = &h->layout->tensors[tensor];
        if (t->segment == AE_LAYOUT_NONE)
                return NULL;
        segment = &h->layout->segments[t->segment];
        if (segment->unit != view->unit || view->len != h->layout->units[view->unit].len)
                return NULL;
        return (const uint8_t *)view->data + segment->unit_off +
               t->first * ae_dtype_size(segment->dtype);
}

static int prefetch(struct autoep *h, const uint32_t *units, size_t n)
{
        int r = ae_handle_enter(h);

        if (r < 0)
                return r;
        for (size_t i = 0; i < n; i++) {
                r = ae_handle_check_unit(h, units[i]);
                if (r < 0)
                        return r;
        }
        for (size_t i = 0; i < n && r == 0; i++) {
                struct ae_local_sqe sqe = { .op = AE_SQ_PREFETCH, .unit = units[i] };

                r = ae_queue_post(h, &sqe, true);
        }
        return r == AE_QUEUE_FULL ? 0 : r; /* a hint is lost, nothing else */
}

int autoep_prefetch(autoep *h, const uint32_t *units, size_t n)
{
        return ae_api("autoep_prefetch", prefetch(h, units, n));
}
