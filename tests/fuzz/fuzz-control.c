/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Control messages: a byte with the row of AE_CONTROL_TABLE, then the packed message. What is
 * taken can be packed again and then says the same; a model in it is refused or has a layout.
 */
#include "tests/fuzz/input.h"
#include "tests/lib/test.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/wire/control.h"
#include "proto/wire/model.h"

#include <stdlib.h>

static const uint32_t types[] = {
#define TYPE(name, value, lower, message) value,
        AE_CONTROL_TABLE(TYPE)
#undef TYPE
};

static uint8_t *packed(const ProtobufCMessage *message, size_t *ret_len)
{
        size_t len = ae_control_size(message);
        uint8_t *data = malloc(len + 1);

        assert_non_null(data);
        ae_control_pack(message, data);
        *ret_len = len;
        return data;
}

/* Takes the model out of a message that has one. */
static Autoep__Model *steal_model(uint32_t type, ProtobufCMessage *message)
{
        Autoep__Model **at, *model;

        switch (type) {
        case AE_CONTROL_REGISTER:
                at = &((Autoep__Register *)message)->model;
                break;
        case AE_CONTROL_REGISTERED:
                at = &((Autoep__Registered *)message)->model;
                break;
        case AE_CONTROL_OFFER:
                at = &((Autoep__Offer *)message)->model;
                break;
        case AE_CONTROL_START:
                at = &((Autoep__Start *)message)->model;
                break;
        default:
                return NULL;
        }
        model = *at;
        *at = NULL;
        return model;
}

static void check_model(Autoep__Model *message)
{
        struct ae_model *model = NULL, *copy = NULL;
        struct ae_layout *layout = NULL;

        if (ae_model_new(message, &model) < 0)
                return;
        assert_int_equal(ae_model_copy(model, &copy), 0);
        assert_int_equal(ae_model_compare(model, "it", copy, "its copy"), 0);
        if (ae_model_layout(model, 3, &layout) == 0)
                assert_int_equal(layout->n_tensors, model->n_specs);
        ae_layout_free(layout);
        ae_model_free(copy);
        ae_model_free(model);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        struct input input = { data, len };
        uint32_t row = input_u8(&input), type = row;
        ProtobufCMessage *message = NULL, *again = NULL;
        size_t first_len, second_len;
        uint8_t *first, *second;
        Autoep__Model *model;

        if (row < AE_ARRAY_LEN(types))
                type = types[row];
        if (ae_control_unpack(type, input.data, input.len, &message) < 0)
                return 0;
        assert_string_not_equal(ae_control_name(type), "unknown");
        first = packed(message, &first_len);
        assert_int_equal(ae_control_unpack(type, first, first_len, &again), 0);
        second = packed(again, &second_len);
        assert_int_equal(first_len, second_len);
        assert_memory_equal(first, second, first_len);
        model = steal_model(type, message);
        if (model)
                check_model(model);
        free(first);
        free(second);
        ae_control_free(message);
        ae_control_free(again);
        return 0;
}
