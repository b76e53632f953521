/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the CPU kernels of every variant must give, from definitions written down once more here:
 * rounding, folds, norms, the optimizers step by step in floats and against torch's formulas in
 * double, the scalars, and the choice of a variant. That variants agree in every bit and at every
 * length is tested in test-kernels.c.
 */
#include "tests/lib/test.h"

#include "kernels/floor.h"
#include "kernels/ops.h"
#include "proto/base/num.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define NAN_BITS UINT32_C(0x7fc00000)

static const char *const names[] = { "c", "avx2", "avx512" };

/* The next variant that there is here, from *index on; NULL after the last. */
static const struct ae_ops *variant(size_t *index)
{
        while (*index < AE_ARRAY_LEN(names)) {
                const struct ae_ops *ops = ae_ops_find(names[(*index)++]);

                if (ops != NULL)
                        return ops;
        }
        return NULL;
}

#define for_each_variant(ops)                                                                     \
        const struct ae_ops *ops;                                                                 \
        for (size_t ops##_index = 0; (ops = variant(&ops##_index)) != NULL;)

static uint32_t bits_of(float x)
{
        uint32_t bits;

        memcpy(&bits, &x, sizeof(bits));
        return bits;
}

static float of_bits(uint32_t bits)
{
        float x;

        memcpy(&x, &bits, sizeof(x));
        return x;
}

static uint64_t bits64_of(double x)
{
        uint64_t bits;

        memcpy(&bits, &x, sizeof(bits));
        return bits;
}

#define assert_bits(got, want) assert_int_equal(bits_of(got), bits_of(want))
#define assert_bits64(got, want) assert_int_equal(bits64_of(got), bits64_of(want))

/* What upper half @magnitude stands for; where infinity would be, the next power of two. */
static double bf16_value(uint32_t magnitude)
{
        return magnitude >= 0x7f80 ? 0x1p128 : (double)of_bits(magnitude << 16);
}

/* The nearer of the two neighbours, the even one of two equally near. */
static uint32_t nearest_bf16(uint32_t bits)
{
        uint32_t sign = (bits >> 16) & 0x8000, low = (bits >> 16) & 0x7fff;
        double x, below, above;

        if ((bits & 0x7fffffff) > 0x7f800000)
                return sign | low | 0x40;
        if (low == 0x7f80)
                return sign | low;
        x = (double)of_bits(bits & 0x7fffffff);
        below = x - bf16_value(low);
        above = bf16_value(low + 1) - x;
        if (below == above)
                return sign | (low + (low & 1));
        return sign | (below < above ? low : low + 1);
}

/* All upper halves, with lower halves around the ties. */
static void rounding(void **unused)
{
        static const uint32_t lower[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };
        static float from[65536];
        static ae_bf16 to[65536];

        (void)unused;
        for_each_variant(ops) {
                for (size_t k = 0; k < AE_ARRAY_LEN(lower); k++) {
                        for (uint32_t i = 0; i < 65536; i++)
                                from[i] = of_bits(i << 16 | lower[k]);
                        ops->f32_to_bf16(to, from, 65536);
                        for (uint32_t i = 0; i < 65536; i++) {
                                if (to[i] != nearest_bf16(i << 16 | lower[k]))
                                        fail_msg("%s: %08x became %04x, not %04x", ops->name,
                                                 i << 16 | lower[k], to[i],
                                                 nearest_bf16(i << 16 | lower[k]));
                        }
                }
        }
}

static void widening(void **unused)
{
        static float to[65536];
        static ae_bf16 from[65536];

        (void)unused;
        for (uint32_t i = 0; i < 65536; i++)
                from[i] = (ae_bf16)i;
        for_each_variant(ops) {
                ops->bf16_to_f32(to, from, 65536);
                for (uint32_t i = 0; i < 65536; i++) {
                        if (bits_of(to[i]) != i << 16)
                                fail_msg("%s: %04x became %08x", ops->name, i, bits_of(to[i]));
                }
        }
}

#define FOLD_N ((size_t)4096 + 333)
#define FOLD_INPUTS 8

static float fold_wide[FOLD_INPUTS][FOLD_N];
static ae_bf16 fold_narrow[FOLD_INPUTS][FOLD_N];
static struct ae_ops_input fold_inputs[FOLD_INPUTS];

/* Numbers whose sums round; inputs 0, 3 and 6 are fp32, the others bf16. */
static void fold_setup(void)
{
        uint32_t random = 12345;

        for (size_t k = 0; k < FOLD_INPUTS; k++) {
                for (size_t i = 0; i < FOLD_N; i++) {
                        random = random * 1664525 + 1013904223;
                        fold_narrow[k][i] = (ae_bf16)((random >> 16 & 0x83ff) | 0x3c00);
                        fold_wide[k][i] = of_bits((random & 0x83ffffff) | 0x3c000000);
                        if (k % 3 != 0)
                                fold_wide[k][i] = of_bits((uint32_t)fold_narrow[k][i] << 16);
                }
                fold_inputs[k].dtype = k % 3 == 0 ? AE_DTYPE_F32 : AE_DTYPE_BF16;
                fold_inputs[k].data = k % 3 == 0 ? (void *)fold_wide[k] : (void *)fold_narrow[k];
        }
}

static void left_fold(void **unused)
{
        static float acc[FOLD_N];

        (void)unused;
        fold_setup();
        for_each_variant(ops) {
                struct ae_ops_sum sum = {
                        .acc = acc,
                        .n = FOLD_N,
                        .inputs = fold_inputs,
                        .n_inputs = FOLD_INPUTS,
                        .check = true,
                };

                ops->sum(&sum);
                assert_int_equal(sum.nonfinite, 0);
                for (size_t i = 0; i < FOLD_N; i++) {
                        volatile float x = fold_wide[0][i];

                        for (size_t k = 1; k < FOLD_INPUTS; k++)
                                x = x + fold_wide[k][i];
                        assert_bits(acc[i], x);
                }
        }
}

/* Wherever the fold is cut, the bits are the same; so is the norm, wherever it is taken. */
static void cut_anywhere(void **unused)
{
        static float whole[FOLD_N], acc[FOLD_N];
        struct ae_longacc norm2, again;

        (void)unused;
        fold_setup();
        for_each_variant(ops) {
                struct ae_ops_sum sum = {
                        .acc = whole,
                        .n = FOLD_N,
                        .inputs = fold_inputs,
                        .n_inputs = FOLD_INPUTS,
                        .norm = true,
                };

                ops->sum(&sum);
                norm2 = sum.norm2;
                again = (struct ae_longacc){ { 0 } };
                assert_true(ops->norm2(whole, FOLD_N, &again));
                assert_memory_equal(&norm2, &again, sizeof(norm2));
                for (size_t cut = 0; cut <= FOLD_INPUTS; cut++) {
                        sum.acc = acc;
                        sum.inputs = fold_inputs;
                        sum.n_inputs = cut == 0 ? 1 : cut;
                        sum.keep = false;
                        ops->sum(&sum);
                        sum.inputs += sum.n_inputs;
                        sum.n_inputs = FOLD_INPUTS - sum.n_inputs;
                        sum.keep = true;
                        ops->sum(&sum);
                        assert_memory_equal(acc, whole, sizeof(acc));
                        assert_memory_equal(&sum.norm2, &norm2, sizeof(norm2));
                        assert_false(sum.infinite);
                }
        }
}

/* One input is stored as it is; a NaN that was added to is always the same. */
static void special_bits(void **unused)
{
        const uint32_t lone[] = { 0x80000000, 0x7fa00001, 0xffc12345, 0x00000001, 0xff800000 };
        uint32_t acc[40], in[40];
        const struct ae_ops_input inputs[2] = { { in, AE_DTYPE_F32 }, { in, AE_DTYPE_F32 } };

        (void)unused;
        for (size_t i = 0; i < 40; i++)
                in[i] = lone[i % AE_ARRAY_LEN(lone)];
        for_each_variant(ops) {
                struct ae_ops_sum sum = {
                        .acc = (float *)(void *)acc, .n = 40, .inputs = inputs, .n_inputs = 1,
                };

                ops->sum(&sum);
                assert_memory_equal(acc, in, sizeof(acc));
                sum.n_inputs = 2;
                ops->sum(&sum);
                assert_int_equal(acc[0], 0x80000000);
                assert_int_equal(acc[1], NAN_BITS);
                assert_int_equal(acc[2], NAN_BITS);
                assert_int_equal(acc[3], 2);
                assert_int_equal(acc[4], 0xff800000);
                sum.n_inputs = 0;
                ops->sum(&sum);
                for (size_t i = 0; i < 40; i++)
                        assert_int_equal(acc[i], 0);
        }
}

/* A bad element at any place of any input is seen there and nowhere else. */
static void blame(void **unused)
{
        static float acc[FOLD_N];

        (void)unused;
        fold_setup();
        for_each_variant(ops) {
                for (size_t i = 0; i < 520; i++) {
                        size_t k = i % FOLD_INPUTS, at = i < 260 ? i : FOLD_N - 1 - (i - 260);
                        float wide = fold_wide[k][at];
                        ae_bf16 narrow = fold_narrow[k][at];
                        struct ae_ops_sum sum = {
                                .acc = acc,
                                .n = FOLD_N,
                                .inputs = fold_inputs,
                                .n_inputs = FOLD_INPUTS,
                                .check = true,
                                .norm = true,
                        };

                        fold_wide[k][at] = of_bits(i & 1 ? 0x7f800001 : 0xff800000);
                        fold_narrow[k][at] = i & 1 ? 0x7f81 : 0xff80;
                        ops->sum(&sum);
                        assert_int_equal(sum.nonfinite, 1u << k);
                        assert_true(sum.infinite);
                        fold_wide[k][at] = wide;
                        fold_narrow[k][at] = narrow;
                }
        }
}

/* Infinity that was there before, or comes of finite inputs, is nobody's; unasked is unseen. */
static void no_blame(void **unused)
{
        float acc[100], huge[100];
        const struct ae_ops_input inputs[2] = { { huge, AE_DTYPE_F32 }, { huge, AE_DTYPE_F32 } };

        (void)unused;
        for (size_t i = 0; i < 100; i++) {
                huge[i] = 3e38f;
                acc[i] = INFINITY;
        }
        for_each_variant(ops) {
                struct ae_ops_sum sum = {
                        .acc = acc, .n = 100, .inputs = inputs, .n_inputs = 2, .check = true,
                };

                ops->sum(&sum);
                assert_true(isinf(acc[99]));
                assert_int_equal(sum.nonfinite, 0);
                sum.keep = true;
                ops->sum(&sum);
                assert_int_equal(sum.nonfinite, 0);
                sum.n_inputs = 0;
                sum.norm = true;
                ops->sum(&sum);
                assert_int_equal(sum.nonfinite, 1);
                assert_true(sum.infinite);
                sum.check = sum.norm = false;
                ops->sum(&sum);
                assert_int_equal(sum.nonfinite, 0);
                assert_false(sum.infinite);
                assert_true(ae_longacc_round(&sum.norm2) == 0);
        }
}

/* The definition of ops.h, element by element. */
static void norm2_defined(const float *x, size_t n, struct ae_longacc *total)
{
        for (size_t block = 0; block < n; block += 4096) {
                volatile double lanes[16] = { 0 }, sum;

                for (size_t i = block; i < n && i < block + 4096; i++) {
                        volatile double square = (double)x[i] * (double)x[i];

                        lanes[i % 16] = lanes[i % 16] + square;
                }
                sum = lanes[0];
                for (size_t lane = 1; lane < 16; lane++)
                        sum = sum + lanes[lane];
                ae_longacc_add(total, sum);
        }
}

static void norm(void **unused)
{
        static const size_t lens[] = { 0, 1, 15, 16, 17, 1000, 4096, 4097, FOLD_N };
        const float three_four[2] = { 3, -4 };

        (void)unused;
        fold_setup();
        for_each_variant(ops) {
                struct ae_longacc sum = { { 0 } };

                for (size_t i = 0; i < AE_ARRAY_LEN(lens); i++) {
                        struct ae_longacc got = { { 7 } }, want = { { 7 } }; /* it adds */

                        assert_true(ops->norm2(fold_wide[0], lens[i], &got));
                        norm2_defined(fold_wide[0], lens[i], &want);
                        assert_memory_equal(&got, &want, sizeof(got));
                }
                assert_true(ops->norm2(three_four, 2, &sum));
                assert_true(ae_longacc_round(&sum) == 25);
        }
}

/* A range may be cut between blocks; the ends of fp32 fit. */
static void norm_in_pieces(void **unused)
{
        static float ends[4 * 4096];
        const double most = 8192 * 0x1.fffffep127 * 0x1.fffffep127;

        (void)unused;
        fold_setup();
        for (size_t i = 0; i < AE_ARRAY_LEN(ends); i++)
                ends[i] = i / 4096 % 2 ? -0x1.fffffep127f : 0x1p-149f;
        for_each_variant(ops) {
                struct ae_longacc whole = { { 0 } }, pieces = { { 0 } };

                assert_true(ops->norm2(fold_wide[0], FOLD_N, &whole));
                assert_true(ops->norm2(fold_wide[0] + 4096, FOLD_N - 4096, &pieces));
                assert_true(ops->norm2(fold_wide[0], 4096, &pieces));
                assert_memory_equal(&whole, &pieces, sizeof(whole));
                whole = pieces = (struct ae_longacc){ { 0 } };
                assert_true(ops->norm2(ends, AE_ARRAY_LEN(ends), &whole));
                for (size_t block = 4; block-- > 0;)
                        assert_true(ops->norm2(ends + 4096 * block, 4096, &pieces));
                assert_memory_equal(&whole, &pieces, sizeof(whole));
                assert_int_equal(whole.limb[0], 2 * 4096);
                assert_true(fabs(ae_longacc_round(&whole) / most - 1) < 1e-13);
        }
}

/* A block that is not finite is left out and told of; the others are there. */
static void norm_is_not_finite(void **unused)
{
        static const uint32_t bad[] = { 0xffc00001, 0x7f812345, 0x7f800000, 0xff800000 };
        static float x[3 * 4096];
        float saved;

        (void)unused;
        for (size_t i = 0; i < AE_ARRAY_LEN(x); i++)
                x[i] = 2;
        for_each_variant(ops) {
                for (size_t i = 0; i < AE_ARRAY_LEN(bad); i++) {
                        struct ae_longacc sum = { { 0 } };
                        const size_t at = 4096 + 977 * i;

                        saved = x[at];
                        x[at] = of_bits(bad[i]);
                        assert_false(ops->norm2(x, AE_ARRAY_LEN(x), &sum));
                        x[at] = saved;
                        assert_true(ae_longacc_round(&sum) == 2 * 4096 * 4);
                }
        }
}

/* The first of two is found at every place of every length; without one the index stays. */
static void finiteness(void **unused)
{
        float wide[200];
        ae_bf16 narrow[200];
        size_t index;

        (void)unused;
        for (size_t i = 0; i < 200; i++) {
                wide[i] = of_bits(0x7f7fffff);
                narrow[i] = 0xff7f;
        }
        for_each_variant(ops) {
                for (size_t n = 0; n <= 200; n++) {
                        index = 777;
                        assert_true(ops->finite_f32(wide, n, &index));
                        assert_true(ops->finite_bf16(narrow, n, &index));
                        assert_int_equal(index, 777);
                }
                for (size_t i = 0; i < 199; i++) {
                        wide[i] = wide[199] = of_bits(i & 1 ? 0xff800000 : 0x7f800001);
                        narrow[i] = narrow[199] = i & 1 ? 0x7f80 : 0xffff;
                        assert_false(ops->finite_f32(wide, 200, &index));
                        assert_int_equal(index, i);
                        assert_false(ops->finite_bf16(narrow, 200, &index));
                        assert_int_equal(index, i);
                        assert_false(ops->finite_f32(wide, i + 1, NULL));
                        assert_false(ops->finite_bf16(narrow, i + 1, NULL));
                        wide[i] = wide[199] = 1;
                        narrow[i] = narrow[199] = 0x3f80;
                }
        }
}

#define STEP_N ((size_t)77)

/* The contract's order of operations, each rounded to float by itself. */
static void adamw_defined(const struct ae_adamw *s, float *p, float *m, float *v, float g)
{
        volatile float grad = g * s->grad_scale, decayed = *p * s->decay, a, b;

        a = s->beta1 * *m;
        b = s->one_minus_beta1 * grad;
        *m = a + b;
        a = s->beta2 * *v;
        b = s->one_minus_beta2 * grad;
        b = b * grad;
        *v = a + b;
        a = sqrtf(*v);
        a = a / s->bc2_sqrt;
        a = a + s->eps;
        b = s->step_size * *m;
        b = b / a;
        *p = decayed - b;
}

static void adamw_order(void **unused)
{
        const struct ae_hyper hyper = { 1e-3, 0.9, 0.999, 1e-8, 0.01 };

        (void)unused;
        fold_setup();
        for_each_variant(ops) {
                float p[STEP_N], m[STEP_N] = { 0 }, v[STEP_N] = { 0 };
                float p1[STEP_N], m1[STEP_N] = { 0 }, v1[STEP_N] = { 0 };
                ae_bf16 weight[STEP_N], want[STEP_N];

                memcpy(p, fold_wide[7], sizeof(p));
                memcpy(p1, p, sizeof(p));
                for (uint64_t step = 1; step <= 4; step++) {
                        const float *g = fold_wide[step];
                        struct ae_adamw s;

                        ae_adamw_scalars(&hyper, step, 0.3, &s);
                        ops->adamw(&s, p, m, v, g, weight, AE_DTYPE_BF16, STEP_N);
                        for (size_t i = 0; i < STEP_N; i++)
                                adamw_defined(&s, &p1[i], &m1[i], &v1[i], g[i]);
                        assert_memory_equal(p, p1, sizeof(p));
                        assert_memory_equal(m, m1, sizeof(m));
                        assert_memory_equal(v, v1, sizeof(v));
                        for (size_t i = 0; i < STEP_N; i++)
                                want[i] = (ae_bf16)nearest_bf16(bits_of(p[i]));
                        assert_memory_equal(weight, want, sizeof(weight));
                }
        }
}

static void assert_near(double got, double want)
{
        if (!(fabs(got - want) <= 1e-6 * fabs(want)))
                fail_msg("got %.12g, want %.12g", got, want);
}

/* One run of an optimizer, with what torch's formulas give in double. */
struct golden {
        struct ae_hyper hyper;
        double grad_scale;
        float p, g[3];
        double want_p[3], want_m, want_v;
};

static void adamw_golden(void **unused)
{
        static const struct golden goldens[] = {
                { { 1e-3, 0.9, 0.999, 1e-8, 0.01 }, 1, 1, { 0.5f, -0.25f, 2 },
                  { 0.99899000002, 0.9987136730870784, 0.9980330383085606 },
                  0.218, 0.00431193775 },
                { { 1e-2, 0.8, 0.95, 1e-6, 0.1 }, 0.5, -0.75f, { 3, -1, 0.125f },
                  { -0.7592499933333378, -0.7620053016895422, -0.7641019051405091 },
                  0.1245, 0.1136015625 },
        };

        (void)unused;
        for_each_variant(ops) {
                for (size_t i = 0; i < AE_ARRAY_LEN(goldens); i++) {
                        const struct golden *golden = &goldens[i];
                        float p = golden->p, m = 0, v = 0, weight;

                        for (uint64_t step = 1; step <= 3; step++) {
                                struct ae_adamw s;

                                ae_adamw_scalars(&golden->hyper, step, golden->grad_scale, &s);
                                ops->adamw(&s, &p, &m, &v, &golden->g[step - 1], &weight,
                                           AE_DTYPE_F32, 1);
                                assert_near((double)p, golden->want_p[step - 1]);
                                assert_bits(weight, p);
                        }
                        assert_near((double)m, golden->want_m);
                        assert_near((double)v, golden->want_v);
                }
        }
}

static void sgd_golden(void **unused)
{
        static const struct golden goldens[] = {
                { { 0.1, 0.9, 0, 0, 0.01 }, 1, 1, { 0.5f, -0.25f, 2 },
                  { 0.949, 0.927151, 0.706559749 }, 2.20591251, 0 },
                { { 0.05, 0, 0, 0, 0 }, 0.25, 2, { 0.5f, -0.25f, 2 },
                  { 1.99375, 1.996875, 1.971875 }, 0, 0 },
        };

        (void)unused;
        for_each_variant(ops) {
                for (size_t i = 0; i < AE_ARRAY_LEN(goldens); i++) {
                        const struct golden *golden = &goldens[i];
                        bool momentum = golden->hyper.beta1 != 0;
                        float p = golden->p, m = 0, weight;
                        struct ae_sgd s;

                        ae_sgd_scalars(&golden->hyper, golden->grad_scale, &s);
                        for (size_t step = 0; step < 3; step++) {
                                ops->sgd(&s, &p, momentum ? &m : NULL, &golden->g[step], &weight,
                                         AE_DTYPE_F32, 1);
                                assert_near((double)p, golden->want_p[step]);
                                assert_bits(weight, p);
                        }
                        assert_near((double)m, golden->want_m);
                }
        }
}

/* The order of operations of SGD, and that without decay an infinite master adds no NaN. */
static void sgd_order(void **unused)
{
        const struct ae_sgd s = {
                .grad_scale = 0.3f, .lr = 0.07f, .momentum = 0.9f, .weight_decay = 0.013f,
        };
        const struct ae_sgd plain = { .grad_scale = 0.3f, .lr = 0.07f };

        (void)unused;
        fold_setup();
        for_each_variant(ops) {
                float p[STEP_N], m[STEP_N], *g = fold_wide[2], infinite = INFINITY;

                memcpy(p, fold_wide[7], sizeof(p));
                memcpy(m, fold_wide[5], sizeof(m));
                ops->sgd(&s, p, m, g, NULL, AE_DTYPE_F32, STEP_N);
                for (size_t i = 0; i < STEP_N; i++) {
                        volatile float grad = g[i] * s.grad_scale, a, b;

                        a = s.weight_decay * fold_wide[7][i];
                        grad = grad + a;
                        a = s.momentum * fold_wide[5][i];
                        a = a + grad;
                        assert_bits(m[i], a);
                        b = s.lr * a;
                        b = fold_wide[7][i] - b;
                        assert_bits(p[i], b);
                }
                ops->sgd(&plain, &infinite, NULL, g, NULL, AE_DTYPE_F32, 1);
                assert_true(isinf(infinite));
        }
}

/* NaN of every origin, in every output, is the one NaN. */
static void optimizer_nan(void **unused)
{
        const struct ae_hyper hyper = { 1e-3, 0.9, 0.999, 1e-8, 0.01 };
        struct ae_adamw s;

        (void)unused;
        ae_adamw_scalars(&hyper, 1, 1, &s);
        for_each_variant(ops) {
                float p[40], m[40], v[40], g[40];
                ae_bf16 weight[40];

                for (size_t i = 0; i < 40; i++) {
                        p[i] = m[i] = v[i] = 1;
                        g[i] = of_bits(0xffa00003);
                }
                ops->adamw(&s, p, m, v, g, weight, AE_DTYPE_BF16, 40);
                for (size_t i = 0; i < 40; i++) {
                        assert_int_equal(bits_of(p[i]), NAN_BITS);
                        assert_int_equal(bits_of(m[i]), NAN_BITS);
                        assert_int_equal(bits_of(v[i]), NAN_BITS);
                        assert_int_equal(weight[i], 0x7fc0);
                }
        }
}

static void scalars(void **unused)
{
        const struct ae_hyper hyper = { 1e-3, 0.9, 0.999, 1e-8, 0.01 };
        struct ae_adamw s;
        struct ae_sgd sgd;

        (void)unused;
        ae_adamw_scalars(&hyper, 7, 0.125, &s);
        assert_bits(s.grad_scale, 0.125f);
        assert_bits(s.decay, 0.99999f);
        assert_bits(s.beta1, 0.9f);
        assert_bits(s.one_minus_beta1, (float)(1 - 0.9)); /* not 1 - 0.9f, which differs */
        assert_true(bits_of(s.one_minus_beta1) != bits_of(1 - 0.9f));
        assert_bits(s.one_minus_beta2, (float)(1 - 0.999));
        assert_bits(s.step_size, (float)0.0019167990376135397);
        assert_bits(s.bc2_sqrt, (float)0.08354061865356845);
        assert_bits(s.eps, 1e-8f);
        ae_adamw_scalars(&hyper, 1000000000, 1, &s);
        assert_bits(s.step_size, 1e-3f);
        assert_bits(s.bc2_sqrt, 1.0f);
        ae_sgd_scalars(&hyper, 0.5, &sgd);
        assert_bits(sgd.momentum, 0.9f);
        assert_bits(sgd.lr, 1e-3f);
        assert_bits(sgd.weight_decay, 0.01f);
        assert_bits(sgd.grad_scale, 0.5f);
}

static void clip(void **unused)
{
        (void)unused;
        assert_bits64(ae_clip_factor(5, 0), 1.0);
        assert_bits64(ae_clip_factor(0, 1), 1.0);
        assert_bits64(ae_clip_factor(0.5, 1), 1.0);
        assert_bits64(ae_clip_factor(4, 1), 1 / (4 + 1e-6));
        assert_true(ae_clip_factor(1, 1) < 1);
        assert_bits64(ae_clip_factor((double)INFINITY, 1), 0.0);
        assert_true(isnan(ae_clip_factor((double)NAN, 1)));
}

/* Runs ae_ops() in a child, as a process chooses once; returns its exit status and its words. */
static int choose(const char *cpu, char *ret_words, size_t size)
{
        int ends[2], status;
        size_t len = 0;
        ssize_t got;
        pid_t child;

        assert_int_equal(pipe(ends), 0);
        child = fork();
        assert_true(child >= 0);
        if (child == 0) {
                dup2(ends[1], STDERR_FILENO);
                close(ends[0]);
                setenv("AUTOEP_CPU", cpu, 1);
                dprintf(STDERR_FILENO, "%s", ae_ops()->name);
                _exit(0);
        }
        close(ends[1]);
        do {
                got = read(ends[0], ret_words + len, size - 1 - len);
                assert_true(got >= 0);
                len += (size_t)got;
        } while (got > 0);
        assert_true(len < size - 1);
        ret_words[len] = '\0';
        close(ends[0]);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status));
        return WEXITSTATUS(status);
}

static void choice(void **unused)
{
        char words[256];

        (void)unused;
        assert_null(ae_ops_find("sse"));
        assert_null(ae_ops_find(""));
        assert_string_equal(ae_ops_find("c")->name, "c");
        for (size_t i = 0; i < AE_ARRAY_LEN(names); i++) {
                int status = choose(names[i], words, sizeof(words));

                assert_int_equal(status, ae_ops_find(names[i]) != NULL ? 0 : 1);
                if (status == 0)
                        assert_string_equal(words, names[i]);
        }
        assert_int_equal(choose("", words, sizeof(words)), 0);
        assert_non_null(ae_ops_find(words));
        assert_int_equal(choose("sse", words, sizeof(words)), 1);
        assert_non_null(strstr(words, "AUTOEP_CPU=sse"));
        assert_non_null(strstr(words, " c)"));
}

static uint32_t xor_of(const float *x)
{
        uint32_t bits = 0;

        for (size_t i = 0; i < FOLD_N; i++)
                bits ^= bits_of(x[i]);
        return bits;
}

/* The floors read and write what the kernels do, and nothing beside it. */
static void floors(void **unused)
{
        static float to[FOLD_N + 1], m[FOLD_N + 1], v[FOLD_N + 1], p[FOLD_N + 1];
        static ae_bf16 weight[FOLD_N + 1];
        struct ae_ops_sum sum = {
                .acc = to, .n = FOLD_N, .inputs = fold_inputs, .n_inputs = FOLD_INPUTS,
        };
        uint32_t want = 0;

        (void)unused;
        fold_setup();
        for (size_t k = 0; k < FOLD_INPUTS; k++)
                want ^= xor_of(fold_wide[k]);
        ae_floor_sum(&sum);
        assert_int_equal(xor_of(to), want); /* places may change within a tile */
        sum.keep = true;
        ae_floor_sum(&sum);
        for (size_t i = 0; i < FOLD_N; i++)
                assert_int_equal(bits_of(to[i]), 0);
        ae_floor_adamw(p, m, v, fold_wide[0], weight, FOLD_N);
        assert_memory_equal(p, fold_wide[0], FOLD_N * sizeof(float));
        assert_memory_equal(m, fold_wide[0], FOLD_N * sizeof(float));
        assert_memory_equal(v, fold_wide[0], FOLD_N * sizeof(float));
        for (size_t i = 0; i < FOLD_N; i++)
                assert_int_equal(weight[i], bits_of(p[i]) >> 16);
        assert_int_equal(bits_of(to[FOLD_N]) | bits_of(p[FOLD_N]) | weight[FOLD_N], 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(rounding),      cmocka_unit_test(widening),
                cmocka_unit_test(left_fold),     cmocka_unit_test(cut_anywhere),
                cmocka_unit_test(special_bits),  cmocka_unit_test(blame),
                cmocka_unit_test(no_blame),      cmocka_unit_test(norm),
                cmocka_unit_test(norm_in_pieces), cmocka_unit_test(norm_is_not_finite),
                cmocka_unit_test(finiteness),       cmocka_unit_test(adamw_order),
                cmocka_unit_test(adamw_golden),  cmocka_unit_test(sgd_golden),
                cmocka_unit_test(sgd_order),     cmocka_unit_test(optimizer_nan),
                cmocka_unit_test(scalars),       cmocka_unit_test(clip),
                cmocka_unit_test(choice),        cmocka_unit_test(floors),
        };

        return cmocka_run_group_tests_name("kernels-values", tests, NULL, NULL);
}
