/* SPDX-License-Identifier: Apache-2.0 */
/* A worker of the exact job, on its own thread; see exact.h. */
#include "tests/lib/exact.h"

#include "client/experts/comm-daemon.h"
#include "client/experts/optimizer.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/group.h"
#include "tests/lib/test.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define EXPERTS_MAX 64
#define SLOT_LEN 65537 /* rounded up to whole blocks of the norm */

/* What all workers share. */
struct shared {
        const struct exact_run *run;
        const struct exact_reference *ref;
        struct exact_digests *digests; /* each field is written by one rank */
};

struct exact_worker {
        struct cluster_worker *cluster;
        const struct exact_run *run;
        const struct exact_reference *ref;
        struct exact_digests *digests;
        struct ae_group_topology place;
        struct ae_comm_daemon edp;
        struct ae_expert_opt *opt;   /* owned */
        uint32_t first_expert, n_local;
        char *expert_weights;        /* owned */
        int32_t *sum;                /* owned; room for the largest tensor */
        char *room[2];               /* owned; gradients of a unit as they travel, and state read */
};

static uint64_t deadline(void)
{
        return ae_now_ns() + CLUSTER_TIMEOUT_MS * AE_NS_PER_MS;
}

/* ---- joining ---------------------------------------------------------------------------- */

static int register_model(struct exact_worker *w)
{
        const struct exact_model *model = &w->ref->model;
        const uint32_t bf16_group = w->ref->job.bf16_group;
        struct autoep_tensor *tensors = calloc(model->n_tensors, sizeof(*tensors));
        const struct autoep_model request = {
                .size = sizeof(request), .tensors = tensors, .n_tensors = model->n_tensors,
                .optimizer = w->ref->job.optimizer, .ep_size = w->run->ep_size,
                .order = w->run->order,
                .sum_group = bf16_group ? bf16_group : w->run->sum_group,
                .grad_wire = bf16_group ? AUTOEP_BF16 : w->run->grad_wire, .slots = w->run->slots,
                .slot_len = w->run->slots ? SLOT_LEN : 0,
                /* Pages cost more time than these jobs do. */
                .overflow_len = 8 * AE_MIB, .exchange_len = 64 * AE_KIB,
        };
        int r;

        assert(tensors);
        for (uint32_t id = 0; id < model->n_tensors; id++) {
                const struct exact_tensor *t = &model->tensors[id];
                static const char *const units[] = { "embed", "layer", "optional", "big", "head",
                                                     "tied" };
                const struct exact_state *s = exact_state(w->ref, 0, id);

                tensors[id] = (struct autoep_tensor){
                        .size = sizeof(tensors[id]), .name = t->name, .unit = units[t->unit],
                        .dtype = t->dtype, .tensor_class = t->class, .group = t->group,
                        .flags = t->frozen ? AUTOEP_FROZEN : 0, .n_dims = t->n_dims,
                        .alias_of = t->home == id ? NULL : model->tensors[t->home].name,
                };
                memcpy(tensors[id].dims, t->dims, sizeof(t->dims));
                if (w->cluster->rank == 0 && t->home == id && t->class != AUTOEP_EXPERT)
                        tensors[id].init = t->frozen ? s->weight : s->master;
        }
        r = autoep_register(w->cluster->handle, &request, AUTOEP_DEFAULT_TIMEOUT);
        free(tensors);
        CLUSTER_TRY(w->cluster, r);
        return 0;
}

static int add_experts(struct exact_worker *w)
{
        char *weight = w->expert_weights;

        for (uint32_t i = 0; i < w->n_local * EXACT_LAYER_TENSORS; i++) {
                const uint32_t expert = w->first_expert + i / EXACT_LAYER_TENSORS;
                const uint32_t id = exact_expert_tensor(expert) + i % EXACT_LAYER_TENSORS;
                const struct exact_tensor *t = &w->ref->model.tensors[id];
                const struct ae_expert_tensor record = {
                        .name = t->name, .expert = expert, .dtype = t->dtype, .group = t->group,
                        .weight = weight, .n = t->n,
                };
                uint32_t index;

                memcpy(weight, exact_state(w->ref, 0, id)->weight, t->n * ae_dtype_size(t->dtype));
                weight += ae_align_up(t->n * sizeof(float), 64);
                CLUSTER_CHECK(w->cluster, ae_expert_opt_add(w->opt, &record, &index) == 0, "%s",
                              ae_error_text());
        }
        return 0;
}

static int make_experts(struct exact_worker *w)
{
        const struct ae_expert_opt_config config = {
                .rule = w->ref->job.optimizer == AUTOEP_SGD ? AE_EXPERT_SGD : AE_EXPERT_ADAMW,
                .n_groups = 2, .keep_reduced = true,
        };
        const uint32_t n = w->ref->job.n_experts, rank = w->cluster->rank;
        int r = ae_group_init(w->cluster->world, w->run->ep_size, w->run->order, &w->place);

        if (r == 0)
                r = ae_group_check_experts(&w->place, n);
        CLUSTER_CHECK(w->cluster, r == 0, "%s", ae_error_text());
        w->first_expert = ae_group_expert_first(&w->place, n, ae_group_ep_rank(&w->place, rank));
        w->n_local = n / w->run->ep_size;
        w->expert_weights = calloc(w->n_local * EXACT_LAYER_TENSORS, 64 * sizeof(float));
        assert(w->expert_weights);
        r = ae_comm_daemon_init(&w->edp, w->cluster->handle, AUTOEP_GROUP_EDP, w->run->order);
        if (r == 0)
                r = ae_expert_opt_new(&config, &w->opt);
        CLUSTER_CHECK(w->cluster, r == 0, "%s", ae_error_text());
        r = add_experts(w);
        if (r == 0)
                CLUSTER_CHECK(w->cluster, ae_expert_opt_seal(w->opt, &w->edp.comm, deadline()) == 0,
                              "%s", ae_error_text());
        return r;
}

static void make_room(struct exact_worker *w)
{
        uint64_t n = 0;

        for (uint32_t id = 0; id < w->ref->model.n_tensors; id++)
                n += 2 * w->ref->model.tensors[id].n + 16;
        w->sum = calloc(n, sizeof(*w->sum));
        w->room[0] = malloc(n * sizeof(float));
        w->room[1] = malloc(n * sizeof(float));
        assert(w->sum && w->room[0] && w->room[1]);
}

/* ---- gradients -------------------------------------------------------------------------- */

/* Any fp32 value of moderate size, with all its bits. */
static float random_float(uint64_t *x)
{
        *x = *x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        return (float)((double)(int64_t)*x * 0x1p-63 * ((double)(*x >> 20 & 0xfff) + 0.1));
}

static void fill_random(const struct exact_at *at, float *data, uint64_t n)
{
        uint64_t x = ((at->step * 64 + at->micro) * 64 + at->rank) * UINT64_C(1048583) + at->tensor;

        for (int i = 0; i < 4; i++)
                (void)random_float(&x);
        for (uint64_t i = 0; i < n; i++)
                data[i] = random_float(&x);
}

/* This rank's gradient of a dense tensor, fp32 into @data. */
static void fill_gradient(struct exact_worker *w, const struct exact_at *at, float *data,
                          uint64_t n)
{
        if (w->run->random) {
                fill_random(at, data, n);
                return;
        }
        memset(w->sum, 0, n * sizeof(*w->sum));
        exact_gradient_add(&w->ref->job, at, w->sum, n);
        for (uint64_t i = 0; i < n; i++)
                data[i] = (float)w->sum[i] * exact_unit(i);
}

/* What is exact; it differs from rank to rank and tensor to tensor. */
static const void *narrow(const struct exact_at *at, float *data, uint64_t n, uint32_t *ret_dtype)
{
        *ret_dtype = exact_is_wide(at) ? AUTOEP_F32 : AUTOEP_BF16;
        if (*ret_dtype == AUTOEP_F32)
                return data;
        ae_ops()->f32_to_bf16((ae_bf16 *)(data + n), data, n);
        return data + n;
}

static int scatter_unit(struct exact_worker *w, uint32_t step, uint32_t micro, uint32_t unit)
{
        const struct exact_model *model = &w->ref->model;
        const uint32_t rank = w->cluster->rank;
        const bool last = micro + 1 == w->ref->job.accumulate && rank % 2 == 1;
        struct autoep_gradient gradients[EXACT_N_DENSE];
        float *room[] = { (float *)(void *)w->room[0], (float *)(void *)w->room[1] };
        uint32_t n = 0;

        if (!exact_scatters(&w->ref->job, step, micro, rank, unit))
                return 0;
        for (uint32_t id = 0; id < EXACT_N_DENSE; id++) {
                const struct exact_tensor *t = &model->tensors[id];
                const struct exact_at at = { step, micro, rank, id };
                struct autoep_gradient *g = &gradients[n];
                float **to = &room[n % 2];

                if (t->unit != unit || !exact_is_trainable(model, id))
                        continue;
                fill_gradient(w, &at, *to, t->n);
                *g = (struct autoep_gradient){ .size = sizeof(*g), .tensor = id };
                g->data = narrow(&at, *to, t->n, &g->dtype);
                *to += ae_align_up(2 * t->n, 16);
                n++;
        }
        CLUSTER_TRY(w->cluster, autoep_scatter(w->cluster->handle, unit, gradients, n,
                                               last ? AUTOEP_LAST : 0, AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

/* Tokens of the whole EP group reach this rank's experts. */
static void expert_gradients(struct exact_worker *w, uint32_t step, uint32_t micro)
{
        const uint32_t group = ae_group_ep_index(&w->place, w->cluster->rank);

        for (uint32_t i = 0; i < ae_expert_opt_count(w->opt); i++) {
                const uint32_t id = exact_expert_tensor(w->first_expert) + i;
                const uint64_t n = w->ref->model.tensors[id].n;
                float *grad = ae_expert_opt_grad(w->opt, i);

                memset(w->sum, 0, n * sizeof(*w->sum));
                for (uint32_t p = 0; p < w->run->ep_size; p++) {
                        const uint32_t rank = ae_group_ep_member(&w->place, group, p);
                        const struct exact_at at = { step, micro, rank, id };
                        float values[64];

                        if (!w->run->random) {
                                exact_gradient_add(&w->ref->job, &at, w->sum, n);
                                continue;
                        }
                        fill_random(&at, values, n);
                        for (uint64_t j = 0; j < n; j++)
                                grad[j] += values[j];
                }
                for (uint64_t j = 0; !w->run->random && j < n; j++)
                        grad[j] += (float)w->sum[j] * exact_unit(j);
        }
}

/* ---- comparing -------------------------------------------------------------------------- */

static int compare(struct exact_worker *w, const char *what, const char *name, uint32_t step,
                   const void *got, const void *want, uint64_t n, size_t size)
{
        const char *a = got, *b = want;
        float x = 0, y = 0;

        for (uint64_t i = 0; i < n; i++) {
                if (memcmp(a + i * size, b + i * size, size) == 0)
                        continue;
                memcpy((char *)&x + sizeof(x) - size, a + i * size, size);
                memcpy((char *)&y + sizeof(y) - size, b + i * size, size);
                return cluster_failed(
                        w->cluster, __FILE__, __LINE__,
                        "after step %u the %s of %s[%llu] is %a, the reference has %a", step, what,
                        name, (unsigned long long)i, (double)x, (double)y);
        }
        return 0;
}

/* A unit's view against the reference after @step steps. */
static int check_view(struct exact_worker *w, uint32_t unit, uint32_t step)
{
        const struct exact_model *model = &w->ref->model;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        int r = 0;

        CLUSTER_TRY(w->cluster, autoep_gather(w->cluster->handle, unit, AUTOEP_DEFAULT_TIMEOUT,
                                              &view));
        if (view.version != step)
                r = cluster_failed(w->cluster, __FILE__, __LINE__,
                                   "unit %u is at version %llu in step %u", unit,
                                   (unsigned long long)view.version, step);
        for (uint32_t id = 0; id < EXACT_N_DENSE && r == 0 && !w->run->random; id++) {
                const struct exact_tensor *t = &model->tensors[id];
                const void *data = autoep_view_tensor(w->cluster->handle, &view, id);

                if (t->unit != unit || t->home != id)
                        continue;
                if (!data)
                        r = cluster_failed(w->cluster, __FILE__, __LINE__, "%s is not in the view",
                                           t->name);
                else
                        r = compare(w, "gathered weight", t->name, step, data,
                                    exact_state(w->ref, step, id)->weight, t->n,
                                    ae_dtype_size(t->dtype));
        }
        CLUSTER_TRY(w->cluster, autoep_release(w->cluster->handle, &view));
        return r;
}

struct kind {
        uint32_t what;
        const char *name;
        size_t off;
};

static const struct kind kinds[] = {
        { AUTOEP_WEIGHT, "weight", offsetof(struct exact_state, weight) },
        { AUTOEP_MASTER, "master", offsetof(struct exact_state, master) },
        { AUTOEP_GRADIENT, "gradient", offsetof(struct exact_state, gradient) },
        { AUTOEP_MOMENT1, "first moment", offsetof(struct exact_state, m) },
        { AUTOEP_MOMENT2, "second moment", offsetof(struct exact_state, v) },
};

static uint64_t digest(uint64_t hash, const void *data, size_t len)
{
        const unsigned char *bytes = data;

        for (size_t i = 0; i < len; i++)
                hash = (hash ^ bytes[i]) * UINT64_C(0x100000001b3);
        return hash;
}

static bool has_kind(const struct exact_worker *w, uint32_t id, uint32_t what)
{
        if (what == AUTOEP_WEIGHT)
                return true;
        if (what == AUTOEP_MOMENT2 && w->ref->job.optimizer == AUTOEP_SGD)
                return false;
        return exact_is_trainable(&w->ref->model, id);
}

/* A dense tensor's whole state, as any rank may read it; an alias reads its home's. After @skipped
 * rounds it is what the step before left, without the gradient. */
static int check_tensor(struct exact_worker *w, uint32_t id, uint32_t step, bool skipped)
{
        const struct exact_tensor *t = &w->ref->model.tensors[id];
        const struct exact_state *state = exact_state(w->ref, step + !skipped, id);
        uint64_t hash = 0;

        for (size_t k = 0; k < AE_ARRAY_LEN(kinds); k++) {
                const size_t size = kinds[k].what == AUTOEP_WEIGHT ? ae_dtype_size(t->dtype) : 4;
                const void *want =
                        *(void *const *)(const void *)((const char *)state + kinds[k].off);

                if (!has_kind(w, id, kinds[k].what) ||
                    (skipped && kinds[k].what == AUTOEP_GRADIENT))
                        continue;
                memset(w->room[0], 0xee, t->n * size);
                CLUSTER_TRY(w->cluster, autoep_get(w->cluster->handle, id, kinds[k].what, 0, t->n,
                                                   w->room[0], AUTOEP_DEFAULT_TIMEOUT));
                hash = digest(hash, w->room[0], t->n * size);
                if (!w->run->random && compare(w, kinds[k].name, t->name, step, w->room[0], want,
                                               t->n, size) < 0)
                        return -1;
        }
        if (w->run->random)
                w->digests->states[step][id] = hash;
        return 0;
}

static int check_expert(struct exact_worker *w, uint32_t index, const void *weight, uint32_t step,
                        bool skipped)
{
        const uint32_t id = exact_expert_tensor(w->first_expert) + index;
        const struct exact_tensor *t = &w->ref->model.tensors[id];
        const struct exact_state *want = exact_state(w->ref, step + !skipped, id);
        const uint32_t expert = w->first_expert + index / EXACT_LAYER_TENSORS;
        struct ae_expert_state s;
        int r = ae_expert_opt_state(w->opt, index, &s);

        CLUSTER_CHECK(w->cluster, r == 0, "%s", ae_error_text());
        if (w->run->random) {
                uint64_t *hash = &w->digests->experts[step][expert];

                if (w->edp.comm.position != 0)
                        return 0;
                *hash = digest(digest(*hash, s.master, t->n * 4), s.reduced, t->n * 4);
                return 0;
        }
        CLUSTER_CHECK(w->cluster, s.step == want->steps, "%s took %llu steps", t->name,
                      (unsigned long long)s.step);
        r = compare(w, "weight", t->name, step, weight, want->weight, t->n,
                    ae_dtype_size(t->dtype));
        if (r == 0)
                r = compare(w, "master", t->name, step, s.master, want->master, t->n, 4);
        if (r == 0 && !skipped)
                r = compare(w, "gradient", t->name, step, s.reduced, want->gradient, t->n, 4);
        if (r == 0 && s.moment[0] && w->ref->job.optimizer == AUTOEP_ADAMW)
                r = compare(w, "first moment", t->name, step, s.moment[0], want->m, t->n, 4);
        if (r == 0 && s.moment[1])
                r = compare(w, "second moment", t->name, step, s.moment[1], want->v, t->n, 4);
        return r;
}

static int check_number(struct exact_worker *w, const char *name, double got, double want)
{
        CLUSTER_CHECK(w->cluster, memcmp(&got, &want, sizeof(got)) == 0,
                      "the verdict's %s is %.17g, the reference has %.17g", name, got, want);
        return 0;
}

/* The verdict names the last expert of the rank that had the Inf. */
static int check_skipped(struct exact_worker *w, const struct autoep_verdict *v, uint32_t step)
{
        const uint32_t n = w->ref->job.n_experts, position =
                ae_group_ep_rank(&w->place, w->run->bad_rank);
        const uint32_t expert = ae_group_expert_first(&w->place, n, position) + w->n_local - 1;
        const char *name = w->ref->model.tensors[exact_expert_tensor(expert)].name;

        CLUSTER_CHECK(w->cluster, v->kind == AUTOEP_SKIPPED && v->version == step,
                      "verdict %u, version %llu: %s", v->kind, (unsigned long long)v->version,
                      v->why);
        CLUSTER_CHECK(w->cluster, v->bad_rank == w->run->bad_rank && strstr(v->why, name),
                      "rank %u and '%s' are to blame, not rank %u and %s", v->bad_rank, v->why,
                      w->run->bad_rank, name);
        return 0;
}

static int check_verdict(struct exact_worker *w, const struct autoep_verdict *v, uint32_t step)
{
        const struct exact_verdict *want = &w->ref->verdicts[step];
        int r;

        CLUSTER_CHECK(w->cluster, v->kind == AUTOEP_APPLIED && v->version == step + 1,
                      "verdict %u, version %llu: %s", v->kind, (unsigned long long)v->version,
                      v->why);
        CLUSTER_CHECK(w->cluster,
                      v->micro_batches == w->cluster->world * w->ref->job.accumulate,
                      "%llu micro-batches", (unsigned long long)v->micro_batches);
        if (w->run->random) {
                if (w->cluster->rank == 0)
                        w->digests->verdicts[step] = (struct exact_verdict){
                                v->scale, v->norm, v->clip, v->grad_scale };
                return 0;
        }
        r = check_number(w, "scale", v->scale, want->scale);
        if (r == 0)
                r = check_number(w, "norm", v->norm, want->norm);
        if (r == 0)
                r = check_number(w, "clip", v->clip, want->clip);
        if (r == 0)
                r = check_number(w, "grad_scale", v->grad_scale, want->grad_scale);
        return r;
}

/* ---- a step ----------------------------------------------------------------------------- */

static int step_experts(struct exact_worker *w, const struct autoep_verdict *verdict)
{
        struct ae_expert_group_step groups[2];
        const struct ae_expert_verdict experts = {
                .applied = verdict->kind == AUTOEP_APPLIED, .grad_scale = verdict->grad_scale,
                .groups = groups, .n_groups = 2,
        };

        for (uint32_t g = 0; g < 2; g++) {
                const struct autoep_hyper *h = &verdict->hyper[g];

                groups[g] = (struct ae_expert_group_step){
                        .hyper = { .lr = h->lr, .beta1 = h->beta1, .beta2 = h->beta2,
                                   .eps = h->eps, .weight_decay = h->weight_decay },
                        .idle = verdict->absent_groups >> g & 1,
                };
        }
        CLUSTER_CHECK(w->cluster, ae_expert_opt_step(w->opt, &experts) == 0, "%s",
                      ae_error_text());
        return 0;
}

static void spoil(struct exact_worker *w)
{
        ae_expert_opt_grad(w->opt, ae_expert_opt_count(w->opt) - EXACT_LAYER_TENSORS)[7] =
                -INFINITY;
}

static int ask(struct exact_worker *w, uint32_t step, bool skipped)
{
        const bool bad = skipped && w->run->bad_rank == w->cluster->rank;
        struct autoep_hyper hyper[2];
        uint64_t counts[EXPERTS_MAX];
        struct ae_expert_report report;
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        struct autoep_step request = {
                .size = sizeof(request), .hyper = hyper, .n_groups = 2,
                .max_norm = w->ref->job.max_norm, .balance_rate = EXACT_BALANCE_RATE,
                .counts = counts, .n_counts = w->ref->job.n_experts,
        };
        int r;

        if (bad)
                spoil(w);
        r = ae_expert_opt_reduce(w->opt, &w->edp.comm, deadline(), &report);
        CLUSTER_CHECK(w->cluster, r == 0, "%s", ae_error_text());
        CLUSTER_CHECK(w->cluster, report.nonfinite == bad, "reduce reports '%s'", report.text);
        request.expert_nonfinite = report.nonfinite ? report.text : NULL;
        exact_hyper(&w->ref->job, step, hyper);
        for (uint32_t e = 0; e < w->ref->job.n_experts; e++)
                counts[e] = exact_count(&w->ref->job, step, w->cluster->rank, e);
        memcpy(&request.expert_norm2, &report.norm2, sizeof(report.norm2));
        CLUSTER_TRY(w->cluster, autoep_step(w->cluster->handle, &request, AUTOEP_DEFAULT_TIMEOUT,
                                            &verdict));
        r = skipped ? check_skipped(w, &verdict, step) : check_verdict(w, &verdict, step);
        return r < 0 ? r : step_experts(w, &verdict);
}

/* Units in an order that differs from rank to rank. */
static int micro_batch(struct exact_worker *w, uint32_t step, uint32_t micro)
{
        for (uint32_t i = 0; i < EXACT_N_UNITS; i++) {
                const uint32_t unit = (i + w->cluster->rank) % EXACT_N_UNITS;

                if (micro == 0 && check_view(w, unit, step) < 0)
                        return -1;
                if (scatter_unit(w, step, micro, unit) < 0)
                        return -1;
        }
        expert_gradients(w, step, micro);
        /* The step closes the last one by itself, where one rank in three leaves that to it. */
        if (micro + 1 < w->ref->job.accumulate || w->cluster->rank % 3 != 2)
                CLUSTER_TRY(w->cluster, autoep_micro_batch_end(w->cluster->handle));
        return 0;
}

static int check_all(struct exact_worker *w, uint32_t step, bool skipped)
{
        const char *weight = w->expert_weights;

        for (uint32_t id = 0; id < EXACT_N_DENSE; id++) {
                if ((id + step) % w->cluster->world == w->cluster->rank &&
                    check_tensor(w, id, step, skipped) < 0)
                        return -1;
        }
        for (uint32_t i = 0; i < ae_expert_opt_count(w->opt); i++) {
                const uint32_t id = exact_expert_tensor(w->first_expert) + i;

                if (check_expert(w, i, weight, step, skipped) < 0)
                        return -1;
                weight += ae_align_up(w->ref->model.tensors[id].n * sizeof(float), 64);
        }
        CLUSTER_CHECK(w->cluster, ae_expert_opt_compare(w->opt, &w->edp.comm, deadline()) == 0,
                      "%s", ae_error_text());
        return 0;
}

/* Nobody scatters again before all have read the reduced gradients. */
static int do_round(struct exact_worker *w, uint32_t step, bool skipped)
{
        for (uint32_t micro = 0; micro < w->ref->job.accumulate; micro++) {
                if (micro_batch(w, step, micro) < 0)
                        return -1;
        }
        if (ask(w, step, skipped) < 0 || check_all(w, step, skipped) < 0)
                return -1;
        return cluster_barrier(w->cluster);
}

/* Rank 0 closes without leaving; a step of the others ends with that, by name. */
static int lose(struct exact_worker *w)
{
        const struct autoep_hyper hyper[2] = { { .lr = 0 } };
        const struct autoep_step request = { .size = sizeof(request), .hyper = hyper,
                                             .n_groups = 2 };
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;

        if (w->cluster->rank == 0) {
                autoep_close(w->cluster->handle);
                w->cluster->handle = NULL;
                return 1;
        }
        CLUSTER_REFUSED(w->cluster, autoep_step(w->cluster->handle, &request,
                                                AUTOEP_DEFAULT_TIMEOUT, &verdict),
                        AUTOEP_ELOST, "rank 0");
        return 1;
}

static void say_where(const struct exact_worker *w, uint32_t step)
{
        if (w->run->at)
                w->run->at(w->run->arg, step);
}

static int train(struct exact_worker *w)
{
        int r;

        for (uint32_t step = 0; step < EXACT_STEPS; step++) {
                say_where(w, step);
                if (w->run->bad && w->run->bad_step == step && do_round(w, step, true) < 0)
                        return -1;
                if (do_round(w, step, false) < 0)
                        return -1;
        }
        for (uint32_t unit = 0; unit < EXACT_N_UNITS; unit++) {
                if (check_view(w, unit, EXACT_STEPS) < 0)
                        return -1;
        }
        r = w->run->lost ? lose(w) : 0;
        say_where(w, EXACT_STEPS);
        return r;
}

static int run_worker(struct cluster_worker *worker)
{
        const struct shared *shared = worker->user;
        struct exact_worker w = { .cluster = worker, .run = shared->run, .ref = shared->ref,
                                  .digests = shared->digests };
        int r = register_model(&w);

        make_room(&w);
        if (r == 0)
                r = make_experts(&w);
        if (r == 0)
                r = train(&w);
        ae_expert_opt_free(w.opt);
        ae_comm_daemon_deinit(&w.edp);
        free(w.expert_weights);
        free(w.sum);
        free(w.room[0]);
        free(w.room[1]);
        return r;
}

int exact_run(const struct exact_run *run, const struct exact_reference *reference,
              struct exact_digests *ret_digests)
{
        struct shared shared = { .run = run, .ref = reference, .digests = ret_digests };

        assert(cluster_world(&run->cluster) == reference->job.world);
        assert(run->random == (ret_digests != NULL));
        assert(run->random || (run->grad_wire == 0 && run->sum_group == 0));
        if (ret_digests)
                memset(ret_digests, 0, sizeof(*ret_digests));
        return cluster_run(&run->cluster, run_worker, &shared);
}

int exact_run_both(const struct exact_run runs[2], struct exact_reference *const references[2])
{
        struct shared shared[2];
        struct cluster_job jobs[2];

        for (int i = 0; i < 2; i++) {
                assert(cluster_world(&runs[i].cluster) == references[i]->job.world);
                assert(runs[i].cluster.n_nodes == runs[0].cluster.n_nodes && !runs[i].random);
                shared[i] = (struct shared){ .run = &runs[i], .ref = references[i] };
                jobs[i] = (struct cluster_job){ .fn = run_worker, .user = &shared[i] };
                memcpy(jobs[i].workers, runs[i].cluster.workers, sizeof(jobs[i].workers));
        }
        return cluster_run_jobs(&runs[0].cluster, jobs, 2);
}
