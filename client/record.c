/* SPDX-License-Identifier: Apache-2.0 */
/* From struct autoep_model to a checked record, see record.h. Registering thread only. */
#include "client/record.h"

#include "client/error.h"
#include "proto/base/cleanup.h"
#include "proto/base/num.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

AE_DEFINE_CLEANUP(struct ae_layout *, ae_layout_free)

/* ---- the record ------------------------------------------------------------------------- */

static int check_tensor(const struct autoep_tensor *t, uint32_t index)
{
        int r = ae_check_size("autoep_tensor", t->size, sizeof(*t));

        if (r < 0)
                return r;
        if (!t->name || !t->name[0])
                return ae_fail(AE_EINVAL, "tensor %u has no name", index);
        if (!t->unit || !t->unit[0])
                return ae_fail(AE_EINVAL, "tensor '%s' has no unit", t->name);
        if (strlen(t->name) >= AE_LAYOUT_NAME_MAX || strlen(t->unit) >= AE_LAYOUT_NAME_MAX)
                return ae_fail(AE_EINVAL, "tensor '%.64s…' or its unit has a name of more than "
                               "%u bytes", t->name, AE_LAYOUT_NAME_MAX - 1);
        if (t->n_dims > AUTOEP_MAX_DIMS)
                return ae_fail(AE_EINVAL, "tensor '%s' has %u dimensions, the limit is %d", t->name,
                               t->n_dims, AUTOEP_MAX_DIMS);
        if (t->flags & ~AUTOEP_FROZEN)
                return ae_fail(AE_EINVAL, "tensor '%s' has the unknown flags %#x", t->name,
                               t->flags & ~AUTOEP_FROZEN);
        return 0;
}

static char *copy_of(const char *text)
{
        return strdup(text ? text : "");
}

/* Memory as protobuf-c's own allocator would give it, so that it frees the message as usual. */
static int fill_tensor(const struct autoep_tensor *from, Autoep__Tensor *to)
{
        to->name = copy_of(from->name);
        to->unit = copy_of(from->unit);
        to->alias_of = copy_of(from->alias_of);
        to->dtype = from->dtype;
        to->tensor_class = from->tensor_class;
        to->group = from->group;
        to->flags = from->flags;
        if (from->n_dims > 0)
                to->dims = calloc(from->n_dims, sizeof(*to->dims));
        if (!to->name || !to->unit || !to->alias_of || (from->n_dims > 0 && !to->dims))
                return ae_fail(AE_ENOMEM, "no memory for a record of tensor '%s'", from->name);
        to->n_dims = from->n_dims;
        for (uint32_t i = 0; i < from->n_dims; i++)
                to->dims[i] = from->dims[i];
        return 0;
}

static int fill_tensors(const struct autoep_model *from, Autoep__Model *to)
{
        to->tensors = calloc((size_t)from->n_tensors + 1, sizeof(*to->tensors));
        if (!to->tensors)
                return ae_fail(AE_ENOMEM, "no memory for records of %u tensors", from->n_tensors);
        for (uint32_t i = 0; i < from->n_tensors; i++) {
                int r = check_tensor(&from->tensors[i], i);

                if (r < 0)
                        return r;
                to->tensors[i] = malloc(sizeof(*to->tensors[i]));
                if (!to->tensors[i])
                        return ae_fail(AE_ENOMEM, "no memory for records of %u tensors",
                                       from->n_tensors);
                autoep__tensor__init(to->tensors[i]);
                to->n_tensors++;
                r = fill_tensor(&from->tensors[i], to->tensors[i]);
                if (r < 0)
                        return r;
        }
        return 0;
}

static void fill_settings(const struct autoep_model *from, Autoep__Model *to)
{
        to->optimizer = from->optimizer;
        to->ep_size = from->ep_size;
        to->order = from->order;
        to->sum_group = from->sum_group;
        to->grad_wire = from->grad_wire;
        to->init = from->init;
        to->nonfinite = from->nonfinite;
        to->tp_size = from->tp_size;
        to->pp_size = from->pp_size;
        to->sp_size = from->sp_size;
        to->slots = from->slots;
        to->slot_len = from->slot_len;
        to->overflow_len = from->overflow_len;
        to->cache_len = from->cache_len;
        to->budget_len = from->budget_len;
        to->exchange_len = from->exchange_len;
}

static int message_of(const struct autoep_model *model, Autoep__Model **ret_message)
{
        Autoep__Model *message = malloc(sizeof(*message));
        int r;

        if (!message)
                return ae_fail(AE_ENOMEM, "no memory for a model record");
        autoep__model__init(message);
        fill_settings(model, message);
        r = fill_tensors(model, message);
        if (r < 0) {
                (void)ae_control_free(&message->base);
                return r;
        }
        *ret_message = message;
        return 0;
}

/* What the daemons would refuse is refused here already, on the rank that is wrong. */
static int check_record(const struct autoep *h, const struct ae_model *record)
{
        AE_CLEANUP(ae_layout_free_p) struct ae_layout *layout = NULL;
        struct ae_group_topology topology;
        int r;

        r = ae_model_layout(record, h->n_nodes, &layout);
        if (r < 0)
                return r;
        return ae_group_init(h->world, record->message->ep_size, record->message->order, &topology);
}

int ae_record_model(const struct autoep *h, const struct autoep_model *model,
                      struct ae_model **ret_model)
{
        AE_CLEANUP(ae_model_free_p) struct ae_model *record = NULL;
        Autoep__Model *message = NULL;
        int r;

        r = ae_check_size("autoep_model", model->size, sizeof(*model));
        if (r < 0)
                return r;
        if (model->n_tensors > 0 && !model->tensors)
                return ae_fail(AE_EINVAL, "%u tensors at address NULL", model->n_tensors);
        if (model->n_tensors > AE_LAYOUT_MAX_TENSORS)
                return ae_fail(AE_EOVERFLOW, "%u tensors, the limit is %u", model->n_tensors,
                               AE_LAYOUT_MAX_TENSORS);
        r = message_of(model, &message);
        if (r < 0)
                return r;
        r = ae_model_new(message, &record);
        if (r < 0)
                return r;
        r = check_record(h, record);
        if (r < 0)
                return r;
        *ret_model = ae_steal(record);
        return 0;
}

/* ---- initial values --------------------------------------------------------------------- */

/* Bytes of the tensor's initial values, 0 for none. The layout has checked the products. */
static uint64_t init_len(const struct autoep_tensor *t)
{
        bool trainable = t->tensor_class == AUTOEP_DENSE && !(t->flags & AUTOEP_FROZEN);
        uint64_t n = 1;

        if (t->tensor_class == AUTOEP_EXPERT || t->alias_of)
                return 0;
        for (uint32_t i = 0; i < t->n_dims; i++)
                n *= t->dims[i];
        return n * (trainable ? sizeof(float) : ae_dtype_size(t->dtype));
}

/* Sums the bytes up; all tensors have values, or none has (*ret_len is then 0). */
static int measure(const struct autoep_model *model, uint64_t *ret_len)
{
        const struct autoep_tensor *with = NULL;
        const struct autoep_tensor *without = NULL;
        uint64_t len = 0;

        for (uint32_t i = 0; i < model->n_tensors; i++) {
                const struct autoep_tensor *t = &model->tensors[i];

                if (init_len(t) == 0)
                        continue;
                if (t->init)
                        with = t;
                else
                        without = t;
                len += init_len(t);
        }
        if (with && without)
                return ae_fail(AE_EINVAL, "tensor '%s' has initial values, tensor '%s' has none: "
                               "rank 0 gives all", with->name, without->name);
        if (without && model->init == AUTOEP_INIT_ALL_EQUAL)
                return ae_fail(AE_EINVAL, "tensor '%s' has no initial values: with "
                               "AUTOEP_INIT_ALL_EQUAL every rank gives them", without->name);
        *ret_len = with ? len : 0;
        return 0;
}

/* Of the unit's values in the order of registration. */
static XXH128_hash_t digest_unit(XXH3_state_t *state, const struct ae_layout *layout, uint32_t unit,
                                 const struct autoep_model *model)
{
        const struct ae_layout_unit *u = &layout->units[unit];

        (void)XXH3_128bits_reset(state); /* fails for NULL only */
        for (uint32_t i = 0; i < u->n_tensors; i++) {
                const struct autoep_tensor *t =
                        &model->tensors[layout->unit_tensors[u->tensor_first + i]];

                if (init_len(t) > 0)
                        (void)XXH3_128bits_update(state, t->init, init_len(t));
        }
        return XXH3_128bits_digest(state);
}

static void free_hash(XXH3_state_t **state)
{
        (void)XXH3_freeState(*state);
}

static int add_digests(const struct autoep *h, const struct autoep_model *model,
                       struct ae_model *record)
{
        AE_CLEANUP(ae_layout_free_p) struct ae_layout *layout = NULL;
        AE_CLEANUP(free_hash) XXH3_state_t *state = XXH3_createState();
        Autoep__Model *message = record->message;
        int r;

        r = ae_model_layout(record, h->n_nodes, &layout);
        if (r < 0)
                return r;
        message->init_digest = calloc((size_t)layout->n_units * 2 + 1,
                                      sizeof(*message->init_digest));
        if (!state || !message->init_digest)
                return ae_fail(AE_ENOMEM, "no memory for digests of %u units", layout->n_units);
        message->n_init_digest = (size_t)layout->n_units * 2;
        for (uint32_t i = 0; i < layout->n_units; i++) {
                XXH128_hash_t hash = digest_unit(state, layout, i, model);

                message->init_digest[2 * i] = hash.low64;
                message->init_digest[2 * i + 1] = hash.high64;
        }
        return 0;
}

static int write_values(const struct autoep_model *model, uint64_t len, int *ret_fd)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        uint64_t off = 0;
        int r;

        r = ae_map_memfd("initial values", len, &fd);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < model->n_tensors; i++) {
                uint64_t tensor_len = init_len(&model->tensors[i]);

                r = ae_map_write(fd, model->tensors[i].init, tensor_len, off);
                if (r < 0)
                        return r;
                off += tensor_len;
        }
        assert(off == len);
        *ret_fd = ae_steal_fd(&fd);
        return 0;
}

int ae_record_init(const struct autoep *h, const struct autoep_model *model,
                     struct ae_model *record, struct ae_record_init *ret_init)
{
        struct ae_record_init init = { .fd = -1 };
        int r;

        if (h->rank != 0 && model->init != AUTOEP_INIT_ALL_EQUAL) {
                *ret_init = init; /* rank 0's count */
                return 0;
        }
        r = measure(model, &init.len);
        if (r == 0 && model->init == AUTOEP_INIT_ALL_EQUAL)
                r = add_digests(h, model, record);
        if (h->rank != 0)
                init.len = 0; /* to compare them, digests do */
        if (r == 0 && init.len > 0)
                r = write_values(model, init.len, &init.fd);
        if (r < 0)
                return r;
        *ret_init = init;
        return 0;
}
