/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Control messages: every type goes through packing and back, and whatever a peer makes of the
 * bytes (cut, flipped, invented) either is a message within its limits or is refused. Messages are
 * filled by a walk over the schema, so that a new field or type is tested without a line here.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/control.h"
#include "proto/wire/layout.h"

#include <stdlib.h>
#include <string.h>

struct row {
        uint32_t type;
        const char *name;
        const ProtobufCMessageDescriptor *descriptor;
};

static const struct row rows[] = {
#define ROW(name, value, lower, message) { value, #name, &autoep__##lower##__descriptor },
        AE_CONTROL_TABLE(ROW)
#undef ROW
};

/* ---- filling by the schema -------------------------------------------------------------- */

static ProtobufCMessage *make(const ProtobufCMessageDescriptor *descriptor);

static void *zeroed(size_t n)
{
        void *memory = calloc(1, n);

        assert_non_null(memory);
        return memory;
}

static void fill_value(const ProtobufCFieldDescriptor *field, void *at, uint32_t salt)
{
        static const char words[] = "word";
        ProtobufCBinaryData *bytes = at;

        switch (field->type) {
        case PROTOBUF_C_TYPE_STRING:
                *(char **)at = strdup(words);
                break;
        case PROTOBUF_C_TYPE_BYTES:
                bytes->len = sizeof(words);
                bytes->data = (uint8_t *)strdup(words);
                break;
        case PROTOBUF_C_TYPE_MESSAGE:
                *(ProtobufCMessage **)at = make(field->descriptor);
                break;
        case PROTOBUF_C_TYPE_BOOL:
                *(protobuf_c_boolean *)at = 1;
                break;
        case PROTOBUF_C_TYPE_UINT64:
        case PROTOBUF_C_TYPE_FIXED64:
                *(uint64_t *)at = UINT64_MAX - field->id * 1000 - salt;
                break;
        default:
                *(uint32_t *)at = UINT32_MAX - field->id * 1000 - salt;
        }
}

static size_t value_size(ProtobufCType type)
{
        switch (type) {
        case PROTOBUF_C_TYPE_STRING:
        case PROTOBUF_C_TYPE_MESSAGE:
                return sizeof(void *);
        case PROTOBUF_C_TYPE_BYTES:
                return sizeof(ProtobufCBinaryData);
        case PROTOBUF_C_TYPE_UINT64:
        case PROTOBUF_C_TYPE_FIXED64:
                return 8;
        default:
                return 4;
        }
}

static void fill_field(const ProtobufCFieldDescriptor *field, char *message)
{
        size_t size = value_size(field->type);
        char *values;

        if (field->label != PROTOBUF_C_LABEL_REPEATED) {
                fill_value(field, message + field->offset, 0);
                return;
        }
        values = zeroed(3 * size);
        for (uint32_t i = 0; i < 3; i++)
                fill_value(field, values + i * size, i);
        *(size_t *)(void *)(message + field->quantifier_offset) = 3;
        *(char **)(void *)(message + field->offset) = values;
}

/* A message with every field set; ae_control_free() frees it. */
static ProtobufCMessage *make(const ProtobufCMessageDescriptor *descriptor)
{
        ProtobufCMessage *message = zeroed(descriptor->sizeof_message);

        descriptor->message_init(message);
        for (unsigned i = 0; i < descriptor->n_fields; i++)
                fill_field(&descriptor->fields[i], (char *)message);
        return message;
}

struct packed {
        uint8_t *data;
        size_t len;
};

static struct packed pack(const ProtobufCMessage *message)
{
        struct packed packed = { .len = ae_control_size(message) };

        packed.data = zeroed(packed.len + 1);
        ae_control_pack(message, packed.data);
        return packed;
}

static struct packed pack_full(const struct row *row)
{
        ProtobufCMessage *message = make(row->descriptor);
        struct packed packed = pack(message);

        ae_control_free(message);
        return packed;
}

/* Unpacks from memory that ends with the message, so that a byte read beyond it shows. */
static int unpack_exact(uint32_t type, const uint8_t *data, size_t len)
{
        ProtobufCMessage *message = NULL;
        uint8_t *exact = malloc(len ? len : 1);
        int r;

        assert_non_null(exact);
        memcpy(exact, data, len);
        r = ae_control_unpack(type, exact, len, &message);
        free(exact);
        assert_true(r == 0 || r == AE_EPROTO);
        assert_int_equal(message != NULL, r == 0);
        ae_control_free(message);
        return r;
}

/* ---- tests ------------------------------------------------------------------------------ */

static void test_round_trip(void **state)
{
        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                struct packed first = pack_full(&rows[i]);
                ProtobufCMessage *message = NULL;
                struct packed second;

                assert_int_equal(ae_control_unpack(rows[i].type, first.data, first.len, &message),
                                 0);
                assert_ptr_equal(message->descriptor, rows[i].descriptor);
                assert_string_equal(ae_control_name(rows[i].type), rows[i].name);
                second = pack(message);
                assert_int_equal(second.len, first.len);
                assert_memory_equal(second.data, first.data, first.len);
                assert_null(ae_control_free(message));
                free(first.data);
                free(second.data);
        }
        assert_null(ae_control_free(NULL));
}

/* Strings are never NULL after unpacking, also where the sender left them out. */
static void test_empty(void **state)
{
        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                ProtobufCMessage *message = NULL;

                assert_int_equal(ae_control_unpack(rows[i].type, NULL, 0, &message), 0);
                for (unsigned f = 0; f < rows[i].descriptor->n_fields; f++) {
                        const ProtobufCFieldDescriptor *field = &rows[i].descriptor->fields[f];

                        if (field->type == PROTOBUF_C_TYPE_STRING)
                                assert_string_equal(
                                        *(char **)(void *)((char *)message + field->offset), "");
                }
                ae_control_free(message);
        }
}

static void test_unknown_type(void **state)
{
        static const uint32_t types[] = { 0, 13, 19, 35, 65535, UINT32_MAX };
        ProtobufCMessage *message = NULL;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(types); i++) {
                assert_int_equal(ae_control_unpack(types[i], "", 0, &message), AE_EPROTO);
                assert_string_equal(ae_control_name(types[i]), "unknown");
        }
        assert_null(message);
}

static void test_truncated(void **state)
{
        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                struct packed packed = pack_full(&rows[i]);
                size_t n_refused = 0;

                for (size_t len = 0; len < packed.len; len++)
                        n_refused += unpack_exact(rows[i].type, packed.data, len) < 0;
                /* a cut is only right between two fields */
                assert_true(n_refused + 1 + 3 * rows[i].descriptor->n_fields >= packed.len ||
                            n_refused > packed.len / 2);
                free(packed.data);
        }
}

static void test_bit_flips(void **state)
{
        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                struct packed packed = pack_full(&rows[i]);

                for (size_t bit = 0; bit < 8 * packed.len; bit++) {
                        packed.data[bit / 8] ^= (uint8_t)(1u << bit % 8);
                        (void)unpack_exact(rows[i].type, packed.data, packed.len);
                        packed.data[bit / 8] ^= (uint8_t)(1u << bit % 8);
                }
                assert_int_equal(unpack_exact(rows[i].type, packed.data, packed.len), 0);
                free(packed.data);
        }
}

static void test_random_bytes(void **state)
{
        uint8_t bytes[64];
        uint32_t n_refused = 0;

        (void)state;
        srand(3);
        for (uint32_t i = 0; i < 20000; i++) {
                size_t len = (size_t)rand() % sizeof(bytes);

                for (size_t k = 0; k < len; k++)
                        bytes[k] = (uint8_t)rand();
                n_refused += unpack_exact(rows[i % AE_ARRAY_LEN(rows)].type, bytes, len) < 0;
        }
        assert_true(n_refused > 10000);
}

static int unpack_hello(size_t name_len)
{
        Autoep__Hello hello = AUTOEP__HELLO__INIT;
        char *name = zeroed(name_len + 1);
        struct packed packed;
        int r;

        memset(name, 'j', name_len);
        hello.job = name;
        packed = pack(&hello.base);
        r = unpack_exact(AE_CONTROL_HELLO, packed.data, packed.len);
        free(packed.data);
        free(name);
        return r;
}

static void test_long_names(void **state)
{
        Autoep__Fail told = AUTOEP__FAIL__INIT;
        char text[2000];
        struct packed packed;

        (void)state;
        assert_int_equal(unpack_hello(AE_LAYOUT_NAME_MAX - 1), 0);
        assert_int_equal(unpack_hello(AE_LAYOUT_NAME_MAX), AE_EPROTO);
        assert_non_null(strstr(ae_error_text(), "field 'job' is longer than 511 bytes"));
        memset(text, 't', sizeof(text) - 1);
        text[sizeof(text) - 1] = '\0';
        told.text = text; /* a sentence may be longer than a name */
        packed = pack(&told.base);
        assert_int_equal(unpack_exact(AE_CONTROL_FAIL, packed.data, packed.len), 0);
        free(packed.data);
}

/* A limit holds in whatever depth the field stands. */
static int unpack_offer(size_t n_dims, size_t name_len)
{
        Autoep__Offer offer = AUTOEP__OFFER__INIT;
        Autoep__Model model = AUTOEP__MODEL__INIT;
        Autoep__Tensor tensor = AUTOEP__TENSOR__INIT;
        Autoep__Tensor *tensors[] = { &tensor };
        uint64_t dims[32] = { 0 };
        char name[1000] = { 0 };
        struct packed packed;
        int r;

        memset(name, 'n', name_len);
        tensor.name = name;
        tensor.dims = dims;
        tensor.n_dims = n_dims;
        model.tensors = tensors;
        model.n_tensors = 1;
        offer.model = &model;
        packed = pack(&offer.base);
        r = unpack_exact(AE_CONTROL_OFFER, packed.data, packed.len);
        free(packed.data);
        return r;
}

static void test_nested_limits(void **state)
{
        (void)state;
        assert_int_equal(unpack_offer(AE_LAYOUT_MAX_DIMS, AE_LAYOUT_NAME_MAX - 1), 0);
        assert_int_equal(unpack_offer(AE_LAYOUT_MAX_DIMS + 1, 1), AE_EPROTO);
        assert_non_null(strstr(ae_error_text(), "field 'dims' has 9 items, the limit is 8"));
        assert_int_equal(unpack_offer(1, AE_LAYOUT_NAME_MAX), AE_EPROTO);
}

static int unpack_start(size_t n_ranks)
{
        Autoep__Start start = AUTOEP__START__INIT;
        struct packed packed;
        int r;

        start.rank_node = zeroed(n_ranks * sizeof(*start.rank_node));
        start.n_rank_node = n_ranks;
        packed = pack(&start.base);
        r = unpack_exact(AE_CONTROL_START, packed.data, packed.len);
        free(packed.data);
        free(start.rank_node);
        return r;
}

static void test_too_many_items(void **state)
{
        (void)state;
        assert_int_equal(unpack_start(2 * AE_LAYOUT_MAX_TENSORS), 0);
        assert_int_equal(unpack_start(2 * AE_LAYOUT_MAX_TENSORS + 1), AE_EPROTO);
}

/* The length is looked at before the bytes. */
/* Field 0 in two bytes is legal to protobuf-c, and in one, as it packs it again, not. */
static void test_unknown_fields(void **state)
{
        static const uint8_t zero[] = { 0x80, 0x00, 0x0a }, high[] = { 0xf8, 0x07, 0x01 };
        static const uint8_t nested[] = { 0x0a, 0x03, 0xf8, 0x07, 0x01 }; /* in Register.model */
        ProtobufCMessage *message = NULL;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                assert_int_equal(ae_control_unpack(rows[i].type, zero, sizeof(zero), &message),
                                 AE_EPROTO);
                assert_int_equal(ae_control_unpack(rows[i].type, high, sizeof(high), &message),
                                 AE_EPROTO);
        }
        assert_int_equal(ae_control_unpack(AE_CONTROL_REGISTER, nested, sizeof(nested), &message),
                         AE_EPROTO);
        assert_non_null(strstr(ae_error_text(), "field 127"));
        assert_null(message);
}

static void test_oversized(void **state)
{
        ProtobufCMessage *message = NULL;

        (void)state;
        assert_int_equal(ae_control_unpack(AE_CONTROL_LEAVE, "", (size_t)AE_CONTROL_FRAME_MAX + 1,
                                           &message), AE_EPROTO);
        assert_non_null(strstr(ae_error_text(), "the limit is 67108864"));
        assert_null(message);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_round_trip),     cmocka_unit_test(test_empty),
                cmocka_unit_test(test_unknown_type),   cmocka_unit_test(test_truncated),
                cmocka_unit_test(test_bit_flips),      cmocka_unit_test(test_random_bytes),
                cmocka_unit_test(test_long_names),     cmocka_unit_test(test_nested_limits),
                cmocka_unit_test(test_unknown_fields),
                cmocka_unit_test(test_too_many_items), cmocka_unit_test(test_oversized),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
