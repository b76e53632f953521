/* SPDX-License-Identifier: Apache-2.0 */
/* What optimizer.c and optimizer-check.c share; nobody else includes it. */
#pragma once

#include "client/experts/optimizer.h"

#define AE_EXPERT_MOMENTS_MAX 2

enum ae_expert_opt_phase {
        AE_EXPERT_OPEN,         /* tensors are added */
        AE_EXPERT_ACCUMULATING, /* sealed; gradients are being added up */
        AE_EXPERT_REDUCED,      /* gradients are sums over the EDP group */
        AE_EXPERT_TORN,         /* a reduce failed on its way */
        AE_EXPERT_N_PHASES
};

struct ae_expert_slot {
        struct ae_expert_tensor spec; /* name owned, weight borrowed */
        size_t first;                 /* element in the arenas; 0 and unused when frozen */
        uint64_t step;                /* steps taken */
};

/* Owned by the rank's training thread. Arenas hold the trainable tensors back to back, each from a
 * cache line on, with zeros between. */
struct ae_expert_opt {
        struct ae_expert_opt_config config;
        enum ae_expert_opt_phase phase;
        struct ae_expert_slot *slots; /* owned */
        uint32_t n_slots, room;
        size_t n_arena;               /* elements of each arena */
        float *master, *grad;         /* owned */
        float *moment[AE_EXPERT_MOMENTS_MAX]; /* owned; NULL where the rule has none */
        float *reduced;               /* owned; NULL unless keep_reduced */
        bool has_reduced;             /* reduced holds a round */
        bool bad;                     /* this round's report had a bad value */
};

/* What a comparison looks at. */
#define AE_EXPERT_CHECK_RECORD (1u << 0)
#define AE_EXPERT_CHECK_WEIGHT (1u << 1)
#define AE_EXPERT_CHECK_STATE (1u << 2)

/* Compares what @what says of every tensor over @edp; see ae_expert_opt_compare(). */
int ae_expert_check_group(const struct ae_expert_opt *opt, uint32_t what, struct ae_comm *edp,
                          uint64_t deadline_ns);
