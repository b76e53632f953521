/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels in terms of a vector of 16 floats, which the including file (ops-avx2.c,
 * ops-avx512.c) defines with its operations before it includes this, as well as TILE_PAIRS (pairs
 * that a sum folds together), OPS_NAME, OPS_TABLE and OPS_FLOOR_TABLE. The reference, ops-c.c, does
 * not use this file. vec_*_part() take 1 to 16 elements; what they don't load is 0.
 */
#pragma once

#include "kernels/ops-internal.h"

#define VEC ((size_t)16)
#define LINE (2 * VEC) /* elements of a pair, and of a full cache line of bf16 */
#define TILE (LINE * TILE_PAIRS)
#define UNROLL _Pragma("GCC unroll 8")

static_assert(AE_OPS_NORM_BLOCK % TILE == 0, "tiles fill a norm block");
static_assert(VEC == AE_OPS_NORM_LANES, "a vector fills the lanes");

/*
 * From so many bytes of output on it is written past the caches where no line of it is read: a
 * plain store would first read the line from memory, and by then the rest is evicted anyway.
 */
#define STREAM_MIN ((size_t)1 << 20)
#define STREAM_ALIGN 64

/*
 * Processors follow some ten streams by themselves; sums of more inputs ask for theirs. AdamW's
 * divisions fill the window in which loads could run ahead, so that it asks too, and so far ahead
 * that a caller who saves the state by blocks of some KiB finds the next one there.
 */
#define AHEAD_INPUTS 8
#define AHEAD_SUM_LEN 512
#define AHEAD_ADAMW_LEN 4096

/* Divisors between this and 1 are good for vec_div_all(); sqrt(1 - beta2^t), if not 0, is one. */
#define DIVISOR_MIN 0x1p-27F

static bool stream_wanted(const void *to, size_t len)
{
        return len >= STREAM_MIN && (uintptr_t)to % STREAM_ALIGN == 0;
}

/* Streamed lines are weakly ordered; whoever is told of the result must see them. */
static void stream_end(bool stream)
{
        if (stream)
                _mm_sfence();
}

static void vec_f32_to_bf16(ae_bf16 *to, const float *from, size_t n)
{
        size_t i = 0;

        for (; i + LINE <= n; i += LINE)
                vec_store_bf16(to + i, vec_load(from + i), vec_load(from + i + VEC));
        for (; i < n; i += VEC) {
                size_t part = AE_MIN(n - i, VEC);

                vec_store_bf16_part(to + i, vec_load_part(from + i, part), part);
        }
}

static void vec_bf16_to_f32(float *to, const ae_bf16 *from, size_t n)
{
        size_t i = 0;

        for (; i + VEC <= n; i += VEC)
                vec_store(to + i, vec_load_bf16(from + i));
        if (i < n)
                vec_store_part(to + i, vec_load_bf16_part(from + i, n - i), n - i);
}

/* Tiles are searched for the first bad one; the reference finds the element in it. */
static bool vec_finite_f32(const float *x, size_t n, size_t *ret_index)
{
        size_t i = 0, index;

        for (; i + TILE <= n; i += TILE) {
                struct bad bad = bad_zero();

                UNROLL
                for (size_t j = 0; j < TILE; j += VEC)
                        bad = bad_add(bad, vec_load(x + i + j));
                if (bad_any(bad))
                        break;
        }
        if (i == n || ae_ops_c.finite_f32(x + i, n - i, &index))
                return true;
        if (ret_index != NULL)
                *ret_index = i + index;
        return false;
}

static bool vec_finite_bf16(const ae_bf16 *x, size_t n, size_t *ret_index)
{
        size_t i = 0, index;

        for (; i + TILE <= n; i += TILE) {
                struct bad bad = bad_zero();

                UNROLL
                for (size_t j = 0; j < TILE; j += VEC)
                        bad = bad_add(bad, vec_load_bf16(x + i + j));
                if (bad_any(bad))
                        break;
        }
        if (i == n || ae_ops_c.finite_bf16(x + i, n - i, &index))
                return true;
        if (ret_index != NULL)
                *ret_index = i + index;
        return false;
}

static double lanes_sum(struct lanes lanes)
{
        double each[AE_OPS_NORM_LANES], sum;

        lanes_store(each, lanes);
        sum = each[0];
        for (size_t i = 1; i < AE_OPS_NORM_LANES; i++)
                sum += each[i];
        return sum;
}

static bool vec_norm2(const float *x, size_t n, struct ae_longacc *sum)
{
        bool finite = true;

        for (size_t block = 0; block < n; block += AE_OPS_NORM_BLOCK) {
                size_t end = AE_MIN(n, block + AE_OPS_NORM_BLOCK), i = block;
                struct lanes lanes = lanes_zero();

                for (; i + VEC <= end; i += VEC)
                        lanes = lanes_add(lanes, vec_load(x + i));
                if (i < end)
                        lanes = lanes_add(lanes, vec_load_part(x + i, end - i));
                finite &= ae_ops_add_block(sum, lanes_sum(lanes));
        }
        return finite;
}

/* A sum on its way. @inputs are the sum's, or acc itself where it is only looked at. */
struct fold {
        float *acc;
        const struct ae_ops_input *inputs;
        size_t n_inputs;
        bool keep;
        bool write;     /* not when acc is only looked at */
        bool canonical; /* something is added, so that a NaN has no bits of its own */
        bool ahead;     /* ask for the inputs' next lines */
        bool split;     /* tiles are folded as even and odd elements, as bf16 is widened best */
        bool check;
        bool norm;
        bool stream;
};

INLINE const void *input_at(const struct ae_ops_input *input, size_t at)
{
        return (const char *)input->data + at * (input->dtype == AE_DTYPE_BF16 ? 2 : 4);
}

INLINE struct pair pair_load(const float *from, bool split)
{
        struct pair natural = { vec_load(from), vec_load(from + VEC) };

        return split ? pair_split(natural) : natural;
}

INLINE void tile_start(const struct fold *fold, size_t at, struct pair *x)
{
        UNROLL
        for (size_t j = 0; j < TILE_PAIRS; j++) {
                if (fold->keep)
                        x[j] = pair_load(fold->acc + at + j * LINE, fold->split);
                else
                        x[j] = (struct pair){ vec_zero(), vec_zero() };
        }
}

INLINE void tile_ahead(const void *from, size_t len)
{
        for (size_t off = 0; off < len; off += 64)
                _mm_prefetch((const char *)from + off + AHEAD_SUM_LEN, _MM_HINT_T1);
}

/* What @combine makes of x and an input; with constants for arguments one loop is left of it. */
INLINE void tile_input(const struct ae_ops_input *input, bool split, bool ahead, size_t at,
                       struct pair *x, struct pair (*combine)(struct pair x, struct pair y))
{
        const void *from = input_at(input, at);

        if (ahead)
                tile_ahead(from, TILE * (input->dtype == AE_DTYPE_BF16 ? 2 : 4));
        if (input->dtype == AE_DTYPE_BF16) {
                UNROLL
                for (size_t j = 0; j < TILE_PAIRS; j++)
                        x[j] = combine(x[j], pair_load_bf16((const ae_bf16 *)from + j * LINE));
                return;
        }
        UNROLL
        for (size_t j = 0; j < TILE_PAIRS; j++)
                x[j] = combine(x[j], pair_load((const float *)from + j * LINE, split));
}

INLINE struct pair pair_second(struct pair x, struct pair y)
{
        (void)x;
        return y;
}

INLINE struct pair pair_add(struct pair x, struct pair y)
{
        return (struct pair){ vec_add(x.even, y.even), vec_add(x.odd, y.odd) };
}

INLINE struct pair pair_canonical(struct pair x)
{
        return (struct pair){ vec_canonical(x.even), vec_canonical(x.odd) };
}

/*
 * A fold is not finite when one of its inputs is not, so that only such a one, rare and still in
 * the first cache, is searched for the inputs to blame.
 */
static __attribute__((noinline, cold)) uint32_t search(const struct fold *fold, size_t at, size_t n)
{
        uint32_t bad = 0;

        for (size_t k = 0; fold->check && k < fold->n_inputs; k++) {
                const void *from = input_at(&fold->inputs[k], at);
                bool finite = fold->inputs[k].dtype == AE_DTYPE_BF16
                                      ? ae_ops_c.finite_bf16(from, n, NULL)
                                      : ae_ops_c.finite_f32(from, n, NULL);

                bad |= (uint32_t)!finite << k;
        }
        return bad;
}

INLINE void fold_store(const struct fold *fold, size_t at, struct vec x, struct lanes *lanes)
{
        if (fold->stream)
                vec_stream(fold->acc + at, x);
        else if (fold->write)
                vec_store(fold->acc + at, x);
        if (fold->norm)
                *lanes = lanes_add(*lanes, x);
}

INLINE uint32_t fold_tile(const struct fold *fold, size_t at, struct lanes *lanes)
{
        struct pair x[TILE_PAIRS];
        struct bad bad = bad_zero();
        uint32_t blame = 0;
        size_t k = 0;

        tile_start(fold, at, x);
        if (!fold->keep && fold->n_inputs > 0)
                tile_input(&fold->inputs[k++], fold->split, fold->ahead, at, x, pair_second);
        for (; k < fold->n_inputs; k++)
                tile_input(&fold->inputs[k], fold->split, fold->ahead, at, x, pair_add);
        UNROLL
        for (size_t j = 0; j < TILE_PAIRS; j++)
                bad = bad_add(bad_add(bad, x[j].even), x[j].odd);
        if (__builtin_expect(bad_any(bad), false)) {
                blame = search(fold, at, TILE);
                UNROLL
                for (size_t j = 0; j < TILE_PAIRS; j++)
                        x[j] = fold->canonical ? pair_canonical(x[j]) : x[j];
        }
        UNROLL
        for (size_t j = 0; j < TILE_PAIRS; j++) {
                if (fold->split)
                        x[j] = pair_join(x[j]);
                fold_store(fold, at + j * LINE, x[j].even, lanes);
                fold_store(fold, at + j * LINE + VEC, x[j].odd, lanes);
        }
        return blame;
}

INLINE struct vec part_load(const struct ae_ops_input *input, size_t at, size_t n)
{
        const void *from = input_at(input, at);

        if (input->dtype == AE_DTYPE_BF16)
                return vec_load_bf16_part(from, n);
        return vec_load_part(from, n);
}

/* As fold_tile(), for 1 to 16 elements. */
INLINE uint32_t fold_part(const struct fold *fold, size_t at, size_t n, struct lanes *lanes)
{
        struct vec x = fold->keep ? vec_load_part(fold->acc + at, n) : vec_zero();
        struct bad bad;
        size_t k = 0;

        if (!fold->keep && fold->n_inputs > 0)
                x = part_load(&fold->inputs[k++], at, n);
        for (; k < fold->n_inputs; k++)
                x = vec_add(x, part_load(&fold->inputs[k], at, n));
        bad = bad_add(bad_zero(), x);
        if (fold->canonical)
                x = vec_canonical(x);
        if (fold->write)
                vec_store_part(fold->acc + at, x, n);
        if (fold->norm)
                *lanes = lanes_add(*lanes, x);
        return bad_any(bad) ? search(fold, at, n) : 0;
}

/* One norm block, elements @at to @end, of @sum, whose results it adds to. */
INLINE void fold_block(const struct fold *fold, size_t at, size_t end, struct ae_ops_sum *sum)
{
        struct lanes lanes = lanes_zero();
        uint32_t bad = 0;

        for (; at + TILE <= end; at += TILE)
                bad |= fold_tile(fold, at, &lanes);
        for (; at < end; at += VEC)
                bad |= fold_part(fold, at, AE_MIN(end - at, VEC), &lanes);
        sum->nonfinite |= bad;
        if (fold->norm && !ae_ops_add_block(&sum->norm2, lanes_sum(lanes)))
                sum->infinite = true;
}

static bool any_bf16(const struct ae_ops_sum *sum)
{
        for (size_t k = 0; k < sum->n_inputs; k++) {
                if (sum->inputs[k].dtype == AE_DTYPE_BF16)
                        return true;
        }
        return false;
}

static void vec_sum(struct ae_ops_sum *sum)
{
        const struct ae_ops_input self = { .data = sum->acc, .dtype = AE_DTYPE_F32 };
        bool only_look = sum->keep && sum->n_inputs == 0;
        const struct fold fold = {
                .acc = sum->acc,
                .inputs = only_look ? &self : sum->inputs,
                .n_inputs = only_look ? 1 : sum->n_inputs,
                .keep = sum->keep && !only_look,
                .write = !only_look,
                .canonical = sum->n_inputs + sum->keep > 1,
                .ahead = sum->n_inputs > AHEAD_INPUTS,
                .split = any_bf16(sum),
                .check = sum->check,
                .norm = sum->norm,
                .stream = !sum->keep && stream_wanted(sum->acc, sum->n * sizeof(*sum->acc)),
        };

        assert(sum->n_inputs <= AE_OPS_SUM_MAX);
        sum->nonfinite = 0;
        sum->infinite = false;
        sum->norm2 = (struct ae_longacc){ { 0 } };
        for (size_t at = 0; at < sum->n; at += AE_OPS_NORM_BLOCK)
                fold_block(&fold, at, AE_MIN(sum->n, at + AE_OPS_NORM_BLOCK), sum);
        stream_end(fold.stream);
}

/* Where the optimizers put the new weights. */
struct weight_out {
        ae_bf16 *narrow; /* NULL: not as bf16 */
        float *wide;     /* NULL: not as fp32 */
        bool stream;
};

static struct weight_out weight_out(void *weight, uint32_t dtype, size_t n)
{
        bool narrow = dtype == AE_DTYPE_BF16;

        assert(weight == NULL || narrow || dtype == AE_DTYPE_F32);
        return (struct weight_out){
                .narrow = narrow ? weight : NULL,
                .wide = narrow ? NULL : weight,
                .stream = weight != NULL && stream_wanted(weight, n * ae_dtype_size(dtype)),
        };
}

INLINE void weight_line(const struct weight_out *out, size_t i, struct vec a, struct vec b)
{
        if (out->narrow != NULL && out->stream) {
                vec_stream_bf16(out->narrow + i, a, b);
        } else if (out->narrow != NULL) {
                vec_store_bf16(out->narrow + i, a, b);
        } else if (out->wide != NULL && out->stream) {
                vec_stream(out->wide + i, a);
                vec_stream(out->wide + i + VEC, b);
        } else if (out->wide != NULL) {
                vec_store(out->wide + i, a);
                vec_store(out->wide + i + VEC, b);
        }
}

static void weight_part(const struct weight_out *out, size_t i, struct vec a, size_t n)
{
        if (out->narrow != NULL)
                vec_store_bf16_part(out->narrow + i, a, n);
        else if (out->wide != NULL)
                vec_store_part(out->wide + i, a, n);
}

struct adamw_vecs {
        struct vec grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
        struct vec step_size, bc2_sqrt, bc2_inverse, eps;
};

static struct adamw_vecs adamw_vecs(const struct ae_adamw *s)
{
        return (struct adamw_vecs){
                .grad_scale = vec_all(s->grad_scale),
                .decay = vec_all(s->decay),
                .beta1 = vec_all(s->beta1),
                .one_minus_beta1 = vec_all(s->one_minus_beta1),
                .beta2 = vec_all(s->beta2),
                .one_minus_beta2 = vec_all(s->one_minus_beta2),
                .step_size = vec_all(s->step_size),
                .bc2_sqrt = vec_all(s->bc2_sqrt),
                .bc2_inverse = vec_all(1 / s->bc2_sqrt),
                .eps = vec_all(s->eps),
        };
}

INLINE void ahead(const float *of)
{
        _mm_prefetch((const char *)of + AHEAD_ADAMW_LEN, _MM_HINT_T0);
}

/* One AdamW step of one vector of state. */
INLINE void adamw_vec(const struct adamw_vecs *s, struct vec *p, struct vec *m, struct vec *v,
                      struct vec g)
{
        struct vec root, step;

        g = vec_mul(g, s->grad_scale);
        *m = vec_add(vec_mul(s->beta1, *m), vec_mul(s->one_minus_beta1, g));
        *v = vec_add(vec_mul(s->beta2, *v), vec_mul(vec_mul(s->one_minus_beta2, g), g));
        root = vec_add(vec_div_all(vec_sqrt(*v), s->bc2_sqrt, s->bc2_inverse), s->eps);
        step = vec_div(vec_mul(s->step_size, *m), root);
        *p = vec_canonical(vec_sub(vec_mul(*p, s->decay), step));
        *m = vec_canonical(*m);
        *v = vec_canonical(*v);
}

static void vec_adamw(const struct ae_adamw *scalars, float *p, float *m, float *v, const float *g,
                      void *weight, uint32_t weight_dtype, size_t n)
{
        const struct adamw_vecs s = adamw_vecs(scalars);
        const struct weight_out out = weight_out(weight, weight_dtype, n);
        size_t i = 0;

        if (!(scalars->bc2_sqrt >= DIVISOR_MIN && scalars->bc2_sqrt <= 1)) {
                ae_ops_c.adamw(scalars, p, m, v, g, weight, weight_dtype, n);
                return;
        }
        for (; i + LINE <= n; i += LINE) {
                struct vec p1[2], m1, v1;

                UNROLL
                for (size_t j = 0; j < 2; j++) {
                        size_t at = i + j * VEC;

                        ahead(p + at);
                        ahead(m + at);
                        ahead(v + at);
                        ahead(g + at);
                        p1[j] = vec_load(p + at);
                        m1 = vec_load(m + at);
                        v1 = vec_load(v + at);
                        adamw_vec(&s, &p1[j], &m1, &v1, vec_load(g + at));
                        vec_store(p + at, p1[j]);
                        vec_store(m + at, m1);
                        vec_store(v + at, v1);
                }
                weight_line(&out, i, p1[0], p1[1]);
        }
        for (; i < n; i += VEC) {
                size_t part = AE_MIN(n - i, VEC);
                struct vec p1 = vec_load_part(p + i, part), m1 = vec_load_part(m + i, part);
                struct vec v1 = vec_load_part(v + i, part);

                adamw_vec(&s, &p1, &m1, &v1, vec_load_part(g + i, part));
                vec_store_part(p + i, p1, part);
                vec_store_part(m + i, m1, part);
                vec_store_part(v + i, v1, part);
                weight_part(&out, i, p1, part);
        }
        stream_end(out.stream);
}

struct sgd_vecs {
        struct vec grad_scale, lr, momentum, weight_decay;
        bool has_momentum, has_decay;
};

static struct sgd_vecs sgd_vecs(const struct ae_sgd *s)
{
        return (struct sgd_vecs){
                .grad_scale = vec_all(s->grad_scale),
                .lr = vec_all(s->lr),
                .momentum = vec_all(s->momentum),
                .weight_decay = vec_all(s->weight_decay),
                .has_momentum = s->momentum != 0,
                .has_decay = s->weight_decay != 0,
        };
}

/* One SGD step of one vector of state; *m counts only with momentum. */
INLINE void sgd_vec(const struct sgd_vecs *s, struct vec *p, struct vec *m, struct vec g)
{
        g = vec_mul(g, s->grad_scale);
        if (s->has_decay)
                g = vec_add(g, vec_mul(s->weight_decay, *p));
        if (s->has_momentum)
                g = vec_add(vec_mul(s->momentum, *m), g);
        *m = vec_canonical(g);
        *p = vec_canonical(vec_sub(*p, vec_mul(s->lr, g)));
}

static void vec_sgd(const struct ae_sgd *scalars, float *p, float *m, const float *g, void *weight,
                    uint32_t weight_dtype, size_t n)
{
        const struct sgd_vecs s = sgd_vecs(scalars);
        const struct weight_out out = weight_out(weight, weight_dtype, n);
        size_t i = 0;

        for (; i + LINE <= n; i += LINE) {
                struct vec p1[2], m1 = vec_zero();

                UNROLL
                for (size_t j = 0; j < 2; j++) {
                        size_t at = i + j * VEC;

                        p1[j] = vec_load(p + at);
                        if (s.has_momentum)
                                m1 = vec_load(m + at);
                        sgd_vec(&s, &p1[j], &m1, vec_load(g + at));
                        vec_store(p + at, p1[j]);
                        if (s.has_momentum)
                                vec_store(m + at, m1);
                }
                weight_line(&out, i, p1[0], p1[1]);
        }
        for (; i < n; i += VEC) {
                size_t part = AE_MIN(n - i, VEC);
                struct vec p1 = vec_load_part(p + i, part), m1 = vec_zero();

                if (s.has_momentum)
                        m1 = vec_load_part(m + i, part);
                sgd_vec(&s, &p1, &m1, vec_load_part(g + i, part));
                vec_store_part(p + i, p1, part);
                if (s.has_momentum)
                        vec_store_part(m + i, m1, part);
                weight_part(&out, i, p1, part);
        }
        stream_end(out.stream);
}

const struct ae_ops OPS_TABLE = {
        .name = OPS_NAME,
        .f32_to_bf16 = vec_f32_to_bf16,
        .bf16_to_f32 = vec_bf16_to_f32,
        .sum = vec_sum,
        .norm2 = vec_norm2,
        .finite_f32 = vec_finite_f32,
        .finite_bf16 = vec_finite_bf16,
        .adamw = vec_adamw,
        .sgd = vec_sgd,
};

/* The floors: the loops of vec_sum() and vec_adamw() with moves in place of the arithmetic. */
INLINE struct pair pair_xor(struct pair x, struct pair y)
{
        return (struct pair){ vec_xor(x.even, y.even), vec_xor(x.odd, y.odd) };
}

static void floor_sum(const struct ae_ops_sum *sum)
{
        const struct fold fold = { .acc = sum->acc, .keep = sum->keep };
        const bool ahead = sum->n_inputs > AHEAD_INPUTS;
        bool stream = !sum->keep && stream_wanted(sum->acc, sum->n * sizeof(*sum->acc));
        size_t at = 0;

        for (; at + TILE <= sum->n; at += TILE) {
                struct pair x[TILE_PAIRS];

                tile_start(&fold, at, x);
                for (size_t k = 0; k < sum->n_inputs; k++)
                        tile_input(&sum->inputs[k], false, ahead, at, x, pair_xor);
                UNROLL
                for (size_t j = 0; j < TILE_PAIRS; j++) {
                        if (stream) {
                                vec_stream(sum->acc + at + j * LINE, x[j].even);
                                vec_stream(sum->acc + at + j * LINE + VEC, x[j].odd);
                        } else {
                                vec_store(sum->acc + at + j * LINE, x[j].even);
                                vec_store(sum->acc + at + j * LINE + VEC, x[j].odd);
                        }
                }
        }
        for (; at < sum->n; at += VEC) {
                size_t part = AE_MIN(sum->n - at, VEC);
                struct vec x = sum->keep ? vec_load_part(sum->acc + at, part) : vec_zero();

                for (size_t k = 0; k < sum->n_inputs; k++)
                        x = vec_xor(x, part_load(&sum->inputs[k], at, part));
                vec_store_part(sum->acc + at, x, part);
        }
        stream_end(stream);
}

INLINE struct vec floor_mix(float *to, struct vec g)
{
        struct vec x = vec_xor(vec_load(to), g);

        vec_store(to, x);
        return x;
}

static void floor_adamw(float *p, float *m, float *v, const float *g, ae_bf16 *weight, size_t n)
{
        bool stream = weight != NULL && stream_wanted(weight, n * sizeof(*weight));
        size_t i = 0;

        for (; i + LINE <= n; i += LINE) {
                struct vec p1[2];

                UNROLL
                for (size_t j = 0; j < 2; j++) {
                        struct vec g1 = vec_load(g + i + j * VEC);

                        p1[j] = floor_mix(p + i + j * VEC, g1);
                        floor_mix(m + i + j * VEC, g1);
                        floor_mix(v + i + j * VEC, g1);
                }
                if (stream)
                        vec_stream_halves(weight + i, p1[0], p1[1]);
                else if (weight != NULL)
                        vec_store_halves(weight + i, p1[0], p1[1]);
        }
        if (i < n)
                ae_ops_floor_c.adamw(p + i, m + i, v + i, g + i,
                                     weight != NULL ? weight + i : NULL, n - i);
        stream_end(stream);
}

const struct ae_ops_floor OPS_FLOOR_TABLE = {
        .sum = floor_sum,
        .adamw = floor_adamw,
};
