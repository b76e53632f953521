/* SPDX-License-Identifier: Apache-2.0 */
/* Packing, unpacking and checking of control messages, by one walk over protobuf-c descriptors. */
#include "proto/wire/control.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"
#include "proto/wire/wire.h"

#include <string.h>

struct control_row {
        uint32_t type;
        const char *name;
        const ProtobufCMessageDescriptor *descriptor; /* borrowed: static */
};

static const struct control_row rows[] = {
#define CONTROL_ROW(name, value, lower, message) { value, #name, &autoep__##lower##__descriptor },
        AE_CONTROL_TABLE(CONTROL_ROW)
#undef CONTROL_ROW
};

static const struct control_row *find(uint32_t type)
{
        for (size_t i = 0; i < AE_ARRAY_LEN(rows); i++) {
                if (rows[i].type == type)
                        return &rows[i];
        }
        return NULL;
}

const char *ae_control_name(uint32_t type)
{
        const struct control_row *row = find(type);

        return row ? row->name : "unknown";
}

size_t ae_control_size(const ProtobufCMessage *message)
{
        return protobuf_c_message_get_packed_size(message);
}

void ae_control_pack(const ProtobufCMessage *message, uint8_t *ret)
{
        protobuf_c_message_pack(message, ret);
}

static int check_message(const ProtobufCMessage *message);

/* A text that is an answer may be long; everything else is a name. */
static int check_string(const ProtobufCFieldDescriptor *field, const char *string)
{
        if (!string || strcmp(field->name, "text") == 0)
                return 0;
        if (strlen(string) >= AE_LAYOUT_NAME_MAX)
                return ae_fail(AE_EPROTO, "field '%s' is longer than %d bytes", field->name,
                               AE_LAYOUT_NAME_MAX - 1);
        return 0;
}

static int check_repeated(const ProtobufCFieldDescriptor *field, const char *base)
{
        size_t n = *(const size_t *)(base + field->quantifier_offset);
        void *const *items = *(void *const *const *)(base + field->offset);
        size_t n_max = AE_CONTROL_LIST_MAX;
        int r;

        if (strcmp(field->name, "dims") == 0)
                n_max = AE_LAYOUT_MAX_DIMS;
        if (n > n_max)
                return ae_fail(AE_EPROTO, "field '%s' has %zu items, the limit is %zu", field->name,
                               n, n_max);
        if (field->type != PROTOBUF_C_TYPE_MESSAGE)
                return 0;
        for (size_t i = 0; i < n; i++) {
                r = check_message(items[i]);
                if (r < 0)
                        return r;
        }
        return 0;
}

static int check_field(const ProtobufCFieldDescriptor *field, const char *base)
{
        const ProtobufCMessage *child;

        if (field->label == PROTOBUF_C_LABEL_REPEATED)
                return check_repeated(field, base);
        if (field->type == PROTOBUF_C_TYPE_STRING)
                return check_string(field, *(const char *const *)(base + field->offset));
        if (field->type != PROTOBUF_C_TYPE_MESSAGE)
                return 0;
        child = *(const ProtobufCMessage *const *)(base + field->offset);
        return child ? check_message(child) : 0;
}

static int check_message(const ProtobufCMessage *message)
{
        const ProtobufCMessageDescriptor *descriptor = message->descriptor;
        int r;

        /* protobuf-c keeps them and packs them again, also those that it then cannot unpack */
        if (message->n_unknown_fields > 0)
                return ae_fail(AE_EPROTO, "%s has a field %u that this version does not know",
                               descriptor->short_name, message->unknown_fields[0].tag);
        for (unsigned i = 0; i < descriptor->n_fields; i++) {
                r = check_field(&descriptor->fields[i], (const char *)message);
                if (r < 0)
                        return r;
        }
        return 0;
}

int ae_control_unpack(uint32_t type, const void *data, size_t len, ProtobufCMessage **ret_message)
{
        AE_CLEANUP(ae_control_free_p) ProtobufCMessage *message = NULL;
        const struct control_row *row = find(type);
        int r;

        if (!row)
                return ae_fail(AE_EPROTO, "unknown control message %u", type);
        if (len > AE_CONTROL_FRAME_MAX)
                return ae_fail(AE_EPROTO, "%s message of %zu bytes, the limit is %u", row->name,
                               len, AE_CONTROL_FRAME_MAX);
        message = protobuf_c_message_unpack(row->descriptor, NULL, len, data);
        if (!message)
                return ae_fail(AE_EPROTO, "malformed %s message of %zu bytes", row->name, len);
        r = check_message(message);
        if (r < 0)
                return r;
        *ret_message = ae_steal(message);
        return 0;
}

ProtobufCMessage *ae_control_free(ProtobufCMessage *message)
{
        if (message)
                protobuf_c_message_free_unpacked(message, NULL);
        return NULL;
}
