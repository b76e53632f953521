/* SPDX-License-Identifier: Apache-2.0 */
/* What ae_layout_new() refuses: each fault with its status and with the words that a user reads. */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include "tests/lib/test.h"

#include <stdio.h>
#include <string.h>

static const struct ae_tensor_spec good[] = {
        { .name = "home", .unit = "u", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
          .n_dims = 2, .dims = { 8, 4 } },
        { .name = "bad", .unit = "u", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
          .n_dims = 2, .dims = { 8, 4 } },
        { .name = "tied", .unit = "v", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
          .n_dims = 2, .dims = { 8, 4 }, .alias_of = "home" },
};

static void assert_refused(const struct ae_tensor_spec *specs, uint32_t n_specs, uint32_t n_nodes,
                           int status, const char *text)
{
        struct ae_layout *const untouched = (struct ae_layout *)(uintptr_t)8;
        struct ae_layout *layout = untouched;

        (void)ae_fail(AE_EINVAL, "of another call");
        assert_int_equal(ae_layout_new(specs, n_specs, n_nodes, &layout), status);
        assert_string_equal(ae_error_text(), text);
        assert_ptr_equal(layout, untouched);
}

/* The good job is good; with its second tensor replaced it is refused. */
static void assert_tensor_refused(const struct ae_tensor_spec *bad, int status, const char *text)
{
        struct ae_tensor_spec specs[AE_ARRAY_LEN(good)];
        struct ae_layout *layout = NULL;

        memcpy(specs, good, sizeof(good));
        assert_int_equal(ae_layout_new(specs, AE_ARRAY_LEN(good), 4, &layout), 0);
        assert_null(ae_layout_free(layout));
        specs[1] = *bad;
        assert_refused(specs, AE_ARRAY_LEN(good), 4, status, text);
}

static void names_are_checked(void **state)
{
        struct ae_tensor_spec bad = good[1];
        char name[AE_LAYOUT_NAME_MAX + 1];
        char text[512];

        (void)state;
        bad.name = "";
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor 1: its name is empty");
        bad.name = NULL;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor 1: its name is empty");
        bad.name = "home";
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"home\": the name is taken, by tensor 0");
        bad.name = "bad";
        bad.unit = "";
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": the name of its unit is empty");
        bad.unit = NULL;
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": the name of its unit is empty");
        memset(name, 'n', sizeof(name) - 1);
        name[sizeof(name) - 1] = '\0'; /* 512 bytes, one too many */
        bad.unit = name;
        (void)snprintf(text, sizeof(text), "cannot lay out tensor \"bad\": the name of its unit, "
                       "\"%.64s...\", is longer than 511 bytes", name);
        assert_tensor_refused(&bad, AE_EOVERFLOW, text);
        bad.unit = "u";
        bad.name = name;
        (void)snprintf(text, sizeof(text), "cannot lay out tensor 1, \"%.64s...\": its name is "
                       "longer than 511 bytes", name);
        assert_tensor_refused(&bad, AE_EOVERFLOW, text);
}

static void the_longest_names_are_taken(void **state)
{
        char name[AE_LAYOUT_NAME_MAX];
        struct ae_tensor_spec spec = good[0];
        struct ae_layout *layout = NULL;

        (void)state;
        memset(name, 'n', sizeof(name) - 1);
        name[sizeof(name) - 1] = '\0';
        spec.name = spec.unit = name;
        assert_int_equal(ae_layout_new(&spec, 1, 1, &layout), 0);
        assert_string_equal(layout->tensors[0].name, name);
        assert_null(ae_layout_free(layout));
}

static void kinds_are_checked(void **state)
{
        struct ae_tensor_spec bad = good[1];

        (void)state;
        bad.dtype = 0;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": unknown dtype 0");
        bad.dtype = UINT32_MAX;
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": unknown dtype 4294967295");
        bad.dtype = AE_DTYPE_I64;
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": only buffers may be int64");
        bad.class = AE_CLASS_EXPERT;
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": only buffers may be int64");
        bad = good[1];
        bad.class = 4;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": unknown class 4");
        bad.class = 0;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": unknown class 0");
        bad = good[1];
        bad.group = 32;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": optimizer group 32 "
                              "is out of range (groups are below 32)");
        bad.class = AE_CLASS_EXPERT;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": optimizer group 32 "
                              "is out of range (groups are below 32)");
}

static void shapes_are_checked(void **state)
{
        struct ae_tensor_spec bad = good[1];

        (void)state;
        bad.n_dims = 9;
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": 9 dims, the limit is 8");
        bad.n_dims = 1;
        bad.dims[0] = (UINT64_C(1) << 47) + 1; /* bf16 */
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": its shape is beyond 2^48 bytes");
        bad.n_dims = 8;
        for (uint32_t i = 0; i < 8; i++)
                bad.dims[i] = UINT64_C(1) << 16; /* wraps to 0 */
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": its shape is beyond 2^48 bytes");
        bad.class = AE_CLASS_EXPERT;
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": its shape is beyond 2^48 bytes");
}

static void aliases_are_checked(void **state)
{
        struct ae_tensor_spec bad = good[1];

        (void)state;
        bad.alias_of = "nobody";
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": it is an alias of "
                              "\"nobody\", which isn't registered");
        bad.alias_of = "bad";
        assert_tensor_refused(&bad, AE_EINVAL,
                              "cannot lay out tensor \"bad\": it is an alias of itself");
        bad.alias_of = "tied";
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": \"tied\" is itself "
                              "an alias (of \"home\")");
        bad.alias_of = "home";
        bad.dims[0] = 4;
        bad.dims[1] = 8;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": it is an alias of "
                              "\"home\", which has another shape");
        bad.n_dims = 1;
        bad.dims[0] = 32;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": it is an alias of "
                              "\"home\", which has another shape");
        bad = good[1];
        bad.alias_of = "home";
        bad.dtype = AE_DTYPE_F32;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": it is an alias of "
                              "\"home\", which has another dtype");
        bad.dtype = AE_DTYPE_BF16;
        bad.class = AE_CLASS_BUFFER;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": it is an alias of "
                              "\"home\", which has another class");
        bad.class = AE_CLASS_DENSE;
        bad.frozen = true;
        assert_tensor_refused(&bad, AE_EINVAL, "cannot lay out tensor \"bad\": it is an alias of "
                              "\"home\", which has another frozen flag");
}

static void counts_are_checked(void **state)
{
        (void)state;
        assert_refused(good, 3, 0, AE_EINVAL, "cannot lay out 3 tensors: there are no nodes");
        assert_refused(good, 3, 65537, AE_EOVERFLOW,
                       "cannot lay out 3 tensors over 65537 nodes: the limit is 65536 nodes");
        assert_refused(good, 65537, 1, AE_EOVERFLOW,
                       "cannot lay out 65537 tensors: the limit is 65536 tensors");
}

/* 2^48 bytes each: the 257th is beyond 2^56; aliases and experts don't count. */
static void the_job_has_a_limit(void **state)
{
        static struct ae_tensor_spec specs[260];
        static char names[260][8];
        struct ae_layout *layout = NULL;

        (void)state;
        for (uint32_t i = 0; i < 260; i++) {
                (void)snprintf(names[i], sizeof(names[i]), "t%u", i);
                specs[i] = good[0];
                specs[i].name = names[i];
                specs[i].dims[0] = UINT64_C(1) << 45;
        }
        specs[7].class = AE_CLASS_EXPERT;
        specs[8].alias_of = "t9";
        assert_int_equal(ae_layout_new(specs, 258, 3, &layout), 0);
        assert_int_equal(layout->units[0].len, AE_LAYOUT_MAX_LEN);
        assert_null(ae_layout_free(layout));
        assert_refused(specs, 259, 3, AE_EOVERFLOW, "cannot lay out tensor \"t258\": with it the "
                       "job has more than 2^56 bytes");
}

static void slices_have_a_limit(void **state)
{
        static struct ae_tensor_spec specs[257];
        static char names[257][8];

        (void)state;
        for (uint32_t i = 0; i < 257; i++) {
                (void)snprintf(names[i], sizeof(names[i]), "t%u", i);
                specs[i] = good[0];
                specs[i].name = specs[i].unit = names[i];
                specs[i].dims[0] = UINT64_C(1) << 40;
        }
        assert_refused(specs, 257, 65536, AE_EOVERFLOW, "cannot lay out 257 tensors over 65536 "
                       "nodes: that would be 16842752 slices, the limit is 16777216");
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(names_are_checked),
                cmocka_unit_test(the_longest_names_are_taken),
                cmocka_unit_test(kinds_are_checked),
                cmocka_unit_test(shapes_are_checked),
                cmocka_unit_test(aliases_are_checked),
                cmocka_unit_test(counts_are_checked),
                cmocka_unit_test(the_job_has_a_limit),
                cmocka_unit_test(slices_have_a_limit),
        };

        return cmocka_run_group_tests_name("layout-errors", tests, NULL, NULL);
}
