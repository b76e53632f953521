/* SPDX-License-Identifier: Apache-2.0 */
/* Attention by matrix products, a head of a sequence at a time. Compiled once per number type. */
#include "client/examples/moe-lm/attention.h"

#include "client/examples/moe-lm/blocks.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <tgmath.h>

#define ROTARY_BASE 10000.0

int lm_attention_init(struct lm_attention *attention, size_t dim, size_t heads, size_t seq)
{
        const size_t head_dim = dim / heads, half = head_dim / 2;

        assert(head_dim * heads == dim && half * 2 == head_dim);
        *attention = (struct lm_attention){ .heads = heads, .head_dim = head_dim, .dim = dim,
                                            .seq = seq };
        attention->angles = calloc(seq * head_dim, sizeof(real));
        attention->scratch = calloc(seq * seq, sizeof(real));
        if (!attention->angles || !attention->scratch) {
                lm_attention_deinit(attention);
                return ae_fail_sys(ENOMEM, "cannot prepare attention over %zu positions", seq);
        }
        for (size_t i = 0; i < seq * half; i++) {
                const double turn = (double)(i / half) *
                                    pow(ROTARY_BASE, -(double)(i % half) / (double)half);

                attention->angles[2 * i] = (real)cos(turn);
                attention->angles[2 * i + 1] = (real)sin(turn);
        }
        return 0;
}

void lm_attention_deinit(struct lm_attention *attention)
{
        free(attention->angles);
        free(attention->scratch);
        *attention = (struct lm_attention){ 0 };
}

/* Turns one row of queries or keys by its position; @way 1 or, for the gradient, -1. */
static void turn_row(const struct lm_attention *a, real *row, size_t position, real way)
{
        const real *angles = a->angles + position * a->head_dim;

        for (size_t i = 0; i < a->dim; i += 2) {
                const size_t at = i % a->head_dim;
                const real cosine = angles[at], sine = way * angles[at + 1];
                const real x = row[i], y = row[i + 1];

                row[i] = x * cosine - y * sine;
                row[i + 1] = x * sine + y * cosine;
        }
}

static void turn_sequence(const struct lm_attention *a, real *qkv, size_t rows, real way)
{
        for (size_t t = 0; t < rows; t++) {
                turn_row(a, qkv + t * 3 * a->dim, t, way);
                turn_row(a, qkv + t * 3 * a->dim + a->dim, t, way);
        }
}

/* Row t of the scores becomes probabilities over positions 0..t, and 0 after them. */
static void causal_softmax(real *scores, size_t rows)
{
        for (size_t t = 0; t < rows; t++, scores += rows) {
                real top = scores[0], sum = 0;

                for (size_t s = 1; s <= t; s++)
                        top = scores[s] > top ? scores[s] : top;
                for (size_t s = 0; s <= t; s++) {
                        scores[s] = exp(scores[s] - top);
                        sum += scores[s];
                }
                for (size_t s = 0; s < rows; s++)
                        scores[s] = s <= t ? scores[s] / sum : 0;
        }
}

/* One head of a sequence of @rows: pointers to its first columns. */
static void head_forward(const struct lm_attention *a, size_t rows, const real *qkv, real *prob,
                         real *out)
{
        const struct lm_product scores = {
                .m = rows, .n = rows, .k = a->head_dim, .alpha = 1 / sqrt((real)a->head_dim),
                .a = qkv, .lda = 3 * a->dim,
                .b = qkv + a->dim, .ldb = 3 * a->dim, .b_transposed = true,
                .c = prob, .ldc = rows,
        };
        const struct lm_product mix = {
                .m = rows, .n = a->head_dim, .k = rows, .alpha = 1,
                .a = prob, .lda = rows, .b = qkv + 2 * a->dim, .ldb = 3 * a->dim,
                .c = out, .ldc = a->dim,
        };

        lm_matrix_product(&scores);
        causal_softmax(prob, rows);
        lm_matrix_product(&mix);
}

void lm_attention_forward(const struct lm_attention *a, const struct lm_rows *rows, real *qkv,
                          real *prob, real *out)
{
        for (size_t q = 0; q < rows->n_seqs; q++) {
                const size_t first = rows->seq_first[q], n = rows->seq_first[q + 1] - first;
                real *own = qkv + first * 3 * a->dim;

                assert(n <= a->seq);
                turn_sequence(a, own, n, 1);
                for (size_t h = 0; h < a->heads; h++, prob += n * n)
                        head_forward(a, n, own + h * a->head_dim, prob,
                                     out + first * a->dim + h * a->head_dim);
        }
}

/* dprob becomes the gradient of the scores before the softmax. */
static void softmax_backward(const real *prob, real *dprob, size_t rows)
{
        for (size_t t = 0; t < rows; t++, prob += rows, dprob += rows) {
                real dot = 0;

                for (size_t s = 0; s <= t; s++)
                        dot += prob[s] * dprob[s];
                for (size_t s = 0; s < rows; s++)
                        dprob[s] = s <= t ? prob[s] * (dprob[s] - dot) : 0;
        }
}

static void head_backward(const struct lm_attention *a, size_t rows,
                          const struct lm_attention_grads *g)
{
        const size_t wide = 3 * a->dim;
        const real alpha = 1 / sqrt((real)a->head_dim);
        real *dscores = a->scratch;
        const struct lm_product dvalue = {
                .m = rows, .n = a->head_dim, .k = rows, .alpha = 1, .a_transposed = true,
                .a = g->prob, .lda = rows, .b = g->dout, .ldb = a->dim,
                .c = g->dqkv + 2 * a->dim, .ldc = wide,
        };
        const struct lm_product dprob = {
                .m = rows, .n = rows, .k = a->head_dim, .alpha = 1, .b_transposed = true,
                .a = g->dout, .lda = a->dim, .b = g->qkv + 2 * a->dim, .ldb = wide,
                .c = dscores, .ldc = rows,
        };
        const struct lm_product dquery = {
                .m = rows, .n = a->head_dim, .k = rows, .alpha = alpha,
                .a = dscores, .lda = rows, .b = g->qkv + a->dim, .ldb = wide,
                .c = g->dqkv, .ldc = wide,
        };
        const struct lm_product dkey = {
                .m = rows, .n = a->head_dim, .k = rows, .alpha = alpha, .a_transposed = true,
                .a = dscores, .lda = rows, .b = g->qkv, .ldb = wide,
                .c = g->dqkv + a->dim, .ldc = wide,
        };

        lm_matrix_product(&dvalue);
        lm_matrix_product(&dprob);
        softmax_backward(g->prob, dscores, rows);
        lm_matrix_product(&dquery);
        lm_matrix_product(&dkey);
}

void lm_attention_backward(const struct lm_attention *a, const struct lm_rows *rows,
                           const struct lm_attention_grads *grads)
{
        const real *prob = grads->prob;

        for (size_t q = 0; q < rows->n_seqs; q++) {
                const size_t first = rows->seq_first[q], n = rows->seq_first[q + 1] - first;

                for (size_t h = 0; h < a->heads; h++, prob += n * n) {
                        const size_t wide = first * 3 * a->dim + h * a->head_dim;
                        const struct lm_attention_grads head = {
                                .qkv = grads->qkv + wide,
                                .prob = prob,
                                .dout = grads->dout + first * a->dim + h * a->head_dim,
                                .dqkv = grads->dqkv + wide,
                        };

                        head_backward(a, n, &head);
                }
                turn_sequence(a, grads->dqkv + first * 3 * a->dim, n, -1);
        }
}
