/* SPDX-License-Identifier: Apache-2.0 */
/* The suites and the worker side of the clusters that they start. One thread. */
#pragma once

#include "client/bench/options.h"
#include "client/bench/row.h"

struct ae_bench {
        const struct ae_bench_options *options; /* borrowed */
        uint64_t memory_len;                    /* what a row about memory goes over */
        uint32_t n_cpus;
        struct ae_bench_rows rows;
        size_t n_printed;
};

/* Adds a row and, in table form, prints it. AE_ENOMEM. */
int ae_bench_add(struct ae_bench *bench, const struct ae_bench_row *row);

int ae_bench_kernels(struct ae_bench *bench);
int ae_bench_gather(struct ae_bench *bench);
int ae_bench_scatter(struct ae_bench *bench);

/* A cluster that measures one case. */
struct ae_bench_cluster {
        const char *suite, *which; /* the case, see worker.c */
        uint32_t nodes, workers;
        const char *transport;
        uint64_t len;              /* what --size means to the case */
};
/* Runs the bench itself as the workers of a cluster and takes in their rows. */
int ae_bench_launch(struct ae_bench *bench, const struct ae_bench_cluster *cluster);
