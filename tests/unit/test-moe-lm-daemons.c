/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The example trainer's autoep backend against a stand-in for libautoep: ranks are threads, one
 * table holds the dense parameters, and what the library would refuse ends the test. --check, with
 * the whole path of experts and collectives, has to pass on it.
 */
#include "client/autoep.h"
#include "client/examples/moe-lm/check.h"
#include "client/examples/moe-lm/daemons.h"
#include "client/examples/moe-lm/reference.h"
#include "kernels/ops.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/balance.h"

#include "tests/lib/comm-local.h"
#include "tests/lib/test.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORLD 4
#define MICROS 4
#define TENSORS 256

/* A dense tensor or buffer and what the daemons would keep of it. */
struct stored {
        char name[64], unit[32];
        uint32_t dtype, class, group, home, n_dims;
        uint64_t dims[2], n, step;
        float *master, *m, *v, *sum;
        char *weight;
        float *scattered[MICROS][WORLD]; /* NULL: not */
        bool reduced;
};

struct autoep {
        struct autoep_info info;
        const struct local_rank *self;
        struct ae_comm *all;
        uint32_t micro;
        int views;
};

/* The daemons. Written by rank 0 between two barriers, and by ranks in their own places. */
static struct {
        pthread_barrier_t barrier;
        struct comm_local *world;
        struct stored tensors[TENSORS];
        uint32_t n_tensors, ep_size, order, optimizer;
        uint32_t sum_group;
        struct autoep_step steps[WORLD];
        struct autoep_verdict verdict;
        uint64_t micros;
        uint64_t version;
} hub;

static _Thread_local const struct local_rank *this_rank;
static _Thread_local const char *last_error = "";

static int refuse(int code, const char *why)
{
        last_error = why;
        return code;
}

const char *autoep_last_error(void)
{
        return last_error;
}

int autoep_open(const struct autoep_options *options, autoep **ret_handle)
{
        struct autoep *handle = calloc(1, sizeof(*handle));

        if (!handle || options->size != sizeof(*options))
                return refuse(AUTOEP_EINVAL, "open");
        handle->self = this_rank;
        handle->info = (struct autoep_info){ .size = sizeof(handle->info), .rank = this_rank->rank,
                                             .world = WORLD, .n_nodes = 2, .transport = "none" };
        if (comm_local_join(hub.world, this_rank->rank, &handle->all) < 0)
                return refuse(AUTOEP_ENOMEM, "join");
        *ret_handle = handle;
        return 0;
}

int autoep_leave(autoep *handle, int timeout_ms)
{
        (void)timeout_ms;
        return handle->views ? refuse(AUTOEP_EHELD, "leave") : 0;
}

void autoep_close(autoep *handle)
{
        if (handle)
                comm_local_leave(handle->all);
        free(handle);
}

int autoep_info(const autoep *handle, struct autoep_info *ret_info)
{
        *ret_info = handle->info;
        return 0;
}

static void weight_write(struct stored *t)
{
        if (t->dtype == AUTOEP_BF16)
                ae_ops()->f32_to_bf16((ae_bf16 *)(void *)t->weight, t->master, t->n);
        else
                memcpy(t->weight, t->master, t->n * sizeof(float));
}

static void store(const struct autoep_tensor *record)
{
        struct stored *t = &hub.tensors[hub.n_tensors];

        *t = (struct stored){ .dtype = record->dtype, .class = record->tensor_class,
                              .group = record->group, .home = hub.n_tensors,
                              .n_dims = record->n_dims, .n = 1 };
        hub.n_tensors++;
        snprintf(t->name, sizeof(t->name), "%s", record->name);
        snprintf(t->unit, sizeof(t->unit), "%s", record->unit);
        for (uint32_t i = 0; i < record->n_dims; i++)
                t->n *= record->dims[i];
        for (uint32_t i = 0; record->alias_of && i < hub.n_tensors; i++) {
                if (strcmp(hub.tensors[i].name, record->alias_of) == 0)
                        t->home = i;
        }
        if (record->alias_of || t->class == AUTOEP_EXPERT)
                return;
        t->master = calloc(4 * t->n, sizeof(float));
        t->m = t->master + t->n;
        t->v = t->m + t->n;
        t->sum = t->v + t->n;
        t->weight = calloc(t->n, sizeof(float));
        memcpy(t->master, record->init, t->n * sizeof(float));
        weight_write(t);
}

int autoep_register(autoep *handle, const struct autoep_model *model, int timeout_ms)
{
        struct autoep_info *info = &handle->info;

        (void)timeout_ms;
        pthread_barrier_wait(&hub.barrier);
        if (info->rank == 0) {
                hub.ep_size = model->ep_size;
                hub.order = model->order;
                hub.optimizer = model->optimizer;
                hub.sum_group = model->sum_group ? model->sum_group : WORLD / 2;
                for (uint32_t i = 0; i < model->n_tensors && i < TENSORS; i++)
                        store(&model->tensors[i]);
        }
        pthread_barrier_wait(&hub.barrier);
        info->ep_size = hub.ep_size;
        info->edp_size = WORLD / hub.ep_size;
        info->ep_rank = ae_group_ep_rank(handle->self->topology, info->rank);
        info->edp_rank = ae_group_edp_rank(handle->self->topology, info->rank);
        return model->n_tensors <= TENSORS ? 0 : refuse(AUTOEP_EINVAL, "too many tensors");
}

/* A unit's id is that of its first tensor plus 1000, a tensor's 500 more than its place. */
uint32_t autoep_unit(const autoep *handle, const char *name)
{
        (void)handle;
        for (uint32_t i = 0; i < hub.n_tensors; i++) {
                if (strcmp(hub.tensors[i].unit, name) == 0)
                        return 1000 + i;
        }
        return AUTOEP_NONE;
}

uint32_t autoep_tensor(const autoep *handle, const char *name)
{
        (void)handle;
        for (uint32_t i = 0; i < hub.n_tensors; i++) {
                if (strcmp(hub.tensors[i].name, name) == 0)
                        return 500 + i;
        }
        return AUTOEP_NONE;
}

int autoep_gather(autoep *handle, uint32_t unit, int timeout_ms, struct autoep_view *ret_view)
{
        (void)timeout_ms;
        if (ret_view->size != sizeof(*ret_view) || handle->views >= 2)
                return refuse(AUTOEP_EBUDGET, "gather: more than two views");
        handle->views++;
        ret_view->unit = unit;
        ret_view->version = hub.version;
        ret_view->data = &hub;
        return 0;
}

int autoep_release(autoep *handle, struct autoep_view *view)
{
        if (!view->data)
                return refuse(AUTOEP_EINVAL, "release: not held");
        handle->views--;
        view->data = NULL;
        return 0;
}

const void *autoep_view_tensor(const autoep *handle, const struct autoep_view *view,
                               uint32_t tensor)
{
        const struct stored *t = &hub.tensors[tensor - 500];

        (void)handle;
        if (strcmp(t->unit, hub.tensors[view->unit - 1000].unit) != 0)
                return NULL;
        return hub.tensors[t->home].weight;
}

int autoep_scatter(autoep *handle, uint32_t unit, const struct autoep_gradient *gradients,
                   size_t n, uint32_t flags, int timeout_ms)
{
        const char *name = hub.tensors[unit - 1000].unit;
        size_t n_trainable = 0;

        (void)timeout_ms;
        (void)flags;
        for (uint32_t i = 0; i < hub.n_tensors; i++)
                n_trainable += strcmp(hub.tensors[i].unit, name) == 0 &&
                               hub.tensors[i].class == AUTOEP_DENSE;
        if (n != n_trainable)
                return refuse(AUTOEP_EINVAL, "scatter: not all trainable tensors of the unit");
        for (size_t i = 0; i < n; i++) {
                struct stored *t = &hub.tensors[gradients[i].tensor - 500];
                float **to = &t->scattered[handle->micro][handle->info.rank];

                if (strcmp(t->unit, name) != 0 || gradients[i].size != sizeof(gradients[i]))
                        return refuse(AUTOEP_EINVAL, "scatter: tensor of another unit");
                if (*to)
                        return refuse(AUTOEP_EEXIST, "scatter: twice");
                *to = malloc(t->n * sizeof(float));
                if (gradients[i].dtype == AUTOEP_BF16)
                        ae_ops()->bf16_to_f32(*to, gradients[i].data, t->n);
                else
                        memcpy(*to, gradients[i].data, t->n * sizeof(float));
        }
        return 0;
}

int autoep_micro_batch_end(autoep *handle)
{
        handle->micro++;
        return 0;
}

static void add(float *to, const float *from, size_t n, bool keep)
{
        for (size_t i = 0; i < n; i++)
                to[i] = keep ? to[i] + from[i] : from[i];
}

/* All uses of a home tensor that a sum group scattered, in the contract's order. */
static bool fold_group(uint32_t home, uint32_t group, float *sum)
{
        bool any = false;

        for (uint32_t at = 0; at < MICROS * hub.sum_group; at++) {
                const uint32_t micro = at / hub.sum_group;
                const uint32_t rank = group * hub.sum_group + at % hub.sum_group;

                for (uint32_t i = 0; i < hub.n_tensors; i++) {
                        float **from = &hub.tensors[i].scattered[micro][rank];

                        if (hub.tensors[i].home != home || !*from)
                                continue;
                        add(sum, *from, hub.tensors[i].n, any);
                        any = true;
                        free(*from);
                        *from = NULL;
                }
        }
        return any;
}

static void reduce(uint32_t home, struct ae_longacc *squares)
{
        struct stored *t = &hub.tensors[home];
        float *sum = malloc(t->n * sizeof(float));

        t->reduced = false;
        for (uint32_t group = 0; group < WORLD / hub.sum_group; group++) {
                if (!fold_group(home, group, sum))
                        continue;
                add(t->sum, sum, t->n, t->reduced);
                t->reduced = true;
        }
        free(sum);
        if (t->reduced)
                assert_true(ae_ops()->norm2(t->sum, t->n, squares));
}

static void apply(struct stored *t, const struct autoep_hyper *given, double grad_scale)
{
        const struct ae_hyper hyper = { .lr = given->lr, .beta1 = given->beta1,
                                        .beta2 = given->beta2, .eps = given->eps,
                                        .weight_decay = given->weight_decay };
        struct ae_adamw adamw;
        struct ae_sgd sgd;

        t->step++;
        ae_adamw_scalars(&hyper, t->step, grad_scale, &adamw);
        ae_sgd_scalars(&hyper, grad_scale, &sgd);
        if (hub.optimizer == AUTOEP_SGD)
                ae_ops()->sgd(&sgd, t->master, t->m, t->sum, NULL, 0, t->n);
        else
                ae_ops()->adamw(&adamw, t->master, t->m, t->v, t->sum, NULL, 0, t->n);
        weight_write(t);
}

static void balance(const struct autoep_step *step)
{
        uint64_t *counts = calloc(step->n_counts + 1, sizeof(*counts));
        uint64_t at = 0;

        for (uint32_t i = 0; i < step->n_counts; i++) {
                for (uint32_t rank = 0; rank < WORLD; rank++)
                        counts[i] += hub.steps[rank].counts[i];
        }
        for (uint32_t i = 0; i < hub.n_tensors; i++) {
                struct stored *t = &hub.tensors[i];

                if (t->class != AUTOEP_BUFFER)
                        continue;
                ae_balance_step((float *)(void *)t->weight, counts + at, (uint32_t)t->n,
                                step->balance_rate);
                at += t->n;
        }
        free(counts);
}

static void decide(void)
{
        const struct autoep_step *step = &hub.steps[0];
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        struct ae_longacc squares = { { 0 } }, experts;

        for (uint32_t rank = 0; rank < WORLD; rank++) {
                verdict.tokens += hub.steps[rank].tokens;
                memcpy(&experts, &hub.steps[rank].expert_norm2, sizeof(experts));
                ae_longacc_join(&squares, &experts);
        }
        for (uint32_t i = 0; i < hub.n_tensors; i++) {
                if (hub.tensors[i].class == AUTOEP_DENSE && hub.tensors[i].home == i)
                        reduce(i, &squares);
        }
        verdict.kind = AUTOEP_APPLIED;
        verdict.scale = 1.0 / (double)(step->flags & AUTOEP_USE_TOKENS ? verdict.tokens
                                                                       : hub.micros * WORLD);
        verdict.norm = verdict.scale * sqrt(ae_longacc_round(&squares));
        verdict.clip = ae_clip_factor(verdict.norm, step->max_norm);
        verdict.grad_scale = verdict.scale * verdict.clip;
        memcpy(verdict.hyper, step->hyper, step->n_groups * sizeof(*step->hyper));
        for (uint32_t i = 0; i < hub.n_tensors; i++) {
                if (hub.tensors[i].reduced && hub.tensors[i].home == i)
                        apply(&hub.tensors[i], &step->hyper[hub.tensors[i].group],
                              verdict.grad_scale);
        }
        balance(step);
        hub.version++;
        hub.verdict = verdict;
}

int autoep_step(autoep *handle, const struct autoep_step *step, int timeout_ms,
                struct autoep_verdict *ret_verdict)
{
        (void)timeout_ms;
        if (handle->views)
                return refuse(AUTOEP_EHELD, "step: views are held");
        hub.steps[handle->info.rank] = *step;
        pthread_barrier_wait(&hub.barrier);
        if (handle->info.rank == 0) {
                hub.micros = handle->micro;
                decide();
        }
        pthread_barrier_wait(&hub.barrier);
        handle->micro = 0;
        *ret_verdict = hub.verdict;
        return 0;
}

int autoep_get(autoep *handle, uint32_t tensor, uint32_t what, uint64_t first, uint64_t n,
               void *data, int timeout_ms)
{
        const struct stored *t = &hub.tensors[tensor - 500];
        const void *from = what == AUTOEP_GRADIENT ? (const void *)t->sum
                           : what == AUTOEP_MASTER ? (const void *)t->master : t->weight;

        (void)timeout_ms;
        if (first != 0 || n != t->n || handle->info.rank != 0)
                return refuse(AUTOEP_EINVAL, "get");
        memcpy(data, from, n * sizeof(float));
        return 0;
}

int autoep_announce(autoep *handle, enum autoep_group group, enum autoep_collective kind,
                    uint32_t id, uint64_t len)
{
        (void)handle;
        (void)group;
        (void)id;
        (void)len;
        return kind > AUTOEP_COMBINE ? refuse(AUTOEP_EINVAL, "announce: no such collective") : 0;
}

int autoep_exchange(autoep *handle, enum autoep_group group, const void *send,
                    const uint64_t *send_len, void *recv, const uint64_t *recv_len, int timeout_ms)
{
        struct ae_comm *comm = group == AUTOEP_GROUP_EP ? handle->self->ep
                               : group == AUTOEP_GROUP_EDP ? handle->self->edp : handle->all;

        if (timeout_ms <= 0)
                return refuse(AUTOEP_ETIMEDOUT, "exchange: no time");
        return ae_comm_alltoallv(comm, send, send_len, recv, recv_len,
                                 handle->self->deadline_ns);
}

int autoep_stats(const autoep *handle, struct autoep_stats *ret_stats)
{
        (void)handle;
        ret_stats->gathers = 1234;
        return ret_stats->size == sizeof(*ret_stats) ? 0 : refuse(AUTOEP_EINVAL, "stats");
}

static uint8_t text_bytes[4096];
static struct lm_text text = { .bytes = text_bytes, .n = sizeof(text_bytes), .n_train = 3800 };

/* A run that all ranks share; results by rank. */
struct job {
        struct lm_options options;
        struct lm_spec spec;
        bool passed[WORLD];
        double held_out[WORLD];
        char sample[WORLD][8];
        char words[4096];    /* of the check */
        char moved[1024];
};

static int open_trainers(struct job *job, const struct local_rank *self,
                         struct lm_backend **backend, struct lm_trainer *trainer)
{
        const struct lm_options *o = &job->options;
        const struct lm_daemons_config config = {
                .real = AE_REAL_F64, .ep_size = self->topology->ep_size,
                .order = self->topology->order, .sum_group = o->sum_group, .grad_dtype = o->grads,
                .sgd = o->optimizer, .seed = o->seed,
        };
        int r = lm_daemons_new(&job->spec, &config, backend);

        return r < 0 ? r : lm_trainer_init(trainer, *backend, &text, o);
}

static int open_reference(struct job *job, const struct lm_backend *like,
                          struct lm_backend **backend, struct lm_trainer *trainer)
{
        const struct lm_daemons_job daemons = lm_daemons_job(like);
        const struct lm_reference_config config = {
                .real = AE_REAL_F64, .topology = daemons.topology, .sum_group = daemons.sum_group,
                .grad_dtype = job->options.grads, .sgd = job->options.optimizer,
                .seed = job->options.seed,
        };
        int r = lm_reference_new(&job->spec, &config, backend);

        return r < 0 ? r : lm_trainer_init(trainer, *backend, &text, &job->options);
}

/* What one rank does: the check, then what comes after training. */
static int rank_body(const struct local_rank *self)
{
        struct job *job = self->arg;
        struct lm_backend *backend = NULL, *other = NULL;
        struct lm_trainer trainer = { 0 }, reference = { 0 };
        struct lm_check check = { .trainer = &trainer };
        int r;

        this_rank = self;
        r = open_trainers(job, self, &backend, &trainer);
        if (r == 0 && self->rank == 0) {
                check.reference = &reference;
                check.out = fmemopen(job->words, sizeof(job->words), "w");
                r = open_reference(job, backend, &other, &reference);
        }
        if (r == 0)
                r = lm_check_run(&check, &job->passed[self->rank]);
        if (r == 0)
                r = lm_evaluate(&trainer, &job->held_out[self->rank]);
        if (r == 0)
                r = lm_generate(&trainer, "x", sizeof(job->sample[0]), job->sample[self->rank]);
        if (r == 0 && self->rank == 0)
                backend->ops->describe(backend, job->moved, sizeof(job->moved));
        if (check.out)
                fclose(check.out);
        lm_trainer_deinit(&trainer);
        lm_trainer_deinit(&reference);
        lm_backend_free(backend);
        lm_backend_free(other);
        return r;
}

static void hub_open(void)
{
        uint32_t ranks[WORLD];

        memset(&hub, 0, sizeof(hub));
        for (uint32_t i = 0; i < WORLD; i++)
                ranks[i] = i;
        hub.world = comm_local_new(ranks, WORLD);
        assert_non_null(hub.world);
        assert_int_equal(pthread_barrier_init(&hub.barrier, NULL, WORLD), 0);
}

static void hub_close(void)
{
        for (uint32_t i = 0; i < hub.n_tensors; i++) {
                free(hub.tensors[i].master);
                free(hub.tensors[i].weight);
        }
        comm_local_free(hub.world);
        pthread_barrier_destroy(&hub.barrier);
}

static void run_job(uint32_t ep_size, uint32_t order, const char *const *args)
{
        static const char *const common[] = {
                "moe-lm", "--check", "--steps", "3", "--layers", "2", "--dim", "8", "--heads", "2",
                "--experts", "4", "--expert-dim", "6", "--seq", "8", "--batch", "2",
        };
        struct ae_group_topology topology;
        struct lm_shape shape;
        struct job job = { 0 };
        char *argv[64];
        int argc = 0;

        for (size_t i = 0; i < AE_ARRAY_LEN(common); i++)
                argv[argc++] = (char *)(uintptr_t)common[i];
        for (; *args; args++)
                argv[argc++] = (char *)(uintptr_t)*args;
        assert_int_equal(lm_options_parse(&job.options, argc, argv), 0);
        shape = lm_shape_of(&job.options);
        assert_int_equal(lm_spec_init(&job.spec, &shape), 0);
        assert_int_equal(ae_group_init(WORLD, ep_size, order, &topology), 0);
        hub_open();
        if (local_world_run(&topology, rank_body, &job) < 0)
                fail_msg("%s", ae_error_text());
        for (uint32_t rank = 0; rank < WORLD; rank++) {
                if (!job.passed[rank])
                        fail_msg("rank %u, ep_size %u:\n%s", rank, ep_size, job.words);
                assert_true(job.held_out[rank] == job.held_out[0] && job.held_out[0] > 1);
        }
        assert_non_null(strstr(job.words, "check: 0 of "));
        assert_non_null(strstr(job.moved, "1234 gathers"));
        hub_close();
        lm_spec_deinit(&job.spec);
}

static void check_passes_over_every_grouping(void **state)
{
        static const char *const plain[] = { "--weights", "fp32", NULL };

        (void)state;
        for (uint32_t ep_size = 1; ep_size <= WORLD; ep_size *= 2) {
                run_job(ep_size, AE_ORDER_ED, plain);
                run_job(ep_size, AE_ORDER_DE, plain);
        }
}

static void check_passes_with_every_option(void **state)
{
        static const char *const bf16[] = { "--grads", "bf16", "--accumulate", "3", NULL };
        static const char *const uneven[] = { "--uneven", "--accumulate", "2", "--router",
                                              "sigmoid", "--sum-group", "4", NULL };
        static const char *const sgd[] = { "--optimizer", "sgd", "--balance", "0", "--max-norm",
                                           "0", "--sum-group", "1", NULL };

        (void)state;
        run_job(2, AE_ORDER_ED, bf16);
        run_job(2, AE_ORDER_DE, uneven);
        run_job(4, AE_ORDER_ED, sgd);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(check_passes_over_every_grouping),
                cmocka_unit_test(check_passes_with_every_option),
        };

        for (size_t i = 0; i < sizeof(text_bytes); i++)
                text_bytes[i] = (uint8_t)(i * i / 7 + i % 13);
        return cmocka_run_group_tests_name("moe-lm-daemons", tests, NULL, NULL);
}
