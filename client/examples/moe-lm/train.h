/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The training loop over any backend: a step, evaluation, generation. One thread.
 *
 * Every function here is a collective over the ranks of the job: each calls it with the same
 * arguments. Evaluation too: held-out windows are dealt to the ranks, for the exchange of tokens
 * needs all of them; it gathers and never scatters.
 */
#pragma once

#include "client/examples/moe-lm/backend.h"
#include "client/examples/moe-lm/model.h"
#include "client/examples/moe-lm/options.h"
#include "client/examples/moe-lm/text.h"

struct lm_trainer {
        struct lm_backend *backend;        /* borrowed */
        const struct lm_model_ops *ops;
        struct lm_model *model;            /* owned */
        const struct lm_options *options;  /* borrowed */
        struct lm_deal deal;
        struct lm_dealt dealt;             /* owned */
        uint64_t *counts;                  /* owned; [layers][experts], of one step */
        uint64_t *all_counts;              /* owned; of the ranks played here, all steps */
        struct lm_route_log log;           /* owned; one call's for each turn of a step, or NULLs */
};

/* What became of a step; figures are of all ranks. */
struct lm_outcome {
        struct lm_verdict verdict;
        double loss;      /* per token */
        double tokens;
};

int lm_trainer_init(struct lm_trainer *trainer, struct lm_backend *backend,
                    const struct lm_text *text, const struct lm_options *options);
void lm_trainer_deinit(struct lm_trainer *trainer); /* accepts a zeroed struct */

/* Notes the experts that tokens choose from now on; the entries of a step are -1 before it. */
int lm_trainer_log_routes(struct lm_trainer *trainer);
/* Entries of the log: tokens times layers, over the turns of a step in this process. */
size_t lm_trainer_log_tokens(const struct lm_trainer *trainer);

int lm_train_step(struct lm_trainer *trainer, uint64_t step, struct lm_outcome *ret_outcome);
/* The mean loss of a token of the held-out text. */
int lm_evaluate(struct lm_trainer *trainer, double *ret_loss);
/* Fills @text with @n bytes that go on from @prompt; the first rank of each process computes. */
int lm_generate(struct lm_trainer *trainer, const char *prompt, size_t n, char *text);

/* The learning rate of a step: linear warm-up, then a cosine to a tenth. */
double lm_learning_rate(const struct lm_options *options, uint64_t step);
/* Shape as the options say. */
struct lm_shape lm_shape_of(const struct lm_options *options);
