/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What measurements share: memory, the last-level cache, a team of threads, best times and
 * percentiles. Threads of a team belong to it; all else is the caller's thread.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* Bytes of the largest cache of this processor, from sysfs or else the C library; 32 MiB when
 * neither knows. */
uint64_t ae_bench_llc_len(void);

/* Memory of its own pages, every page written. NULL with the error text set. Freed with _free. */
void *ae_bench_memory_new(uint64_t len);
void ae_bench_memory_free(void *memory, uint64_t len);

/* One thread's part of the work; @index in [0, n). */
typedef void ae_bench_fn(void *arg, uint32_t index, uint32_t n);

struct ae_bench_team;

/* @n threads, the caller's with them. AE_ENOMEM, AE_ESYS. */
int ae_bench_team_new(uint32_t n, struct ae_bench_team **ret_team);
/* Joins. NULL is fine. */
void ae_bench_team_free(struct ae_bench_team *team);
/* Runs @fn on all threads; nanoseconds from when all begin until the last has ended. */
uint64_t ae_bench_team_run(struct ae_bench_team *team, ae_bench_fn *fn, void *arg);

struct ae_bench_pair {
        ae_bench_fn *figure, *floor;
        void *figure_arg, *floor_arg;
        uint32_t repeats;
};
/* Both in turn, one unmeasured time first; the best time of each in nanoseconds, at least 1. */
void ae_bench_team_pair(struct ae_bench_team *team, const struct ae_bench_pair *pair,
                        uint64_t *ret_figure_ns, uint64_t *ret_floor_ns);

/* The element below which a share of @per_mille of the values lies; sorts them. */
uint64_t ae_bench_percentile(uint64_t *values, size_t n, uint32_t per_mille);

/* The part [ret_first, ret_first + return) of @n for thread @index of @of, in multiples of 64. */
uint64_t ae_bench_share(uint64_t n, uint32_t index, uint32_t of, uint64_t *ret_first);

/* Bytes per nanosecond, which is GB/s. */
static inline double ae_bench_gbps(uint64_t len, uint64_t ns)
{
        return (double)len / (double)ns;
}
