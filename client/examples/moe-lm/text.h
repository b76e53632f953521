/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Training text and the order in which it is used. All files named, and all regular files of the
 * folders named (links followed, each file once, in order of name), are read as bytes, one after
 * the other; the last 5 % are held out. A batch is a pure function of (seed, step, micro-batch,
 * rank), so that any process can make that of any rank.
 */
#pragma once

#include "client/examples/moe-lm/model.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LM_TEXT_MAX ((size_t)1 << 30)
#define LM_TEXT_DEFAULT "/usr/share/common-licenses"

struct lm_text {
        uint8_t *bytes;  /* owned */
        size_t n;
        size_t n_train;  /* the first so many are for training */
};

/* @paths: @n files or folders. AE_ENOENT, AE_ESYS, AE_EINVAL when there is too little text for
 * sequences of @seq; the error names the path. */
int lm_text_open(struct lm_text *text, const char *const *paths, size_t n, size_t seq);
void lm_text_deinit(struct lm_text *text); /* accepts a zeroed struct */

/* How text is dealt out. */
struct lm_deal {
        const struct lm_text *text; /* borrowed */
        uint64_t seed;
        uint32_t world, accumulate;
        uint32_t n_seqs;            /* sequences of a rank and micro-batch, at most */
        uint32_t seq;               /* tokens of a sequence, at most */
        bool uneven;                /* ranks' token counts differ; in turn one has none */
};

/* A batch with its memory. */
struct lm_dealt {
        struct lm_batch batch;
        uint8_t *bytes;             /* owned */
        size_t *seq_first;          /* owned */
};

int lm_dealt_init(struct lm_dealt *dealt, const struct lm_deal *deal); /* AE_ENOMEM */
void lm_dealt_deinit(struct lm_dealt *dealt);

struct lm_turn {
        uint64_t step;
        uint32_t micro, rank;
};
void lm_deal_train(const struct lm_deal *deal, const struct lm_turn *turn, struct lm_dealt *dealt);
/*
 * The held-out windows of @rank in @round; empty when there are no more for it. Returns how many
 * rounds there are.
 */
uint64_t lm_deal_held_out(const struct lm_deal *deal, uint64_t round, uint32_t rank,
                          struct lm_dealt *dealt);
