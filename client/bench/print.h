/* SPDX-License-Identifier: Apache-2.0 */
/* The rows for people (at most 100 columns) and for programs (JSON, schema "autoep.bench/1"). */
#pragma once

#include "client/bench/row.h"

#include <stdio.h>

struct ae_bench_machine {
        const char *cpu;   /* which kernels are in use */
        uint32_t n_cpus;
        uint64_t llc_len;
        uint64_t memory_len; /* what rows about memory go over */
        bool quick;
};

void ae_bench_print_head(const struct ae_bench_machine *machine, FILE *out);
/* Rows [first, n) as they came; a suite's first row has a heading before it. */
void ae_bench_print_rows(const struct ae_bench_rows *rows, size_t first, FILE *out);
/* AE_ENOMEM. */
int ae_bench_print_json(const struct ae_bench_machine *machine, const struct ae_bench_rows *rows,
                        FILE *out);
