/* SPDX-License-Identifier: Apache-2.0 */
/* Rows and their line protocol: fields divided by tabs after one word that marks a row. */
#include "client/bench/row.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MARK "autoep-bench-row"

enum field { SUITE, NAME, FLOOR_NAME, NOTE, LEN, UNIT, FIGURE, FLOOR, AIM, TARGET, N_FIELDS };

static const struct {
        const char *word;
        bool more;
} units[AE_BENCH_N_UNITS] = {
#define UNIT_ROW(name, word, more) { word, more },
        AE_BENCH_UNIT_TABLE(UNIT_ROW)
#undef UNIT_ROW
};

const char *ae_bench_unit_word(enum ae_bench_unit unit)
{
        assert(unit < AE_BENCH_N_UNITS);
        return units[unit].word;
}

double ae_bench_ratio(const struct ae_bench_row *row)
{
        assert(row->unit < AE_BENCH_N_UNITS && row->figure > 0 && row->floor > 0);
        return units[row->unit].more ? row->figure / row->floor : row->floor / row->figure;
}

bool ae_bench_below(const struct ae_bench_row *row)
{
        switch (row->aim) {
        case AE_BENCH_AIM_RATIO:
                return ae_bench_ratio(row) < row->target;
        case AE_BENCH_AIM_FIGURE:
                return row->figure > row->target;
        case AE_BENCH_AIM_NONE:
        case AE_BENCH_N_AIMS:
                break;
        }
        return false;
}

void ae_bench_rows_deinit(struct ae_bench_rows *rows)
{
        free(rows->items);
        *rows = (struct ae_bench_rows){ 0 };
}

int ae_bench_rows_add(struct ae_bench_rows *rows, const struct ae_bench_row *row)
{
        if (rows->n == rows->size) {
                size_t size = rows->size ? 2 * rows->size : 64;
                struct ae_bench_row *items = reallocarray(rows->items, size, sizeof(*items));

                if (!items)
                        return ae_fail(AE_ENOMEM, "no memory for %zu rows", size);
                rows->items = items;
                rows->size = size;
        }
        rows->items[rows->n++] = *row;
        return 0;
}

size_t ae_bench_rows_below(const struct ae_bench_rows *rows)
{
        size_t n = 0;

        for (size_t i = 0; i < rows->n; i++)
                n += ae_bench_below(&rows->items[i]);
        return n;
}

int ae_bench_row_line(const struct ae_bench_row *row, char *line, size_t size)
{
        int len = snprintf(line, size, MARK "\t%s\t%s\t%s\t%s\t%" PRIu64
                           "\t%u\t%.17g\t%.17g\t%u\t%.17g", row->suite, row->name,
                           row->floor_name, row->note, row->len, (unsigned int)row->unit,
                           row->figure, row->floor, (unsigned int)row->aim, row->target);

        assert(len > 0);
        if ((size_t)len >= size)
                return ae_fail(AE_EOVERFLOW, "the row '%s' needs a line of %d bytes", row->name,
                               len);
        return 0;
}

/* Cuts @text at its tabs; how many fields there are. */
static size_t cut(char *text, char *fields[N_FIELDS])
{
        size_t n = 0;
        char *field;

        while ((field = strsep(&text, "\t"))) {
                if (n == N_FIELDS)
                        return n + 1;
                fields[n++] = field;
        }
        return n;
}

static bool take_text(const char *field, char *to, size_t size)
{
        size_t len = strlen(field);

        if (len >= size)
                return false;
        memcpy(to, field, len + 1);
        return true;
}

/* A number from 0 on, and finite. */
static bool take_double(const char *field, double *ret_value)
{
        char *end;

        *ret_value = strtod(field, &end);
        return end != field && !*end && isfinite(*ret_value) && *ret_value >= 0;
}

static bool take_index(const char *field, uint64_t limit, uint64_t *ret_value)
{
        char *end;

        *ret_value = strtoull(field, &end, 10);
        return end != field && !*end && *ret_value < limit;
}

static bool take_fields(char *fields[N_FIELDS], struct ae_bench_row *row)
{
        uint64_t unit, aim;

        if (!take_text(fields[SUITE], row->suite, sizeof(row->suite)) ||
            !take_text(fields[NAME], row->name, sizeof(row->name)) ||
            !take_text(fields[FLOOR_NAME], row->floor_name, sizeof(row->floor_name)) ||
            !take_text(fields[NOTE], row->note, sizeof(row->note)) ||
            !take_index(fields[LEN], UINT64_MAX, &row->len) ||
            !take_index(fields[UNIT], AE_BENCH_N_UNITS, &unit) ||
            !take_double(fields[FIGURE], &row->figure) ||
            !take_double(fields[FLOOR], &row->floor) ||
            !take_index(fields[AIM], AE_BENCH_N_AIMS, &aim) ||
            !take_double(fields[TARGET], &row->target))
                return false;
        row->unit = (enum ae_bench_unit)unit;
        row->aim = (enum ae_bench_aim)aim;
        return row->figure > 0 && row->floor > 0;
}

int ae_bench_row_parse(const char *line, struct ae_bench_row *ret_row)
{
        struct ae_bench_row row = { .len = 0 };
        char *fields[N_FIELDS];
        char text[1024];

        if (strncmp(line, MARK "\t", strlen(MARK "\t")) != 0)
                return 1;
        if (!take_text(line + strlen(MARK "\t"), text, sizeof(text)) ||
            cut(text, fields) != N_FIELDS || !take_fields(fields, &row))
                return ae_fail(AE_EPROTO, "a worker sent a row that can't be read: '%.200s'", line);
        *ret_row = row;
        return 0;
}
