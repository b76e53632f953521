/* SPDX-License-Identifier: Apache-2.0 */
/* Control messages out of nothing; see invent.h. */
#include "tests/lib/invent.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>

/* In [0, @end). */
static uint32_t draw(struct invent *invent, size_t end)
{
        return invent->draw(invent->user) % (uint32_t)end;
}

static ProtobufCMessage *make(struct invent *invent,
                              const ProtobufCMessageDescriptor *descriptor);

/* Mostly small: ids, counts, flags. */
static uint64_t number(struct invent *invent)
{
        static const uint64_t numbers[] = { 0, 1, 2, 3, 8, 64, 100, 4096, 100000, UINT32_MAX,
                                            UINT64_MAX, (uint64_t)AE_EPROTO };

        return numbers[draw(invent, 3) ? draw(invent, 4) : draw(invent, AE_ARRAY_LEN(numbers))];
}

static const char *word(struct invent *invent)
{
        static const char *const words[] = { "job", "", "secret", "other", "w", "big", "u", "v" };

        return words[draw(invent, 2) ? 0 : draw(invent, AE_ARRAY_LEN(words))];
}

static void fill_bytes(struct invent *invent, ProtobufCBinaryData *bytes)
{
        bytes->len = draw(invent, 2) ? sizeof(struct ae_net_key) : draw(invent, 80);
        bytes->data = calloc(1, bytes->len + 1);
        assert_non_null(bytes->data);
        if (bytes->len == sizeof(struct ae_net_key) && invent->n_keys > 0)
                memcpy(bytes->data, invent->keys[draw(invent, invent->n_keys)].bytes, bytes->len);
}

static void fill_value(struct invent *invent, const ProtobufCFieldDescriptor *field, void *at)
{
        switch (field->type) {
        case PROTOBUF_C_TYPE_STRING:
                *(char **)at = strdup(word(invent));
                break;
        case PROTOBUF_C_TYPE_BYTES:
                fill_bytes(invent, at);
                break;
        case PROTOBUF_C_TYPE_MESSAGE:
                if (draw(invent, 8))
                        *(ProtobufCMessage **)at = make(invent, field->descriptor);
                break;
        case PROTOBUF_C_TYPE_UINT64:
        case PROTOBUF_C_TYPE_FIXED64:
                *(uint64_t *)at = number(invent);
                break;
        default:
                *(uint32_t *)at = (uint32_t)number(invent);
        }
}

static void fill_field(struct invent *invent, const ProtobufCFieldDescriptor *field, char *message)
{
        size_t n = draw(invent, 4);
        char *values;

        if (field->label != PROTOBUF_C_LABEL_REPEATED) {
                fill_value(invent, field, message + field->offset);
                return;
        }
        values = calloc(n + 1, 16);
        assert_non_null(values);
        for (size_t i = 0; i < n; i++) {
                size_t size = field->type == PROTOBUF_C_TYPE_UINT32 ? 4 : 8;
                void *at = values + i * size;

                if (field->type == PROTOBUF_C_TYPE_MESSAGE)
                        *(ProtobufCMessage **)at = make(invent, field->descriptor);
                else
                        fill_value(invent, field, at);
        }
        *(size_t *)(void *)(message + field->quantifier_offset) = n;
        *(char **)(void *)(message + field->offset) = values;
}

static ProtobufCMessage *make(struct invent *invent,
                              const ProtobufCMessageDescriptor *descriptor)
{
        ProtobufCMessage *message = calloc(1, descriptor->sizeof_message);

        assert_non_null(message);
        descriptor->message_init(message);
        for (unsigned i = 0; i < descriptor->n_fields; i++) {
                if (draw(invent, 16))
                        fill_field(invent, &descriptor->fields[i], (char *)message);
        }
        return message;
}

static const struct {
        uint32_t type;
        const ProtobufCMessageDescriptor *descriptor;
} controls[] = {
#define ROW(name, value, lower, message) { value, &autoep__##lower##__descriptor },
        AE_CONTROL_TABLE(ROW)
#undef ROW
};

ProtobufCMessage *invent_control(struct invent *invent, uint32_t *ret_type)
{
        uint32_t row = draw(invent, AE_ARRAY_LEN(controls));

        *ret_type = controls[row].type;
        return make(invent, controls[row].descriptor);
}
