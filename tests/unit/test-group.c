/* SPDX-License-Identifier: Apache-2.0 */
/* Expert and expert-data-parallel groups: worked examples, all small worlds, refusals. */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/group.h"

#include "tests/lib/test.h"

#include <string.h>

#define WORLD_MAX 64

static struct ae_group_topology topology(uint32_t world, uint32_t ep_size, uint32_t order)
{
        struct ae_group_topology t;

        assert_int_equal(ae_group_init(world, ep_size, order, &t), 0);
        return t;
}

static void assert_ep_group(const struct ae_group_topology *t, uint32_t index,
                            const uint32_t *ranks)
{
        for (uint32_t i = 0; i < t->ep_size; i++)
                assert_int_equal(ae_group_ep_member(t, index, i), ranks[i]);
}

static void assert_edp_group(const struct ae_group_topology *t, uint32_t index,
                             const uint32_t *ranks)
{
        for (uint32_t i = 0; i < t->edp_size; i++)
                assert_int_equal(ae_group_edp_member(t, index, i), ranks[i]);
}

static void eight_ranks_by_four(void **state)
{
        struct ae_group_topology t = topology(8, 4, AE_ORDER_ED);

        (void)state;
        assert_int_equal(t.edp_size, 2);
        assert_ep_group(&t, 0, (uint32_t[]){ 0, 1, 2, 3 });
        assert_ep_group(&t, 1, (uint32_t[]){ 4, 5, 6, 7 });
        for (uint32_t i = 0; i < 4; i++)
                assert_edp_group(&t, i, (uint32_t[]){ i, i + 4 });
        assert_int_equal(ae_group_ep_rank(&t, 6), 2);
        assert_int_equal(ae_group_ep_index(&t, 6), 1);
        assert_int_equal(ae_group_edp_rank(&t, 6), 1);
        assert_int_equal(ae_group_edp_index(&t, 6), 2);

        t = topology(8, 4, AE_ORDER_DE);
        assert_ep_group(&t, 0, (uint32_t[]){ 0, 2, 4, 6 });
        assert_ep_group(&t, 1, (uint32_t[]){ 1, 3, 5, 7 });
        for (uint32_t i = 0; i < 4; i++)
                assert_edp_group(&t, i, (uint32_t[]){ 2 * i, 2 * i + 1 });
        assert_int_equal(ae_group_ep_rank(&t, 5), 2);
        assert_int_equal(ae_group_ep_index(&t, 5), 1);
}

/* Eight experts on four positions, two each, the same in every group. */
static void experts_have_a_home(void **state)
{
        struct ae_group_topology t = topology(8, 4, AE_ORDER_ED);

        (void)state;
        assert_int_equal(ae_group_check_experts(&t, 8), 0);
        for (uint32_t e = 0; e < 8; e++)
                assert_int_equal(ae_group_expert_home(&t, 8, e), e / 2);
        for (uint32_t p = 0; p < 4; p++)
                assert_int_equal(ae_group_expert_first(&t, 8, p), 2 * p);
}

/* Members of all groups are all ranks, each once, and member and position are inverse. */
static void check_partition(const struct ae_group_topology *t)
{
        bool in_ep[WORLD_MAX] = { false }, in_edp[WORLD_MAX] = { false };

        for (uint32_t g = 0; g < t->edp_size; g++) {
                for (uint32_t i = 0; i < t->ep_size; i++) {
                        uint32_t ep = ae_group_ep_member(t, g, i);
                        uint32_t edp = ae_group_edp_member(t, i, g);

                        assert_true(ep < t->world && !in_ep[ep]);
                        assert_true(edp < t->world && !in_edp[edp]);
                        in_ep[ep] = in_edp[edp] = true;
                        assert_int_equal(ae_group_ep_index(t, ep), g);
                        assert_int_equal(ae_group_ep_rank(t, ep), i);
                        assert_int_equal(ae_group_edp_index(t, edp), i);
                        assert_int_equal(ae_group_edp_rank(t, edp), g);
                }
        }
        for (uint32_t rank = 0; rank < t->world; rank++)
                assert_true(in_ep[rank] && in_edp[rank]);
}

/* Ranks of one EDP group, and only they, hold the same position of their EP groups; members of a
 * group stand in rising rank order. */
static void check_roles(const struct ae_group_topology *t)
{
        for (uint32_t a = 0; a < t->world; a++) {
                for (uint32_t b = 0; b < t->world; b++)
                        assert_int_equal(ae_group_edp_index(t, a) == ae_group_edp_index(t, b),
                                         ae_group_ep_rank(t, a) == ae_group_ep_rank(t, b));
        }
        for (uint32_t g = 0; g < t->edp_size; g++) {
                for (uint32_t i = 1; i < t->ep_size; i++)
                        assert_true(ae_group_ep_member(t, g, i - 1) <
                                    ae_group_ep_member(t, g, i));
        }
        for (uint32_t g = 0; g < t->ep_size; g++) {
                for (uint32_t i = 1; i < t->edp_size; i++)
                        assert_true(ae_group_edp_member(t, g, i - 1) <
                                    ae_group_edp_member(t, g, i));
        }
}

static void check_experts(const struct ae_group_topology *t)
{
        for (uint32_t per_rank = 1; per_rank <= 3; per_rank++) {
                uint32_t n = t->ep_size * per_rank;

                assert_int_equal(ae_group_check_experts(t, n), 0);
                for (uint32_t e = 0; e < n; e++) {
                        uint32_t home = ae_group_expert_home(t, n, e);
                        uint32_t first = ae_group_expert_first(t, n, home);

                        assert_true(home < t->ep_size);
                        assert_true(e >= first && e < first + per_rank);
                }
        }
}

static void groups_partition_every_world(void **state)
{
        (void)state;
        for (uint32_t world = 1; world <= WORLD_MAX; world++) {
                for (uint32_t ep_size = 0; ep_size <= world + 1; ep_size++) {
                        for (uint32_t order = AE_ORDER_ED; order <= AE_ORDER_DE; order++) {
                                struct ae_group_topology t;
                                int r = ae_group_init(world, ep_size, order, &t);
                                bool legal = ep_size > 0 && world % ep_size == 0;

                                assert_int_equal(r, legal ? 0 : AE_EINVAL);
                                if (!legal)
                                        continue;
                                assert_int_equal(t.ep_size * t.edp_size, world);
                                check_partition(&t);
                                check_roles(&t);
                                check_experts(&t);
                        }
                }
        }
}

static void large_worlds_do_not_wrap(void **state)
{
        struct ae_group_topology t = topology(UINT32_MAX, 65537, AE_ORDER_DE);

        (void)state;
        assert_int_equal(t.edp_size, 65535);
        assert_int_equal(ae_group_ep_member(&t, 65534, 65536), UINT32_MAX - 1);
        assert_int_equal(ae_group_ep_rank(&t, UINT32_MAX - 1), 65536);
        t = topology(UINT32_MAX, 65537, AE_ORDER_ED);
        assert_int_equal(ae_group_edp_member(&t, 65536, 65534), UINT32_MAX - 1);
}

static void assert_init_refused(uint32_t world, uint32_t ep_size, uint32_t order, const char *text)
{
        struct ae_group_topology t = { .world = 77 };

        assert_int_equal(ae_group_init(world, ep_size, order, &t), AE_EINVAL);
        assert_string_equal(ae_error_text(), text);
        assert_int_equal(t.world, 77);
}

static void refusals_list_the_divisors(void **state)
{
        (void)state;
        assert_init_refused(12, 5, AE_ORDER_ED, "cannot form expert groups of 12 ranks: ep_size 5 "
                            "does not divide it (legal: 1, 2, 3, 4, 6, 12)");
        assert_init_refused(16, 0, AE_ORDER_DE, "cannot form expert groups of 16 ranks: ep_size 0 "
                            "does not divide it (legal: 1, 2, 4, 8, 16)");
        assert_init_refused(7, 8, AE_ORDER_ED, "cannot form expert groups of 7 ranks: ep_size 8 "
                            "does not divide it (legal: 1, 7)");
        assert_init_refused(1, 2, AE_ORDER_ED, "cannot form expert groups of 1 ranks: ep_size 2 "
                            "does not divide it (legal: 1)");
        assert_init_refused(0, 1, AE_ORDER_ED,
                            "cannot form expert groups: the world has no ranks");
        assert_init_refused(8, 4, 2, "cannot form expert groups of 8 ranks: unknown order 2");
}

/* 3,491,888,400 has 1,920 divisors, many more than are shown. */
static void long_lists_are_cut(void **state)
{
        struct ae_group_topology t;

        (void)state;
        assert_int_equal(ae_group_init(UINT32_C(3491888400), 23, AE_ORDER_ED, &t), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), "(legal: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"));
        assert_non_null(strstr(ae_error_text(), ", ...)"));
        assert_int_equal(ae_group_init(UINT32_MAX, 2, AE_ORDER_ED, &t), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), ", 1431655765, 4294967295)"));
}

static void experts_must_divide(void **state)
{
        struct ae_group_topology t = topology(24, 8, AE_ORDER_ED);

        (void)state;
        assert_int_equal(ae_group_check_experts(&t, 60), AE_EINVAL);
        assert_string_equal(ae_error_text(), "cannot place 60 experts: ep_size 8 does not divide "
                            "it (legal for 24 ranks: 1, 2, 3, 4, 6, 12)");
        assert_int_equal(ae_group_check_experts(&t, 4), AE_EINVAL);
        assert_string_equal(ae_error_text(), "cannot place 4 experts: ep_size 8 does not divide "
                            "it (legal for 24 ranks: 1, 2, 4)");
        assert_int_equal(ae_group_check_experts(&t, 0), AE_EINVAL);
        assert_string_equal(ae_error_text(), "cannot place experts on groups of 8 ranks: there "
                            "are no experts");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(eight_ranks_by_four),
                cmocka_unit_test(experts_have_a_home),
                cmocka_unit_test(groups_partition_every_world),
                cmocka_unit_test(large_worlds_do_not_wrap),
                cmocka_unit_test(refusals_list_the_divisors),
                cmocka_unit_test(long_lists_are_cut),
                cmocka_unit_test(experts_must_divide),
        };

        return cmocka_run_group_tests_name("group", tests, NULL, NULL);
}
