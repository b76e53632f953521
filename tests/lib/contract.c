/* SPDX-License-Identifier: Apache-2.0 */
/* See contract.h. Everything runs on a worker's thread. */
#include "tests/lib/contract.h"

#include "kernels/ops.h"
#include "proto/base/num.h"
#include "tests/lib/test.h"

#include <math.h>
#include <string.h>

struct row {
        const char *name, *unit;
        uint32_t dtype, class, group, flags;
        uint64_t n;
        const char *alias_of;
        float init;
};

static const struct row rows[CONTRACT_N_TENSORS] = {
        [CONTRACT_A] = { "a.w", "a", AUTOEP_BF16, AUTOEP_DENSE, 0, 0, CONTRACT_N_A, NULL,
                         0.3333333f },
        [CONTRACT_NORM] = { "a.norm", "a", AUTOEP_F32, AUTOEP_DENSE, 1, 0, CONTRACT_N_NORM, NULL,
                            1.0f },
        [CONTRACT_B] = { "b.w", "b", AUTOEP_F32, AUTOEP_DENSE, 0, 0, CONTRACT_N_B, NULL, -0.7f },
        [CONTRACT_FROZEN] = { "b.frozen", "b", AUTOEP_F32, AUTOEP_DENSE, 0, AUTOEP_FROZEN, 9, NULL,
                              5.0f },
        [CONTRACT_BIAS] = { "b.bias", "b", AUTOEP_F32, AUTOEP_BUFFER, 0, 0, 4, NULL, 0.0f },
        [CONTRACT_TIED] = { "c.w", "c", AUTOEP_BF16, AUTOEP_DENSE, 0, 0, CONTRACT_N_A, "a.w", 0 },
};

const struct autoep_hyper contract_sgd[2] = { { .lr = 1 }, { .lr = 1 } };
const struct autoep_hyper contract_adam[2] = {
        { .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1 },
        { .lr = 3e-3, .beta1 = 0.8, .beta2 = 0.99, .eps = 1e-8 },
};

/* ---- the reference ---------------------------------------------------------------------- */

void contract_reference_init(struct contract_reference *reference)
{
        *reference = (struct contract_reference){ 0 };
        for (uint32_t id = 0; id < CONTRACT_N_TENSORS; id++)
                reference->tensors[id].p = rows[id].init;
}

void contract_adamw(struct contract_reference *reference, uint32_t tensor, float g,
                    const struct autoep_hyper *hyper, double grad_scale)
{
        struct contract_number *t = &reference->tensors[tensor];
        const struct ae_hyper h = { .lr = hyper->lr, .beta1 = hyper->beta1, .beta2 = hyper->beta2,
                                    .eps = hyper->eps, .weight_decay = hyper->weight_decay };
        struct ae_adamw k;
        float scaled;

        ae_adamw_scalars(&h, ++t->steps, grad_scale, &k);
        scaled = g * k.grad_scale;
        t->p *= k.decay;
        t->m = k.beta1 * t->m + k.one_minus_beta1 * scaled;
        t->v = k.beta2 * t->v + (k.one_minus_beta2 * scaled) * scaled;
        t->p -= (k.step_size * t->m) / (sqrtf(t->v) / k.bc2_sqrt + k.eps);
}

/* ---- the job ---------------------------------------------------------------------------- */

int contract_register(struct cluster_worker *worker, const struct autoep_model *model)
{
        struct autoep_tensor tensors[CONTRACT_N_TENSORS];
        float init[CONTRACT_N_TENSORS][CONTRACT_N_MAX];
        struct autoep_model request = *model;

        for (uint32_t id = 0; id < CONTRACT_N_TENSORS; id++) {
                const struct row *row = &rows[id];

                for (uint64_t i = 0; i < row->n; i++)
                        init[id][i] = row->init;
                tensors[id] = (struct autoep_tensor){
                        .size = sizeof(tensors[id]), .name = row->name, .unit = row->unit,
                        .dtype = row->dtype, .tensor_class = row->class, .group = row->group,
                        .flags = row->flags, .n_dims = 1, .dims = { row->n },
                        .alias_of = row->alias_of,
                        .init = worker->rank == 0 && !row->alias_of ? init[id] : NULL,
                };
        }
        request.size = sizeof(request);
        request.tensors = tensors;
        request.n_tensors = CONTRACT_N_TENSORS;
        request.overflow_len = AE_MIB; /* pages cost more time than these jobs do */
        request.exchange_len = 64 * AE_KIB;
        CLUSTER_TRY(worker, autoep_register(worker->handle, &request, AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

int contract_scatter(struct cluster_worker *worker, uint32_t unit, float g)
{
        static const struct {
                uint32_t n, tensors[2];
        } of_unit[] = {
                { 2, { CONTRACT_A, CONTRACT_NORM } },
                { 1, { CONTRACT_B } },
                { 1, { CONTRACT_TIED } },
        };
        struct autoep_gradient gradients[2];
        float wide[CONTRACT_N_MAX];
        ae_bf16 narrow[CONTRACT_N_MAX];

        for (uint32_t i = 0; i < CONTRACT_N_MAX; i++)
                wide[i] = g;
        ae_ops()->f32_to_bf16(narrow, wide, CONTRACT_N_MAX);
        for (uint32_t i = 0; i < of_unit[unit].n; i++)
                gradients[i] = (struct autoep_gradient){
                        .size = sizeof(gradients[i]), .tensor = of_unit[unit].tensors[i],
                        .dtype = worker->rank % 2 ? AUTOEP_BF16 : AUTOEP_F32,
                        .data = worker->rank % 2 ? (const void *)narrow : wide,
                };
        CLUSTER_TRY(worker, autoep_scatter(worker->handle, unit, gradients, of_unit[unit].n, 0,
                                           AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

struct autoep_step contract_step(const struct autoep_hyper hyper[2])
{
        return (struct autoep_step){ .size = sizeof(struct autoep_step), .hyper = hyper,
                                     .n_groups = 2, .scale = 1 };
}

int contract_ask(struct cluster_worker *worker, const struct autoep_step *step, uint32_t kind,
                 struct autoep_verdict *ret_verdict)
{
        *ret_verdict = (struct autoep_verdict)AUTOEP_VERDICT_INIT;
        CLUSTER_TRY(worker, autoep_step(worker->handle, step, AUTOEP_DEFAULT_TIMEOUT, ret_verdict));
        CLUSTER_CHECK(worker, ret_verdict->kind == kind, "the verdict is %u, not %u: %s",
                      ret_verdict->kind, kind, ret_verdict->why);
        return 0;
}

int contract_exchange(struct cluster_worker *worker)
{
        uint64_t lens[4];
        uint32_t mine[4], theirs[4] = { 0 };

        for (uint32_t rank = 0; rank < worker->world; rank++) {
                lens[rank] = sizeof(mine[0]);
                mine[rank] = 100 * worker->rank + rank;
        }
        CLUSTER_TRY(worker, autoep_exchange(worker->handle, AUTOEP_GROUP_WORLD, mine, lens, theirs,
                                            lens, AUTOEP_DEFAULT_TIMEOUT));
        for (uint32_t rank = 0; rank < worker->world; rank++)
                CLUSTER_CHECK(worker, theirs[rank] == 100 * rank + worker->rank,
                              "from rank %u: %u", rank, theirs[rank]);
        return 0;
}

/* ---- comparing -------------------------------------------------------------------------- */

static int same_all(struct cluster_worker *worker, uint32_t tensor, uint32_t what, const void *data,
                    float want)
{
        const bool narrow = what == AUTOEP_WEIGHT && rows[tensor].dtype == AUTOEP_BF16;
        ae_bf16 want_narrow;

        ae_ops()->f32_to_bf16(&want_narrow, &want, 1);
        for (uint64_t i = 0; i < rows[tensor].n; i++) {
                const ae_bf16 *n = (const ae_bf16 *)data + i;
                const float *f = (const float *)data + i;

                if (narrow)
                        CLUSTER_CHECK(worker, *n == want_narrow,
                                      "weight of %s[%llu] is %#x, not %#x", rows[tensor].name,
                                      (unsigned long long)i, *n, want_narrow);
                else
                        CLUSTER_CHECK(worker, memcmp(f, &want, sizeof(want)) == 0,
                                      "state %u of %s[%llu] is %.9g, not %.9g", what,
                                      rows[tensor].name, (unsigned long long)i, (double)*f,
                                      (double)want);
        }
        return 0;
}

int contract_is(struct cluster_worker *worker, uint32_t tensor, uint32_t what, float want)
{
        float data[CONTRACT_N_MAX];

        CLUSTER_TRY(worker, autoep_get(worker->handle, tensor, what, 0, rows[tensor].n, data,
                                       AUTOEP_DEFAULT_TIMEOUT));
        return same_all(worker, tensor, what, data, want);
}

int contract_check(struct cluster_worker *worker, const struct contract_reference *reference)
{
        static const uint32_t trainable[] = { CONTRACT_A, CONTRACT_NORM, CONTRACT_B,
                                              CONTRACT_TIED };

        for (size_t i = 0; i < AE_ARRAY_LEN(trainable); i++) {
                const uint32_t id = trainable[i];
                const uint32_t home = id == CONTRACT_TIED ? CONTRACT_A : id;
                const struct contract_number *t = &reference->tensors[home];

                if (contract_is(worker, id, AUTOEP_MASTER, t->p) < 0 ||
                    contract_is(worker, id, AUTOEP_WEIGHT, t->p) < 0 ||
                    contract_is(worker, id, AUTOEP_MOMENT1, t->m) < 0 ||
                    contract_is(worker, id, AUTOEP_MOMENT2, t->v) < 0)
                        return -1;
        }
        return contract_is(worker, CONTRACT_FROZEN, AUTOEP_WEIGHT, rows[CONTRACT_FROZEN].init);
}

int contract_check_gathered(struct cluster_worker *worker, uint32_t tensor, float want,
                            uint64_t version)
{
        struct autoep_view view = AUTOEP_VIEW_INIT;
        const uint32_t unit = autoep_unit(worker->handle, rows[tensor].unit);
        const void *data;
        int r = 0;

        CLUSTER_TRY(worker, autoep_gather(worker->handle, unit, AUTOEP_DEFAULT_TIMEOUT, &view));
        data = autoep_view_tensor(worker->handle, &view, tensor);
        if (!data || view.version != version)
                r = cluster_failed(worker, __FILE__, __LINE__, "%s is at version %llu, not %llu",
                                   rows[tensor].name, (unsigned long long)view.version,
                                   (unsigned long long)version);
        if (r == 0)
                r = same_all(worker, tensor, AUTOEP_WEIGHT, data, want);
        CLUSTER_TRY(worker, autoep_release(worker->handle, &view));
        return r;
}
