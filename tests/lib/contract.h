/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small job for stories about the numerics contract. All elements of a tensor begin with one
 * value and get one gradient, so that a tensor is a number; the reference of a tensor is that
 * number.
 */
#pragma once

#include "client/autoep.h"
#include "tests/lib/cluster.h"

#include <stdint.h>

enum {
        CONTRACT_A,      /* unit a: bf16 [300] */
        CONTRACT_NORM,   /*         fp32 [5], group 1 */
        CONTRACT_B,      /* unit b: fp32 [131] */
        CONTRACT_FROZEN, /*         fp32 [9], frozen */
        CONTRACT_BIAS,   /*         fp32 [4], a buffer */
        CONTRACT_TIED,   /* unit c: alias of CONTRACT_A */
        CONTRACT_N_TENSORS
};
enum { CONTRACT_UNIT_A, CONTRACT_UNIT_B, CONTRACT_UNIT_C };
#define CONTRACT_N_A 300
#define CONTRACT_N_NORM 5
#define CONTRACT_N_B 131
#define CONTRACT_N_MAX 300

/* One tensor as the reference sees it: any of its elements. */
struct contract_number {
        float p, m, v;
        uint64_t steps;
};
struct contract_reference {
        struct contract_number tensors[CONTRACT_N_TENSORS];
};
void contract_reference_init(struct contract_reference *reference);
/* An AdamW step of @tensor with the reduced gradient @g. */
void contract_adamw(struct contract_reference *reference, uint32_t tensor, float g,
                    const struct autoep_hyper *hyper, double grad_scale);

/* Registers with this optimizer; @model's other fields are passed on. */
int contract_register(struct cluster_worker *worker, const struct autoep_model *model);

/* Scatters @unit, each element of each tensor with gradient @g; in bf16 where the rank is odd. */
int contract_scatter(struct cluster_worker *worker, uint32_t unit, float g);

/* A request with scale 1, two groups of @hyper and no clipping. */
struct autoep_step contract_step(const struct autoep_hyper hyper[2]);
/* SGD with lr 1, or AdamW with weight decay in group 0. */
extern const struct autoep_hyper contract_sgd[2];
extern const struct autoep_hyper contract_adam[2];

/* Asks for the step and expects a verdict of @kind. */
int contract_ask(struct cluster_worker *worker, const struct autoep_step *step, uint32_t kind,
                 struct autoep_verdict *ret_verdict);

/* An exchange of the world with one word for each rank, which are compared; at most 4 ranks. */
int contract_exchange(struct cluster_worker *worker);

/* Compares @what of all elements of the tensor with one number. */
int contract_is(struct cluster_worker *worker, uint32_t tensor, uint32_t what, float want);
/* Masters, weights and moments of all trainable tensors against the reference. */
int contract_check(struct cluster_worker *worker, const struct contract_reference *reference);
/* The same for weights as gathered, with their version. */
int contract_check_gathered(struct cluster_worker *worker, uint32_t tensor, float want,
                            uint64_t version);
