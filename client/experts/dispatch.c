/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Token dispatch and combine over an EP group: permute, exchange, regroup, and the reverse. Runs
 * on the caller's thread; nothing is allocated once the workspace has grown.
 */
#include "client/experts/dispatch.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/local.h"

#include <assert.h>
#include <stdbool.h>
#include <string.h>

struct row_shape {
        size_t n_tokens;
        uint32_t top_k;
        size_t width;
};

#define REAL float
#define NAME(name) name##_f32
#include "client/experts/dispatch-real.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(name) name##_f64
#include "client/experts/dispatch-real.h"
#undef REAL
#undef NAME

void ae_dispatch_deinit(struct ae_dispatch *dispatch)
{
        ae_buffer_deinit(&dispatch->sorted);
        ae_buffer_deinit(&dispatch->landed);
        ae_buffer_deinit(&dispatch->lens);
}

static size_t row_len(const struct ae_dispatch_call *call)
{
        return call->width * call->real;
}

static struct row_shape shape_of(const struct ae_dispatch_call *call)
{
        return (struct row_shape){ .n_tokens = call->plan->n_tokens, .top_k = call->plan->top_k,
                                   .width = call->width };
}

/* Sizes the workspace for the call: @sorted says whether its sorted rows are wanted. */
static int reserve(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call, bool sorted)
{
        const struct ae_plan *plan = call->plan;
        size_t len, sorted_len, landed_len;
        int r;

        assert(call->ep->size == plan->ep_size);
        if (ae_mul_overflows(call->width, (size_t)call->real, &len) ||
            ae_mul_overflows(plan->n_sent, len, &sorted_len) ||
            ae_mul_overflows(plan->n_rows, len, &landed_len))
                return ae_fail(AE_EOVERFLOW,
                               "cannot exchange %zu and %zu rows of %zu elements: beyond the "
                               "address space",
                               plan->n_sent, plan->n_rows, call->width);
        r = ae_buffer_reserve(&dispatch->lens, 2 * (size_t)plan->ep_size * sizeof(uint64_t));
        if (r < 0)
                return r;
        r = ae_buffer_reserve(&dispatch->landed, ae_plan_is_grouped(plan) ? 0 : landed_len);
        if (r < 0)
                return r;
        return ae_buffer_reserve(&dispatch->sorted, sorted ? sorted_len : 0);
}

/* The byte lengths of what goes to the experts and what comes from them, from the row counts. */
static void fill_lens(const struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                      uint64_t **ret_sent, uint64_t **ret_received)
{
        const struct ae_plan *plan = call->plan;
        uint64_t *sent = dispatch->lens.data, *received = sent + plan->ep_size;

        for (uint32_t p = 0; p < plan->ep_size; p++) {
                sent[p] = plan->send_rows[p] * row_len(call);
                received[p] = plan->recv_rows[p] * row_len(call);
        }
        *ret_sent = sent;
        *ret_received = received;
}

/* Copies all rows from source-major to expert-major. */
static void group_rows(const struct ae_dispatch_call *call, const char *landed, char *rows)
{
        const struct ae_plan *plan = call->plan;

        for (size_t run = 0; run < plan->n_experts; run++) {
                const size_t len = plan->recv_counts[run] * row_len(call);

                if (len == 0)
                        continue;
                memcpy(rows + plan->run_first[run] * row_len(call), landed, len);
                landed += len;
        }
}

/* And back. */
static void ungroup_rows(const struct ae_dispatch_call *call, char *landed, const char *rows)
{
        const struct ae_plan *plan = call->plan;

        for (size_t run = 0; run < plan->n_experts; run++) {
                const size_t len = plan->recv_counts[run] * row_len(call);

                if (len == 0)
                        continue;
                memcpy(landed, rows + plan->run_first[run] * row_len(call), len);
                landed += len;
        }
}

/* Sorted rows of this rank to expert rows. */
static int travel_out(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                      const void *sorted, void *rows)
{
        const bool grouped = ae_plan_is_grouped(call->plan);
        void *landed = grouped ? rows : dispatch->landed.data;
        uint64_t *sent, *received;
        int r;

        fill_lens(dispatch, call, &sent, &received);
        call->ep->kind = AE_COLLECTIVE_DISPATCH;
        r = ae_comm_alltoallv(call->ep, sorted, sent, landed, received, call->deadline_ns);
        call->ep->kind = AE_COLLECTIVE_EXCHANGE;
        if (r < 0)
                return r;
        if (!grouped)
                group_rows(call, landed, rows);
        return 0;
}

/* Expert rows to the sorted rows of this rank. */
static int travel_back(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                       const void *rows, void *sorted)
{
        const void *landed = rows;
        uint64_t *sent, *received;
        int r;

        fill_lens(dispatch, call, &sent, &received);
        if (!ae_plan_is_grouped(call->plan)) {
                ungroup_rows(call, dispatch->landed.data, rows);
                landed = dispatch->landed.data;
        }
        call->ep->kind = AE_COLLECTIVE_COMBINE;
        r = ae_comm_alltoallv(call->ep, landed, received, sorted, sent, call->deadline_ns);
        call->ep->kind = AE_COLLECTIVE_EXCHANGE;
        return r;
}

int ae_dispatch_forward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                        const void *tokens, void *rows)
{
        const uint32_t *slots = ae_plan_slots(call->plan);
        const size_t len = row_len(call);
        int r = reserve(dispatch, call, true);

        if (r < 0)
                return r;
        for (size_t i = 0; len > 0 && i < call->plan->n_sent; i++)
                memcpy((char *)dispatch->sorted.data + slots[i] * len,
                       (const char *)tokens + i / call->plan->top_k * len, len);
        return travel_out(dispatch, call, dispatch->sorted.data, rows);
}

static void fold_all(const struct ae_dispatch_call *call, void *to, const void *rows,
                     const void *weight)
{
        const struct row_shape shape = shape_of(call);
        const uint32_t *slots = ae_plan_slots(call->plan);

        if (call->real == AE_REAL_F32)
                fold_all_f32(to, rows, slots, weight, &shape);
        else
                fold_all_f64(to, rows, slots, weight, &shape);
}

int ae_dispatch_backward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                         const void *drows, void *dtokens)
{
        int r = reserve(dispatch, call, true);

        if (r < 0)
                return r;
        r = travel_back(dispatch, call, drows, dispatch->sorted.data);
        if (r < 0)
                return r;
        fold_all(call, dtokens, dispatch->sorted.data, NULL);
        return 0;
}

int ae_combine_forward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                       const struct ae_combine *combine)
{
        int r = reserve(dispatch, call, false);

        if (r < 0)
                return r;
        r = travel_back(dispatch, call, combine->rows, combine->kept);
        if (r < 0)
                return r;
        fold_all(call, combine->out, combine->kept, combine->weight);
        return 0;
}

int ae_combine_backward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                        const struct ae_combine_grads *grads)
{
        const struct row_shape shape = shape_of(call);
        const uint32_t *slots = ae_plan_slots(call->plan);
        int r = reserve(dispatch, call, true);

        if (r < 0)
                return r;
        if (call->real == AE_REAL_F32)
                spread_f32(dispatch->sorted.data, grads, slots, &shape);
        else
                spread_f64(dispatch->sorted.data, grads, slots, &shape);
        return travel_out(dispatch, call, dispatch->sorted.data, grads->drows);
}
