/* SPDX-License-Identifier: Apache-2.0 */
/* From the rows of the command table to lines. */
#include "client/ctl/render.h"

#include "client/ctl/cell.h"
#include "client/ctl/table.h"

#include "proto/base/cleanup.h"
#include "proto/base/status.h"

#include <assert.h>
#include <string.h>

#define COLUMNS_MAX 32

int ae_ctl_reply_parse(const struct ae_ctl_command *command, const char *text, json_t **ret_reply)
{
        json_error_t error;
        json_t *reply = json_loads(text, JSON_REJECT_DUPLICATES, &error);
        const char *schema = json_string_value(json_object_get(reply, "schema"));

        if (!reply)
                return ae_fail(AE_EPROTO, "the daemon's answer to '%s' isn't JSON: %s at byte %d",
                               command->name, error.text, error.position);
        if (!schema || strcmp(schema, command->schema) != 0 ||
            !json_is_array(json_object_get(reply, command->rows))) {
                ae_fail(AE_EPROTO, "the daemon answers '%s' with schema '%.64s', not with '%s'",
                        command->name, schema ? schema : "", command->schema);
                json_decref(reply);
                return AE_EPROTO;
        }
        *ret_reply = reply;
        return 0;
}

bool ae_ctl_reply_degraded(const struct ae_ctl_command *command, const json_t *reply)
{
        const json_t *rows = json_object_get(reply, command->rows);
        const char *health = json_string_value(json_object_get(reply, "health"));

        if (health && strcmp(health, "ok") != 0)
                return true;
        for (size_t i = 0; i < json_array_size(rows); i++) {
                const json_t *state = json_object_get(json_array_get(rows, i), "state");

                if (json_is_string(state) && ae_ctl_state_is_bad(json_string_value(state)))
                        return true;
        }
        return false;
}

static bool column_shown(const struct ae_ctl_column *column, const json_t *rows)
{
        for (size_t i = 0; column->optional && i < json_array_size(rows); i++) {
                if (ae_ctl_cell_has_value(ae_ctl_cell_find(json_array_get(rows, i), column->key)))
                        return true;
        }
        return !column->optional;
}

static int add_row(struct ae_ctl_table *table, const struct ae_ctl_column *const *columns,
                   const json_t *row)
{
        int r;

        for (size_t c = 0; c < table->n_columns; c++) {
                const struct ae_ctl_column *column = columns[c];

                r = ae_ctl_table_add(table, ae_ctl_cell_text(row, column),
                                     ae_ctl_cell_right(column), ae_ctl_cell_paint(row, column));
                if (r < 0)
                        return r;
        }
        return 0;
}

static int fill(struct ae_ctl_table *table, const struct ae_ctl_column *const *columns,
                const json_t *rows, bool headers)
{
        int r = 0;

        for (size_t c = 0; headers && c < table->n_columns && r == 0; c++)
                r = ae_ctl_table_add(table, strdup(columns[c]->title),
                                     ae_ctl_cell_right(columns[c]), AE_CTL_PLAIN);
        for (size_t i = 0; i < json_array_size(rows) && r == 0; i++)
                r = add_row(table, columns, json_array_get(rows, i));
        return r;
}

static int render_rows(const struct ae_ctl_command *command, const json_t *rows,
                       const struct ae_ctl_style *style, FILE *out)
{
        const struct ae_ctl_column *columns[COLUMNS_MAX];
        AE_CLEANUP(ae_ctl_table_deinit) struct ae_ctl_table table;
        size_t n = 0;
        int r;

        assert(command->n_columns <= COLUMNS_MAX);
        for (size_t c = 0; c < command->n_columns; c++) {
                if (column_shown(&command->columns[c], rows))
                        columns[n++] = &command->columns[c];
        }
        ae_ctl_table_init(&table, n);
        if (json_array_size(rows) == 0) {
                if (style->headers)
                        fprintf(out, "no %s\n", command->rows);
                return 0;
        }
        r = fill(&table, columns, rows, style->headers);
        if (r < 0)
                return r;
        ae_ctl_table_print(&table, out, style->headers, style->color);
        return 0;
}

static int render_fields(const struct ae_ctl_command *command, const json_t *reply,
                         const struct ae_ctl_style *style, FILE *out)
{
        AE_CLEANUP(ae_ctl_table_deinit) struct ae_ctl_table table;
        int r = 0;

        ae_ctl_table_init(&table, 2);
        for (size_t i = 0; i < command->n_fields && r == 0; i++) {
                const struct ae_ctl_column *field = &command->fields[i];

                if (field->optional && !ae_ctl_cell_has_value(ae_ctl_cell_find(reply, field->key)))
                        continue;
                r = ae_ctl_table_add(&table, strdup(field->title), false, AE_CTL_PLAIN);
                if (r == 0)
                        r = ae_ctl_table_add(&table, ae_ctl_cell_text(reply, field), false,
                                             ae_ctl_cell_paint(reply, field));
        }
        if (r < 0)
                return r;
        ae_ctl_table_print(&table, out, false, style->color);
        fputc('\n', out);
        return 0;
}

int ae_ctl_render(const struct ae_ctl_command *command, const json_t *reply,
                  const struct ae_ctl_style *style, FILE *out)
{
        int r;

        if (command->n_fields > 0) {
                r = render_fields(command, reply, style, out);
                if (r < 0)
                        return r;
        }
        return render_rows(command, json_object_get(reply, command->rows), style, out);
}
