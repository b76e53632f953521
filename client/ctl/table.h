/* SPDX-License-Identifier: Apache-2.0 */
/* Text in columns: cells are collected, widths found, lines printed. One owner, one thread. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

enum ae_ctl_paint { AE_CTL_PLAIN, AE_CTL_GOOD, AE_CTL_BAD };

struct ae_ctl_cell {
        char *text;  /* owned */
        bool right;  /* aligned */
        enum ae_ctl_paint paint;
};

struct ae_ctl_table {
        size_t n_columns;
        struct ae_ctl_cell *cells; /* owned, row after row */
        size_t n_cells;
        size_t size;
};

void ae_ctl_table_init(struct ae_ctl_table *table, size_t n_columns);
void ae_ctl_table_deinit(struct ae_ctl_table *table);
/* Appends a cell, to the next row when this one is full; takes @text, also when it fails, and NULL
 * for want of memory as such. AE_ENOMEM. */
int ae_ctl_table_add(struct ae_ctl_table *table, char *text, bool right, enum ae_ctl_paint paint);
/* Prints whole rows, two spaces between columns, nothing behind the last. @title: the first row is
 * titles. */
void ae_ctl_table_print(const struct ae_ctl_table *table, FILE *out, bool title, bool color);

/* What a terminal shows of @text in front of and behind its characters, by @paint. */
const char *ae_ctl_paint_begin(enum ae_ctl_paint paint, bool color);
const char *ae_ctl_paint_end(enum ae_ctl_paint paint, bool color);
