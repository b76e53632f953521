/* SPDX-License-Identifier: Apache-2.0 */
/* Model shapes from a table of configurations; see shapes.h. */
#include "tests/lib/shapes.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Zero where a model hasn't got the thing. */
struct config {
        const char *name;
        uint32_t vocab, hidden, n_layers, n_dense_layers;
        uint32_t n_heads, n_kv_heads, head_dim;              /* grouped-query attention */
        uint32_t q_rank, kv_rank, nope_dim, rope_dim, v_dim; /* latent attention (MLA) */
        uint32_t dense_ffn, expert_ffn, shared_ffn, n_experts;
        bool head_norm;   /* norms of q and k, per head */
        bool select_bias; /* a buffer: bias of the choice of experts */
};

static const struct config configs[SHAPES_N_MODELS] = {
        [SHAPES_QWEN3_30B_A3B] = {
                .name = "Qwen3-30B-A3B",
                .vocab = 151936, .hidden = 2048, .n_layers = 48,
                .n_heads = 32, .n_kv_heads = 4, .head_dim = 128, .head_norm = true,
                .expert_ffn = 768, .n_experts = 128,
        },
        [SHAPES_MIXTRAL_8X7B] = {
                .name = "Mixtral-8x7B",
                .vocab = 32000, .hidden = 4096, .n_layers = 32,
                .n_heads = 32, .n_kv_heads = 8, .head_dim = 128,
                .expert_ffn = 14336, .n_experts = 8,
        },
        [SHAPES_DEEPSEEK_V3] = {
                .name = "DeepSeek-V3",
                .vocab = 129280, .hidden = 7168, .n_layers = 61, .n_dense_layers = 3,
                .n_heads = 128, .q_rank = 1536, .kv_rank = 512,
                .nope_dim = 128, .rope_dim = 64, .v_dim = 128,
                .dense_ffn = 18432, .expert_ffn = 2048, .shared_ffn = 2048, .n_experts = 256,
                .select_bias = true,
        },
};

struct builder {
        struct shapes *shapes;
        const struct config *config;
        char unit[64];
        uint32_t router_dtype;
        bool experts;
};

static char *copy(const char *string)
{
        char *copied = strdup(string);

        assert(copied);
        return copied;
}

/* Adds a tensor of the current unit; @columns 0: a vector. */
static struct ae_tensor_spec *add(struct builder *builder, const char *name, uint64_t rows,
                                  uint64_t columns)
{
        struct shapes *shapes = builder->shapes;
        struct ae_tensor_spec *spec;
        char full[160];

        if (shapes->n_specs == shapes->cap) {
                shapes->cap = shapes->cap ? 2 * shapes->cap : 64;
                shapes->specs = realloc(shapes->specs, shapes->cap * sizeof(*shapes->specs));
                assert(shapes->specs);
        }
        (void)snprintf(full, sizeof(full), "%s.%s", builder->unit, name);
        spec = &shapes->specs[shapes->n_specs++];
        *spec = (struct ae_tensor_spec){
                .name = copy(full),
                .unit = copy(builder->unit),
                .dtype = AE_DTYPE_BF16,
                .class = AE_CLASS_DENSE,
                .n_dims = columns ? 2 : 1,
                .dims = { rows, columns },
        };
        return spec;
}

static void add_ffn(struct builder *builder, const char *prefix, uint32_t ffn, uint32_t class)
{
        static const char *const parts[] = { "gate_proj", "up_proj", "down_proj" };
        uint32_t hidden = builder->config->hidden;

        for (uint32_t i = 0; i < 3; i++) {
                char name[80];

                (void)snprintf(name, sizeof(name), "%s.%s.weight", prefix, parts[i]);
                add(builder, name, i < 2 ? ffn : hidden, i < 2 ? hidden : ffn)->class = class;
        }
}

static void add_grouped_attention(struct builder *builder)
{
        const struct config *config = builder->config;
        uint32_t q = config->n_heads * config->head_dim;
        uint32_t kv = config->n_kv_heads * config->head_dim;

        add(builder, "self_attn.q_proj.weight", q, config->hidden);
        add(builder, "self_attn.k_proj.weight", kv, config->hidden);
        add(builder, "self_attn.v_proj.weight", kv, config->hidden);
        add(builder, "self_attn.o_proj.weight", config->hidden, q);
        if (!config->head_norm)
                return;
        add(builder, "self_attn.q_norm.weight", config->head_dim, 0);
        add(builder, "self_attn.k_norm.weight", config->head_dim, 0);
}

static void add_latent_attention(struct builder *builder)
{
        const struct config *config = builder->config;
        uint32_t heads = config->n_heads;

        add(builder, "self_attn.q_a_proj.weight", config->q_rank, config->hidden);
        add(builder, "self_attn.q_a_layernorm.weight", config->q_rank, 0);
        add(builder, "self_attn.q_b_proj.weight", heads * (config->nope_dim + config->rope_dim),
            config->q_rank);
        add(builder, "self_attn.kv_a_proj_with_mqa.weight", config->kv_rank + config->rope_dim,
            config->hidden);
        add(builder, "self_attn.kv_a_layernorm.weight", config->kv_rank, 0);
        add(builder, "self_attn.kv_b_proj.weight", heads * (config->nope_dim + config->v_dim),
            config->kv_rank);
        add(builder, "self_attn.o_proj.weight", config->hidden, heads * config->v_dim);
}

static void add_moe(struct builder *builder)
{
        const struct config *config = builder->config;

        add(builder, "mlp.gate.weight", config->n_experts, config->hidden)->dtype =
                builder->router_dtype;
        if (config->select_bias) {
                struct ae_tensor_spec *bias = add(builder, "mlp.gate.e_score_correction_bias",
                                                  config->n_experts, 0);

                bias->class = AE_CLASS_BUFFER;
                bias->dtype = AE_DTYPE_F32;
        }
        if (config->shared_ffn)
                add_ffn(builder, "mlp.shared_experts", config->shared_ffn, AE_CLASS_DENSE);
        for (uint32_t i = 0; builder->experts && i < config->n_experts; i++) {
                char prefix[32];

                (void)snprintf(prefix, sizeof(prefix), "mlp.experts.%u", i);
                add_ffn(builder, prefix, config->expert_ffn, AE_CLASS_EXPERT);
        }
}

static void add_layer(struct builder *builder, uint32_t layer)
{
        const struct config *config = builder->config;

        (void)snprintf(builder->unit, sizeof(builder->unit), "model.layers.%u", layer);
        add(builder, "input_layernorm.weight", config->hidden, 0);
        if (config->kv_rank)
                add_latent_attention(builder);
        else
                add_grouped_attention(builder);
        add(builder, "post_attention_layernorm.weight", config->hidden, 0);
        if (layer < config->n_dense_layers)
                add_ffn(builder, "mlp", config->dense_ffn, AE_CLASS_DENSE);
        else
                add_moe(builder);
}

struct shapes *shapes_new(enum shapes_model model, uint32_t router_dtype, bool experts)
{
        struct builder builder = {
                .shapes = calloc(1, sizeof(*builder.shapes)),
                .config = &configs[model],
                .unit = "model.embed_tokens",
                .router_dtype = router_dtype,
                .experts = experts,
        };

        assert(builder.shapes);
        builder.shapes->model = builder.config->name;
        add(&builder, "weight", builder.config->vocab, builder.config->hidden);
        for (uint32_t i = 0; i < builder.config->n_layers; i++)
                add_layer(&builder, i);
        (void)snprintf(builder.unit, sizeof(builder.unit), "lm_head");
        add(&builder, "norm.weight", builder.config->hidden, 0);
        add(&builder, "weight", builder.config->vocab, builder.config->hidden);
        return builder.shapes;
}

struct shapes *shapes_free(struct shapes *shapes)
{
        if (!shapes)
                return NULL;
        for (uint32_t i = 0; i < shapes->n_specs; i++) {
                free((char *)shapes->specs[i].name);
                free((char *)shapes->specs[i].unit);
        }
        free(shapes->specs);
        free(shapes);
        return NULL;
}
