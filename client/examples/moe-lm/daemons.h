/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The autoep backend: one rank of a job. Dense parameters live in daemons, experts in this process
 * with an optimizer of their own; tokens and expert gradients travel through autoep_exchange().
 * This is the file to read for how a training program uses libautoep.
 */
#pragma once

#include "client/examples/moe-lm/backend.h"

struct lm_daemons_config {
        enum ae_real real;
        uint32_t ep_size;     /* 0: 2 where the world is even, else 1 */
        uint32_t order;       /* enum ae_group_order */
        uint32_t sum_group;   /* 0: the workers of a node */
        uint32_t grad_dtype;  /* AE_DTYPE_F32 or AE_DTYPE_BF16 */
        bool sgd;
        uint64_t seed;
};

/*
 * Joins the job that the environment names, registers the model and waits for all ranks. Errors of
 * libautoep; AE_EUNSUPPORTED in a build without it. @spec is borrowed. lm_backend_free() leaves the
 * job when nothing failed before.
 */
int lm_daemons_new(const struct lm_spec *spec, const struct lm_daemons_config *config,
                   struct lm_backend **ret_backend);

/* The groups and sums of the job, for the reference that it is compared with. */
struct lm_daemons_job {
        struct ae_group_topology topology;
        uint32_t sum_group;
};
struct lm_daemons_job lm_daemons_job(const struct lm_backend *backend);
