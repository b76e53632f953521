/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mixture of experts of one layer, on client/experts: the router chooses, tokens are dispatched
 * to the ranks that hold the chosen experts, those compute, and what comes back is weighed and
 * added up. Every rank of the EP group makes every call, also with no tokens: that is a collective.
 */
#pragma once

#include "client/examples/moe-lm/backend.h"
#include "client/examples/moe-lm/real.h"
#include "client/experts/buffer.h"
#include "client/experts/dispatch.h"
#include "client/experts/plan.h"
#include "client/experts/route.h"

#include <stddef.h>
#include <stdint.h>

#define lm_moe_tools_init LM_NAME(lm_moe_tools_init)
#define lm_moe_tools_deinit LM_NAME(lm_moe_tools_deinit)
#define lm_moe_init LM_NAME(lm_moe_init)
#define lm_moe_deinit LM_NAME(lm_moe_deinit)
#define lm_moe_forward LM_NAME(lm_moe_forward)
#define lm_moe_backward LM_NAME(lm_moe_backward)

/* What all layers share. */
struct lm_moe_tools {
        struct lm_backend *backend;    /* borrowed */
        struct ae_route route;
        struct ae_dispatch dispatch;
        real *expert_room;             /* owned; one expert's weights, widened */
        struct ae_buffer drows_out, drows_in; /* gradients of experts' outputs and inputs */
        real *dlogits, *dweight, *dtokens;    /* owned; for the largest batch */
};

/* What a layer keeps from forward to backward. */
struct lm_moe {
        uint32_t layer;
        struct ae_plan plan;
        real *logits, *weight;         /* owned; [tokens][experts], [tokens][top_k] */
        int32_t *idx;                  /* owned; [tokens][top_k] */
        struct ae_buffer kept;         /* rows that came back */
        struct ae_buffer rows, outs;   /* expert rows: inputs and outputs */
        struct ae_buffer gate, up, mid;
};

int lm_moe_tools_init(struct lm_moe_tools *tools, struct lm_backend *backend, size_t max_tokens);
void lm_moe_tools_deinit(struct lm_moe_tools *tools);
int lm_moe_init(struct lm_moe *moe, const struct lm_moe_tools *tools, uint32_t layer,
                size_t max_tokens);
void lm_moe_deinit(struct lm_moe *moe);

struct lm_moe_tokens {
        size_t n_tokens;
        const real *x;       /* [tokens][dim] */
        const real *router;  /* [experts][dim]; may be NULL without tokens */
        const float *bias;   /* [experts] or NULL */
        uint64_t *counts;    /* [experts]: tokens per expert are added; NULL: not counted */
        real *out;           /* [tokens][dim], overwritten */
};
int lm_moe_forward(struct lm_moe_tools *tools, struct lm_moe *moe,
                   const struct lm_moe_tokens *tokens);

struct lm_moe_grads {
        const struct lm_moe_tokens *tokens;   /* as in the forward */
        const real *dout;
        real *dx, *drouter;  /* both are added to */
};
int lm_moe_backward(struct lm_moe_tools *tools, struct lm_moe *moe,
                    const struct lm_moe_grads *grads);
