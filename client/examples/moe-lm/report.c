/* SPDX-License-Identifier: Apache-2.0 */
/* Progress and summary, by rank 0's main thread. */
#include "client/examples/moe-lm/report.h"

#include "client/examples/moe-lm/blas.h"
#include "client/examples/moe-lm/curve.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <langinfo.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LIVE_NS (AE_NS_PER_S / 10)
#define PLAIN_NS (10 * AE_NS_PER_S)

int lm_report_init(struct lm_report *report, FILE *out, const struct lm_trainer *trainer)
{
        *report = (struct lm_report){ .out = out, .trainer = trainer,
                                      .losses = calloc(trainer->options->steps, sizeof(double)) };
        if (!report->losses)
                return ae_fail_sys(ENOMEM, "cannot note the losses of %u steps",
                                   trainer->options->steps);
        setlocale(LC_CTYPE, "");
        report->unicode = strcmp(nl_langinfo(CODESET), "UTF-8") == 0;
        report->live = out && isatty(fileno(out));
        return 0;
}

void lm_report_deinit(struct lm_report *report)
{
        free(report->losses);
        *report = (struct lm_report){ 0 };
}

void lm_report_begin(struct lm_report *report)
{
        const struct lm_backend *backend = report->trainer->backend;
        const struct lm_spec *spec = backend->spec;
        const struct lm_text *text = report->trainer->deal.text;

        report->start_ns = report->line_ns = report->step_ns = ae_now_ns();
        if (!report->out)
                return;
        fprintf(report->out, "moe-lm: BLAS %s (threads: %d), kernels %s, %s backend, %s\n",
                lm_blas_core(), lm_blas_threads(), ae_ops()->name, backend->ops->name,
                backend->real == AE_REAL_F64 ? "double" : "fp32");
        fprintf(report->out, "%u rank%s, %.2f M dense and %.2f M expert parameters, %.0f KiB of "
                "text\n", backend->world, backend->world > 1 ? "s" : "",
                (double)spec->n_dense_elements / 1e6,
                (double)(spec->n_elements - spec->n_dense_elements) / 1e6,
                (double)text->n / 1024);
        fflush(report->out);
}

static double seconds(uint64_t ns)
{
        return (double)ns / (double)AE_NS_PER_S;
}

/* Rates: what this process gathered and scattered, over the whole time since the last line. */
static void print_line(struct lm_report *report, const struct lm_outcome *outcome, uint64_t now)
{
        const struct lm_times *times = &report->trainer->backend->times;
        const double passed = seconds(now - report->line_ns);
        const size_t steps = report->trainer->options->steps;
        const double left = seconds(now - report->start_ns) / (double)report->n *
                            (double)(steps - report->n);

        fprintf(report->out, "%sstep %zu/%zu  loss %.4f  %.0f tokens/s  gather %.3f GB/s  "
                "scatter %.3f GB/s  ETA %u:%02u%s", report->live ? "\r" : "", report->n, steps,
                outcome->loss, report->line_tokens / passed,
                (double)(times->gather_len - report->line_times.gather_len) / passed / 1e9,
                (double)(times->scatter_len - report->line_times.scatter_len) / passed / 1e9,
                (unsigned)left / 60, (unsigned)left % 60, report->live ? "\033[K" : "\n");
        fflush(report->out);
        report->line_ns = now;
        report->line_tokens = 0;
        report->line_times = *times;
}

void lm_report_step(struct lm_report *report, const struct lm_outcome *outcome)
{
        const uint64_t now = ae_now_ns();
        const bool quiet = report->trainer->options->quiet || !report->out;

        report->losses[report->n++] = outcome->loss;
        report->step_ns = now;
        report->step_times = report->trainer->backend->times;
        report->tokens += outcome->tokens;
        report->line_tokens += outcome->tokens;
        if (!outcome->verdict.applied) {
                report->skipped++;
                if (report->out)
                        fprintf(report->out, "%sstep %zu was not applied: %s\n",
                                report->live ? "\r\033[K" : "", report->n, outcome->verdict.why);
        }
        if (!quiet && now - report->line_ns >= (report->live ? LIVE_NS : PLAIN_NS))
                print_line(report, outcome, now);
}

/* The mean of the last 10 steps. */
static double last_loss(const struct lm_report *report)
{
        const size_t n = AE_MIN(report->n, (size_t)10);
        double sum = 0;

        for (size_t i = report->n - n; i < report->n; i++)
                sum += report->losses[i];
        return n > 0 ? sum / (double)n : 0;
}

static void print_time(const struct lm_report *report)
{
        const struct lm_times *t = &report->step_times;
        const double steps = (double)AE_MAX(report->n, (size_t)1);
        const uint64_t all = report->step_ns - report->start_ns;
        const uint64_t waits = t->gather_ns + t->dispatch_ns + t->scatter_ns + t->step_ns;
        const double ms = 1e3 / steps;

        fprintf(report->out, "step time    %.1f ms: gather wait %.1f, compute %.1f, dispatch %.1f, "
                "scatter %.1f, step %.1f\n", seconds(all) * ms, seconds(t->gather_ns) * ms,
                seconds(all - AE_MIN(waits, all)) * ms, seconds(t->dispatch_ns) * ms,
                seconds(t->scatter_ns) * ms, seconds(t->step_ns) * ms);
        fprintf(report->out, "speed        %.0f tokens/s over all ranks\n",
                report->tokens / AE_MAX(seconds(all), 1e-9));
}

static void print_experts(const struct lm_report *report, const uint64_t *counts)
{
        const struct lm_shape *s = &report->trainer->backend->spec->shape;

        fprintf(report->out, "tokens per expert, and the largest over the mean\n");
        for (uint32_t l = 0; l < s->layers; l++, counts += s->experts) {
                uint64_t sum = 0, most = 0;

                fprintf(report->out, "  layer %-3u ", l);
                for (uint32_t e = 0; e < s->experts; e++) {
                        sum += counts[e];
                        most = AE_MAX(most, counts[e]);
                        if (e < 16)
                                fprintf(report->out, " %llu", (unsigned long long)counts[e]);
                }
                fprintf(report->out, "%s   %.2f\n", s->experts > 16 ? " ..." : "",
                        sum ? (double)most * s->experts / (double)sum : 1);
        }
}

/* What isn't printable shows as a dot. */
static void print_sample(const struct lm_report *report, const struct lm_ending *ending)
{
        fprintf(report->out, "sample\n%s", ending->prompt);
        for (size_t i = 0; i < ending->n_sample; i++) {
                const char c = ending->sample[i];

                fputc((c >= ' ' && c <= '~') || c == '\n' ? c : '.', report->out);
        }
        fputc('\n', report->out);
}

void lm_report_end(struct lm_report *report, const struct lm_ending *ending)
{
        FILE *out = report->out;

        if (!out)
                return;
        fprintf(out, "%sloss         %.4f at the start, %.4f at the end (mean of 10 steps), %.4f "
                "held out\n", report->live ? "\r\033[K" : "", report->losses[0],
                last_loss(report), ending->held_out);
        if (report->skipped)
                fprintf(out, "not applied  %llu steps\n", (unsigned long long)report->skipped);
        print_time(report);
        fprintf(out, "%s\n", ending->moved);
        print_experts(report, ending->counts);
        lm_curve_draw(out, report->losses, report->n, report->unicode);
        if (ending->sample)
                print_sample(report, ending);
        fflush(out);
}
