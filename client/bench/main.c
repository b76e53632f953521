/* SPDX-License-Identifier: Apache-2.0 */
/* autoep-bench: measures, prints, and says what is below its target. */
#include "client/bench/measure.h"
#include "client/bench/print.h"
#include "client/bench/suites.h"
#include "client/bench/worker.h"

#include "kernels/ops.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <sched.h>
#include <unistd.h>

#define CODE_FAILED 1
#define CODE_USAGE 2
#define CODE_BELOW 3
#define QUICK_LEN (4 * AE_MIB)

/* What this process may run on. */
static uint32_t count_cpus(void)
{
        cpu_set_t set;

        if (sched_getaffinity(0, sizeof(set), &set) == 0)
                return (uint32_t)CPU_COUNT(&set);
        return (uint32_t)AE_MAX(sysconf(_SC_NPROCESSORS_ONLN), 1L);
}

static int run_suites(struct ae_bench *bench)
{
        static int (*const suites[AE_BENCH_N_SUITES])(struct ae_bench *bench) = {
                [AE_BENCH_KERNELS] = ae_bench_kernels,
                [AE_BENCH_GATHER] = ae_bench_gather,
                [AE_BENCH_SCATTER] = ae_bench_scatter,
        };
        int r = 0;

        for (size_t i = 0; r == 0 && i < AE_BENCH_N_SUITES; i++) {
                if (bench->options->suites[i])
                        r = suites[i](bench);
        }
        return r;
}

static int measure(const struct ae_bench_options *options)
{
        struct ae_bench_machine machine = {
                .cpu = ae_ops()->name, .n_cpus = count_cpus(), .llc_len = ae_bench_llc_len(),
                .quick = options->quick,
        };
        struct ae_bench bench = { .options = options, .n_cpus = machine.n_cpus };
        int r, code = 0;

        machine.memory_len = options->quick ? QUICK_LEN : 4 * machine.llc_len;
        bench.memory_len = machine.memory_len;
        if (!options->json)
                ae_bench_print_head(&machine, stdout);
        r = run_suites(&bench);
        if (r == 0 && options->json)
                r = ae_bench_print_json(&machine, &bench.rows, stdout);
        if (r < 0) {
                fprintf(stderr, "autoep-bench: %s\n", ae_error_text());
                code = CODE_FAILED;
        } else if (options->strict && ae_bench_rows_below(&bench.rows)) {
                fprintf(stderr, "autoep-bench: %zu rows are below their targets\n",
                        ae_bench_rows_below(&bench.rows));
                code = CODE_BELOW;
        }
        ae_bench_rows_deinit(&bench.rows);
        return code;
}

int main(int argc, char **argv)
{
        struct ae_bench_options options;

        if (ae_bench_options_parse(argc, argv, &options) < 0) {
                fprintf(stderr, "autoep-bench: %s\ntry: autoep-bench --help\n", ae_error_text());
                return CODE_USAGE;
        }
        if (options.help) {
                ae_bench_options_help(stdout);
                return 0;
        }
        if (options.version) {
                puts("autoep-bench " AUTOEP_VERSION);
                return 0;
        }
        return options.worker ? ae_bench_worker(&options) : measure(&options);
}
