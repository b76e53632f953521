/* SPDX-License-Identifier: Apache-2.0 */
/* The router: choice, weights, losses and their gradients, and the balancing rule. */
#include "client/experts/route.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/balance.h"

#include "tests/lib/test.h"

#include <math.h>
#include <string.h>

#define MAX_TOKENS 16
#define MAX_EXPERTS 16

/* A batch in double with its own arrays. */
struct fixture {
        struct ae_route route;
        struct ae_route_batch batch;
        double logits[MAX_TOKENS * MAX_EXPERTS];
        double weight[MAX_TOKENS * MAX_EXPERTS];
        int32_t idx[MAX_TOKENS * MAX_EXPERTS];
};

static uint64_t random_state;

static double uniform(double low, double high)
{
        uint64_t x = random_state += UINT64_C(0x9e3779b97f4a7c15);

        x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
        return low + (high - low) * (double)((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

static const struct ae_route_config plain = { .n_experts = 8, .top_k = 2, .scale = 1 };

static void set_up(struct fixture *f, const struct ae_route_config *config, size_t n_tokens)
{
        assert_int_equal(ae_route_init(&f->route, config), 0);
        f->batch = (struct ae_route_batch){ .real = AE_REAL_F64, .n_tokens = n_tokens,
                                            .logits = f->logits, .idx = f->idx,
                                            .weight = f->weight };
        for (size_t i = 0; i < n_tokens * config->n_experts; i++)
                f->logits[i] = uniform(-3, 3);
        memset(f->idx, -1, sizeof(f->idx));
}

static void tear_down(struct fixture *f)
{
        ae_route_deinit(&f->route);
}

/* Written another way than the router: by what each choice has before it. */
static double naive_score(const struct ae_route_config *config, const double *logits, uint32_t e)
{
        double sum = 0;

        if (config->score == AE_ROUTE_SIGMOID)
                return 1 / (1 + exp(-logits[e]));
        for (uint32_t i = 0; i < config->n_experts; i++)
                sum += exp(logits[i]);
        return exp(logits[e]) / sum;
}

static double naive_group(const struct ae_route_config *config, const double *choice, uint32_t g)
{
        const uint32_t len = config->n_experts / config->n_group;
        double best = -INFINITY;

        for (uint32_t a = g * len; a < (g + 1) * len; a++) {
                if (config->group_score == AE_ROUTE_GROUP_MAX || len == 1)
                        best = fmax(best, choice[a]);
                for (uint32_t b = a + 1; config->group_score == AE_ROUTE_GROUP_TOP2_SUM &&
                                         b < (g + 1) * len; b++)
                        best = fmax(best, choice[a] + choice[b]);
        }
        return best;
}

static bool naive_in(const struct ae_route_config *config, const double *choice, uint32_t e)
{
        uint32_t mine, before = 0;

        if (config->n_group <= 1)
                return true;
        mine = e / (config->n_experts / config->n_group);
        for (uint32_t g = 0; g < config->n_group; g++) {
                const double a = naive_group(config, choice, g);
                const double b = naive_group(config, choice, mine);

                before += a > b || (a == b && g < mine);
        }
        return before < config->topk_group;
}

/* The place of @e in the order of choice; n_experts when its group is out. */
static uint32_t naive_place(const struct ae_route_config *config, const double *choice, uint32_t e)
{
        uint32_t place = 0;

        if (!naive_in(config, choice, e))
                return config->n_experts;
        for (uint32_t o = 0; o < config->n_experts; o++) {
                if (naive_in(config, choice, o))
                        place += choice[o] > choice[e] || (choice[o] == choice[e] && o < e);
        }
        return place;
}

static void check_token(const struct fixture *f, size_t t)
{
        const struct ae_route_config *config = &f->route.config;
        const double *logits = f->logits + t * config->n_experts;
        const int32_t *idx = f->idx + t * config->top_k;
        double choice[MAX_EXPERTS], score[MAX_EXPERTS], sum = 0;

        for (uint32_t e = 0; e < config->n_experts; e++) {
                score[e] = naive_score(config, logits, e);
                choice[e] = score[e] + (f->batch.bias ? (double)f->batch.bias[e] : 0);
        }
        for (uint32_t e = 0; e < config->n_experts; e++) {
                const uint32_t place = naive_place(config, choice, e);

                if (place < config->top_k)
                        assert_int_equal(idx[place], e);
        }
        for (uint32_t k = 0; k < config->top_k; k++)
                sum += config->normalise ? score[idx[k]] : 0;
        for (uint32_t k = 0; k < config->top_k; k++) {
                double want = config->scale * score[idx[k]] / (config->normalise ? sum : 1);

                assert_true(fabs(f->weight[t * config->top_k + k] - want) <= 1e-14 * fabs(want));
        }
}

static const struct ae_route_config configs[] = {
        { .n_experts = 8, .top_k = 2, .scale = 1 },
        { .n_experts = 8, .top_k = 2, .scale = 1, .normalise = true },
        { .n_experts = 8, .top_k = 3, .score = AE_ROUTE_SIGMOID, .scale = 2.5, .normalise = true },
        { .n_experts = 16, .top_k = 4, .score = AE_ROUTE_SIGMOID, .scale = 2.5, .normalise = true,
          .n_group = 4, .topk_group = 2 },
        { .n_experts = 16, .top_k = 4, .scale = 16, .n_group = 8, .topk_group = 3,
          .group_score = AE_ROUTE_GROUP_MAX },
        { .n_experts = 6, .top_k = 2, .score = AE_ROUTE_SIGMOID, .scale = 1, .n_group = 6,
          .topk_group = 2 },
        { .n_experts = 5, .top_k = 5, .scale = 1, .normalise = true },
        { .n_experts = 1, .top_k = 1, .scale = 1 },
};

static void routing_matches_the_naive_one(void **state)
{
        (void)state;
        for (size_t c = 0; c < AE_ARRAY_LEN(configs); c++) {
                struct fixture f;
                float bias[MAX_EXPERTS];

                set_up(&f, &configs[c], MAX_TOKENS);
                for (size_t e = 0; e < MAX_EXPERTS; e++)
                        bias[e] = (float)uniform(-0.2, 0.2);
                for (int with_bias = 0; with_bias < 2; with_bias++) {
                        f.batch.bias = with_bias ? bias : NULL;
                        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
                        for (size_t t = 0; t < MAX_TOKENS; t++)
                                check_token(&f, t);
                }
                tear_down(&f);
        }
}

static void ties_go_to_the_lower_expert(void **state)
{
        struct ae_route_config config = plain;
        struct fixture f;

        (void)state;
        set_up(&f, &config, 2);
        for (size_t i = 0; i < 16; i++)
                f.logits[i] = 0.5;
        f.logits[8 + 6] = 1;
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_int_equal(f.idx[0], 0);
        assert_int_equal(f.idx[1], 1);
        assert_int_equal(f.idx[2], 6);
        assert_int_equal(f.idx[3], 0);
        tear_down(&f);

        config.n_group = 4;
        config.topk_group = 1;
        set_up(&f, &config, 1);
        memset(f.logits, 0, sizeof(f.logits));
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_int_equal(f.idx[0], 0);
        assert_int_equal(f.idx[1], 1);
        tear_down(&f);
}

static void bias_chooses_and_never_weighs(void **state)
{
        float bias[8] = { 0, 0, 0, 0, 0, 10, 0, 0 };
        struct fixture f;

        (void)state;
        set_up(&f, &plain, 1);
        f.logits[5] = -9; /* nobody's choice but the bias's */
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_int_not_equal(f.idx[0], 5);
        assert_int_not_equal(f.idx[1], 5);
        f.batch.bias = bias;
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_int_equal(f.idx[0], 5);
        assert_true(fabs(f.weight[0] - naive_score(&plain, f.logits, 5)) < 1e-16);
        assert_true(f.weight[0] < 1e-3);
        tear_down(&f);
}

/* Group 0 has the best expert, group 1 the best pair. */
static void group_score_max_and_top2_differ(void **state)
{
        static const double logits[8] = { 2.2, -9, -9, -9, 0.6, 0.3, -9, -9 };
        struct ae_route_config config = { .n_experts = 8, .top_k = 2, .scale = 1, .n_group = 2,
                                          .topk_group = 1, .score = AE_ROUTE_SIGMOID };
        struct fixture f;

        (void)state;
        set_up(&f, &config, 1);
        memcpy(f.logits, logits, sizeof(logits));
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_int_equal(f.idx[0], 4);
        assert_int_equal(f.idx[1], 5);
        tear_down(&f);

        config.group_score = AE_ROUTE_GROUP_MAX;
        set_up(&f, &config, 1);
        memcpy(f.logits, logits, sizeof(logits));
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_int_equal(f.idx[0], 0);
        assert_int_equal(f.idx[1], 1);
        tear_down(&f);
}

static void normalised_weights_add_up_to_the_scale(void **state)
{
        struct ae_route_config config = plain;
        struct fixture f;

        (void)state;
        config.normalise = true;
        config.scale = 2.5;
        config.score = AE_ROUTE_SIGMOID;
        set_up(&f, &config, 2);
        for (size_t e = 0; e < 8; e++)
                f.logits[8 + e] = -2000; /* all scores are 0: no division by zero */
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_true(fabs(f.weight[0] + f.weight[1] - 2.5) < 1e-15);
        assert_true(f.weight[2] == 0 && f.weight[3] == 0);
        tear_down(&f);
}

static void fp32_is_the_double_result_rounded_once(void **state)
{
        struct fixture f;
        float logits[8], weight[2];
        int32_t idx[2];
        struct ae_route_batch batch = { .real = AE_REAL_F32, .n_tokens = 1, .logits = logits,
                                        .idx = idx, .weight = weight };

        (void)state;
        set_up(&f, &plain, 1);
        for (size_t e = 0; e < 8; e++) {
                logits[e] = (float)f.logits[e];
                f.logits[e] = (double)logits[e];
        }
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        assert_int_equal(ae_route_forward(&f.route, &batch), 0);
        for (size_t k = 0; k < 2; k++) {
                assert_int_equal(idx[k], f.idx[k]);
                assert_true(weight[k] == (float)f.weight[k]);
        }
        tear_down(&f);
}

/* The scalar whose gradient backward gives: <dweight, weight> + sum_q seq_weight * (aux + z). */
static double loss_of(struct fixture *f, const struct ae_route_grads *grads)
{
        double aux[MAX_TOKENS], z[MAX_TOKENS], loss = 0;

        assert_int_equal(ae_route_forward(&f->route, &f->batch), 0);
        ae_route_losses(&f->route, &f->batch, aux, z);
        for (size_t i = 0; i < f->batch.n_tokens * f->route.config.top_k; i++)
                loss += ((const double *)grads->dweight)[i] * f->weight[i];
        for (size_t q = 0; q < f->batch.n_seqs; q++)
                loss += (grads->seq_weight ? grads->seq_weight[q] : 1) * (aux[q] + z[q]);
        return loss;
}

static void check_gradient(const struct ae_route_config *config, bool with_seqs)
{
        static const size_t seq_first[] = { 0, 3, 3, 10 }; /* one is empty */
        static const double seq_weight[] = { 0.5, 3, 0.25 };
        double dweight[MAX_TOKENS * MAX_EXPERTS], dlogits[MAX_TOKENS * MAX_EXPERTS];
        struct ae_route_grads grads = { .dweight = dweight, .dlogits = dlogits,
                                        .seq_weight = seq_weight };
        const double h = 1e-5;
        struct fixture f;

        set_up(&f, config, 10);
        if (with_seqs) {
                f.batch.seq_first = seq_first;
                f.batch.n_seqs = 3;
        }
        for (size_t i = 0; i < AE_ARRAY_LEN(dweight); i++)
                dweight[i] = uniform(-1, 1);
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        ae_route_backward(&f.route, &f.batch, &grads);
        for (size_t i = 0; i < 10 * config->n_experts; i++) {
                const double at = f.logits[i];
                double up, down, slope;

                f.logits[i] = at + h;
                up = loss_of(&f, &grads);
                f.logits[i] = at - h;
                down = loss_of(&f, &grads);
                f.logits[i] = at;
                slope = (up - down) / (2 * h);
                if (!(fabs(slope - dlogits[i]) <= 1e-8 * config->scale + 1e-7 * fabs(slope)))
                        fail_msg("logit %zu: slope %.12g, gradient %.12g", i, slope, dlogits[i]);
        }
        tear_down(&f);
}

static void gradients_match_finite_differences(void **state)
{
        (void)state;
        for (size_t c = 0; c < AE_ARRAY_LEN(configs); c++) {
                struct ae_route_config config = configs[c];

                check_gradient(&config, false);
                check_gradient(&config, true); /* coefficients 0 */
                config.aux_coef = 0.3;
                check_gradient(&config, true);
                config.z_coef = 0.2;
                check_gradient(&config, true);
                config.aux_coef = 0;
                check_gradient(&config, true);
        }
}

/* With two experts chosen and normalised, w0 = sigmoid(l0 - l1): the gate learns, and this much. */
static void gate_gradient_equals_the_reference(void **state)
{
        struct ae_route_config config = plain;
        double dweight[2] = { 0.7, -0.4 }, dlogits[8], want;
        struct ae_route_grads grads = { .dweight = dweight, .dlogits = dlogits };
        struct fixture f;

        (void)state;
        config.normalise = true;
        config.scale = 3;
        set_up(&f, &config, 1);
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        ae_route_backward(&f.route, &f.batch, &grads);
        want = f.weight[0] / 3 * f.weight[1] * (dweight[0] - dweight[1]);
        assert_true(fabs(want) > 1e-2);
        for (int32_t e = 0; e < 8; e++) {
                double expected = e == f.idx[0] ? want : e == f.idx[1] ? -want : 0;

                assert_true(fabs(dlogits[e] - expected) < 1e-14);
        }
        tear_down(&f);
}

static void aux_and_z_losses_by_hand(void **state)
{
        /* Two tokens, uniform probabilities 1/4, both to experts 0 and 1: E/(K T^2) * sum = 1. */
        struct ae_route_config config = { .n_experts = 4, .top_k = 2, .scale = 1, .aux_coef = 0.5,
                                          .z_coef = 2 };
        static const size_t seq_first[] = { 0, 2 };
        struct fixture f;
        double aux, z;

        (void)state;
        set_up(&f, &config, 2);
        f.batch.seq_first = seq_first;
        f.batch.n_seqs = 1;
        memset(f.logits, 0, sizeof(f.logits));
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        ae_route_losses(&f.route, &f.batch, &aux, &z);
        assert_true(fabs(aux - 0.5) < 1e-15);
        assert_true(fabs(z - 2 * log(4) * log(4)) < 1e-14);
        tear_down(&f);
}

static void losses_do_not_depend_on_the_split(void **state)
{
        static const size_t both[] = { 0, 4, 9 }, one[] = { 0, 4 }, two[] = { 0, 5 };
        struct ae_route_config config = plain;
        double aux[2], z[2], part_aux[2], part_z[2];
        struct fixture f;
        struct ae_route_batch part;

        (void)state;
        config.aux_coef = config.z_coef = 0.01;
        set_up(&f, &config, 9);
        f.batch.seq_first = both;
        f.batch.n_seqs = 2;
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        ae_route_losses(&f.route, &f.batch, aux, z);
        part = f.batch;
        part.n_seqs = 1;
        part.seq_first = one;
        part.n_tokens = 4;
        ae_route_losses(&f.route, &part, part_aux, part_z);
        part.seq_first = two;
        part.n_tokens = 5;
        part.logits = f.logits + 4 * config.n_experts;
        part.idx = f.idx + 4 * config.top_k;
        ae_route_losses(&f.route, &part, part_aux + 1, part_z + 1);
        assert_memory_equal(aux, part_aux, sizeof(aux));
        assert_memory_equal(z, part_z, sizeof(z));
        assert_true(aux[0] != aux[1]);
        tear_down(&f);
}

static void a_bad_logit_is_named_and_still_routed(void **state)
{
        double dweight[6] = { 0 }, dlogits[24];
        struct ae_route_grads grads = { .dweight = dweight, .dlogits = dlogits };
        static const double bad[] = { NAN, INFINITY, -INFINITY };
        struct fixture f;

        (void)state;
        for (size_t b = 0; b < AE_ARRAY_LEN(bad); b++) {
                set_up(&f, &plain, 3);
                f.logits[8 + 2] = bad[b];
                assert_int_equal(ae_route_forward(&f.route, &f.batch), AE_ENONFINITE);
                assert_non_null(strstr(ae_error_text(), "token 1"));
                assert_non_null(strstr(ae_error_text(), "expert 2"));
                assert_int_equal(f.idx[2], 0);
                assert_int_equal(f.idx[3], 1);
                assert_true(isnan(f.weight[2]) && isnan(f.weight[3]));
                check_token(&f, 0);
                check_token(&f, 2);
                ae_route_backward(&f.route, &f.batch, &grads);
                for (size_t e = 0; e < 24; e++)
                        assert_int_equal(!isfinite(dlogits[e]), e >= 8 && e < 16);
                tear_down(&f);
        }
}

static void a_bad_bias_is_named(void **state)
{
        float bias[8] = { 0, 0, 0, NAN };
        struct fixture f;

        (void)state;
        set_up(&f, &plain, 1);
        f.batch.bias = bias;
        assert_int_equal(ae_route_forward(&f.route, &f.batch), AE_ENONFINITE);
        assert_non_null(strstr(ae_error_text(), "bias of expert 3"));
        assert_true(isnan(f.weight[0]));
        tear_down(&f);
}

static void extreme_finite_logits_stay_finite(void **state)
{
        struct fixture f;
        double dweight[2] = { 1, 1 }, dlogits[8];
        struct ae_route_grads grads = { .dweight = dweight, .dlogits = dlogits };

        (void)state;
        for (int score = AE_ROUTE_SOFTMAX; score <= AE_ROUTE_SIGMOID; score++) {
                struct ae_route_config config = plain;

                config.score = (enum ae_route_score)score;
                config.normalise = true;
                set_up(&f, &config, 1);
                f.logits[1] = 1e30;
                f.logits[2] = -1e30;
                assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
                ae_route_backward(&f.route, &f.batch, &grads);
                assert_int_equal(f.idx[0], 1);
                for (size_t e = 0; e < 8; e++)
                        assert_true(isfinite(dlogits[e]));
                tear_down(&f);
        }
}

static void wrong_configurations_are_refused(void **state)
{
        static const struct {
                struct ae_route_config config;
                const char *words;
        } wrong[] = {
                { { .n_experts = 0, .top_k = 1, .scale = 1 }, "n_experts is 0" },
                { { .n_experts = 4, .top_k = 0, .scale = 1 }, "top_k is 0" },
                { { .n_experts = 4, .top_k = 5, .scale = 1 }, "top_k is 5" },
                { { .n_experts = 4, .top_k = 1, .scale = 0 }, "scale is 0" },
                { { .n_experts = 4, .top_k = 1, .scale = 1, .aux_coef = -1 }, "aux_coef is -1" },
                { { .n_experts = 4, .top_k = 1, .scale = 1, .z_coef = NAN }, "z_coef nan" },
                { { .n_experts = 4, .top_k = 1, .scale = 1, .n_group = 3, .topk_group = 1 },
                  "n_group is 3" },
                { { .n_experts = 4, .top_k = 1, .scale = 1, .n_group = 2, .topk_group = 3 },
                  "topk_group is 3" },
                { { .n_experts = 4, .top_k = 3, .scale = 1, .n_group = 2, .topk_group = 1 },
                  "only 2 experts" },
        };
        struct ae_route route;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(wrong); i++) {
                assert_int_equal(ae_route_init(&route, &wrong[i].config), AE_EINVAL);
                if (!strstr(ae_error_text(), wrong[i].words))
                        fail_msg("\"%s\" does not say \"%s\"", ae_error_text(), wrong[i].words);
        }
}

static void no_tokens_is_fine(void **state)
{
        static const size_t seq_first[] = { 0, 0 };
        struct ae_route_grads grads = { 0 };
        struct fixture f;
        double aux = 7, z = 7;

        (void)state;
        set_up(&f, &plain, 0);
        f.batch.seq_first = seq_first;
        f.batch.n_seqs = 1;
        assert_int_equal(ae_route_forward(&f.route, &f.batch), 0);
        ae_route_losses(&f.route, &f.batch, &aux, &z);
        assert_true(aux == 0 && z == 0);
        ae_route_backward(&f.route, &f.batch, &grads);
        tear_down(&f);
}

static void counts_move_the_bias_by_the_sign(void **state)
{
        static const int32_t idx[] = { 0, 1, 0, 2, 0, 1 };
        static const uint64_t huge[] = { UINT64_MAX, UINT64_MAX, UINT64_MAX, 0 };
        uint64_t counts[4] = { 0 };
        float bias[3] = { 0.5F, 0, 0 }, big[4] = { 0 };

        (void)state;
        ae_route_count(idx, 6, counts, 3);
        assert_int_equal(counts[0], 3);
        assert_int_equal(counts[1], 2);
        assert_int_equal(counts[2], 1);
        ae_balance_step(bias, counts, 3, 0.001);
        assert_true(bias[0] == 0.5F - 0.001F);
        assert_true(bias[1] == 0); /* at the mean */
        assert_true(bias[2] == 0.001F);
        ae_balance_step(big, huge, 4, 0.25);
        assert_true(big[0] == -0.25F && big[3] == 0.25F);
        ae_balance_step(NULL, NULL, 0, 0.25);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(routing_matches_the_naive_one),
                cmocka_unit_test(ties_go_to_the_lower_expert),
                cmocka_unit_test(bias_chooses_and_never_weighs),
                cmocka_unit_test(group_score_max_and_top2_differ),
                cmocka_unit_test(normalised_weights_add_up_to_the_scale),
                cmocka_unit_test(fp32_is_the_double_result_rounded_once),
                cmocka_unit_test(gradients_match_finite_differences),
                cmocka_unit_test(gate_gradient_equals_the_reference),
                cmocka_unit_test(aux_and_z_losses_by_hand),
                cmocka_unit_test(losses_do_not_depend_on_the_split),
                cmocka_unit_test(a_bad_logit_is_named_and_still_routed),
                cmocka_unit_test(a_bad_bias_is_named),
                cmocka_unit_test(extreme_finite_logits_stay_finite),
                cmocka_unit_test(wrong_configurations_are_refused),
                cmocka_unit_test(no_tokens_is_fine),
                cmocka_unit_test(counts_move_the_bias_by_the_sign),
        };

        return cmocka_run_group_tests_name("route", tests, NULL, NULL);
}
