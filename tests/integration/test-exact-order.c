/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The order of sums: with gradients that are not exact, another placement of the same sum groups,
 * other slots, threads, transport, or the same run once more give the same bits, in the norm and,
 * as it clips, in everything else; another grouping doesn't.
 */
#include "tests/lib/exact.h"
#include "tests/lib/test.h"

#include <string.h>

struct placement {
        const char *name;
        struct cluster_spec cluster;
        uint32_t sum_group, slots;
};

#define N_PLACEMENTS 6

/* Groups of two consecutive ranks. */
static const struct placement pairs[N_PLACEMENTS] = {
        { "1x4", { .n_nodes = 1, .workers = { 4 } }, 2, 0 },
        { "1x4 again", { .n_nodes = 1, .workers = { 4 } }, 2, 0 },
        { "2x2", { .n_nodes = 2, .workers = { 2, 2 } }, 2, 0 },
        { "2x2 again", { .n_nodes = 2, .workers = { 2, 2 } }, 0, 0 },
        { "2x2, two slots, two threads",
          { .n_nodes = 2, .workers = { 2, 2 }, .threads = 2 },
          2,
          2 },
        { "2x2 over tcp", { .n_nodes = 2, .workers = { 2, 2 }, .transport = "tcp" }, 2, 0 },
};

/* Every rank a group of its own, which fits any placement. */
static const struct placement singles[N_PLACEMENTS] = {
        { "1x4", { .n_nodes = 1, .workers = { 4 } }, 1, 0 },
        { "2x2", { .n_nodes = 2, .workers = { 2, 2 } }, 1, 0 },
        { "1+3", { .n_nodes = 2, .workers = { 1, 3 }, .threads = 2 }, 1, 2 },
        { "3+1", { .n_nodes = 2, .workers = { 3, 1 } }, 1, 0 },
        { "2+1+1 over tcp",
          { .n_nodes = 3, .workers = { 2, 1, 1 }, .transport = "tcp" },
          1,
          2 },
        { "4x1", { .n_nodes = 4, .workers = { 1, 1, 1, 1 } }, 0, 0 },
};

static const struct exact_job job = { .world = 4, .accumulate = 2, .optimizer = AUTOEP_ADAMW,
                                      .max_norm = 20, .n_experts = 4, .seed = 9 };

static void run_placement(const struct placement *placement, uint32_t grad_wire,
                          struct exact_digests *ret_digests)
{
        struct exact_reference *reference = exact_reference_new(&job);
        const struct exact_run run = {
                .cluster = placement->cluster, .job = job, .ep_size = 2, .random = true,
                .sum_group = placement->sum_group, .slots = placement->slots,
                .grad_wire = grad_wire,
        };
        int r = exact_run(&run, reference, ret_digests);

        exact_reference_free(reference);
        if (r != 0)
                fail_msg("the run %s fails", placement->name);
}

static void assert_same(const struct exact_digests *a, const struct exact_digests *b,
                        const char *name)
{
        for (uint32_t step = 0; step < EXACT_STEPS; step++) {
                const struct exact_verdict *x = &a->verdicts[step], *y = &b->verdicts[step];

                if (memcmp(x, y, sizeof(*x)) != 0)
                        fail_msg("%s has the norm %a and clips by %a, not %a and %a", name, y->norm,
                                 y->clip, x->norm, x->clip);
                for (uint32_t id = 0; id < EXACT_N_DENSE; id++) {
                        if (a->states[step][id] != b->states[step][id])
                                fail_msg("%s differs in tensor %u after step %u", name, id, step);
                }
                if (memcmp(a->experts[step], b->experts[step], sizeof(a->experts[step])) != 0)
                        fail_msg("%s differs in the experts after step %u", name, step);
        }
}

static void compare_placements(const struct placement *placements, uint32_t grad_wire)
{
        struct exact_digests first, other;

        run_placement(&placements[0], grad_wire, &first);
        for (uint32_t step = 0; step < EXACT_STEPS; step++)
                assert_true(first.verdicts[step].clip < 1); /* the norm counts */
        for (size_t i = 1; i < N_PLACEMENTS; i++) {
                run_placement(&placements[i], grad_wire, &other);
                assert_same(&first, &other, placements[i].name);
        }
}

static void test_pairs_fp32(void **state)
{
        (void)state;
        compare_placements(pairs, AUTOEP_F32);
}

static void test_pairs_bf16(void **state)
{
        (void)state;
        compare_placements(pairs, AUTOEP_BF16);
}

static void test_singles_fp32(void **state)
{
        (void)state;
        compare_placements(singles, AUTOEP_F32);
}

static void test_singles_bf16(void **state)
{
        (void)state;
        compare_placements(singles, AUTOEP_BF16);
}

/* These gradients do tell one order from another. */
static void test_grouping_shows(void **state)
{
        const struct placement ungrouped = { "1x4 in one group", { .n_nodes = 1, .workers = { 4 } },
                                             4, 0 };
        struct exact_digests a, b;

        (void)state;
        run_placement(&pairs[0], AUTOEP_F32, &a);
        run_placement(&ungrouped, AUTOEP_F32, &b);
        assert_true(a.states[0][EXACT_BIG] != b.states[0][EXACT_BIG]);
        assert_true(a.states[0][EXACT_FROZEN] == b.states[0][EXACT_FROZEN]);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_pairs_fp32),
                cmocka_unit_test(test_pairs_bf16),
                cmocka_unit_test(test_singles_fp32),
                cmocka_unit_test(test_singles_bf16),
                cmocka_unit_test(test_grouping_shows),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
