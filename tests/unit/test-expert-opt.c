/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The expert optimizer: bad values, skips, masters, hyper-parameters per group and step, state in
 * and out, misuse.
 */
#include "client/experts/optimizer.h"
#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/comm-local.h"
#include "tests/lib/normref.h"
#include "tests/lib/test.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* A group of one rank, for tests that need no other. */
static struct ae_comm *alone(void)
{
        static struct comm_local *group;
        static struct ae_comm *comm;
        const uint32_t rank = 0;

        if (!group) {
                group = comm_local_new(&rank, 1);
                assert_int_equal(comm_local_join(group, 0, &comm), 0);
        } else {
                comm_local_leave(comm);
                comm_local_free(group);
                group = NULL;
                comm = NULL;
        }
        return comm;
}

static int make_alone(void **state)
{
        *state = alone();
        return 0;
}

static int drop_alone(void **state)
{
        *state = alone();
        return 0;
}

static const struct ae_hyper hyper = { .lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                                       .weight_decay = 0.1 };

/* One fp32 tensor of group 0, sealed alone. */
static struct ae_expert_opt *make_one(struct ae_comm *comm, enum ae_expert_rule rule,
                                      struct ae_expert_tensor *tensor)
{
        const struct ae_expert_opt_config config = { .rule = rule, .n_groups = 1,
                                                     .keep_reduced = true };
        struct ae_expert_opt *opt;
        uint32_t index;

        assert_int_equal(ae_expert_opt_new(&config, &opt), 0);
        assert_int_equal(ae_expert_opt_add(opt, tensor, &index), 0);
        assert_int_equal(index, 0);
        assert_int_equal(ae_expert_opt_seal(opt, comm, UINT64_MAX), 0);
        return opt;
}

static int finish(struct ae_expert_opt *opt, const struct ae_expert_group_step *groups,
                  uint32_t n_groups, double grad_scale)
{
        const struct ae_expert_verdict verdict = { .applied = true, .grad_scale = grad_scale,
                                                   .groups = groups, .n_groups = n_groups };

        return ae_expert_opt_step(opt, &verdict);
}

static int drop(struct ae_expert_opt *opt)
{
        const struct ae_expert_verdict verdict = { .applied = false };

        return ae_expert_opt_step(opt, &verdict);
}

/* Reduce and apply with one group. */
static int round_of(struct ae_expert_opt *opt, struct ae_comm *edp, double grad_scale)
{
        const struct ae_expert_group_step group = { .hyper = hyper };
        struct ae_expert_report report;
        int r = ae_expert_opt_reduce(opt, edp, ae_now_ns() + 10 * AE_NS_PER_S, &report);

        return r < 0 ? r : finish(opt, &group, 1, grad_scale);
}

/* ---- bad values and skips ---- */

struct bad_job {
        float bad;
        bool everywhere; /* on all ranks, not on rank 2 alone */
        struct ae_expert_report report[4];
        float weight[4][3];
        bool cleared[4];
};

static int bad_rounds(struct ae_expert_opt *opt, const struct local_rank *self)
{
        struct bad_job *job = self->arg;
        float *grad = ae_expert_opt_grad(opt, 1);
        const struct ae_expert_group_step group = { .hyper = hyper };
        int r;

        grad[0] = 1;
        if (self->rank == 2 || job->everywhere)
                grad[2] = job->bad;
        r = ae_expert_opt_reduce(opt, self->edp, self->deadline_ns, &job->report[self->rank]);
        if (r < 0)
                return r;
        if (!job->everywhere && finish(opt, &group, 1, 1) != AE_ESTATE)
                return ae_fail(AE_EPROTO, "a bad round could be applied");
        r = drop(opt);
        job->cleared[self->rank] = grad[0] == 0 && grad[1] == 0 && grad[2] == 0;
        grad[0] = grad[1] = grad[2] = 0.25F;
        return r < 0 ? r : round_of(opt, self->edp, 1);
}

static int bad_body(const struct local_rank *self)
{
        const struct ae_expert_opt_config config = { .rule = AE_EXPERT_ADAMW, .n_groups = 1 };
        struct bad_job *job = self->arg;
        float first[5] = { 0 };
        struct ae_expert_tensor tensors[2] = {
                { .name = "layers.3.experts.6.w1", .layer = 3, .expert = 6, .dtype = AE_DTYPE_F32,
                  .weight = first, .n = 5 },
                { .name = "layers.3.experts.7.w2", .layer = 3, .expert = 7, .dtype = AE_DTYPE_F32,
                  .weight = job->weight[self->rank], .n = 3 },
        };
        struct ae_expert_opt *opt;
        uint32_t index;
        int r = ae_expert_opt_new(&config, &opt);

        for (size_t i = 0; r == 0 && i < 2; i++)
                r = ae_expert_opt_add(opt, &tensors[i], &index);
        if (r == 0)
                r = ae_expert_opt_seal(opt, self->edp, self->deadline_ns);
        if (r == 0)
                r = bad_rounds(opt, self);
        if (r == 0)
                r = ae_expert_opt_compare(opt, self->edp, self->deadline_ns);
        ae_expert_opt_free(opt);
        return r;
}

static void one_bad_value_is_found_named_and_skipped(void **state)
{
        static const float bad[] = { INFINITY, -INFINITY, NAN };
        struct ae_group_topology topology;
        float clean[3] = { 0 };
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_F32, .weight = clean,
                                           .n = 3 };
        struct ae_expert_opt *opt = make_one(*state, AE_EXPERT_ADAMW, &tensor);

        /* What the round after the skip must give: a first step, from a gradient of 4 * 0.25. */
        for (size_t i = 0; i < 3; i++)
                ae_expert_opt_grad(opt, 0)[i] = 1;
        assert_int_equal(round_of(opt, *state, 1), 0);
        ae_expert_opt_free(opt);

        assert_int_equal(ae_group_init(4, 1, AE_ORDER_ED, &topology), 0);
        for (size_t b = 0; b < AE_ARRAY_LEN(bad); b++) {
                struct bad_job job = { .bad = bad[b] };

                if (local_world_run(&topology, bad_body, &job) < 0)
                        fail_msg("%s", ae_error_text());
                assert_true(job.report[2].nonfinite);
                assert_int_equal(job.report[2].tensor, 1);
                assert_int_equal(job.report[2].element, 2);
                assert_non_null(strstr(job.report[2].text, "layers.3.experts.7.w2"));
                assert_non_null(strstr(job.report[2].text, "layer 3, expert 7"));
                assert_non_null(strstr(job.report[2].text, "on this rank"));
                assert_false(job.report[1].nonfinite);
                assert_false(job.report[3].nonfinite);
                assert_false(job.report[0].nonfinite); /* rank 2 is to be named, not who adds */
                for (size_t r = 0; r < 4; r++) {
                        assert_true(job.cleared[r]);
                        assert_memory_equal(job.weight[r], clean, sizeof(clean));
                }
        }
}

/* Each gradient is finite: nobody is to blame, and who has the norm reports the sum. */
static void a_sum_that_overflows_is_found(void **state)
{
        struct bad_job job = { .bad = FLT_MAX, .everywhere = true };
        struct ae_group_topology topology;

        (void)state;
        assert_int_equal(ae_group_init(4, 1, AE_ORDER_ED, &topology), 0);
        if (local_world_run(&topology, bad_body, &job) < 0)
                fail_msg("%s", ae_error_text());
        for (size_t r = 0; r < 4; r++)
                assert_int_equal(job.report[r].nonfinite, r == 0);
        assert_non_null(strstr(job.report[0].text, "layers.3.experts.7.w2"));
        assert_non_null(strstr(job.report[0].text, "in the sum"));
}

static void a_skip_moves_nothing(void **state)
{
        float weight[3] = { 1, 2, 3 };
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_F32, .weight = weight,
                                           .n = 3 };
        struct ae_expert_opt *opt = make_one(*state, AE_EXPERT_ADAMW, &tensor);
        struct ae_expert_checksum before, after;
        struct ae_expert_report report;

        ae_expert_opt_grad(opt, 0)[1] = 5;
        assert_int_equal(round_of(opt, *state, 1), 0);
        assert_int_equal(ae_expert_opt_checksum(opt, true, &before), 0);

        ae_expert_opt_grad(opt, 0)[1] = 9;
        assert_int_equal(drop(opt), 0); /* a redo before the reduce */
        assert_true(ae_expert_opt_grad(opt, 0)[1] == 0);
        ae_expert_opt_grad(opt, 0)[1] = 9;
        assert_int_equal(ae_expert_opt_reduce(opt, *state, UINT64_MAX, &report), 0);
        assert_int_equal(drop(opt), 0);
        assert_true(ae_expert_opt_grad(opt, 0)[1] == 0);
        assert_int_equal(ae_expert_opt_checksum(opt, true, &after), 0);
        assert_memory_equal(&before, &after, sizeof(before));
        ae_expert_opt_free(opt);
}

/* ---- steps ---- */

static void a_tiny_rate_moves_the_master(void **state)
{
        ae_bf16 weight[2] = { 0x3f80, 0xc000 }; /* 1 and -2 */
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_BF16, .weight = weight,
                                           .n = 2 };
        struct ae_expert_opt *opt = make_one(*state, AE_EXPERT_ADAMW, &tensor);
        const struct ae_expert_group_step group = { .hyper = { .lr = 1e-6, .beta1 = 0.9,
                                                               .beta2 = 0.999, .eps = 1e-8 } };
        struct ae_expert_state view;
        struct ae_expert_report report;

        for (int i = 0; i < 10; i++) {
                ae_expert_opt_grad(opt, 0)[0] = 1;
                ae_expert_opt_grad(opt, 0)[1] = -1;
                assert_int_equal(ae_expert_opt_reduce(opt, *state, UINT64_MAX, &report), 0);
                assert_int_equal(finish(opt, &group, 1, 1), 0);
        }
        assert_int_equal(ae_expert_opt_state(opt, 0, &view), 0);
        assert_true(fabs((double)view.master[0] - (1 - 1e-5)) < 1e-6);
        assert_true(fabs((double)view.master[1] - (-2 + 1e-5)) < 2e-6);
        assert_int_equal(weight[0], 0x3f80);
        assert_int_equal(weight[1], 0xc000);
        assert_int_equal(view.step, 10);
        ae_expert_opt_free(opt);
}

/* The contract's AdamW for one element, written again. */
struct reference {
        float p, m, v;
        int step;
};

static void reference_step(struct reference *ref, const struct ae_hyper *h, double grad_scale,
                           float grad)
{
        const float beta1 = (float)h->beta1, beta2 = (float)h->beta2;
        const float rest1 = (float)(1 - h->beta1), rest2 = (float)(1 - h->beta2);
        float g, size, root, decay, bc2, eps = (float)h->eps;

        ref->step++;
        decay = (float)(1 - h->lr * h->weight_decay);
        size = (float)(h->lr / (1 - pow(h->beta1, ref->step)));
        bc2 = (float)sqrt(1 - pow(h->beta2, ref->step));
        g = grad * (float)grad_scale;
        ref->p = ref->p * decay;
        ref->m = beta1 * ref->m + rest1 * g;
        ref->v = beta2 * ref->v + (rest2 * g) * g;
        root = sqrtf(ref->v) / bc2 + eps;
        ref->p = ref->p - (size * ref->m) / root;
}

/* Warm-up and cosine, another base rate and decay per group; group 2 sits out odd steps. */
static void schedule(int step, struct ae_expert_group_step groups[3])
{
        static const double base[3] = { 1e-3, 5e-4, 2e-3 }, decay[3] = { 0.1, 0, 0.01 };
        const double by = step < 5 ? (step + 1) / 5.0 : 0.5 * (1 + cos(3.14159 * (step - 5) / 15));

        for (int g = 0; g < 3; g++) {
                groups[g] = (struct ae_expert_group_step){ .hyper = hyper };
                groups[g].hyper.lr = base[g] * by;
                groups[g].hyper.weight_decay = decay[g];
        }
        groups[2].idle = step % 2 == 1;
}

static float grad_at(int step, int tensor, size_t i)
{
        return step % 4 == 3 ? 0 : (float)sin(step * 1.7 + tensor * 0.9 + (double)i);
}

static void rates_follow_each_group_and_step(void **state)
{
        const struct ae_expert_opt_config config = { .rule = AE_EXPERT_ADAMW, .n_groups = 3 };
        static const char *const names[] = { "a", "b", "c", "d" };
        float weights[4][7];
        struct reference refs[3][7] = { 0 };
        struct ae_expert_opt *opt;
        uint32_t index;

        assert_int_equal(ae_expert_opt_new(&config, &opt), 0);
        for (int t = 0; t < 4; t++) {
                struct ae_expert_tensor tensor = { .name = names[t], .dtype = AE_DTYPE_F32,
                                                   .group = (uint32_t)t % 3, .frozen = t == 3,
                                                   .weight = weights[t], .n = 7 };

                for (size_t i = 0; i < 7; i++) {
                        weights[t][i] = (float)(i + 1) / (float)(t + 2);
                        if (t < 3)
                                refs[t][i].p = weights[t][i];
                }
                assert_int_equal(ae_expert_opt_add(opt, &tensor, &index), 0);
        }
        assert_int_equal(ae_expert_opt_seal(opt, *state, UINT64_MAX), 0);
        assert_null(ae_expert_opt_grad(opt, 3));
        for (int step = 0; step < 20; step++) {
                const double grad_scale = 0.3 / (step + 1);
                struct ae_expert_group_step groups[3];
                struct ae_expert_report report;

                schedule(step, groups);
                for (int i = 0; i < 21; i++)
                        ae_expert_opt_grad(opt, (uint32_t)i / 7)[i % 7] +=
                                grad_at(step, i / 7, (size_t)i % 7);
                assert_int_equal(ae_expert_opt_reduce(opt, *state, UINT64_MAX, &report), 0);
                assert_int_equal(finish(opt, groups, 3, grad_scale), 0);
                for (int i = 0; i < 21; i++) {
                        struct reference *ref = &refs[i / 7][i % 7];

                        if (!groups[i / 7].idle)
                                reference_step(ref, &groups[i / 7].hyper, grad_scale,
                                               grad_at(step, i / 7, (size_t)i % 7));
                        if (weights[i / 7][i % 7] != ref->p)
                                fail_msg("step %d, tensor %d: %a, not %a", step, i / 7,
                                         (double)weights[i / 7][i % 7], (double)ref->p);
                }
        }
        for (size_t i = 0; i < 7; i++)
                assert_true(weights[3][i] == (float)(i + 1) / 5); /* frozen */
        ae_expert_opt_free(opt);
}

/* Decay and momentum go on where no token came: a step with a zero gradient. */
static void experts_step_without_tokens(void **state)
{
        float weight[1] = { 2 };
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_F32, .weight = weight,
                                           .n = 1 };
        struct ae_expert_opt *opt = make_one(*state, AE_EXPERT_ADAMW, &tensor);
        struct ae_expert_state view;
        float after;

        ae_expert_opt_grad(opt, 0)[0] = 1;
        assert_int_equal(round_of(opt, *state, 1), 0);
        after = weight[0];
        assert_int_equal(round_of(opt, *state, 1), 0);
        assert_true(weight[0] < after);
        assert_int_equal(ae_expert_opt_state(opt, 0, &view), 0);
        assert_int_equal(view.step, 2);
        assert_true(view.reduced[0] == 0);
        ae_expert_opt_free(opt);
}

static void sgd_with_momentum_by_hand(void **state)
{
        float weight[1] = { 1 };
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_F32, .weight = weight,
                                           .n = 1 };
        struct ae_expert_opt *opt = make_one(*state, AE_EXPERT_SGD, &tensor);
        const struct ae_expert_group_step group = { .hyper = { .lr = 0.5, .beta1 = 0.5 } };
        struct ae_expert_report report;
        struct ae_expert_state view;

        for (int i = 0; i < 2; i++) {
                ae_expert_opt_grad(opt, 0)[0] = 0.5F;
                assert_int_equal(ae_expert_opt_reduce(opt, *state, UINT64_MAX, &report), 0);
                assert_true(ae_longacc_round(&report.norm2) == 0.25);
                assert_int_equal(finish(opt, &group, 1, 0.5), 0);
        }
        /* m: 0.25, then 0.125 + 0.25 */
        assert_true(weight[0] == 1 - 0.125F - 0.1875F);
        assert_int_equal(ae_expert_opt_state(opt, 0, &view), 0);
        assert_true(view.moment[0][0] == 0.375F);
        assert_null(view.moment[1]);
        assert_true(view.reduced[0] == 0.5F);
        ae_expert_opt_free(opt);
}

/* ---- norm ---- */

#define NORM_TENSORS 4
#define NORM_N 9000

static const uint32_t norm_lens[NORM_TENSORS] = { NORM_N, 1, 4096, 4097 };

/* Values whose squares don't add up exactly. */
static float norm_value(uint32_t tensor, uint32_t i)
{
        return (float)sin(1 + i + 7919.0 * tensor) * (float)(1 << i * 7 % 17);
}

/* An optimizer with @n tensors from @first on, as one rank of several would hold; what it reports.
 */
static struct ae_longacc norm_of(struct ae_comm *comm, uint32_t first, uint32_t n)
{
        static const char *const names[NORM_TENSORS] = { "a", "b", "c", "d" };
        static float weights[NORM_TENSORS][NORM_N];
        const struct ae_expert_opt_config config = { .rule = AE_EXPERT_SGD, .n_groups = 1 };
        struct ae_expert_report report;
        struct ae_expert_opt *opt;
        uint32_t index;

        assert_int_equal(ae_expert_opt_new(&config, &opt), 0);
        for (uint32_t t = first; t < first + n; t++) {
                const struct ae_expert_tensor tensor = { .name = names[t], .dtype = AE_DTYPE_F32,
                                                         .weight = weights[t], .n = norm_lens[t] };

                assert_int_equal(ae_expert_opt_add(opt, &tensor, &index), 0);
        }
        assert_int_equal(ae_expert_opt_seal(opt, comm, UINT64_MAX), 0);
        for (uint32_t t = first; t < first + n; t++) {
                for (uint32_t i = 0; i < norm_lens[t]; i++)
                        ae_expert_opt_grad(opt, t - first)[i] = norm_value(t, i);
        }
        assert_int_equal(ae_expert_opt_reduce(opt, comm, UINT64_MAX, &report), 0);
        assert_false(report.nonfinite);
        ae_expert_opt_free(opt);
        return report.norm2;
}

/* All tensors on one rank, or on four: not a bit of the sum differs, and it is the right one. */
static void the_norm_does_not_see_who_holds_what(void **state)
{
        const struct ae_longacc whole = norm_of(*state, 0, NORM_TENSORS);
        struct normref ref = { .n_parts = 0 };
        struct ae_longacc sum = { { 0 } };

        for (uint32_t t = NORM_TENSORS; t-- > 0;) {
                const struct ae_longacc part = norm_of(*state, t, 1);

                ae_longacc_join(&sum, &part);
                for (uint32_t i = 0; i < norm_lens[t]; i++)
                        normref_element(&ref, i, norm_value(t, i));
                normref_end(&ref);
        }
        assert_memory_equal(&sum, &whole, sizeof(sum));
        assert_true(ae_longacc_round(&sum) == normref_sum(&ref));
}

/* ---- state in and out, and misuse ---- */

static void a_state_put_back_goes_on_with_the_same_bits(void **state)
{
        ae_bf16 old_weight[4] = { 0x3f80, 0x3f00, 0xbf80, 0x4000 }, new_weight[4] = { 0 };
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_BF16,
                                           .weight = old_weight, .n = 4 };
        struct ae_expert_opt *old = make_one(*state, AE_EXPERT_ADAMW, &tensor), *new;
        struct ae_expert_checksum a, b;
        struct ae_expert_state view;

        for (int step = 0; step < 3; step++) {
                for (size_t i = 0; i < 4; i++)
                        ae_expert_opt_grad(old, 0)[i] = (float)cos(step + (double)i);
                assert_int_equal(round_of(old, *state, 0.7), 0);
        }
        tensor.weight = new_weight;
        new = make_one(*state, AE_EXPERT_ADAMW, &tensor);
        assert_int_equal(ae_expert_opt_state(old, 0, &view), 0);
        assert_int_equal(ae_expert_opt_put(new, 0, &view), 0);
        assert_memory_equal(old_weight, new_weight, sizeof(old_weight));
        for (size_t i = 0; i < 4; i++) {
                ae_expert_opt_grad(old, 0)[i] = 0.3F;
                ae_expert_opt_grad(new, 0)[i] = 0.3F;
        }
        assert_int_equal(round_of(old, *state, 0.7), 0);
        assert_int_equal(round_of(new, *state, 0.7), 0);
        assert_int_equal(ae_expert_opt_checksum(old, true, &a), 0);
        assert_int_equal(ae_expert_opt_checksum(new, true, &b), 0);
        assert_memory_equal(&a, &b, sizeof(a));
        view.n = 3;
        assert_int_equal(ae_expert_opt_put(new, 0, &view), AE_EINVAL);
        ae_expert_opt_free(old);
        ae_expert_opt_free(new);
}

/* Tensors of one size, each of which differs from the first in one thing. */
#define LIKE_N 4u
static struct ae_expert_opt *make_alike(struct ae_comm *comm, enum ae_expert_rule rule,
                                        float weight[LIKE_N])
{
        static const struct ae_expert_tensor like[LIKE_N] = {
                { .name = "layers.0.experts.0.w", .dtype = AE_DTYPE_F32, .n = 1 },
                { .name = "layers.0.experts.0.v", .dtype = AE_DTYPE_F32, .n = 1 },
                { .name = "layers.0.experts.1.w", .expert = 1, .dtype = AE_DTYPE_F32, .n = 1 },
                { .name = "layers.1.experts.0.w", .layer = 1, .dtype = AE_DTYPE_F32, .n = 1 },
        };
        const struct ae_expert_opt_config config = { .rule = rule, .n_groups = 1 };
        struct ae_expert_opt *opt;
        uint32_t index;

        assert_int_equal(ae_expert_opt_new(&config, &opt), 0);
        for (uint32_t i = 0; i < LIKE_N; i++) {
                struct ae_expert_tensor tensor = like[i];

                weight[i] = (float)i;
                tensor.weight = &weight[i];
                assert_int_equal(ae_expert_opt_add(opt, &tensor, &index), 0);
        }
        assert_int_equal(ae_expert_opt_seal(opt, comm, UINT64_MAX), 0);
        return opt;
}

/* A checkpoint whose tensors are not where this rank looks for them is not taken in silence. */
static void a_state_of_another_tensor_is_refused(void **state)
{
        float from_weight[LIKE_N], to_weight[LIKE_N];
        struct ae_expert_opt *from = make_alike(*state, AE_EXPERT_ADAMW, from_weight);
        struct ae_expert_opt *to = make_alike(*state, AE_EXPERT_ADAMW, to_weight);
        struct ae_expert_checksum before, after;
        struct ae_expert_state view;

        assert_int_equal(round_of(from, *state, 1), 0);
        assert_int_equal(ae_expert_opt_checksum(to, true, &before), 0);
        for (uint32_t i = 0; i < LIKE_N * LIKE_N; i++) {
                assert_int_equal(ae_expert_opt_state(from, i / LIKE_N, &view), 0);
                if (i / LIKE_N == i % LIKE_N)
                        continue;
                assert_int_equal(ae_expert_opt_put(to, i % LIKE_N, &view), AE_EINVAL);
                assert_non_null(strstr(ae_error_text(), view.name));
        }
        view.layer = 7; /* the last one's own, but for what is said here */
        assert_int_equal(ae_expert_opt_put(to, LIKE_N - 1, &view), AE_EINVAL);
        view.layer = 1;
        view.expert = 7;
        assert_int_equal(ae_expert_opt_put(to, LIKE_N - 1, &view), AE_EINVAL);
        view.expert = 0;
        view.name = NULL;
        assert_int_equal(ae_expert_opt_put(to, LIKE_N - 1, &view), AE_EINVAL);
        assert_int_equal(ae_expert_opt_checksum(to, true, &after), 0);
        assert_memory_equal(&before, &after, sizeof(after));
        ae_expert_opt_free(to);
        to = make_alike(*state, AE_EXPERT_SGD, to_weight);
        assert_int_equal(ae_expert_opt_state(from, 0, &view), 0);
        assert_int_equal(ae_expert_opt_put(to, 0, &view), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), "another rule"));
        ae_expert_opt_free(from);
        ae_expert_opt_free(to);
}

static int failing_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len,
                             void *recv, const uint64_t *recv_len, uint64_t deadline_ns)
{
        (void)comm, (void)send, (void)send_len, (void)recv, (void)recv_len, (void)deadline_ns;
        return ae_fail(AE_ELOST, "rank 8 is lost");
}

static void a_torn_reduce_can_only_be_dropped(void **state)
{
        static const struct ae_comm_ops ops = { .name = "lost", .alltoallv = failing_alltoallv };
        static const uint32_t ranks[2] = { 3, 8 };
        float weight[1] = { 1 };
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_F32, .weight = weight,
                                           .n = 1 };
        struct ae_expert_opt *opt = make_one(*state, AE_EXPERT_ADAMW, &tensor);
        const struct ae_expert_group_step group = { .hyper = hyper };
        struct ae_expert_report report;
        struct ae_comm lost;

        assert_int_equal(ae_comm_init(&lost, &ops, ranks, 2, 0), 0);
        ae_expert_opt_grad(opt, 0)[0] = 1;
        assert_int_equal(ae_expert_opt_reduce(opt, &lost, 0, &report), AE_ELOST);
        assert_int_equal(finish(opt, &group, 1, 1), AE_ESTATE);
        assert_int_equal(ae_expert_opt_reduce(opt, *state, 0, &report), AE_ESTATE);
        assert_int_equal(drop(opt), 0);
        assert_true(ae_expert_opt_grad(opt, 0)[0] == 0 && weight[0] == 1);
        assert_int_equal(round_of(opt, *state, 1), 0); /* in a group formed anew */
        assert_true(weight[0] != 1);
        ae_comm_deinit(&lost);
        ae_expert_opt_free(opt);
}

static void calls_out_of_turn_are_refused(void **state)
{
        float weight[1] = { 1 };
        struct ae_expert_tensor tensor = { .name = "w", .dtype = AE_DTYPE_F32, .weight = weight,
                                           .n = 1 };
        struct ae_expert_opt *opt = make_one(*state, AE_EXPERT_ADAMW, &tensor);
        const struct ae_expert_group_step groups[2] = { { .hyper = hyper }, { .hyper = hyper } };
        struct ae_expert_report report;
        struct ae_expert_state view;
        uint32_t index;

        assert_int_equal(ae_expert_opt_add(opt, &tensor, &index), AE_ESTATE);
        assert_int_equal(ae_expert_opt_seal(opt, *state, 0), AE_ESTATE);
        assert_int_equal(finish(opt, groups, 1, 1), AE_ESTATE);
        assert_int_equal(ae_expert_opt_reduce(opt, *state, 0, &report), 0);
        assert_int_equal(ae_expert_opt_reduce(opt, *state, 0, &report), AE_ESTATE);
        assert_int_equal(finish(opt, groups, 2, 1), AE_EINVAL);
        assert_int_equal(ae_expert_opt_state(opt, 0, &view), 0);
        assert_int_equal(ae_expert_opt_put(opt, 0, &view), AE_ESTATE);
        assert_int_equal(ae_expert_opt_state(opt, 1, &view), AE_EINVAL);
        assert_int_equal(finish(opt, groups, 1, 1), 0);
        ae_expert_opt_free(opt);
        assert_null(ae_expert_opt_free(NULL));
}

static void wrong_tensors_are_refused(void **state)
{
        const struct ae_expert_opt_config config = { .n_groups = 1 }, none = { .n_groups = 0 };
        float weight[1] = { 1 };
        const struct ae_expert_tensor good = { .name = "w", .dtype = AE_DTYPE_F32,
                                               .weight = weight, .n = 1 };
        struct ae_expert_tensor wrong[5] = { good, good, good, good, good };
        struct ae_expert_checksum checksum;
        struct ae_expert_state view;
        struct ae_expert_opt *opt;
        uint32_t index;

        wrong[0].name = "";
        wrong[1].dtype = AE_DTYPE_I64;
        wrong[2].group = 1;
        wrong[3].n = 0;
        wrong[4].weight = NULL;
        assert_int_equal(ae_expert_opt_new(&none, &opt), AE_EINVAL);
        assert_int_equal(ae_expert_opt_new(&config, &opt), 0);
        for (size_t i = 0; i < AE_ARRAY_LEN(wrong); i++)
                assert_int_equal(ae_expert_opt_add(opt, &wrong[i], &index), AE_EINVAL);
        assert_int_equal(ae_expert_opt_add(opt, &good, &index), 0);
        assert_int_equal(ae_expert_opt_state(opt, 0, &view), AE_ESTATE);
        assert_int_equal(ae_expert_opt_checksum(opt, false, &checksum), AE_ESTATE);
        assert_int_equal(ae_expert_opt_add(opt, &good, &index), 0);
        assert_int_equal(ae_expert_opt_seal(opt, *state, 0), AE_EEXIST);
        assert_non_null(strstr(ae_error_text(), "w was added twice"));
        ae_expert_opt_free(opt);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(one_bad_value_is_found_named_and_skipped),
                cmocka_unit_test(a_sum_that_overflows_is_found),
                cmocka_unit_test(a_skip_moves_nothing),
                cmocka_unit_test(a_tiny_rate_moves_the_master),
                cmocka_unit_test(rates_follow_each_group_and_step),
                cmocka_unit_test(experts_step_without_tokens),
                cmocka_unit_test(sgd_with_momentum_by_hand),
                cmocka_unit_test(the_norm_does_not_see_who_holds_what),
                cmocka_unit_test(a_state_put_back_goes_on_with_the_same_bits),
                cmocka_unit_test(a_state_of_another_tensor_is_refused),
                cmocka_unit_test(a_torn_reduce_can_only_be_dropped),
                cmocka_unit_test(calls_out_of_turn_are_refused),
                cmocka_unit_test(wrong_tensors_are_refused),
        };

        return cmocka_run_group_tests_name("expert-opt", tests, make_alone, drop_alone);
}
