/* SPDX-License-Identifier: Apache-2.0 */
/* The autoep backend: every call to libautoep that a training program makes. Its one thread. */
#include "client/examples/moe-lm/daemons.h"

#include "client/autoep.h"
#include "client/experts/comm-daemon.h"
#include "client/experts/optimizer.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TIMEOUT_NS (600 * AE_NS_PER_S)

struct daemons {
        struct lm_backend base;
        struct lm_daemons_config config;
        autoep *handle;
        struct autoep_info info;
        struct autoep_view *views;  /* owned; [units] */
        uint32_t *unit_ids;         /* owned; [units], as libautoep numbers them */
        uint32_t *tensor_ids;       /* owned; [tensors] */
        void *staged;               /* owned; gradients of the largest unit as they travel */
        bool last;                  /* the step's last micro-batch */
        bool broken;                /* a call failed: the job is not left in order */
        uint64_t n_versions, version; /* how many were gathered, and the latest */
        uint64_t n_steps;
        uint64_t foreign_weight_len, foreign_gradient_len; /* of what the other nodes own */
        struct ae_comm_daemon ep, edp, all;
        struct ae_expert_opt *opt;  /* owned; tensors by (layer, local expert, slot) */
        char *weights;              /* owned; of local experts */
        double *parts;              /* owned; gradients of one micro-batch in double, or NULL */
};

static struct daemons *daemons_of(struct lm_backend *backend)
{
        return (struct daemons *)backend;
}

/* Passes a failure of libautoep on with its words. */
static int failed(struct daemons *d, int r)
{
        d->broken = true;
        return ae_fail(r, "%s", autoep_last_error());
}

static int daemons_turn(struct lm_backend *backend, uint32_t rank, bool last)
{
        assert(rank == backend->first_rank);
        backend->rank = rank;
        daemons_of(backend)->last = last;
        return 0;
}

/* A tied tensor's values lie in the unit of its home, which is then held as well. */
static uint32_t home_unit(const struct lm_spec *spec, uint32_t unit)
{
        for (uint32_t i = 0; i < spec->units[unit].n; i++) {
                const uint32_t id = spec->units[unit].first + i;

                if (spec->tensors[id].home != id)
                        return lm_unit_embed();
        }
        return unit;
}

static int view_open(struct daemons *d, uint32_t unit)
{
        struct autoep_view *view = &d->views[unit];
        int r;

        *view = (struct autoep_view)AUTOEP_VIEW_INIT;
        r = autoep_gather(d->handle, d->unit_ids[unit], AUTOEP_DEFAULT_TIMEOUT, view);
        if (r < 0)
                return failed(d, r);
        if (d->n_versions == 0 || view->version != d->version)
                d->n_versions++;
        d->version = view->version;
        return 0;
}

static int daemons_gather(struct lm_backend *backend, uint32_t unit, struct lm_view *ret_view)
{
        struct daemons *d = daemons_of(backend);
        const struct lm_spec *spec = backend->spec;
        const uint32_t home = home_unit(spec, unit);
        int r = view_open(d, unit);

        if (r == 0 && home != unit)
                r = view_open(d, home);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < spec->units[unit].n; i++) {
                const uint32_t id = spec->units[unit].first + i;
                const uint32_t at = spec->tensors[id].home;
                const uint32_t from = at == id ? unit : home;

                ret_view->data[i] = autoep_view_tensor(d->handle, &d->views[from],
                                                       d->tensor_ids[at]);
                if (!ret_view->data[i])
                        return ae_fail(AE_EPROTO, "cannot find %s in the view of unit %s",
                                       spec->tensors[at].name, spec->units[from].name);
        }
        return 0;
}

static int daemons_release(struct lm_backend *backend, uint32_t unit)
{
        struct daemons *d = daemons_of(backend);
        const uint32_t home = home_unit(backend->spec, unit);
        int r = autoep_release(d->handle, &d->views[unit]);

        if (r == 0 && home != unit)
                r = autoep_release(d->handle, &d->views[home]);
        return r < 0 ? failed(d, r) : 0;
}

/* Gradients as they travel: the model's own array where it has that type already. */
static const void *stage(const struct daemons *d, const void *from, size_t n, char *room)
{
        float *floats = (float *)(void *)room;

        if (d->base.real == AE_REAL_F32 && d->config.grad_dtype == AE_DTYPE_F32)
                return from;
        if (d->base.real == AE_REAL_F32) {
                ae_ops()->f32_to_bf16((ae_bf16 *)(void *)room, from, n);
                return room;
        }
        for (size_t i = 0; i < n; i++)
                floats[i] = (float)((const double *)from)[i];
        if (d->config.grad_dtype == AE_DTYPE_F32)
                return room;
        ae_ops()->f32_to_bf16((ae_bf16 *)(void *)(room + n * sizeof(float)), floats, n);
        return room + n * sizeof(float);
}

static int daemons_scatter(struct lm_backend *backend, uint32_t unit, const void *const *grads)
{
        struct daemons *d = daemons_of(backend);
        const struct lm_unit *u = &backend->spec->units[unit];
        struct autoep_gradient gradients[LM_UNIT_TENSORS];
        char *room = d->staged;
        int r;

        for (uint32_t i = 0; i < u->n_trainable; i++) {
                const size_t n = backend->spec->tensors[u->first + i].n;

                gradients[i] = (struct autoep_gradient){
                        .size = sizeof(gradients[i]), .tensor = d->tensor_ids[u->first + i],
                        .dtype = d->config.grad_dtype, .data = stage(d, grads[i], n, room),
                };
                room += ae_align_up(n * (sizeof(float) + sizeof(ae_bf16)), sizeof(float));
        }
        r = autoep_scatter(d->handle, d->unit_ids[unit], gradients, u->n_trainable,
                           d->last ? AUTOEP_LAST : 0, AUTOEP_DEFAULT_TIMEOUT);
        return r < 0 ? failed(d, r) : 0;
}

static uint32_t expert_index(const struct daemons *d, uint32_t layer, uint32_t local)
{
        return (layer * (d->base.spec->shape.experts / d->info.ep_size) + local) *
               LM_EXPERT_TENSORS;
}

/* Elements of each tensor of an expert. */
static size_t expert_n(const struct daemons *d)
{
        return (size_t)d->base.spec->shape.dim * d->base.spec->shape.expert_dim;
}

static char *expert_weight(const struct daemons *d, uint32_t index)
{
        return d->weights + index * expert_n(d) * ae_dtype_size(d->base.spec->shape.dtype);
}

static void daemons_expert(struct lm_backend *backend, uint32_t layer, uint32_t local,
                           struct lm_expert *ret_expert)
{
        const struct daemons *d = daemons_of(backend);
        const uint32_t first = expert_index(d, layer, local);

        for (uint32_t i = 0; i < LM_EXPERT_TENSORS; i++) {
                ret_expert->weight[i] = expert_weight(d, first + i);
                ret_expert->grad[i] = d->parts ? (void *)(d->parts + (first + i) * expert_n(d))
                                               : ae_expert_opt_grad(d->opt, first + i);
        }
}

/* What the micro-batch added in double joins the fp32 gradients. */
static void fold_parts(struct daemons *d)
{
        const size_t n = expert_n(d);

        for (uint32_t i = 0; i < ae_expert_opt_count(d->opt); i++) {
                float *grad = ae_expert_opt_grad(d->opt, i);

                for (size_t j = 0; j < n; j++)
                        grad[j] += (float)d->parts[i * n + j];
        }
        memset(d->parts, 0, ae_expert_opt_count(d->opt) * n * sizeof(*d->parts));
}

static int daemons_turn_end(struct lm_backend *backend)
{
        struct daemons *d = daemons_of(backend);
        int r;

        if (d->parts)
                fold_parts(d);
        r = autoep_micro_batch_end(d->handle);
        return r < 0 ? failed(d, r) : 0;
}

/* Asks for the step; the verdict comes when all ranks have. */
static int ask(struct daemons *d, const struct lm_step *step,
               const struct ae_expert_report *report, struct autoep_verdict *ret_verdict)
{
        const struct lm_shape *shape = &d->base.spec->shape;
        struct autoep_hyper hyper[LM_N_GROUPS];
        struct autoep_step request = {
                .size = sizeof(request), .hyper = hyper, .n_groups = LM_N_GROUPS,
                .flags = step->use_tokens ? AUTOEP_USE_TOKENS : 0,
                .max_norm = step->max_norm, .tokens = step->use_tokens ? step->tokens : 0,
                .expert_nonfinite = report->nonfinite ? report->text : NULL,
        };
        int r;

        static_assert(sizeof(request.expert_norm2) == sizeof(report->norm2), "the same limbs");
        memcpy(&request.expert_norm2, &report->norm2, sizeof(report->norm2));
        for (int g = 0; g < LM_N_GROUPS; g++)
                hyper[g] = (struct autoep_hyper){
                        .lr = step->hyper[g].lr, .beta1 = step->hyper[g].beta1,
                        .beta2 = step->hyper[g].beta2, .eps = step->hyper[g].eps,
                        .weight_decay = step->hyper[g].weight_decay,
                };
        if (shape->balance) {
                request.balance_rate = step->balance_rate;
                request.counts = step->counts;
                request.n_counts = shape->layers * shape->experts;
        }
        *ret_verdict = (struct autoep_verdict)AUTOEP_VERDICT_INIT;
        r = autoep_step(d->handle, &request, AUTOEP_DEFAULT_TIMEOUT, ret_verdict);
        return r < 0 ? failed(d, r) : 0;
}

/* Experts follow the verdict with the hyper-parameters that it brings back. */
static int step_experts(struct daemons *d, const struct autoep_verdict *verdict)
{
        struct ae_expert_group_step groups[LM_N_GROUPS];
        const struct ae_expert_verdict experts = {
                .applied = verdict->kind == AUTOEP_APPLIED, .grad_scale = verdict->grad_scale,
                .groups = groups, .n_groups = LM_N_GROUPS,
        };

        for (uint32_t g = 0; g < LM_N_GROUPS; g++) {
                const struct autoep_hyper *hyper = &verdict->hyper[g];

                groups[g] = (struct ae_expert_group_step){
                        .hyper = { .lr = hyper->lr, .beta1 = hyper->beta1, .beta2 = hyper->beta2,
                                   .eps = hyper->eps, .weight_decay = hyper->weight_decay },
                        .idle = verdict->absent_groups >> g & 1,
                };
        }
        return ae_expert_opt_step(d->opt, &experts);
}

static int daemons_step(struct lm_backend *backend, const struct lm_step *step,
                        struct lm_verdict *ret_verdict)
{
        struct daemons *d = daemons_of(backend);
        struct ae_expert_report report;
        struct autoep_verdict verdict;
        int r = ae_expert_opt_reduce(d->opt, &d->edp.comm, lm_deadline(backend), &report);

        if (r == 0)
                r = ask(d, step, &report, &verdict);
        if (r == 0)
                r = step_experts(d, &verdict);
        if (r < 0) {
                d->broken = true;
                return r;
        }
        d->n_steps++;
        *ret_verdict = (struct lm_verdict){
                .applied = verdict.kind == AUTOEP_APPLIED, .redo = verdict.kind == AUTOEP_REDO,
                .scale = verdict.scale, .norm = verdict.norm, .clip = verdict.clip,
                .tokens = verdict.tokens,
        };
        snprintf(ret_verdict->why, sizeof(ret_verdict->why), "%s", verdict.why);
        return 0;
}

static int get_dense(struct daemons *d, uint32_t id, enum lm_what what, float *data)
{
        const struct lm_tensor *tensor = &d->base.spec->tensors[id];
        uint32_t kind = what == LM_GRADIENT ? AUTOEP_GRADIENT : AUTOEP_MASTER;
        int r;

        if (d->base.rank != 0)
                return 0;
        if (tensor->class == LM_BUFFER)
                kind = AUTOEP_WEIGHT;
        r = autoep_get(d->handle, d->tensor_ids[id], kind, 0, tensor->n, data,
                       AUTOEP_DEFAULT_TIMEOUT);
        return r < 0 ? failed(d, r) : 0;
}

/* From the member of the first EP group that holds the expert to rank 0. */
static int get_expert(struct daemons *d, uint32_t id, enum lm_what what, float *data)
{
        const struct lm_shape *shape = &d->base.spec->shape;
        const struct ae_group_topology *place = &d->base.place;
        const uint32_t at = id - d->base.spec->n_dense, slot = at % LM_EXPERT_TENSORS;
        const uint32_t expert = at / LM_EXPERT_TENSORS % shape->experts;
        const uint32_t layer = at / LM_EXPERT_TENSORS / shape->experts;
        const uint32_t position = ae_group_expert_home(place, shape->experts, expert);
        const uint32_t source = ae_group_ep_member(place, 0, position);
        const uint32_t local = expert - ae_group_expert_first(place, shape->experts, position);
        const size_t len = expert_n(d) * sizeof(float);
        uint64_t *lens = calloc(2 * (size_t)d->info.world, sizeof(*lens));
        struct ae_expert_state state = { 0 };
        const float *send = NULL;
        int r = 0;

        if (!lens)
                return ae_fail_sys(ENOMEM, "cannot collect %s", d->base.spec->tensors[id].name);
        if (d->info.rank == source) {
                r = ae_expert_opt_state(d->opt, expert_index(d, layer, local) + slot, &state);
                send = what == LM_GRADIENT ? state.reduced : state.master;
                lens[0] = len;
        }
        if (d->info.rank == 0)
                lens[d->info.world + source] = len;
        if (r == 0)
                r = ae_comm_alltoallv(&d->all.comm, send, lens, data, lens + d->info.world,
                                      lm_deadline(&d->base));
        free(lens);
        return r;
}

static int daemons_get(struct lm_backend *backend, uint32_t id, enum lm_what what, float *data)
{
        struct daemons *d = daemons_of(backend);

        if (backend->spec->tensors[id].class == LM_EXPERT)
                return get_expert(d, id, what, data);
        return get_dense(d, id, what, data);
}

static void daemons_describe(struct lm_backend *backend, char *text, size_t len)
{
        struct daemons *d = daemons_of(backend);
        struct autoep_stats stats = { .size = sizeof(stats) };
        const double gather_least = (double)(d->n_versions * d->foreign_weight_len);
        const double scatter_least = (double)(d->n_steps * d->foreign_gradient_len);

        if (autoep_stats(d->handle, &stats) < 0) {
                snprintf(text, len, "bytes        unknown: %s", autoep_last_error());
                return;
        }
        snprintf(text, len,
                 "bytes        this worker: %.1f MB in %llu gathers (%llu from the node's cache), "
                 "%.1f MB in %llu scatters, %.1f MB exchanged\n"
                 "             this node (%u over %s): %.1f MB of weights received, least %.1f; "
                 "%.1f MB of gradients sent, least %.1f; %.1f MB exchanged\n"
                 "             least: what other nodes own, its weights once per version and its "
                 "fp32 gradients once per step",
                 (double)stats.gather_len / 1e6, (unsigned long long)stats.gathers,
                 (unsigned long long)stats.gather_hits, (double)stats.scatter_len / 1e6,
                 (unsigned long long)stats.scatters, (double)stats.exchange_len / 1e6,
                 d->info.n_nodes, d->info.transport, (double)stats.node_gather_recv_len / 1e6,
                 gather_least / 1e6, (double)stats.node_scatter_sent_len / 1e6,
                 scatter_least / 1e6, (double)stats.node_exchange_sent_len / 1e6);
}

static void daemons_free(struct lm_backend *backend)
{
        struct daemons *d = daemons_of(backend);

        ae_expert_opt_free(d->opt);
        ae_comm_daemon_deinit(&d->ep);
        ae_comm_daemon_deinit(&d->edp);
        ae_comm_daemon_deinit(&d->all);
        if (d->handle && !d->broken)
                (void)autoep_leave(d->handle, AUTOEP_DEFAULT_TIMEOUT); /* closed either way */
        autoep_close(d->handle);
        free(d->views);
        free(d->unit_ids);
        free(d->tensor_ids);
        free(d->staged);
        free(d->weights);
        free(d->parts);
        free(d);
}

static const struct lm_backend_ops daemons_ops = {
        .name = "autoep",
        .turn = daemons_turn,
        .gather = daemons_gather,
        .release = daemons_release,
        .scatter = daemons_scatter,
        .expert = daemons_expert,
        .turn_end = daemons_turn_end,
        .step = daemons_step,
        .get = daemons_get,
        .describe = daemons_describe,
        .free = daemons_free,
};

static struct autoep_tensor registration(const struct lm_spec *spec, uint32_t id,
                                         const float *init)
{
        const struct lm_tensor *tensor = &spec->tensors[id];
        struct autoep_tensor record = {
                .size = sizeof(record), .name = tensor->name, .unit = tensor->unit,
                .dtype = tensor->dtype, .tensor_class = tensor->class, .group = tensor->group,
                .n_dims = tensor->n_dims,
        };

        for (uint32_t i = 0; i < tensor->n_dims; i++)
                record.dims[i] = tensor->dims[i];
        if (tensor->home != id)
                record.alias_of = spec->tensors[tensor->home].name;
        else if (tensor->class != LM_EXPERT && init)
                record.init = init + tensor->first;
        return record;
}

/* What the other nodes own, which no node can do without: their weights, and fp32 gradients for
 * them. The table of slices is the daemons' own. */
static int find_foreign(struct daemons *d, const struct autoep_tensor *tensors)
{
        const uint32_t n = d->base.spec->n_tensors;
        struct ae_tensor_spec *specs = calloc(n, sizeof(*specs));
        struct ae_layout *layout = NULL;
        int r;

        if (!specs)
                return ae_fail_sys(ENOMEM, "cannot list %u tensors", n);
        for (uint32_t i = 0; i < n; i++) {
                specs[i] = (struct ae_tensor_spec){
                        .name = tensors[i].name, .unit = tensors[i].unit, .dtype = tensors[i].dtype,
                        .class = tensors[i].tensor_class, .group = tensors[i].group,
                        .n_dims = tensors[i].n_dims, .alias_of = tensors[i].alias_of,
                };
                memcpy(specs[i].dims, tensors[i].dims, sizeof(specs[i].dims));
        }
        r = ae_layout_new(specs, n, d->info.n_nodes, &layout);
        free(specs);
        for (uint32_t i = 0; r == 0 && i < layout->n_slices; i++) {
                const struct ae_layout_slice *slice = &layout->slices[i];
                const struct ae_layout_segment *segment = &layout->segments[slice->segment];

                if (slice->node == d->info.node)
                        continue;
                d->foreign_weight_len += slice->n * ae_dtype_size(segment->dtype);
                if (segment->trainable)
                        d->foreign_gradient_len += slice->n * sizeof(float);
        }
        ae_layout_free(layout);
        return r;
}

/* Rank 0 gives the initial values. */
static int register_model(struct daemons *d)
{
        const struct lm_spec *spec = d->base.spec;
        struct autoep_tensor *tensors = calloc(spec->n_tensors, sizeof(*tensors));
        float *init = calloc(spec->n_dense_elements, sizeof(*init));
        struct autoep_model model = {
                .size = sizeof(model), .tensors = tensors, .n_tensors = spec->n_tensors,
                .optimizer = d->config.sgd ? AUTOEP_SGD : AUTOEP_ADAMW,
                .ep_size = d->config.ep_size, .order = d->config.order,
                .sum_group = d->config.sum_group,
        };
        int r;

        if (!tensors || !init) {
                free(tensors);
                free(init);
                return ae_fail_sys(ENOMEM, "cannot list %u tensors", spec->n_tensors);
        }
        for (uint32_t id = 0; id < spec->n_tensors; id++) {
                const struct lm_tensor *tensor = &spec->tensors[id];

                if (d->info.rank == 0 && tensor->class != LM_EXPERT && tensor->home == id)
                        lm_spec_values(tensor, d->config.seed, init + tensor->first);
                tensors[id] = registration(spec, id, d->info.rank == 0 ? init : NULL);
        }
        r = autoep_register(d->handle, &model, AUTOEP_DEFAULT_TIMEOUT);
        r = r < 0 ? failed(d, r) : find_foreign(d, tensors);
        free(tensors);
        free(init);
        return r;
}

static int find_ids(struct daemons *d)
{
        const struct lm_spec *spec = d->base.spec;
        uint64_t most = 0;

        d->unit_ids = calloc(spec->n_units, sizeof(*d->unit_ids));
        d->tensor_ids = calloc(spec->n_tensors, sizeof(*d->tensor_ids));
        d->views = calloc(spec->n_units, sizeof(*d->views));
        if (!d->unit_ids || !d->tensor_ids || !d->views)
                return ae_fail_sys(ENOMEM, "cannot note %u units", spec->n_units);
        for (uint32_t u = 0; u < spec->n_units; u++) {
                d->unit_ids[u] = autoep_unit(d->handle, spec->units[u].name);
                assert(d->unit_ids[u] != AUTOEP_NONE);
                most = AE_MAX(most, spec->units[u].n_elements);
        }
        for (uint32_t id = 0; id < spec->n_tensors; id++)
                d->tensor_ids[id] = autoep_tensor(d->handle, spec->tensors[id].name);
        d->staged = malloc((most + LM_UNIT_TENSORS) * (sizeof(float) + sizeof(ae_bf16)));
        return d->staged ? 0 : ae_fail_sys(ENOMEM, "cannot make room for gradients");
}

/* Adds one tensor of an expert with its initial weight. */
static int add_expert(struct daemons *d, uint32_t id, uint32_t layer, uint32_t expert)
{
        const struct lm_tensor *tensor = &d->base.spec->tensors[id];
        const uint32_t index = ae_expert_opt_count(d->opt);
        struct ae_expert_tensor record = {
                .name = tensor->name, .layer = layer, .expert = expert, .dtype = tensor->dtype,
                .group = tensor->group, .weight = expert_weight(d, index), .n = tensor->n,
        };
        float *values = malloc(tensor->n * sizeof(*values));
        uint32_t added;

        assert(tensor->n == expert_n(d));
        if (!values)
                return ae_fail_sys(ENOMEM, "cannot initialise %s", tensor->name);
        lm_spec_values(tensor, d->config.seed, values);
        if (tensor->dtype == AE_DTYPE_BF16)
                ae_ops()->f32_to_bf16(record.weight, values, tensor->n);
        else
                memcpy(record.weight, values, tensor->n * sizeof(*values));
        free(values);
        return ae_expert_opt_add(d->opt, &record, &added);
}

static int make_experts(struct daemons *d)
{
        const struct lm_spec *spec = d->base.spec;
        const uint32_t n_local = spec->shape.experts / d->info.ep_size;
        const uint32_t first = ae_group_expert_first(&d->base.place, spec->shape.experts,
                                                     d->info.ep_rank);
        const size_t n = (size_t)spec->shape.layers * n_local * LM_EXPERT_TENSORS * expert_n(d);
        const struct ae_expert_opt_config config = {
                .rule = d->config.sgd ? AE_EXPERT_SGD : AE_EXPERT_ADAMW, .n_groups = LM_N_GROUPS,
                .keep_reduced = d->base.real == AE_REAL_F64, /* the check reads them */
        };
        int r = ae_expert_opt_new(&config, &d->opt);

        if (r < 0)
                return r;
        d->weights = malloc(n * ae_dtype_size(spec->shape.dtype));
        d->parts = d->base.real == AE_REAL_F64 ? calloc(n, sizeof(*d->parts)) : NULL;
        if (!d->weights || (d->base.real == AE_REAL_F64 && !d->parts))
                return ae_fail_sys(ENOMEM, "cannot make room for %u experts a layer", n_local);
        for (uint32_t i = 0; r == 0 && i < spec->shape.layers * n_local * LM_EXPERT_TENSORS; i++) {
                const uint32_t layer = i / LM_EXPERT_TENSORS / n_local;
                const uint32_t expert = first + i / LM_EXPERT_TENSORS % n_local;

                r = add_expert(d, lm_expert_tensor(spec, layer, expert) + i % LM_EXPERT_TENSORS,
                               layer, expert);
        }
        return r < 0 ? r : ae_expert_opt_seal(d->opt, &d->edp.comm, lm_deadline(&d->base));
}

static int join(struct daemons *d)
{
        const struct autoep_options options = AUTOEP_OPTIONS_INIT;
        int r = autoep_open(&options, &d->handle);

        if (r < 0)
                return failed(d, r);
        d->info = (struct autoep_info){ .size = sizeof(d->info) };
        r = autoep_info(d->handle, &d->info);
        if (r < 0)
                return failed(d, r);
        if (d->config.ep_size == 0)
                d->config.ep_size = d->info.world % 2 == 0 ? 2 : 1;
        r = ae_group_init(d->info.world, d->config.ep_size, d->config.order, &d->base.place);
        if (r == 0)
                r = ae_group_check_experts(&d->base.place, d->base.spec->shape.experts);
        if (r == 0)
                r = register_model(d);
        if (r < 0)
                return r;
        r = autoep_info(d->handle, &d->info);
        return r < 0 ? failed(d, r) : 0;
}

static int daemons_init(struct daemons *d)
{
        int r = join(d);

        if (r == 0)
                r = find_ids(d);
        if (r == 0)
                r = ae_comm_daemon_init(&d->ep, d->handle, AUTOEP_GROUP_EP, d->config.order);
        if (r == 0)
                r = ae_comm_daemon_init(&d->edp, d->handle, AUTOEP_GROUP_EDP, d->config.order);
        if (r == 0)
                r = ae_comm_daemon_init(&d->all, d->handle, AUTOEP_GROUP_WORLD, d->config.order);
        if (r < 0)
                return r;
        d->base.world = d->info.world;
        d->base.rank = d->base.first_rank = d->info.rank;
        d->base.n_ranks = 1;
        d->base.ep = &d->ep.comm;
        d->base.all = &d->all.comm;
        return make_experts(d);
}

int lm_daemons_new(const struct lm_spec *spec, const struct lm_daemons_config *config,
                   struct lm_backend **ret_backend)
{
        struct daemons *d = calloc(1, sizeof(*d));
        int r;

        if (!d)
                return ae_fail_sys(ENOMEM, "cannot join a job");
        d->config = *config;
        d->base = (struct lm_backend){ .ops = &daemons_ops, .spec = spec, .real = config->real,
                                       .grad_dtype = config->grad_dtype,
                                       .timeout_ns = TIMEOUT_NS };
        r = daemons_init(d);
        if (r < 0) {
                d->broken = true;
                daemons_free(&d->base);
                return r;
        }
        *ret_backend = &d->base;
        return 0;
}

struct lm_daemons_job lm_daemons_job(const struct lm_backend *backend)
{
        const struct daemons *d = (const struct daemons *)backend;

        return (struct lm_daemons_job){
                .topology = d->base.place,
                .sum_group = d->config.sum_group ? d->config.sum_group
                                                 : d->info.world / d->info.n_nodes,
        };
}
