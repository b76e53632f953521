/* SPDX-License-Identifier: Apache-2.0 */
/* Shards of real models are balanced: the fullest node against the mean, in fp32 state and in
 * weight bytes, for the node counts that people run; beyond, by how much they are not. */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include "tests/lib/shapes.h"
#include "tests/lib/test.h"

#define LIMIT 1.05
#define NODES_MAX 1000
#define NARROW 0.0002 /* by how much the excess stays below what is allowed, at its worst */

/*
 * Up to n_state nodes the fullest has at most LIMIT of the mean in state, up to n_weight in weight
 * bytes, and not with one node more. From there on slices of 256 KiB are too coarse for a share,
 * and slices of fp32 routers, of as many elements, have twice the bytes. It never has more than
 * state and weight say. ARCHITECTURE.md and README.md give these figures.
 */
static const struct bound {
        enum shapes_model model;
        uint32_t router_dtype;
        uint32_t n_state, n_weight;
        double state, weight;
} bounds[] = {
        { SHAPES_QWEN3_30B_A3B, AE_DTYPE_F32, 773, 168, 1.0685, 1.1935 },
        { SHAPES_QWEN3_30B_A3B, AE_DTYPE_BF16, 700, 700, 1.0739, 1.0739 },
        { SHAPES_MIXTRAL_8X7B, AE_DTYPE_F32, 732, 682, 1.0688, 1.0753 },
        { SHAPES_MIXTRAL_8X7B, AE_DTYPE_BF16, 729, 729, 1.0688, 1.0688 },
        { SHAPES_DEEPSEEK_V3, AE_DTYPE_F32, NODES_MAX, NODES_MAX, 1.0027, 1.0078 },
        { SHAPES_DEEPSEEK_V3, AE_DTYPE_BF16, NODES_MAX, NODES_MAX, 1.0003, 1.0003 },
};

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

static void measure(const struct shapes *shapes, uint32_t n_nodes, struct load *ret_state,
                    struct load *ret_weight)
{
        struct ae_layout *layout = NULL;

        assert_int_equal(ae_layout_new(shapes->specs, shapes->n_specs, n_nodes, &layout), 0);
        *ret_state = load_of(layout->node_state_n, n_nodes);
        *ret_weight = load_of(layout->node_weight_len, n_nodes);
        assert_null(ae_layout_free(layout));
        /* True for any size: no two nodes differ by more than a slice. */
        assert_in_range(ret_state->most - ret_state->least, 0, AE_LAYOUT_SLICE_MIN / 2);
}

/* Up to @n_limit nodes the limit holds, with one more it doesn't; @most holds for all. */
static double check_load(const struct load *load, const struct shapes *shapes, uint32_t n_nodes,
                         uint32_t n_limit, double most, const char *what)
{
        const double allowed = n_nodes <= n_limit ? AE_MIN(LIMIT, most) : most;
        const double got = excess(load, n_nodes);

        if (got > allowed)
                fail_msg("%s over %u nodes: the fullest has %.4f of the mean in %s, not %.4f",
                         shapes->model, n_nodes, got, what, allowed);
        if (n_nodes == n_limit + 1 && got <= LIMIT)
                fail_msg("%s over %u nodes is within the limit in %s: hold it to that",
                         shapes->model, n_nodes, what);
        return got;
}

static void check_bound(const struct bound *bound)
{
        static const uint32_t some[] = { 1, 2, 3, 4, 7, 8, 16, 32, 64, 100, 128, 200, 256, 333, 500,
                                         512, 650, 796, 900, 931, 949, 981, 995, 998, 1000 };
        const uint32_t ends[] = { bound->n_state, bound->n_state + 1, bound->n_weight,
                                  bound->n_weight + 1 };
        struct shapes *shapes = shapes_new(bound->model, bound->router_dtype, false);
        double most_state = 1, most_weight = 1;

        for (size_t i = 0; i < AE_ARRAY_LEN(some) + AE_ARRAY_LEN(ends); i++) {
                const uint32_t n = i < AE_ARRAY_LEN(some) ? some[i] : ends[i - AE_ARRAY_LEN(some)];
                struct load state, weight;
                double got;

                if (n > NODES_MAX)
                        continue;
                measure(shapes, n, &state, &weight);
                got = check_load(&state, shapes, n, bound->n_state, bound->state, "fp32 state");
                most_state = AE_MAX(most_state, got);
                got = check_load(&weight, shapes, n, bound->n_weight, bound->weight, "weights");
                most_weight = AE_MAX(most_weight, got);
                if (bound->router_dtype == AE_DTYPE_BF16)
                        assert_in_range(weight.most - weight.least, 0, AE_LAYOUT_SLICE_MIN);
        }
        /* What is allowed is what the worst has. */
        if (most_state < bound->state - NARROW)
                fail_msg("%s: %.4f in fp32 state is not reached, %.4f is", shapes->model,
                         bound->state, most_state);
        if (most_weight < bound->weight - NARROW)
                fail_msg("%s: %.4f in weights is not reached, %.4f is", shapes->model,
                         bound->weight, most_weight);
        assert_null(shapes_free(shapes));
}

static void shards_differ_by_5_percent(void **state)
{
        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(bounds); i++)
                check_bound(&bounds[i]);
}

/* As in fine-tuning: everything is frozen but the norms. */
static void frozen_models_balance_too(void **state)
{
        struct shapes *shapes = shapes_new(SHAPES_QWEN3_30B_A3B, AE_DTYPE_BF16, false);
        struct load trained, weight;

        (void)state;
        for (uint32_t i = 0; i < shapes->n_specs; i++)
                shapes->specs[i].frozen = shapes->specs[i].n_dims == 2;
        for (uint32_t n_nodes = 1; n_nodes <= 128; n_nodes += 3) {
                measure(shapes, n_nodes, &trained, &weight);
                check_load(&weight, shapes, n_nodes, NODES_MAX, LIMIT, "weights");
        }
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
