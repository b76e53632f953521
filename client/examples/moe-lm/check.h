/* SPDX-License-Identifier: Apache-2.0 */
/*
 * --check: the same steps over the daemons and over the reference, both computing the model in
 * double, while weights, sums and optimizer stay fp32 (or bf16 where the options say so). Compared
 * are, per tensor, the reduced gradients of every step and the masters (and balances) after the
 * last one, as the 2-norm of the difference over that of the reference's, and the norm of every
 * step. What is smaller than LM_CHECK_FLOOR of the whole model's counts as that large, for some
 * gradients are zero in theory. Tokens that chose other experts are reported with the score gap.
 */
#pragma once

#include "client/examples/moe-lm/train.h"

#include <stdbool.h>
#include <stdio.h>

#define LM_CHECK_BOUND 1e-6
#define LM_CHECK_FLOOR 1e-9

struct lm_check {
        struct lm_trainer *trainer;   /* over the daemons; computes in double */
        struct lm_trainer *reference; /* NULL where rank 0 isn't played */
        FILE *out;                    /* the table; NULL: none */
};

/* Runs the options' steps. A collective; the answer is the same on every rank. */
int lm_check_run(const struct lm_check *check, bool *ret_passed);
