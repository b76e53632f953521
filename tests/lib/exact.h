/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The exact layer of the numerics contract: a job whose gradients are small multiples of powers of
 * two, so that every sum of them is exact in any order, and those of their squares are not; a
 * reference that adds them as integers and takes optimizer steps in plain C; and a worker that runs
 * the job in a cluster and compares masters, weights, moments, reduced gradients, norm and verdict
 * with it in every bit, after each step.
 *
 * With random gradients there is no reference; two runs are then compared by the digests of what a
 * run ends each step with.
 */
#pragma once

#include "client/autoep.h"
#include "tests/lib/cluster.h"

#include <stdbool.h>
#include <stdint.h>

#define EXACT_STEPS 3
#define EXACT_LAYER_TENSORS 2 /* of one expert */

/* Tensors that are not experts', in order of registration. */
enum exact_tensor_id {
        EXACT_EMBED,      /* unit embed: bf16 [257, 3] */
        EXACT_W,          /* unit layer: bf16 [7, 11, 13] */
        EXACT_NORM,       /*             fp32 [5], group 1 */
        EXACT_SCALAR,     /*             fp32 [], group 1 */
        EXACT_FROZEN,     /*             bf16 [77], frozen */
        EXACT_BIAS,       /*             fp32 [experts], a buffer */
        EXACT_SKIPPED,    /* unit optional: fp32 [259]; in the second step nobody scatters it */
        EXACT_BIG,        /* unit big: bf16, cut over three owners */
        EXACT_BIG32,      /*           fp32, cut over two, group 1 */
        EXACT_HEAD_NORM,  /* unit head: bf16 [3], group 1 */
        EXACT_HEAD,       /*            alias of EXACT_EMBED, its use 1 */
        EXACT_TIED,       /* unit tied: alias of EXACT_EMBED, its use 2, and nothing else */
        EXACT_N_DENSE
};
enum exact_unit_id { EXACT_UNIT_EMBED, EXACT_UNIT_LAYER, EXACT_UNIT_OPTIONAL, EXACT_UNIT_BIG,
                     EXACT_UNIT_HEAD, EXACT_UNIT_TIED, EXACT_N_UNITS };

/* What the numbers depend on. */
struct exact_job {
        uint32_t world;
        uint32_t accumulate;  /* micro-batches of each rank in a step */
        uint32_t optimizer;   /* AUTOEP_ADAMW or AUTOEP_SGD */
        double momentum;      /* of SGD */
        double max_norm;      /* 0: no clipping */
        uint32_t n_experts;
        /* 0: sums travel as fp32. Otherwise as bf16, and so many consecutive ranks are a sum group:
         * of several groups each sum is rounded once, and few of them fit without. */
        uint32_t bf16_group;
        uint64_t seed;
};

/* State of one tensor after a step. */
struct exact_state {
        float *master, *m, *v, *gradient; /* owned; [n] */
        void *weight;                     /* owned; in the tensor's dtype */
        uint64_t steps;
};

struct exact_tensor {
        char name[32];
        uint32_t unit, dtype, class, group, home;
        bool frozen;
        uint32_t n_dims;
        uint64_t dims[3];
        uint64_t n;
};

struct exact_model {
        uint32_t n_tensors;           /* EXACT_N_DENSE + 2 * n_experts */
        struct exact_tensor *tensors; /* owned */
};

struct exact_verdict {
        double scale, norm, clip, grad_scale;
};

/* All that a job goes through, worked out by one thread beforehand. */
struct exact_reference {
        struct exact_job job;
        struct exact_model model;
        struct exact_state *states;   /* owned; [EXACT_STEPS + 1][n_tensors], the first initial */
        struct exact_verdict verdicts[EXACT_STEPS];
        uint64_t n_rounded, n_halfway; /* sums that bf16 did not hold; that lay between two */
};

struct exact_reference *exact_reference_new(const struct exact_job *job);
struct exact_reference *exact_reference_free(struct exact_reference *reference); /* returns NULL */
/* @step 0: initial values; s + 1: after step s. */
const struct exact_state *exact_state(const struct exact_reference *reference, uint32_t step,
                                      uint32_t tensor);

/* First expert tensor of global expert @expert. */
uint32_t exact_expert_tensor(uint32_t expert);
bool exact_is_alias(const struct exact_model *model, uint32_t tensor);
bool exact_is_trainable(const struct exact_model *model, uint32_t tensor);

/* One gradient: which step, micro-batch, rank and tensor it is of. */
struct exact_at {
        uint32_t step, micro, rank, tensor;
};
/* Whether @at's gradient needs more than bf16. */
bool exact_is_wide(const struct exact_at *at);
/* The unit of element @i of any tensor: powers of two so far apart that squares don't add up
 * exactly in double. */
float exact_unit(uint64_t i);
/* Adds @at's gradient in those units to @sum, [-2^16, 2^16) where it is wide, [-8, 7] elsewhere;
 * nothing when it has none there. */
void exact_gradient_add(const struct exact_job *job, const struct exact_at *at, int32_t *sum,
                        uint64_t n);
/* Whether @rank scatters @unit in this micro-batch. */
bool exact_scatters(const struct exact_job *job, uint32_t step, uint32_t micro, uint32_t rank,
                    uint32_t unit);
/* Tokens of @expert on @rank for the balancing of the buffer. */
uint64_t exact_count(const struct exact_job *job, uint32_t step, uint32_t rank, uint32_t expert);
#define EXACT_BALANCE_RATE 0x1p-7
/* Hyper-parameters of both groups at @step. */
void exact_hyper(const struct exact_job *job, uint32_t step, struct autoep_hyper ret_hyper[2]);

/* One run of a job in a cluster. */
struct exact_run {
        struct cluster_spec cluster;
        struct exact_job job;
        uint32_t ep_size, order, sum_group;
        uint32_t grad_wire;           /* of a random run; else the job says it */
        uint32_t slots;               /* 0, or so many small inbox slots, so that parts queue */
        bool random;                  /* gradients that are not exact; there is no reference */
        bool bad;                     /* before step bad_step a round with all its gradients, and an
                                         Inf among those of bad_rank's experts: it is skipped */
        uint32_t bad_step, bad_rank;
        bool lost;                    /* after the last step rank 0 goes without leaving: the job
                                         fails for all others */
        void (*at)(void *arg, uint32_t step); /* NULL, or called by each rank before each step, and
                                                 when all is over with EXACT_STEPS */
        void *arg;                    /* borrowed */
};

/* What a random run ends each step with, to compare with another one. */
struct exact_digests {
        uint64_t states[EXACT_STEPS][EXACT_N_DENSE]; /* masters, weights, moments, gradients */
        uint64_t experts[EXACT_STEPS][64];           /* by global expert */
        struct exact_verdict verdicts[EXACT_STEPS];
};

/* Runs it against @reference, which is of the same job; 0, or the number of failures. With
 * @run->random @reference gives the model and initial values, and @ret_digests is filled. */
int exact_run(const struct exact_run *run, const struct exact_reference *reference,
              struct exact_digests *ret_digests);
/* Two jobs at once on the cluster of the first, each against its reference; of the second's cluster
 * only the workers count. Not with .random. */
int exact_run_both(const struct exact_run runs[2], struct exact_reference *const references[2]);
