/* SPDX-License-Identifier: Apache-2.0 */
/* The table of tensors and units. Built once at start, by the main thread. */
#include "client/examples/moe-lm/spec.h"

#include "client/examples/moe-lm/random.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One row of a unit: everything but what its place gives. */
struct row {
        const char *name;
        enum lm_class class;
        enum lm_init init;
        uint32_t dtype;
        uint64_t out, in;   /* in 0: a vector */
        double scale;       /* times 1/sqrt(in) is the standard deviation; 0: 1 */
};

static struct lm_tensor *add_tensor(struct lm_spec *spec, const char *unit, const struct row *row)
{
        struct lm_tensor *tensor = &spec->tensors[spec->n_tensors];
        const bool matrix = row->in > 0;
        const double scale = row->scale > 0 ? row->scale : 1;

        *tensor = (struct lm_tensor){
                .class = row->class,
                .group = matrix ? LM_GROUP_DECAY : LM_GROUP_PLAIN,
                .init = row->init,
                .init_scale = matrix ? scale / sqrt((double)row->in) : 0,
                .dtype = row->dtype,
                .n_dims = matrix ? 2 : 1,
                .dims = { row->out, row->in },
                .home = spec->n_tensors,
                .n = row->out * (matrix ? row->in : 1),
                .first = spec->n_elements,
        };
        snprintf(tensor->unit, sizeof(tensor->unit), "%s", unit);
        spec->n_elements += tensor->n;
        spec->n_tensors++;
        return tensor;
}

static void add_unit(struct lm_spec *spec, const char *name, const struct row *rows, uint32_t n)
{
        struct lm_unit *unit = &spec->units[spec->n_units++];

        assert(n <= LM_UNIT_TENSORS);
        *unit = (struct lm_unit){ .name = spec->tensors[spec->n_tensors].unit,
                                  .first = spec->n_tensors, .n = n };
        for (uint32_t i = 0; i < n; i++) {
                struct lm_tensor *tensor = add_tensor(spec, name, &rows[i]);

                snprintf(tensor->name, sizeof(tensor->name), "%s.%s", name, rows[i].name);
                unit->n_elements += tensor->n;
                if (tensor->class == LM_DENSE)
                        unit->n_trainable = i + 1;
        }
}

static void add_layer(struct lm_spec *spec, uint32_t layer)
{
        const struct lm_shape *s = &spec->shape;
        const double into_residual = 1 / sqrt(2.0 * s->layers); /* many blocks add up there */
        const uint64_t d = s->dim, f = s->expert_dim;
        const struct row rows[LM_UNIT_TENSORS] = {
                [LM_ATTN_NORM] = { "attn_norm", LM_DENSE, LM_INIT_ONE, AE_DTYPE_F32, d, 0, 0 },
                [LM_QKV] = { "qkv", LM_DENSE, LM_INIT_UNIFORM, s->dtype, 3 * d, d, 0 },
                [LM_ATTN_OUT] = { "attn_out", LM_DENSE, LM_INIT_UNIFORM, s->dtype, d, d,
                                  into_residual },
                [LM_MOE_NORM] = { "moe_norm", LM_DENSE, LM_INIT_ONE, AE_DTYPE_F32, d, 0, 0 },
                [LM_ROUTER] = { "router", LM_DENSE, LM_INIT_UNIFORM, AE_DTYPE_F32, s->experts, d,
                                0 },
                [LM_SHARED_GATE] = { "shared.gate", LM_DENSE, LM_INIT_UNIFORM, s->dtype, f, d, 0 },
                [LM_SHARED_UP] = { "shared.up", LM_DENSE, LM_INIT_UNIFORM, s->dtype, f, d, 0 },
                [LM_SHARED_DOWN] = { "shared.down", LM_DENSE, LM_INIT_UNIFORM, s->dtype, d, f,
                                     into_residual },
                [LM_BALANCE] = { "balance", LM_BUFFER, LM_INIT_ZERO, AE_DTYPE_F32, s->experts, 0,
                                 0 },
        };
        char name[32];

        snprintf(name, sizeof(name), "layer.%u", layer);
        add_unit(spec, name, rows, s->balance ? LM_UNIT_TENSORS : LM_UNIT_TENSORS - 1);
}

static void add_head(struct lm_spec *spec)
{
        const struct lm_shape *s = &spec->shape;
        const struct row rows[] = {
                [LM_HEAD_NORM] = { "norm", LM_DENSE, LM_INIT_ONE, AE_DTYPE_F32, s->dim, 0, 0 },
                [LM_HEAD_WEIGHT] = { "weight", LM_DENSE, LM_INIT_ZERO, s->dtype, LM_VOCAB, s->dim,
                                     0 },
        };
        const struct lm_tensor *home = &spec->tensors[spec->units[lm_unit_embed()].first];
        struct lm_tensor *tied;

        add_unit(spec, "head", rows, AE_ARRAY_LEN(rows));
        tied = &spec->tensors[spec->n_tensors - 1];
        assert(tied->n == home->n && tied->dtype == home->dtype);
        spec->n_elements -= tied->n;
        tied->home = home->home;
        tied->first = home->first;
}

static void add_expert(struct lm_spec *spec, uint32_t layer, uint32_t expert)
{
        static const char *const words[] = { "gate", "up", "down" };
        const uint64_t d = spec->shape.dim, f = spec->shape.expert_dim;
        char unit[32];

        snprintf(unit, sizeof(unit), "layer.%u.experts", layer);
        assert(spec->n_tensors == lm_expert_tensor(spec, layer, expert));
        for (uint32_t i = 0; i < LM_EXPERT_TENSORS; i++) {
                const bool down = i == LM_DOWN;
                const struct row row = {
                        .class = LM_EXPERT, .init = LM_INIT_UNIFORM, .dtype = spec->shape.dtype,
                        .out = down ? d : f, .in = down ? f : d,
                        .scale = down ? 1 / sqrt(2.0 * spec->shape.layers) : 1,
                };
                struct lm_tensor *tensor = add_tensor(spec, unit, &row);

                snprintf(tensor->name, sizeof(tensor->name), "layer.%u.expert.%u.%s", layer, expert,
                         words[i]);
        }
}

static int check_shape(const struct lm_shape *s)
{
        if (s->layers == 0 || s->layers > LM_MAX_LAYERS)
                return ae_fail(AE_EINVAL, "cannot build the model: --layers is %u, it must be "
                               "1..%d", s->layers, LM_MAX_LAYERS);
        if (s->heads == 0 || s->dim == 0 || s->dim % (2 * (uint64_t)s->heads) != 0)
                return ae_fail(AE_EINVAL, "cannot build the model: --dim %u must be a multiple of "
                               "twice --heads %u (rotary positions turn pairs)", s->dim, s->heads);
        if (s->experts == 0 || s->experts > 4096 || s->top_k == 0 || s->top_k > s->experts)
                return ae_fail(AE_EINVAL, "cannot build the model: --experts %u must be 1..4096 "
                               "and --top-k %u between 1 and that", s->experts, s->top_k);
        if (s->dim > 16384 || s->expert_dim == 0 || s->expert_dim > 65536)
                return ae_fail(AE_EINVAL, "cannot build the model: --dim %u must be up to 16384 "
                               "and --expert-dim %u within 1..65536", s->dim, s->expert_dim);
        if (s->seq < 2 || s->seq > 8192)
                return ae_fail(AE_EINVAL, "cannot build the model: --seq is %u, it must be 2..8192",
                               s->seq);
        return 0;
}

int lm_spec_init(struct lm_spec *spec, const struct lm_shape *shape)
{
        const struct row embed = { "weight", LM_DENSE, LM_INIT_UNIFORM, shape->dtype, LM_VOCAB,
                                   shape->dim, 0.4 };
        const size_t n_units = (size_t)shape->layers + 2;
        const size_t n_experts = (size_t)shape->layers * shape->experts * LM_EXPERT_TENSORS;
        int r = check_shape(shape);

        if (r < 0)
                return r;
        *spec = (struct lm_spec){ .shape = *shape };
        spec->tensors = calloc(n_units * LM_UNIT_TENSORS + n_experts, sizeof(*spec->tensors));
        spec->units = calloc(n_units, sizeof(*spec->units));
        if (!spec->tensors || !spec->units) {
                lm_spec_deinit(spec);
                return ae_fail_sys(ENOMEM, "cannot list the tensors of %u layers", shape->layers);
        }
        add_unit(spec, "embed", &embed, 1);
        for (uint32_t layer = 0; layer < shape->layers; layer++)
                add_layer(spec, layer);
        add_head(spec);
        assert(spec->n_units == n_units);
        spec->n_dense = spec->n_tensors;
        spec->n_dense_elements = spec->n_elements;
        for (uint32_t layer = 0; layer < shape->layers; layer++) {
                for (uint32_t expert = 0; expert < shape->experts; expert++)
                        add_expert(spec, layer, expert);
        }
        return 0;
}

void lm_spec_deinit(struct lm_spec *spec)
{
        free(spec->tensors);
        free(spec->units);
        *spec = (struct lm_spec){ 0 };
}

static void round_bf16(float *values, size_t n)
{
        ae_bf16 rounded[256];

        for (size_t i = 0; i < n; i += AE_ARRAY_LEN(rounded)) {
                const size_t count = AE_MIN(n - i, AE_ARRAY_LEN(rounded));

                ae_ops()->f32_to_bf16(rounded, values + i, count);
                ae_ops()->bf16_to_f32(values + i, rounded, count);
        }
}

void lm_spec_values(const struct lm_tensor *tensor, uint64_t seed, float *values)
{
        const uint64_t key = lm_random_key(seed, tensor->name);
        const double width = 2 * sqrt(3.0) * tensor->init_scale; /* of a uniform distribution */

        for (uint64_t i = 0; i < tensor->n; i++) {
                values[i] = tensor->init == LM_INIT_ONE ? 1 : 0;
                if (tensor->init == LM_INIT_UNIFORM)
                        values[i] = (float)((lm_random_unit(key, i) - 0.5) * width);
        }
        if (tensor->dtype == AE_DTYPE_BF16)
                round_bf16(values, tensor->n);
}
