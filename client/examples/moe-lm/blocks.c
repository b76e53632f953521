/* SPDX-License-Identifier: Apache-2.0 */
/* The stateless pieces of the model, on cblas. Compiled once per number type; any thread. */
#include "client/examples/moe-lm/blocks.h"

#include "client/examples/moe-lm/blas.h"
#include "kernels/ops.h"

#include <assert.h>
#include <cblas.h>
#include <limits.h>
#include <string.h>
#include <tgmath.h>

#define NORM_EPS 1e-5

#if LM_REAL_BYTES == 8
#define GEMM cblas_dgemm
#else
#define GEMM cblas_sgemm
#endif

void lm_matrix_product(const struct lm_product *p)
{
        assert(p->m <= INT_MAX && p->n <= INT_MAX && p->k <= INT_MAX);
        if (p->m == 0 || p->n == 0)
                return;
        pthread_mutex_lock(&lm_blas_mutex);
        GEMM(CblasRowMajor, p->a_transposed ? CblasTrans : CblasNoTrans,
             p->b_transposed ? CblasTrans : CblasNoTrans, (int)p->m, (int)p->n, (int)p->k, p->alpha,
             p->a, (int)p->lda, p->b, (int)p->ldb, p->beta, p->c, (int)p->ldc);
        pthread_mutex_unlock(&lm_blas_mutex);
}

void lm_linear(struct lm_dims dims, const real *x, const real *w, real *y)
{
        const struct lm_product product = {
                .m = dims.rows, .n = dims.out, .k = dims.in, .alpha = 1,
                .a = x, .lda = dims.in, .b = w, .ldb = dims.in, .b_transposed = true,
                .c = y, .ldc = dims.out,
        };

        lm_matrix_product(&product);
}

void lm_linear_dx(struct lm_dims dims, const real *dy, const real *w, real *dx, bool add)
{
        const struct lm_product product = {
                .m = dims.rows, .n = dims.in, .k = dims.out, .alpha = 1, .beta = add ? 1 : 0,
                .a = dy, .lda = dims.out, .b = w, .ldb = dims.in, .c = dx, .ldc = dims.in,
        };

        lm_matrix_product(&product);
}

void lm_linear_dw(struct lm_dims dims, const real *dy, const real *x, real *dw)
{
        const struct lm_product product = {
                .m = dims.out, .n = dims.in, .k = dims.rows, .alpha = 1, .beta = 1,
                .a = dy, .lda = dims.out, .a_transposed = true, .b = x, .ldb = dims.in,
                .c = dw, .ldc = dims.in,
        };

        if (dims.rows > 0)
                lm_matrix_product(&product);
}

void lm_norm(size_t rows, size_t dim, const real *x, const real *gain, real *y, real *inverse)
{
        for (size_t t = 0; t < rows; t++, x += dim, y += dim) {
                real squares = 0;

                for (size_t i = 0; i < dim; i++)
                        squares += x[i] * x[i];
                inverse[t] = 1 / sqrt(squares / (real)dim + (real)NORM_EPS);
                for (size_t i = 0; i < dim; i++)
                        y[i] = x[i] * inverse[t] * gain[i];
        }
}

void lm_norm_backward(size_t rows, size_t dim, const struct lm_norm_grads *g)
{
        for (size_t t = 0; t < rows; t++) {
                const real *x = g->x + t * dim, *dy = g->dy + t * dim;
                const real inverse = g->inverse[t];
                real *dx = g->dx + t * dim;
                real dot = 0;

                for (size_t i = 0; i < dim; i++) {
                        dot += dy[i] * g->gain[i] * x[i];
                        g->dgain[i] += dy[i] * x[i] * inverse;
                }
                dot *= inverse * inverse / (real)dim;
                for (size_t i = 0; i < dim; i++)
                        dx[i] += inverse * (dy[i] * g->gain[i] - x[i] * dot);
        }
}

static real sigmoid(real x)
{
        return 1 / (1 + exp(-x));
}

void lm_ffn_forward(const struct lm_ffn *ffn, real *y)
{
        const struct lm_dims in = { ffn->rows, ffn->dim, ffn->hidden };
        const struct lm_dims out = { ffn->rows, ffn->hidden, ffn->dim };

        lm_linear(in, ffn->x, ffn->w[0], ffn->gate);
        lm_linear(in, ffn->x, ffn->w[1], ffn->up);
        for (size_t i = 0; i < ffn->rows * ffn->hidden; i++)
                ffn->mid[i] = ffn->gate[i] * sigmoid(ffn->gate[i]) * ffn->up[i];
        lm_linear(out, ffn->mid, ffn->w[2], y);
}

void lm_ffn_backward(const struct lm_ffn *ffn, const real *dy, real *const *dw, real *dx, bool add)
{
        const struct lm_dims in = { ffn->rows, ffn->dim, ffn->hidden };
        const struct lm_dims out = { ffn->rows, ffn->hidden, ffn->dim };
        real *dmid = ffn->mid; /* mid has done its duty after the first line */

        lm_linear_dw(out, dy, ffn->mid, dw[2]);
        lm_linear_dx(out, dy, ffn->w[2], dmid, false);
        for (size_t i = 0; i < ffn->rows * ffn->hidden; i++) {
                const real gate = ffn->gate[i], up = ffn->up[i], s = sigmoid(gate);

                ffn->up[i] = dmid[i] * gate * s;
                ffn->gate[i] = dmid[i] * up * s * (1 + gate * (1 - s));
        }
        lm_linear_dw(in, ffn->gate, ffn->x, dw[0]);
        lm_linear_dw(in, ffn->up, ffn->x, dw[1]);
        lm_linear_dx(in, ffn->gate, ffn->w[0], dx, add);
        lm_linear_dx(in, ffn->up, ffn->w[1], dx, true);
}

/* One row; the logits become probabilities. */
static double row_entropy(size_t vocab, real *logits, uint8_t target)
{
        real top = logits[0], sum = 0;
        const real aimed = logits[target];

        for (size_t v = 1; v < vocab; v++)
                top = logits[v] > top ? logits[v] : top;
        for (size_t v = 0; v < vocab; v++) {
                logits[v] = exp(logits[v] - top);
                sum += logits[v];
        }
        for (size_t v = 0; v < vocab; v++)
                logits[v] /= sum;
        return (double)(log(sum) + top - aimed);
}

double lm_cross_entropy(size_t rows, size_t vocab, real *logits, const uint8_t *targets,
                        double scale)
{
        double loss = 0;

        for (size_t t = 0; t < rows; t++, logits += vocab) {
                loss += row_entropy(vocab, logits, targets[t]);
                logits[targets[t]] -= 1;
                for (size_t v = 0; scale != 0 && v < vocab; v++)
                        logits[v] *= (real)scale;
        }
        return loss;
}

void lm_add(size_t n, real *to, const real *from)
{
        for (size_t i = 0; i < n; i++)
                to[i] += from[i];
}

#if LM_REAL_BYTES == 8
static void widen_bf16(const ae_bf16 *from, size_t n, real *room)
{
        float part[256];

        for (size_t at = 0; at < n; at += 256) {
                const size_t count = n - at < 256 ? n - at : 256;

                ae_ops()->bf16_to_f32(part, from + at, count);
                for (size_t i = 0; i < count; i++)
                        room[at + i] = part[i];
        }
}

const real *lm_widen(const void *from, uint32_t dtype, size_t n, real *room)
{
        if (dtype == AE_DTYPE_BF16)
                widen_bf16(from, n, room);
        for (size_t i = 0; dtype == AE_DTYPE_F32 && i < n; i++)
                room[i] = ((const float *)from)[i];
        return room;
}
#else
const real *lm_widen(const void *from, uint32_t dtype, size_t n, real *room)
{
        if (dtype == AE_DTYPE_F32)
                return from;
        ae_ops()->bf16_to_f32(room, from, n);
        return room;
}
#endif
