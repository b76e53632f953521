/* SPDX-License-Identifier: Apache-2.0 */
/* First-fit ranges against a plain map of units: nothing handed out twice, neighbours joined. */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "server/core/extent.h"

#include <stdlib.h>
#include <string.h>

#define N_UNITS 512u
#define N_HELD 200u

static const uint64_t len_all = N_UNITS * (uint64_t)AE_EXTENT_ALIGN;

/* The free list: sorted, joined, inside the region, and adding up. */
static void assert_sound(const struct ae_extents *extents)
{
        uint64_t sum = 0;

        for (uint32_t i = 0; i < extents->n; i++) {
                const struct ae_extent *extent = &extents->free[i];

                assert_true(extent->len > 0);
                assert_int_equal(extent->off % AE_EXTENT_ALIGN, 0);
                assert_int_equal(extent->len % AE_EXTENT_ALIGN, 0);
                assert_true(extent->off + extent->len <= len_all);
                if (i > 0)
                        assert_true(extents->free[i - 1].off + extents->free[i - 1].len <
                                    extent->off);
                sum += extent->len;
        }
        assert_int_equal(sum, extents->n_free);
}

static void test_sizes(void **state)
{
        struct ae_extents extents;
        uint64_t off = 77;

        (void)state;
        ae_extents_init(&extents, 1000); /* three whole units */
        assert_int_equal(extents.n_free, 768);
        assert_true(ae_extents_take(&extents, 0, &off)); /* nothing still has a place of its own */
        assert_int_equal(off, 0);
        assert_true(ae_extents_take(&extents, 257, &off));
        assert_int_equal(off, 256);
        assert_int_equal(extents.n_free, 0);
        assert_int_equal(extents.n, 0);
        off = 77;
        assert_false(ae_extents_take(&extents, 1, &off));
        assert_int_equal(off, 77);
        ae_extents_give(&extents, 256, 257);
        ae_extents_give(&extents, 0, 0);
        assert_int_equal(extents.n, 1);
        assert_int_equal(extents.n_free, 768);
        ae_extents_deinit(&extents);
        assert_null(extents.free);
}

static void test_too_small_and_too_large(void **state)
{
        static const uint64_t lens[] = { 1025, 4096, UINT64_MAX - 255, UINT64_MAX - 254,
                                        UINT64_MAX };
        struct ae_extents extents;
        uint64_t off = 77;

        (void)state;
        ae_extents_init(&extents, 255); /* less than a unit: nothing to give */
        assert_false(ae_extents_take(&extents, 1, &off));
        ae_extents_deinit(&extents);
        ae_extents_init(&extents, 1024);
        for (size_t i = 0; i < AE_ARRAY_LEN(lens); i++)
                assert_false(ae_extents_take(&extents, lens[i], &off));
        assert_int_equal(off, 77);
        assert_int_equal(extents.n_free, 1024);
        ae_extents_deinit(&extents);
}

static void test_first_fit(void **state)
{
        struct ae_extents extents;
        uint64_t off[6];

        (void)state;
        ae_extents_init(&extents, len_all);
        for (size_t i = 0; i < AE_ARRAY_LEN(off); i++) {
                assert_true(ae_extents_take(&extents, 512, &off[i]));
                assert_int_equal(off[i], i * 512);
        }
        ae_extents_give(&extents, off[1], 512);
        ae_extents_give(&extents, off[3], 512);
        ae_extents_give(&extents, off[4], 512); /* joins the one before */
        assert_int_equal(extents.n, 3);
        assert_sound(&extents);
        assert_true(ae_extents_take(&extents, 1024, &off[0])); /* not the first hole: too small */
        assert_int_equal(off[0], 3 * 512);
        assert_true(ae_extents_take(&extents, 512, &off[0]));
        assert_int_equal(off[0], 512);
        ae_extents_deinit(&extents);
}

struct held {
        uint64_t off, len;
};

/* Where a first fit must land, from the map alone; N_UNITS when there is no room. */
static uint32_t fit(const bool *used, uint32_t n)
{
        uint32_t run = 0;

        for (uint32_t i = 0; i < N_UNITS; i++) {
                run = used[i] ? 0 : run + 1;
                if (run == n)
                        return i + 1 - n;
        }
        return N_UNITS;
}

static void take(struct ae_extents *extents, bool *used, struct held *held, uint32_t *n_held)
{
        uint64_t len = (uint64_t)(rand() % (8 * (int)AE_EXTENT_ALIGN));
        uint32_t n = (uint32_t)AE_MAX(ae_div_up(len, AE_EXTENT_ALIGN), UINT64_C(1));
        uint32_t want = fit(used, n);
        uint64_t off;
        bool got = ae_extents_take(extents, len, &off);

        assert_int_equal(got, want < N_UNITS);
        if (!got)
                return;
        assert_int_equal(off, (uint64_t)want * AE_EXTENT_ALIGN);
        memset(used + want, true, n);
        held[(*n_held)++] = (struct held){ off, len };
}

static void give(struct ae_extents *extents, bool *used, struct held *held, uint32_t *n_held)
{
        uint32_t i = (uint32_t)rand() % *n_held;
        struct held h = held[i];

        held[i] = held[--*n_held];
        ae_extents_give(extents, h.off, h.len);
        memset(used + h.off / AE_EXTENT_ALIGN, false,
               AE_MAX(ae_div_up(h.len, AE_EXTENT_ALIGN), UINT64_C(1)));
}

static void test_random(void **state)
{
        static struct held held[N_HELD];
        static bool used[N_UNITS];
        struct ae_extents extents;
        uint32_t n_held = 0;

        (void)state;
        srand(11);
        ae_extents_init(&extents, len_all);
        for (uint32_t i = 0; i < 5000; i++) {
                if (n_held < N_HELD && (n_held == 0 || rand() % 5 < 3))
                        take(&extents, used, held, &n_held);
                else
                        give(&extents, used, held, &n_held);
                assert_sound(&extents);
        }
        while (n_held)
                give(&extents, used, held, &n_held);
        assert_int_equal(extents.n, 1);
        assert_int_equal(extents.n_free, len_all);
        ae_extents_deinit(&extents);
}

/* More holes than the table first has room for. */
static void test_many_holes(void **state)
{
        struct ae_extents extents;
        uint64_t off;

        (void)state;
        ae_extents_init(&extents, len_all);
        for (uint32_t i = 0; i < N_UNITS; i++)
                assert_true(ae_extents_take(&extents, 1, &off));
        for (uint64_t i = 0; i < N_UNITS; i += 2)
                ae_extents_give(&extents, (N_UNITS - 2 - i) * AE_EXTENT_ALIGN, 1);
        assert_int_equal(extents.n, N_UNITS / 2);
        assert_sound(&extents);
        for (uint64_t i = 1; i < N_UNITS; i += 2)
                ae_extents_give(&extents, i * AE_EXTENT_ALIGN, 1);
        assert_int_equal(extents.n, 1);
        ae_extents_deinit(&extents);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_sizes),      cmocka_unit_test(test_too_small_and_too_large),
                cmocka_unit_test(test_first_fit),  cmocka_unit_test(test_random),
                cmocka_unit_test(test_many_holes),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
