/* SPDX-License-Identifier: Apache-2.0 */
/* Routing, dispatch, experts, combine. Compiled once per number type; the training thread. */
#include "client/examples/moe-lm/moe.h"

#include "client/examples/moe-lm/blocks.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int no_memory(void)
{
        return ae_fail_sys(ENOMEM, "cannot make room for the experts' activations");
}

static const struct lm_shape *shape_of(const struct lm_moe_tools *tools)
{
        return &tools->backend->spec->shape;
}

int lm_moe_tools_init(struct lm_moe_tools *tools, struct lm_backend *backend, size_t max_tokens)
{
        const struct lm_shape *s = &backend->spec->shape;
        const struct ae_route_config config = {
                .n_experts = s->experts, .top_k = s->top_k, .normalise = true, .scale = 1,
                .score = s->sigmoid ? AE_ROUTE_SIGMOID : AE_ROUTE_SOFTMAX,
        };
        const size_t expert = LM_EXPERT_TENSORS * (size_t)s->dim * s->expert_dim;
        int r;

        *tools = (struct lm_moe_tools){ .backend = backend, .dispatch = AE_DISPATCH_INIT };
        r = ae_route_init(&tools->route, &config);
        if (r < 0)
                return r;
        tools->expert_room = malloc(expert * sizeof(real));
        tools->dlogits = malloc(max_tokens * s->experts * sizeof(real));
        tools->dweight = malloc(max_tokens * s->top_k * sizeof(real));
        tools->dtokens = malloc(max_tokens * s->dim * sizeof(real));
        if (!tools->expert_room || !tools->dlogits || !tools->dweight || !tools->dtokens)
                return no_memory();
        return 0;
}

void lm_moe_tools_deinit(struct lm_moe_tools *tools)
{
        ae_route_deinit(&tools->route);
        ae_dispatch_deinit(&tools->dispatch);
        ae_buffer_deinit(&tools->drows_out);
        ae_buffer_deinit(&tools->drows_in);
        free(tools->expert_room);
        free(tools->dlogits);
        free(tools->dweight);
        free(tools->dtokens);
}

int lm_moe_init(struct lm_moe *moe, const struct lm_moe_tools *tools, uint32_t layer,
                size_t max_tokens)
{
        const struct lm_shape *s = shape_of(tools);

        *moe = (struct lm_moe){ .layer = layer };
        moe->logits = malloc(max_tokens * s->experts * sizeof(real));
        moe->weight = malloc(max_tokens * s->top_k * sizeof(real));
        moe->idx = malloc(max_tokens * s->top_k * sizeof(*moe->idx));
        if (!moe->logits || !moe->weight || !moe->idx)
                return no_memory();
        return ae_plan_init(&moe->plan, &tools->backend->place, s->experts, s->top_k);
}

void lm_moe_deinit(struct lm_moe *moe)
{
        ae_plan_deinit(&moe->plan);
        ae_buffer_deinit(&moe->kept);
        ae_buffer_deinit(&moe->rows);
        ae_buffer_deinit(&moe->outs);
        ae_buffer_deinit(&moe->gate);
        ae_buffer_deinit(&moe->up);
        ae_buffer_deinit(&moe->mid);
        free(moe->logits);
        free(moe->weight);
        free(moe->idx);
}

static struct ae_route_batch route_batch(const struct lm_moe *moe,
                                         const struct lm_moe_tokens *tokens)
{
        return (struct ae_route_batch){
                .real = LM_REAL, .n_tokens = tokens->n_tokens, .logits = moe->logits,
                .bias = tokens->bias, .idx = moe->idx, .weight = moe->weight,
        };
}

static struct ae_dispatch_call call_of(const struct lm_moe_tools *tools, const struct lm_moe *moe)
{
        return (struct ae_dispatch_call){
                .ep = tools->backend->ep, .plan = &moe->plan, .real = LM_REAL,
                .width = shape_of(tools)->dim, .deadline_ns = lm_deadline(tools->backend),
        };
}

/* At least one row, so that there is an address to count from. */
static int reserve(struct ae_buffer *buffer, size_t rows, size_t width)
{
        return ae_buffer_reserve(buffer, AE_MAX(rows, (size_t)1) * width * sizeof(real));
}

/* Room for the rows that the plan brings here, and for those that come back. */
static int make_room(const struct lm_moe_tools *tools, struct lm_moe *moe)
{
        const struct lm_shape *s = shape_of(tools);
        const size_t rows = moe->plan.n_rows;
        int r = reserve(&moe->kept, moe->plan.n_sent, s->dim);

        if (r == 0)
                r = reserve(&moe->rows, rows, s->dim);
        if (r == 0)
                r = reserve(&moe->outs, rows, s->dim);
        if (r == 0)
                r = reserve(&moe->gate, rows, s->expert_dim);
        if (r == 0)
                r = reserve(&moe->up, rows, s->expert_dim);
        if (r == 0)
                r = reserve(&moe->mid, rows, s->expert_dim);
        return r;
}

/* The rows and weights of a local expert, ready to compute with. */
static struct lm_ffn expert_ffn(struct lm_moe_tools *tools, struct lm_moe *moe, uint32_t local,
                                struct lm_expert *ret_expert)
{
        const struct lm_shape *s = shape_of(tools);
        const size_t first = moe->plan.expert_first[local];
        const size_t n = (size_t)s->dim * s->expert_dim;
        struct lm_ffn ffn = {
                .rows = moe->plan.expert_first[local + 1] - first,
                .dim = s->dim, .hidden = s->expert_dim,
                .x = (const real *)moe->rows.data + first * s->dim,
                .gate = (real *)moe->gate.data + first * s->expert_dim,
                .up = (real *)moe->up.data + first * s->expert_dim,
                .mid = (real *)moe->mid.data + first * s->expert_dim,
        };

        if (ffn.rows == 0)
                return ffn;
        tools->backend->ops->expert(tools->backend, moe->layer, local, ret_expert);
        for (size_t i = 0; i < LM_EXPERT_TENSORS; i++)
                ffn.w[i] = lm_widen(ret_expert->weight[i], s->dtype, n, tools->expert_room + i * n);
        return ffn;
}

static void experts_forward(struct lm_moe_tools *tools, struct lm_moe *moe)
{
        for (uint32_t e = 0; e < moe->plan.n_local; e++) {
                struct lm_expert expert;
                const struct lm_ffn ffn = expert_ffn(tools, moe, e, &expert);
                real *outs = (real *)moe->outs.data + moe->plan.expert_first[e] * ffn.dim;

                if (ffn.rows > 0)
                        lm_ffn_forward(&ffn, outs);
        }
}

static void experts_backward(struct lm_moe_tools *tools, struct lm_moe *moe)
{
        for (uint32_t e = 0; e < moe->plan.n_local; e++) {
                struct lm_expert expert;
                const struct lm_ffn ffn = expert_ffn(tools, moe, e, &expert);
                const size_t first = moe->plan.expert_first[e] * ffn.dim;
                real *dw[LM_EXPERT_TENSORS];

                if (ffn.rows == 0)
                        continue;
                for (size_t i = 0; i < LM_EXPERT_TENSORS; i++)
                        dw[i] = expert.grad[i];
                lm_ffn_backward(&ffn, (const real *)tools->drows_out.data + first, dw,
                                (real *)tools->drows_in.data + first, false);
        }
}

/* Runs one of the exchanges and notes its time. */
#define TIMED(tools, call)                                                                        \
        ({                                                                                        \
                const uint64_t timed_start_ = ae_now_ns();                                        \
                int timed_r_ = (call);                                                            \
                (tools)->backend->times.dispatch_ns += ae_now_ns() - timed_start_;                \
                timed_r_;                                                                         \
        })

static int choose_experts(struct lm_moe_tools *tools, struct lm_moe *moe,
                          const struct lm_moe_tokens *tokens)
{
        const struct lm_shape *s = shape_of(tools);
        const struct ae_route_batch batch = route_batch(moe, tokens);
        int r;

        lm_linear((struct lm_dims){ tokens->n_tokens, s->dim, s->experts }, tokens->x,
                  tokens->router, moe->logits);
        r = ae_route_forward(&tools->route, &batch);
        /* A NaN ends the round in the finite check; the others wait in the exchange now. */
        if (r < 0 && r != AE_ENONFINITE)
                return r;
        if (tokens->counts)
                ae_route_count(moe->idx, tokens->n_tokens * s->top_k, tokens->counts, s->experts);
        return 0;
}

int lm_moe_forward(struct lm_moe_tools *tools, struct lm_moe *moe,
                   const struct lm_moe_tokens *tokens)
{
        struct ae_dispatch_call call;
        struct ae_combine combine;
        int r = choose_experts(tools, moe, tokens);

        if (r < 0)
                return r;
        r = TIMED(tools, ae_plan_build(&moe->plan, tools->backend->ep, moe->idx, tokens->n_tokens,
                                       lm_deadline(tools->backend)));
        if (r < 0)
                return r;
        r = make_room(tools, moe);
        if (r < 0)
                return r;
        call = call_of(tools, moe);
        r = TIMED(tools, ae_dispatch_forward(&tools->dispatch, &call, tokens->x, moe->rows.data));
        if (r < 0)
                return r;
        experts_forward(tools, moe);
        combine = (struct ae_combine){ .rows = moe->outs.data, .weight = moe->weight,
                                       .kept = moe->kept.data, .out = tokens->out };
        call = call_of(tools, moe);
        return TIMED(tools, ae_combine_forward(&tools->dispatch, &call, &combine));
}

static void router_backward(struct lm_moe_tools *tools, struct lm_moe *moe,
                            const struct lm_moe_grads *grads)
{
        const struct lm_shape *s = shape_of(tools);
        const struct lm_moe_tokens *tokens = grads->tokens;
        const struct lm_dims dims = { tokens->n_tokens, s->dim, s->experts };
        const struct ae_route_batch batch = route_batch(moe, tokens);
        const struct ae_route_grads route = { .dweight = tools->dweight,
                                              .dlogits = tools->dlogits };

        if (tokens->n_tokens == 0)
                return;
        lm_add(tokens->n_tokens * s->dim, grads->dx, tools->dtokens);
        ae_route_backward(&tools->route, &batch, &route);
        lm_linear_dx(dims, tools->dlogits, tokens->router, grads->dx, true);
        lm_linear_dw(dims, tools->dlogits, tokens->x, grads->drouter);
}

int lm_moe_backward(struct lm_moe_tools *tools, struct lm_moe *moe,
                    const struct lm_moe_grads *grads)
{
        const size_t rows = moe->plan.n_rows, dim = shape_of(tools)->dim;
        struct ae_dispatch_call call = call_of(tools, moe);
        struct ae_combine_grads combine;
        int r;

        assert(moe->plan.n_tokens == grads->tokens->n_tokens);
        r = reserve(&tools->drows_out, rows, dim);
        if (r == 0)
                r = reserve(&tools->drows_in, rows, dim);
        if (r < 0)
                return r;
        combine = (struct ae_combine_grads){
                .dout = grads->dout, .weight = moe->weight, .kept = moe->kept.data,
                .drows = tools->drows_out.data, .dweight = tools->dweight,
        };
        r = TIMED(tools, ae_combine_backward(&tools->dispatch, &call, &combine));
        if (r < 0)
                return r;
        experts_backward(tools, moe);
        call = call_of(tools, moe);
        r = TIMED(tools, ae_dispatch_backward(&tools->dispatch, &call, tools->drows_in.data,
                                              tools->dtokens));
        if (r < 0)
                return r;
        router_backward(tools, moe, grads);
        return 0;
}
