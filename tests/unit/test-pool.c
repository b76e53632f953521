/* SPDX-License-Identifier: Apache-2.0 */
/* Pools of records: taken zeroed and unlinked, given back and used again, freed once. */
#include "tests/lib/test.h"

#include "proto/base/pool.h"

struct record {
        struct ae_list link;
        uint64_t values[5];
};

static void assert_fresh(struct record *record)
{
        assert_true(ae_list_empty(&record->link)); /* linked to itself: unlinking it is harmless */
        ae_list_unlink(&record->link);
        for (size_t i = 0; i < 5; i++)
                assert_int_equal(record->values[i], 0);
}

static void test_reuse(void **state)
{
        struct record *a;
        struct record *b;
        struct ae_pool pool;

        (void)state;
        ae_pool_init(&pool, sizeof(struct record));
        a = ae_pool_take(&pool);
        b = ae_pool_take(&pool);
        assert_ptr_not_equal(a, b);
        assert_fresh(a);
        assert_fresh(b);
        memset(a->values, 0xa5, sizeof(a->values));
        memset(b->values, 0x5a, sizeof(b->values));
        ae_pool_give(&pool, a);
        ae_pool_give(&pool, b);
        assert_ptr_equal(ae_pool_take(&pool), b); /* the warmest first */
        assert_fresh(b);
        assert_ptr_equal(ae_pool_take(&pool), a);
        assert_fresh(a);
        ae_pool_give(&pool, a);
        ae_pool_give(&pool, b);
        ae_pool_deinit(&pool);
        assert_true(ae_list_empty(&pool.free));
}

static void test_steady_state(void **state)
{
        struct record *held[16];
        struct record *again;
        struct ae_pool pool;

        (void)state;
        ae_pool_init(&pool, sizeof(struct record));
        for (size_t i = 0; i < 16; i++)
                held[i] = ae_pool_take(&pool);
        for (size_t i = 0; i < 16; i++)
                ae_pool_give(&pool, held[i]);
        for (size_t i = 0; i < 16; i++) { /* the same sixteen */
                again = ae_pool_take(&pool);
                assert_ptr_equal(again, held[15 - i]);
        }
        for (size_t i = 0; i < 16; i++)
                ae_pool_give(&pool, held[i]);
        ae_pool_deinit(&pool);
        ae_pool_deinit(&pool); /* an empty one has nothing to free */
}

int main(void)
{
        const struct CMUnitTest tests[] = { cmocka_unit_test(test_reuse),
                                            cmocka_unit_test(test_steady_state) };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
