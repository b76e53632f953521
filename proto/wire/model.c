/* SPDX-License-Identifier: Apache-2.0 */
/* Models: checks, defaults, comparison; and the lanes of a unit's gradient sum. */
#include "proto/wire/model.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/wire.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_parallel(const Autoep__Model *m)
{
        if (m->tp_size > 1)
                return ae_fail(AE_EUNSUPPORTED,
                               "tp_size %u: tensor parallelism is not there yet, use 1",
                               m->tp_size);
        if (m->pp_size > 1)
                return ae_fail(AE_EUNSUPPORTED,
                               "pp_size %u: pipeline parallelism is not there yet, use 1",
                               m->pp_size);
        if (m->sp_size > 1)
                return ae_fail(AE_EUNSUPPORTED,
                               "sp_size %u: sequence parallelism is not there yet, use 1",
                               m->sp_size);
        return 0;
}

/* So large that sums and products of sizes can't wrap; budget_len is only compared. */
static int check_lens(const Autoep__Model *m)
{
        const struct {
                const char *name;
                uint64_t value, max;
        } lens[] = {
                { "slot_len", m->slot_len, AE_MODEL_SLOT_LEN_MAX },
                { "overflow_len", m->overflow_len, AE_MODEL_MEMORY_MAX },
                { "cache_len", m->cache_len, AE_MODEL_MEMORY_MAX },
                { "exchange_len", m->exchange_len, AE_MODEL_EXCHANGE_MAX },
        };

        for (size_t i = 0; i < AE_ARRAY_LEN(lens); i++) {
                if (lens[i].value > lens[i].max)
                        return ae_fail(AE_EINVAL, "%s of %llu bytes: use at most %llu",
                                       lens[i].name, (unsigned long long)lens[i].value,
                                       (unsigned long long)lens[i].max);
        }
        return 0;
}

static int check_settings(const Autoep__Model *m)
{
        if (m->optimizer > AE_OPT_EXTERNAL)
                return ae_fail(AE_EINVAL, "unknown optimizer %u", m->optimizer);
        if (m->order > 1)
                return ae_fail(AE_EINVAL, "unknown order %u: use E_THEN_D (0) or D_THEN_E (1)",
                               m->order);
        if (m->init > 1)
                return ae_fail(AE_EINVAL, "unknown init %u", m->init);
        if (m->nonfinite > 1)
                return ae_fail(AE_EINVAL, "unknown nonfinite policy %u", m->nonfinite);
        if (m->grad_wire != 0 && m->grad_wire != AE_DTYPE_F32 && m->grad_wire != AE_DTYPE_BF16)
                return ae_fail(AE_EUNSUPPORTED, "grad_wire %u: sums travel as fp32 or bf16",
                               m->grad_wire);
        if (m->slots == 1 || m->slots > AE_MODEL_SLOTS_MAX)
                return ae_fail(AE_EINVAL, "%u inbox slots: use 2 to %u", m->slots,
                               AE_MODEL_SLOTS_MAX);
        return check_lens(m);
}

static void fill_defaults(Autoep__Model *m)
{
        if (!m->optimizer)
                m->optimizer = AE_OPT_ADAMW;
        if (!m->ep_size)
                m->ep_size = 1;
        if (!m->grad_wire)
                m->grad_wire = AE_DTYPE_F32;
        if (!m->slots)
                m->slots = AE_MODEL_SLOTS_DEFAULT;
        if (!m->exchange_len)
                m->exchange_len = AE_MODEL_EXCHANGE_DEFAULT;
        m->tp_size = m->pp_size = m->sp_size = 1;
}

static void fill_spec(struct ae_tensor_spec *spec, const Autoep__Tensor *tensor)
{
        spec->name = tensor->name;
        spec->unit = tensor->unit;
        spec->dtype = tensor->dtype;
        spec->class = tensor->tensor_class;
        spec->group = tensor->group;
        spec->frozen = tensor->flags & 1;
        spec->n_dims = (uint32_t)tensor->n_dims;
        for (size_t i = 0; i < tensor->n_dims; i++)
                spec->dims[i] = tensor->dims[i];
        spec->alias_of = tensor->alias_of && tensor->alias_of[0] ? tensor->alias_of : NULL;
}

int ae_model_new(Autoep__Model *message, struct ae_model **ret_model)
{
        AE_CLEANUP(ae_model_free_p) struct ae_model *model = calloc(1, sizeof(*model));
        int r;

        if (!model) {
                ae_control_free(&message->base);
                return ae_fail(AE_ENOMEM, "no memory for a model record");
        }
        model->message = message;
        r = check_parallel(message);
        if (r < 0)
                return r;
        r = check_settings(message);
        if (r < 0)
                return r;
        fill_defaults(message);
        if (message->n_tensors > AE_LAYOUT_MAX_TENSORS)
                return ae_fail(AE_EOVERFLOW, "%zu tensors, the limit is %u", message->n_tensors,
                               AE_LAYOUT_MAX_TENSORS);
        model->specs = calloc(message->n_tensors + 1, sizeof(*model->specs));
        if (!model->specs)
                return ae_fail(AE_ENOMEM, "no memory for %zu tensor records", message->n_tensors);
        model->n_specs = (uint32_t)message->n_tensors;
        for (uint32_t i = 0; i < model->n_specs; i++) {
                if (message->tensors[i]->n_dims > AE_LAYOUT_MAX_DIMS)
                        return ae_fail(AE_EINVAL, "tensor '%s' has %zu dimensions, the limit is %d",
                                       message->tensors[i]->name, message->tensors[i]->n_dims,
                                       AE_LAYOUT_MAX_DIMS);
                fill_spec(&model->specs[i], message->tensors[i]);
        }
        *ret_model = ae_steal(model);
        return 0;
}

struct ae_model *ae_model_free(struct ae_model *model)
{
        if (!model)
                return NULL;
        if (model->message)
                ae_control_free(&model->message->base);
        free(model->specs);
        free(model);
        return NULL;
}

int ae_model_copy(const struct ae_model *model, struct ae_model **ret_copy)
{
        AE_CLEANUP(ae_cleanup_free) uint8_t *packed = NULL;
        size_t len = ae_control_size(&model->message->base);
        Autoep__Model *message;

        packed = malloc(len + 1);
        if (!packed)
                return ae_fail(AE_ENOMEM, "no memory to copy a model record of %zu bytes", len);
        ae_control_pack(&model->message->base, packed);
        message = autoep__model__unpack(NULL, len, packed);
        if (!message)
                return ae_fail(AE_ENOMEM, "no memory to copy a model record of %zu bytes", len);
        return ae_model_new(message, ret_copy);
}

int ae_model_layout(const struct ae_model *model, uint32_t n_nodes, struct ae_layout **ret_layout)
{
        return ae_layout_new(model->specs, model->n_specs, n_nodes, ret_layout);
}

static int differ(const char *name, const char *field, const char *who_a, unsigned long long a,
                  const char *who_b, unsigned long long b)
{
        return ae_fail(AE_EMISMATCH,
                       "ranks registered different models: %s of %s is %llu on %s and %llu on %s",
                       field, name, a, who_a, b, who_b);
}

static int compare_tensor(const Autoep__Tensor *a, const char *who_a, const Autoep__Tensor *b,
                          const char *who_b)
{
        if (strcmp(a->name, b->name) != 0)
                return ae_fail(
                        AE_EMISMATCH,
                        "ranks registered different models: %s has tensor '%s' where %s has '%s'",
                        who_a, a->name, who_b, b->name);
        if (strcmp(a->unit, b->unit) != 0 || strcmp(a->alias_of, b->alias_of) != 0)
                return ae_fail(
                        AE_EMISMATCH,
                        "ranks registered different models: '%s' is in unit '%s' (alias of '%s') "
                        "on %s and in '%s' (alias of '%s') on %s",
                        a->name, a->unit, a->alias_of, who_a, b->unit, b->alias_of, who_b);
#define COMPARE(field)                                                                            \
        if (a->field != b->field)                                                                 \
                return differ(a->name, #field, who_a, a->field, who_b, b->field);
        COMPARE(dtype)
        COMPARE(tensor_class)
        COMPARE(group)
        COMPARE(flags)
        COMPARE(n_dims)
#undef COMPARE
        for (size_t i = 0; i < a->n_dims; i++) {
                char field[32];

                (void)snprintf(field, sizeof(field), "dims[%zu]", i);
                if (a->dims[i] != b->dims[i])
                        return differ(a->name, field, who_a, a->dims[i], who_b, b->dims[i]);
        }
        return 0;
}

static int compare_settings(const Autoep__Model *a, const char *who_a, const Autoep__Model *b,
                            const char *who_b)
{
#define COMPARE(field)                                                                            \
        if (a->field != b->field)                                                                 \
                return differ("the model", #field, who_a, a->field, who_b, b->field);
        COMPARE(optimizer)
        COMPARE(ep_size)
        COMPARE(order)
        COMPARE(sum_group)
        COMPARE(grad_wire)
        COMPARE(init)
        COMPARE(nonfinite)
        COMPARE(slots)
        COMPARE(slot_len)
        COMPARE(overflow_len)
        COMPARE(cache_len)
        COMPARE(budget_len)
        COMPARE(exchange_len)
#undef COMPARE
        return 0;
}

/* Units are numbered in order of first mention. */
static const char *unit_name(const Autoep__Model *model, size_t unit)
{
        for (size_t i = 0; i < model->n_tensors; i++) {
                const char *name = model->tensors[i]->unit;
                size_t k = 0;

                while (k < i && strcmp(model->tensors[k]->unit, name) != 0)
                        k++;
                if (k == i && unit-- == 0)
                        return name;
        }
        return "?";
}

/* Under ALL_EQUAL every rank sends the digests of its initial values. */
static int compare_init(const Autoep__Model *a, const char *who_a, const Autoep__Model *b,
                        const char *who_b)
{
        if (!a->n_init_digest || !b->n_init_digest)
                return 0;
        if (a->n_init_digest != b->n_init_digest)
                return ae_fail(AE_EMISMATCH, "%s sent %zu digests of initial values, %s %zu", who_a,
                               a->n_init_digest / 2, who_b, b->n_init_digest / 2);
        for (size_t i = 0; i < a->n_init_digest; i++) {
                if (a->init_digest[i] != b->init_digest[i])
                        return ae_fail(AE_EMISMATCH,
                                       "initial values of unit '%s' differ between %s and %s",
                                       unit_name(a, i / 2), who_a, who_b);
        }
        return 0;
}

int ae_model_compare(const struct ae_model *a, const char *who_a, const struct ae_model *b,
                     const char *who_b)
{
        const Autoep__Model *ma = a->message;
        const Autoep__Model *mb = b->message;
        size_t n = AE_MIN(ma->n_tensors, mb->n_tensors);
        int r;

        for (size_t i = 0; i < n; i++) {
                r = compare_tensor(ma->tensors[i], who_a, mb->tensors[i], who_b);
                if (r < 0)
                        return r;
        }
        if (ma->n_tensors != mb->n_tensors)
                return differ("the model", "n_tensors", who_a, ma->n_tensors, who_b, mb->n_tensors);
        r = compare_settings(ma, who_a, mb, who_b);
        if (r < 0)
                return r;
        return compare_init(ma, who_a, mb, who_b);
}

/* Whether @tensor is an alias whose storage lies in @unit and takes a gradient. */
static bool is_use_of(const struct ae_layout *layout, const struct ae_layout_tensor *tensor,
                      uint32_t unit)
{
        const struct ae_layout_tensor *home = &layout->tensors[tensor->home];

        return tensor->home != tensor->id && home->unit == unit &&
               home->segment != AE_LAYOUT_NONE && layout->segments[home->segment].trainable;
}

uint32_t ae_layout_use_of(const struct ae_layout *layout, uint32_t tensor)
{
        uint32_t unit = layout->tensors[layout->tensors[tensor].home].unit;
        uint32_t use = 0;

        if (layout->tensors[tensor].home == tensor)
                return 0;
        for (uint32_t i = 0; i <= tensor; i++)
                use += is_use_of(layout, &layout->tensors[i], unit);
        return use;
}

void ae_layout_count_uses(const struct ae_layout *layout, uint32_t *ret_n_uses)
{
        for (uint32_t unit = 0; unit < layout->n_units; unit++)
                ret_n_uses[unit] = 1;
        for (uint32_t i = 0; i < layout->n_tensors; i++) {
                uint32_t unit = layout->tensors[layout->tensors[i].home].unit;

                if (is_use_of(layout, &layout->tensors[i], unit))
                        ret_n_uses[unit]++;
        }
}

uint32_t ae_layout_use_tensor(const struct ae_layout *layout, uint32_t unit, uint32_t use)
{
        uint32_t n = 0;

        for (uint32_t i = 0; i < layout->n_tensors; i++) {
                if (is_use_of(layout, &layout->tensors[i], unit) && ++n == use)
                        return i;
        }
        return AE_LAYOUT_NONE;
}

uint64_t ae_layout_grad_first(const struct ae_layout *layout, uint32_t tensor)
{
        const struct ae_layout_tensor *home = &layout->tensors[layout->tensors[tensor].home];
        const struct ae_layout_segment *segment = &layout->segments[home->segment];

        assert(segment->trainable);
        return segment->unit_grad_first + home->first;
}
