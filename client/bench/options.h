/* SPDX-License-Identifier: Apache-2.0 */
/* The command line of autoep-bench. Pure; everything is borrowed from argv. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define AE_BENCH_SIZES_MAX 16
#define AE_BENCH_NODES_MAX 16   /* of a cluster, and numbers of a list; AE_OPS_SUM_MAX */
#define AE_BENCH_WORKERS_MAX 16 /* of a node; the same */

/*        name     word       what it measures */
#define AE_BENCH_SUITE_TABLE(X)                                                                   \
        X(KERNELS, "kernels", "sums, optimizers and conversions beside the same reads and writes") \
        X(GATHER,  "gather",  "weights through daemons: views, misses, copies, fetches")          \
        X(SCATTER, "scatter", "gradients through daemons, with the step")

enum ae_bench_suite {
#define AE_BENCH_SUITE_ENUM(name, word, help) AE_BENCH_##name,
        AE_BENCH_SUITE_TABLE(AE_BENCH_SUITE_ENUM)
#undef AE_BENCH_SUITE_ENUM
        AE_BENCH_N_SUITES
};

/*        name       letter word         argument      help */
#define AE_BENCH_OPTION_TABLE(X)                                                                  \
        X(OUTPUT,    'o',   "output",    "table|json", "how the rows are written; default table") \
        X(QUICK,     'q',   "quick",     NULL,         "small sizes, few repeats: a smoke test")  \
        X(NODES,     'n',   "nodes",     "LIST",                                                  \
          "daemons, divided by commas; default 1, 2, gather more where there are processors")     \
        X(WORKERS,   'w',   "workers",   "M",          "workers of each daemon; default 1 and 2") \
        X(TRANSPORT, 't',   "transport", "tcp|shm",    "between daemons; default both")           \
        X(SIZE,      's',   "size",      "LIST",                                                  \
          "bytes, divided by commas; K, M and G multiply; default each suite's own")              \
        X(STRICT,    'S',   "strict",    NULL,         "exit with 3 when a row is below target")   \
        X(WORKER,    'W',   "worker",    "CASE",       "be a worker of the bench's own cluster")  \
        X(HELP,      'h',   "help",      NULL,         "print this")                              \
        X(VERSION,   'V',   "version",   NULL,         "print the version")

enum ae_bench_option {
#define AE_BENCH_OPTION_ENUM(name, letter, word, argument, help) AE_BENCH_OPTION_##name,
        AE_BENCH_OPTION_TABLE(AE_BENCH_OPTION_ENUM)
#undef AE_BENCH_OPTION_ENUM
        AE_BENCH_N_OPTIONS
};

struct ae_bench_options {
        bool suites[AE_BENCH_N_SUITES]; /* none named: all are set */
        bool json, quick, strict, help, version;
        uint32_t nodes[AE_BENCH_NODES_MAX];
        uint32_t n_nodes;        /* 0: not given */
        uint32_t workers;        /* 0: not given */
        const char *transport;   /* NULL: not given */
        const char *worker;      /* NULL, or the case that this process is a worker of */
        uint64_t sizes[AE_BENCH_SIZES_MAX];
        uint32_t n_sizes;        /* 0: not given */
};

/* AE_EINVAL names the option and what is wrong with it. */
int ae_bench_options_parse(int argc, char **argv, struct ae_bench_options *ret_options);
void ae_bench_options_help(FILE *out);
