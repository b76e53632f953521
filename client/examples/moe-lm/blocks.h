/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pieces of the model that hold no state: linear layers, RMSNorm, SwiGLU, cross entropy, each
 * with its backward. Matrices are row-major; a linear layer's weight is [out][in]. Gradients of
 * weights are always added to; those of inputs as each function says. Pure; any thread.
 */
#pragma once

#include "client/examples/moe-lm/real.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define lm_linear LM_NAME(lm_linear)
#define lm_linear_dx LM_NAME(lm_linear_dx)
#define lm_linear_dw LM_NAME(lm_linear_dw)
#define lm_norm LM_NAME(lm_norm)
#define lm_norm_backward LM_NAME(lm_norm_backward)
#define lm_ffn_forward LM_NAME(lm_ffn_forward)
#define lm_ffn_backward LM_NAME(lm_ffn_backward)
#define lm_cross_entropy LM_NAME(lm_cross_entropy)
#define lm_add LM_NAME(lm_add)
#define lm_widen LM_NAME(lm_widen)
#define lm_matrix_product LM_NAME(lm_matrix_product)

/* c = alpha * op(a) op(b) + beta * c, with op a transposition where asked; c is [m][n]. */
struct lm_product {
        size_t m, n, k;
        bool a_transposed, b_transposed;
        const real *a, *b;
        real *c;
        size_t lda, ldb, ldc;
        real alpha, beta;
};
void lm_matrix_product(const struct lm_product *product);

struct lm_dims {
        size_t rows, in, out;
};
/* y[rows][out] = x[rows][in] w^T */
void lm_linear(struct lm_dims dims, const real *x, const real *w, real *y);
/* dx = dy w, or dx += with @add */
void lm_linear_dx(struct lm_dims dims, const real *dy, const real *w, real *dx, bool add);
/* dw += dy^T x */
void lm_linear_dw(struct lm_dims dims, const real *dy, const real *x, real *dw);

/* y = x / rms(x) * gain, row by row; keeps 1/rms in @inverse[rows]. */
void lm_norm(size_t rows, size_t dim, const real *x, const real *gain, real *y, real *inverse);

struct lm_norm_grads {
        const real *x, *gain, *inverse, *dy;
        real *dx, *dgain; /* both are added to */
};
void lm_norm_backward(size_t rows, size_t dim, const struct lm_norm_grads *grads);

/* A SwiGLU block: y = (silu(x gate^T) * (x up^T)) down^T. Arrays by enum lm_ffn_slot. */
struct lm_ffn {
        size_t rows, dim, hidden;
        const real *x;      /* [rows][dim] */
        const real *w[3];
        real *gate, *up, *mid; /* [rows][hidden]: kept by the forward, used up by the backward */
};
void lm_ffn_forward(const struct lm_ffn *ffn, real *y);
/* @dw[3] are added to; dx is overwritten, or added to with @add. */
void lm_ffn_backward(const struct lm_ffn *ffn, const real *dy, real *const *dw, real *dx, bool add);

/*
 * The summed loss of logits[rows][vocab] against targets. With @scale not 0 the logits become their
 * gradient, times @scale.
 */
double lm_cross_entropy(size_t rows, size_t vocab, real *logits, const uint8_t *targets,
                        double scale);

void lm_add(size_t n, real *to, const real *from);
/* Weights of @dtype as numbers to compute with: @from itself where they already are, else @room. */
const real *lm_widen(const void *from, uint32_t dtype, size_t n, real *room);
