/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dispatch carries tokens to their experts, combine carries the experts' outputs back and adds
 * them up with the router's weights; each with its backward. All follow one plan.
 *
 *   dispatch forward   rows[j] = tokens[t] for each pair (t, k)
 *   dispatch backward  dtokens[t] = drow(t,0) + drow(t,1) + ...
 *   combine forward    out[t] = w[t,0] * row(t,0) + w[t,1] * row(t,1) + ...
 *   combine backward   drow(t,k) = w[t,k] * dout[t];  dw[t,k] = <dout[t], row(t,k)>
 *
 * Sums over k go in k order in the element's type; <,> in index order in double, rounded once. Rows
 * of experts ("expert rows") are [plan->n_rows][width] in expert-major order; expert e's are
 * [expert_first[e], expert_first[e + 1]). Every rank of the group makes every call.
 *
 * Errors of all four: those of the exchange, AE_ENOMEM while the workspace still grows,
 * AE_EOVERFLOW when rows * width is beyond the address space. One thread per workspace.
 */
#pragma once

#include "client/experts/buffer.h"
#include "client/experts/comm.h"
#include "client/experts/plan.h"
#include "client/experts/real.h"

#include <stddef.h>
#include <stdint.h>

/* A workspace, reusable for any plan; it grows to the largest exchange seen and stays. */
struct ae_dispatch {
        struct ae_buffer sorted; /* rows in sorted order, on this rank's side */
        struct ae_buffer landed; /* rows in source-major order, on the experts' side */
        struct ae_buffer lens;   /* block lengths, to and from */
};

#define AE_DISPATCH_INIT { { 0 }, { 0 }, { 0 } }

void ae_dispatch_deinit(struct ae_dispatch *dispatch); /* accepts a zeroed struct */

/* What all calls need; borrowed. */
struct ae_dispatch_call {
        struct ae_comm *ep;
        const struct ae_plan *plan; /* built with ep */
        enum ae_real real;          /* of tokens, rows and weights */
        size_t width;               /* elements of a token */
        uint64_t deadline_ns;
};

/* @tokens [n_tokens][width] to expert rows @rows. */
int ae_dispatch_forward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                        const void *tokens, void *rows);
/* Expert rows @drows to @dtokens [n_tokens][width], overwritten. */
int ae_dispatch_backward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                         const void *drows, void *dtokens);

struct ae_combine {
        const void *rows;   /* expert rows */
        const void *weight; /* [n_tokens][top_k] */
        void *kept;         /* out, [n_sent][width]: the rows that came back, which the backward
                             * reads for the gradient of the weights */
        void *out;          /* out, [n_tokens][width] */
};
int ae_combine_forward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                       const struct ae_combine *combine);

struct ae_combine_grads {
        const void *dout;   /* [n_tokens][width] */
        const void *weight; /* [n_tokens][top_k] */
        const void *kept;   /* from the forward */
        void *drows;        /* out, expert rows */
        void *dweight;      /* out, [n_tokens][top_k] */
};
int ae_combine_backward(struct ae_dispatch *dispatch, const struct ae_dispatch_call *call,
                        const struct ae_combine_grads *grads);
