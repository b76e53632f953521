/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels in plain C: the reference for every other variant, and what runs where there is none.
 * Compilers may vectorise the loops, for that changes no bit; they may not contract or reassociate
 * (the build forbids the first and never allows the second).
 */
#include "kernels/ops-internal.h"

#include "proto/base/num.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>

/* Excess precision would round twice. */
static_assert(FLT_EVAL_METHOD == 0, "float arithmetic must round to float");

/* Elements that are worked on together; a norm block holds whole tiles, a tile whole lane rows. */
#define TILE ((size_t)64)

static_assert(AE_OPS_NORM_BLOCK % TILE == 0, "tiles fill a norm block");
static_assert(TILE % AE_OPS_NORM_LANES == 0, "lane rows fill a tile");

#define EXPONENT UINT32_C(0x7f800000)
#define EXPONENT_BF16 UINT32_C(0x7f80)
#define QUIET UINT32_C(0x00400000)

static inline uint32_t float_bits(float x)
{
        uint32_t bits;

        memcpy(&bits, &x, sizeof(bits));
        return bits;
}

static inline float bits_float(uint32_t bits)
{
        float x;

        memcpy(&x, &bits, sizeof(x));
        return x;
}

static inline bool finite_bits(uint32_t bits)
{
        return (bits & EXPONENT) != EXPONENT;
}

/* Of the result of arithmetic: one NaN for all. */
static inline float canonical(float x)
{
        return x == x ? x : bits_float(AE_OPS_NAN_BITS);
}

static inline ae_bf16 round_bf16(float x)
{
        uint32_t bits = float_bits(x);
        uint32_t rounded = bits + UINT32_C(0x7fff) + ((bits >> 16) & 1);

        return (ae_bf16)((x == x ? rounded : bits | QUIET) >> 16);
}

static inline float widen_bf16(ae_bf16 x)
{
        return bits_float((uint32_t)x << 16);
}

static void c_f32_to_bf16(ae_bf16 *restrict to, const float *restrict from, size_t n)
{
        for (size_t i = 0; i < n; i++)
                to[i] = round_bf16(from[i]);
}

static void c_bf16_to_f32(float *restrict to, const ae_bf16 *restrict from, size_t n)
{
        for (size_t i = 0; i < n; i++)
                to[i] = widen_bf16(from[i]);
}

static bool c_finite_f32(const float *x, size_t n, size_t *ret_index)
{
        for (size_t i = 0; i < n; i++) {
                if (finite_bits(float_bits(x[i])))
                        continue;
                if (ret_index != NULL)
                        *ret_index = i;
                return false;
        }
        return true;
}

static bool c_finite_bf16(const ae_bf16 *x, size_t n, size_t *ret_index)
{
        for (size_t i = 0; i < n; i++) {
                if ((x[i] & EXPONENT_BF16) != EXPONENT_BF16)
                        continue;
                if (ret_index != NULL)
                        *ret_index = i;
                return false;
        }
        return true;
}

/* @x begins at a lane row. */
static void lanes_add(double lanes[static AE_OPS_NORM_LANES], const float *x, size_t n)
{
        size_t i = 0;

        for (; i + AE_OPS_NORM_LANES <= n; i += AE_OPS_NORM_LANES) {
                for (size_t lane = 0; lane < AE_OPS_NORM_LANES; lane++)
                        lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
        }
        for (size_t lane = 0; i + lane < n; lane++)
                lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
}

static double lanes_sum(const double lanes[static AE_OPS_NORM_LANES])
{
        double sum = lanes[0];

        for (size_t lane = 1; lane < AE_OPS_NORM_LANES; lane++)
                sum += lanes[lane];
        return sum;
}

static bool c_norm2(const float *x, size_t n, struct ae_longacc *sum)
{
        bool finite = true;

        for (size_t at = 0; at < n; at += AE_OPS_NORM_BLOCK) {
                double lanes[AE_OPS_NORM_LANES] = { 0 };

                lanes_add(lanes, x + at, AE_MIN(n - at, (size_t)AE_OPS_NORM_BLOCK));
                finite &= ae_ops_add_block(sum, lanes_sum(lanes));
        }
        return finite;
}

/* Widens @n elements of an input from @at; returns whether one is not finite. */
static bool input_read(const struct ae_ops_input *input, size_t at, size_t n, float *ret_x)
{
        uint32_t bad = 0;

        if (input->dtype == AE_DTYPE_BF16)
                c_bf16_to_f32(ret_x, (const ae_bf16 *)input->data + at, n);
        else
                memcpy(ret_x, (const float *)input->data + at, n * sizeof(float));
        for (size_t i = 0; i < n; i++)
                bad |= !finite_bits(float_bits(ret_x[i]));
        return bad != 0;
}

/* At most TILE elements of a sum, from @at, into @x; returns the inputs' nonfinite bits. */
static uint32_t sum_fold(const struct ae_ops_sum *sum, size_t at, size_t n, float *x)
{
        float y[TILE];
        uint32_t bad = 0;
        size_t first = 0;

        memset(x, 0, n * sizeof(float));
        if (sum->keep)
                memcpy(x, sum->acc + at, n * sizeof(float));
        else if (sum->n_inputs > 0)
                bad = input_read(&sum->inputs[first++], at, n, x);
        for (size_t k = first; k < sum->n_inputs; k++) {
                bad |= (uint32_t)input_read(&sum->inputs[k], at, n, y) << k;
                for (size_t i = 0; i < n; i++)
                        x[i] = canonical(x[i] + y[i]);
        }
        return bad;
}

static void c_sum(struct ae_ops_sum *sum)
{
        const struct ae_ops_input self = { .data = sum->acc, .dtype = AE_DTYPE_F32 };
        bool only_look = sum->keep && sum->n_inputs == 0;
        struct ae_longacc norm2 = { { 0 } };
        uint32_t bad = 0;
        bool finite = true;

        assert(sum->n_inputs <= AE_OPS_SUM_MAX);
        for (size_t block = 0; block < sum->n; block += AE_OPS_NORM_BLOCK) {
                size_t end = AE_MIN(sum->n, block + AE_OPS_NORM_BLOCK);
                double lanes[AE_OPS_NORM_LANES] = { 0 };

                for (size_t at = block; at < end; at += TILE) {
                        size_t n = AE_MIN(end - at, TILE);
                        float x[TILE];

                        if (only_look)
                                bad |= input_read(&self, at, n, x);
                        else
                                bad |= sum_fold(sum, at, n, x);
                        if (!only_look)
                                memcpy(sum->acc + at, x, n * sizeof(float));
                        if (sum->norm)
                                lanes_add(lanes, x, n);
                }
                if (sum->norm)
                        finite &= ae_ops_add_block(&norm2, lanes_sum(lanes));
        }
        sum->nonfinite = sum->check ? bad : 0;
        sum->infinite = !finite;
        sum->norm2 = norm2;
}

/* Elements @at to @at + n of the weights, from the new masters @p. */
static void weight_write(void *weight, uint32_t dtype, size_t at, const float *p, size_t n)
{
        if (weight == NULL)
                return;
        assert(dtype == AE_DTYPE_BF16 || dtype == AE_DTYPE_F32);
        if (dtype == AE_DTYPE_BF16)
                c_f32_to_bf16((ae_bf16 *)weight + at, p, n);
        else
                memcpy((float *)weight + at, p, n * sizeof(*p));
}

static void adamw_tile(const struct ae_adamw *s, float *restrict p, float *restrict m,
                       float *restrict v, const float *restrict g, size_t n)
{
        for (size_t i = 0; i < n; i++) {
                float grad = g[i] * s->grad_scale;
                float decayed = p[i] * s->decay;
                float m1 = s->beta1 * m[i] + s->one_minus_beta1 * grad;
                float v1 = s->beta2 * v[i] + s->one_minus_beta2 * grad * grad;
                float root = sqrtf(v1) / s->bc2_sqrt + s->eps;

                p[i] = canonical(decayed - s->step_size * m1 / root);
                m[i] = canonical(m1);
                v[i] = canonical(v1);
        }
}

static void c_adamw(const struct ae_adamw *scalars, float *p, float *m, float *v, const float *g,
                    void *weight, uint32_t weight_dtype, size_t n)
{
        const struct ae_adamw s = *scalars;

        for (size_t at = 0; at < n; at += TILE) {
                size_t count = AE_MIN(n - at, TILE);

                adamw_tile(&s, p + at, m + at, v + at, g + at, count);
                weight_write(weight, weight_dtype, at, p + at, count);
        }
}

static void sgd_tile(const struct ae_sgd *s, float *restrict p, float *restrict m,
                     const float *restrict g, size_t n)
{
        for (size_t i = 0; i < n; i++) {
                float grad = g[i] * s->grad_scale;

                if (s->weight_decay != 0)
                        grad = grad + s->weight_decay * p[i];
                if (s->momentum != 0) {
                        grad = s->momentum * m[i] + grad;
                        m[i] = canonical(grad);
                }
                p[i] = canonical(p[i] - s->lr * grad);
        }
}

static void c_sgd(const struct ae_sgd *scalars, float *p, float *m, const float *g, void *weight,
                  uint32_t weight_dtype, size_t n)
{
        const struct ae_sgd s = *scalars;

        for (size_t at = 0; at < n; at += TILE) {
                size_t count = AE_MIN(n - at, TILE);

                sgd_tile(&s, p + at, s.momentum != 0 ? m + at : NULL, g + at, count);
                weight_write(weight, weight_dtype, at, p + at, count);
        }
}

const struct ae_ops ae_ops_c = {
        .name = "c",
        .f32_to_bf16 = c_f32_to_bf16,
        .bf16_to_f32 = c_bf16_to_f32,
        .sum = c_sum,
        .norm2 = c_norm2,
        .finite_f32 = c_finite_f32,
        .finite_bf16 = c_finite_bf16,
        .adamw = c_adamw,
        .sgd = c_sgd,
};
