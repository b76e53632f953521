/* SPDX-License-Identifier: Apache-2.0 */
/* A worker's life: open, one case of the table, leave. */
#include "client/bench/worker.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TIMEOUT_MS 120000
#define NAME_MAX_LEN 16

static const struct {
        const char *word, *suite;
        int (*run)(struct ae_bench_job *job);
} cases[] = {
        { "view", "gather", ae_bench_case_view },
        { "miss", "gather", ae_bench_case_miss },
        { "copy", "gather", ae_bench_case_copy },
        { "fetch", "gather", ae_bench_case_fetch },
        { "scatter", "scatter", ae_bench_case_scatter },
};

int ae_bench_job_check(int r)
{
        return r < 0 ? ae_fail(r, "%s", autoep_last_error()) : r;
}

static int read_info(struct ae_bench_job *job)
{
        job->info = (struct autoep_info){ .size = sizeof(job->info) };
        return ae_bench_job_check(autoep_info(job->handle, &job->info));
}

struct listing {
        struct autoep_tensor *tensors;
        char (*names)[NAME_MAX_LEN];
        void *init;
};

static void listing_deinit(struct listing *listing)
{
        free(listing->tensors);
        free(listing->names);
        free(listing->init);
}

/* Every unit has one tensor; all begin with the same values. */
static int list_model(const struct ae_bench_job *job, struct listing *listing)
{
        const struct ae_bench_model *model = &job->model;

        listing->tensors = calloc(model->n_units, sizeof(*listing->tensors));
        listing->names = calloc(model->n_units, sizeof(*listing->names));
        listing->init = job->info.rank == 0 ? calloc(model->unit_n, sizeof(float)) : NULL;
        if (!listing->tensors || !listing->names || (job->info.rank == 0 && !listing->init))
                return ae_fail(AE_ENOMEM, "no memory to list a model of %u units", model->n_units);
        for (uint32_t i = 0; i < model->n_units; i++) {
                (void)snprintf(listing->names[i], NAME_MAX_LEN, "%u", i);
                listing->tensors[i] = (struct autoep_tensor){
                        .size = sizeof(listing->tensors[i]), .name = listing->names[i],
                        .unit = listing->names[i], .dtype = AUTOEP_BF16,
                        .tensor_class = AUTOEP_DENSE, .flags = model->trainable ? 0 : AUTOEP_FROZEN,
                        .n_dims = 2, .dims = { model->unit_n / 64, 64 }, .init = listing->init,
                };
        }
        return 0;
}

static int open_job(struct ae_bench_job *job, uint64_t hold_len)
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        int r;

        options.timeout_ms = TIMEOUT_MS;
        options.hold_len = hold_len;
        r = ae_bench_job_check(autoep_open(&options, &job->handle));
        return r < 0 ? r : read_info(job);
}

int ae_bench_job_register(struct ae_bench_job *job, const struct ae_bench_model *model)
{
        AE_CLEANUP(listing_deinit) struct listing listing = { .init = NULL };
        int r;

        assert(model->unit_n > 0 && model->unit_n % 64 == 0);
        job->model = *model;
        job->unit_len = 2 * model->unit_n;
        r = open_job(job, model->hold_len);
        if (r == 0)
                r = list_model(job, &listing);
        if (r == 0) {
                const struct autoep_model record = {
                        .size = sizeof(record), .tensors = listing.tensors,
                        .n_tensors = model->n_units, .cache_len = model->cache_len,
                };

                r = ae_bench_job_check(autoep_register(job->handle, &record,
                                                       AUTOEP_DEFAULT_TIMEOUT));
        }
        return r < 0 ? r : read_info(job);
}

int ae_bench_job_share(struct ae_bench_job *job, const void *mine, uint64_t len, void *ret_all)
{
        const uint32_t world = job->info.world;
        AE_CLEANUP(ae_cleanup_free) uint64_t *lens = calloc(world, sizeof(*lens));
        AE_CLEANUP(ae_cleanup_free) uint8_t *bytes = calloc(world, len);

        if (!lens || !bytes)
                return ae_fail(AE_ENOMEM, "no memory for what %u ranks share", world);
        for (uint32_t i = 0; i < world; i++) {
                lens[i] = len;
                memcpy(bytes + i * len, mine, len);
        }
        if (world == 1) {
                memcpy(ret_all, mine, len);
                return 0;
        }
        return ae_bench_job_check(autoep_exchange(job->handle, AUTOEP_GROUP_WORLD, bytes, lens,
                                                  ret_all, lens, AUTOEP_DEFAULT_TIMEOUT));
}

int ae_bench_job_barrier(struct ae_bench_job *job)
{
        AE_CLEANUP(ae_cleanup_free) uint8_t *bytes = calloc(job->info.world, 1);
        const uint8_t mine = 0;

        if (!bytes)
                return ae_fail(AE_ENOMEM, "no memory for a barrier of %u ranks", job->info.world);
        return ae_bench_job_share(job, &mine, sizeof(mine), bytes);
}

int ae_bench_job_stats(struct ae_bench_job *job, struct autoep_stats *ret_stats)
{
        *ret_stats = (struct autoep_stats){ .size = sizeof(*ret_stats) };
        return ae_bench_job_check(autoep_stats(job->handle, ret_stats));
}

int ae_bench_job_row(struct ae_bench_job *job, const struct ae_bench_row *row)
{
        struct ae_bench_row complete = *row;
        char line[768];
        int r;

        if (job->info.rank != 0)
                return 0;
        (void)snprintf(complete.suite, sizeof(complete.suite), "%s", job->suite);
        r = ae_bench_row_line(&complete, line, sizeof(line));
        if (r < 0)
                return r;
        puts(line);
        (void)fflush(stdout);
        return 0;
}

static int run_case(struct ae_bench_job *job, size_t index)
{
        int r;

        job->suite = cases[index].suite;
        r = cases[index].run(job);
        if (r == 0)
                r = ae_bench_job_check(autoep_leave(job->handle, AUTOEP_DEFAULT_TIMEOUT));
        autoep_close(job->handle);
        return r;
}

int ae_bench_worker(const struct ae_bench_options *options)
{
        struct ae_bench_job job = { .options = options };
        int r = ae_fail(AE_EINVAL, "there is no case '%s'", options->worker);

        for (size_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                if (strcmp(cases[i].word, options->worker) == 0)
                        r = run_case(&job, i);
        }
        if (r < 0)
                fprintf(stderr, "autoep-bench: case %s: %s\n", options->worker, ae_error_text());
        return r < 0 ? 1 : 0;
}
