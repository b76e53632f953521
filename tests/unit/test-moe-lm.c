/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The example trainer without daemons: options, text and its order, the reference (whose gradients
 * may not depend on how ranks and groups divide the work), a falling loss, generation, the check
 * against a sound and a doctored backend, and the pictures.
 */
#include "client/examples/moe-lm/check.h"
#include "client/examples/moe-lm/curve.h"
#include "client/examples/moe-lm/reference.h"
#include "client/examples/moe-lm/report.h"
#include "client/examples/moe-lm/train.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint8_t text_bytes[20000];
static struct lm_text text;

/* Words in a fixed but uneven order: something that can be learnt. */
static int make_text(void **state)
{
        static const char *const words[] = { "the ", "expert ", "layer ", "token ", "of ", "a ",
                                             "router. " };
        size_t n = 0, at = 1;

        (void)state;
        while (n + 16 < sizeof(text_bytes)) {
                const char *word = words[at % AE_ARRAY_LEN(words)];

                memcpy(text_bytes + n, word, strlen(word));
                n += strlen(word);
                at = at * 5 + n % 11;
        }
        text = (struct lm_text){ .bytes = text_bytes, .n = n, .n_train = n - n / 20 };
        return 0;
}

static int parse(struct lm_options *options, const char *line)
{
        static char words[1024];
        static char *argv[64]; /* the options borrow from it */
        char *rest = NULL;
        int argc = 0;

        memset(argv, 0, sizeof(argv));
        snprintf(words, sizeof(words), "moe-lm %s", line);
        for (char *word = strtok_r(words, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
                argv[argc++] = word;
        return lm_options_parse(options, argc, argv);
}

#define SMALL "--layers 2 --dim 16 --heads 2 --experts 4 --expert-dim 12 --seq 16 --warmup 5 "

/* A trainer over the reference. */
struct bench {
        struct lm_options options;
        struct lm_spec spec;
        struct lm_backend *backend;
        struct lm_trainer trainer;
};

static void bench_open(struct bench *bench, const char *line, enum ae_real real)
{
        struct lm_reference_config config = { .real = real };
        struct lm_shape shape;
        int r;

        *bench = (struct bench){ 0 };
        if (parse(&bench->options, line) < 0)
                fail_msg("%s", ae_error_text());
        shape = lm_shape_of(&bench->options);
        config.grad_dtype = bench->options.grads;
        config.sgd = bench->options.optimizer;
        config.seed = bench->options.seed;
        config.sum_group = bench->options.sum_group ? bench->options.sum_group : 1;
        r = ae_group_init(bench->options.world,
                          bench->options.ep_size ? bench->options.ep_size : 1,
                          bench->options.order, &config.topology);
        if (r == 0)
                r = lm_spec_init(&bench->spec, &shape);
        if (r == 0)
                r = lm_reference_new(&bench->spec, &config, &bench->backend);
        if (r == 0)
                r = lm_trainer_init(&bench->trainer, bench->backend, &text, &bench->options);
        if (r < 0)
                fail_msg("%s", ae_error_text());
}

static void bench_close(struct bench *bench)
{
        lm_trainer_deinit(&bench->trainer);
        lm_backend_free(bench->backend);
        lm_spec_deinit(&bench->spec);
}

static struct lm_outcome bench_step(struct bench *bench, uint64_t step)
{
        struct lm_outcome outcome;

        if (lm_train_step(&bench->trainer, step, &outcome) < 0)
                fail_msg("%s", ae_error_text());
        return outcome;
}

/* All of a kind of state, tensor after tensor; freed by the caller. */
static float *bench_state(struct bench *bench, enum lm_what what)
{
        float *all = calloc(bench->spec.n_elements, sizeof(*all));

        assert_non_null(all);
        for (uint32_t id = 0; id < bench->spec.n_tensors; id++) {
                const struct lm_tensor *tensor = &bench->spec.tensors[id];

                if (tensor->home == id && tensor->class != LM_BUFFER)
                        assert_int_equal(bench->backend->ops->get(bench->backend, id, what,
                                                                  all + tensor->first), 0);
        }
        return all;
}

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
        assert_int_equal(parse(&options, ""), 0);
        assert_int_equal(options.steps, 300);
        assert_int_equal(options.weights, AE_DTYPE_BF16);
        assert_string_equal(options.paths[0], LM_TEXT_DEFAULT);
        assert_int_equal(parse(&options, "--uneven some.txt --router sigmoid --order de more"), 0);
        assert_true(options.tokens && options.router && options.order == AE_ORDER_DE);
        assert_int_equal(options.n_paths, 2);
        assert_string_equal(options.paths[1], "more");
        assert_int_equal(parse(&options, "--check --steps 100 --lr 0.5"), 0);
        assert_true(options.steps == 6 && options.lr == 1e-3);
        assert_int_equal(parse(&options, "--check --reference"), AE_EINVAL);
        assert_int_equal(parse(&options, "--check --trace x"), AE_EINVAL);
        assert_int_equal(parse(&options, "--batch 0"), AE_EINVAL);
        assert_int_equal(parse(&options, "--lr -1"), AE_EINVAL);
        assert_int_equal(parse(&options, "--weights fp16"), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), "fp32 or bf16"));
        assert_int_equal(parse(&options, "--no-such"), AE_EINVAL);
        assert_int_equal(parse(&options, "--steps"), AE_EINVAL);
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

                assert_int_equal(parse(&options, wrong[i]), 0);
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
        const struct lm_deal deal = { .text = &text, .seed = 9, .world = 4, .accumulate = 2,
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
        const struct lm_deal deal = { .text = &text, .seed = 9, .world = 3, .accumulate = 1,
                                      .n_seqs = 2, .seq = 16 };
        struct lm_dealt dealt;
        uint64_t n_rounds = 1, n_tokens = 0;

        (void)state;
        assert_int_equal(lm_dealt_init(&dealt, &deal), 0);
        for (uint64_t round = 0; round < n_rounds; round++) {
                for (uint32_t rank = 0; rank < 3; rank++) {
                        n_rounds = lm_deal_held_out(&deal, round, rank, &dealt);
                        if (dealt.batch.n_tokens > 0)
                                assert_memory_equal(dealt.batch.tokens,
                                                    text.bytes + text.n_train + n_tokens,
                                                    dealt.batch.n_tokens);
                        n_tokens += dealt.batch.n_tokens;
                }
        }
        assert_int_equal(n_tokens, AE_MIN((text.n - text.n_train - 1) / 16, (size_t)64) * 16);
        lm_dealt_deinit(&dealt);
}

static void learning_rate_warms_up_and_cools_down(void **state)
{
        struct lm_options options;

        (void)state;
        assert_int_equal(parse(&options, "--steps 100 --warmup 10 --lr 0.01"), 0);
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

static int get_bent(struct lm_backend *backend, uint32_t id, enum lm_what what, float *data)
{
        int r = sound->get(backend, id, what, data);

        if (what == LM_GRADIENT && strcmp(backend->spec->tensors[id].name, "layer.1.router") == 0)
                data[5] *= 1.001f;
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
static char *check_output(bool doctor, bool *ret_passed)
{
        static const char line[] = SMALL "--check --steps 2 --world 4 --ep-size 2 --sum-group 2 "
                                         "--uneven --accumulate 2";
        struct bench mine, theirs;
        struct lm_check check = { .trainer = &mine.trainer, .reference = &theirs.trainer };
        char *words = NULL;
        size_t len = 0;

        bench_open(&mine, line, AE_REAL_F64);
        bench_open(&theirs, line, AE_REAL_F64);
        sound = mine.backend->ops;
        doctored = *sound;
        doctored.get = get_bent;
        if (doctor)
                mine.backend->ops = &doctored;
        check.out = open_memstream(&words, &len);
        assert_non_null(check.out);
        if (lm_check_run(&check, ret_passed) < 0)
                fail_msg("%s", ae_error_text());
        fclose(check.out);
        bench_close(&mine);
        bench_close(&theirs);
        return words;
}

static void check_passes_what_is_equal(void **state)
{
        bool passed = false;
        char *words = check_output(false, &passed);

        (void)state;
        if (!passed || !strstr(words, "check: passed") || !strstr(words, " 0 of ") ||
            strstr(words, " 0 of 0 "))
                fail_msg("%s", words);
        free(words);
}

static void check_names_what_differs(void **state)
{
        bool passed = true;
        char *words = check_output(true, &passed);

        (void)state;
        if (passed || !strstr(words, "check: FAILED") || !strstr(words, "layer.1.router"))
                fail_msg("%s", words);
        free(words);
}

/* Enough of XML for our pictures: balanced elements, quoted attributes, escaped text. */
static bool well_formed(const char *at)
{
        char open[16][16];
        int depth = 0, n_roots = 0;

        if (strncmp(at, "<?xml", 5) != 0)
                return false;
        at = strstr(at, "?>") + 2;
        for (; *at; at++) {
                char name[16] = "";
                const char *end;

                if (*at == '&' && strncmp(at, "&lt;", 4) != 0 && strncmp(at, "&gt;", 4) != 0 &&
                    strncmp(at, "&amp;", 5) != 0)
                        return false;
                if (*at == '>' || (*at != '<' && depth == 0 && *at != '\n'))
                        return false;
                if (*at != '<')
                        continue;
                for (end = at + 1; *end && *end != '>'; end++) {
                        if (*end == '"')
                                end = strchr(end + 1, '"');
                        if (!end || *end == '<')
                                return false;
                }
                if (*end == '\0' || sscanf(at + 1, "%15[/a-z]", name) != 1)
                        return false;
                if (name[0] == '/') {
                        if (depth == 0 || strcmp(open[--depth], name + 1) != 0)
                                return false;
                } else if (end[-1] != '/') {
                        if (depth == 16)
                                return false;
                        n_roots += depth == 0;
                        memcpy(open[depth++], name, sizeof(name));
                }
                at = end;
        }
        return depth == 0 && n_roots == 1;
}

static void pictures_are_well_formed(void **state)
{
        const double losses[] = { 5.5, 4, NAN, NAN, 3, 2.5, 2.4, INFINITY };

        (void)state;
        assert_false(well_formed("<?xml?><svg><g></svg>"));
        assert_false(well_formed("<?xml?><svg a=\"1></svg>"));
        for (size_t n = 0; n <= AE_ARRAY_LEN(losses); n++) {
                char *words = NULL;
                size_t len = 0;
                FILE *out = open_memstream(&words, &len);

                assert_non_null(out);
                lm_curve_svg(out, losses, n, "a < b & \"c\"");
                fclose(out);
                if (!well_formed(words) || strstr(words, "nan") || strstr(words, "inf"))
                        fail_msg("%s", words);
                free(words);
        }
}

static size_t count_of(const char *words, const char *what)
{
        size_t n = 0;

        for (const char *at = words; (at = strstr(at, what)); at += strlen(what))
                n++;
        return n;
}

static void curves_fall_from_left_to_right(void **state)
{
        double losses[60];
        char *words = NULL, *first, *last;
        size_t len = 0;
        FILE *out = open_memstream(&words, &len);

        (void)state;
        assert_non_null(out);
        for (int i = 0; i < 60; i++)
                losses[i] = 6 - i * 0.05;
        lm_curve_draw(out, losses, 60, false);
        lm_curve_draw(out, losses, 0, true);
        fclose(out);
        first = strchr(words, '*');
        last = strrchr(words, '*');
        assert_non_null(first);
        assert_true(first[-1] == '|'); /* highest at the left */
        assert_true(last[1] == '\n');  /* lowest at the right */
        assert_int_equal(count_of(words, "*"), 60);
        assert_non_null(strstr(words, "6.000"));
        free(words);
}

static void summary_has_all_parts(void **state)
{
        static const char *const parts[] = { "moe-lm: BLAS ", "kernels ", "loss  ", "held out",
                                             "step time", "gather wait", "tokens/s", "layer 1",
                                             "the prompt" };
        struct bench bench;
        struct lm_report report;
        struct lm_ending ending = { .held_out = 2, .moved = "bytes  none", .prompt = "the prompt",
                                    .sample = "\x01x", .n_sample = 2 };
        char *words = NULL;
        size_t len = 0;
        FILE *out = open_memstream(&words, &len);

        (void)state;
        assert_non_null(out);
        bench_open(&bench, SMALL "--steps 3 --world 1", AE_REAL_F32);
        assert_int_equal(lm_report_init(&report, out, &bench.trainer), 0);
        lm_report_begin(&report);
        for (uint64_t step = 0; step < 3; step++) {
                const struct lm_outcome outcome = bench_step(&bench, step);

                lm_report_step(&report, &outcome);
        }
        ending.counts = bench.trainer.all_counts;
        lm_report_end(&report, &ending);
        lm_report_deinit(&report);
        fclose(out);
        for (size_t i = 0; i < AE_ARRAY_LEN(parts); i++) {
                if (!strstr(words, parts[i]))
                        fail_msg("%s is missing in:\n%s", parts[i], words);
        }
        free(words);
        bench_close(&bench);
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
                cmocka_unit_test(bad_gradient_skips_the_step),
                cmocka_unit_test(check_passes_what_is_equal),
                cmocka_unit_test(check_names_what_differs),
                cmocka_unit_test(pictures_are_well_formed),
                cmocka_unit_test(curves_fall_from_left_to_right),
                cmocka_unit_test(summary_has_all_parts),
        };

        return cmocka_run_group_tests_name("moe-lm", tests, make_text, NULL);
}
