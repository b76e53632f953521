/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model, its gradients and the reference; see exact.h. Sums are integers and optimizer steps
 * are written out here once more; of the product only ae_adamw_scalars() is used, for the powers of
 * the betas have no other exact definition.
 */
#include "tests/lib/exact.h"

#include "kernels/ops.h"
#include "proto/base/num.h"
#include "tests/lib/normref.h"
#include "tests/lib/test.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct row {
        const char *name;
        uint32_t unit, dtype, class, group;
        bool frozen;
        uint32_t n_dims;
        uint64_t dims[3];
        uint32_t home;
};

#define OWN UINT32_MAX
#define DENSE AUTOEP_DENSE

static const struct row rows[EXACT_N_DENSE] = {
        [EXACT_EMBED] = { "embed.w", EXACT_UNIT_EMBED, AUTOEP_BF16, DENSE, 0, false, 2,
                          { 257, 3 }, OWN },
        [EXACT_W] = { "layer.w", EXACT_UNIT_LAYER, AUTOEP_BF16, DENSE, 0, false, 3,
                      { 7, 11, 13 }, OWN },
        [EXACT_NORM] = { "layer.norm", EXACT_UNIT_LAYER, AUTOEP_F32, DENSE, 1, false, 1, { 5 },
                         OWN },
        [EXACT_SCALAR] = { "layer.scalar", EXACT_UNIT_LAYER, AUTOEP_F32, DENSE, 1, false, 0, { 0 },
                           OWN },
        [EXACT_FROZEN] = { "layer.frozen", EXACT_UNIT_LAYER, AUTOEP_BF16, DENSE, 0, true, 1,
                           { 77 }, OWN },
        [EXACT_BIAS] = { "layer.bias", EXACT_UNIT_LAYER, AUTOEP_F32, AUTOEP_BUFFER, 0, false, 1,
                         { 0 }, OWN },
        [EXACT_SKIPPED] = { "optional.w", EXACT_UNIT_OPTIONAL, AUTOEP_F32, DENSE, 0, false, 1,
                            { 259 }, OWN },
        [EXACT_BIG] = { "big.w", EXACT_UNIT_BIG, AUTOEP_BF16, DENSE, 0, false, 1, { 270001 }, OWN },
        [EXACT_BIG32] = { "big.w32", EXACT_UNIT_BIG, AUTOEP_F32, DENSE, 1, false, 1, { 66003 },
                          OWN },
        [EXACT_HEAD_NORM] = { "head.norm", EXACT_UNIT_HEAD, AUTOEP_BF16, DENSE, 1, false, 1, { 3 },
                              OWN },
        [EXACT_HEAD] = { "head.w", EXACT_UNIT_HEAD, AUTOEP_BF16, DENSE, 0, false, 2, { 257, 3 },
                         EXACT_EMBED },
        [EXACT_TIED] = { "tied.w", EXACT_UNIT_TIED, AUTOEP_BF16, DENSE, 0, false, 2, { 257, 3 },
                         EXACT_EMBED },
};

/* ---- the model -------------------------------------------------------------------------- */

uint32_t exact_expert_tensor(uint32_t expert)
{
        return EXACT_N_DENSE + expert * EXACT_LAYER_TENSORS;
}

bool exact_is_alias(const struct exact_model *model, uint32_t tensor)
{
        return model->tensors[tensor].home != tensor;
}

bool exact_is_trainable(const struct exact_model *model, uint32_t tensor)
{
        return !model->tensors[tensor].frozen && model->tensors[tensor].class != AUTOEP_BUFFER;
}

static void fill_dense(struct exact_model *model, uint32_t id, uint32_t n_experts)
{
        const struct row *row = &rows[id];
        struct exact_tensor *t = &model->tensors[id];

        (void)snprintf(t->name, sizeof(t->name), "%s", row->name);
        t->unit = row->unit;
        t->dtype = row->dtype;
        t->class = row->class;
        t->group = row->group;
        t->frozen = row->frozen;
        t->home = row->home == OWN ? id : row->home;
        t->n_dims = row->n_dims;
        memcpy(t->dims, row->dims, sizeof(t->dims));
        if (id == EXACT_BIAS)
                t->dims[0] = n_experts;
        t->n = 1;
        for (uint32_t d = 0; d < t->n_dims; d++)
                t->n *= t->dims[d];
}

static void fill_expert(struct exact_model *model, uint32_t expert, uint32_t slot)
{
        const uint32_t id = exact_expert_tensor(expert) + slot;
        struct exact_tensor *t = &model->tensors[id];

        (void)snprintf(t->name, sizeof(t->name), "layer.expert%u.%s", expert, slot ? "b" : "w");
        t->unit = EXACT_UNIT_LAYER;
        t->dtype = slot ? AUTOEP_F32 : AUTOEP_BF16;
        t->class = AUTOEP_EXPERT;
        t->group = slot;
        t->home = id;
        t->n_dims = 1;
        t->dims[0] = t->n = slot ? 10 : 33;
}

static void fill_model(struct exact_model *model, uint32_t n_experts)
{
        model->n_tensors = exact_expert_tensor(n_experts);
        model->tensors = calloc(model->n_tensors, sizeof(*model->tensors));
        assert(model->tensors);
        for (uint32_t id = 0; id < EXACT_N_DENSE; id++)
                fill_dense(model, id, n_experts);
        for (uint32_t e = 0; e < n_experts; e++) {
                fill_expert(model, e, 0);
                fill_expert(model, e, 1);
        }
}

/* ---- gradients -------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x)
{
        x ^= x >> 32;
        x *= UINT64_C(0x9e3779b97f4a7c15);
        x ^= x >> 29;
        x *= UINT64_C(0xbf58476d1ce4e5b9);
        return x ^ x >> 32;
}

static uint64_t seed_of(const struct exact_job *job, const struct exact_at *at)
{
        return mix(mix(mix(mix(mix(job->seed) + at->step) + at->micro) + at->rank) + at->tensor);
}

bool exact_scatters(const struct exact_job *job, uint32_t step, uint32_t micro, uint32_t rank,
                    uint32_t unit)
{
        const struct exact_at at = { step, micro, rank, 1000 + unit };

        if (unit == EXACT_UNIT_OPTIONAL && step == 1)
                return false;
        /* Rank 0 leaves nothing out, so that every other unit is scattered by somebody. */
        return (rank == 0 && micro == 0) || seed_of(job, &at) % 4 != 0;
}

/* An expert has tokens of two ranks in three. */
static bool has_gradient(const struct exact_job *job, const struct exact_at *at)
{
        struct exact_at expert = *at;

        if (at->tensor < EXACT_N_DENSE)
                return exact_scatters(job, at->step, at->micro, at->rank, rows[at->tensor].unit);
        expert.tensor = 2000 + (at->tensor - EXACT_N_DENSE) / EXACT_LAYER_TENSORS;
        return seed_of(job, &expert) % 3 != 0;
}

bool exact_is_wide(const struct exact_at *at)
{
        return (at->rank + at->micro + at->tensor) % 2;
}

float exact_unit(uint64_t i)
{
        return (float)(1 << i * 7 % 13) * 0x1p-9f;
}

void exact_gradient_add(const struct exact_job *job, const struct exact_at *at, int32_t *sum,
                        uint64_t n)
{
        const int bits = exact_is_wide(at) ? 17 : 4;
        uint64_t x = seed_of(job, at);

        if (!has_gradient(job, at))
                return;
        for (uint64_t i = 0; i < n; i++) {
                x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
                sum[i] += (int32_t)(x >> (64 - bits)) - (1 << (bits - 1));
        }
}

uint64_t exact_count(const struct exact_job *job, uint32_t step, uint32_t rank, uint32_t expert)
{
        const struct exact_at at = { step, 0, rank, 3000 + expert };

        return seed_of(job, &at) % 16;
}

void exact_hyper(const struct exact_job *job, uint32_t step, struct autoep_hyper ret_hyper[2])
{
        const bool sgd = job->optimizer == AUTOEP_SGD;

        for (uint32_t g = 0; g < 2; g++)
                ret_hyper[g] = (struct autoep_hyper){
                        .lr = sgd ? 1 : 1e-2 / (double)(step + 1 + g),
                        .beta1 = sgd ? job->momentum : 0.9 - 0.1 * g, .beta2 = 0.95, .eps = 1e-8,
                        .weight_decay = g || sgd ? 0 : 0.1,
                };
}

/* ---- the optimizers, once more ----------------------------------------------------------- */

static uint16_t to_bf16(float x)
{
        uint32_t bits;

        memcpy(&bits, &x, sizeof(bits));
        return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest even */
}

static float from_bf16(uint16_t x)
{
        const uint32_t bits = (uint32_t)x << 16;
        float value;

        memcpy(&value, &bits, sizeof(value));
        return value;
}

static void write_weight(const struct exact_tensor *t, struct exact_state *s)
{
        for (uint64_t i = 0; i < t->n; i++) {
                if (t->dtype == AUTOEP_BF16)
                        ((uint16_t *)s->weight)[i] = to_bf16(s->master[i]);
                else
                        ((float *)s->weight)[i] = s->master[i];
        }
}

static void step_adamw(const struct exact_tensor *t, struct exact_state *s,
                       const struct autoep_hyper *h, double grad_scale)
{
        const struct ae_hyper hyper = { .lr = h->lr, .beta1 = h->beta1, .beta2 = h->beta2,
                                        .eps = h->eps, .weight_decay = h->weight_decay };
        struct ae_adamw k;

        ae_adamw_scalars(&hyper, s->steps, grad_scale, &k);
        for (uint64_t i = 0; i < t->n; i++) {
                const float g = s->gradient[i] * k.grad_scale;
                const float g_part = k.one_minus_beta1 * g;
                const float g2_part = (k.one_minus_beta2 * g) * g;
                float denominator;

                s->master[i] *= k.decay;
                s->m[i] = k.beta1 * s->m[i] + g_part;
                s->v[i] = k.beta2 * s->v[i] + g2_part;
                denominator = sqrtf(s->v[i]) / k.bc2_sqrt + k.eps;
                s->master[i] -= (k.step_size * s->m[i]) / denominator;
        }
}

static void step_sgd(const struct exact_tensor *t, struct exact_state *s,
                     const struct autoep_hyper *h, double grad_scale)
{
        const float scale = (float)grad_scale, lr = (float)h->lr, momentum = (float)h->beta1;

        for (uint64_t i = 0; i < t->n; i++) {
                float g = s->gradient[i] * scale;

                if (momentum != 0)
                        g = s->m[i] = momentum * s->m[i] + g;
                s->master[i] -= lr * g;
        }
}

/* ---- the reference ---------------------------------------------------------------------- */

static struct exact_state *state_at(const struct exact_reference *ref, uint32_t step,
                                    uint32_t tensor)
{
        return &ref->states[(size_t)step * ref->model.n_tensors + tensor];
}

const struct exact_state *exact_state(const struct exact_reference *ref, uint32_t step,
                                      uint32_t tensor)
{
        return state_at(ref, step, ref->model.tensors[tensor].home);
}

static float *floats(uint64_t n)
{
        float *data = calloc(n, sizeof(*data));

        assert(data);
        return data;
}

static void make_state(const struct exact_tensor *t, struct exact_state *s)
{
        s->master = floats(t->n);
        s->m = floats(t->n);
        s->v = floats(t->n);
        s->gradient = floats(t->n);
        s->weight = floats(t->n);
}

/* Masters that bf16 can't hold, for a weight must be rounded; experts begin with what it can. */
static void fill_initial(const struct exact_reference *ref, uint32_t id)
{
        const struct exact_tensor *t = &ref->model.tensors[id];
        struct exact_state *s = state_at(ref, 0, id);
        uint64_t x = mix(ref->job.seed + 77 * id);

        for (uint64_t i = 0; i < t->n; i++) {
                x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
                s->master[i] = (float)((int32_t)(x >> 44) - (1 << 19)) * 0x1p-20f;
                if (t->dtype == AUTOEP_BF16 && (t->frozen || t->class == AUTOEP_EXPERT))
                        s->master[i] = from_bf16(to_bf16(s->master[i]));
        }
        write_weight(t, s);
}

/* Adds what ranks [from, to) have of a tensor in one step, with its aliases. */
static void add_ranks(const struct exact_reference *ref, uint32_t step, uint32_t id, uint32_t from,
                      uint32_t to, int32_t *sum)
{
        for (uint32_t use = id; use < ref->model.n_tensors; use++) {
                if (ref->model.tensors[use].home != id)
                        continue;
                for (uint32_t micro = 0; micro < ref->job.accumulate; micro++) {
                        for (uint32_t rank = from; rank < to; rank++) {
                                const struct exact_at at = { step, micro, rank, use };

                                exact_gradient_add(&ref->job, &at, sum,
                                                   ref->model.tensors[id].n);
                        }
                }
        }
}

/* To the nearest whole number that bf16 holds. The unit is a power of two and changes nothing. */
static int32_t round_to_bf16(struct exact_reference *ref, int32_t sum)
{
        const int32_t rounded = (int32_t)from_bf16(to_bf16((float)sum));
        const int32_t away = sum - rounded;
        const int32_t mirrored = (int32_t)from_bf16(to_bf16((float)(sum + away)));

        assert(abs(sum) < 1 << 24);
        ref->n_rounded += away != 0;
        ref->n_halfway += away != 0 && mirrored == sum + away;
        return rounded;
}

/* All gradients of a tensor in one step, by sum groups when their sums are rounded. */
static void reduce(struct exact_reference *ref, uint32_t step, uint32_t id)
{
        const struct exact_tensor *t = &ref->model.tensors[id];
        const uint32_t world = ref->job.world;
        const bool rounds = ref->job.bf16_group && ref->job.bf16_group < world &&
                            t->class != AUTOEP_EXPERT;
        const uint32_t n_ranks = rounds ? ref->job.bf16_group : world;
        struct exact_state *s = state_at(ref, step + 1, id);
        int32_t *total = calloc(t->n, sizeof(*total));
        int32_t *sum = calloc(t->n, sizeof(*sum));

        assert(total && sum);
        for (uint32_t from = 0; from < world; from += n_ranks) {
                memset(sum, 0, t->n * sizeof(*sum));
                add_ranks(ref, step, id, from, from + n_ranks, sum);
                for (uint64_t i = 0; i < t->n; i++)
                        total[i] += rounds ? round_to_bf16(ref, sum[i]) : sum[i];
        }
        for (uint64_t i = 0; i < t->n; i++) {
                assert(abs(total[i]) < 1 << 24); /* what fp32 holds */
                s->gradient[i] = (float)total[i] * exact_unit(i);
        }
        free(sum);
        free(total);
}

static void copy_state(const struct exact_reference *ref, uint32_t step, uint32_t id)
{
        const struct exact_state *from = state_at(ref, step, id);
        struct exact_state *to = state_at(ref, step + 1, id);
        const size_t len = ref->model.tensors[id].n * sizeof(float);

        memcpy(to->master, from->master, len);
        memcpy(to->m, from->m, len);
        memcpy(to->v, from->v, len);
        memcpy(to->weight, from->weight, len);
        to->steps = from->steps;
}

static void balance(const struct exact_reference *ref, uint32_t step)
{
        struct exact_state *s = state_at(ref, step + 1, EXACT_BIAS);
        const uint32_t n = ref->job.n_experts;
        uint64_t total = 0, counts[64] = { 0 };

        assert(n <= AE_ARRAY_LEN(counts));
        for (uint32_t e = 0; e < n; e++) {
                for (uint32_t rank = 0; rank < ref->job.world; rank++)
                        counts[e] += exact_count(&ref->job, step, rank, e);
                total += counts[e];
        }
        for (uint32_t e = 0; e < n; e++) {
                const double above = (double)counts[e] - (double)total / n;

                if (counts[e] * n != total)
                        s->master[e] += above < 0 ? (float)EXACT_BALANCE_RATE
                                                  : -(float)EXACT_BALANCE_RATE;
        }
        write_weight(&ref->model.tensors[EXACT_BIAS], s);
}

static bool is_stepped(const struct exact_reference *ref, uint32_t step, uint32_t id)
{
        return exact_is_trainable(&ref->model, id) && !exact_is_alias(&ref->model, id) &&
               (id != EXACT_SKIPPED || step != 1);
}

/* Adds a tensor to the norm that begins at element @first of its segment. */
static void add_squares(const struct exact_reference *ref, uint32_t step, uint32_t id,
                        uint64_t first, struct normref *norm)
{
        const struct exact_state *s = state_at(ref, step + 1, id);

        for (uint64_t i = 0; i < ref->model.tensors[id].n; i++)
                normref_element(norm, first + i, s->gradient[i]);
}

/* The trainable tensors of one unit and type: each begins at a multiple of 256 bytes. */
static void add_segment(const struct exact_reference *ref, uint32_t step, uint32_t unit,
                        uint32_t dtype, struct normref *norm)
{
        uint64_t first = 0;

        for (uint32_t id = 0; id < EXACT_N_DENSE; id++) {
                const struct exact_tensor *t = &ref->model.tensors[id];

                if (t->unit != unit || t->dtype != dtype || !exact_is_trainable(&ref->model, id) ||
                    exact_is_alias(&ref->model, id))
                        continue;
                add_squares(ref, step, id, first, norm);
                first = ae_align_up(first + t->n, dtype == AUTOEP_F32 ? 64 : 128);
        }
        normref_end(norm);
}

static double norm2_of(const struct exact_reference *ref, uint32_t step)
{
        struct normref norm = { .n_parts = 0 };

        for (uint32_t unit = 0; unit < EXACT_N_UNITS; unit++) {
                add_segment(ref, step, unit, AUTOEP_F32, &norm);
                add_segment(ref, step, unit, AUTOEP_BF16, &norm);
        }
        for (uint32_t id = EXACT_N_DENSE; id < ref->model.n_tensors; id++) {
                add_squares(ref, step, id, 0, &norm);
                normref_end(&norm);
        }
        return normref_sum(&norm);
}

static void take_step(struct exact_reference *ref, uint32_t step)
{
        struct exact_verdict *verdict = &ref->verdicts[step];
        struct autoep_hyper hyper[2];

        exact_hyper(&ref->job, step, hyper);
        for (uint32_t id = 0; id < ref->model.n_tensors; id++) {
                copy_state(ref, step, id);
                if (is_stepped(ref, step, id))
                        reduce(ref, step, id);
        }
        verdict->scale = 1.0 / (double)(ref->job.world * ref->job.accumulate);
        verdict->norm = verdict->scale * sqrt(norm2_of(ref, step));
        verdict->clip = 1;
        if (ref->job.max_norm > 0 && ref->job.max_norm < verdict->norm + 1e-6)
                verdict->clip = ref->job.max_norm / (verdict->norm + 1e-6);
        verdict->grad_scale = verdict->scale * verdict->clip;
        for (uint32_t id = 0; id < ref->model.n_tensors; id++) {
                const struct exact_tensor *t = &ref->model.tensors[id];
                struct exact_state *s = state_at(ref, step + 1, id);

                if (!is_stepped(ref, step, id))
                        continue;
                s->steps++;
                if (ref->job.optimizer == AUTOEP_ADAMW)
                        step_adamw(t, s, &hyper[t->group], verdict->grad_scale);
                else
                        step_sgd(t, s, &hyper[t->group], verdict->grad_scale);
                write_weight(t, s);
        }
        balance(ref, step);
}

struct exact_reference *exact_reference_new(const struct exact_job *job)
{
        struct exact_reference *ref = calloc(1, sizeof(*ref));

        assert(ref);
        ref->job = *job;
        assert(job->bf16_group == 0 || job->world % job->bf16_group == 0);
        fill_model(&ref->model, job->n_experts);
        ref->states = calloc((size_t)(EXACT_STEPS + 1) * ref->model.n_tensors,
                             sizeof(*ref->states));
        assert(ref->states);
        for (uint32_t step = 0; step <= EXACT_STEPS; step++) {
                for (uint32_t id = 0; id < ref->model.n_tensors; id++)
                        make_state(&ref->model.tensors[id], state_at(ref, step, id));
        }
        for (uint32_t id = 0; id < ref->model.n_tensors; id++)
                fill_initial(ref, id);
        for (uint32_t step = 0; step < EXACT_STEPS; step++)
                take_step(ref, step);
        return ref;
}

struct exact_reference *exact_reference_free(struct exact_reference *ref)
{
        if (!ref)
                return NULL;
        for (size_t i = 0; i < (size_t)(EXACT_STEPS + 1) * ref->model.n_tensors; i++) {
                free(ref->states[i].master);
                free(ref->states[i].m);
                free(ref->states[i].v);
                free(ref->states[i].gradient);
                free(ref->states[i].weight);
        }
        free(ref->states);
        free(ref->model.tensors);
        free(ref);
        return NULL;
}
