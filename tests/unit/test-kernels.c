/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The variant of the CPU kernels that the command line names gives the bits of the C reference: for
 * every length up to 200 and some long ones, at every element alignment, with subnormals,
 * infinities, NaN, signed zeros and halfway cases; what lies around an output stays as it was, and
 * nothing beyond an array is touched. Skips where there is no such variant, for a variant is a test
 * of its own. What the reference itself must give is in test-kernels-values.c.
 */
#include "tests/lib/test.h"

#include "kernels/ops.h"
#include "proto/base/num.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GUARD 0xa5
#define MARGIN ((size_t)64)
#define MAX_LEN ((size_t)200)      /* all lengths up to this */
#define N_ARRAYS (AE_OPS_SUM_MAX + 1)

enum fill {
        FILL_F32,
        FILL_F32_POSITIVE,
        FILL_BF16,
};

/* Where a case puts its arrays, and what it puts in them. */
struct shape {
        size_t n;
        bool at_end;   /* arrays end where memory does; otherwise off elements after the margin */
        bool same_off; /* all arrays at off; otherwise each somewhere else */
        size_t off;
        bool dirty; /* with NaN and infinities */
        uint64_t seed;
};

/* An array in memory of its own; the page after it is not accessible. */
struct array {
        uint8_t *memory; /* owned */
        size_t memory_len;
        bool filled; /* the case at hand uses it */
        uint8_t *at; /* in memory */
        size_t len;
        uint8_t *expected; /* owned; memory as the reference left it */
};

static struct array arrays[N_ARRAYS];
static uint64_t state;

static uint64_t next(void)
{
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return state * UINT64_C(0x2545f4914f6cdd1d);
}

static uint32_t pick_bits(bool dirty)
{
        static const uint32_t finite[] = {
                0x00000000, 0x80000000, 0x3f800000, 0xbf800000, 0x00000001, 0x807fffff,
                0x00800000, 0x7f7fffff, 0xff7fffff, 0x7f7f8000, 0x7f7f7fff, 0x00008000,
                0x00018000, 0x00007fff, 0x3f808000, 0x3f818000, 0x3f808001, 0xbf817fff,
        };
        static const uint32_t other[] = {
                0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000, 0x7f800001,
                0xff801234, 0x7fffffff, 0xffc0ffff, 0x7fa50000,
        };
        uint64_t random = next();
        uint32_t bits = (uint32_t)(random >> 32);

        if (dirty && random % 97 == 0)
                return other[bits % AE_ARRAY_LEN(other)];
        switch (random % 16) {
        case 0:
                return finite[bits % AE_ARRAY_LEN(finite)];
        case 1:
                return bits & 0x807fffff; /* subnormal */
        case 2:
                return (bits & 0xbfff0000) | 0x8000; /* halfway between two bf16 */
        default:
                return (bits & 0x80ffffff) | 0x3d000000;
        }
}

static void array_open(struct array *array, size_t len)
{
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        void *memory;

        len = ae_align_up(len, page);
        memory = mmap(NULL, len + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_true(memory != MAP_FAILED);
        assert_int_equal(mprotect((uint8_t *)memory + len, page, PROT_NONE), 0);
        array->memory = memory;
        array->memory_len = len;
        array->expected = malloc(len);
        assert_non_null(array->expected);
}

static void array_close(struct array *array)
{
        size_t page = (size_t)sysconf(_SC_PAGESIZE);

        free(array->expected);
        munmap(array->memory, array->memory_len + page);
        *array = (struct array){ 0 };
}

/* Fills an array and what is around it, the same for the same shape. */
static void *array_fill(size_t index, enum fill fill, const struct shape *shape)
{
        struct array *array = &arrays[index];
        size_t size = fill == FILL_BF16 ? sizeof(ae_bf16) : sizeof(float);
        size_t off = shape->same_off ? shape->off : (shape->off + 5 * index) % 16;

        state = shape->seed * 1000003 + index * 7919 + 1;
        array->filled = true;
        array->len = shape->n * size;
        array->at = array->memory + MARGIN + off * size;
        if (shape->at_end)
                array->at = array->memory + array->memory_len - array->len;
        assert_true(array->at + array->len <= array->memory + array->memory_len);
        memset(array->memory, GUARD, array->memory_len);
        for (size_t i = 0; i < shape->n; i++) {
                uint32_t bits = pick_bits(shape->dirty);

                if (fill == FILL_F32_POSITIVE && !shape->dirty)
                        bits &= 0x7fffffff;
                if (fill == FILL_BF16)
                        bits >>= 16;
                memcpy(array->at + i * size, &bits, size); /* little-endian: the lower half */
        }
        return array->at;
}

static void arrays_keep(void)
{
        for (size_t i = 0; i < N_ARRAYS; i++) {
                if (arrays[i].filled)
                        memcpy(arrays[i].expected, arrays[i].memory, arrays[i].memory_len);
        }
}

static bool guards_whole(const struct array *array)
{
        const uint8_t *end = array->memory + array->memory_len;

        for (const uint8_t *p = array->memory; p < array->at; p++) {
                if (*p != GUARD)
                        return false;
        }
        for (const uint8_t *p = array->at + array->len; p < end; p++) {
                if (*p != GUARD)
                        return false;
        }
        return true;
}

static void array_check(size_t index, const char *what, const struct ae_ops *ops,
                        const struct shape *shape)
{
        const struct array *array = &arrays[index];
        size_t at = (size_t)(array->at - array->memory), byte = 0;

        if (memcmp(array->memory, array->expected, array->memory_len) == 0) {
                if (!guards_whole(array))
                        fail_msg("%s %s n=%zu: bytes around array %zu were written", ops->name,
                                 what, shape->n, index);
                return;
        }
        while (array->memory[byte] == array->expected[byte])
                byte++;
        fail_msg("%s %s n=%zu off=%zu seed=%llu: array %zu differs from the reference at byte %lld "
                 "of it: %02x, not %02x",
                 ops->name, what, shape->n, shape->off, (unsigned long long)shape->seed, index,
                 (long long)byte - (long long)at, array->memory[byte], array->expected[byte]);
}

/* Fails where an array differs from what the reference left, or its guards are not whole. */
static void arrays_check(const char *what, const struct ae_ops *ops, const struct shape *shape)
{
        for (size_t i = 0; i < N_ARRAYS; i++) {
                if (arrays[i].filled)
                        array_check(i, what, ops, shape);
        }
}

/* What a kernel returns other than in its arrays. */
struct returned {
        struct ae_longacc norm2;
        bool infinite;
        uint32_t nonfinite;
        size_t index;
        bool finite;
};

static void returned_check(const struct returned *expected, const struct returned *got,
                           const char *what, const struct ae_ops *ops, const struct shape *shape)
{
        if (memcmp(&expected->norm2, &got->norm2, sizeof(got->norm2)) == 0 &&
            expected->infinite == got->infinite && expected->nonfinite == got->nonfinite &&
            expected->index == got->index && expected->finite == got->finite)
                return;
        fail_msg("%s %s n=%zu off=%zu seed=%llu: norm2 %a (infinite %d), not %a (%d); "
                 "nonfinite %x, not %x; finite %d at %zu, not %d at %zu",
                 ops->name, what, shape->n, shape->off, (unsigned long long)shape->seed,
                 ae_longacc_round(&got->norm2), got->infinite, ae_longacc_round(&expected->norm2),
                 expected->infinite, got->nonfinite, expected->nonfinite, got->finite, got->index,
                 expected->finite, expected->index);
}

/* One kernel in one way of calling it. @way is that kernel's own choice of arguments. */
struct kernel {
        const char *name;
        size_t n_ways;
        void (*run)(const struct ae_ops *ops, const struct shape *shape, size_t way,
                    struct returned *ret);
};

static void run_to_bf16(const struct ae_ops *ops, const struct shape *shape, size_t way,
                        struct returned *ret)
{
        void *to = array_fill(0, FILL_BF16, shape), *from = array_fill(1, FILL_F32, shape);

        (void)way;
        (void)ret;
        ops->f32_to_bf16(to, from, shape->n);
}

static void run_to_f32(const struct ae_ops *ops, const struct shape *shape, size_t way,
                       struct returned *ret)
{
        void *to = array_fill(0, FILL_F32, shape), *from = array_fill(1, FILL_BF16, shape);

        (void)way;
        (void)ret;
        ops->bf16_to_f32(to, from, shape->n);
}

static void run_norm2(const struct ae_ops *ops, const struct shape *shape, size_t way,
                      struct returned *ret)
{
        (void)way;
        ret->infinite = !ops->norm2(array_fill(0, FILL_F32, shape), shape->n, &ret->norm2);
}

static void run_finite(const struct ae_ops *ops, const struct shape *shape, size_t way,
                       struct returned *ret)
{
        if (way == 0)
                ret->finite = ops->finite_f32(array_fill(0, FILL_F32, shape), shape->n,
                                              &ret->index);
        else
                ret->finite = ops->finite_bf16(array_fill(0, FILL_BF16, shape), shape->n,
                                               &ret->index);
}

/* Ways 0..50: 0 to 16 inputs, all bf16, all fp32 or mixed; the switches come from the seed. */
static void run_sum(const struct ae_ops *ops, const struct shape *shape, size_t way,
                    struct returned *ret)
{
        struct ae_ops_input inputs[AE_OPS_SUM_MAX];
        struct ae_ops_sum sum = {
                .acc = array_fill(0, FILL_F32, shape),
                .n = shape->n,
                .inputs = inputs,
                .n_inputs = way / 3,
                .keep = shape->seed & 1,
                .check = shape->seed % 5 != 0,
                .norm = shape->seed % 7 != 0,
        };

        for (size_t k = 0; k < sum.n_inputs; k++) {
                bool narrow = way % 3 == 0 || (way % 3 == 2 && (shape->seed + k * k) % 3 != 0);
                void *data = array_fill(1 + k, narrow ? FILL_BF16 : FILL_F32, shape);

                inputs[k] = (struct ae_ops_input){
                        .data = data,
                        .dtype = narrow ? AE_DTYPE_BF16 : AE_DTYPE_F32,
                };
        }
        ops->sum(&sum);
        ret->nonfinite = sum.nonfinite;
        ret->infinite = sum.infinite;
        ret->norm2 = sum.norm2;
}

/* Ways 0..2: no weights, bf16, fp32. */
static void run_adamw(const struct ae_ops *ops, const struct shape *shape, size_t way,
                      struct returned *ret)
{
        const struct ae_hyper hyper = { 1e-3, 0.9, 0.999, 1e-8, 0.1 };
        struct ae_adamw scalars;
        float *p = array_fill(0, FILL_F32, shape), *m = array_fill(1, FILL_F32, shape);
        float *v = array_fill(2, FILL_F32_POSITIVE, shape), *g = array_fill(3, FILL_F32, shape);
        void *weight = array_fill(4, way == 1 ? FILL_BF16 : FILL_F32, shape);

        (void)ret;
        ae_adamw_scalars(&hyper, 1 + shape->seed % 9, 0.37, &scalars);
        ops->adamw(&scalars, p, m, v, g, way == 0 ? NULL : weight,
                   way == 1 ? AE_DTYPE_BF16 : AE_DTYPE_F32, shape->n);
}

/* Ways 0..11: with and without momentum and weight decay, times AdamW's. */
static void run_sgd(const struct ae_ops *ops, const struct shape *shape, size_t way,
                    struct returned *ret)
{
        const struct ae_sgd scalars = {
                .grad_scale = 0.37f,
                .lr = 0.01f,
                .momentum = way & 1 ? 0.9f : 0,
                .weight_decay = way & 2 ? 0.1f : 0,
        };
        float *p = array_fill(0, FILL_F32, shape), *m = array_fill(1, FILL_F32, shape);
        float *g = array_fill(2, FILL_F32, shape);
        void *weight = array_fill(3, way / 4 == 1 ? FILL_BF16 : FILL_F32, shape);

        (void)ret;
        ops->sgd(&scalars, p, way & 1 ? m : NULL, g, way / 4 == 0 ? NULL : weight,
                 way / 4 == 1 ? AE_DTYPE_BF16 : AE_DTYPE_F32, shape->n);
}

static const struct kernel kernel_table[] = {
        { "f32_to_bf16", 1, run_to_bf16 },
        { "bf16_to_f32", 1, run_to_f32 },
        { "norm2", 1, run_norm2 },
        { "finite", 2, run_finite },
        { "sum", 3 * (AE_OPS_SUM_MAX + 1), run_sum },
        { "adamw", 3, run_adamw },
        { "sgd", 12, run_sgd },
};

static const struct ae_ops *variant;

/* One way of one kernel: the reference first, then the variant on the same contents. */
static void compare(const struct kernel *kernel, const struct shape *shape, size_t way)
{
        struct returned expected = { 0 }, got = { 0 };

        for (size_t i = 0; i < N_ARRAYS; i++)
                arrays[i].filled = false;
        kernel->run(ae_ops_find("c"), shape, way, &expected);
        arrays_keep();
        kernel->run(variant, shape, way, &got);
        returned_check(&expected, &got, kernel->name, variant, shape);
        arrays_check(kernel->name, variant, shape);
}

static void arrays_open(size_t len)
{
        for (size_t i = 0; i < N_ARRAYS; i++)
                array_open(&arrays[i], len);
}

static void arrays_close(void)
{
        for (size_t i = 0; i < N_ARRAYS; i++)
                array_close(&arrays[i]);
}

/* All lengths up to MAX_LEN, clean and dirty; the ways take turns. */
static void sweep(bool at_end)
{
        arrays_open(MAX_LEN * sizeof(float) + 4 * MARGIN);
        for (size_t k = 0; k < AE_ARRAY_LEN(kernel_table); k++) {
                for (size_t i = 0; i < 2 * (MAX_LEN + 1); i++) {
                        struct shape shape = {
                                .n = i / 2,
                                .at_end = at_end,
                                .off = (i * 7) % 16,
                                .dirty = i & 1,
                                .seed = i + 1 + (i >> 3),
                        };

                        compare(&kernel_table[k], &shape, (i * 5) % kernel_table[k].n_ways);
                        compare(&kernel_table[k], &shape, (i * 11 + 3) % kernel_table[k].n_ways);
                }
        }
        arrays_close();
}

static void lengths(void **unused)
{
        (void)unused;
        sweep(false);
}

/* Arrays end at an inaccessible page, so that one element too many is a fault. */
static void ends(void **unused)
{
        (void)unused;
        sweep(true);
}

/* Every alignment, all arrays alike, around the sizes at which kernels change their loops. */
static void alignments(void **unused)
{
        static const size_t around[] = { 1, 16, 33, 64, 129 };

        (void)unused;
        arrays_open(MAX_LEN * sizeof(float) + 4 * MARGIN);
        for (size_t i = 0; i < 16 * AE_ARRAY_LEN(around) * AE_ARRAY_LEN(kernel_table); i++) {
                const struct kernel *kernel = &kernel_table[i / 16 / AE_ARRAY_LEN(around)];
                struct shape shape = {
                        .n = around[i / 16 % AE_ARRAY_LEN(around)],
                        .same_off = true,
                        .off = i % 16,
                        .seed = i + 1,
                };

                compare(kernel, &shape, i % kernel->n_ways);
        }
        arrays_close();
}

/* Every way of every kernel, with several tiles, a few vectors and a rest. */
static void ways(void **unused)
{
        (void)unused;
        arrays_open(2 * MAX_LEN * sizeof(float) + 4 * MARGIN);
        for (size_t k = 0; k < AE_ARRAY_LEN(kernel_table); k++) {
                for (size_t i = 0; i < 4 * kernel_table[k].n_ways; i++) {
                        struct shape shape = {
                                .n = 300 + i % 7,
                                .off = i % 16,
                                .dirty = i / kernel_table[k].n_ways > 1,
                                .seed = i + i / kernel_table[k].n_ways + 1,
                        };

                        compare(&kernel_table[k], &shape, i % kernel_table[k].n_ways);
                }
        }
        arrays_close();
}

/* Around and over norm blocks. */
static void blocks(void **unused)
{
        static const size_t lens[] = { 4095, 4096, 4097, 8192 + 16, 12345 };

        (void)unused;
        arrays_open(12345 * sizeof(float) + 4 * MARGIN);
        for (size_t k = 0; k < AE_ARRAY_LEN(kernel_table); k++) {
                for (size_t i = 0; i < 2 * AE_ARRAY_LEN(lens); i++) {
                        struct shape shape = {
                                .n = lens[i / 2],
                                .off = (3 * i) % 16,
                                .dirty = i & 1 && i > 6,
                                .seed = 7 * i + 1 + (i & 1),
                        };

                        compare(&kernel_table[k], &shape, (7 * i + 2) % kernel_table[k].n_ways);
                }
        }
        arrays_close();
}

/* Results of over a MiB, which are written past the caches where they are aligned. */
static void streams(void **unused)
{
        static const struct {
                size_t kernel, way, n, off;
        } cases[] = {
                { 4, 3 * 2, 270013, 0 }, { 4, 3 * 1 + 1, 270013, 0 }, { 4, 3 * 1, 270013, 3 },
                { 5, 1, 530013, 0 },     { 5, 2, 270013, 0 },         { 6, 5, 530013, 0 },
        };

        (void)unused;
        for (size_t i = 0; i < 5; i++)
                array_open(&arrays[i], 530013 * sizeof(float) + 4 * MARGIN);
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                struct shape shape = {
                        .n = cases[i].n,
                        .same_off = true,
                        .off = cases[i].off,
                        .seed = 2 * i + 22,
                };

                compare(&kernel_table[cases[i].kernel], &shape, cases[i].way);
        }
        for (size_t i = 0; i < 5; i++)
                array_close(&arrays[i]);
}

#define ROOTS_N ((size_t)1 << 13)

/*
 * The new p is 2/root, all but one bit of it, for a @v that stays as it is: near enough to the root
 * that most of the quotients sqrt(v)/bc2_sqrt that are off by one bit would be seen.
 */
static void roots(const struct ae_ops *ops, float bc2_sqrt, const float *v, float *ret_p)
{
        static float m[ROOTS_N], g[ROOTS_N], kept[ROOTS_N];
        const struct ae_adamw s = { .beta1 = 1, .beta2 = 1, .step_size = -1, .bc2_sqrt = bc2_sqrt };

        for (size_t i = 0; i < ROOTS_N; i++) {
                m[i] = 0x1.fffffep0F;
                g[i] = ret_p[i] = 0;
        }
        memcpy(kept, v, sizeof(kept));
        ops->adamw(&s, ret_p, m, kept, g, NULL, AE_DTYPE_F32, ROOTS_N);
}

static float of_bits(uint32_t bits)
{
        float x;

        memcpy(&x, &bits, sizeof(x));
        return x;
}

/* The division by one number for all is done without dividing where that gives the same bits. */
static void division(void **unused)
{
        static const float divisors[] = {
                1.0F, 0x1.fffffep-1F, 0x1p-1F, 0x1.000002p-1F, 0x1p-27F, 0x1.fffffep-28F, 0,
                0x1.6a09e6p-27F, 2, -1, 0x1p-149F, 0x1.99999ap-3F, 0x1.555556p-2F, 0x1.fffffep-27F,
        };
        static float v[ROOTS_N], want[ROOTS_N], got[ROOTS_N];

        (void)unused;
        state = 77;
        for (size_t d = 0; d < 250; d++) {
                float divisor = d < AE_ARRAY_LEN(divisors)
                                        ? divisors[d]
                                        : of_bits(0x32000000 + (uint32_t)(next() % 0x0d800000));

                for (size_t i = 0; i < ROOTS_N; i++)
                        v[i] = of_bits(pick_bits(true) & 0x7fffffff);
                roots(ae_ops_find("c"), divisor, v, want);
                roots(variant, divisor, v, got);
                for (size_t i = 0; i < ROOTS_N; i++) {
                        if (memcmp(&got[i], &want[i], sizeof(got[i])) != 0)
                                fail_msg("%s: sqrt(%a) / %a gives %a, not %a", variant->name,
                                         (double)v[i], (double)divisor, (double)got[i],
                                         (double)want[i]);
                }
        }
}

int main(int argc, char **argv)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(lengths), cmocka_unit_test(ends),   cmocka_unit_test(alignments),
                cmocka_unit_test(ways),    cmocka_unit_test(blocks), cmocka_unit_test(streams),
                cmocka_unit_test(division),
        };

        if (argc != 2) {
                fprintf(stderr, "usage: %s VARIANT\n", argv[0]);
                return 2;
        }
        variant = ae_ops_find(argv[1]);
        if (!variant) {
                printf("skipped: this processor or this build lacks %s\n", argv[1]);
                return 77;
        }
        return cmocka_run_group_tests_name("kernels", tests, NULL, NULL);
}
