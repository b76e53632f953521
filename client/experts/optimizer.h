/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The expert optimizer of one rank: fp32 masters and moments of its local experts, replicated over
 * the EDP group, beside weights that the model owns.
 *
 * Life: new; add every expert tensor; seal (allocates, and checks with the EDP group that all
 * replicas registered the same tensors with the same weights). Then, for each round: the model adds
 * its gradients, over any number of micro-batches, into ae_expert_opt_grad(); reduce sums them over
 * the EDP group; the daemons decide; step applies their verdict. After step all gradients are zero,
 * whether it was applied or not.
 *
 * The sum is not divided by anything: the verdict's grad_scale holds s and the clip factor. What
 * is local already holds the tokens of the whole EP group, so nothing depends on ep_size.
 *
 * One thread at a time. The EDP group is borrowed for a call, so that a group formed anew after a
 * loss needs no new optimizer.
 */
#pragma once

#include "client/experts/comm.h"
#include "kernels/ops.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AE_EXPERT_TENSORS_MAX (1u << 20)

enum ae_expert_rule { AE_EXPERT_ADAMW, AE_EXPERT_SGD };

struct ae_expert_opt_config {
        enum ae_expert_rule rule;
        uint32_t n_groups;  /* optimizer groups, at least 1 */
        bool keep_reduced;  /* keep a copy of each round's reduced gradients after the step, at 4
                             * bytes a parameter, for ae_expert_opt_state() */
};

/* One tensor of one expert. */
struct ae_expert_tensor {
        const char *name;   /* copied; with the global expert id in it */
        uint32_t layer;
        uint32_t expert;    /* global id */
        uint32_t dtype;     /* AE_DTYPE_F32 or AE_DTYPE_BF16, of weight */
        uint32_t group;     /* optimizer group, < n_groups */
        bool frozen;        /* never changes; has no gradient and no state */
        void *weight;       /* borrowed until free; n elements */
        size_t n;
};

struct ae_expert_opt;

/* AE_EINVAL for a rule or group count that does not exist; AE_ENOMEM. */
int ae_expert_opt_new(const struct ae_expert_opt_config *config, struct ae_expert_opt **ret_opt);
struct ae_expert_opt *ae_expert_opt_free(struct ae_expert_opt *opt); /* returns NULL */

/*
 * Adds a tensor; indices count from 0. AE_EINVAL names the tensor and what is wrong; AE_EOVERFLOW
 * above AE_EXPERT_TENSORS_MAX; AE_ESTATE after seal.
 */
int ae_expert_opt_add(struct ae_expert_opt *opt, const struct ae_expert_tensor *tensor,
                      uint32_t *ret_index);

/*
 * Takes masters from the weights and zeroes the rest of the state, then compares registrations and
 * weights over @edp: AE_EMISMATCH names the rank and the tensor that differ from position 0's.
 * Every rank of the group calls it. AE_EEXIST for a name that was added twice; AE_ESTATE when
 * sealed before; after an error the optimizer is only good for free.
 */
int ae_expert_opt_seal(struct ae_expert_opt *opt, struct ae_comm *edp, uint64_t deadline_ns);

uint32_t ae_expert_opt_count(const struct ae_expert_opt *opt);

/*
 * Where gradients of tensor @index are added, fp32[n]; zero when the round begins, also after a
 * step. NULL for a frozen tensor and before seal. The address never changes.
 */
float *ae_expert_opt_grad(struct ae_expert_opt *opt, uint32_t index);

/* What reduce found; goes with the step request to the daemon. */
struct ae_expert_report {
        struct ae_longacc norm2; /* of the reduced, unscaled gradients, each distinct expert counted
                                  * once: at EDP position 0; 0 elsewhere. Blocks begin with each
                                  * tensor and are added exactly, so that the sum over all ranks,
                                  * the experts' part of the global norm, doesn't depend on which
                                  * of them holds what. Without the blocks that are not finite */
        bool nonfinite;       /* this rank's own gradients hold NaN or Inf, or at EDP position 0 the
                               * sum does while no replica's own do; first in: */
        uint32_t tensor;      /* index */
        size_t element;
        char text[256];       /* names tensor, layer, global expert and value; "" when finite */
};

/*
 * Checks this rank's gradients, then sums them over @edp in position order, in place. Bad values do
 * not end the call: the group still needs this rank, and the verdict will skip the round. Errors
 * are those of the exchange; then the gradients are torn and only a step that is not applied may
 * follow. AE_ESTATE when this round was reduced already.
 */
int ae_expert_opt_reduce(struct ae_expert_opt *opt, struct ae_comm *edp, uint64_t deadline_ns,
                         struct ae_expert_report *ret_report);

struct ae_expert_group_step {
        struct ae_hyper hyper;
        bool idle;            /* the group is not in this step: its gradients are dropped */
};

/* The daemons' verdict. */
struct ae_expert_verdict {
        bool applied;         /* false: skipped or redone */
        double grad_scale;    /* s times the clip factor, in double */
        const struct ae_expert_group_step *groups; /* [n_groups], borrowed; unused if not applied */
        uint32_t n_groups;
};

/*
 * Ends the round. Applied: every trainable tensor of a group that is not idle takes a step, also
 * with a zero gradient where no token came, and its step count grows. Not applied (also legal
 * before reduce): nothing moves. Gradients are zero afterwards. AE_ESTATE when it is applied
 * without a whole reduce or to a round in which a replica reported a bad value; AE_EINVAL for
 * another number of groups. Nothing has changed after an error.
 */
int ae_expert_opt_step(struct ae_expert_opt *opt, const struct ae_expert_verdict *verdict);

/*
 * The state of a trainable tensor, borrowed from the optimizer, valid until the next step; see
 * ae_expert_opt_put() to change it. Frozen tensors: AE_EINVAL; before seal: AE_ESTATE.
 */
struct ae_expert_state {
        const char *name;       /* whose it is, as it was added: name, layer, global expert id */
        uint32_t layer, expert;
        enum ae_expert_rule rule;
        const float *master;
        const float *moment[2]; /* AdamW: m and v; SGD: momentum and NULL */
        const float *reduced;   /* unscaled sum of the last reduced round; NULL unless keep_reduced
                                 * and a round was reduced */
        uint64_t step;          /* steps taken */
        size_t n;
};
int ae_expert_opt_state(const struct ae_expert_opt *opt, uint32_t index,
                        struct ae_expert_state *ret_state);

/*
 * Sets master, moments (those that are not NULL) and step count, and the weight from the master:
 * for loading a checkpoint. @state must be of this tensor and this rule: name, layer, expert and n
 * (AE_EINVAL); reduced is ignored. Only between rounds: AE_ESTATE after reduce.
 */
int ae_expert_opt_put(struct ae_expert_opt *opt, uint32_t index,
                      const struct ae_expert_state *state);

/* XXH3-128 over records and weights of all tensors, frozen ones too, in index order; with
 * @with_state over masters, moments and step counts as well. Of bytes as they lie in memory, for
 * ranks of one byte order. AE_ENOMEM. AE_ESTATE before seal. */
struct ae_expert_checksum {
        uint64_t lo, hi;
};
int ae_expert_opt_checksum(const struct ae_expert_opt *opt, bool with_state,
                           struct ae_expert_checksum *ret_checksum);

/* Compares weights and state over @edp; every rank calls it, all get the same answer.
 * AE_EMISMATCH names the first rank and tensor that differ from position 0's. */
int ae_expert_opt_compare(const struct ae_expert_opt *opt, struct ae_comm *edp,
                          uint64_t deadline_ns);
