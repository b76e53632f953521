/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The router on the CPU, a row at a time in double; see route.h for the rules. Backward recomputes
 * scores from the logits instead of keeping them. Runs on the caller's thread.
 */
#include "client/experts/route.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define WEIGHT_EPS 1e-20 /* keeps a row of zero scores from dividing by zero */

/* Scratch rows of n_experts doubles. */
enum scratch_row { ROW_LOGIT, ROW_SCORE, ROW_CHOICE, ROW_GRAD, ROW_BALANCE, ROW_GROUP, N_ROWS };

static double *row_of(const struct ae_route *route, enum scratch_row row)
{
        return route->scratch + (size_t)row * route->config.n_experts;
}

static int check_groups(const struct ae_route_config *config)
{
        const uint32_t n_group = config->n_group;

        if (n_group <= 1)
                return 0;
        if (config->n_experts % n_group != 0)
                return ae_fail(AE_EINVAL, "n_group is %u: it must divide the %u experts", n_group,
                               config->n_experts);
        if (config->topk_group == 0 || config->topk_group > n_group)
                return ae_fail(AE_EINVAL, "topk_group is %u: it must be 1..n_group (%u)",
                               config->topk_group, n_group);
        if (config->top_k > config->topk_group * (config->n_experts / n_group))
                return ae_fail(AE_EINVAL,
                               "top_k is %u: %u of %u groups leave only %u experts to choose from",
                               config->top_k, config->topk_group, n_group,
                               config->topk_group * (config->n_experts / n_group));
        return 0;
}

static int check_config(const struct ae_route_config *config)
{
        if (config->n_experts == 0 || config->n_experts > AE_ROUTE_EXPERTS_MAX)
                return ae_fail(AE_EINVAL, "n_experts is %u: it must be 1..%d", config->n_experts,
                               AE_ROUTE_EXPERTS_MAX);
        if (config->top_k == 0 || config->top_k > config->n_experts)
                return ae_fail(AE_EINVAL, "top_k is %u: it must be 1..n_experts (%u)",
                               config->top_k, config->n_experts);
        if (!isfinite(config->scale) || config->scale == 0)
                return ae_fail(AE_EINVAL, "the route scale is %g: it must be finite and not 0",
                               config->scale);
        if (!isfinite(config->aux_coef) || config->aux_coef < 0 || !isfinite(config->z_coef) ||
            config->z_coef < 0)
                return ae_fail(AE_EINVAL,
                               "aux_coef is %g and z_coef %g: they must be finite and not negative",
                               config->aux_coef, config->z_coef);
        return check_groups(config);
}

int ae_route_init(struct ae_route *route, const struct ae_route_config *config)
{
        struct ae_route made = { .config = *config };
        int r = check_config(config);

        if (r < 0)
                return r;
        made.scratch = calloc((size_t)N_ROWS * config->n_experts, sizeof(*made.scratch));
        made.counts = calloc(config->n_experts, sizeof(*made.counts));
        if (!made.scratch || !made.counts) {
                ae_route_deinit(&made);
                return ae_fail_sys(ENOMEM, "cannot prepare a router of %u experts",
                                   config->n_experts);
        }
        *route = made;
        return 0;
}

void ae_route_deinit(struct ae_route *route)
{
        free(route->scratch);
        free(route->counts);
        *route = (struct ae_route){ 0 };
}

/* The first entry of a row that is not finite, or n. */
static uint32_t first_bad(const double *row, uint32_t n)
{
        for (uint32_t e = 0; e < n; e++) {
                if (!isfinite(row[e]))
                        return e;
        }
        return n;
}

/* Loads the logits of token @t; whether all are finite. */
static bool load_logits(const struct ae_route *route, const struct ae_route_batch *batch, size_t t)
{
        const uint32_t n = route->config.n_experts;
        double *logit = row_of(route, ROW_LOGIT);

        for (uint32_t e = 0; e < n; e++)
                logit[e] = ae_real_get(batch->real, batch->logits, t * n + e);
        return first_bad(logit, n) == n;
}

static double logsumexp(const double *logit, uint32_t n)
{
        double top = logit[0], sum = 0;

        for (uint32_t e = 1; e < n; e++)
                top = fmax(top, logit[e]);
        for (uint32_t e = 0; e < n; e++)
                sum += exp(logit[e] - top);
        return top + log(sum);
}

static void softmax(double *to, const double *logit, uint32_t n)
{
        double top = logit[0], sum = 0;

        for (uint32_t e = 1; e < n; e++)
                top = fmax(top, logit[e]);
        for (uint32_t e = 0; e < n; e++)
                sum += to[e] = exp(logit[e] - top);
        for (uint32_t e = 0; e < n; e++)
                to[e] /= sum;
}

static void compute_scores(const struct ae_route *route)
{
        const uint32_t n = route->config.n_experts;
        const double *logit = row_of(route, ROW_LOGIT);
        double *score = row_of(route, ROW_SCORE);

        if (route->config.score == AE_ROUTE_SOFTMAX) {
                softmax(score, logit, n);
                return;
        }
        for (uint32_t e = 0; e < n; e++)
                score[e] = 1 / (1 + exp(-logit[e]));
}

static uint32_t argmax(const double *row, uint32_t n)
{
        uint32_t best = 0;

        for (uint32_t i = 1; i < n; i++) {
                if (row[i] > row[best])
                        best = i;
        }
        return best;
}

static double score_group(const double *choice, uint32_t n, enum ae_route_group_score how)
{
        double first = -INFINITY, second = -INFINITY;

        for (uint32_t e = 0; e < n; e++) {
                if (choice[e] > first) {
                        second = first;
                        first = choice[e];
                } else if (choice[e] > second) {
                        second = choice[e];
                }
        }
        return how == AE_ROUTE_GROUP_MAX || n == 1 ? first : first + second;
}

/* Takes the experts of all but the topk_group best groups out of the choice. */
static void limit_groups(const struct ae_route *route)
{
        const struct ae_route_config *config = &route->config;
        const uint32_t len = config->n_experts / config->n_group;
        double *choice = row_of(route, ROW_CHOICE);
        double *group = row_of(route, ROW_GROUP);

        for (uint32_t g = 0; g < config->n_group; g++)
                group[g] = score_group(choice + g * len, len, config->group_score);
        for (uint32_t i = 0; i < config->topk_group; i++)
                group[argmax(group, config->n_group)] = -INFINITY; /* chosen */
        for (uint32_t e = 0; e < config->n_experts; e++) {
                if (group[e / len] != -INFINITY)
                        choice[e] = -INFINITY;
        }
}

static void choose(const struct ae_route *route, const float *bias, int32_t *idx)
{
        const struct ae_route_config *config = &route->config;
        const double *score = row_of(route, ROW_SCORE);
        double *choice = row_of(route, ROW_CHOICE);

        for (uint32_t e = 0; e < config->n_experts; e++)
                choice[e] = score[e] + (bias ? (double)bias[e] : 0);
        if (config->n_group > 1)
                limit_groups(route);
        for (uint32_t k = 0; k < config->top_k; k++) {
                const uint32_t best = argmax(choice, config->n_experts);

                assert(choice[best] != -INFINITY);
                choice[best] = -INFINITY;
                idx[k] = (int32_t)best;
        }
}

static double sum_chosen(const double *score, const int32_t *idx, uint32_t k)
{
        double sum = 0;

        for (uint32_t i = 0; i < k; i++)
                sum += score[idx[i]];
        return sum + WEIGHT_EPS;
}

static void route_token(const struct ae_route *route, const struct ae_route_batch *batch, size_t t)
{
        const struct ae_route_config *config = &route->config;
        const double *score = row_of(route, ROW_SCORE);
        int32_t *idx = batch->idx + t * config->top_k;
        double by = config->scale;

        compute_scores(route);
        choose(route, batch->bias, idx);
        if (config->normalise)
                by /= sum_chosen(score, idx, config->top_k);
        for (uint32_t k = 0; k < config->top_k; k++)
                ae_real_set(batch->real, batch->weight, t * config->top_k + k, by * score[idx[k]]);
}

/* Legal experts, so that the exchange goes on, and weights that no finite check can miss. */
static void route_bad_token(const struct ae_route *route, const struct ae_route_batch *batch,
                            size_t t)
{
        const uint32_t top_k = route->config.top_k;

        for (uint32_t k = 0; k < top_k; k++) {
                batch->idx[t * top_k + k] = (int32_t)k;
                ae_real_set(batch->real, batch->weight, t * top_k + k, (double)NAN);
        }
}

static int check_bias(const struct ae_route *route, const float *bias)
{
        for (uint32_t e = 0; bias && e < route->config.n_experts; e++) {
                if (!isfinite(bias[e]))
                        return ae_fail(AE_ENONFINITE,
                                       "cannot route: the selection bias of expert %u is %g", e,
                                       (double)bias[e]);
        }
        return 0;
}

int ae_route_forward(struct ae_route *route, const struct ae_route_batch *batch)
{
        const double *logit = row_of(route, ROW_LOGIT);
        const int bias_status = check_bias(route, batch->bias);
        int status = bias_status;

        for (size_t t = 0; t < batch->n_tokens; t++) {
                const bool finite = load_logits(route, batch, t);

                if (finite && bias_status == 0) {
                        route_token(route, batch, t);
                        continue;
                }
                route_bad_token(route, batch, t);
                if (status == 0) {
                        const uint32_t e = first_bad(logit, route->config.n_experts);

                        status = ae_fail(AE_ENONFINITE,
                                         "cannot route token %zu of %zu: its logit for expert %u "
                                         "is %g",
                                         t, batch->n_tokens, e, logit[e]);
                }
        }
        return status;
}

void ae_route_count(const int32_t *idx, size_t n, uint64_t *counts, uint32_t n_experts)
{
        for (size_t i = 0; i < n; i++) {
                assert(idx[i] >= 0 && (uint32_t)idx[i] < n_experts);
                counts[idx[i]]++;
        }
}

static double sum_row(const double *row, uint32_t n)
{
        double sum = 0;

        for (uint32_t e = 0; e < n; e++)
                sum += row[e];
        return sum;
}

/* What the scores are divided by to be the probabilities of the balance loss. */
static double balance_divisor(const struct ae_route *route)
{
        if (route->config.score == AE_ROUTE_SOFTMAX)
                return 1; /* they are */
        return sum_row(row_of(route, ROW_SCORE), route->config.n_experts) + WEIGHT_EPS;
}

/* Fills ROW_BALANCE with d aux / d p_te = weight * aux_coef * E / (K * T^2) * count_e. */
static void prepare_balance(const struct ae_route *route, const struct ae_route_batch *batch,
                            size_t q, double weight)
{
        const struct ae_route_config *config = &route->config;
        const size_t first = batch->seq_first[q];
        const double n = (double)(batch->seq_first[q + 1] - first);
        const double by = weight * config->aux_coef * config->n_experts / (config->top_k * n * n);
        double *balance = row_of(route, ROW_BALANCE);

        memset(route->counts, 0, config->n_experts * sizeof(*route->counts));
        ae_route_count(batch->idx + first * config->top_k,
                       (batch->seq_first[q + 1] - first) * config->top_k, route->counts,
                       config->n_experts);
        for (uint32_t e = 0; e < config->n_experts; e++)
                balance[e] = by * (double)route->counts[e];
}

static void sequence_losses(struct ae_route *route, const struct ae_route_batch *batch, size_t q,
                            double *ret_aux, double *ret_z)
{
        const uint32_t n = route->config.n_experts;
        const size_t n_tokens = batch->seq_first[q + 1] - batch->seq_first[q];
        const double *balance = row_of(route, ROW_BALANCE);
        const double *score = row_of(route, ROW_SCORE);
        double aux = 0, z = 0;

        if (n_tokens > 0)
                prepare_balance(route, batch, q, 1);
        for (size_t t = batch->seq_first[q]; t < batch->seq_first[q + 1]; t++) {
                double lse, dot = 0;

                (void)load_logits(route, batch, t); /* NaN goes through to the loss */
                compute_scores(route);
                for (uint32_t e = 0; e < n; e++)
                        dot += balance[e] * score[e];
                aux += dot / balance_divisor(route);
                lse = logsumexp(row_of(route, ROW_LOGIT), n);
                z += lse * lse;
        }
        *ret_aux = aux;
        *ret_z = n_tokens > 0 ? z * route->config.z_coef / (double)n_tokens : 0;
}

void ae_route_losses(struct ae_route *route, const struct ae_route_batch *batch, double *ret_aux,
                     double *ret_z)
{
        for (size_t q = 0; q < batch->n_seqs; q++) {
                double aux, z;

                sequence_losses(route, batch, q, &aux, &z);
                if (ret_aux)
                        ret_aux[q] = aux;
                if (ret_z)
                        ret_z[q] = z;
        }
}

/* Adds d loss / d score from the weights of token @t to @grad. */
static void add_weight_grad(const struct ae_route *route, const struct ae_route_batch *batch,
                            const struct ae_route_grads *grads, size_t t, double *grad)
{
        const struct ae_route_config *config = &route->config;
        const int32_t *idx = batch->idx + t * config->top_k;
        const double *score = row_of(route, ROW_SCORE);
        const double sum = config->normalise ? sum_chosen(score, idx, config->top_k) : 1;
        double mean = 0; /* of dweight over the normalised scores */

        for (uint32_t k = 0; config->normalise && k < config->top_k; k++)
                mean += ae_real_get(batch->real, grads->dweight, t * config->top_k + k) *
                        (score[idx[k]] / sum);
        for (uint32_t k = 0; k < config->top_k; k++) {
                const double d = ae_real_get(batch->real, grads->dweight, t * config->top_k + k);

                grad[idx[k]] += config->scale * (d - mean) / sum;
        }
}

/* Adds d aux / d score; the divisor of sigmoid scores depends on every score of the row. */
static void add_balance_grad(const struct ae_route *route, double *grad)
{
        const uint32_t n = route->config.n_experts;
        const double *balance = row_of(route, ROW_BALANCE);
        const double *score = row_of(route, ROW_SCORE);
        const double divisor = balance_divisor(route);
        double mean = 0;

        if (route->config.score == AE_ROUTE_SIGMOID) {
                for (uint32_t e = 0; e < n; e++)
                        mean += balance[e] * (score[e] / divisor);
        }
        for (uint32_t e = 0; e < n; e++)
                grad[e] += (balance[e] - mean) / divisor;
}

/* Turns d loss / d score into d loss / d logit, in place. */
static void apply_score_jacobian(const struct ae_route *route, double *grad)
{
        const uint32_t n = route->config.n_experts;
        const double *score = row_of(route, ROW_SCORE);
        double mean = 0;

        if (route->config.score == AE_ROUTE_SIGMOID) {
                for (uint32_t e = 0; e < n; e++)
                        grad[e] *= score[e] * (1 - score[e]);
                return;
        }
        for (uint32_t e = 0; e < n; e++)
                mean += score[e] * grad[e];
        for (uint32_t e = 0; e < n; e++)
                grad[e] = score[e] * (grad[e] - mean);
}

/* d z / d logit_e = 2 * by * logsumexp * softmax_e, where z = by * logsumexp^2. */
static void add_z_grad(const struct ae_route *route, double by, double *grad)
{
        const uint32_t n = route->config.n_experts;
        const double *logit = row_of(route, ROW_LOGIT);
        const double lse = logsumexp(logit, n);

        for (uint32_t e = 0; e < n; e++)
                grad[e] += 2 * by * lse * exp(logit[e] - lse);
}

/* @z_by: d loss / d (logsumexp^2) of this token; 0 without sequences, as ROW_BALANCE is then. */
static void token_backward(const struct ae_route *route, const struct ae_route_batch *batch,
                           const struct ae_route_grads *grads, size_t t, double z_by)
{
        const uint32_t n = route->config.n_experts;
        const bool finite = load_logits(route, batch, t);
        double *grad = row_of(route, ROW_GRAD);

        memset(grad, 0, n * sizeof(*grad));
        if (finite) {
                compute_scores(route);
                add_weight_grad(route, batch, grads, t, grad);
                if (route->config.aux_coef > 0)
                        add_balance_grad(route, grad);
                apply_score_jacobian(route, grad);
                if (z_by != 0)
                        add_z_grad(route, z_by, grad);
        }
        for (uint32_t e = 0; e < n; e++)
                ae_real_set(batch->real, grads->dlogits, t * n + e, finite ? grad[e] : (double)NAN);
}

void ae_route_backward(struct ae_route *route, const struct ae_route_batch *batch,
                       const struct ae_route_grads *grads)
{
        const uint32_t n = route->config.n_experts;

        if (batch->n_seqs == 0) {
                memset(row_of(route, ROW_BALANCE), 0, n * sizeof(double));
                for (size_t t = 0; t < batch->n_tokens; t++)
                        token_backward(route, batch, grads, t, 0);
                return;
        }
        assert(batch->seq_first[0] == 0 && batch->seq_first[batch->n_seqs] == batch->n_tokens);
        for (size_t q = 0; q < batch->n_seqs; q++) {
                const size_t first = batch->seq_first[q], end = batch->seq_first[q + 1];
                const double weight = grads->seq_weight ? grads->seq_weight[q] : 1;
                double z_by;

                if (first == end)
                        continue;
                z_by = weight * route->config.z_coef / (double)(end - first);
                prepare_balance(route, batch, q, weight);
                for (size_t t = first; t < end; t++)
                        token_backward(route, batch, grads, t, z_by);
        }
}
