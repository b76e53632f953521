/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The worker side of the bench: a process of a cluster, its job, and what the cases share. Rank 0
 * writes rows to standard output. One thread.
 */
#pragma once

#include "client/autoep.h"
#include "client/bench/options.h"
#include "client/bench/row.h"

struct ae_bench_model {
        uint32_t n_units;
        uint64_t unit_n;    /* elements of each unit's one tensor */
        bool trainable;     /* otherwise frozen: weights only */
        uint64_t cache_len; /* 0: all weights */
        uint64_t hold_len;  /* 0: two units */
};

struct ae_bench_job {
        const struct ae_bench_options *options; /* borrowed */
        const char *suite;
        autoep *handle;        /* owned */
        struct autoep_info info;
        struct ae_bench_model model;
        uint64_t unit_len;     /* bytes of a unit's bf16 weights */
};

/* A worker's whole life; the exit code of its process. */
int ae_bench_worker(const struct ae_bench_options *options);

/* A case's registration and work; codes and texts are ae_fail()'s. */
int ae_bench_job_register(struct ae_bench_job *job, const struct ae_bench_model *model);
/* What every rank says, @len bytes each, by rank; all ranks have come here. */
int ae_bench_job_share(struct ae_bench_job *job, const void *mine, uint64_t len, void *ret_all);
/* All ranks have come here. */
int ae_bench_job_barrier(struct ae_bench_job *job);
/* Turns a code of libautoep into one of ours, with its text. */
int ae_bench_job_check(int r);
int ae_bench_job_stats(struct ae_bench_job *job, struct autoep_stats *ret_stats);
/* Rank 0 writes it; others do nothing. */
int ae_bench_job_row(struct ae_bench_job *job, const struct ae_bench_row *row);

int ae_bench_case_view(struct ae_bench_job *job);
int ae_bench_case_miss(struct ae_bench_job *job);
int ae_bench_case_copy(struct ae_bench_job *job);
int ae_bench_case_fetch(struct ae_bench_job *job);
int ae_bench_case_scatter(struct ae_bench_job *job);
