/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Causal multi-head attention with rotary positions (Su et al. 2021), between the projections: from
 * queries, keys and values side by side in rows of 3 * dim to outputs in rows of dim, and back.
 * Sequences are runs of rows; head h has columns [h * head_dim, (h + 1) * head_dim) of each third.
 */
#pragma once

#include "client/examples/moe-lm/real.h"

#include <stddef.h>
#include <stdint.h>

#define lm_attention_init LM_NAME(lm_attention_init)
#define lm_attention_deinit LM_NAME(lm_attention_deinit)
#define lm_attention_forward LM_NAME(lm_attention_forward)
#define lm_attention_backward LM_NAME(lm_attention_backward)

/* What all layers share. */
struct lm_attention {
        size_t heads, head_dim, dim, seq; /* seq: the longest sequence */
        real *angles;  /* owned; [seq][head_dim / 2] of (cosine, sine) */
        real *scratch; /* owned; [seq][seq] */
};

/* The rows of a batch: sequence q has rows [seq_first[q], seq_first[q + 1]). */
struct lm_rows {
        const size_t *seq_first;
        size_t n_seqs;
};

/* AE_ENOMEM. */
int lm_attention_init(struct lm_attention *attention, size_t dim, size_t heads, size_t seq);
void lm_attention_deinit(struct lm_attention *attention);

/*
 * Turns queries and keys of @qkv by their positions, in place, and keeps the attention
 * probabilities in @prob: for each sequence of T rows heads * T * T of them, back to back.
 */
void lm_attention_forward(const struct lm_attention *attention, const struct lm_rows *rows,
                          real *qkv, real *prob, real *out);

struct lm_attention_grads {
        const real *qkv, *prob; /* as the forward left them */
        const real *dout;
        real *dqkv;             /* of the unturned queries, keys and values; overwritten */
};
void lm_attention_backward(const struct lm_attention *attention, const struct lm_rows *rows,
                           const struct lm_attention_grads *grads);
