/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model of the example trainer in double over a probe backend that keeps plain sums: gradients
 * against finite differences for every class of tensor, and the same gradients however ranks, EP
 * groups, micro-batches and token counts divide the work.
 */
#include "client/examples/moe-lm/model.h"
#include "client/examples/moe-lm/text.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/comm-local.h"
#include "tests/lib/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Keeps fp32 weights and adds up gradients in double. */
struct probe {
        struct lm_backend base;
        float *weights;   /* borrowed; an image */
        double *grads;    /* owned; an image, of what this process scattered and computed */
        int held;         /* views */
        int max_held;
        int gathers, scatters;
};

static int probe_turn(struct lm_backend *backend, uint32_t rank, bool last)
{
        (void)last;
        backend->rank = rank;
        return 0;
}

static int probe_gather(struct lm_backend *backend, uint32_t unit, struct lm_view *ret_view)
{
        struct probe *probe = (struct probe *)backend;
        const struct lm_unit *u = &backend->spec->units[unit];

        for (uint32_t i = 0; i < u->n; i++)
                ret_view->data[i] = probe->weights + backend->spec->tensors[u->first + i].first;
        probe->gathers++;
        probe->held++;
        probe->max_held = AE_MAX(probe->max_held, probe->held);
        return 0;
}

static int probe_release(struct lm_backend *backend, uint32_t unit)
{
        (void)unit;
        ((struct probe *)backend)->held--;
        return 0;
}

static int probe_scatter(struct lm_backend *backend, uint32_t unit, const void *const *grads)
{
        struct probe *probe = (struct probe *)backend;
        const struct lm_unit *u = &backend->spec->units[unit];

        for (uint32_t i = 0; i < u->n_trainable; i++) {
                const struct lm_tensor *tensor = &backend->spec->tensors[u->first + i];

                for (uint64_t j = 0; j < tensor->n; j++)
                        probe->grads[tensor->first + j] += ae_real_get(backend->real, grads[i], j);
        }
        probe->scatters++;
        return 0;
}

static void probe_expert(struct lm_backend *backend, uint32_t layer, uint32_t local,
                         struct lm_expert *ret_expert)
{
        const struct probe *probe = (struct probe *)backend;
        const struct lm_spec *spec = backend->spec;
        const uint32_t first = ae_group_expert_first(&backend->place, spec->shape.experts,
                                                     backend->ep->position) + local;

        for (uint32_t i = 0; i < LM_EXPERT_TENSORS; i++) {
                const uint64_t at = spec->tensors[lm_expert_tensor(spec, layer, first) + i].first;

                ret_expert->weight[i] = probe->weights + at;
                ret_expert->grad[i] = probe->grads + at;
        }
}

static int probe_turn_end(struct lm_backend *backend)
{
        (void)backend;
        return 0;
}

static const struct lm_backend_ops probe_ops = {
        .name = "probe", .turn = probe_turn, .gather = probe_gather, .release = probe_release,
        .scatter = probe_scatter, .expert = probe_expert, .turn_end = probe_turn_end,
};

/* Random weights; norms and balances too, so that nothing hides behind a 1 or 0. */
static float *random_weights(const struct lm_spec *spec)
{
        float *weights = calloc(spec->n_elements, sizeof(*weights));

        assert_non_null(weights);
        for (uint32_t id = 0; id < spec->n_tensors; id++) {
                const struct lm_tensor *tensor = &spec->tensors[id];

                if (tensor->home == id)
                        lm_spec_values(tensor, 3, weights + tensor->first);
                for (uint64_t i = 0; i < tensor->n && tensor->n_dims == 1; i++)
                        weights[tensor->first + i] += 0.25f * sinf((float)(i + id));
        }
        return weights;
}

static const struct lm_shape small_shape = {
        .layers = 2, .dim = 8, .heads = 2, .experts = 4, .top_k = 2, .expert_dim = 6, .seq = 6,
        .balance = true, .dtype = AE_DTYPE_F32,
};

static uint8_t text_bytes[4096];
static struct lm_text text;

static int make_text(void **state)
{
        (void)state;
        for (size_t i = 0; i < sizeof(text_bytes); i++)
                text_bytes[i] = (uint8_t)(i * i / 7 + i % 13);
        text = (struct lm_text){ .bytes = text_bytes, .n = sizeof(text_bytes), .n_train = 3800 };
        return 0;
}

/* A run of the model's gradients over ranks [first_rank, +n_ranks) of a deal. */
struct run {
        const struct lm_spec *spec;
        float *weights;
        struct lm_deal deal;
        struct ae_group_topology place;
        double loss_scale;
        uint64_t *counts;
        /* results */
        double *grads;
        double loss;
        int gathers, scatters, max_held, idle_gathers;
};

static int run_ranks(struct run *run, struct ae_comm *ep, uint32_t first_rank, uint32_t n_ranks)
{
        struct probe probe = {
                .base = { .ops = &probe_ops, .spec = run->spec, .real = AE_REAL_F64,
                          .world = run->deal.world, .place = run->place, .ep = ep,
                          .timeout_ns = 10 * AE_NS_PER_S },
                .weights = run->weights,
        };
        struct lm_model *model = NULL;
        struct lm_dealt dealt = { 0 };
        int r = lm_dealt_init(&dealt, &run->deal);

        probe.grads = calloc(run->spec->n_elements, sizeof(*probe.grads));
        if (r == 0)
                r = lm_model_f64.new(&probe.base, (size_t)run->deal.n_seqs * run->deal.seq,
                                     &model);
        for (uint32_t i = 0; r == 0 && i < n_ranks * run->deal.accumulate; i++) {
                const struct lm_turn turn = { .rank = first_rank + i % n_ranks,
                                              .micro = i / n_ranks };
                const struct lm_train train = { .batch = &dealt.batch, .counts = run->counts,
                                                .loss_scale = run->loss_scale };
                const int before = probe.gathers;
                double loss = 0;

                lm_deal_train(&run->deal, &turn, &dealt);
                r = lm_model_f64.train(model, &train, &loss);
                run->loss += loss;
                if (dealt.batch.n_tokens == 0)
                        run->idle_gathers += probe.gathers - before;
        }
        lm_model_f64.free(model);
        lm_dealt_deinit(&dealt);
        run->grads = probe.grads;
        run->gathers = probe.gathers;
        run->scatters = probe.scatters;
        run->max_held = probe.max_held;
        if (probe.held != 0)
                r = ae_fail(AE_EHELD, "%d views are still held", probe.held);
        return r;
}

struct alone {
        struct ae_comm *comm;
        struct comm_local *group;
};

static struct alone alone_make(void)
{
        const uint32_t rank = 0;
        struct alone alone = { .group = comm_local_new(&rank, 1) };

        assert_non_null(alone.group);
        assert_int_equal(comm_local_join(alone.group, 0, &alone.comm), 0);
        return alone;
}

static void alone_free(struct alone *alone)
{
        comm_local_leave(alone->comm);
        comm_local_free(alone->group);
}

/* All ranks of the deal in one process, all experts local. */
static void run_alone(struct run *run)
{
        struct alone alone = alone_make();
        int r;

        assert_int_equal(ae_group_init(1, 1, AE_ORDER_ED, &run->place), 0);
        r = run_ranks(run, alone.comm, 0, run->deal.world);
        if (r < 0)
                fail_msg("%s", ae_error_text());
        alone_free(&alone);
}

static double loss_at(const struct run *like)
{
        struct run run = *like;

        run.loss = 0;
        run.counts = NULL;
        run_alone(&run);
        free(run.grads);
        return run.loss;
}

/* Of elements spread over the tensor; the perturbation is what fp32 made of it. */
static void check_tensor(struct run *run, const struct lm_tensor *tensor)
{
        const uint64_t stride = AE_MAX(tensor->n / 4, (uint64_t)1);

        for (uint64_t i = tensor->n / 7; i < tensor->n; i += stride) {
                float *w = &run->weights[tensor->first + i];
                const float held = *w, above = held + 0x1p-14f, below = held - 0x1p-14f;
                double up, down, difference, gradient = run->grads[tensor->first + i];

                *w = above;
                up = loss_at(run);
                *w = below;
                down = loss_at(run);
                *w = held;
                difference = (up - down) / ((double)above - (double)below);
                if (fabs(difference - gradient) > 2e-5 * (fabs(gradient) + 0.02))
                        fail_msg("%s[%llu]: gradient %.9g, finite difference %.9g", tensor->name,
                                 (unsigned long long)i, gradient, difference);
        }
}

static void check_gradients(const struct lm_shape *shape)
{
        struct lm_spec spec;
        struct run run = { .spec = &spec, .loss_scale = 1,
                           .deal = { .text = &text, .seed = 5, .world = 1, .accumulate = 1,
                                     .n_seqs = 3, .seq = shape->seq } };
        size_t checked = 0;

        assert_int_equal(lm_spec_init(&spec, shape), 0);
        run.weights = random_weights(&spec);
        run_alone(&run);
        assert_true(isfinite(run.loss) && run.loss > 0);
        for (uint32_t id = 0; id < spec.n_tensors; id++) {
                const struct lm_tensor *tensor = &spec.tensors[id];

                if (tensor->class == LM_BUFFER || tensor->home != id)
                        continue;
                check_tensor(&run, tensor);
                checked++;
        }
        assert_int_equal(checked, 2 + 8 * shape->layers + 3 * shape->layers * shape->experts);
        assert_int_equal(run.max_held, 1);
        free(run.grads);
        free(run.weights);
        lm_spec_deinit(&spec);
}

static void gradients_equal_finite_differences(void **state)
{
        (void)state;
        check_gradients(&small_shape);
}

static void gradients_with_sigmoid_router(void **state)
{
        struct lm_shape shape = small_shape;

        (void)state;
        shape.sigmoid = true;
        shape.balance = false;
        check_gradients(&shape);
}

static double distance(const double *a, const double *b, size_t n)
{
        double difference = 0, size = 0;

        for (size_t i = 0; i < n; i++) {
                difference += (a[i] - b[i]) * (a[i] - b[i]);
                size += b[i] * b[i];
        }
        return sqrt(difference / size);
}

/* How a fixed set of 8 sequences is divided. */
struct division {
        uint32_t world, accumulate, n_seqs;
};

static void division_of_the_work_changes_nothing(void **state)
{
        static const struct division divisions[] = { { 1, 1, 8 }, { 1, 4, 2 }, { 2, 2, 2 },
                                                     { 4, 1, 2 }, { 8, 1, 1 } };
        struct lm_spec spec;
        struct run first = { 0 };

        (void)state;
        assert_int_equal(lm_spec_init(&spec, &small_shape), 0);
        for (size_t i = 0; i < AE_ARRAY_LEN(divisions); i++) {
                const struct division *d = &divisions[i];
                struct run run = { .spec = &spec, .loss_scale = 1, .weights = random_weights(&spec),
                                   .deal = { .text = &text, .seed = 5, .world = d->world,
                                             .accumulate = d->accumulate, .n_seqs = d->n_seqs,
                                             .seq = small_shape.seq } };

                run_alone(&run);
                free(run.weights);
                if (i == 0) {
                        first = run;
                        continue;
                }
                assert_true(distance(run.grads, first.grads, spec.n_elements) < 1e-12);
                assert_true(fabs(run.loss - first.loss) < 1e-12 * first.loss);
                free(run.grads);
        }
        free(first.grads);
        lm_spec_deinit(&spec);
}

struct crowd {
        const struct run *like;
        struct run runs[4]; /* by rank */
        uint64_t counts[4][2 * 4];
};

static int crowd_body(const struct local_rank *self)
{
        struct crowd *crowd = self->arg;
        struct run *run = &crowd->runs[self->rank];

        *run = *crowd->like;
        run->place = *self->topology;
        run->counts = crowd->counts[self->rank];
        return run_ranks(run, self->ep, self->rank, 1);
}

/* Ranks in threads that exchange tokens, against one process that plays them. */
static void check_crowd(uint32_t ep_size, uint32_t order, bool uneven)
{
        struct ae_group_topology topology;
        struct lm_spec spec;
        struct crowd crowd = { 0 };
        uint64_t counts[2 * 4] = { 0 }, crowd_counts[2 * 4] = { 0 };
        struct run run = { .spec = &spec, .loss_scale = 1,
                           .deal = { .text = &text, .seed = 5, .world = 4, .accumulate = 2,
                                     .n_seqs = 3, .seq = small_shape.seq, .uneven = uneven } };

        assert_int_equal(lm_spec_init(&spec, &small_shape), 0);
        run.weights = random_weights(&spec);
        crowd.like = &run;
        assert_int_equal(ae_group_init(4, ep_size, order, &topology), 0);
        if (local_world_run(&topology, crowd_body, &crowd) < 0)
                fail_msg("%s", ae_error_text());
        run.counts = counts;
        run_alone(&run);
        for (uint32_t rank = 1; rank < 4; rank++) {
                for (size_t i = 0; i < spec.n_elements; i++)
                        crowd.runs[0].grads[i] += crowd.runs[rank].grads[i];
        }
        assert_true(distance(crowd.runs[0].grads, run.grads, spec.n_elements) < 1e-12);
        for (uint32_t rank = 0; rank < 4; rank++) {
                for (size_t i = 0; i < AE_ARRAY_LEN(counts); i++)
                        crowd_counts[i] += crowd.counts[rank][i];
                free(crowd.runs[rank].grads);
        }
        assert_memory_equal(crowd_counts, counts, sizeof(counts));
        free(run.grads);
        free(run.weights);
        lm_spec_deinit(&spec);
}

static void exchanged_tokens_give_the_same_gradients(void **state)
{
        (void)state;
        for (uint32_t ep_size = 1; ep_size <= 4; ep_size *= 2) {
                check_crowd(ep_size, AE_ORDER_ED, false);
                check_crowd(ep_size, AE_ORDER_DE, true);
        }
}

/* Property 1 of the design: dense weights are gathered by who needs them, and nobody else. */
static void rank_without_tokens_gathers_nothing(void **state)
{
        struct lm_spec spec;
        struct run run = { .spec = &spec, .loss_scale = 1,
                           .deal = { .text = &text, .seed = 5, .world = 4, .accumulate = 1,
                                     .n_seqs = 3, .seq = small_shape.seq, .uneven = true } };

        (void)state;
        assert_int_equal(lm_spec_init(&spec, &small_shape), 0);
        run.weights = random_weights(&spec);
        run_alone(&run);
        assert_int_equal(run.idle_gathers, 0);
        assert_int_equal(run.scatters, 3 * 4);      /* three ranks: embed, two layers, head */
        assert_int_equal(run.gathers, 3 * (2 + 4)); /* layers twice */
        free(run.grads);
        free(run.weights);
        lm_spec_deinit(&spec);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(gradients_equal_finite_differences),
                cmocka_unit_test(gradients_with_sigmoid_router),
                cmocka_unit_test(division_of_the_work_changes_nothing),
                cmocka_unit_test(exchanged_tokens_give_the_same_gradients),
                cmocka_unit_test(rank_without_tokens_gathers_nothing),
        };

        return cmocka_run_group_tests_name("moe-lm-model", tests, make_text, NULL);
}
