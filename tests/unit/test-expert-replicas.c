/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The expert optimizer over groups: gradients that don't depend on ep_size, a norm that counts each
 * expert once, replicas that stay equal or are refused.
 */
#include "client/experts/optimizer.h"
#include "proto/base/status.h"

#include "tests/lib/comm-local.h"
#include "tests/lib/test.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static int apply(struct ae_expert_opt *opt, const struct ae_expert_group_step *group,
                 double grad_scale)
{
        const struct ae_expert_verdict verdict = { .applied = true, .grad_scale = grad_scale,
                                                   .groups = group, .n_groups = 1 };

        return ae_expert_opt_step(opt, &verdict);
}

/* ---- gradient scale ---- */

#define N_EXPERTS 4
#define WIDTH 3
#define TOKENS_PER_RANK 6
#define SCALE_WORLD 4

/* Reduced gradients by global expert, from EDP position 0. */
struct scale_job {
        float grad[N_EXPERTS][WIDTH];
        float weight[N_EXPERTS][WIDTH];
        double norm2[SCALE_WORLD];
};

/* What token @t of data rank @rank adds to the gradient of the expert it visits. */
static float token_grad(uint32_t rank, uint32_t t, uint32_t h)
{
        return (float)((int)((rank * 13 + t * 5 + h * 3) % 17) - 8) / 16;
}

static uint32_t token_expert(uint32_t rank, uint32_t t)
{
        return (rank + t * t) % N_EXPERTS;
}

/* An expert's local gradient: the tokens of all ranks of its EP group, as combine brings them. */
static void add_tokens(const struct local_rank *self, uint32_t expert, float *grad)
{
        const uint32_t group = ae_group_ep_index(self->topology, self->rank);

        for (uint32_t p = 0; p < self->topology->ep_size; p++) {
                const uint32_t rank = ae_group_ep_member(self->topology, group, p);

                for (uint32_t t = 0; t < TOKENS_PER_RANK; t++) {
                        for (uint32_t h = 0; token_expert(rank, t) == expert && h < WIDTH; h++)
                                grad[h] += token_grad(rank, t, h);
                }
        }
}

static int add_local_experts(struct ae_expert_opt *opt, const struct local_rank *self,
                             float (*weights)[WIDTH])
{
        const uint32_t n_local = N_EXPERTS / self->topology->ep_size;
        const uint32_t first = n_local * ae_group_ep_rank(self->topology, self->rank);

        for (uint32_t e = 0; e < n_local; e++) {
                char name[64];
                struct ae_expert_tensor tensor = { .name = name, .expert = first + e,
                                                   .dtype = AE_DTYPE_F32, .weight = weights[e],
                                                   .n = WIDTH };
                uint32_t index;
                int r;

                for (uint32_t h = 0; h < WIDTH; h++)
                        weights[e][h] = (float)(first + e) + (float)h / 4;
                (void)snprintf(name, sizeof(name), "layers.0.experts.%u.w1", first + e);
                r = ae_expert_opt_add(opt, &tensor, &index);
                if (r < 0)
                        return r;
        }
        return ae_expert_opt_seal(opt, self->edp, self->deadline_ns);
}

static int one_sgd_round(struct ae_expert_opt *opt, const struct local_rank *self,
                         float (*weights)[WIDTH])
{
        const struct ae_expert_group_step group = { .hyper = { .lr = 1 } };
        const uint32_t n_local = ae_expert_opt_count(opt);
        const uint32_t first = n_local * ae_group_ep_rank(self->topology, self->rank);
        struct scale_job *job = self->arg;
        struct ae_expert_report report;
        int r;

        for (uint32_t e = 0; e < n_local; e++)
                add_tokens(self, first + e, ae_expert_opt_grad(opt, e));
        r = ae_expert_opt_reduce(opt, self->edp, self->deadline_ns, &report);
        if (r < 0)
                return r;
        job->norm2[self->rank] = ae_longacc_round(&report.norm2);
        for (uint32_t e = 0; self->edp->position == 0 && e < n_local; e++)
                memcpy(job->grad[first + e], ae_expert_opt_grad(opt, e), sizeof(job->grad[0]));
        r = apply(opt, &group, 1.0 / SCALE_WORLD);
        for (uint32_t e = 0; self->edp->position == 0 && e < n_local; e++)
                memcpy(job->weight[first + e], weights[e], sizeof(job->weight[0]));
        return r;
}

static int scale_body(const struct local_rank *self)
{
        const struct ae_expert_opt_config config = { .rule = AE_EXPERT_SGD, .n_groups = 1 };
        float weights[N_EXPERTS][WIDTH];
        struct ae_expert_opt *opt;
        int r = ae_expert_opt_new(&config, &opt);

        if (r < 0)
                return r;
        r = add_local_experts(opt, self, weights);
        if (r == 0)
                r = one_sgd_round(opt, self, weights);
        ae_expert_opt_free(opt);
        return r;
}

/* The sum over the tokens of all ranks, whatever the groups. */
static float whole_grad(uint32_t expert, uint32_t h)
{
        float sum = 0;

        for (uint32_t rank = 0; rank < SCALE_WORLD; rank++) {
                for (uint32_t t = 0; t < TOKENS_PER_RANK; t++)
                        sum += token_expert(rank, t) == expert ? token_grad(rank, t, h) : 0;
        }
        return sum;
}

static void check_scale(uint32_t ep_size, uint32_t order)
{
        struct ae_group_topology topology;
        struct scale_job job = { 0 };
        double norm2 = 0, want_norm2 = 0;

        assert_int_equal(ae_group_init(SCALE_WORLD, ep_size, order, &topology), 0);
        if (local_world_run(&topology, scale_body, &job) < 0)
                fail_msg("%s", ae_error_text());
        for (uint32_t i = 0; i < N_EXPERTS * WIDTH; i++) {
                const uint32_t e = i / WIDTH, h = i % WIDTH;
                const float want = whole_grad(e, h), before = (float)e + (float)h / 4;

                want_norm2 += (double)want * (double)want;
                if (job.grad[e][h] != want)
                        fail_msg("ep %u: gradient %g, not %g", ep_size, (double)job.grad[e][h],
                                 (double)want);
                assert_true(job.weight[e][h] == before - want / SCALE_WORLD);
        }
        for (uint32_t r = 0; r < SCALE_WORLD; r++)
                norm2 += job.norm2[r];
        assert_true(norm2 == want_norm2 && norm2 > 0);
}

/* Gradients are multiples of 1/16, so every sum is exact and the reference holds in every bit. */
static void gradients_do_not_depend_on_ep_size(void **state)
{
        (void)state;
        for (uint32_t ep_size = 1; ep_size <= SCALE_WORLD; ep_size *= 2) {
                check_scale(ep_size, AE_ORDER_ED);
                check_scale(ep_size, AE_ORDER_DE);
        }
}

/* ---- norm ---- */

/* EP rank 0's expert has norm^2 20 = 4*4 + 2*2, EP rank 1's 100; two replicas give halves. */
static int norm_body(const struct local_rank *self)
{
        static const float grads[2][2] = { { 4, 2 }, { 6, 8 } };
        const struct ae_expert_opt_config config = { .rule = AE_EXPERT_ADAMW, .n_groups = 1 };
        double *norm2 = self->arg;
        float weight[2] = { 1, 1 };
        struct ae_expert_tensor tensor = { .name = "w", .expert = self->ep->position,
                                           .dtype = AE_DTYPE_F32, .weight = weight, .n = 2 };
        struct ae_expert_report report = { 0 };
        struct ae_expert_opt *opt;
        uint32_t index;
        int r = ae_expert_opt_new(&config, &opt);

        if (r < 0)
                return r;
        r = ae_expert_opt_add(opt, &tensor, &index);
        if (r == 0)
                r = ae_expert_opt_seal(opt, self->edp, self->deadline_ns);
        for (size_t i = 0; r == 0 && i < 2; i++)
                ae_expert_opt_grad(opt, 0)[i] =
                        grads[self->ep->position][i] / (float)self->edp->size;
        if (r == 0)
                r = ae_expert_opt_reduce(opt, self->edp, self->deadline_ns, &report);
        norm2[self->rank] = ae_longacc_round(&report.norm2);
        ae_expert_opt_free(opt);
        return r;
}

static void each_expert_counts_once_in_the_norm(void **state)
{
        (void)state;
        for (uint32_t edp = 1; edp <= 2; edp++) {
                struct ae_group_topology topology;
                double norm2[4] = { 0 }, norm;

                assert_int_equal(ae_group_init(2 * edp, 2, AE_ORDER_ED, &topology), 0);
                assert_int_equal(local_world_run(&topology, norm_body, norm2), 0);
                assert_true(norm2[0] == 20 && norm2[1] == 100 && norm2[2] == 0 && norm2[3] == 0);
                norm = sqrt(norm2[0] + norm2[1] + norm2[2] + norm2[3]);
                assert_true(fabs(norm - 10.954) < 1e-3);
        }
}

/* ---- replicas ---- */

#define REPLICA_N 1000

struct replica_job {
        int tamper; /* which rank 1 does wrong; 0: nothing */
        struct ae_expert_checksum sums[3];
        struct ae_expert_checksum start;
};

enum { TAMPER_NOTHING, TAMPER_WEIGHT, TAMPER_GROUP, TAMPER_COUNT, TAMPER_LATER };

static int adamw_round(struct ae_expert_opt *opt, const struct local_rank *self)
{
        const struct ae_expert_group_step group = {
                .hyper = { .lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                           .weight_decay = 0.1 },
        };
        struct ae_expert_report report;
        int r = ae_expert_opt_reduce(opt, self->edp, self->deadline_ns, &report);

        return r < 0 ? r : apply(opt, &group, 0.11);
}

static int replica_rounds(struct ae_expert_opt *opt, const struct local_rank *self)
{
        struct replica_job *job = self->arg;

        for (int step = 0; step < 4; step++) {
                float *grad = ae_expert_opt_grad(opt, 0);
                int r;

                for (int micro = 0; micro < 2; micro++) {
                        for (size_t i = 0; i < REPLICA_N; i++)
                                grad[i] += (float)sin((double)(i * 7 + self->rank * 3) + step +
                                                      0.1 * micro);
                }
                r = adamw_round(opt, self);
                if (r < 0)
                        return r;
        }
        return ae_expert_opt_checksum(opt, true, &job->sums[self->rank]);
}

static int replica_run(struct ae_expert_opt *opt, const struct local_rank *self)
{
        struct replica_job *job = self->arg;
        ae_bf16 weight[REPLICA_N];
        const bool wrong = self->rank == 1;
        struct ae_expert_tensor tensor = { .name = "x", .layer = 2, .expert = 5,
                                           .dtype = AE_DTYPE_BF16, .weight = weight,
                                           .n = REPLICA_N };
        uint32_t index;
        int r;

        for (size_t i = 0; i < REPLICA_N; i++)
                weight[i] = (ae_bf16)(0x3f00 + i % 200);
        if (wrong && job->tamper == TAMPER_WEIGHT)
                weight[REPLICA_N - 1] ^= 1;
        tensor.group = wrong && job->tamper == TAMPER_GROUP;
        r = ae_expert_opt_add(opt, &tensor, &index);
        tensor.name = "y";
        tensor.group = 0;
        tensor.frozen = true;
        if (r == 0 && wrong && job->tamper == TAMPER_COUNT)
                r = ae_expert_opt_add(opt, &tensor, &index);
        if (r == 0)
                r = ae_expert_opt_seal(opt, self->edp, self->deadline_ns);
        if (r == 0 && self->rank == 0)
                r = ae_expert_opt_checksum(opt, false, &job->start);
        if (r == 0 && job->tamper == TAMPER_NOTHING)
                r = replica_rounds(opt, self);
        if (wrong && job->tamper == TAMPER_LATER)
                weight[3] ^= 4;
        return r == 0 ? ae_expert_opt_compare(opt, self->edp, self->deadline_ns) : r;
}

static int replica_body(const struct local_rank *self)
{
        const struct replica_job *job = self->arg;
        const struct ae_expert_opt_config config = {
                .rule = AE_EXPERT_ADAMW,
                .n_groups = job->tamper == TAMPER_NOTHING ? 1 : 2,
        };
        struct ae_expert_opt *opt;
        int r = ae_expert_opt_new(&config, &opt);

        if (r < 0)
                return r;
        r = replica_run(opt, self);
        ae_expert_opt_free(opt);
        return r;
}

static void replicas_stay_equal_in_every_bit(void **state)
{
        struct ae_group_topology topology;
        struct replica_job job = { 0 };

        (void)state;
        assert_int_equal(ae_group_init(3, 1, AE_ORDER_ED, &topology), 0);
        if (local_world_run(&topology, replica_body, &job) < 0)
                fail_msg("%s", ae_error_text());
        assert_memory_equal(&job.sums[0], &job.sums[1], sizeof(job.sums[0]));
        assert_memory_equal(&job.sums[0], &job.sums[2], sizeof(job.sums[0]));
        assert_memory_not_equal(&job.sums[0], &job.start, sizeof(job.start));
}

static void replicas_that_differ_are_refused(void **state)
{
        static const char *const words[] = {
                [TAMPER_WEIGHT] = "rank 1 has another weight for expert tensor 0 than rank 0",
                [TAMPER_GROUP] = "rank 1 has another name, layer, expert, type, group",
                [TAMPER_COUNT] = "rank 1 registered 2 expert tensors and rank 0 1",
                [TAMPER_LATER] = "rank 1 has another weight or optimizer state",
        };
        struct ae_group_topology topology;

        (void)state;
        assert_int_equal(ae_group_init(3, 1, AE_ORDER_ED, &topology), 0);
        for (int t = TAMPER_WEIGHT; t <= TAMPER_LATER; t++) {
                struct replica_job job = { .tamper = t };

                assert_int_equal(local_world_run(&topology, replica_body, &job), AE_EMISMATCH);
                if (!strstr(ae_error_text(), words[t]))
                        fail_msg("\"%s\" does not say \"%s\"", ae_error_text(), words[t]);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(gradients_do_not_depend_on_ep_size),
                cmocka_unit_test(each_expert_counts_once_in_the_norm),
                cmocka_unit_test(replicas_stay_equal_in_every_bit),
                cmocka_unit_test(replicas_that_differ_are_refused),
        };

        return cmocka_run_group_tests_name("expert-replicas", tests, NULL, NULL);
}
