/* SPDX-License-Identifier: Apache-2.0 */
/* The transformer, forward and backward. Compiled once per number type; the training thread. */
#include "client/examples/moe-lm/model.h"

#include "client/examples/moe-lm/attention.h"
#include "client/examples/moe-lm/blocks.h"
#include "client/examples/moe-lm/moe.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a layer keeps from forward to backward, [tokens][…]. Arrays lie in the model's memory. */
struct layer {
        real *x, *attn_in, *qkv, *prob, *attn, *mid, *moe_in;
        real *attn_inverse, *moe_inverse;
        real *gate, *up, *hidden; /* of the shared expert */
        struct lm_moe moe;
};

struct lm_model {
        struct lm_backend *backend;   /* borrowed */
        const struct lm_spec *spec;   /* borrowed */
        size_t max_tokens;
        struct lm_attention attention;
        struct lm_moe_tools tools;
        struct layer *layers;         /* owned */
        real *memory;                 /* owned; all arrays of reals below and in layers */
        real *x, *normed, *inverse, *logits; /* after the last layer */
        real *dx, *dmid, *dwide;      /* gradients on their way back */
        real *spare;                  /* [tokens][dim] */
        real *weights, *grads;        /* room for the largest unit, widened */
};

/* A unit in use. */
struct unit {
        uint32_t id;
        struct lm_view view;
        const real *w[LM_UNIT_TENSORS];
        real *g[LM_UNIT_TENSORS];     /* zeroed */
};

static const struct lm_unit *unit_of(const struct lm_model *model, uint32_t id)
{
        return &model->spec->units[id];
}

static const struct lm_tensor *unit_tensors(const struct lm_model *model, uint32_t id)
{
        return &model->spec->tensors[unit_of(model, id)->first];
}

/* Gathers a unit and widens its weights into the model's room. */
static int unit_open(struct lm_model *model, uint32_t id, struct unit *ret_unit)
{
        const struct lm_tensor *tensors = unit_tensors(model, id);
        real *weights = model->weights;
        int r;

        ret_unit->id = id;
        r = lm_gather(model->backend, id, &ret_unit->view);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < unit_of(model, id)->n; i++) {
                ret_unit->w[i] = lm_widen(ret_unit->view.data[i], tensors[i].dtype, tensors[i].n,
                                          weights);
                weights += tensors[i].n;
        }
        return 0;
}

static int unit_close(struct lm_model *model, const struct unit *unit)
{
        return model->backend->ops->release(model->backend, unit->id);
}

/* Zeroed gradients for all tensors of a unit. */
static void unit_grads(struct lm_model *model, uint32_t id, struct unit *ret_unit)
{
        const struct lm_tensor *tensors = unit_tensors(model, id);
        real *grads = model->grads;

        memset(grads, 0, unit_of(model, id)->n_elements * sizeof(*grads));
        for (uint32_t i = 0; i < unit_of(model, id)->n; i++) {
                ret_unit->g[i] = grads;
                grads += tensors[i].n;
        }
}

static int unit_scatter(struct lm_model *model, const struct unit *unit)
{
        const void *grads[LM_UNIT_TENSORS];

        for (uint32_t i = 0; i < unit_of(model, unit->id)->n_trainable; i++)
                grads[i] = unit->g[i];
        return lm_scatter(model->backend, unit->id, grads);
}

static struct lm_rows rows_of(const struct lm_batch *batch)
{
        return (struct lm_rows){ .seq_first = batch->seq_first, .n_seqs = batch->n_seqs };
}

static struct lm_ffn shared_ffn(const struct lm_model *model, const struct layer *layer,
                                const struct unit *unit, size_t rows)
{
        return (struct lm_ffn){
                .rows = rows, .dim = model->spec->shape.dim,
                .hidden = model->spec->shape.expert_dim, .x = layer->moe_in,
                .w = { unit->w[LM_SHARED_GATE], unit->w[LM_SHARED_UP], unit->w[LM_SHARED_DOWN] },
                .gate = layer->gate, .up = layer->up, .mid = layer->hidden,
        };
}

/* layer->x to layer->mid: attention and its residual. */
static void attention_forward(struct lm_model *model, struct layer *layer, const struct unit *unit,
                              const struct lm_batch *batch)
{
        const size_t n = batch->n_tokens, dim = model->spec->shape.dim;
        const struct lm_rows rows = rows_of(batch);

        lm_norm(n, dim, layer->x, unit->w[LM_ATTN_NORM], layer->attn_in, layer->attn_inverse);
        lm_linear((struct lm_dims){ n, dim, 3 * dim }, layer->attn_in, unit->w[LM_QKV], layer->qkv);
        lm_attention_forward(&model->attention, &rows, layer->qkv, layer->prob, layer->attn);
        lm_linear((struct lm_dims){ n, dim, dim }, layer->attn, unit->w[LM_ATTN_OUT], layer->mid);
        lm_add(n * dim, layer->mid, layer->x);
}

static struct lm_moe_tokens moe_tokens(const struct lm_model *model, const struct layer *layer,
                                       const struct unit *unit, size_t n_tokens)
{
        return (struct lm_moe_tokens){
                .n_tokens = n_tokens, .x = layer->moe_in, .router = unit->w[LM_ROUTER],
                .bias = model->spec->shape.balance ? unit->view.data[LM_BALANCE] : NULL,
        };
}

/* By how much the last chosen expert of a token beat the best that was not chosen. */
static double route_gap(const struct lm_shape *s, const real *logits, const float *bias,
                        const int32_t *idx)
{
        double sum = 0, least = INFINITY, best = -INFINITY;

        for (uint32_t e = 0; !s->sigmoid && e < s->experts; e++)
                sum += exp((double)logits[e]);
        for (uint32_t e = 0; e < s->experts; e++) {
                const double logit = (double)logits[e];
                const double score = (s->sigmoid ? 1 / (1 + exp(-logit)) : exp(logit) / sum) +
                                     (bias ? (double)bias[e] : 0);
                bool chosen = false;

                for (uint32_t k = 0; k < s->top_k; k++)
                        chosen |= idx[k] == (int32_t)e;
                if (chosen)
                        least = fmin(least, score);
                else
                        best = fmax(best, score);
        }
        return least - best;
}

static void note_routes(const struct lm_model *model, const struct lm_moe *moe,
                        const struct lm_moe_tokens *tokens, const struct lm_route_log *log)
{
        const struct lm_shape *s = &model->spec->shape;
        const size_t first = moe->layer * model->max_tokens;

        memcpy(log->idx + first * s->top_k, moe->idx,
               tokens->n_tokens * s->top_k * sizeof(*moe->idx));
        for (size_t t = 0; log->gap && t < tokens->n_tokens; t++)
                log->gap[first + t] = route_gap(s, moe->logits + t * s->experts, tokens->bias,
                                                moe->idx + t * s->top_k);
}

/* From layer->x to @out, both [tokens][dim]. */
static int layer_compute(struct lm_model *model, struct layer *layer, const struct unit *unit,
                         const struct lm_train *train, real *out)
{
        const struct lm_batch *batch = train->batch;
        const size_t n = batch->n_tokens, dim = model->spec->shape.dim;
        struct lm_moe_tokens tokens = moe_tokens(model, layer, unit, n);
        const struct lm_ffn shared = shared_ffn(model, layer, unit, n);
        int r;

        attention_forward(model, layer, unit, batch);
        lm_norm(n, dim, layer->mid, unit->w[LM_MOE_NORM], layer->moe_in, layer->moe_inverse);
        tokens.out = out;
        if (train->counts)
                tokens.counts = train->counts + layer->moe.layer * model->spec->shape.experts;
        r = lm_moe_forward(&model->tools, &layer->moe, &tokens);
        if (r < 0)
                return r;
        if (train->log)
                note_routes(model, &layer->moe, &tokens, train->log);
        lm_ffn_forward(&shared, model->spare);
        lm_add(n * dim, out, model->spare);
        lm_add(n * dim, out, layer->mid);
        return 0;
}

/* Without tokens: this rank's experts still serve the others of the group. */
static int layer_serve(struct lm_model *model, struct layer *layer)
{
        const struct lm_moe_tokens none = { .n_tokens = 0, .x = layer->moe_in,
                                            .out = model->spare };

        return lm_moe_forward(&model->tools, &layer->moe, &none);
}

static int layer_forward(struct lm_model *model, uint32_t l, const struct lm_train *train,
                         real *out)
{
        struct layer *layer = &model->layers[l];
        struct unit unit;
        int r, closed;

        if (train->batch->n_tokens == 0)
                return layer_serve(model, layer);
        r = unit_open(model, lm_unit_layer(l), &unit);
        if (r < 0)
                return r;
        r = layer_compute(model, layer, &unit, train, out);
        closed = unit_close(model, &unit);
        return r < 0 ? r : closed;
}

/* The rows of the embedding that the tokens name. */
static int embed_forward(struct lm_model *model, const struct lm_batch *batch, real *out)
{
        const size_t dim = model->spec->shape.dim;
        struct unit unit;
        int r;

        if (batch->n_tokens == 0)
                return 0;
        r = unit_open(model, lm_unit_embed(), &unit);
        if (r < 0)
                return r;
        for (size_t t = 0; t < batch->n_tokens; t++)
                memcpy(out + t * dim, unit.w[0] + batch->tokens[t] * dim, dim * sizeof(real));
        return unit_close(model, &unit);
}

/* A layer's output is the input of the next one, or model->x. */
static real *output_of(const struct lm_model *model, uint32_t l)
{
        return l + 1 < model->spec->shape.layers ? model->layers[l + 1].x : model->x;
}

static int forward(struct lm_model *model, const struct lm_train *train)
{
        int r = embed_forward(model, train->batch, model->layers[0].x);

        for (uint32_t l = 0; r == 0 && l < model->spec->shape.layers; l++)
                r = layer_forward(model, l, train, output_of(model, l));
        return r;
}

static void attention_backward(struct lm_model *model, struct layer *layer,
                               const struct unit *unit, const struct lm_batch *batch)
{
        const size_t n = batch->n_tokens, dim = model->spec->shape.dim;
        const struct lm_rows rows = rows_of(batch);
        const struct lm_attention_grads attention = { .qkv = layer->qkv, .prob = layer->prob,
                                                      .dout = model->spare, .dqkv = model->dwide };
        const struct lm_dims out = { n, dim, dim }, wide = { n, dim, 3 * dim };
        const struct lm_norm_grads norm = {
                .x = layer->x, .gain = unit->w[LM_ATTN_NORM], .inverse = layer->attn_inverse,
                .dy = model->spare, .dx = model->dx, .dgain = unit->g[LM_ATTN_NORM],
        };

        lm_linear_dw(out, model->dx, layer->attn, unit->g[LM_ATTN_OUT]);
        lm_linear_dx(out, model->dx, unit->w[LM_ATTN_OUT], model->spare, false);
        lm_attention_backward(&model->attention, &rows, &attention);
        lm_linear_dw(wide, model->dwide, layer->attn_in, unit->g[LM_QKV]);
        lm_linear_dx(wide, model->dwide, unit->w[LM_QKV], model->spare, false);
        lm_norm_backward(n, dim, &norm);
}

/* model->dx: from the gradient of the layer's output to that of its input. */
static int layer_uncompute(struct lm_model *model, struct layer *layer, const struct unit *unit,
                           const struct lm_batch *batch)
{
        const size_t n = batch->n_tokens, dim = model->spec->shape.dim;
        const struct lm_moe_tokens tokens = moe_tokens(model, layer, unit, n);
        const struct lm_moe_grads moe = { .tokens = &tokens, .dout = model->dx, .dx = model->dmid,
                                          .drouter = unit->g[LM_ROUTER] };
        const struct lm_ffn shared = shared_ffn(model, layer, unit, n);
        real *const dshared[] = { unit->g[LM_SHARED_GATE], unit->g[LM_SHARED_UP],
                                  unit->g[LM_SHARED_DOWN] };
        const struct lm_norm_grads norm = {
                .x = layer->mid, .gain = unit->w[LM_MOE_NORM], .inverse = layer->moe_inverse,
                .dy = model->dmid, .dx = model->dx, .dgain = unit->g[LM_MOE_NORM],
        };
        int r;

        lm_ffn_backward(&shared, model->dx, dshared, model->dmid, false);
        r = lm_moe_backward(&model->tools, &layer->moe, &moe);
        if (r < 0)
                return r;
        lm_norm_backward(n, dim, &norm);
        attention_backward(model, layer, unit, batch);
        return 0;
}

static int layer_unserve(struct lm_model *model, struct layer *layer)
{
        const struct lm_moe_tokens none = { .n_tokens = 0 };
        const struct lm_moe_grads moe = { .tokens = &none, .dout = model->dx };

        return lm_moe_backward(&model->tools, &layer->moe, &moe);
}

static int layer_backward(struct lm_model *model, uint32_t l, const struct lm_batch *batch)
{
        struct layer *layer = &model->layers[l];
        struct unit unit;
        int r, closed;

        if (batch->n_tokens == 0)
                return layer_unserve(model, layer);
        r = unit_open(model, lm_unit_layer(l), &unit);
        if (r < 0)
                return r;
        unit_grads(model, unit.id, &unit);
        r = layer_uncompute(model, layer, &unit, batch);
        closed = unit_close(model, &unit);
        if (r < 0 || closed < 0)
                return r < 0 ? r : closed;
        return unit_scatter(model, &unit);
}

static int embed_backward(struct lm_model *model, const struct lm_batch *batch)
{
        const size_t dim = model->spec->shape.dim;
        struct unit unit = { .id = lm_unit_embed() };

        unit_grads(model, unit.id, &unit);
        for (size_t t = 0; t < batch->n_tokens; t++)
                lm_add(dim, unit.g[0] + batch->tokens[t] * dim, model->dx + t * dim);
        return unit_scatter(model, &unit);
}

/* Logits and loss; with a scale also model->dx and the gradients in @unit. */
static double head_compute(struct lm_model *model, struct unit *unit,
                           const struct lm_batch *batch, double scale)
{
        const size_t n = batch->n_tokens, dim = model->spec->shape.dim;
        const struct lm_dims dims = { n, dim, LM_VOCAB };
        const struct lm_norm_grads norm = {
                .x = model->x, .gain = unit->w[LM_HEAD_NORM], .inverse = model->inverse,
                .dy = model->spare, .dx = model->dx, .dgain = unit->g[LM_HEAD_NORM],
        };
        double loss;

        lm_norm(n, dim, model->x, unit->w[LM_HEAD_NORM], model->normed, model->inverse);
        lm_linear(dims, model->normed, unit->w[LM_HEAD_WEIGHT], model->logits);
        if (scale == 0)
                return 0;
        loss = lm_cross_entropy(n, LM_VOCAB, model->logits, batch->targets, scale);
        lm_linear_dw(dims, model->logits, model->normed, unit->g[LM_HEAD_WEIGHT]);
        lm_linear_dx(dims, model->logits, unit->w[LM_HEAD_WEIGHT], model->spare, false);
        memset(model->dx, 0, n * dim * sizeof(*model->dx));
        lm_norm_backward(n, dim, &norm);
        return loss;
}

static int head_train(struct lm_model *model, const struct lm_train *train, double *ret_loss)
{
        struct unit unit;
        int r = unit_open(model, lm_unit_head(model->spec), &unit);

        if (r < 0)
                return r;
        unit_grads(model, unit.id, &unit);
        *ret_loss = head_compute(model, &unit, train->batch, train->loss_scale);
        r = unit_close(model, &unit);
        if (r < 0)
                return r;
        return unit_scatter(model, &unit);
}

static int model_train(struct lm_model *model, const struct lm_train *train, double *ret_loss)
{
        const bool tokens = train->batch->n_tokens > 0;
        double loss = 0;
        int r;

        assert(train->batch->n_tokens <= model->max_tokens);
        assert(train->loss_scale != 0);
        r = forward(model, train);
        if (r == 0 && tokens)
                r = head_train(model, train, &loss);
        for (uint32_t l = model->spec->shape.layers; r == 0 && l > 0; l--)
                r = layer_backward(model, l - 1, train->batch);
        if (r == 0 && tokens)
                r = embed_backward(model, train->batch);
        if (r == 0)
                *ret_loss = loss;
        return r;
}

static int model_evaluate(struct lm_model *model, const struct lm_batch *batch, double *ret_loss,
                          double *logits)
{
        const struct lm_train train = { .batch = batch };
        struct unit unit = { 0 };
        int r;

        assert(batch->n_tokens <= model->max_tokens);
        r = forward(model, &train);
        if (r < 0)
                return r;
        *ret_loss = 0;
        if (batch->n_tokens == 0)
                return 0;
        r = unit_open(model, lm_unit_head(model->spec), &unit);
        if (r < 0)
                return r;
        head_compute(model, &unit, batch, 0);
        for (size_t v = 0; logits && v < LM_VOCAB; v++)
                logits[v] = (double)model->logits[(batch->n_tokens - 1) * LM_VOCAB + v];
        if (batch->targets)
                *ret_loss = lm_cross_entropy(batch->n_tokens, LM_VOCAB, model->logits,
                                             batch->targets, 0);
        return unit_close(model, &unit);
}

/* A block of reals that is handed out in parts; without memory it only counts. */
struct arena {
        real *memory;
        size_t used;
};

static real *take(struct arena *arena, size_t n)
{
        real *part = arena->memory ? arena->memory + arena->used : NULL;

        arena->used += ae_align_up(n, 16);
        return part;
}

static size_t largest_unit(const struct lm_spec *spec)
{
        size_t n = 0;

        for (uint32_t i = 0; i < spec->n_units; i++)
                n = AE_MAX(n, (size_t)spec->units[i].n_elements);
        return n;
}

static void place_layer(struct lm_model *model, struct layer *layer, struct arena *arena)
{
        const struct lm_shape *s = &model->spec->shape;
        const size_t n = model->max_tokens, dim = s->dim, hidden = s->expert_dim;

        layer->x = take(arena, n * dim);
        layer->attn_in = take(arena, n * dim);
        layer->qkv = take(arena, 3 * n * dim);
        layer->prob = take(arena, n * s->seq * s->heads); /* sum of T * T is at most n * seq */
        layer->attn = take(arena, n * dim);
        layer->mid = take(arena, n * dim);
        layer->moe_in = take(arena, n * dim);
        layer->attn_inverse = take(arena, n);
        layer->moe_inverse = take(arena, n);
        layer->gate = take(arena, n * hidden);
        layer->up = take(arena, n * hidden);
        layer->hidden = take(arena, n * hidden);
}

static void place_arrays(struct lm_model *model, struct arena *arena)
{
        const size_t n = model->max_tokens, dim = model->spec->shape.dim;
        const size_t unit = largest_unit(model->spec);

        for (uint32_t l = 0; l < model->spec->shape.layers; l++)
                place_layer(model, &model->layers[l], arena);
        model->x = take(arena, n * dim);
        model->normed = take(arena, n * dim);
        model->inverse = take(arena, n);
        model->logits = take(arena, n * LM_VOCAB);
        model->dx = take(arena, n * dim);
        model->dmid = take(arena, n * dim);
        model->dwide = take(arena, 3 * n * dim);
        model->spare = take(arena, n * dim);
        model->weights = take(arena, unit);
        model->grads = take(arena, unit);
}

static struct lm_model *model_free(struct lm_model *model)
{
        if (!model)
                return NULL;
        for (uint32_t l = 0; model->layers && l < model->spec->shape.layers; l++)
                lm_moe_deinit(&model->layers[l].moe);
        lm_moe_tools_deinit(&model->tools);
        lm_attention_deinit(&model->attention);
        free(model->layers);
        free(model->memory);
        free(model);
        return NULL;
}

static int model_init(struct lm_model *model)
{
        const struct lm_shape *s = &model->spec->shape;
        struct arena arena = { 0 };
        int r;

        model->layers = calloc(s->layers, sizeof(*model->layers));
        if (!model->layers)
                return ae_fail_sys(ENOMEM, "cannot make room for %u layers", s->layers);
        place_arrays(model, &arena);
        model->memory = calloc(arena.used, sizeof(*model->memory));
        if (!model->memory)
                return ae_fail_sys(ENOMEM, "cannot make room for the activations of %zu tokens",
                                   model->max_tokens);
        arena = (struct arena){ .memory = model->memory };
        place_arrays(model, &arena);
        r = lm_attention_init(&model->attention, s->dim, s->heads, s->seq);
        if (r < 0)
                return r;
        r = lm_moe_tools_init(&model->tools, model->backend, model->max_tokens);
        for (uint32_t l = 0; r == 0 && l < s->layers; l++)
                r = lm_moe_init(&model->layers[l].moe, &model->tools, l, model->max_tokens);
        return r;
}

static int model_new(struct lm_backend *backend, size_t max_tokens, struct lm_model **ret_model)
{
        struct lm_model *model = calloc(1, sizeof(*model));
        int r;

        assert(backend->real == LM_REAL);
        if (!model)
                return ae_fail_sys(ENOMEM, "cannot make a model");
        model->backend = backend;
        model->spec = backend->spec;
        model->max_tokens = AE_MAX(max_tokens, (size_t)1);
        r = model_init(model);
        if (r < 0) {
                model_free(model);
                return r;
        }
        *ret_model = model;
        return 0;
}

const struct lm_model_ops LM_NAME(lm_model) = {
        .real = LM_REAL,
        .new = model_new,
        .free = model_free,
        .train = model_train,
        .evaluate = model_evaluate,
};
