/* SPDX-License-Identifier: Apache-2.0 */
/* Shards of real models are balanced: the fullest node against the mean, in fp32 state and in
 * weight bytes, for the node counts that people run. */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include "tests/lib/shapes.h"
#include "tests/lib/test.h"

#define LIMIT 1.05
/* Below this share of a node the cut of 256 KiB is too coarse for the limit; see layout.h. */
#define SHARE_MIN (20 * (uint64_t)AE_LAYOUT_SLICE_MIN)

struct load {
        uint64_t total, most, least;
};

static struct load load_of(const uint64_t *values, uint32_t n)
{
        struct load load = { .least = UINT64_MAX };

        for (uint32_t i = 0; i < n; i++) {
                load.total += values[i];
                load.most = AE_MAX(load.most, values[i]);
                load.least = AE_MIN(load.least, values[i]);
        }
        return load;
}

static double excess(const struct load *load, uint32_t n_nodes)
{
        return (double)load->most * n_nodes / (double)load->total;
}

/* Whether @load, of elements or bytes, is within the limit. */
static void check_limit(const struct load *load, const struct shapes *shapes, uint32_t n_nodes,
                        const char *what)
{
        if (excess(load, n_nodes) > LIMIT)
                fail_msg("%s over %u nodes: the fullest has %.4f of the mean in %s",
                         shapes->model, n_nodes, excess(load, n_nodes), what);
}

/* Returns whether a node's share of weights was large enough for the limit to hold; it then did.
 * State is held to it where its bf16 weights are large enough. */
static bool check(const struct shapes *shapes, uint32_t n_nodes)
{
        struct ae_layout *layout = NULL;
        struct load state, weight;

        assert_int_equal(ae_layout_new(shapes->specs, shapes->n_specs, n_nodes, &layout), 0);
        state = load_of(layout->node_state_n, n_nodes);
        weight = load_of(layout->node_weight_len, n_nodes);
        assert_null(ae_layout_free(layout));
        /* True for any size: no two nodes differ by more than a slice. */
        assert_in_range(state.most - state.least, 0, AE_LAYOUT_SLICE_MIN / 2);
        if (2 * state.total / n_nodes >= SHARE_MIN)
                check_limit(&state, shapes, n_nodes, "fp32 state");
        if (weight.total / n_nodes < SHARE_MIN)
                return false;
        check_limit(&weight, shapes, n_nodes, "weights");
        return true;
}

static void shards_differ_by_5_percent(void **state)
{
        static const uint32_t n_nodes[] = { 1, 2, 3, 4, 7, 8, 16, 32, 64, 100, 128 };

        (void)state;
        for (uint32_t model = 0; model < SHAPES_N_MODELS; model++) {
                for (uint32_t dtype = AE_DTYPE_F32; dtype <= AE_DTYPE_BF16; dtype++) {
                        struct shapes *shapes = shapes_new(model, dtype, false);

                        for (size_t i = 0; i < AE_ARRAY_LEN(n_nodes); i++)
                                assert_true(check(shapes, n_nodes[i]));
                        assert_int_equal(check(shapes, 1000), model == SHAPES_DEEPSEEK_V3);
                        assert_null(shapes_free(shapes));
                }
        }
}

/* As in fine-tuning: everything is frozen but the norms. */
static void frozen_models_balance_too(void **state)
{
        struct shapes *shapes = shapes_new(SHAPES_QWEN3_30B_A3B, AE_DTYPE_BF16, false);

        (void)state;
        for (uint32_t i = 0; i < shapes->n_specs; i++)
                shapes->specs[i].frozen = shapes->specs[i].n_dims == 2;
        for (uint32_t n_nodes = 1; n_nodes <= 128; n_nodes += 3)
                assert_true(check(shapes, n_nodes));
        assert_null(shapes_free(shapes));
}

/* The shapes themselves: parameters of the whole model, as published (with selection biases). */
static void parameters_add_up(void **state)
{
        static const uint64_t expected[SHAPES_N_MODELS] = {
                [SHAPES_QWEN3_30B_A3B] = UINT64_C(30532122624),
                [SHAPES_MIXTRAL_8X7B] = UINT64_C(46702792704),
                [SHAPES_DEEPSEEK_V3] = UINT64_C(671026419200),
        };

        (void)state;
        for (uint32_t model = 0; model < SHAPES_N_MODELS; model++) {
                struct shapes *shapes = shapes_new(model, AE_DTYPE_BF16, true);
                struct ae_layout *layout = NULL;
                uint64_t n = 0;

                assert_int_equal(ae_layout_new(shapes->specs, shapes->n_specs, 1, &layout), 0);
                for (uint32_t i = 0; i < layout->n_tensors; i++)
                        n += layout->tensors[i].n;
                assert_int_equal(n, expected[model]);
                assert_null(ae_layout_free(layout));
                assert_null(shapes_free(shapes));
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(parameters_add_up),
                cmocka_unit_test(shards_differ_by_5_percent),
                cmocka_unit_test(frozen_models_balance_too),
        };

        return cmocka_run_group_tests_name("layout-balance", tests, NULL, NULL);
}
