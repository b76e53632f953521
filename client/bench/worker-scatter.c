/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The case scatter inside a worker: rounds of scattering all units, stepping, and gathering the new
 * version, timed from the first scatter until the last view, for only then is the optimizer done
 * with all of it. The figure counts the gradient bytes of all ranks.
 */
#include "client/bench/measure.h"
#include "client/bench/passes.h"
#include "client/bench/worker.h"

#include "kernels/ops.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define TARGET 0.70
#define UNITS 4
#define ROUNDS 10
#define QUICK_ROUNDS 3
#define WARM_LEN (32 * AE_MIB) /* the ring by default: after as much every page of it was touched */

static_assert(AE_BENCH_NODES_MAX <= AE_OPS_SUM_MAX && AE_BENCH_WORKERS_MAX <= AE_OPS_SUM_MAX,
              "each fold is one sum in its floor");

/* When the parts of a round ended, from its begin. */
struct round_times {
        uint64_t scattered_ns, stepped_ns, all_ns;
};

static int scatter_all(struct ae_bench_job *job, const void *gradient)
{
        int r = 0;

        for (uint32_t unit = 0; r == 0 && unit < UNITS; unit++) {
                const struct autoep_gradient one = { .size = sizeof(one), .tensor = unit,
                                                     .dtype = AUTOEP_BF16, .data = gradient };

                r = ae_bench_job_check(autoep_scatter(job->handle, unit, &one, 1, AUTOEP_LAST,
                                                      AUTOEP_DEFAULT_TIMEOUT));
                gradient = (const uint8_t *)gradient + job->unit_len;
        }
        return r;
}

static int step(struct ae_bench_job *job)
{
        const struct autoep_hyper hyper = { .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                                            .weight_decay = 0.1 };
        const struct autoep_step request = { .size = sizeof(request), .hyper = &hyper,
                                             .n_groups = 1, .max_norm = 1.0 };
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        int r = ae_bench_job_check(autoep_step(job->handle, &request, AUTOEP_DEFAULT_TIMEOUT,
                                               &verdict));

        if (r == 0 && verdict.kind != AUTOEP_APPLIED)
                return ae_fail(AE_ESTATE, "a step was not applied: %s", verdict.why);
        return r;
}

static int gather_all(struct ae_bench_job *job)
{
        int r = 0;

        for (uint32_t unit = 0; r == 0 && unit < UNITS; unit++) {
                struct autoep_view view = AUTOEP_VIEW_INIT;

                r = ae_bench_job_check(autoep_gather(job->handle, unit, AUTOEP_DEFAULT_TIMEOUT,
                                                     &view));
                if (r == 0)
                        r = ae_bench_job_check(autoep_release(job->handle, &view));
        }
        return r;
}

static int run_round(struct ae_bench_job *job, const void *gradient, struct round_times *ret_times)
{
        uint64_t start_ns;
        int r = ae_bench_job_barrier(job);

        start_ns = ae_now_ns();
        if (r == 0)
                r = scatter_all(job, gradient);
        ret_times->scattered_ns = ae_now_ns() - start_ns;
        if (r == 0)
                r = step(job);
        ret_times->stepped_ns = ae_now_ns() - start_ns;
        if (r == 0)
                r = gather_all(job);
        ret_times->all_ns = ae_now_ns() - start_ns;
        return r;
}

static int best_round(struct ae_bench_job *job, const void *gradient, struct round_times *ret_best)
{
        const uint64_t warm = job->options->quick ? 1 : ae_div_up(WARM_LEN, UNITS * job->unit_len);
        const uint64_t n = warm + (job->options->quick ? QUICK_ROUNDS : ROUNDS);
        struct round_times times = { 0 };
        int r = 0;

        ret_best->all_ns = UINT64_MAX;
        for (uint64_t i = 0; r == 0 && i < n; i++) {
                r = run_round(job, gradient, &times);
                if (r == 0 && i >= warm && times.all_ns < ret_best->all_ns)
                        *ret_best = times;
        }
        return r;
}

/* As autoepd's own default has it. */
static uint32_t node_threads(uint32_t n_cpus)
{
        return n_cpus > 2 ? n_cpus / 2 : 1;
}

static void describe(const struct round_times *times, const uint64_t ns[AE_BENCH_N_PASSES],
                     char *note, size_t size)
{
        int at = snprintf(note, size, "ms: scatter %.1f, step %.1f, gather %.1f; floors:",
                          (double)times->scattered_ns / 1e6,
                          (double)(times->stepped_ns - times->scattered_ns) / 1e6,
                          (double)(times->all_ns - times->stepped_ns) / 1e6);

        for (size_t i = 0; i < AE_BENCH_N_PASSES && at > 0 && (size_t)at < size; i++)
                at += snprintf(note + at, size - (size_t)at, "%s %s %.1f", i ? "," : "",
                               ae_bench_pass_words((enum ae_bench_pass)i), (double)ns[i] / 1e6);
}

static int report(struct ae_bench_job *job, const struct round_times *times)
{
        const uint32_t n_cpus = (uint32_t)AE_MAX(sysconf(_SC_NPROCESSORS_ONLN), 1L);
        const struct ae_bench_passes_of of = {
                .n = UNITS * job->model.unit_n, .nodes = job->info.n_nodes,
                .workers = job->info.world / job->info.n_nodes, .n_cpus = n_cpus,
                .node_threads = node_threads(n_cpus), .repeats = job->options->quick ? 1 : ROUNDS,
                .tcp = strcmp(job->info.transport, "tcp") == 0,
        };
        struct ae_bench_row row = { .unit = AE_BENCH_GBPS, .len = UNITS * job->unit_len,
                                    .floor_name = "its passes", .aim = AE_BENCH_AIM_RATIO,
                                    .target = TARGET };
        const uint64_t bytes = row.len * job->info.world;
        uint64_t ns[AE_BENCH_N_PASSES], sum_ns = 0;
        int r = ae_bench_passes(&of, ns);

        if (r < 0)
                return r;
        for (size_t i = 0; i < AE_BENCH_N_PASSES; i++)
                sum_ns += ns[i];
        row.figure = ae_bench_gbps(bytes, times->all_ns);
        row.floor = ae_bench_gbps(bytes, AE_MAX(sum_ns, UINT64_C(1)));
        describe(times, ns, row.note, sizeof(row.note));
        (void)snprintf(row.name, sizeof(row.name), "%u x %u ranks%s%s", of.nodes, of.workers,
                       of.nodes > 1 ? ", " : "", of.nodes > 1 ? job->info.transport : "");
        return ae_bench_job_row(job, &row);
}

int ae_bench_case_scatter(struct ae_bench_job *job)
{
        const uint64_t unit_len = ae_align_up(job->options->sizes[0] / UNITS, 256);
        const struct ae_bench_model model = { .n_units = UNITS, .unit_n = unit_len / 2,
                                              .trainable = true };
        struct round_times times = { 0 };
        uint16_t *gradient = ae_bench_memory_new(UNITS * unit_len);
        int r;

        if (!gradient)
                return AE_ENOMEM;
        for (uint64_t i = 0; i < UNITS * unit_len / 2; i++)
                gradient[i] = (uint16_t)(0x3c00 + i % 64);
        r = ae_bench_job_register(job, &model);
        if (r == 0)
                r = best_round(job, gradient, &times);
        if (r == 0 && job->info.rank == 0)
                r = report(job, &times);
        if (r == 0)
                r = ae_bench_job_barrier(job);
        ae_bench_memory_free(gradient, UNITS * unit_len);
        return r;
}
