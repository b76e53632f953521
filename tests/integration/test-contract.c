/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The numerics contract as stories: scale, norm, clipping, values that are not finite,
 * hyper-parameters, optimizer groups, requests that differ, redo, balancing. See contract.h for the
 * job.
 */
#include "tests/lib/contract.h"

#include "kernels/ops.h"
#include "proto/base/num.h"
#include "tests/lib/test.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const struct cluster_spec two_by_two = { .n_nodes = 2, .workers = { 2, 2 } };
static const struct cluster_spec uneven = { .n_nodes = 2, .workers = { 1, 3 } };
static const struct autoep_model adamw = { .optimizer = AUTOEP_ADAMW };
static const struct autoep_model sgd = { .optimizer = AUTOEP_SGD };

#define RUN(spec, fn) assert_int_equal(cluster_run(&(spec), fn, NULL), 0)

/* Calls that report their own failures. */
#define DO(call)                                                                                  \
        do {                                                                                      \
                if ((call) < 0)                                                                   \
                        return -1;                                                                \
        } while (0)

/* All ranks read before one of them begins the next round. */
#define MEET(worker) DO(cluster_barrier(worker))

/* ---- scale ------------------------------------------------------------------------------ */

/* Rank r has r tokens, and rank 0, which has none, scatters nothing. */
static int tokens(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        DO(contract_register(w, &sgd));
        if (w->rank > 0)
                DO(contract_scatter(w, CONTRACT_UNIT_B, (float)w->rank));
        step.scale = 0;
        step.flags = AUTOEP_USE_TOKENS;
        step.tokens = w->rank;
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_CHECK(w, v.tokens == 6 && v.scale == 1.0 / 6, "%llu tokens, scale %.17g",
                      (unsigned long long)v.tokens, v.scale);
        DO(contract_is(w, CONTRACT_B, AUTOEP_GRADIENT, 6));
        return contract_is(w, CONTRACT_B, AUTOEP_MASTER, -0.7f - 6 * (float)(1.0 / 6));
}

static void test_tokens(void **state)
{
        (void)state;
        RUN(two_by_two, tokens);
        RUN(uneven, tokens);
}

static int no_tokens(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;

        DO(contract_register(w, &sgd));
        step.scale = 0;
        step.flags = AUTOEP_USE_TOKENS;
        CLUSTER_REFUSED(w, autoep_step(w->handle, &step, AUTOEP_DEFAULT_TIMEOUT, &v),
                        AUTOEP_EMISMATCH, "token");
        return 0;
}

static void test_no_tokens_at_all(void **state)
{
        (void)state;
        RUN(two_by_two, no_tokens);
}

/* Rank r takes r + 1 micro-batches; unless told otherwise s is one over all of them. */
static int micro_batches(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        DO(contract_register(w, &sgd));
        for (uint32_t i = 0; i <= w->rank; i++) {
                DO(contract_scatter(w, CONTRACT_UNIT_B, 0.5f));
                CLUSTER_TRY(w, autoep_micro_batch_end(w->handle));
        }
        step.scale = 0;
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_CHECK(w, v.micro_batches == 10 && v.scale == 0.1, "%llu micro-batches, scale %.17g",
                      (unsigned long long)v.micro_batches, v.scale);
        DO(contract_is(w, CONTRACT_B, AUTOEP_GRADIENT, 5));
        return contract_is(w, CONTRACT_B, AUTOEP_MASTER, -0.7f - 5 * 0.1f);
}

static void test_default_scale(void **state)
{
        (void)state;
        RUN(two_by_two, micro_batches);
        RUN(uneven, micro_batches);
}

/* ---- norm ------------------------------------------------------------------------------- */

/* Two expert groups with norms of sqrt(20) and sqrt(100): squares add up, norms don't. */
static int expert_norms(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        struct autoep_verdict v;

        DO(contract_register(w, &(struct autoep_model){ .ep_size = 2 }));
        CLUSTER_TRY(w, autoep_norm2_add(&step.expert_norm2,
                                        w->rank == 0 ? 20 : w->rank == 1 ? 100 : 0));
        step.max_norm = 2;
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_CHECK(w, fabs(v.norm - 10.954451150103322) < 1e-12, "the norm is %.17g", v.norm);
        CLUSTER_CHECK(w, v.clip == 2 / (v.norm + 1e-6) && v.grad_scale == v.clip,
                      "clip %.17g, factor %.17g", v.clip, v.grad_scale);
        return 0;
}

static void test_expert_norms(void **state)
{
        (void)state;
        RUN(two_by_two, expert_norms);
}

/* 300 elements of 8 * 1 (four ranks, two uses), counted once; clipped to a quarter. */
static int tied_norm(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_sgd);
        const double norm = sqrt(300.0 * 64 + 5.0 * 16);
        struct autoep_verdict v;
        float scale;

        DO(contract_register(w, &sgd));
        DO(contract_scatter(w, CONTRACT_UNIT_A, 1));
        DO(contract_scatter(w, CONTRACT_UNIT_C, 1));
        step.max_norm = norm / 4;
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_CHECK(w, v.norm == norm, "the norm is %.17g, not %.17g", v.norm, norm);
        CLUSTER_CHECK(w, v.clip == norm / 4 / (norm + 1e-6), "clip %.17g", v.clip);
        scale = (float)v.grad_scale;
        DO(contract_is(w, CONTRACT_A, AUTOEP_GRADIENT, 8));
        DO(contract_is(w, CONTRACT_A, AUTOEP_MASTER, 0.3333333f - 8 * scale));
        return contract_is(w, CONTRACT_NORM, AUTOEP_MASTER, 1 - 4 * scale);
}

static void test_tied_counts_once(void **state)
{
        (void)state;
        RUN(two_by_two, tied_norm);
}

/* ---- what is not finite ------------------------------------------------------------------ */

/* A whole round that is right, from the state that a skipped one left. */
static int good_round(struct cluster_worker *w, struct contract_reference *ref, uint64_t version)
{
        struct autoep_step step = contract_step(contract_adam);
        struct autoep_verdict v;

        DO(contract_scatter(w, CONTRACT_UNIT_A, 0.25f));
        DO(contract_scatter(w, CONTRACT_UNIT_B, -0.5f));
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_CHECK(w, v.version == version, "version %llu", (unsigned long long)v.version);
        contract_adamw(ref, CONTRACT_A, 1, &contract_adam[0], 1);
        contract_adamw(ref, CONTRACT_NORM, 1, &contract_adam[1], 1);
        contract_adamw(ref, CONTRACT_B, -2, &contract_adam[0], 1);
        DO(contract_check(w, ref));
        MEET(w);
        return 0;
}

static int bad_expert(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_adam);
        struct contract_reference ref;
        struct autoep_verdict v;

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        DO(good_round(w, &ref, 1));
        DO(contract_scatter(w, CONTRACT_UNIT_A, 3));
        if (w->rank == 1)
                step.expert_nonfinite = "layers.3.experts.17.w1";
        DO(contract_ask(w, &step, AUTOEP_SKIPPED, &v));
        CLUSTER_CHECK(w, v.version == 1 && v.bad_rank == 1 && strstr(v.why, "experts.17"),
                      "version %llu, rank %u, '%s'", (unsigned long long)v.version, v.bad_rank,
                      v.why);
        DO(contract_check(w, &ref));
        MEET(w);
        return good_round(w, &ref, 2);
}

static void test_bad_expert_skips(void **state)
{
        (void)state;
        RUN(two_by_two, bad_expert);
}

/* NaN in element 17 of a bf16 gradient of rank 2; Inf in an fp32 one. */
static int scatter_bad(struct cluster_worker *w, uint32_t tensor)
{
        ae_bf16 narrow[CONTRACT_N_A] = { 0 };
        float wide[CONTRACT_N_NORM] = { 0 };
        const struct autoep_gradient gradients[] = {
                { .size = sizeof(gradients[0]), .tensor = CONTRACT_A, .dtype = AUTOEP_BF16,
                  .data = narrow },
                { .size = sizeof(gradients[0]), .tensor = CONTRACT_NORM, .dtype = AUTOEP_F32,
                  .data = wide },
        };

        if (tensor == CONTRACT_A)
                narrow[17] = 0x7fc0;
        else
                wide[4] = -INFINITY;
        CLUSTER_TRY(w, autoep_scatter(w->handle, CONTRACT_UNIT_A, gradients, 2, 0,
                                      AUTOEP_DEFAULT_TIMEOUT));
        return 0;
}

static int bad_dense(struct cluster_worker *w)
{
        static const uint32_t bad[] = { CONTRACT_A, CONTRACT_NORM };
        struct autoep_step step = contract_step(contract_adam);
        struct contract_reference ref;
        struct autoep_verdict v;

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        for (uint32_t i = 0; i < 2; i++) {
                DO(w->rank == 2 ? scatter_bad(w, bad[i]) : contract_scatter(w, CONTRACT_UNIT_A, 1));
                DO(contract_scatter(w, CONTRACT_UNIT_B, 1));
                DO(contract_ask(w, &step, AUTOEP_SKIPPED, &v));
                CLUSTER_CHECK(w, v.bad_unit == CONTRACT_UNIT_A && v.bad_tensor == bad[i] &&
                              v.bad_rank == 2, "unit %u, tensor %u, rank %u", v.bad_unit,
                              v.bad_tensor, v.bad_rank);
                CLUSTER_CHECK(w, strstr(v.why, i ? "a.norm" : "a.w"), "'%s'", v.why);
                DO(contract_check(w, &ref));
                MEET(w);
                DO(good_round(w, &ref, i + 1));
        }
        return 0;
}

static void test_bad_dense_is_named(void **state)
{
        (void)state;
        RUN(two_by_two, bad_dense);
        RUN(uneven, bad_dense);
}

/* NaN in a tied use: it is the home's gradient, and the home is named. */
static int bad_tied(struct cluster_worker *w)
{
        ae_bf16 narrow[CONTRACT_N_A] = { 0 };
        const struct autoep_gradient gradient = { .size = sizeof(gradient),
                                                  .tensor = CONTRACT_TIED, .dtype = AUTOEP_BF16,
                                                  .data = narrow };
        struct autoep_step step = contract_step(contract_adam);
        struct contract_reference ref;
        struct autoep_verdict v;

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        narrow[CONTRACT_N_A - 1] = 0x7fc0;
        DO(contract_scatter(w, CONTRACT_UNIT_A, 1));
        if (w->rank == 3)
                CLUSTER_TRY(w, autoep_scatter(w->handle, CONTRACT_UNIT_C, &gradient, 1, 0,
                                              AUTOEP_DEFAULT_TIMEOUT));
        DO(contract_ask(w, &step, AUTOEP_SKIPPED, &v));
        CLUSTER_CHECK(w, v.bad_unit == CONTRACT_UNIT_A && v.bad_tensor == CONTRACT_A &&
                      v.bad_rank == 3, "unit %u, tensor %u, rank %u", v.bad_unit, v.bad_tensor,
                      v.bad_rank);
        CLUSTER_CHECK(w, strstr(v.why, "'a.w' from rank 3"), "'%s'", v.why);
        DO(contract_check(w, &ref));
        MEET(w);
        return good_round(w, &ref, 1);
}

static void test_bad_tied_names_home(void **state)
{
        (void)state;
        RUN(two_by_two, bad_tied);
        RUN(uneven, bad_tied);
}

static int stop(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_adam);
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        struct contract_reference ref;

        contract_reference_init(&ref);
        DO(contract_register(w, &(struct autoep_model){ .nonfinite = AUTOEP_NONFINITE_STOP }));
        DO(w->rank == 2 ? scatter_bad(w, CONTRACT_A) : contract_scatter(w, CONTRACT_UNIT_A, 1));
        CLUSTER_REFUSED(w, autoep_step(w->handle, &step, AUTOEP_DEFAULT_TIMEOUT, &v),
                        AUTOEP_ENONFINITE, "'a.w'");
        MEET(w);
        step.expert_nonfinite = w->rank == 3 ? "experts.2" : NULL;
        CLUSTER_REFUSED(w, autoep_step(w->handle, &step, AUTOEP_DEFAULT_TIMEOUT, &v),
                        AUTOEP_ENONFINITE, "experts.2");
        DO(contract_check(w, &ref));
        MEET(w);
        return good_round(w, &ref, 1);
}

static void test_nonfinite_stop(void **state)
{
        (void)state;
        RUN(two_by_two, stop);
}

/* Finite gradients with a sum that is not: found in the norm. */
static int overflow(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_adam);
        struct contract_reference ref;
        struct autoep_verdict v;

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        DO(contract_scatter(w, CONTRACT_UNIT_B, 0x1.fp127f));
        DO(contract_ask(w, &step, AUTOEP_SKIPPED, &v));
        CLUSTER_CHECK(w, strstr(v.why, "norm") && v.bad_rank == AUTOEP_NONE, "'%s'", v.why);
        DO(contract_check(w, &ref));
        MEET(w);
        return good_round(w, &ref, 1);
}

static void test_sum_overflows(void **state)
{
        (void)state;
        RUN(two_by_two, overflow);
}

/* ---- hyper-parameters -------------------------------------------------------------------- */

static int schedule(struct cluster_worker *w)
{
        struct contract_reference ref;
        struct autoep_verdict v;

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        for (uint32_t i = 0; i < 20; i++) {
                struct autoep_hyper hyper[2] = { contract_adam[0], contract_adam[1] };
                struct autoep_step step = contract_step(hyper);
                const float g = 0.125f * (float)((int)(i * 7 % 13) - 6);

                hyper[0].lr = i < 5 ? 1e-3 * (i + 1) : 5e-3 * (1 + cos(0.2 * i)) / 2;
                hyper[1].lr = hyper[0].lr / 3;
                hyper[0].weight_decay = i < 10 ? 0.1 : 0.02;
                step.scale = 0.25;
                DO(contract_scatter(w, CONTRACT_UNIT_A, g));
                DO(contract_scatter(w, CONTRACT_UNIT_B, 2 * g));
                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
                CLUSTER_CHECK(w, v.n_groups == 2 && memcmp(v.hyper, hyper, sizeof(hyper)) == 0,
                              "the verdict has lr %g", v.hyper[0].lr);
                contract_adamw(&ref, CONTRACT_A, 4 * g, &hyper[0], 0.25);
                contract_adamw(&ref, CONTRACT_NORM, 4 * g, &hyper[1], 0.25);
                contract_adamw(&ref, CONTRACT_B, 8 * g, &hyper[0], 0.25);
                if (w->rank == i % 4)
                        DO(contract_check(w, &ref));
                DO(contract_check_gathered(w, CONTRACT_A, ref.tensors[CONTRACT_A].p, i + 1));
                MEET(w);
        }
        return 0;
}

static void test_schedule(void **state)
{
        (void)state;
        RUN(two_by_two, schedule);
}

/* Group 1 sits out the second step; unit b is scattered by nobody in the third. */
static int absent(struct cluster_worker *w)
{
        struct contract_reference ref;
        struct autoep_verdict v;

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        for (uint32_t i = 0; i < 4; i++) {
                struct autoep_step step = contract_step(contract_adam);

                step.absent_groups = i == 1 ? 2 : 0;
                DO(contract_scatter(w, CONTRACT_UNIT_A, 0.5f));
                if (i != 2)
                        DO(contract_scatter(w, CONTRACT_UNIT_B, 1));
                DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
                CLUSTER_CHECK(w, v.absent_groups == step.absent_groups, "absent %#x",
                              v.absent_groups);
                contract_adamw(&ref, CONTRACT_A, 2, &contract_adam[0], 1);
                if (i != 1)
                        contract_adamw(&ref, CONTRACT_NORM, 2, &contract_adam[1], 1);
                if (i != 2)
                        contract_adamw(&ref, CONTRACT_B, 4, &contract_adam[0], 1);
                DO(contract_is(w, CONTRACT_B, AUTOEP_GRADIENT, i == 2 ? 0 : 4));
                DO(contract_check(w, &ref));
                DO(contract_check_gathered(w, CONTRACT_B, ref.tensors[CONTRACT_B].p, i + 1));
                MEET(w);
        }
        return 0;
}

static void test_absent(void **state)
{
        (void)state;
        RUN(two_by_two, absent);
        RUN(uneven, absent);
}

/* ---- requests that differ ---------------------------------------------------------------- */

/* A request with its hyper-parameters, one group more than the model has. */
struct request {
        struct autoep_step step;
        struct autoep_hyper hyper[3];
};

/* How one field can differ: a number from another one, or a word that is @word instead. */
struct difference {
        const char *name;
        size_t off; /* in struct request */
        bool is_word;
        uint32_t word;
};
#define STEP(field) offsetof(struct request, step.field)
#define OF_GROUP(field, group)                                                                    \
        { #field " of group " #group, offsetof(struct request, hyper[group].field), false, 0 }
#define OF_GROUPS(field) OF_GROUP(field, 0), OF_GROUP(field, 1)

static const struct difference differences[] = {
        { "scale", STEP(scale), false, 0 },
        { "max_norm", STEP(max_norm), false, 0 },
        { "balance_rate", STEP(balance_rate), false, 0 },
        { "use_tokens", STEP(flags), true, AUTOEP_USE_TOKENS },
        { "n_groups", STEP(n_groups), true, 3 },
        { "absent_groups", STEP(absent_groups), true, 1u << 1 },
        { "n_counts", STEP(n_counts), true, 0 },
        OF_GROUPS(lr), OF_GROUPS(beta1), OF_GROUPS(beta2), OF_GROUPS(eps), OF_GROUPS(weight_decay),
};

/* Who differs, as bits, and which two ranks the text names: a rank beside the decider, one of
 * another node, and such a node as a whole. */
static const struct {
        uint32_t ranks, first, second;
} dissenters[] = { { 1u << 1, 0, 1 }, { 1u << 3, 2, 3 }, { 1u << 2 | 1u << 3, 0, 2 } };

static void request_init(struct request *request)
{
        static const uint64_t counts[4] = { 0 };

        request->step = contract_step(request->hyper);
        request->step.counts = counts;
        request->step.n_counts = AE_ARRAY_LEN(counts);
        memcpy(request->hyper, contract_adam, sizeof(contract_adam));
        request->hyper[2] = contract_adam[0];
}

static void bend(struct request *request, const struct difference *d)
{
        char *at = (char *)request + d->off;
        double number;

        if (d->is_word) {
                memcpy(at, &d->word, sizeof(d->word));
                return;
        }
        memcpy(&number, at, sizeof(number));
        number = number / 2 + 0.01;
        memcpy(at, &number, sizeof(number));
}

static int dissent(struct cluster_worker *w, const struct difference *d, size_t who)
{
        struct autoep_verdict v = AUTOEP_VERDICT_INIT;
        struct request request;
        char words[128];

        request_init(&request);
        if (dissenters[who].ranks >> w->rank & 1)
                bend(&request, d);
        (void)snprintf(words, sizeof(words),
                       "disagree on the step: %s differs between rank %u and rank %u", d->name,
                       dissenters[who].first, dissenters[who].second);
        CLUSTER_REFUSED(w, autoep_step(w->handle, &request.step, AUTOEP_DEFAULT_TIMEOUT, &v),
                        AUTOEP_EMISMATCH, words);
        return 0;
}

/* Nothing comes of it but the text; then they agree, and the sums are still there. */
static int disagree(struct cluster_worker *w)
{
        struct contract_reference ref;
        struct autoep_verdict v;
        struct request request;

        contract_reference_init(&ref);
        request_init(&request);
        DO(contract_register(w, &adamw));
        for (size_t i = 0; i < AE_ARRAY_LEN(differences); i++) {
                DO(contract_scatter(w, CONTRACT_UNIT_A, 0.25f));
                for (size_t who = 0; who < AE_ARRAY_LEN(dissenters); who++)
                        DO(dissent(w, &differences[i], who));
                DO(contract_check(w, &ref));
                MEET(w);
                DO(contract_ask(w, &request.step, AUTOEP_APPLIED, &v));
                contract_adamw(&ref, CONTRACT_A, 1, &contract_adam[0], 1);
                contract_adamw(&ref, CONTRACT_NORM, 1, &contract_adam[1], 1);
        }
        return contract_check(w, &ref);
}

static void test_ranks_disagree(void **state)
{
        (void)state;
        RUN(two_by_two, disagree);
}

/* ---- redo ------------------------------------------------------------------------------- */

static int redo(struct cluster_worker *w)
{
        struct autoep_step step = contract_step(contract_adam);
        struct contract_reference ref;
        struct autoep_verdict v;
        uint64_t round;

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        DO(good_round(w, &ref, 1));
        DO(contract_scatter(w, CONTRACT_UNIT_A, 7));
        step.flags = w->rank == 3 ? AUTOEP_STEP_REDO : 0;
        DO(contract_ask(w, &step, AUTOEP_REDO, &v));
        CLUSTER_CHECK(w, v.version == 1 && strstr(v.why, "rank 3"), "version %llu, '%s'",
                      (unsigned long long)v.version, v.why);
        round = v.round;
        DO(contract_check(w, &ref));
        MEET(w);
        DO(good_round(w, &ref, 2));
        CLUSTER_CHECK(w, round >= 2, "round %llu", (unsigned long long)round);
        return 0;
}

static void test_redo(void **state)
{
        (void)state;
        RUN(two_by_two, redo);
        RUN(uneven, redo);
}

/* ---- balancing -------------------------------------------------------------------------- */

/* Counts of all ranks: 4, 8, 12, 8 with a mean of 8. */
static int balance(struct cluster_worker *w)
{
        static const uint64_t counts[] = { 1, 2, 3, 2 };
        struct autoep_step step = contract_step(contract_adam);
        struct contract_reference ref;
        struct autoep_verdict v;
        float bias[4];

        contract_reference_init(&ref);
        DO(contract_register(w, &adamw));
        step.counts = counts;
        step.n_counts = 4;
        step.balance_rate = 0.001;
        for (uint32_t i = 0; i < 3; i++) {
                const float u = (float)0.001;
                const float moved = i == 2 ? u + u : u; /* the second round is skipped */

                step.expert_nonfinite = i == 1 && w->rank == 0 ? "an expert" : NULL;
                DO(contract_ask(w, &step, i == 1 ? AUTOEP_SKIPPED : AUTOEP_APPLIED, &v));
                CLUSTER_CHECK(w, i == 1 || v.balance_rate == 0.001, "rate %g", v.balance_rate);
                CLUSTER_TRY(w, autoep_get(w->handle, CONTRACT_BIAS, AUTOEP_WEIGHT, 0, 4, bias,
                                          AUTOEP_DEFAULT_TIMEOUT));
                CLUSTER_CHECK(w, bias[0] == moved && bias[1] == 0 && bias[2] == -moved &&
                              bias[3] == 0, "after %u rounds %g %g %g %g", i + 1, (double)bias[0],
                              (double)bias[1], (double)bias[2], (double)bias[3]);
                MEET(w);
        }
        step.balance_rate = 0;
        DO(contract_ask(w, &step, AUTOEP_APPLIED, &v));
        CLUSTER_TRY(w, autoep_get(w->handle, CONTRACT_BIAS, AUTOEP_WEIGHT, 0, 4, bias,
                                  AUTOEP_DEFAULT_TIMEOUT));
        CLUSTER_CHECK(w, bias[0] == 0.002f, "with rate 0 the bias becomes %g", (double)bias[0]);
        return contract_check(w, &ref);
}

static void test_balance(void **state)
{
        (void)state;
        RUN(two_by_two, balance);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_tokens),
                cmocka_unit_test(test_no_tokens_at_all),
                cmocka_unit_test(test_default_scale),
                cmocka_unit_test(test_expert_norms),
                cmocka_unit_test(test_tied_counts_once),
                cmocka_unit_test(test_bad_expert_skips),
                cmocka_unit_test(test_bad_dense_is_named),
                cmocka_unit_test(test_bad_tied_names_home),
                cmocka_unit_test(test_nonfinite_stop),
                cmocka_unit_test(test_sum_overflows),
                cmocka_unit_test(test_schedule),
                cmocka_unit_test(test_absent),
                cmocka_unit_test(test_ranks_disagree),
                cmocka_unit_test(test_redo),
                cmocka_unit_test(test_balance),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
