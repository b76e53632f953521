/* SPDX-License-Identifier: Apache-2.0 */
/* The private table of holds, see holds.h. */
#include "client/holds.h"

#include "client/error.h"

#include <assert.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#define HOLDS_BUSY UINT32_MAX /* the count of a slot whose first or last hold is being made */
#define HOLDS_SPINS 100
#define HOLDS_NAMED 4         /* units in a text */

struct hold {
        _Atomic uint32_t count; /* pairs with itself: acquire to enter BUSY, release to leave it */
        _Atomic uint32_t unit;
        uint64_t len;           /* guarded by BUSY */
        bool range;             /* likewise */
};

struct ae_holds {
        _Atomic uint64_t len;     /* bytes of all slots held, never above hold_len */
        _Atomic uint32_t n_slots; /* how many */
        _Atomic uint32_t n_ranges; /* of them, never above AE_LOCAL_RANGES_MAX */
        struct hold slots[];
};

int ae_holds_new(struct autoep *h)
{
        assert(!h->holds);
        h->holds = calloc(1, sizeof(*h->holds) + h->n_slots * sizeof(h->holds->slots[0]));
        if (!h->holds)
                return ae_fail(AE_ENOMEM, "no memory for a table of %u cache slots", h->n_slots);
        return 0;
}

void ae_holds_free(struct autoep *h)
{
        free(h->holds);
        h->holds = NULL;
}

uint64_t ae_holds_len(const struct autoep *h)
{
        return atomic_load_explicit(&h->holds->len, memory_order_relaxed);
}

bool ae_holds_over(const struct autoep *h, uint64_t len)
{
        uint64_t held = ae_holds_len(h);

        return held > h->hold_len || len > h->hold_len - held;
}

int ae_holds_fail_over(const struct autoep *h, uint32_t unit, uint64_t len)
{
        return ae_fail(AE_EBUDGET, "unit '%s' (%u) has %llu bytes, %llu of the %llu that this "
                       "process may hold in views are held already: release some, or open with a "
                       "larger hold_len",
                       ae_handle_unit_name(h, unit), unit, (unsigned long long)len,
                       (unsigned long long)ae_holds_len(h), (unsigned long long)h->hold_len);
}

int ae_holds_check_ranges(const struct autoep *h)
{
        uint32_t n = atomic_load_explicit(&h->holds->n_ranges, memory_order_relaxed);

        if (n < AE_LOCAL_RANGES_MAX)
                return 0;
        return ae_fail(AE_EBUDGET, "this process holds %u views of ranges, as many as it may: "
                       "release some, or gather more of them as one", n);
}

static bool reserve_range(struct autoep *h)
{
        uint32_t n = atomic_load_explicit(&h->holds->n_ranges, memory_order_relaxed);

        do {
                if (n >= AE_LOCAL_RANGES_MAX)
                        return false;
        } while (!atomic_compare_exchange_weak_explicit(&h->holds->n_ranges, &n, n + 1,
                                                        memory_order_relaxed,
                                                        memory_order_relaxed));
        return true;
}

static void give_range(struct autoep *h)
{
        atomic_fetch_sub_explicit(&h->holds->n_ranges, 1, memory_order_relaxed);
}

static bool reserve(struct autoep *h, uint64_t len, bool range)
{
        uint64_t held = ae_holds_len(h);

        if (range && !reserve_range(h))
                return false;
        do {
                if (len > h->hold_len - held) {
                        if (range)
                                give_range(h);
                        return false;
                }
        } while (!atomic_compare_exchange_weak_explicit(&h->holds->len, &held, held + len,
                                                        memory_order_relaxed,
                                                        memory_order_relaxed));
        return true;
}

static void relax(int *spins)
{
        if (++*spins > HOLDS_SPINS)
                (void)sched_yield(); /* who made it busy isn't running */
}

/* The slot is BUSY and ours. */
static int take_first(struct autoep *h, struct hold *hold, uint32_t unit, uint64_t len, bool range)
{
        if (!reserve(h, len, range)) {
                atomic_store_explicit(&hold->count, 0, memory_order_release);
                return AE_HOLDS_OVER;
        }
        hold->len = len;
        hold->range = range;
        atomic_store_explicit(&hold->unit, unit, memory_order_relaxed);
        atomic_fetch_add_explicit(&h->holds->n_slots, 1, memory_order_relaxed);
        atomic_store_explicit(&hold->count, 1, memory_order_release);
        return 0;
}

int ae_holds_take(struct autoep *h, uint32_t slot, uint32_t unit, uint64_t len, bool range)
{
        struct hold *hold = &h->holds->slots[slot];
        uint32_t count = atomic_load_explicit(&hold->count, memory_order_relaxed);
        int spins = 0;

        assert(slot < h->n_slots);
        for (;;) {
                uint32_t to = count ? count + 1 : HOLDS_BUSY;

                if (count == HOLDS_BUSY) {
                        relax(&spins);
                        count = atomic_load_explicit(&hold->count, memory_order_relaxed);
                        continue;
                }
                if (!atomic_compare_exchange_weak_explicit(&hold->count, &count, to,
                                                           memory_order_acquire,
                                                           memory_order_relaxed))
                        continue;
                return count ? 0 : take_first(h, hold, unit, len, range);
        }
}

static void drop_last(struct autoep *h, struct hold *hold)
{
        if (hold->range)
                give_range(h);
        atomic_fetch_sub_explicit(&h->holds->len, hold->len, memory_order_relaxed);
        atomic_fetch_sub_explicit(&h->holds->n_slots, 1, memory_order_relaxed);
        atomic_store_explicit(&hold->count, 0, memory_order_release);
}

int ae_holds_drop(struct autoep *h, uint32_t slot)
{
        struct hold *hold;
        uint32_t count;
        int spins = 0;

        if (slot >= h->n_slots)
                return ae_fail(AE_EINVAL, "the view's slot %u does not exist", slot);
        hold = &h->holds->slots[slot];
        count = atomic_load_explicit(&hold->count, memory_order_relaxed);
        for (;;) {
                uint32_t to = count == 1 ? HOLDS_BUSY : count - 1;

                if (count == 0)
                        return ae_fail(AE_EINVAL, "the view is not held: it was released before");
                if (count == HOLDS_BUSY) {
                        relax(&spins);
                        count = atomic_load_explicit(&hold->count, memory_order_relaxed);
                        continue;
                }
                if (atomic_compare_exchange_weak_explicit(&hold->count, &count, to,
                                                          memory_order_acq_rel,
                                                          memory_order_relaxed))
                        break;
        }
        if (count == 1)
                drop_last(h, hold);
        /* Release: what this thread read in the view comes before. Pairs with the daemon's look. */
        atomic_fetch_sub_explicit(&h->page->holds[slot], 1, memory_order_release);
        return 0;
}

bool ae_holds_has(const struct autoep *h, uint32_t unit)
{
        for (uint32_t i = 0; i < h->n_slots; i++) {
                const struct hold *hold = &h->holds->slots[i];

                if (atomic_load_explicit(&hold->count, memory_order_relaxed) &&
                    atomic_load_explicit(&hold->unit, memory_order_relaxed) == unit)
                        return true;
        }
        return false;
}

int ae_holds_check_none(const struct autoep *h)
{
        char names[512] = "";
        size_t used = 0;
        uint32_t n = 0;

        if (atomic_load_explicit(&h->holds->n_slots, memory_order_relaxed) == 0)
                return 0;
        for (uint32_t i = 0; i < h->n_slots; i++) {
                uint32_t unit = atomic_load_explicit(&h->holds->slots[i].unit,
                                                     memory_order_relaxed);

                if (!atomic_load_explicit(&h->holds->slots[i].count, memory_order_relaxed))
                        continue;
                if (n++ >= HOLDS_NAMED || used >= sizeof(names))
                        continue;
                used += (size_t)snprintf(names + used, sizeof(names) - used, "%s'%.96s' (%u)",
                                         n > 1 ? ", " : "", ae_handle_unit_name(h, unit), unit);
        }
        if (n == 0)
                return 0; /* released by another thread just now */
        return ae_fail(AE_EHELD, "views of %u units are held: %s%s; release them first", n, names,
                       n > HOLDS_NAMED ? ", …" : "");
}
