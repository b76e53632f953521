/* SPDX-License-Identifier: Apache-2.0 */
/* Each kind of task does what it says to the ranges it names and to nothing beside them. */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/wire/balance.h"
#include "proto/wire/layout.h"
#include "server/core/task.h"

#include <stdlib.h>
#include <string.h>

#define N 3001u /* not a multiple of anything that a kernel likes */

static void fill(float *x, uint32_t n, int seed)
{
        srand((unsigned)seed);
        for (uint32_t i = 0; i < n; i++)
                x[i] = ((float)rand() / (float)RAND_MAX - 0.5f) * (float)(1 + i % 97);
}

static void test_sum(void **state)
{
        static float a[N];
        static float b[N];
        static float acc[N + 1];
        struct ae_task task = { .kind = AE_TASK_SUM };
        struct ae_longacc norm2 = { { 0 } };

        (void)state;
        fill(a, N, 1);
        fill(b, N, 2);
        acc[N] = 77;
        task.sum.sum = (struct ae_ops_sum){ .acc = acc, .n = N, .n_inputs = 2, .norm = true };
        task.sum.inputs[0] = (struct ae_ops_input){ a, AE_DTYPE_F32 };
        task.sum.inputs[1] = (struct ae_ops_input){ b, AE_DTYPE_F32 };
        ae_task_run(&task, 0);
        for (uint32_t i = 0; i < N; i++)
                assert_true(acc[i] == a[i] + b[i]);
        assert_true(acc[N] == 77);
        assert_true(ae_ops()->norm2(acc, N, &norm2));
        assert_memory_equal(&task.sum.sum.norm2, &norm2, sizeof(norm2));
        assert_false(task.sum.sum.infinite);
}

/* A first piece that covers a part of its cell: the rest of the cell is zero, not what was there.
 */
static void test_sum_zeroes(void **state)
{
        static float a[100];
        static float acc[N + 1];
        struct ae_task task = { .kind = AE_TASK_SUM };

        (void)state;
        fill(a, 100, 3);
        for (uint32_t i = 0; i <= N; i++)
                acc[i] = 77;
        task.sum.zero = acc;
        task.sum.n_zero = N;
        task.sum.sum = (struct ae_ops_sum){ .acc = acc + 200, .n = 100, .n_inputs = 1,
                                           .keep = true };
        task.sum.inputs[0] = (struct ae_ops_input){ a, AE_DTYPE_F32 };
        ae_task_run(&task, 0);
        for (uint32_t i = 0; i < N; i++)
                assert_true(acc[i] == (i >= 200 && i < 300 ? a[i - 200] : 0));
        assert_true(acc[N] == 77);
}

static void test_sum_checks(void **state)
{
        float a[4] = { 1, 2, 3, 4 };
        float b[4] = { 1, __builtin_nanf(""), 3, 4 };
        float acc[4];
        struct ae_task task = { .kind = AE_TASK_SUM };

        (void)state;
        task.sum.sum = (struct ae_ops_sum){ .acc = acc, .n = 4, .n_inputs = 2, .check = true };
        task.sum.inputs[0] = (struct ae_ops_input){ a, AE_DTYPE_F32 };
        task.sum.inputs[1] = (struct ae_ops_input){ b, AE_DTYPE_F32 };
        ae_task_run(&task, 0);
        assert_int_equal(task.sum.sum.nonfinite, 2);
}

static void test_copy(void **state)
{
        char from[] = "some bytes";
        char to[] = "..............";
        struct ae_task task = { .kind = AE_TASK_COPY, .copy = { to + 1, from + 5, 5 } };

        (void)state;
        ae_task_run(&task, 0);
        assert_string_equal(to, ".bytes........");
}

/* Sums that are rounded where they are made may be narrowed by any owner without another rounding.
 */
static void test_round_then_narrow(void **state)
{
        static float x[N];
        static float rounded[N + 1];
        static ae_bf16 once[N];
        static ae_bf16 twice[N + 1];
        static float wide[N];
        struct ae_task round = { .kind = AE_TASK_ROUND,
                                 .copy = { .to = rounded, .len = N * sizeof(float) } };
        struct ae_task narrow = { .kind = AE_TASK_NARROW,
                                  .copy = { twice, rounded, N * sizeof(float) } };

        (void)state;
        fill(x, N, 4);
        x[5] = 1.00390625f; /* half way between two: to even */
        x[6] = 1.01171875f;
        x[7] = -0.0f;
        x[8] = 0x1p-140f;
        x[9] = 3.4e38f; /* rounds to infinity */
        memcpy(rounded, x, sizeof(x));
        rounded[N] = 77.123f;
        twice[N] = 0x1234;
        ae_task_run(&round, 0);
        assert_true(rounded[N] == 77.123f);
        ae_task_run(&narrow, 0);
        assert_int_equal(twice[N], 0x1234);
        ae_ops()->f32_to_bf16(once, x, N);
        assert_memory_equal(twice, once, sizeof(once));
        ae_ops()->bf16_to_f32(wide, twice, N);
        assert_memory_equal(wide, rounded, sizeof(wide));
        ae_task_run(&round, 0); /* again changes nothing */
        assert_memory_equal(wide, rounded, sizeof(wide));
}

static void test_state(void **state)
{
        float from[5] = { 1, 1.00390625f, -2.5f, 0, 1e-30f };
        float master[6] = { [5] = 77 };
        ae_bf16 narrow[6] = { [5] = 0x1234 };
        ae_bf16 want[5];
        float wide[5] = { 0 };
        struct ae_task task = { .kind = AE_TASK_STATE, .state = { .from = from, .n = 5 } };

        (void)state;
        ae_ops()->f32_to_bf16(want, from, 5);
        task.state.state = master;
        task.state.weight = narrow;
        task.state.weight_dtype = AE_DTYPE_BF16;
        ae_task_run(&task, 0);
        assert_memory_equal(master, from, sizeof(from));
        assert_memory_equal(narrow, want, sizeof(want));
        assert_true(master[5] == 77 && narrow[5] == 0x1234);
        task.state.weight = wide;
        task.state.weight_dtype = AE_DTYPE_F32;
        ae_task_run(&task, 0);
        assert_memory_equal(wide, from, sizeof(from));
        memset(master, 0, sizeof(master)); /* a moment: no weight follows */
        task.state.weight = NULL;
        ae_task_run(&task, 0);
        assert_memory_equal(master, from, sizeof(from));
        memset(narrow, 0, sizeof(narrow)); /* a frozen tensor: bytes as they are */
        task.state = (struct ae_task_state){ .weight = narrow, .weight_dtype = AE_DTYPE_BF16,
                                             .from = want, .n = 5 };
        ae_task_run(&task, 0);
        assert_memory_equal(narrow, want, sizeof(want));
}

/* ---- balance ---------------------------------------------------------------------------- */

#define N_EXPERTS 100000u /* a bias that is cut over several nodes */

static struct ae_layout *make_layout(uint32_t n_nodes)
{
        const struct ae_tensor_spec specs[] = {
                { .name = "w", .unit = "u", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 4096 } },
                { .name = "b0", .unit = "u", .dtype = AE_DTYPE_F32, .class = AE_CLASS_BUFFER,
                  .n_dims = 1, .dims = { 60 } },
                { .name = "b1", .unit = "u", .dtype = AE_DTYPE_F32, .class = AE_CLASS_BUFFER,
                  .n_dims = 1, .dims = { N_EXPERTS } },
                { .name = "b2", .unit = "v", .dtype = AE_DTYPE_F32, .class = AE_CLASS_BUFFER,
                  .n_dims = 1, .dims = { 8 } },
        };
        struct ae_layout *layout = NULL;

        assert_int_equal(ae_layout_new(specs, AE_ARRAY_LEN(specs), n_nodes, &layout), 0);
        return layout;
}

/* Runs one task per slice of the segment; the biases of the segment come out whole. */
static uint32_t balance_slices(const struct ae_layout *layout, const uint64_t *counts, float *image,
                               uint32_t s)
{
        const struct ae_layout_segment *segment = &layout->segments[s];

        for (uint32_t i = 0; i < segment->n_slices; i++) {
                const struct ae_layout_slice *slice = &layout->slices[segment->slice_first + i];
                struct ae_task task = { .kind = AE_TASK_BALANCE };
                float *own = malloc(slice->n * sizeof(float)); /* a byte beside it shows */

                assert_non_null(own);
                memcpy(own, image + slice->first, slice->n * sizeof(float));
                task.balance = (struct ae_task_balance){
                        .layout = layout, .segment = segment, .slice = slice, .counts = counts,
                        .rate = 1e-3, .weight = own,
                };
                ae_task_run(&task, 0);
                memcpy(image + slice->first, own, slice->n * sizeof(float));
                free(own);
        }
        return segment->n_slices;
}

static void check_balance(uint32_t n_nodes, uint32_t n_slices)
{
        static uint64_t counts[60 + N_EXPERTS + 8];
        static float bias[N_EXPERTS];
        static float image[N_EXPERTS + 4096];
        struct ae_layout *layout = make_layout(n_nodes);
        uint32_t s = layout->tensors[1].segment;
        const struct ae_layout_tensor *b1 = &layout->tensors[2];

        srand(9);
        for (size_t i = 0; i < AE_ARRAY_LEN(counts); i++)
                counts[i] = (uint64_t)rand() % 4;
        memset(image, 0, sizeof(image));
        memset(bias, 0, sizeof(bias));
        for (uint64_t i = 0; i < N_EXPERTS; i++)
                bias[i] = image[b1->first + i] = (float)(i % 7) * 0.25f;
        assert_int_equal(balance_slices(layout, counts, image, s), n_slices);
        ae_balance_step(bias, counts + 60, N_EXPERTS, 1e-3);
        assert_memory_equal(image + b1->first, bias, sizeof(bias));
        memset(bias, 0, 60 * sizeof(float));
        ae_balance_step(bias, counts, 60, 1e-3);
        assert_memory_equal(image + layout->tensors[1].first, bias, 60 * sizeof(float));
        for (uint64_t i = 60; i < b1->first; i++)
                assert_true(image[i] == 0); /* the gap between the two */
        memset(image, 0, sizeof(image));
        (void)balance_slices(layout, counts, image, layout->tensors[3].segment);
        memset(bias, 0, 8 * sizeof(float));
        ae_balance_step(bias, counts + 60 + N_EXPERTS, 8, 1e-3);
        assert_memory_equal(image, bias, 8 * sizeof(float));
        ae_layout_free(layout);
}

static void test_balance(void **state)
{
        (void)state;
        check_balance(1, 1);
        check_balance(2, 2);
        check_balance(5, 2); /* 400 KB are worth two owners */
}

/* Whoever carries more than the mean goes down, in integers: no count is too large. */
static void test_balance_rule(void **state)
{
        uint64_t counts[4] = { UINT64_MAX, 0, UINT64_MAX / 2, UINT64_MAX };
        float bias[4] = { 0 };

        (void)state;
        ae_balance_step(bias, counts, 4, 0.5);
        assert_true(bias[0] == -0.5f && bias[1] == 0.5f && bias[2] == 0.5f && bias[3] == -0.5f);
        counts[0] = counts[1] = counts[2] = counts[3] = 9;
        ae_balance_step(bias, counts, 4, 0.5);
        assert_true(bias[0] == -0.5f && bias[1] == 0.5f);
        ae_balance_step(bias, counts, 0, 0.5);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_sum),
                cmocka_unit_test(test_sum_zeroes),
                cmocka_unit_test(test_sum_checks),
                cmocka_unit_test(test_copy),
                cmocka_unit_test(test_round_then_narrow),
                cmocka_unit_test(test_state),
                cmocka_unit_test(test_balance),
                cmocka_unit_test(test_balance_rule),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
