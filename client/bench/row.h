/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One measurement beside its floor, a growing list of them, and the line in which a worker hands
 * one to the process that started the cluster. One thread.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*        name  word    more is better */
#define AE_BENCH_UNIT_TABLE(X)                                                                    \
        X(GBPS, "GB/s", true)                                                                     \
        X(NS,   "ns",   false)                                                                    \
        X(US,   "us",   false)                                                                    \
        X(MS,   "ms",   false)

enum ae_bench_unit {
#define AE_BENCH_UNIT_ENUM(name, word, more) AE_BENCH_##name,
        AE_BENCH_UNIT_TABLE(AE_BENCH_UNIT_ENUM)
#undef AE_BENCH_UNIT_ENUM
        AE_BENCH_N_UNITS
};

enum ae_bench_aim {
        AE_BENCH_AIM_NONE,   /* the row is there to be compared with */
        AE_BENCH_AIM_RATIO,  /* ratio >= target */
        AE_BENCH_AIM_FIGURE, /* figure <= target, in the row's unit */
        AE_BENCH_N_AIMS
};

struct ae_bench_row {
        char suite[16];
        char name[40];
        char floor_name[24]; /* what the floor is */
        char note[200];      /* "" for none; without tabs and line ends, as all texts */
        uint64_t len;        /* bytes that the row is about */
        enum ae_bench_unit unit; /* of figure and floor */
        double figure, floor;
        enum ae_bench_aim aim;
        double target;
};

struct ae_bench_rows {
        struct ae_bench_row *items; /* owned */
        size_t n, size;
};

const char *ae_bench_unit_word(enum ae_bench_unit unit);
/* The share of the floor that was reached: figure / floor, or its inverse where less is better. */
double ae_bench_ratio(const struct ae_bench_row *row);
/* Whether there is a target and the row is below it. */
bool ae_bench_below(const struct ae_bench_row *row);

void ae_bench_rows_deinit(struct ae_bench_rows *rows);
/* AE_ENOMEM. */
int ae_bench_rows_add(struct ae_bench_rows *rows, const struct ae_bench_row *row);
size_t ae_bench_rows_below(const struct ae_bench_rows *rows);

/* The row as a line for ae_bench_row_parse(), without its end; AE_EOVERFLOW when it is longer. */
int ae_bench_row_line(const struct ae_bench_row *row, char *line, size_t size);
/* @return: 0; 1 when the line is no row; AE_EPROTO for a spoilt one. */
int ae_bench_row_parse(const char *line, struct ae_bench_row *ret_row);
