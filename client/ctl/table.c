/* SPDX-License-Identifier: Apache-2.0 */
/* Column widths and alignment. */
#include "client/ctl/table.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <stdlib.h>

void ae_ctl_table_init(struct ae_ctl_table *table, size_t n_columns)
{
        *table = (struct ae_ctl_table){ .n_columns = n_columns };
}

void ae_ctl_table_deinit(struct ae_ctl_table *table)
{
        for (size_t i = 0; i < table->n_cells; i++)
                free(table->cells[i].text);
        free(table->cells);
        *table = (struct ae_ctl_table){ .n_columns = table->n_columns };
}

int ae_ctl_table_add(struct ae_ctl_table *table, char *text, bool right, enum ae_ctl_paint paint)
{
        AE_CLEANUP(ae_cleanup_free) char *owned = text;
        struct ae_ctl_cell *cells;
        size_t size;

        if (!text)
                return ae_fail(AE_ENOMEM, "no memory for a cell of the table");
        if (table->n_cells == table->size) {
                size = table->size ? 2 * table->size : 64;
                cells = reallocarray(table->cells, size, sizeof(*cells));
                if (!cells)
                        return ae_fail(AE_ENOMEM, "no memory for a table of %zu cells", size);
                table->cells = cells;
                table->size = size;
        }
        table->cells[table->n_cells++] = (struct ae_ctl_cell){ ae_steal(owned), right, paint };
        return 0;
}

/* Characters, not bytes; wide ones count as one. */
static size_t width_of(const char *text)
{
        size_t n = 0;

        for (; *text; text++)
                n += ((unsigned char)*text & 0xc0) != 0x80;
        return n;
}

static size_t column_width(const struct ae_ctl_table *table, size_t column)
{
        size_t width = 0;

        for (size_t i = column; i < table->n_cells; i += table->n_columns)
                width = AE_MAX(width, width_of(table->cells[i].text));
        return width;
}

const char *ae_ctl_paint_begin(enum ae_ctl_paint paint, bool color)
{
        if (!color || paint == AE_CTL_PLAIN)
                return "";
        return paint == AE_CTL_GOOD ? "\033[32m" : "\033[31m";
}

const char *ae_ctl_paint_end(enum ae_ctl_paint paint, bool color)
{
        return color && paint != AE_CTL_PLAIN ? "\033[0m" : "";
}

static void print_cell(const struct ae_ctl_cell *cell, size_t width, bool last, bool color,
                       FILE *out)
{
        int pad = (int)(width - width_of(cell->text));

        if (cell->right)
                fprintf(out, "%*s", pad, "");
        fprintf(out, "%s%s%s", ae_ctl_paint_begin(cell->paint, color), cell->text,
                ae_ctl_paint_end(cell->paint, color));
        if (!cell->right && !last)
                fprintf(out, "%*s", pad, "");
        fputs(last ? "\n" : "  ", out);
}

void ae_ctl_table_print(const struct ae_ctl_table *table, FILE *out, bool title, bool color)
{
        AE_CLEANUP(ae_cleanup_free) size_t *widths = NULL;
        size_t n = table->n_columns;

        assert(n > 0 && table->n_cells % n == 0 && "rows are whole");
        widths = calloc(n, sizeof(*widths));
        for (size_t c = 0; widths && c < n; c++)
                widths[c] = column_width(table, c);
        for (size_t i = 0; i < table->n_cells; i++) {
                bool bold = title && color && i < n;
                /* Without memory for the widths the cells stand side by side. */
                size_t width = widths ? widths[i % n] : width_of(table->cells[i].text);

                fputs(bold ? "\033[1m" : "", out);
                print_cell(&table->cells[i], width, i % n == n - 1, color, out);
                fputs(bold ? "\033[0m" : "", out);
        }
}
