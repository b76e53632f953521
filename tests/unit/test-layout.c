/* SPDX-License-Identifier: Apache-2.0 */
/* The layout table on small jobs whose figures are worked out by hand; look-ups; memory faults. */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include "tests/lib/fault.h"
#include "tests/lib/shapes.h"
#include "tests/lib/test.h"

#include <stdio.h>
#include <string.h>

#define DENSE(name_, unit_, dtype_, ...)                                                          \
        { .name = name_, .unit = unit_, .dtype = AE_DTYPE_##dtype_, .class = AE_CLASS_DENSE,       \
          __VA_ARGS__ }
#define VECTOR(n_) .n_dims = 1, .dims = { n_ }

static struct ae_layout *build(const struct ae_tensor_spec *specs, size_t n_specs,
                               uint32_t n_nodes)
{
        struct ae_layout *layout = NULL;
        int r = ae_layout_new(specs, (uint32_t)n_specs, n_nodes, &layout);

        if (r != 0)
                fail_msg("got %s: %s", ae_status_name(r), ae_error_text());
        return layout;
}

static const struct ae_layout_tensor *tensor(const struct ae_layout *layout, const char *name)
{
        uint32_t id = ae_layout_find_tensor(layout, name);

        assert_int_not_equal(id, AE_LAYOUT_NONE);
        assert_int_equal(layout->tensors[id].id, id);
        assert_string_equal(layout->tensors[id].name, name);
        return &layout->tensors[id];
}

static void assert_tensor(const struct ae_layout *layout, const char *name, uint32_t segment,
                          uint64_t first, uint64_t n)
{
        assert_int_equal(tensor(layout, name)->segment, segment);
        assert_int_equal(tensor(layout, name)->first, first);
        assert_int_equal(tensor(layout, name)->n, n);
}

static void a_job_without_tensors_is_legal(void **state)
{
        struct ae_layout *layout = build(NULL, 0, 3);

        (void)state;
        assert_int_equal(layout->n_tensors, 0);
        assert_int_equal(layout->n_units, 0);
        assert_int_equal(layout->n_slices, 0);
        assert_int_equal(layout->n_grad, 0);
        assert_int_equal(layout->node_weight_len[2], 0);
        assert_int_equal(ae_layout_find_tensor(layout, "x"), AE_LAYOUT_NONE);
        assert_null(ae_layout_free(layout));
        assert_null(ae_layout_free(NULL));
}

static void tensors_stand_at_multiples_of_256_bytes(void **state)
{
        static const struct ae_tensor_spec specs[] = {
                DENSE("a", "u", BF16, VECTOR(3)),
                DENSE("w", "v", BF16, VECTOR(7)),
                DENSE("f", "u", F32, VECTOR(65)),
                DENSE("b", "u", BF16, VECTOR(129)),
                DENSE("g", "u", F32, .n_dims = 0),
                DENSE("c", "u", BF16, .n_dims = 3, .dims = { 2, 3, 5 }),
        };
        struct ae_layout *layout = build(specs, AE_ARRAY_LEN(specs), 2);
        const struct ae_layout_unit *u = &layout->units[0];

        (void)state;
        assert_int_equal(layout->n_units, 2);
        assert_string_equal(u->name, "u");
        assert_int_equal(ae_layout_find_unit(layout, "v"), 1);
        assert_int_equal(ae_layout_find_unit(layout, "a"), AE_LAYOUT_NONE);
        /* Unit u: fp32 (value 1) before bf16 (value 2). */
        assert_int_equal(u->n_segments, 2);
        assert_int_equal(layout->segments[0].dtype, AE_DTYPE_F32);
        assert_int_equal(layout->segments[1].dtype, AE_DTYPE_BF16);
        assert_tensor(layout, "f", 0, 0, 65);
        assert_tensor(layout, "g", 0, 128, 1); /* a scalar; 65 rounded up to 64 elements */
        assert_int_equal(layout->segments[0].n, 129);
        assert_tensor(layout, "a", 1, 0, 3);
        assert_tensor(layout, "b", 1, 128, 129);
        assert_tensor(layout, "c", 1, 384, 30);
        assert_int_equal(layout->segments[1].n, 414);
        assert_tensor(layout, "w", 2, 0, 7);
        /* Images: 129 * 4 = 516 -> 768 bytes, 414 * 2 = 828 -> 1024 bytes. */
        assert_int_equal(layout->segments[0].unit_off, 0);
        assert_int_equal(layout->segments[1].unit_off, 768);
        assert_int_equal(u->len, 1792);
        assert_int_equal(layout->segments[0].unit_grad_first, 0);
        assert_int_equal(layout->segments[1].unit_grad_first, 256);
        assert_int_equal(u->n_grad, 256 + 512);
        assert_int_equal(layout->units[1].grad_first, 768);
        assert_int_equal(layout->n_grad, 768 + 128);
        /* What was registered in u, in that order. */
        assert_int_equal(u->n_tensors, 5);
        assert_int_equal(layout->unit_tensors[u->tensor_first + 1], 2);
        assert_null(ae_layout_free(layout));
}

static void storage_comes_trainable_frozen_buffer(void **state)
{
        static const struct ae_tensor_spec specs[] = {
                { .name = "count", .unit = "u", .dtype = AE_DTYPE_I64, .class = AE_CLASS_BUFFER,
                  .group = 99, VECTOR(10) },
                { .name = "bias16", .unit = "u", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_BUFFER,
                  VECTOR(10) },
                { .name = "bias32", .unit = "u", .dtype = AE_DTYPE_F32, .class = AE_CLASS_BUFFER,
                  VECTOR(10) },
                DENSE("ice", "u", F32, VECTOR(10), .frozen = true),
                DENSE("w", "u", BF16, VECTOR(10), .group = 31),
        };
        static const char *const order[] = { "w", "ice", "bias32", "bias16", "count" };
        struct ae_layout *layout = build(specs, AE_ARRAY_LEN(specs), 1);

        (void)state;
        assert_int_equal(layout->n_segments, 5);
        for (uint32_t i = 0; i < 5; i++) {
                assert_tensor(layout, order[i], i, 0, 10);
                assert_int_equal(layout->segments[i].trainable, i == 0);
                assert_int_equal(layout->segments[i].buffer, i >= 2);
                assert_int_equal(layout->segments[i].unit_grad_first, 0);
        }
        assert_int_equal(tensor(layout, "count")->group, 0);
        assert_int_equal(tensor(layout, "w")->group, 31);
        assert_int_equal(layout->units[0].n_grad, 128);
        assert_int_equal(layout->node_state_n[0], 128);
        /* A slice has room for 128 elements: 2 + 4 + 4 + 2 + 8 bytes each. */
        assert_int_equal(layout->node_weight_len[0], 128 * 20);
        assert_null(ae_layout_free(layout));
}

static void tensors_without_elements_take_no_room(void **state)
{
        static const struct ae_tensor_spec specs[] = {
                DENSE("none", "empty", BF16, VECTOR(0)),
                DENSE("huge-but-none", "empty", BF16, .n_dims = 3,
                      .dims = { UINT64_MAX, UINT64_MAX, 0 }),
                DENSE("a", "u", BF16, VECTOR(0)),
                DENSE("b", "u", BF16, VECTOR(130)),
                DENSE("c", "u", BF16, VECTOR(0)),
                DENSE("d", "u", BF16, VECTOR(1)),
        };
        struct ae_layout *layout = build(specs, AE_ARRAY_LEN(specs), 4);

        (void)state;
        assert_int_equal(layout->units[0].n_segments, 1);
        assert_int_equal(layout->segments[0].n, 0);
        assert_int_equal(layout->segments[0].n_slices, 0);
        assert_int_equal(layout->segments[0].n_tensors, 2);
        assert_int_equal(layout->units[0].len, 0);
        assert_tensor(layout, "huge-but-none", 0, 0, 0);
        assert_tensor(layout, "c", 1, 256, 0);
        assert_tensor(layout, "d", 1, 256, 1);
        assert_int_equal(layout->segments[1].n, 257);
        assert_int_equal(layout->n_slices, 1);
        assert_int_equal(ae_layout_tensor_at(layout, 1, 0), 3);
        assert_int_equal(ae_layout_tensor_at(layout, 1, 129), 3);
        assert_int_equal(ae_layout_tensor_at(layout, 1, 130), AE_LAYOUT_NONE);
        assert_int_equal(ae_layout_tensor_at(layout, 1, 255), AE_LAYOUT_NONE);
        assert_int_equal(ae_layout_tensor_at(layout, 1, 256), 5);
        assert_null(ae_layout_free(layout));
}

static void an_alias_shares_its_home(void **state)
{
        static const struct ae_tensor_spec specs[] = {
                DENSE("pad", "head", BF16, VECTOR(5)),
                DENSE("head.weight", "head", BF16, .n_dims = 2, .dims = { 4, 50 }, .group = 3,
                      .alias_of = "embed.weight"),
                DENSE("first", "embed", BF16, VECTOR(300)),
                DENSE("embed.weight", "embed", BF16, .n_dims = 2, .dims = { 4, 50 }, .group = 1),
                DENSE("twin", "embed", BF16, .n_dims = 2, .dims = { 4, 50 },
                      .alias_of = "embed.weight"),
                DENSE("lonely", "alias-only", BF16, VECTOR(300), .alias_of = "first"),
        };
        struct ae_layout *layout = build(specs, AE_ARRAY_LEN(specs), 2);

        (void)state;
        assert_int_equal(layout->n_segments, 2);
        assert_tensor(layout, "embed.weight", 1, 384, 200);
        assert_tensor(layout, "head.weight", 1, 384, 200);
        assert_tensor(layout, "twin", 1, 384, 200);
        assert_tensor(layout, "lonely", 1, 0, 300);
        assert_int_equal(tensor(layout, "head.weight")->home, 3);
        assert_int_equal(tensor(layout, "head.weight")->unit, 0);
        assert_int_equal(tensor(layout, "head.weight")->group, 1);
        assert_int_equal(tensor(layout, "embed.weight")->home, 3);
        /* No storage of their own. */
        assert_int_equal(layout->segments[0].n, 5);
        assert_int_equal(layout->segments[1].n, 584);
        assert_int_equal(layout->segments[1].n_tensors, 2);
        assert_int_equal(layout->units[2].n_segments, 0);
        assert_int_equal(layout->units[2].len, 0);
        assert_int_equal(ae_layout_tensor_at(layout, 1, 400), 3);
        assert_null(ae_layout_free(layout));
}

static void experts_are_recorded_without_storage(void **state)
{
        static const struct ae_tensor_spec specs[] = {
                { .name = "e", .unit = "moe", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_EXPERT,
                  .group = 2, .n_dims = 2, .dims = { 1000, 1000 } },
                DENSE("router", "moe", F32, VECTOR(64)),
        };
        struct ae_layout *layout = build(specs, AE_ARRAY_LEN(specs), 2);

        (void)state;
        assert_int_equal(tensor(layout, "e")->n, 1000000);
        assert_int_equal(tensor(layout, "e")->segment, AE_LAYOUT_NONE);
        assert_int_equal(tensor(layout, "e")->group, 2);
        assert_int_equal(layout->n_segments, 1);
        assert_int_equal(layout->units[0].len, 256);
        assert_int_equal(layout->units[0].n_tensors, 2);
        assert_null(ae_layout_free(layout));
}

static void a_unit_may_exceed_32_bits(void **state)
{
        static const struct ae_tensor_spec specs[] = {
                DENSE("small", "u", BF16, VECTOR(1)),
                DENSE("big", "u", BF16, .n_dims = 2, .dims = { UINT64_C(1) << 20, 5000 }),
                DENSE("last", "u", F32, VECTOR((UINT64_C(1) << 33) + 1)),
        };
        uint64_t n_big = 128 + (UINT64_C(5000) << 20);
        struct ae_layout *layout = build(specs, AE_ARRAY_LEN(specs), 3);

        (void)state;
        assert_int_equal(layout->segments[1].n, n_big);
        assert_int_equal(layout->segments[1].unit_off, (UINT64_C(1) << 35) + 256);
        assert_int_equal(layout->units[0].len, (UINT64_C(1) << 35) + 256 + 2 * n_big);
        assert_int_equal(layout->n_grad, (UINT64_C(1) << 33) + 128 + n_big);
        assert_int_equal(layout->n_slices, 6);
        assert_int_equal(ae_layout_slice_of(layout, 0, UINT64_C(1) << 33), 2);
        assert_int_equal(ae_layout_tensor_at(layout, 1, n_big - 1), 1);
        assert_null(ae_layout_free(layout));
}

static void the_largest_tensor_is_2_to_48_bytes(void **state)
{
        static const struct ae_tensor_spec spec =
                DENSE("x", "u", F32, .n_dims = 2, .dims = { UINT64_C(1) << 24, 1 << 22 });
        struct ae_layout *layout = build(&spec, 1, AE_LAYOUT_MAX_NODES);

        (void)state;
        assert_int_equal(layout->units[0].len, UINT64_C(1) << 48);
        assert_int_equal(layout->n_slices, AE_LAYOUT_MAX_NODES);
        assert_int_equal(layout->node_state_n[65535], UINT64_C(1) << 30);
        assert_null(ae_layout_free(layout));
}

/* S = min(nodes, ceil(bytes / 256 KiB)), equal to 4,096 elements, larger ones last. */
static void a_segment_is_cut_evenly(void **state)
{
        struct ae_tensor_spec spec = DENSE("x", "u", BF16, VECTOR(3 * 131072));
        struct ae_layout *layout = build(&spec, 1, 100);

        (void)state;
        assert_int_equal(layout->n_slices, 3);
        assert_null(ae_layout_free(layout));
        spec.dims[0]++;
        layout = build(&spec, 1, 100);
        assert_int_equal(layout->n_slices, 4);
        /* 97 blocks of 4,096 over 4: 24, 24, 24, 25, of which the last holds 1 element. */
        assert_int_equal(layout->slices[2].n, 98304);
        assert_int_equal(layout->slices[3].first, 294912);
        assert_int_equal(layout->slices[3].n, 98305);
        /* The larger slice goes to the first of the equally loaded nodes, the rest in order. */
        assert_int_equal(layout->slices[3].node, 0);
        assert_int_equal(layout->slices[0].node, 1);
        assert_int_equal(layout->slices[2].node, 3);
        assert_int_equal(layout->node_state_n[4], 0);
        assert_null(ae_layout_free(layout));
        spec.dims[0] += 4999;
        layout = build(&spec, 1, 100);
        /* 98 blocks over 4: 24, 24, 25, 25, of which the last holds 904 elements. */
        assert_int_equal(layout->slices[1].n, 98304);
        assert_int_equal(layout->slices[2].n, 102400);
        assert_int_equal(layout->slices[3].first, 299008);
        assert_int_equal(layout->slices[3].n, 99208);
        assert_null(ae_layout_free(layout));
        layout = build(&spec, 1, 2);
        assert_int_equal(layout->n_slices, 2);
        assert_null(ae_layout_free(layout));
}

/* Small segments go on where the one before stopped; state and weights are each balanced. */
static void small_segments_go_round(void **state)
{
        struct ae_tensor_spec specs[12];
        char names[12][8];
        struct ae_layout *layout;

        (void)state;
        for (uint32_t i = 0; i < 12; i++) {
                (void)snprintf(names[i], sizeof(names[i]), "t%u", i);
                specs[i] = (struct ae_tensor_spec)DENSE(names[i], names[i], BF16, VECTOR(1000));
                specs[i].frozen = i % 2 == 1;
        }
        layout = build(specs, 12, 4);
        for (uint32_t i = 0; i < 6; i++) {
                /* Six trainable slices: 0 1 2 3 0 1; then six frozen: 2 3 0 1 2 3. */
                assert_int_equal(layout->slices[2 * i].node, i % 4);
                assert_int_equal(layout->slices[2 * i + 1].node, (i + 2) % 4);
        }
        for (uint32_t i = 0; i < 4; i++) {
                assert_int_equal(layout->node_weight_len[i], 3 * 2048);
                assert_int_equal(layout->node_state_n[i], i < 2 ? 2048 : 1024);
        }
        /* Node 0 owns segments 0, 5 and 8, in table order. */
        assert_int_equal(layout->slices[5].node, 0);
        assert_int_equal(layout->slices[5].weight_off, 2048);
        assert_int_equal(layout->slices[5].shard_first, 0);
        assert_int_equal(layout->slices[8].weight_off, 4096);
        assert_int_equal(layout->slices[8].shard_first, 1024);
        assert_null(ae_layout_free(layout));
}

/* The caller's strings may go away. */
static void strings_are_copied(void **state)
{
        char name[] = "name";
        char unit[] = "unit";
        struct ae_tensor_spec spec = DENSE(name, unit, BF16, VECTOR(1));
        struct ae_layout *layout = build(&spec, 1, 1);

        (void)state;
        memset(name, 'x', sizeof(name) - 1);
        memset(unit, 'x', sizeof(unit) - 1);
        assert_int_equal(ae_layout_find_tensor(layout, "name"), 0);
        assert_int_equal(ae_layout_find_unit(layout, "unit"), 0);
        assert_null(ae_layout_free(layout));
}

static void names_are_found_among_many(void **state)
{
        struct shapes *shapes = shapes_new(SHAPES_DEEPSEEK_V3, AE_DTYPE_BF16, true);
        struct ae_layout *layout = build(shapes->specs, shapes->n_specs, 16);

        (void)state;
        assert_true(layout->n_tensors > 40000);
        for (uint32_t i = 0; i < shapes->n_specs; i++)
                assert_int_equal(ae_layout_find_tensor(layout, shapes->specs[i].name), i);
        for (uint32_t i = 0; i < layout->n_units; i++)
                assert_int_equal(ae_layout_find_unit(layout, layout->units[i].name), i);
        assert_int_equal(ae_layout_find_tensor(layout, "model.layers.61.x"), AE_LAYOUT_NONE);
        assert_int_equal(ae_layout_find_unit(layout, ""), AE_LAYOUT_NONE);
        assert_null(ae_layout_free(layout));
        assert_null(shapes_free(shapes));
}

static int build_and_free(void *arg)
{
        struct ae_layout *const untouched = arg;
        struct ae_layout *layout = untouched;
        struct ae_tensor_spec specs[20];
        char names[20][8];
        int r;

        for (uint32_t i = 0; i < 20; i++) {
                (void)snprintf(names[i], sizeof(names[i]), "t%u", i);
                specs[i] = (struct ae_tensor_spec)DENSE(names[i], names[i], BF16, VECTOR(1));
        }
        r = ae_layout_new(specs, 20, 5, &layout);
        if (r < 0) {
                assert_ptr_equal(layout, untouched);
                assert_non_null(strstr(ae_error_text(), "no memory for "));
                return r;
        }
        ae_layout_free(layout);
        return 0;
}

static void any_allocation_may_fail(void **state)
{
        struct ae_layout *canary = NULL;
        uint64_t n = fault_alloc_sweep(build_and_free, &canary, AE_ENOMEM);

        (void)state;
        /* 20 tensor and 20 unit names, 3 sizes of units (8, 16, 32), and 13 arrays. */
        assert_int_equal(n, 56);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(a_job_without_tensors_is_legal),
                cmocka_unit_test(tensors_stand_at_multiples_of_256_bytes),
                cmocka_unit_test(storage_comes_trainable_frozen_buffer),
                cmocka_unit_test(tensors_without_elements_take_no_room),
                cmocka_unit_test(an_alias_shares_its_home),
                cmocka_unit_test(experts_are_recorded_without_storage),
                cmocka_unit_test(a_unit_may_exceed_32_bits),
                cmocka_unit_test(the_largest_tensor_is_2_to_48_bytes),
                cmocka_unit_test(a_segment_is_cut_evenly),
                cmocka_unit_test(small_segments_go_round),
                cmocka_unit_test(strings_are_copied),
                cmocka_unit_test(names_are_found_among_many),
                cmocka_unit_test(any_allocation_may_fail),
        };

        return cmocka_run_group_tests_name("layout", tests, NULL, NULL);
}
