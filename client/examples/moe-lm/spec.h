/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the model consists of: its shape, its tensors and the units that they are gathered in. A
 * spec is computed from the shape alone, is the same on every rank, and never changes.
 *
 *   embed          embed.weight [256][dim]
 *   layer.N        attn_norm, qkv, attn_out, moe_norm, router, shared.gate, .up, .down, (balance)
 *   head           head.norm, head.weight (an alias of embed.weight: tied)
 *   layer.N.experts  layer.N.expert.E.gate, .up, .down: class expert, they live in the workers
 *
 * Matrices are [out][in], row-major, in the dtype of --weights; norms and routers are fp32, so that
 * a layer's unit has segments of both types. With balancing each layer has a selection bias of
 * class buffer.
 */
#pragma once

#include "kernels/ops.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LM_VOCAB 256
#define LM_NONE UINT32_MAX
#define LM_UNIT_TENSORS 9   /* most tensors of a unit */
#define LM_EXPERT_TENSORS 3 /* gate, up, down */
#define LM_MAX_LAYERS 64

enum lm_group { LM_GROUP_DECAY, LM_GROUP_PLAIN, LM_N_GROUPS }; /* optimizer groups */
enum lm_class { LM_DENSE = 1, LM_EXPERT = 2, LM_BUFFER = 3 };  /* values as in autoep.h */
enum lm_init { LM_INIT_ZERO, LM_INIT_ONE, LM_INIT_UNIFORM };

/* Tensors of a layer's unit, of a feed-forward block and of the head, by place. */
enum lm_layer_slot {
        LM_ATTN_NORM, LM_QKV, LM_ATTN_OUT, LM_MOE_NORM, LM_ROUTER, LM_SHARED_GATE, LM_SHARED_UP,
        LM_SHARED_DOWN, LM_BALANCE
};
enum lm_ffn_slot { LM_GATE, LM_UP, LM_DOWN };
enum lm_head_slot { LM_HEAD_NORM, LM_HEAD_WEIGHT };

struct lm_shape {
        uint32_t layers, dim, heads, experts, top_k, expert_dim, seq;
        bool sigmoid;       /* router scores; false: softmax */
        bool balance;       /* layers have a selection bias */
        uint32_t dtype;     /* of matrices: AE_DTYPE_F32 or AE_DTYPE_BF16 */
};

struct lm_tensor {
        char name[64];
        char unit[32];      /* name of its unit */
        enum lm_class class;
        enum lm_group group;
        enum lm_init init;
        double init_scale;  /* standard deviation */
        uint32_t dtype;
        uint32_t n_dims;
        uint64_t dims[2];
        uint32_t home;      /* the tensor that holds its values: itself unless it is an alias */
        uint64_t n;         /* elements */
        uint64_t first;     /* its first element in an image of the model, as the home's */
};

struct lm_unit {
        const char *name;   /* borrowed from its tensors */
        uint32_t first, n;  /* its tensors */
        uint32_t n_trainable; /* of which these, at the front, have a gradient */
        uint64_t n_elements;
};

struct lm_spec {
        struct lm_shape shape;
        struct lm_tensor *tensors; /* owned; dense and buffers, then experts */
        uint32_t n_tensors, n_dense;
        struct lm_unit *units;     /* owned; those that are gathered: embed, layers, head */
        uint32_t n_units;
        uint64_t n_elements;       /* of an image of the model, experts included */
        uint64_t n_dense_elements; /* of its front, without the experts */
};

/* AE_EINVAL names the option that is wrong; AE_ENOMEM. */
int lm_spec_init(struct lm_spec *spec, const struct lm_shape *shape);
void lm_spec_deinit(struct lm_spec *spec); /* accepts a zeroed struct */

/* Initial fp32 values of a tensor, rounded to its dtype: a function of seed, name and index. */
void lm_spec_values(const struct lm_tensor *tensor, uint64_t seed, float *values);

static inline uint32_t lm_unit_embed(void)
{
        return 0;
}

static inline uint32_t lm_unit_layer(uint32_t layer)
{
        return 1 + layer;
}

static inline uint32_t lm_unit_head(const struct lm_spec *spec)
{
        return 1 + spec->shape.layers;
}

/* The first of the LM_EXPERT_TENSORS tensors of a global expert. */
static inline uint32_t lm_expert_tensor(const struct lm_spec *spec, uint32_t layer, uint32_t expert)
{
        return spec->n_dense + (layer * spec->shape.experts + expert) * LM_EXPERT_TENSORS;
}
