/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The reference backend. Every array is an image of the model: a tensor's elements stand at its
 * `first`. Sums are fp32, like those of daemons; within a micro-batch an EP group adds expert
 * gradients in the model's number type, as one matrix product over all its tokens would.
 */
#include "client/examples/moe-lm/reference.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/balance.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct reference {
        struct lm_backend base;
        struct lm_reference_config config;
        struct ae_comm self;     /* a group of one */
        uint32_t n_groups;      /* sum groups */
        uint32_t n_turns;       /* of this step */
        float *staged;          /* owned; what the rank scattered: an image, and one of aliases */
        bool *is_staged;        /* owned; [tensors] */
        float *group_sums;      /* owned; [sum groups] images */
        bool *in_group_sum;     /* owned; [sum groups][tensors] */
        void *expert_parts;     /* owned; [EP groups] images of reals: this micro-batch */
        float *expert_sums;     /* owned; [EP groups] images: this step */
        float *grads, *masters, *moment1, *moment2; /* owned; images */
        char *weights;          /* owned; an image with 4 bytes an element, filled from the front */
        uint64_t *steps;        /* owned; [tensors] */
};

static struct reference *reference_of(struct lm_backend *backend)
{
        return (struct reference *)backend;
}

static const struct lm_tensor *tensor_of(const struct reference *ref, uint32_t id)
{
        return &ref->base.spec->tensors[id];
}

static char *weight_of(const struct reference *ref, const struct lm_tensor *tensor)
{
        return ref->weights + tensor->first * sizeof(float);
}

static uint64_t n_expert_elements(const struct reference *ref)
{
        return ref->base.spec->n_elements - ref->base.spec->n_dense_elements;
}

static int self_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len,
                          void *recv, const uint64_t *recv_len, uint64_t deadline_ns)
{
        (void)comm;
        (void)deadline_ns;
        assert(send_len[0] == recv_len[0]);
        if (send_len[0] > 0)
                memcpy(recv, send, send_len[0]);
        return 0;
}

static const struct ae_comm_ops self_ops = { .name = "self", .alltoallv = self_alltoallv };

static int reference_turn(struct lm_backend *backend, uint32_t rank, bool last)
{
        (void)last;
        assert(rank < backend->world);
        backend->rank = rank;
        return 0;
}

static int reference_gather(struct lm_backend *backend, uint32_t unit, struct lm_view *ret_view)
{
        const struct reference *ref = reference_of(backend);
        const struct lm_unit *u = &backend->spec->units[unit];

        for (uint32_t i = 0; i < u->n; i++)
                ret_view->data[i] = weight_of(ref, tensor_of(ref, u->first + i));
        return 0;
}

static int reference_release(struct lm_backend *backend, uint32_t unit)
{
        (void)backend;
        assert(unit < backend->spec->n_units);
        return 0;
}

/* Where a tensor's scattered gradient waits for the end of the turn. */
static float *stage_of(const struct reference *ref, uint32_t id)
{
        const struct lm_tensor *tensor = tensor_of(ref, id);

        return ref->staged + tensor->first +
               (tensor->home == id ? 0 : ref->base.spec->n_dense_elements);
}

/* To fp32, by way of the dtype that gradients travel in. */
static void round_gradient(const struct reference *ref, const void *from, size_t n, float *to)
{
        ae_bf16 rounded[256];

        for (size_t i = 0; i < n; i++)
                to[i] = (float)ae_real_get(ref->base.real, from, i);
        if (ref->config.grad_dtype == AE_DTYPE_F32)
                return;
        for (size_t i = 0; i < n; i += AE_ARRAY_LEN(rounded)) {
                const size_t count = AE_MIN(n - i, AE_ARRAY_LEN(rounded));

                ae_ops()->f32_to_bf16(rounded, to + i, count);
                ae_ops()->bf16_to_f32(to + i, rounded, count);
        }
}

static int reference_scatter(struct lm_backend *backend, uint32_t unit, const void *const *grads)
{
        const struct reference *ref = reference_of(backend);
        const struct lm_unit *u = &backend->spec->units[unit];

        for (uint32_t i = 0; i < u->n_trainable; i++) {
                const uint32_t id = u->first + i;

                assert(!ref->is_staged[id]);
                round_gradient(ref, grads[i], tensor_of(ref, id)->n, stage_of(ref, id));
                ref->is_staged[id] = true;
        }
        return 0;
}

static void reference_expert(struct lm_backend *backend, uint32_t layer, uint32_t local,
                             struct lm_expert *ret_expert)
{
        const struct reference *ref = reference_of(backend);
        const uint32_t group = ae_group_ep_index(&ref->config.topology, backend->rank);
        const uint32_t first = lm_expert_tensor(backend->spec, layer, local);
        char *part = (char *)ref->expert_parts + group * n_expert_elements(ref) * backend->real;

        for (uint32_t i = 0; i < LM_EXPERT_TENSORS; i++) {
                const struct lm_tensor *tensor = tensor_of(ref, first + i);

                ret_expert->weight[i] = weight_of(ref, tensor);
                ret_expert->grad[i] = part + (tensor->first - backend->spec->n_dense_elements) *
                                                     backend->real;
        }
}

/* to = to + from, or from where the sum begins. */
static void fold(float *to, const float *from, size_t n, bool keep)
{
        const struct ae_ops_input input = { .data = from, .dtype = AE_DTYPE_F32 };
        struct ae_ops_sum sum = { .acc = to, .n = n, .inputs = &input, .n_inputs = 1,
                                  .keep = keep };

        ae_ops()->sum(&sum);
}

/* The rank's gradients join its group's sums: each tensor's own, then its aliases in order. */
static void fold_turn(struct reference *ref)
{
        const uint32_t group = ref->base.rank / ref->config.sum_group;
        float *sums = ref->group_sums + group * ref->base.spec->n_dense_elements;
        bool *in_sum = ref->in_group_sum + group * ref->base.spec->n_dense;

        for (uint32_t id = 0; id < ref->base.spec->n_dense; id++) {
                const struct lm_tensor *tensor = tensor_of(ref, id);

                if (!ref->is_staged[id])
                        continue;
                fold(sums + tensor->first, stage_of(ref, id), tensor->n, in_sum[tensor->home]);
                in_sum[tensor->home] = true;
                ref->is_staged[id] = false;
        }
}

/* The micro-batch of all ranks is over: each EP group's experts note their gradients as fp32. */
static void fold_experts(struct reference *ref)
{
        const size_t n = n_expert_elements(ref) * ref->config.topology.edp_size;

        for (size_t i = 0; i < n; i++)
                ref->expert_sums[i] += (float)ae_real_get(ref->base.real, ref->expert_parts, i);
        memset(ref->expert_parts, 0, n * ref->base.real);
}

static int reference_turn_end(struct lm_backend *backend)
{
        struct reference *ref = reference_of(backend);

        fold_turn(ref);
        if (backend->rank == backend->world - 1)
                fold_experts(ref);
        ref->n_turns++;
        return 0;
}

/* Adds up the groups of a dense tensor; false when nobody scattered it. */
static bool reduce_dense(struct reference *ref, uint32_t id)
{
        const struct lm_tensor *tensor = tensor_of(ref, id);
        const struct lm_spec *spec = ref->base.spec;
        bool any = false;

        for (uint32_t group = 0; group < ref->n_groups; group++) {
                if (!ref->in_group_sum[group * spec->n_dense + id])
                        continue;
                fold(ref->grads + tensor->first,
                     ref->group_sums + group * spec->n_dense_elements + tensor->first, tensor->n,
                     any);
                any = true;
        }
        if (!any)
                memset(ref->grads + tensor->first, 0, tensor->n * sizeof(float));
        return any;
}

static bool reduce_expert(struct reference *ref, uint32_t id)
{
        const struct lm_tensor *tensor = tensor_of(ref, id);
        const uint64_t first = tensor->first - ref->base.spec->n_dense_elements;

        for (uint32_t group = 0; group < ref->config.topology.edp_size; group++)
                fold(ref->grads + tensor->first,
                     ref->expert_sums + group * n_expert_elements(ref) + first, tensor->n,
                     group > 0);
        return true; /* experts step always */
}

/* Reduces all; @takes_part[id] says which tensors have a gradient. Returns the squares' sum. */
static double reduce_all(struct reference *ref, bool *takes_part)
{
        struct ae_longacc squares = { { 0 } };
        bool finite = true;

        for (uint32_t id = 0; id < ref->base.spec->n_tensors; id++) {
                const struct lm_tensor *tensor = tensor_of(ref, id);

                takes_part[id] = false;
                if (tensor->class == LM_BUFFER || tensor->home != id)
                        continue;
                takes_part[id] = tensor->class == LM_EXPERT ? reduce_expert(ref, id)
                                                            : reduce_dense(ref, id);
                if (takes_part[id])
                        finite &= ae_ops()->norm2(ref->grads + tensor->first, tensor->n, &squares);
        }
        return finite ? ae_longacc_round(&squares) : INFINITY;
}

static void update(struct reference *ref, uint32_t id, const struct ae_hyper *hyper,
                   double grad_scale)
{
        const struct lm_tensor *tensor = tensor_of(ref, id);
        float *p = ref->masters + tensor->first, *m = ref->moment1 + tensor->first;
        float *v = ref->moment2 + tensor->first, *g = ref->grads + tensor->first;
        struct ae_adamw adamw;
        struct ae_sgd sgd;

        ref->steps[id]++;
        if (ref->config.sgd) {
                ae_sgd_scalars(hyper, grad_scale, &sgd);
                ae_ops()->sgd(&sgd, p, m, g, weight_of(ref, tensor), tensor->dtype, tensor->n);
                return;
        }
        ae_adamw_scalars(hyper, ref->steps[id], grad_scale, &adamw);
        ae_ops()->adamw(&adamw, p, m, v, g, weight_of(ref, tensor), tensor->dtype, tensor->n);
}

static void balance(struct reference *ref, const struct lm_step *step)
{
        const struct lm_shape *shape = &ref->base.spec->shape;

        for (uint32_t l = 0; shape->balance && l < shape->layers; l++) {
                const uint32_t id = ref->base.spec->units[lm_unit_layer(l)].first + LM_BALANCE;
                const struct lm_tensor *tensor = tensor_of(ref, id);

                ae_balance_step((float *)(void *)weight_of(ref, tensor),
                                step->counts + (size_t)l * shape->experts, shape->experts,
                                step->balance_rate);
        }
}

static void clear_round(struct reference *ref)
{
        memset(ref->in_group_sum, 0, (size_t)ref->n_groups * ref->base.spec->n_dense);
        memset(ref->expert_sums, 0,
               n_expert_elements(ref) * ref->config.topology.edp_size * sizeof(float));
        ref->n_turns = 0;
}

static int reference_step(struct lm_backend *backend, const struct lm_step *step,
                          struct lm_verdict *ret_verdict)
{
        struct reference *ref = reference_of(backend);
        const uint32_t n_tensors = backend->spec->n_tensors;
        bool *takes_part = calloc(n_tensors, sizeof(*takes_part));
        struct lm_verdict verdict = { .applied = true, .tokens = step->tokens };
        double squares;

        if (!takes_part)
                return ae_fail_sys(ENOMEM, "cannot step %u tensors", n_tensors);
        verdict.scale = 1.0 / (double)(step->use_tokens ? step->tokens : ref->n_turns);
        squares = reduce_all(ref, takes_part);
        verdict.norm = verdict.scale * sqrt(squares);
        verdict.clip = ae_clip_factor(verdict.norm, step->max_norm);
        verdict.applied = isfinite(squares);
        if (!verdict.applied)
                snprintf(verdict.why, sizeof(verdict.why), "a gradient holds NaN or Inf");
        for (uint32_t id = 0; verdict.applied && id < n_tensors; id++) {
                if (takes_part[id])
                        update(ref, id, &step->hyper[tensor_of(ref, id)->group],
                               verdict.scale * verdict.clip);
        }
        if (verdict.applied)
                balance(ref, step);
        clear_round(ref);
        free(takes_part);
        *ret_verdict = verdict;
        return 0;
}

static int reference_get(struct lm_backend *backend, uint32_t id, enum lm_what what, float *data)
{
        const struct reference *ref = reference_of(backend);
        const struct lm_tensor *tensor = tensor_of(ref, id);
        const float *image = what == LM_GRADIENT ? ref->grads : ref->masters;

        if (tensor->class == LM_BUFFER)
                memcpy(data, weight_of(ref, tensor), tensor->n * sizeof(float));
        else
                memcpy(data, image + tensor->first, tensor->n * sizeof(float));
        return 0;
}

static void reference_describe(struct lm_backend *backend, char *text, size_t len)
{
        snprintf(text, len, "bytes        none moved: one process plays all %u ranks",
                 backend->world);
}

static void reference_free(struct lm_backend *backend)
{
        struct reference *ref = reference_of(backend);

        ae_comm_deinit(&ref->self);
        free(ref->staged);
        free(ref->is_staged);
        free(ref->group_sums);
        free(ref->in_group_sum);
        free(ref->expert_parts);
        free(ref->expert_sums);
        free(ref->grads);
        free(ref->masters);
        free(ref->moment1);
        free(ref->moment2);
        free(ref->weights);
        free(ref->steps);
        free(ref);
}

static const struct lm_backend_ops reference_ops = {
        .name = "reference",
        .turn = reference_turn,
        .gather = reference_gather,
        .release = reference_release,
        .scatter = reference_scatter,
        .expert = reference_expert,
        .turn_end = reference_turn_end,
        .step = reference_step,
        .get = reference_get,
        .describe = reference_describe,
        .free = reference_free,
};

static int allocate(struct reference *ref)
{
        const struct lm_spec *spec = ref->base.spec;
        const size_t n = spec->n_elements, dense = spec->n_dense_elements;
        const size_t experts = n_expert_elements(ref) * ref->config.topology.edp_size;

        ref->staged = calloc(2 * dense, sizeof(float));
        ref->is_staged = calloc(spec->n_dense, sizeof(bool));
        ref->group_sums = calloc(ref->n_groups * dense, sizeof(float));
        ref->in_group_sum = calloc((size_t)ref->n_groups * spec->n_dense, sizeof(bool));
        ref->expert_parts = calloc(experts, ref->base.real);
        ref->expert_sums = calloc(experts, sizeof(float));
        ref->grads = calloc(n, sizeof(float));
        ref->masters = calloc(n, sizeof(float));
        ref->moment1 = calloc(n, sizeof(float));
        ref->moment2 = calloc(n, sizeof(float));
        ref->weights = calloc(n, sizeof(float));
        ref->steps = calloc(spec->n_tensors, sizeof(*ref->steps));
        if (!ref->staged || !ref->is_staged || !ref->group_sums || !ref->in_group_sum ||
            !ref->expert_parts || !ref->expert_sums || !ref->grads || !ref->masters ||
            !ref->moment1 || !ref->moment2 || !ref->weights || !ref->steps)
                return ae_fail_sys(ENOMEM, "cannot make room for the reference of %zu parameters",
                                   n);
        return 0;
}

static void set_values(struct reference *ref)
{
        for (uint32_t id = 0; id < ref->base.spec->n_tensors; id++) {
                const struct lm_tensor *tensor = tensor_of(ref, id);
                float *values = ref->masters + tensor->first;

                if (tensor->home != id)
                        continue;
                lm_spec_values(tensor, ref->config.seed, values);
                if (tensor->dtype == AE_DTYPE_BF16)
                        ae_ops()->f32_to_bf16((ae_bf16 *)(void *)weight_of(ref, tensor), values,
                                              tensor->n);
                else
                        memcpy(weight_of(ref, tensor), values, tensor->n * sizeof(float));
        }
}

static int reference_init(struct reference *ref)
{
        const struct ae_group_topology *topology = &ref->config.topology;
        const uint32_t self = 0;
        int r;

        if (ref->config.sum_group == 0 || topology->world % ref->config.sum_group != 0)
                return ae_fail(AE_EINVAL, "cannot play %u ranks in sum groups of %u: the second "
                               "must divide the first", topology->world, ref->config.sum_group);
        r = ae_group_check_experts(topology, ref->base.spec->shape.experts);
        if (r < 0)
                return r;
        r = ae_comm_init(&ref->self, &self_ops, &self, 1, 0);
        if (r < 0)
                return r;
        r = ae_group_init(1, 1, AE_ORDER_ED, &ref->base.place);
        if (r < 0)
                return r;
        ref->n_groups = topology->world / ref->config.sum_group;
        r = allocate(ref);
        if (r < 0)
                return r;
        set_values(ref);
        return 0;
}

int lm_reference_new(const struct lm_spec *spec, const struct lm_reference_config *config,
                     struct lm_backend **ret_backend)
{
        struct reference *ref = calloc(1, sizeof(*ref));
        int r;

        if (!ref)
                return ae_fail_sys(ENOMEM, "cannot make a reference");
        ref->config = *config;
        ref->base = (struct lm_backend){
                .ops = &reference_ops, .spec = spec, .real = config->real,
                .grad_dtype = config->grad_dtype,
                .world = config->topology.world, .n_ranks = config->topology.world,
                .ep = &ref->self, .all = &ref->self,
                .timeout_ns = AE_NS_PER_S,
        };
        r = reference_init(ref);
        if (r < 0) {
                reference_free(&ref->base);
                return r;
        }
        *ret_backend = &ref->base;
        return 0;
}
