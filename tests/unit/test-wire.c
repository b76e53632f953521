/* SPDX-License-Identifier: Apache-2.0 */
/* The notes of puts: every field comes back, at its extremes too, and none spills into another. */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/wire/wire.h"

#define TOP_SLICE (AE_WIRE_MAX_SLICES - 1)
#define TOP_PART (AE_WIRE_MAX_PARTS - 1)
#define TOP_TOKEN ((UINT32_C(1) << 24) - 1)

/* The masks as the readers of notes use them. */
static uint32_t slice_of_gather(uint64_t note)
{
        return (note >> 24) & TOP_SLICE;
}

static uint32_t slice_of_part(uint64_t note)
{
        return (note >> 20) & TOP_SLICE;
}

static void check_gather(uint32_t job, uint64_t version, uint32_t slice, uint32_t token)
{
        uint64_t note = ae_note_gather(job, version, slice, token);

        assert_int_equal(ae_note_kind(note), AE_NOTE_GATHER);
        assert_int_equal(ae_note_job(note), job);
        assert_int_equal(ae_note_stamp(note), version & 0xff);
        assert_int_equal(slice_of_gather(note), slice);
        assert_int_equal(note & TOP_TOKEN, token);
}

static void test_gather(void **state)
{
        (void)state;
        check_gather(0, 0, 0, 0);
        check_gather(255, 0, 0, 0);
        check_gather(0, 255, 0, 0);
        check_gather(0, 256, 0, 0);
        check_gather(0, UINT64_MAX, 0, 0);
        check_gather(0, 0, TOP_SLICE, 0);
        check_gather(0, 0, 0, TOP_TOKEN);
        check_gather(255, UINT64_MAX, TOP_SLICE, TOP_TOKEN);
        check_gather(7, 0x1234567, 0x2a5a5, 0xabcdef);
        assert_int_equal(ae_note_gather(255, UINT64_MAX, TOP_SLICE, TOP_TOKEN), UINT64_MAX >> 2);
}

static void check_part(uint32_t job, uint64_t round, uint32_t group, uint32_t slice, uint32_t part)
{
        uint64_t note = ae_note_part(job, round, group, slice, part);

        assert_int_equal(ae_note_kind(note), AE_NOTE_PART);
        assert_int_equal(ae_note_job(note), job);
        assert_int_equal(ae_note_stamp(note), round & 0xff);
        assert_int_equal((note >> 42) & 0xf, group);
        assert_int_equal(slice_of_part(note), slice);
        assert_int_equal(note & TOP_PART, part);
}

static void test_part(void **state)
{
        (void)state;
        check_part(0, 0, 0, 0, 0);
        check_part(255, 0, 0, 0, 0);
        check_part(0, UINT64_MAX, 0, 0, 0);
        check_part(0, 0, AE_WIRE_MAX_NODE_SUM_GROUPS - 1, 0, 0);
        check_part(0, 0, 0, TOP_SLICE, 0);
        check_part(0, 0, 0, 0, TOP_PART);
        check_part(255, 511, 15, TOP_SLICE, TOP_PART);
        check_part(3, 300, 9, 0x155555, 0xaaaaa);
}

static void check_flow(uint32_t job, uint64_t epoch, uint64_t seq, uint32_t src, uint32_t dst)
{
        uint64_t note = ae_note_flow(job, epoch, seq, src, dst);

        assert_int_equal(ae_note_kind(note), AE_NOTE_FLOW);
        assert_int_equal(ae_note_job(note), job);
        assert_int_equal(ae_note_stamp(note), epoch & 0xff);
        assert_int_equal((note >> 32) & 0x3fff, seq & 0x3fff);
        assert_int_equal((note >> 16) & 0xffff, src);
        assert_int_equal(note & 0xffff, dst);
}

static void test_flow(void **state)
{
        (void)state;
        check_flow(0, 0, 0, 0, 0);
        check_flow(255, 0, 0, 0, 0);
        check_flow(0, UINT64_MAX, 0, 0, 0);
        check_flow(0, 0, 0x3fff, 0, 0);
        check_flow(0, 0, 0x4000, 0, 0);
        check_flow(0, 0, UINT64_MAX, 0, 0);
        check_flow(0, 0, 0, AE_WIRE_MAX_WORLD - 1, 0);
        check_flow(0, 0, 0, 0, AE_WIRE_MAX_WORLD - 1);
        check_flow(255, 255, 0x3fff, 65535, 65535);
}

static void test_state(void **state)
{
        static const uint32_t tokens[] = { 0, 1, 0x80000000, UINT32_MAX };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(tokens); i++) {
                uint64_t note = ae_note_state(255, 0x1234, tokens[i]);

                assert_int_equal(ae_note_kind(note), AE_NOTE_STATE);
                assert_int_equal(ae_note_job(note), 255);
                assert_int_equal((uint32_t)note, tokens[i]);
                assert_int_equal(ae_note_stamp(note), 0x34);
                assert_int_equal((note >> 32) & 0x3fff, 0);
        }
}

/* Each fixed message is as long as PROTOCOL.md draws it: nothing between the fields. */
static void test_sizes(void **state)
{
        (void)state;
        assert_int_equal(sizeof(struct ae_wire_credit), 28);
        assert_int_equal(sizeof(struct ae_wire_end), 32);
        assert_int_equal(sizeof(struct ae_wire_vote), 24 + 16 + 2 * 80 + 24 + 1320 + 272);
        assert_int_equal(sizeof(struct ae_wire_prepare), 24 + 1680 + 8);
        assert_int_equal(sizeof(struct ae_wire_xcredit), 40);
        assert_int_equal(sizeof(struct ae_wire_closed), 32);
        assert_int_equal(sizeof(struct ae_wire_waiting), 40 + AE_WIRE_TEXT);
        assert_int_equal(offsetof(struct ae_wire_head, round), 16);
        assert_int_equal(offsetof(struct ae_wire_vote, ask), 24 + 16 + 2 * 80 + 24);
}

static void test_ops_distinct(void **state)
{
        static const int ops[] = {
#define OP_VALUE(name, value, what) value,
                AE_WIRE_OP_TABLE(OP_VALUE)
#undef OP_VALUE
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(ops); i++) {
                assert_true(ops[i] > 0 && ops[i] <= UINT16_MAX);
                for (size_t k = 0; k < i; k++)
                        assert_int_not_equal(ops[i], ops[k]);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_gather), cmocka_unit_test(test_part),
                cmocka_unit_test(test_flow),   cmocka_unit_test(test_state),
                cmocka_unit_test(test_sizes),  cmocka_unit_test(test_ops_distinct),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
