/* SPDX-License-Identifier: Apache-2.0 */
/* Status table, error text, checked arithmetic, lists. */
#include "proto/base/list.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/test.h"

#include <errno.h>
#include <string.h>

static void names_and_codes_are_distinct(void **state)
{
        (void)state;
        assert_string_equal(ae_status_name(AE_ELOST), "ELOST");
        assert_string_equal(ae_status_code(AE_OK), "AEP_OK");
        assert_string_equal(ae_status_words(12345), "unknown status");
        for (int a = -1; a >= -20; a--) {
                assert_string_not_equal(ae_status_name(a), "UNKNOWN");
                for (int b = a - 1; b >= -20; b--)
                        assert_string_not_equal(ae_status_code(a), ae_status_code(b));
        }
}

static void error_text_may_quote_itself(void **state)
{
        (void)state;
        assert_int_equal(ae_fail(AE_EINVAL, "inner %d", 7), AE_EINVAL);
        assert_int_equal(ae_fail(AE_ESTATE, "outer: %s", ae_error_text()), AE_ESTATE);
        assert_string_equal(ae_error_text(), "outer: inner 7");
        assert_int_equal(ae_fail_sys(ENOMEM, "cannot map"), AE_ENOMEM);
        assert_string_equal(ae_error_text(), "cannot map: Cannot allocate memory");
        assert_int_equal(ae_fail_sys(EIO, "cannot read"), AE_ESYS);
}

static void long_error_text_is_cut(void **state)
{
        char long_text[4096];

        (void)state;
        memset(long_text, 'x', sizeof(long_text) - 1);
        long_text[sizeof(long_text) - 1] = '\0';
        assert_int_equal(ae_fail_sys(EIO, "%s", long_text), AE_ESYS);
        assert_true(strlen(ae_error_text()) < 1100);
}

static void ranges_do_not_wrap(void **state)
{
        (void)state;
        assert_true(ae_range_ok(0, 0, 0));
        assert_true(ae_range_ok(4, 4, 8));
        assert_false(ae_range_ok(4, 5, 8));
        assert_false(ae_range_ok(9, 0, 8));
        assert_false(ae_range_ok(UINT64_MAX, 2, 8));
        assert_false(ae_range_ok(2, UINT64_MAX, 8));
        assert_int_equal(ae_div_up(7, 4), 2);
        assert_int_equal(ae_align_up(257, 256), 512);
}

struct item {
        int value;
        struct ae_list link;
};

static void list_survives_removal_in_a_loop(void **state)
{
        struct ae_list list = AE_LIST_INIT(list);
        struct item items[4] = { { .value = 0 }, { .value = 1 }, { .value = 2 }, { .value = 3 } };
        struct item *item;
        int sum = 0;

        (void)state;
        for (size_t i = 0; i < 4; i++)
                ae_list_push(&list, &items[i].link);
        ae_list_for_each_safe(item, &list, link) {
                if (item->value % 2)
                        ae_list_unlink(&item->link);
        }
        ae_list_for_each(item, &list, link)
                sum += item->value;
        assert_int_equal(sum, 2);
        assert_ptr_equal(ae_list_pop(&list), &items[0].link);
        assert_ptr_equal(ae_list_pop(&list), &items[2].link);
        assert_null(ae_list_pop(&list));
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(names_and_codes_are_distinct),
                cmocka_unit_test(error_text_may_quote_itself),
                cmocka_unit_test(long_error_text_is_cut),
                cmocka_unit_test(ranges_do_not_wrap),
                cmocka_unit_test(list_survives_removal_in_a_loop),
        };

        return cmocka_run_group_tests_name("status", tests, NULL, NULL);
}
