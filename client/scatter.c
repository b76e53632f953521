/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scatter: the caller's gradients are copied into the ring as pieces of the units' gradient images.
 * Any thread; one at a time has the handle's ticket, because pieces must be announced in the order
 * in which they stand in the ring. Without a wait there is no lock and no system call but the one
 * that wakes the daemon.
 */
#include "client/error.h"
#include "client/plan.h"
#include "client/queue.h"
#include "proto/base/num.h"

#include <string.h>

struct scatter {
        uint32_t unit;
        const struct autoep_gradient *gradients; /* borrowed: the caller's */
        size_t n;
        uint32_t flags;
        struct ae_plan *plan; /* borrowed from the handle */
        uint32_t dtype;       /* of the pieces */
        size_t size;          /* of an element */
        struct ae_deadline deadline;
};

/* One piece: elements [first, first + n) of the image of the lane's unit. */
struct piece {
        const struct ae_plan_lane *lane;
        uint64_t first, n;
};

/* ---- checks ----------------------------------------------------------------------------- */

static const struct autoep_gradient *find_gradient(const struct scatter *s, uint32_t index)
{
        uint32_t tensor = s->plan->tensors[index];

        if (index < s->n && s->gradients[index].tensor == tensor)
                return &s->gradients[index]; /* most callers keep the order of registration */
        for (size_t i = 0; i < s->n; i++) {
                if (s->gradients[i].tensor == tensor)
                        return &s->gradients[i];
        }
        return NULL;
}

static bool is_of_plan(const struct ae_plan *plan, uint32_t tensor)
{
        for (uint32_t i = 0; i < plan->n_tensors; i++) {
                if (plan->tensors[i] == tensor)
                        return true;
        }
        return false;
}

/* The gradient that doesn't belong, or is there twice. */
static int explain_surplus(const struct autoep *h, const struct scatter *s)
{
        for (size_t i = 0; i < s->n; i++) {
                uint32_t tensor = s->gradients[i].tensor;
                int r = ae_check_size("autoep_gradient", s->gradients[i].size,
                                      sizeof(s->gradients[i]));

                if (r == 0)
                        r = ae_handle_check_tensor(h, tensor);
                if (r < 0)
                        return r;
                if (!is_of_plan(s->plan, tensor))
                        return ae_fail(AE_EINVAL, "tensor '%s' is frozen, a buffer, an expert's or "
                                       "not of unit '%s': leave it out",
                                       ae_handle_tensor_name(h, tensor),
                                       ae_handle_unit_name(h, s->unit));
                for (size_t k = 0; k < i; k++) {
                        if (s->gradients[k].tensor == tensor)
                                return ae_fail(AE_EINVAL, "tensor '%s' is given twice",
                                               ae_handle_tensor_name(h, tensor));
                }
        }
        return 0;
}

static int check_gradient(const struct autoep *h, const struct scatter *s, uint32_t index)
{
        uint32_t tensor = s->plan->tensors[index];
        const struct autoep_gradient *g = find_gradient(s, index);
        int r;

        if (!g)
                return ae_fail(AE_EINVAL, "the gradient of tensor '%s' is missing: a unit is "
                               "scattered with all its trainable tensors",
                               ae_handle_tensor_name(h, tensor));
        r = ae_check_size("autoep_gradient", g->size, sizeof(*g));
        if (r < 0)
                return r;
        if (g->dtype != AUTOEP_F32 && g->dtype != AUTOEP_BF16)
                return ae_fail(AE_EINVAL, "the gradient of tensor '%s' has dtype %u: use "
                               "AUTOEP_F32 or AUTOEP_BF16", ae_handle_tensor_name(h, tensor),
                               g->dtype);
        if (!g->data && h->layout->tensors[tensor].n > 0)
                return ae_fail(AE_EINVAL, "the gradient of tensor '%s' has no data",
                               ae_handle_tensor_name(h, tensor));
        return 0;
}

/* All trainable tensors once: as many as there are, and each is found. */
static int check_gradients(const struct autoep *h, struct scatter *s)
{
        int r;

        if (s->n > 0 && !s->gradients)
                return ae_fail(AE_EINVAL, "%zu gradients at address NULL", s->n);
        if (s->plan->n_tensors == 0)
                return ae_fail(AE_EINVAL, "unit '%s' has no trainable tensors",
                               ae_handle_unit_name(h, s->unit));
        if (s->n != s->plan->n_tensors) {
                r = explain_surplus(h, s);
                if (r < 0)
                        return r;
        }
        s->dtype = AUTOEP_BF16;
        for (uint32_t i = 0; i < s->plan->n_tensors; i++) {
                r = check_gradient(h, s, i);
                if (r < 0) {
                        int surplus = explain_surplus(h, s);

                        return surplus < 0 ? surplus : r;
                }
                if (find_gradient(s, i)->dtype == AUTOEP_F32)
                        s->dtype = AUTOEP_F32; /* narrower ones are widened, which is exact */
        }
        assert(s->n == s->plan->n_tensors);
        s->size = ae_dtype_size(s->dtype);
        return 0;
}

/* With the ticket. */
static int check_round(const struct autoep *h, const struct scatter *s)
{
        uint32_t micro = atomic_load_explicit(&h->micro, memory_order_relaxed);

        if (atomic_load_explicit(&h->asked, memory_order_relaxed) ||
            atomic_load_explicit(&h->refused, memory_order_relaxed))
                return ae_fail(AE_ESTATE, "the step of round %llu is asked for already: call "
                               "autoep_step() again for its verdict",
                               (unsigned long long)h->asked_round);
        if (s->plan->last)
                return ae_fail(AE_ESTATE, "unit '%s' (%u) was scattered with AUTOEP_LAST in round "
                               "%llu", ae_handle_unit_name(h, s->unit), s->unit,
                               (unsigned long long)ae_handle_round(h));
        if (s->plan->cut && s->plan->flags != s->flags)
                return ae_fail(AE_EINVAL, "unit '%s' (%u) is scattered in part %s AUTOEP_LAST: go "
                               "on with the same flags", ae_handle_unit_name(h, s->unit), s->unit,
                               s->plan->flags & AUTOEP_LAST ? "with" : "without");
        if (s->plan->next_micro == micro + 1)
                return ae_fail(AE_EEXIST, "unit '%s' (%u) is scattered already in micro-batch %u "
                               "of round %llu", ae_handle_unit_name(h, s->unit), s->unit, micro,
                               (unsigned long long)ae_handle_round(h));
        return 0;
}

/* ---- pieces ----------------------------------------------------------------------------- */

/* Cuts the lane at the cells of its unit's image. */
static struct piece piece_at(const struct ae_plan_lane *lane, uint64_t done_n)
{
        uint64_t first = lane->first + done_n;
        uint64_t cell_left = AE_LOCAL_PIECE_N - first % AE_LOCAL_PIECE_N;

        return (struct piece){ .lane = lane, .first = first,
                               .n = AE_MIN(cell_left, lane->n - done_n) };
}

static void widen(float *to, const uint16_t *from, uint64_t n)
{
        for (uint64_t i = 0; i < n; i++) {
                uint32_t bits = (uint32_t)from[i] << 16;

                memcpy(&to[i], &bits, sizeof(bits));
        }
}

/* Elements [skip, skip + n) of @g to @to. */
static void copy_gradient(const struct scatter *s, const struct autoep_gradient *g, uint64_t skip,
                          uint64_t n, uint8_t *to)
{
        if (g->dtype == s->dtype)
                memcpy(to, (const uint8_t *)g->data + skip * s->size, n * s->size);
        else
                widen((float *)(void *)to, (const uint16_t *)g->data + skip, n);
}

/* Writes all bytes of the piece: tensors where they stand, zeros between them. */
static void fill_piece(const struct scatter *s, const struct piece *piece, uint8_t *to)
{
        const struct ae_plan_part *parts = &s->plan->parts[piece->lane->part_first];
        uint64_t end = piece->first + piece->n;
        uint64_t at = piece->first; /* written up to here */

        for (uint32_t i = 0; i < piece->lane->n_parts; i++) {
                uint64_t from = AE_MAX(parts[i].first, piece->first);
                uint64_t until = AE_MIN(parts[i].first + parts[i].n, end);

                if (from >= until)
                        continue;
                memset(to + (at - piece->first) * s->size, 0, (from - at) * s->size);
                copy_gradient(s, s->plan->given[parts[i].tensor], from - parts[i].first,
                              until - from, to + (from - piece->first) * s->size);
                at = until;
        }
        memset(to + (at - piece->first) * s->size, 0, (end - at) * s->size);
}

struct room {
        uint64_t end;  /* of the ring */
        uint32_t n;    /* entries of the queue */
};

/* 1, 0 or negative. */
static int fits(struct autoep *h, const struct room *room)
{
        int r = ae_ring_fits(&h->grad, room->end);

        return r <= 0 ? r : ae_queue_fits(h, room->n);
}

static bool room_changed(struct autoep *h, const struct ae_wait *wait)
{
        return fits(h, wait->arg) != 0;
}

/* Tells the daemon how much of the ring is wanted; NULL: nothing. */
static void want_room(struct autoep *h, const struct room *room)
{
        uint64_t wanted = room && room->end > h->grad.len ? room->end - h->grad.len : 0;

        atomic_store(&h->page->grad_wanted, wanted);
}

static int wait_for_room(struct autoep *h, const struct scatter *s, struct room *room)
{
        struct ae_wait wait = { .done = room_changed, .arg = room, .deadline = &s->deadline,
                                .waited_ns = &h->counters.scatter_wait_ns };
        int r;

        for (;;) {
                r = fits(h, room);
                if (r != 0)
                        return r < 0 ? r : 0;
                /* before the wait's first look; pairs with the fence of the daemon's free_ring() */
                want_room(h, room);
                r = ae_pump_wait(h, &wait);
                want_room(h, NULL);
                if (r < 0)
                        return ae_pump_prefix(r, "the ring of %llu bytes has no room for unit '%s' "
                                              "(%u) in round %llu", (unsigned long long)h->grad.len,
                                              ae_handle_unit_name(h, s->unit), s->unit,
                                              (unsigned long long)ae_handle_round(h));
        }
}

static int post_piece(struct autoep *h, const struct scatter *s, const struct piece *piece)
{
        uint64_t len = piece->n * s->size;
        uint64_t pos = ae_ring_place(&h->grad, h->grad.head, len);
        struct room room = { .end = pos + len, .n = 1 };
        struct ae_local_sqe sqe = { .op = AE_SQ_PIECE, .unit = piece->lane->unit,
                                    .use = piece->lane->use, .dtype = (uint16_t)s->dtype,
                                    .micro = atomic_load_explicit(&h->micro, memory_order_relaxed),
                                    .first = piece->first, .n = piece->n, .pos = pos,
                                    .len = (uint32_t)len };
        int r;

        r = wait_for_room(h, s, &room);
        if (r < 0)
                return r;
        fill_piece(s, piece, ae_ring_at(&h->grad, pos));
        r = ae_queue_post_wait(h, &sqe, &s->deadline);
        if (r == 0)
                h->grad.head = pos + len;
        return r;
}

static void mark_begun(struct autoep *h, const struct scatter *s)
{
        s->plan->cut = true; /* until all of it is posted */
        s->plan->flags = s->flags;
        atomic_store_explicit(&h->micro_open, true, memory_order_relaxed);
}

static int post_lane(struct autoep *h, const struct scatter *s)
{
        struct ae_plan *plan = s->plan;
        const struct ae_plan_lane *lane = &plan->lanes[plan->lane];
        struct ae_local_sqe sqe = { .op = AE_SQ_SCATTERED, .unit = lane->unit, .use = lane->use,
                                    .flags = s->flags & AUTOEP_LAST ? AE_SQ_LAST : 0,
                                    .micro = atomic_load_explicit(&h->micro,
                                                                  memory_order_relaxed) };
        int r;

        while (plan->done_n < lane->n) {
                struct piece piece = piece_at(lane, plan->done_n);

                r = post_piece(h, s, &piece);
                if (r < 0)
                        return r;
                mark_begun(h, s);
                plan->done_n += piece.n;
                ae_count(&h->counters.scatter_len, piece.n * s->size);
        }
        r = ae_queue_post_wait(h, &sqe, &s->deadline);
        if (r < 0)
                return r;
        mark_begun(h, s);
        plan->done_n = 0;
        plan->lane++;
        return 0;
}

/* What is still to be posted needs this much; how many bytes that is with gaps in the ring. */
static struct room need_of(const struct autoep *h, const struct scatter *s)
{
        struct room room = { .end = h->grad.head };
        uint64_t done_n = s->plan->done_n;

        for (uint32_t i = s->plan->lane; i < s->plan->n_lanes; i++) {
                const struct ae_plan_lane *lane = &s->plan->lanes[i];

                for (; done_n < lane->n; room.n++) {
                        struct piece piece = piece_at(lane, done_n);

                        room.end = ae_ring_place(&h->grad, room.end, piece.n * s->size) +
                                   piece.n * s->size;
                        done_n += piece.n;
                }
                room.n++; /* SCATTERED */
                done_n = 0;
        }
        return room;
}

static int check_room_now(struct autoep *h, const struct scatter *s)
{
        struct room room = need_of(h, s);
        int r;

        if (room.end - h->grad.head > h->grad.len || room.n > AE_LOCAL_SQ_LEN)
                return ae_fail(AE_EBUDGET, "unit '%s' (%u) needs %llu bytes of a ring of %llu and "
                               "never fits at once: scatter with a timeout, or open with a larger "
                               "ring_len", ae_handle_unit_name(h, s->unit), s->unit,
                               (unsigned long long)(room.end - h->grad.head),
                               (unsigned long long)h->grad.len);
        r = fits(h, &room);
        want_room(h, r == 0 ? &room : NULL);
        if (r != 0)
                return r < 0 ? r : 0;
        ae_queue_wake(h); /* what waits for its turn there is to go out of the way */
        return ae_fail(AE_EAGAIN, "the ring of %llu bytes has no room for unit '%s' (%u) now",
                       (unsigned long long)h->grad.len, ae_handle_unit_name(h, s->unit), s->unit);
}

/* ---- the call --------------------------------------------------------------------------- */

static bool ticket_free(struct autoep *h, const struct ae_wait *wait)
{
        (void)wait;
        return atomic_load(&h->scatter_ticket) == 0;
}

static int take_ticket(struct autoep *h, const struct scatter *s)
{
        for (;;) {
                struct ae_wait wait = { .done = ticket_free, .deadline = &s->deadline,
                                        .waited_ns = &h->counters.scatter_wait_ns };
                uint32_t none = 0;
                int r;

                if (atomic_compare_exchange_strong(&h->scatter_ticket, &none, 1))
                        return 0;
                if (s->deadline.timeout_ns == 0)
                        return ae_fail(AE_EAGAIN, "another thread is scattering on this handle");
                atomic_fetch_add(&h->n_ticket_waits, 1); /* pairs with drop_ticket() */
                r = ae_pump_wait(h, &wait);
                atomic_fetch_sub(&h->n_ticket_waits, 1);
                if (r < 0)
                        return ae_pump_prefix(r, "another thread is scattering on this handle");
        }
}

static void drop_ticket(struct autoep *h)
{
        atomic_store(&h->scatter_ticket, 0); /* seq_cst; pairs with ticket_free() */
        if (atomic_load(&h->n_ticket_waits) > 0)
                ae_pump_kick(h);
}

static int post_unit(struct autoep *h, const struct scatter *s)
{
        struct ae_plan *plan = s->plan;
        int r = check_round(h, s);

        if (r < 0)
                return r;
        if (s->deadline.timeout_ns == 0) {
                r = check_room_now(h, s);
                if (r < 0)
                        return r;
        }
        for (uint32_t i = 0; i < plan->n_tensors; i++)
                plan->given[i] = find_gradient(s, i);
        while (plan->lane < plan->n_lanes) {
                r = post_lane(h, s);
                if (r == AE_ETIMEDOUT && plan->cut)
                        return ae_fail(r, "%s; a part was taken: scatter the unit again to go on",
                                       ae_error_text());
                if (r < 0)
                        return r;
        }
        plan->next_micro = atomic_load_explicit(&h->micro, memory_order_relaxed) + 1;
        plan->last = s->flags & AUTOEP_LAST;
        plan->cut = false;
        plan->lane = 0;
        return 0;
}

static int scatter(struct autoep *h, struct scatter *s, int timeout_ms)
{
        int r = ae_handle_enter_rank(h, "scatter");

        if (r < 0)
                return r;
        r = ae_deadline_check(timeout_ms);
        if (r < 0)
                return r;
        if (s->flags & ~AUTOEP_LAST)
                return ae_fail(AE_EINVAL, "unknown flags %#x", s->flags & ~AUTOEP_LAST);
        r = ae_handle_check_unit(h, s->unit);
        if (r < 0)
                return r;
        s->plan = &h->plans[s->unit];
        r = check_gradients(h, s);
        if (r < 0)
                return r;
        ae_deadline_init(h, timeout_ms, &s->deadline);
        r = take_ticket(h, s);
        if (r < 0)
                return r;
        r = post_unit(h, s);
        drop_ticket(h);
        if (r == 0)
                ae_count(&h->counters.scatters, 1);
        return r;
}

int autoep_scatter(autoep *h, uint32_t unit, const struct autoep_gradient *gradients, size_t n,
                   uint32_t flags, int timeout_ms)
{
        struct scatter s = { .unit = unit, .gradients = gradients, .n = n, .flags = flags };

        return ae_api("autoep_scatter", scatter(h, &s, timeout_ms));
}
