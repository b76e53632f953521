/* SPDX-License-Identifier: Apache-2.0 */
/* What the example trainer prints and draws: progress, summary, loss curves. */
#include "client/examples/moe-lm/curve.h"
#include "client/examples/moe-lm/report.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/lm-bench.h"
#include "tests/lib/test.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

/* A report of a trainer that has done no step, and what it has printed. */
struct printed {
        struct bench bench;
        struct lm_report report;
        FILE *out;
        char *words; /* owned; after printed_close() */
        size_t len;
};

static void printed_open(struct printed *printed, const char *line)
{
        *printed = (struct printed){ 0 };
        printed->out = open_memstream(&printed->words, &printed->len);
        assert_non_null(printed->out);
        bench_open(&printed->bench, line, AE_REAL_F32);
        assert_int_equal(lm_report_init(&printed->report, printed->out, &printed->bench.trainer),
                         0);
        lm_report_begin(&printed->report);
        assert_false(printed->report.live);
}

static void printed_step(struct printed *printed, uint64_t step)
{
        const struct lm_outcome outcome = bench_step(&printed->bench, step);

        lm_report_step(&printed->report, &outcome);
        fflush(printed->out);
}

static void printed_close(struct printed *printed)
{
        lm_report_deinit(&printed->report);
        fclose(printed->out);
        bench_close(&printed->bench);
}

/* As if the last line had been printed that long ago, and nothing since. */
static void pass_time(struct printed *printed, uint64_t ns)
{
        printed->report.line_ns -= ns;
        printed->report.start_ns -= ns;
}

/* The one line of progress in @words, with its end: figures and the time that is left. */
static void check_line(const char *words, const char *begin, const char *end, size_t step)
{
        const char *at = strstr(words, "step ");
        double loss = -1, rate = -1, gathered = -1, scattered = -1;
        unsigned minutes = 99, seconds = 99;
        size_t n = 0, steps = 0;
        int len = 0;

        if (!at || count_of(words, "step ") != 1 ||
            sscanf(at, "step %zu/%zu  loss %lf  %lf tokens/s  gather %lf GB/s  scatter %lf GB/s  "
                   "ETA %u:%2u%n", &n, &steps, &loss, &rate, &gathered, &scattered, &minutes,
                   &seconds, &len) != 8 ||
            (size_t)(at - words) < strlen(begin) || strcmp(at + len, end) != 0 ||
            strncmp(at - strlen(begin), begin, strlen(begin)) != 0)
                fail_msg("no line of progress in:\n%s", words);
        assert_int_equal(n, step);
        assert_int_equal(steps, 4);
        assert_true(loss > 1 && loss < 7);
        assert_true(rate >= 1 && seconds < 60);
        assert_true(gathered >= 0 && scattered >= 0);
}

/* What ran since the last line, over the time since then; the rest at the mean of all steps. */
static void figures_of_a_line_are_rates(void **state)
{
        struct printed p;
        unsigned minutes = 0, seconds = 0;
        double rate = 0, gathered = 0;
        char *at;

        (void)state;
        printed_open(&p, SMALL "--steps 4 --world 1 --batch 4");
        for (uint64_t step = 0; step < 2; step++) {
                pass_time(&p, 10 * AE_NS_PER_S);
                p.bench.backend->times.gather_len += 500000000000; /* as if */
                printed_step(&p, step);
        }
        printed_close(&p);
        at = strstr(p.words, "step 2/4  loss");
        assert_non_null(at);
        assert_int_equal(sscanf(strstr(at, "loss"), "loss %*f  %lf tokens/s  gather %lf", &rate,
                                &gathered), 2);
        assert_int_equal(sscanf(strstr(at, "ETA"), "ETA %u:%u", &minutes, &seconds), 2);
        /* 64 tokens and 500 GB in 10 s, then 2 steps of 10 s; or half as fast on a busy machine. */
        assert_true(rate >= 3 && rate <= 7);
        assert_true(gathered > 25 && gathered < 50.01);
        assert_true(minutes * 60 + seconds >= 20 && minutes * 60 + seconds < 40);
        free(p.words);
}

static void a_plain_line_comes_every_ten_seconds(void **state)
{
        struct printed p;

        (void)state;
        printed_open(&p, SMALL "--steps 4 --world 1 --batch 4");
        printed_step(&p, 0);
        pass_time(&p, 5 * AE_NS_PER_S);
        printed_step(&p, 1);
        assert_null(strstr(p.words, "step "));
        pass_time(&p, 5 * AE_NS_PER_S);
        printed_step(&p, 2);
        check_line(p.words, "\n", "\n", 3);
        printed_step(&p, 3); /* the time begins anew */
        check_line(p.words, "\n", "\n", 3);
        assert_null(strchr(p.words, '\r'));
        assert_null(strchr(p.words, '\033'));
        printed_close(&p);
        free(p.words);
}

static void a_live_line_is_drawn_over_itself(void **state)
{
        struct printed p;
        size_t before;

        (void)state;
        printed_open(&p, SMALL "--steps 4 --world 1 --batch 4");
        p.report.live = true;
        for (uint64_t step = 0; step < 3; step++) {
                before = p.len;
                pass_time(&p, AE_NS_PER_S / 10);
                printed_step(&p, step);
                check_line(p.words + before, "\r", "\033[K", step + 1);
        }
        printed_close(&p);
        free(p.words);
}

static void a_terminal_gets_the_live_line(void **state)
{
        const int terminal = posix_openpt(O_RDWR | O_NOCTTY);
        struct lm_report report;
        struct bench bench;
        int other;
        FILE *out;

        (void)state;
        if (terminal < 0 || grantpt(terminal) < 0 || unlockpt(terminal) < 0)
                fail_msg("no terminal: %s", strerror(errno));
        other = open(ptsname(terminal), O_RDWR | O_NOCTTY);
        assert_true(other >= 0);
        out = fdopen(other, "w");
        assert_non_null(out);
        bench_open(&bench, SMALL "--steps 4 --world 1", AE_REAL_F32);
        assert_int_equal(lm_report_init(&report, out, &bench.trainer), 0);
        assert_true(report.live);
        lm_report_deinit(&report);
        bench_close(&bench);
        fclose(out);
        close(terminal);
}

static void quiet_has_no_progress(void **state)
{
        struct printed p;

        (void)state;
        printed_open(&p, SMALL "--steps 4 --world 1 --quiet");
        pass_time(&p, 20 * AE_NS_PER_S);
        printed_step(&p, 0);
        assert_null(strstr(p.words, "step "));
        printed_close(&p);
        free(p.words);
}

/* Parts of the mean step, in ms; they add up but for what each is rounded by. @least: of each. */
static void check_times(const char *words, const double *least)
{
        double all = -1, parts[5] = { 0 }, sum = 0;
        const char *line = strstr(words, "step time ");

        if (!line || sscanf(line, "step time %lf ms: gather wait %lf, compute %lf, dispatch %lf, "
                            "scatter %lf, step %lf\n", &all, &parts[0], &parts[1], &parts[2],
                            &parts[3], &parts[4]) != 6)
                fail_msg("no step time in:\n%s", words);
        for (size_t i = 0; i < AE_ARRAY_LEN(parts); i++) {
                sum += parts[i];
                if (parts[i] < least[i] || parts[i] > least[i] + 500)
                        fail_msg("part %zu is not near %g:\n%s", i, least[i], words);
        }
        if (all <= 0 || fabs(sum - all) > 0.31)
                fail_msg("%g ms, but its parts are %g:\n%s", all, sum, words);
}

/* Every token of every step visits top_k experts of every layer. */
static void check_experts(const char *words, uint64_t visits)
{
        for (int layer = 0; layer < 2; layer++) {
                unsigned long long counts[4], sum = 0, most = 0;
                double imbalance = 0;
                char name[16];
                const char *line;

                snprintf(name, sizeof(name), "layer %d ", layer);
                line = strstr(words, name);
                if (!line || sscanf(line, "layer %*d %llu %llu %llu %llu %lf\n", &counts[0],
                                    &counts[1], &counts[2], &counts[3], &imbalance) != 5)
                        fail_msg("no %s in:\n%s", name, words);
                for (size_t e = 0; e < AE_ARRAY_LEN(counts); e++) {
                        sum += counts[e];
                        most = AE_MAX(most, counts[e]);
                }
                assert_int_equal(sum, visits);
                assert_true(fabs(imbalance - (double)most * 4 / (double)sum) <= 0.0051);
        }
}

static void summary_has_all_parts(void **state)
{
        static const double times[] = { 750, 1000, 1250, 1750, 2750 };
        static const char *const parts[] = { "moe-lm: BLAS ", "kernels ", "loss  ", "held out",
                                             "tokens/s", "bytes  none", "the prompt", ".x" };
        struct printed p;
        struct lm_ending ending = { .held_out = 2, .moved = "bytes  none", .prompt = "the prompt",
                                    .sample = "\x01x", .n_sample = 2 };

        (void)state;
        printed_open(&p, SMALL "--steps 4 --world 2 --ep-size 2 --batch 3 --top-k 2 "
                     "--accumulate 2");
        for (uint64_t step = 0; step < 4; step++)
                printed_step(&p, step);
        p.report.step_times.gather_ns += 3 * AE_NS_PER_S; /* as if: each part shows */
        p.report.step_times.dispatch_ns += 5 * AE_NS_PER_S;
        p.report.step_times.scatter_ns += 7 * AE_NS_PER_S;
        p.report.step_times.step_ns += 11 * AE_NS_PER_S;
        p.report.start_ns -= 30 * AE_NS_PER_S;
        ending.counts = p.bench.trainer.all_counts;
        lm_report_end(&p.report, &ending);
        printed_close(&p);
        for (size_t i = 0; i < AE_ARRAY_LEN(parts); i++) {
                if (!strstr(p.words, parts[i]))
                        fail_msg("%s is missing in:\n%s", parts[i], p.words);
        }
        check_times(p.words, times);
        check_experts(p.words, 2UL * 2 * 3 * 16 * 2 * 4);
        free(p.words);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(pictures_are_well_formed),
                cmocka_unit_test(curves_fall_from_left_to_right),
                cmocka_unit_test(figures_of_a_line_are_rates),
                cmocka_unit_test(a_plain_line_comes_every_ten_seconds),
                cmocka_unit_test(a_live_line_is_drawn_over_itself),
                cmocka_unit_test(a_terminal_gets_the_live_line),
                cmocka_unit_test(quiet_has_no_progress),
                cmocka_unit_test(summary_has_all_parts),
        };

        return cmocka_run_group_tests_name("moe-lm-report", tests, bench_make_text, NULL);
}
