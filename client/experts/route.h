/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The router: from a token's logits to the K experts that it visits and their weights, the way
 * back, and the auxiliary losses.
 *
 *   score  = softmax(logits) or sigmoid(logits), over all E experts of a token
 *   choice = score + bias            (the bias chooses and never weighs; it has no gradient)
 *   groups : the experts are n_group runs of E / n_group; only the topk_group runs of the highest
 *            group score (sum of the two best choices, or the best one) stay in
 *   idx    = the K highest choices, best first; equal ones: the lower expert id first
 *   weight = scale * score[idx] / (sum of the K scores + 1e-20)    (the division if normalise)
 *
 * All of this is computed in double, whatever the type of the arrays, and rounded once when it is
 * stored, so that no result depends on how tokens are cut into batches.
 *
 * A struct ae_route holds the configuration and the scratch of one row: one thread at a time.
 */
#pragma once

#include "client/experts/real.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AE_ROUTE_EXPERTS_MAX 65536

enum ae_route_score { AE_ROUTE_SOFTMAX, AE_ROUTE_SIGMOID };
enum ae_route_group_score { AE_ROUTE_GROUP_TOP2_SUM, AE_ROUTE_GROUP_MAX };

struct ae_route_config {
        uint32_t n_experts;
        uint32_t top_k;
        enum ae_route_score score;
        uint32_t n_group;    /* 0 or 1: choice is not limited by groups */
        uint32_t topk_group; /* ignored then */
        enum ae_route_group_score group_score;
        bool normalise;
        double scale;        /* 1 for none */
        double aux_coef;     /* coefficient of the balance loss; 0: none */
        double z_coef;       /* coefficient of the z-loss; 0: none */
};

struct ae_route {
        struct ae_route_config config;
        double *scratch;  /* owned; rows of n_experts, see route.c */
        uint64_t *counts; /* owned; [n_experts], of one sequence */
};

/*
 * One batch of N tokens, token after token. Everything is borrowed for the call. Sequence q is
 * tokens [seq_first[q], seq_first[q + 1]); an empty one is legal and has no loss.
 */
struct ae_route_batch {
        enum ae_real real;        /* of every void array here and below */
        size_t n_tokens;
        const void *logits;       /* [N][E] */
        const float *bias;        /* [E] or NULL */
        int32_t *idx;             /* [N][K]: written forward, read backward */
        void *weight;             /* [N][K]: written forward */
        const size_t *seq_first;  /* [n_seqs + 1], rising from 0 to N; NULL when n_seqs is 0 */
        size_t n_seqs;            /* read by losses and backward; 0: no auxiliary losses */
};

/* AE_EINVAL names the field that is wrong and its legal values; AE_ENOMEM. */
int ae_route_init(struct ae_route *route, const struct ae_route_config *config);
void ae_route_deinit(struct ae_route *route); /* accepts a zeroed struct */

/*
 * Fills idx and weight. AE_ENONFINITE when a logit or a bias is NaN or Inf: the text names the
 * first. All outputs are filled even then, so that this rank can still take part in the exchange
 * that its group waits in: such a token goes to experts 0..K-1 with NaN weights, which the finite
 * check of the round is bound to meet.
 */
int ae_route_forward(struct ae_route *route, const struct ae_route_batch *batch);

/*
 * The auxiliary losses of each sequence of T tokens, coefficients included, into ret_aux and ret_z
 * (n_seqs each; either may be NULL). Computed per sequence, so that any split of a batch gives the
 * same values; how sequences add up to the loss is the caller's choice.
 *   aux = aux_coef * E / (K * T^2) * sum_e count_e * sum_t p_te   (Switch form; count_e: tokens of
 *         the sequence with e in idx; p: the scores, for sigmoid divided by their sum)
 *   z   = z_coef / T * sum_t logsumexp(logits_t)^2
 */
void ae_route_losses(struct ae_route *route, const struct ae_route_batch *batch, double *ret_aux,
                     double *ret_z);

struct ae_route_grads {
        const void *dweight;      /* [N][K] */
        const double *seq_weight; /* [n_seqs]: what d(loss)/d(aux and z of q) is; NULL: all 1 */
        void *dlogits;            /* [N][E], overwritten */
};

/*
 * Gradient of the logits from that of the weights and the auxiliary losses. idx is held fixed, as
 * it is for the counts. A token with a logit that is not finite gets NaN throughout.
 */
void ae_route_backward(struct ae_route *route, const struct ae_route_batch *batch,
                       const struct ae_route_grads *grads);

/* Adds 1 to counts[idx[i]] for the @n entries of idx. An index outside [0, n_experts) is our own
 * bug. Count once per training forward: not in recomputation, not in evaluation. */
void ae_route_count(const int32_t *idx, size_t n, uint64_t *counts, uint32_t n_experts);
