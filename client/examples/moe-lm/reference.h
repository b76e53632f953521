/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The reference: one process, without autoep, that plays every rank of a job one after the other
 * and does what the daemons and expert optimizers would, in the plainest way: gradients are added
 * in the job's order (for each micro-batch, ranks into the sum of their sum group; then groups;
 * experts: the members of an EP group in one sum, then EP groups), then norm, clip factor,
 * optimizer, rounded weights, balancing. It is the oracle of --check.
 */
#pragma once

#include "client/examples/moe-lm/backend.h"

struct lm_reference_config {
        enum ae_real real;
        struct ae_group_topology topology; /* of the job that is played */
        uint32_t sum_group;   /* divides the world */
        uint32_t grad_dtype;  /* that ranks scatter dense gradients in: AE_DTYPE_F32 or _BF16 */
        bool sgd;             /* else AdamW */
        uint64_t seed;        /* of initial values */
};

/* AE_EINVAL names what does not divide; AE_ENOMEM. Borrows @spec; freed by lm_backend_free(). */
int lm_reference_new(const struct lm_spec *spec, const struct lm_reference_config *config,
                     struct lm_backend **ret_backend);
