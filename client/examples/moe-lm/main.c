/* SPDX-License-Identifier: Apache-2.0 */
/*
 * moe-lm: trains a small mixture-of-experts language model on text, over autoep or, with
 * --reference, in one process without it. Start it under autoep-run. See --help.
 */
#include "client/examples/moe-lm/blas.h"
#include "client/examples/moe-lm/check.h"
#include "client/examples/moe-lm/curve.h"
#include "client/examples/moe-lm/daemons.h"
#include "client/examples/moe-lm/options.h"
#include "client/examples/moe-lm/reference.h"
#include "client/examples/moe-lm/report.h"
#include "client/examples/moe-lm/text.h"
#include "client/examples/moe-lm/trace.h"
#include "client/examples/moe-lm/train.h"
#include "proto/base/status.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROMPT "This "
#define EXIT_USAGE 2

/* All that a run owns. */
struct app {
        struct lm_options options;
        struct lm_text text;
        struct lm_spec spec;
        struct lm_backend *backend;
        struct lm_trainer trainer;
        struct lm_report report;
        struct lm_trace trace;
};

static bool is_first(const struct app *app)
{
        return app->backend->first_rank == 0;
}

static int open_reference(const struct app *app, enum ae_real real,
                          const struct lm_daemons_job *job, struct lm_backend **ret_backend)
{
        const struct lm_options *o = &app->options;
        const struct lm_reference_config config = {
                .real = real, .topology = job->topology, .sum_group = job->sum_group,
                .grad_dtype = o->grads, .sgd = o->optimizer, .seed = o->seed,
        };

        return lm_reference_new(&app->spec, &config, ret_backend);
}

/* The job that --reference plays. */
static int played_job(const struct lm_options *o, struct lm_daemons_job *ret_job)
{
        const uint32_t ep_size = o->ep_size ? o->ep_size : o->world % 2 == 0 ? 2 : 1;

        ret_job->sum_group = o->sum_group ? o->sum_group : o->world;
        return ae_group_init(o->world, ep_size, o->order, &ret_job->topology);
}

static int open_backend(struct app *app)
{
        const struct lm_options *o = &app->options;
        const struct lm_daemons_config config = {
                .real = o->check ? AE_REAL_F64 : AE_REAL_F32, .ep_size = o->ep_size,
                .order = o->order, .sum_group = o->sum_group, .grad_dtype = o->grads,
                .sgd = o->optimizer, .seed = o->seed,
        };
        struct lm_daemons_job job;
        int r;

        if (!o->reference)
                return lm_daemons_new(&app->spec, &config, &app->backend);
        r = played_job(o, &job);
        return r < 0 ? r : open_reference(app, AE_REAL_F32, &job, &app->backend);
}

static int set_up(struct app *app)
{
        const struct lm_shape shape = lm_shape_of(&app->options);
        int r = lm_text_open(&app->text, app->options.paths, app->options.n_paths,
                             app->options.seq);

        if (r == 0)
                r = lm_spec_init(&app->spec, &shape);
        if (r == 0)
                r = open_backend(app);
        if (r == 0)
                r = lm_trainer_init(&app->trainer, app->backend, &app->text, &app->options);
        if (r == 0)
                r = lm_report_init(&app->report, is_first(app) ? stdout : NULL, &app->trainer);
        if (r == 0)
                r = lm_trace_open(&app->trace, &app->trainer, app->options.trace);
        return r;
}

static void tear_down(struct app *app)
{
        lm_trace_deinit(&app->trace);
        lm_report_deinit(&app->report);
        lm_trainer_deinit(&app->trainer);
        lm_backend_free(app->backend);
        lm_spec_deinit(&app->spec);
        lm_text_deinit(&app->text);
}

static int draw_svg(const struct app *app)
{
        const char *path = app->options.svg;
        FILE *out;

        if (!is_first(app) || path[0] == '\0')
                return 0;
        out = fopen(path, "w");
        if (!out)
                return ae_fail_sys(errno, "cannot write %s", path);
        lm_curve_svg(out, app->report.losses, app->report.n, "moe-lm: loss per token");
        if (ferror(out) | (fclose(out) != 0))
                return ae_fail_sys(errno, "cannot write %s", path);
        return 0;
}

/* The token counts of all ranks, exact up to 2^53. */
static int total_counts(struct app *app)
{
        const size_t n = (size_t)app->spec.shape.layers * app->spec.shape.experts;
        double *values = calloc(n, sizeof(*values));
        int r;

        if (!values)
                return ae_fail_sys(ENOMEM, "cannot add up the counts of %zu experts", n);
        for (size_t i = 0; i < n; i++)
                values[i] = (double)app->trainer.all_counts[i];
        r = lm_total(app->backend, values, n);
        for (size_t i = 0; i < n; i++)
                app->trainer.all_counts[i] = (uint64_t)values[i];
        free(values);
        return r;
}

static int summarise(struct app *app)
{
        char moved[1024] = "";
        char *sample = calloc(1, (size_t)app->options.sample + 1);
        struct lm_ending ending = { .counts = app->trainer.all_counts, .moved = moved,
                                    .prompt = PROMPT, .n_sample = app->options.sample };
        int r;

        if (!sample)
                return ae_fail_sys(ENOMEM, "cannot generate %u bytes", app->options.sample);
        app->backend->ops->describe(app->backend, moved, sizeof(moved));
        r = total_counts(app);
        if (r == 0)
                r = lm_evaluate(&app->trainer, &ending.held_out);
        if (r == 0)
                r = lm_generate(&app->trainer, PROMPT, app->options.sample, sample);
        if (r == 0) {
                ending.sample = app->options.sample ? sample : NULL;
                lm_report_end(&app->report, &ending);
                r = draw_svg(app);
        }
        free(sample);
        return r;
}

static int train(struct app *app)
{
        int r;

        for (uint64_t step = 0; step < app->options.steps; step++) {
                struct lm_outcome outcome;

                r = lm_train_step(&app->trainer, step, &outcome);
                if (r < 0)
                        return r;
                lm_report_step(&app->report, &outcome);
                lm_trace_step(&app->trace, &outcome);
        }
        r = lm_trace_end(&app->trace);
        return r < 0 ? r : summarise(app);
}

/* Positive: the check failed. */
static int check(struct app *app)
{
        const struct lm_daemons_job job = lm_daemons_job(app->backend);
        struct lm_check check = { .trainer = &app->trainer };
        struct lm_backend *backend = NULL;
        struct lm_trainer reference = { 0 };
        bool passed = false;
        int r = 0;

        if (is_first(app)) {
                check.out = stdout;
                check.reference = &reference;
                r = open_reference(app, AE_REAL_F64, &job, &backend);
                if (r == 0)
                        r = lm_trainer_init(&reference, backend, &app->text, &app->options);
        }
        if (r == 0)
                r = lm_check_run(&check, &passed);
        lm_trainer_deinit(&reference);
        lm_backend_free(backend);
        return r < 0 ? r : !passed;
}

static int run(struct app *app)
{
        int r = set_up(app);

        if (r < 0)
                return r;
        lm_report_begin(&app->report);
        return app->options.check ? check(app) : train(app);
}

static void complain(void)
{
        fprintf(stderr, "moe-lm: %s\n", ae_error_text());
}

int main(int argc, char **argv)
{
        struct app app = { 0 };
        int r;

        lm_blas_choose(argv);
        r = lm_options_parse(&app.options, argc, argv);
        if (r < 0) {
                complain();
                return EXIT_USAGE;
        }
        if (app.options.help) {
                lm_options_help("moe-lm");
                return EXIT_SUCCESS;
        }
        r = run(&app);
        if (r < 0)
                complain(); /* before tear_down() changes the words */
        tear_down(&app);
        return r == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
