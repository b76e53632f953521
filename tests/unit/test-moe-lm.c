/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The example trainer without daemons: options, text and its order, the reference (whose gradients
 * may not depend on how ranks and groups divide the work), a falling loss, generation, and the
 * check against a sound and a doctored backend.
 */
#include "client/examples/moe-lm/check.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/lm-bench.h"
#include "tests/lib/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static double distance(const float *a, const float *b, size_t n)
{
        double difference = 0, size = 0;

        for (size_t i = 0; i < n; i++) {
                difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
                size += (double)b[i] * (double)b[i];
        }
        return sqrt(difference / size);
}

static void options_have_defaults_and_limits(void **state)
{
        struct lm_options options;

        (void)state;
        assert_int_equal(bench_parse(&options, ""), 0);
        assert_int_equal(options.steps, 300);
        assert_int_equal(options.weights, AE_DTYPE_BF16);
        assert_string_equal(options.paths[0], LM_TEXT_DEFAULT);
        assert_int_equal(bench_parse(&options, "--uneven some.txt --router sigmoid --order de "
                                     "more"), 0);
        assert_true(options.tokens && options.router && options.order == AE_ORDER_DE);
        assert_int_equal(options.n_paths, 2);
        assert_string_equal(options.paths[1], "more");
        assert_int_equal(bench_parse(&options, "--check --steps 100 --lr 0.5"), 0);
        assert_true(options.steps == 6 && options.lr == 1e-3);
        assert_int_equal(bench_parse(&options, "--check --reference"), AE_EINVAL);
        assert_int_equal(bench_parse(&options, "--check --trace x"), AE_EINVAL);
        assert_int_equal(bench_parse(&options, "--batch 0"), AE_EINVAL);
        assert_int_equal(bench_parse(&options, "--lr -1"), AE_EINVAL);
        assert_int_equal(bench_parse(&options, "--weights fp16"), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), "fp32 or bf16"));
        assert_int_equal(bench_parse(&options, "--no-such"), AE_EINVAL);
        assert_int_equal(bench_parse(&options, "--steps"), AE_EINVAL);
}

static void shapes_are_checked(void **state)
{
        static const char *const wrong[] = { "--dim 18", "--heads 3", "--top-k 9", "--layers 65",
                                             "--seq 1" };
        struct lm_spec spec;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(wrong); i++) {
                struct lm_options options;
                struct lm_shape shape;

                assert_int_equal(bench_parse(&options, wrong[i]), 0);
                shape = lm_shape_of(&options);
                assert_int_equal(lm_spec_init(&spec, &shape), AE_EINVAL);
        }
}

static void write_file(const char *folder, const char *name, const char *content)
{
        char path[256];
        FILE *file;

        snprintf(path, sizeof(path), "%s/%s", folder, name);
        file = fopen(path, "w");
        assert_non_null(file);
        fputs(content, file);
        fclose(file);
}

static void files_are_read_once_and_in_order(void **state)
{
        char folder[] = "/tmp/moe-lm-XXXXXX", first[64], link[64], second[64];
        const char *paths[] = { folder, first };
        struct lm_text read;

        (void)state;
        assert_non_null(mkdtemp(folder));
        write_file(folder, "b", "second file, which is long enough for a sequence or two");
        write_file(folder, "c", "first");
        snprintf(first, sizeof(first), "%s/c", folder);
        snprintf(second, sizeof(second), "%s/b", folder);
        snprintf(link, sizeof(link), "%s/a", folder);
        assert_int_equal(symlink("c", link), 0);
        assert_int_equal(lm_text_open(&read, paths, 2, 2), 0);
        assert_int_equal(read.n, strlen("first") + 55);
        assert_memory_equal(read.bytes, "firstsecond", 11);
        assert_int_equal(read.n_train, read.n - 3);
        lm_text_deinit(&read);
        assert_int_equal(lm_text_open(&read, paths, 2, 100), AE_EINVAL);
        unlink(first);
        unlink(second);
        unlink(link);
        assert_int_equal(lm_text_open(&read, &paths[1], 1, 2), AE_ENOENT);
        rmdir(folder);
}

static void order_of_data_is_pure(void **state)
{
        const struct lm_deal deal = { .text = &bench_text, .seed = 9, .world = 4, .accumulate = 2,
                                      .n_seqs = 3, .seq = 16, .uneven = true };
        struct lm_dealt a, b;

        (void)state;
        assert_int_equal(lm_dealt_init(&a, &deal), 0);
        assert_int_equal(lm_dealt_init(&b, &deal), 0);
        for (uint32_t i = 0; i < 4 * 2 * 5; i++) {
                const struct lm_turn turn = { .step = i / 8, .micro = i / 4 % 2, .rank = i % 4 };
                const struct lm_turn other = { .step = 77, .micro = 1, .rank = 2 };
                const bool none = (turn.rank + turn.micro + turn.step) % 4 == 0;

                lm_deal_train(&deal, &turn, &a);
                lm_deal_train(&deal, &other, &b);
                lm_deal_train(&deal, &turn, &b);
                assert_int_equal(a.batch.n_tokens, b.batch.n_tokens);
                assert_int_equal(a.batch.n_tokens == 0, none);
                assert_memory_equal(a.batch.tokens, b.batch.tokens, a.batch.n_tokens);
                for (size_t t = 0; t + 1 < a.seq_first[a.batch.n_seqs > 0]; t++)
                        assert_int_equal(a.batch.targets[t], a.batch.tokens[t + 1]);
        }
        lm_dealt_deinit(&a);
        lm_dealt_deinit(&b);
}

static void held_out_text_is_dealt_once(void **state)
{
        const struct lm_deal deal = { .text = &bench_text, .seed = 9, .world = 3, .accumulate = 1,
                                      .n_seqs = 2, .seq = 16 };
        const size_t n_train = bench_text.n_train;
        struct lm_dealt dealt;
        uint64_t n_rounds = 1, n_tokens = 0;

        (void)state;
        assert_int_equal(lm_dealt_init(&dealt, &deal), 0);
        for (uint64_t round = 0; round < n_rounds; round++) {
                for (uint32_t rank = 0; rank < 3; rank++) {
                        n_rounds = lm_deal_held_out(&deal, round, rank, &dealt);
                        if (dealt.batch.n_tokens > 0)
                                assert_memory_equal(dealt.batch.tokens,
                                                    bench_text.bytes + n_train + n_tokens,
                                                    dealt.batch.n_tokens);
                        n_tokens += dealt.batch.n_tokens;
                }
        }
        assert_int_equal(n_tokens, AE_MIN((bench_text.n - n_train - 1) / 16, (size_t)64) * 16);
        lm_dealt_deinit(&dealt);
}

static void learning_rate_warms_up_and_cools_down(void **state)
{
        struct lm_options options;

        (void)state;
        assert_int_equal(bench_parse(&options, "--steps 100 --warmup 10 --lr 0.01"), 0);
        assert_true(fabs(lm_learning_rate(&options, 0) - 0.001) < 1e-12);
        assert_true(fabs(lm_learning_rate(&options, 9) - 0.01) < 1e-12);
        assert_true(lm_learning_rate(&options, 50) < lm_learning_rate(&options, 40));
        assert_true(fabs(lm_learning_rate(&options, 99) - 0.001) < 1e-12);
}

/* Ways to divide the same 8 sequences of a step. */
static const char *const divisions[] = {
        "--world 1 --batch 8",
        "--world 1 --batch 2 --accumulate 4",
        "--world 2 --batch 4 --ep-size 2",
        "--world 4 --batch 2 --ep-size 2 --sum-group 2",
        "--world 4 --batch 2 --ep-size 2 --order de --sum-group 4",
        "--world 4 --batch 1 --ep-size 4 --accumulate 2",
};

static void check_divisions(enum ae_real real, bool tokens)
{
        float *first = NULL;
        double norm = 0;

        for (size_t i = 0; i < AE_ARRAY_LEN(divisions); i++) {
                struct bench bench;
                struct lm_outcome outcome;
                float *grads;
                char line[256];

                snprintf(line, sizeof(line), SMALL "%s %s", divisions[i],
                         tokens ? "--tokens" : "");
                bench_open(&bench, line, real);
                outcome = bench_step(&bench, 0);
                grads = bench_state(&bench, LM_GRADIENT);
                for (size_t j = 0; j < bench.spec.n_elements; j++)
                        grads[j] = (float)(grads[j] * outcome.verdict.scale);
                if (first) {
                        assert_true(distance(grads, first, bench.spec.n_elements) < 1e-6);
                        assert_true(fabs(outcome.verdict.norm - norm) < 1e-6 * norm);
                        free(grads);
                } else {
                        first = grads;
                        norm = outcome.verdict.norm;
                }
                bench_close(&bench);
        }
        free(first);
}

static void division_changes_gradients_by_rounding_only(void **state)
{
        (void)state;
        check_divisions(AE_REAL_F32, true);
        check_divisions(AE_REAL_F64, false);
}

/* The norm is that of the scaled gradient with the tied tensor counted once. */
static void norm_counts_each_element_once(void **state)
{
        struct bench bench;
        struct lm_outcome outcome;
        double squares = 0;
        float *grads;

        (void)state;
        bench_open(&bench, SMALL "--world 2 --ep-size 2 --max-norm 0.5", AE_REAL_F32);
        outcome = bench_step(&bench, 0);
        grads = bench_state(&bench, LM_GRADIENT);
        for (size_t i = 0; i < bench.spec.n_elements; i++)
                squares += (double)grads[i] * (double)grads[i];
        assert_true(fabs(outcome.verdict.norm - sqrt(squares) / 2) < 1e-9 * outcome.verdict.norm);
        assert_true(fabs(outcome.verdict.clip - 0.5 / outcome.verdict.norm) < 1e-5);
        free(grads);
        bench_close(&bench);
}

static double train_for(struct bench *bench, uint64_t steps, double *ret_first)
{
        double loss = 0;

        for (uint64_t step = 0; step < steps; step++) {
                struct lm_outcome outcome = bench_step(bench, step);

                assert_true(outcome.verdict.applied);
                loss = outcome.loss;
                if (step == 0)
                        *ret_first = loss;
        }
        return loss;
}

static void loss_falls(void **state)
{
        static const char *const lines[] = {
                SMALL "--steps 60 --lr 0.02 --world 2 --ep-size 2 --grads bf16",
                SMALL "--steps 60 --lr 0.02 --world 2 --uneven --router sigmoid --weights fp32",
                SMALL "--steps 60 --lr 0.5 --world 1 --optimizer sgd --weight-decay 0",
        };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(lines); i++) {
                struct bench bench;
                double first = 0, last, held_out = 0;

                bench_open(&bench, lines[i], AE_REAL_F32);
                last = train_for(&bench, 60, &first);
                assert_true(first > 5 && first < 6.5);
                if (last > first - 1.5)
                        fail_msg("%s: loss %.3f at first, then %.3f", lines[i], first, last);
                assert_int_equal(lm_evaluate(&bench.trainer, &held_out), 0);
                assert_true(held_out < first - 1 && held_out > 0);
                bench_close(&bench);
        }
}

static void generation_is_deterministic(void **state)
{
        char samples[3][64];

        (void)state;
        for (int i = 0; i < 3; i++) {
                struct bench bench;
                double first;

                bench_open(&bench, i < 2 ? SMALL "--world 1 --lr 0.02"
                                         : SMALL "--world 1 --lr 0.02 --seed 2", AE_REAL_F32);
                train_for(&bench, 10, &first);
                assert_int_equal(lm_generate(&bench.trainer, "the ", sizeof(samples[i]),
                                             samples[i]), 0);
                bench_close(&bench);
        }
        assert_memory_equal(samples[0], samples[1], sizeof(samples[0]));
        assert_memory_not_equal(samples[0], samples[2], sizeof(samples[0]));
}

/* A backend's operations with one of them doctored. */
static struct lm_backend_ops doctored;
static const struct lm_backend_ops *sound;

static int scatter_nan(struct lm_backend *backend, uint32_t unit, const void *const *grads)
{
        if (unit == lm_unit_head(backend->spec)) /* the training thread's own array */
                ((float *)(uintptr_t)grads[LM_HEAD_NORM])[3] = NAN;
        return sound->scatter(backend, unit, grads);
}

/* Neither evaluation nor generation changes anything that training goes on from. */
static void only_training_counts_tokens(void **state)
{
        static const char line[] = SMALL "--world 2 --ep-size 2 --balance 0.1 --lr 0.02";
        struct bench pure, mixed;
        const size_t len = 2 * 4 * sizeof(*pure.trainer.counts);
        char sample[16];

        (void)state;
        bench_open(&pure, line, AE_REAL_F32);
        bench_open(&mixed, line, AE_REAL_F32);
        for (uint64_t step = 0; step < 3; step++) {
                const struct lm_outcome one = bench_step(&pure, step);
                const struct lm_outcome other = bench_step(&mixed, step);
                double loss;

                assert_memory_equal(&one.loss, &other.loss, sizeof(one.loss));
                assert_int_equal(lm_evaluate(&mixed.trainer, &loss), 0);
                assert_int_equal(lm_generate(&mixed.trainer, "the ", sizeof(sample), sample), 0);
                assert_memory_equal(mixed.trainer.counts, pure.trainer.counts, len);
                assert_memory_equal(mixed.trainer.all_counts, pure.trainer.all_counts, len);
        }
        for (uint32_t id = 0; id < pure.spec.n_tensors; id++) {
                const uint64_t n = pure.spec.tensors[id].n;
                float *one = calloc(n, sizeof(*one)), *other = calloc(n, sizeof(*other));

                assert_int_equal(pure.backend->ops->get(pure.backend, id, LM_MASTER, one), 0);
                assert_int_equal(mixed.backend->ops->get(mixed.backend, id, LM_MASTER, other), 0);
                assert_memory_equal(one, other, n * sizeof(*one));
                free(one);
                free(other);
        }
        bench_close(&pure);
        bench_close(&mixed);
}

/* What a doctored backend bends: one value of a tensor, by a little, or a figure of the verdict. */
static struct bend {
        const char *what, *words; /* which the output has; words: the tensor, if one is bent */
        enum lm_what kind;
        double norm;              /* factor of the norm; 0: it isn't bent */
        bool verdict;             /* the second step pretends that it was skipped */
} bend;
static uint64_t n_bent_steps;

static int get_bent(struct lm_backend *backend, uint32_t id, enum lm_what what, float *data)
{
        int r = sound->get(backend, id, what, data);

        if (what == bend.kind && strcmp(backend->spec->tensors[id].name, bend.words) == 0)
                data[5] *= 1.001f;
        return r;
}

static int step_bent(struct lm_backend *backend, const struct lm_step *step,
                     struct lm_verdict *ret_verdict)
{
        int r = sound->step(backend, step, ret_verdict);

        if (bend.norm != 0)
                ret_verdict->norm *= bend.norm;
        if (bend.verdict && ++n_bent_steps == 2)
                ret_verdict->applied = false;
        return r;
}

static void bad_gradient_skips_the_step(void **state)
{
        struct bench bench;
        struct lm_outcome outcome;
        float *before, *after;

        (void)state;
        bench_open(&bench, SMALL "--world 2 --ep-size 2", AE_REAL_F32);
        bench_step(&bench, 0);
        before = bench_state(&bench, LM_MASTER);
        sound = bench.backend->ops;
        doctored = *sound;
        doctored.scatter = scatter_nan;
        bench.backend->ops = &doctored;
        outcome = bench_step(&bench, 1);
        assert_false(outcome.verdict.applied);
        after = bench_state(&bench, LM_MASTER);
        assert_memory_equal(before, after, bench.spec.n_elements * sizeof(float));
        bench.backend->ops = sound;
        assert_true(bench_step(&bench, 2).verdict.applied);
        free(before);
        free(after);
        bench_close(&bench);
}

/* The output of a check of one reference against another; freed by the caller. */
static char *check_output(const struct lm_backend_ops *mine_ops,
                          const struct lm_backend_ops *their_ops, const char *options,
                          bool *ret_passed)
{
        struct bench mine, theirs;
        struct lm_check check = { .trainer = &mine.trainer, .reference = &theirs.trainer };
        char *words = NULL, line[512];
        size_t len = 0;

        snprintf(line, sizeof(line), SMALL "--check --world 4 --ep-size 2 --sum-group 2 "
                 "--uneven --accumulate 2 %s", options);
        bench_open(&mine, line, AE_REAL_F64);
        bench_open(&theirs, line, AE_REAL_F64);
        sound = mine.backend->ops;
        mine.backend->ops = mine_ops ? mine_ops : sound;
        theirs.backend->ops = their_ops ? their_ops : sound;
        check.out = open_memstream(&words, &len);
        assert_non_null(check.out);
        if (lm_check_run(&check, ret_passed) < 0)
                fail_msg("%s", ae_error_text());
        fclose(check.out);
        bench_close(&mine);
        bench_close(&theirs);
        return words;
}

/* The reference's operations, for some of them to be replaced. */
static struct lm_backend_ops sound_ops(void)
{
        struct lm_backend_ops ops;
        struct bench bench;

        bench_open(&bench, SMALL "--world 1", AE_REAL_F64);
        ops = *bench.backend->ops;
        bench_close(&bench);
        return ops;
}

static void check_passes_what_is_equal(void **state)
{
        bool passed = false;
        char *words = check_output(NULL, NULL, "--steps 2", &passed);

        (void)state;
        if (!passed || !strstr(words, "check: passed") || !strstr(words, " 0 of ") ||
            strstr(words, " 0 of 0 ") || strstr(words, " apart"))
                fail_msg("%s", words);
        free(words);
}

static void check_names_what_differs(void **state)
{
        static const struct bend bends[] = {
                { .what = "gradient", .kind = LM_GRADIENT, .words = "layer.1.router" },
                { .what = "gradient", .kind = LM_GRADIENT, .words = "layer.0.expert.3.up" },
                { .what = "weight", .kind = LM_MASTER, .words = "layer.0.attn_norm" },
                { .what = "weight", .kind = LM_MASTER, .words = "layer.1.expert.0.down" },
                { .what = "norm", .norm = 1.00001, .words = "  *\n" },
                { .what = "verdict", .verdict = true, .words = "the verdict of a step differs" },
        };
        struct lm_backend_ops ops = sound_ops();

        (void)state;
        ops.get = get_bent;
        ops.step = step_bent;
        for (size_t i = 0; i < AE_ARRAY_LEN(bends); i++) {
                bool passed = true;
                char *words;

                bend = bends[i];
                n_bent_steps = 0;
                words = check_output(&ops, NULL, "--steps 2", &passed);
                if (passed || !strstr(words, "check: FAILED") || !strstr(words, bend.what) ||
                    !strstr(words, bend.words))
                        fail_msg("bent %s, %s:\n%s", bend.what, bend.words, words);
                free(words);
        }
}

/* The last layer's first two experts score alike but for one part in 10^6, which @favoured has. */
static int gather_alike(struct lm_backend *backend, uint32_t unit, size_t favoured,
                        struct lm_view *ret_view)
{
        static float routers[2][4 * 16]; /* [experts][dim] */
        float *router = routers[favoured];
        int r = sound->gather(backend, unit, ret_view);

        if (r < 0 || unit != lm_unit_layer(1))
                return r;
        memcpy(router, ret_view->data[LM_ROUTER], sizeof(routers[0]));
        memcpy(router + 16, router, 16 * sizeof(*router));
        for (size_t i = 0; i < 16; i++)
                router[favoured * 16 + i] *= 1 + 1e-6f;
        ret_view->data[LM_ROUTER] = router;
        return r;
}

static int gather_first(struct lm_backend *backend, uint32_t unit, struct lm_view *ret_view)
{
        return gather_alike(backend, unit, 0, ret_view);
}

static int gather_second(struct lm_backend *backend, uint32_t unit, struct lm_view *ret_view)
{
        return gather_alike(backend, unit, 1, ret_view);
}

static void check_tells_how_near_scores_were(void **state)
{
        struct lm_backend_ops first = sound_ops(), second = first;
        unsigned long long n = 0, all = 0;
        bool passed = true;
        double gap = -1;
        char *words, *line;

        (void)state;
        first.gather = gather_first;
        second.gather = gather_second;
        words = check_output(&first, &second, "--steps 1 --top-k 1 --balance 0", &passed);
        line = strstr(words, " routings differ");
        while (line && line > words && line[-1] != '\n')
                line--;
        if (!line || sscanf(line, "check: %llu of %llu routings differ, where scores were up to "
                            "%lf apart\n", &n, &all, &gap) != 3 ||
            n == 0 || n >= all / 2 || gap <= 0 || gap > 1e-5)
                fail_msg("%llu of %llu, %g:\n%s", n, all, gap, words);
        free(words);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(options_have_defaults_and_limits),
                cmocka_unit_test(shapes_are_checked),
                cmocka_unit_test(files_are_read_once_and_in_order),
                cmocka_unit_test(order_of_data_is_pure),
                cmocka_unit_test(held_out_text_is_dealt_once),
                cmocka_unit_test(learning_rate_warms_up_and_cools_down),
                cmocka_unit_test(division_changes_gradients_by_rounding_only),
                cmocka_unit_test(norm_counts_each_element_once),
                cmocka_unit_test(loss_falls),
                cmocka_unit_test(generation_is_deterministic),
                cmocka_unit_test(only_training_counts_tokens),
                cmocka_unit_test(bad_gradient_skips_the_step),
                cmocka_unit_test(check_passes_what_is_equal),
                cmocka_unit_test(check_names_what_differs),
                cmocka_unit_test(check_tells_how_near_scores_were),
        };

        return cmocka_run_group_tests_name("moe-lm", tests, bench_make_text, NULL);
}
