/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model: a byte-level transformer with mixture-of-experts feed-forward layers.
 *
 *   x = embed[token]
 *   for each layer: x += attn_out(attention(norm(x)));  h = norm(x);  x += experts(h) + shared(h)
 *   logits = norm(x) head^T
 *
 * It gathers each unit before it uses it, releases it afterwards, and scatters the unit's gradient
 * when the backward pass has it. A rank without tokens gathers and scatters nothing and only serves
 * its experts. One thread; there is one table of functions per number type.
 */
#pragma once

#include "client/examples/moe-lm/backend.h"

#include <stddef.h>
#include <stdint.h>

struct lm_model;

/* Tokens of one rank and micro-batch; borrowed. Sequence q is tokens [seq_first[q],
 * seq_first[q + 1]). */
struct lm_batch {
        const uint8_t *tokens, *targets; /* [n_tokens] */
        const size_t *seq_first;         /* [n_seqs + 1], from 0 */
        size_t n_tokens, n_seqs;
};

/* The experts that tokens chose in training, for the check; lies in the caller. */
struct lm_route_log {
        int32_t *idx;    /* [layers][max_tokens][top_k] of the next call */
        double *gap;     /* [layers][max_tokens]: by how much the last chosen expert beat the best
                          * that was not chosen; NULL: not wanted */
};

struct lm_train {
        const struct lm_batch *batch;
        double loss_scale;        /* of gradients: 1 for the sum over tokens */
        uint64_t *counts;         /* [layers][experts]: tokens are added; NULL: not counted */
        const struct lm_route_log *log; /* NULL: not wanted */
};

struct lm_model_ops {
        enum ae_real real;
        /* Room for batches of up to @max_tokens. @backend computes in the same number type. */
        int (*new)(struct lm_backend *backend, size_t max_tokens, struct lm_model **ret_model);
        struct lm_model *(*free)(struct lm_model *model); /* returns NULL */
        /* Forward and backward; the loss is summed over tokens. Collective over the EP group. */
        int (*train)(struct lm_model *model, const struct lm_train *train, double *ret_loss);
        /* Forward alone. @logits: NULL, or the last token's [LM_VOCAB]; untouched without one. */
        int (*evaluate)(struct lm_model *model, const struct lm_batch *batch, double *ret_loss,
                        double *logits);
};

extern const struct lm_model_ops lm_model_f32, lm_model_f64;

static inline const struct lm_model_ops *lm_model_ops(enum ae_real real)
{
        return real == AE_REAL_F64 ? &lm_model_f64 : &lm_model_f32;
}
