/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Registered models: defaults, what is refused and how it is said, the first difference between two
 * ranks for every field of the schema, and the lanes of aliases.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/model.h"

#include <stdlib.h>
#include <string.h>

/* A message of two tensors, the second an alias of the first, as it comes from a peer. */
static Autoep__Model *make_message(void)
{
        Autoep__Model model = AUTOEP__MODEL__INIT;
        Autoep__Tensor a = AUTOEP__TENSOR__INIT;
        Autoep__Tensor b = AUTOEP__TENSOR__INIT;
        Autoep__Tensor *tensors[] = { &a, &b };
        uint64_t dims[] = { 64, 32 };
        uint64_t digests[] = { 11, 12, 13, 14 };
        char name[] = "embed";
        char unit[] = "in";
        char tied[] = "head";
        char other[] = "out";
        uint8_t packed[1000];
        Autoep__Model *message;
        size_t len;

        a.name = name;
        a.unit = unit;
        a.dtype = b.dtype = AE_DTYPE_BF16;
        a.tensor_class = b.tensor_class = AE_CLASS_DENSE;
        a.dims = b.dims = dims;
        a.n_dims = b.n_dims = 2;
        b.name = tied;
        b.unit = other;
        b.alias_of = name;
        model.tensors = tensors;
        model.n_tensors = 2;
        model.init_digest = digests;
        model.n_init_digest = 4;
        len = ae_control_size(&model.base);
        assert_true(len <= sizeof(packed));
        ae_control_pack(&model.base, packed);
        message = autoep__model__unpack(NULL, len, packed);
        assert_non_null(message);
        return message;
}

static struct ae_model *make_model(void)
{
        struct ae_model *model = NULL;

        assert_int_equal(ae_model_new(make_message(), &model), 0);
        return model;
}

static void test_defaults(void **state)
{
        struct ae_model *model = make_model();
        const Autoep__Model *m = model->message;

        (void)state;
        assert_int_equal(m->optimizer, AE_OPT_ADAMW);
        assert_int_equal(m->ep_size, 1);
        assert_int_equal(m->grad_wire, AE_DTYPE_F32);
        assert_int_equal(m->slots, AE_MODEL_SLOTS_DEFAULT);
        assert_int_equal(m->exchange_len, AE_MODEL_EXCHANGE_DEFAULT);
        assert_int_equal(m->tp_size, 1);
        assert_int_equal(m->pp_size, 1);
        assert_int_equal(m->sp_size, 1);
        assert_int_equal(model->n_specs, 2);
        assert_string_equal(model->specs[0].name, "embed");
        assert_string_equal(model->specs[0].unit, "in");
        assert_null(model->specs[0].alias_of);
        assert_string_equal(model->specs[1].alias_of, "embed");
        assert_int_equal(model->specs[1].n_dims, 2);
        assert_int_equal(model->specs[1].dims[1], 32);
        assert_false(model->specs[0].frozen);
        assert_null(ae_model_free(model));
        assert_null(ae_model_free(NULL));
}

/* What was set stays, and a copy is the same again. */
static void test_round_trip(void **state)
{
        Autoep__Model *message = make_message();
        struct ae_model *model = NULL;
        struct ae_model *copy = NULL;

        (void)state;
        message->optimizer = AE_OPT_SGD;
        message->ep_size = 4;
        message->grad_wire = AE_DTYPE_BF16;
        message->slots = AE_MODEL_SLOTS_MAX;
        message->exchange_len = 12345;
        message->order = 1;
        message->tensors[0]->flags = 1;
        message->tensors[0]->group = 3;
        assert_int_equal(ae_model_new(message, &model), 0);
        assert_int_equal(ae_model_copy(model, &copy), 0);
        assert_int_equal(copy->message->optimizer, AE_OPT_SGD);
        assert_int_equal(copy->message->slots, AE_MODEL_SLOTS_MAX);
        assert_int_equal(copy->message->exchange_len, 12345);
        assert_int_equal(copy->message->ep_size, 4);
        assert_true(copy->specs[0].frozen);
        assert_int_equal(copy->specs[0].group, 3);
        assert_ptr_not_equal(copy->specs[0].name, model->specs[0].name);
        assert_int_equal(ae_model_compare(model, "rank 0", copy, "rank 1"), 0);
        ae_model_free(model);
        ae_model_free(copy);
}

/* ---- refused ---------------------------------------------------------------------------- */

static void test_refused(void **state)
{
#define SETTING(name) offsetof(Autoep__Model, name)
        static const struct {
                size_t off;
                uint32_t value;
                int status;
                const char *words;
        } cases[] = {
                { SETTING(tp_size), 2, AE_EUNSUPPORTED, "tp_size 2: tensor parallelism" },
                { SETTING(pp_size), 3, AE_EUNSUPPORTED, "pp_size 3: pipeline parallelism" },
                { SETTING(sp_size), 4, AE_EUNSUPPORTED, "sp_size 4: sequence parallelism" },
                { SETTING(optimizer), 4, AE_EINVAL, "unknown optimizer 4" },
                { SETTING(order), 2, AE_EINVAL, "unknown order 2" },
                { SETTING(init), 2, AE_EINVAL, "unknown init 2" },
                { SETTING(nonfinite), 2, AE_EINVAL, "unknown nonfinite policy 2" },
                { SETTING(grad_wire), AE_DTYPE_I64, AE_EUNSUPPORTED, "grad_wire 3" },
                { SETTING(grad_wire), 99, AE_EUNSUPPORTED, "grad_wire 99" },
                { SETTING(slots), 1, AE_EINVAL, "1 inbox slots: use 2 to 64" },
                { SETTING(slots), 65, AE_EINVAL, "65 inbox slots" },
        };
#undef SETTING

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                Autoep__Model *message = make_message();
                struct ae_model *model = NULL;

                *(uint32_t *)(void *)((char *)message + cases[i].off) = cases[i].value;
                assert_int_equal(ae_model_new(message, &model), cases[i].status);
                assert_non_null(strstr(ae_error_text(), cases[i].words));
                assert_null(model);
        }
}

/* Sizes of parts and regions are worked out from them: no sum or product of theirs may wrap. What
 * is only compared may have any value. */
static void test_lens(void **state)
{
#define LEN(name, max) { #name, offsetof(Autoep__Model, name), max }
        static const struct {
                const char *name;
                size_t off;
                uint64_t max;
        } cases[] = {
                LEN(slot_len, AE_MODEL_SLOT_LEN_MAX),     LEN(overflow_len, AE_MODEL_MEMORY_MAX),
                LEN(cache_len, AE_MODEL_MEMORY_MAX),      LEN(exchange_len, AE_MODEL_EXCHANGE_MAX),
                LEN(budget_len, UINT64_MAX),
        };
#undef LEN

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                const uint64_t wrong[] = { cases[i].max + 1, UINT64_C(1) << 63, UINT64_MAX - 4094,
                                           UINT64_MAX };
                Autoep__Model *message = make_message();
                struct ae_model *model = NULL;

                *(uint64_t *)(void *)((char *)message + cases[i].off) = cases[i].max;
                assert_int_equal(ae_model_new(message, &model), 0);
                model = ae_model_free(model);
                for (size_t k = 0; cases[i].max < UINT64_MAX && k < AE_ARRAY_LEN(wrong); k++) {
                        message = make_message();
                        *(uint64_t *)(void *)((char *)message + cases[i].off) = wrong[k];
                        assert_int_equal(ae_model_new(message, &model), AE_EINVAL);
                        assert_non_null(strstr(ae_error_text(), cases[i].name));
                        assert_null(model);
                }
        }
}

static void test_too_many_dims(void **state)
{
        Autoep__Model *message = make_message();
        struct ae_model *model = NULL;
        uint64_t *dims = calloc(AE_LAYOUT_MAX_DIMS + 1, sizeof(*dims));

        (void)state;
        assert_non_null(dims);
        free(message->tensors[1]->dims);
        message->tensors[1]->dims = dims;
        message->tensors[1]->n_dims = AE_LAYOUT_MAX_DIMS + 1;
        assert_int_equal(ae_model_new(message, &model), AE_EINVAL);
        assert_string_equal(ae_error_text(), "tensor 'head' has 9 dimensions, the limit is 8");
        assert_null(model);
}

/* ---- compare ---------------------------------------------------------------------------- */

static void assert_differs(struct ae_model *a, struct ae_model *b, const char *field)
{
        assert_int_equal(ae_model_compare(a, "rank 0", b, "rank 3"), AE_EMISMATCH);
        if (!strstr(ae_error_text(), field) || !strstr(ae_error_text(), "rank 0") ||
            !strstr(ae_error_text(), "rank 3"))
                fail_msg("'%s' does not name '%s' and both ranks", ae_error_text(), field);
}

/* Changes one plain number of a message and wants to see its name; then puts it back. */
static void differ_in(struct ae_model *a, struct ae_model *b, void *message,
                      const ProtobufCFieldDescriptor *field)
{
        char *at = (char *)message + field->offset;
        char before[8];
        size_t size = field->type == PROTOBUF_C_TYPE_UINT64 ? 8 : 4;

        memcpy(before, at, size);
        at[0] ^= 1;
        assert_differs(a, b, field->name);
        memcpy(at, before, size);
}

/* By the schema, so that a new setting that is not compared fails here. tp, pp and sp are always 1
 * once a model is made. */
static void test_every_number(void **state)
{
        struct ae_model *a = make_model();
        struct ae_model *b = make_model();
        const ProtobufCMessageDescriptor *descriptors[] = { &autoep__model__descriptor,
                                                            &autoep__tensor__descriptor };
        void *messages[] = { b->message, b->message->tensors[1] };

        (void)state;
        for (size_t i = 0; i < 2; i++) {
                for (unsigned f = 0; f < descriptors[i]->n_fields; f++) {
                        const ProtobufCFieldDescriptor *field = &descriptors[i]->fields[f];

                        if (field->label == PROTOBUF_C_LABEL_REPEATED ||
                            field->type == PROTOBUF_C_TYPE_STRING || strcmp(field->name,
                                                                            "tp_size") == 0 ||
                            strcmp(field->name, "pp_size") == 0 || strcmp(field->name,
                                                                          "sp_size") == 0)
                                continue;
                        differ_in(a, b, messages[i], field);
                }
        }
        assert_int_equal(ae_model_compare(a, "rank 0", b, "rank 3"), 0);
        ae_model_free(a);
        ae_model_free(b);
}

static void test_names_and_shapes(void **state)
{
        struct ae_model *a = make_model();
        struct ae_model *b = make_model();
        Autoep__Tensor *tensor = b->message->tensors[1];

        (void)state;
        tensor->name[0] = 'H';
        assert_differs(a, b, "'head' where rank 3 has 'Head'");
        tensor->name[0] = 'h';
        tensor->unit[0] = 'O';
        assert_differs(a, b, "'head' is in unit 'out' (alias of 'embed')");
        tensor->unit[0] = 'o';
        tensor->alias_of[0] = 'E';
        assert_differs(a, b, "alias of 'Embed'");
        tensor->alias_of[0] = 'e';
        tensor->dims[1] = 33;
        assert_differs(a, b, "of head is 32 on rank 0 and 33 on rank 3");
        tensor->dims[1] = 32;
        tensor->n_dims = 1;
        assert_differs(a, b, "n_dims of head is 2 on rank 0 and 1 on rank 3");
        tensor->n_dims = 2;
        b->message->n_tensors = 1;
        assert_differs(a, b, "n_tensors of the model is 2 on rank 0 and 1 on rank 3");
        b->message->n_tensors = 2;
        assert_int_equal(ae_model_compare(a, "rank 0", b, "rank 3"), 0);
        ae_model_free(a);
        ae_model_free(b);
}

static void test_initial_values(void **state)
{
        struct ae_model *a = make_model();
        struct ae_model *b = make_model();

        (void)state;
        b->message->init_digest[3]++;
        assert_differs(a, b, "initial values of unit 'out' differ");
        b->message->init_digest[3]--;
        b->message->n_init_digest = 2;
        assert_differs(a, b, "2 digests of initial values");
        b->message->n_init_digest = 0; /* only some ranks give them: nothing to compare */
        assert_int_equal(ae_model_compare(a, "rank 0", b, "rank 3"), 0);
        b->message->n_init_digest = 4;
        ae_model_free(a);
        ae_model_free(b);
}

/* ---- lanes ------------------------------------------------------------------------------ */

/* Units: in (embed, frozen, bias), mid (a tied use of embed, norm), out (two tied uses). */
static struct ae_layout *make_layout(void)
{
        static const struct ae_tensor_spec specs[] = {
                { .name = "early", .unit = "mid", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 1000 }, .alias_of = "embed" },
                { .name = "embed", .unit = "in", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 1000 } },
                { .name = "fixed", .unit = "in", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 10 }, .frozen = true },
                { .name = "bias", .unit = "in", .dtype = AE_DTYPE_F32, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 10 } },
                { .name = "norm", .unit = "mid", .dtype = AE_DTYPE_F32, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 7 } },
                { .name = "fixed2", .unit = "out", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 10 }, .frozen = true, .alias_of = "fixed" },
                { .name = "bias2", .unit = "out", .dtype = AE_DTYPE_F32, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 10 }, .alias_of = "bias" },
                { .name = "head", .unit = "out", .dtype = AE_DTYPE_BF16, .class = AE_CLASS_DENSE,
                  .n_dims = 1, .dims = { 1000 }, .alias_of = "embed" },
        };
        struct ae_layout *layout = NULL;

        assert_int_equal(ae_layout_new(specs, AE_ARRAY_LEN(specs), 2, &layout), 0);
        return layout;
}

static void test_uses(void **state)
{
        struct ae_layout *layout = make_layout();
        uint32_t in = ae_layout_find_unit(layout, "in");
        uint32_t mid = ae_layout_find_unit(layout, "mid");
        uint32_t out = ae_layout_find_unit(layout, "out");
        uint32_t n_uses[8];

        (void)state;
        assert_true(layout->n_units <= AE_ARRAY_LEN(n_uses));
        ae_layout_count_uses(layout, n_uses);
        assert_int_equal(n_uses[in], 4);
        assert_int_equal(n_uses[mid], 1);
        assert_int_equal(n_uses[out], 1);
        assert_int_equal(ae_layout_use_of(layout, 0), 1);
        assert_int_equal(ae_layout_use_of(layout, 1), 0);
        assert_int_equal(ae_layout_use_of(layout, 4), 0);
        assert_int_equal(ae_layout_use_of(layout, 6), 2);
        assert_int_equal(ae_layout_use_of(layout, 7), 3);
        assert_int_equal(ae_layout_use_tensor(layout, in, 1), 0);
        assert_int_equal(ae_layout_use_tensor(layout, in, 2), 6);
        assert_int_equal(ae_layout_use_tensor(layout, in, 3), 7);
        assert_int_equal(ae_layout_use_tensor(layout, in, 4), AE_LAYOUT_NONE);
        assert_int_equal(ae_layout_use_tensor(layout, mid, 1), AE_LAYOUT_NONE);
        ae_layout_free(layout);
}

static void test_grad_first(void **state)
{
        struct ae_layout *layout = make_layout();
        uint64_t bias = ae_layout_grad_first(layout, 3);
        uint64_t embed = ae_layout_grad_first(layout, 1);

        (void)state;
        /* fp32 comes before bf16 inside a unit, each at a multiple of a slice's cut */
        assert_int_equal(bias, 0);
        assert_int_equal(embed, 128);
        assert_int_equal(ae_layout_grad_first(layout, 7), embed); /* an alias: its home's */
        assert_int_equal(ae_layout_grad_first(layout, 6), bias);
        assert_int_equal(ae_layout_grad_first(layout, 4), 0);
        ae_layout_free(layout);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_defaults),         cmocka_unit_test(test_round_trip),
                cmocka_unit_test(test_refused),          cmocka_unit_test(test_lens),
                cmocka_unit_test(test_too_many_dims),
                cmocka_unit_test(test_every_number),     cmocka_unit_test(test_names_and_shapes),
                cmocka_unit_test(test_initial_values),   cmocka_unit_test(test_uses),
                cmocka_unit_test(test_grad_first),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
