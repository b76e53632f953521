/* SPDX-License-Identifier: Apache-2.0 */
/* Rows as a table and as JSON. */
#include "client/bench/print.h"

#include "proto/base/cleanup.h"
#include "proto/base/json.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <inttypes.h>
#include <string.h>

#define COLUMNS 100
#define NOTE_INDENT 4

static const char *len_text(uint64_t len, char text[24])
{
        if (len >= AE_GIB && len % AE_GIB == 0)
                (void)snprintf(text, 24, "%" PRIu64 " GiB", len / AE_GIB);
        else if (len >= AE_MIB)
                (void)snprintf(text, 24, "%" PRIu64 " MiB", len / AE_MIB);
        else if (len >= AE_KIB)
                (void)snprintf(text, 24, "%" PRIu64 " KiB", len / AE_KIB);
        else
                (void)snprintf(text, 24, "%" PRIu64 " B", len);
        return text;
}

static const char *value_text(double value, enum ae_bench_unit unit, char text[24])
{
        const char *word = ae_bench_unit_word(unit);

        if (value >= 1000)
                (void)snprintf(text, 24, "%.0f %s", value, word);
        else
                (void)snprintf(text, 24, "%.*f %s", value >= 100 ? 1 : 2, value, word);
        return text;
}

static const char *target_text(const struct ae_bench_row *row, char text[24])
{
        if (row->aim == AE_BENCH_AIM_NONE)
                return "-";
        if (row->aim == AE_BENCH_AIM_RATIO)
                (void)snprintf(text, 24, ">=%.2f", row->target);
        else
                (void)snprintf(text, 24, "<=%g", row->target);
        return text;
}

static const char *state_word(const struct ae_bench_row *row)
{
        if (row->aim == AE_BENCH_AIM_NONE)
                return "-";
        return ae_bench_below(row) ? "below" : "ok";
}

void ae_bench_print_head(const struct ae_bench_machine *machine, FILE *out)
{
        char llc[24], memory[24];

        fprintf(out, "%u processors, %s kernels, last-level cache %s; rows about memory go over "
                "%s%s\n", machine->n_cpus, machine->cpu, len_text(machine->llc_len, llc),
                len_text(machine->memory_len, memory), machine->quick ? " (quick)" : "");
}

/* In lines of at most COLUMNS, cut at blanks. */
static void print_note(const char *note, FILE *out)
{
        const size_t room = COLUMNS - NOTE_INDENT;

        while (*note) {
                size_t len = strlen(note);

                if (len > room) {
                        for (len = room; len > 1 && note[len] != ' '; len--)
                                continue;
                }
                fprintf(out, "%*s%.*s\n", NOTE_INDENT, "", (int)len, note);
                note += len;
                note += *note == ' ';
        }
}

static void print_row(const struct ae_bench_row *row, FILE *out)
{
        char len[24], figure[24], floor[24], target[24];

        fprintf(out, "%-29.29s %8s %10s %10s %-15.15s %6.2f %7s %s\n", row->name,
                len_text(row->len, len), value_text(row->figure, row->unit, figure),
                value_text(row->floor, row->unit, floor), row->floor_name, ae_bench_ratio(row),
                target_text(row, target), state_word(row));
        print_note(row->note, out);
}

void ae_bench_print_rows(const struct ae_bench_rows *rows, size_t first, FILE *out)
{
        for (size_t i = first; i < rows->n; i++) {
                const struct ae_bench_row *row = &rows->items[i];

                if (i == 0 || strcmp(row->suite, rows->items[i - 1].suite) != 0)
                        fprintf(out, "\n%-29.29s %8s %10s %10s %-15s %6s %7s\n", row->suite, "size",
                                "figure", "floor", "which is", "ratio", "target");
                print_row(row, out);
        }
        (void)fflush(out);
}

static void put_row(struct ae_json *json, const struct ae_bench_row *row)
{
        ae_json_object_begin(json);
        ae_json_put_string(json, "suite", row->suite);
        ae_json_put_string(json, "name", row->name);
        ae_json_put_u64(json, "len", row->len);
        ae_json_put_string(json, "unit", ae_bench_unit_word(row->unit));
        ae_json_put_double(json, "figure", row->figure);
        ae_json_put_double(json, "floor", row->floor);
        ae_json_put_string(json, "floor_name", row->floor_name);
        ae_json_put_double(json, "ratio", ae_bench_ratio(row));
        ae_json_key(json, "target");
        if (row->aim == AE_BENCH_AIM_NONE)
                ae_json_null(json);
        else
                ae_json_double(json, row->target);
        ae_json_put_string(json, "target_of", row->aim == AE_BENCH_AIM_NONE    ? NULL
                                              : row->aim == AE_BENCH_AIM_RATIO ? "ratio"
                                                                               : "figure");
        ae_json_key(json, "ok");
        if (row->aim == AE_BENCH_AIM_NONE)
                ae_json_null(json);
        else
                ae_json_bool(json, !ae_bench_below(row));
        ae_json_put_string(json, "note", row->note[0] ? row->note : NULL);
        ae_json_object_end(json);
}

int ae_bench_print_json(const struct ae_bench_machine *machine, const struct ae_bench_rows *rows,
                        FILE *out)
{
        AE_CLEANUP(ae_json_deinit) struct ae_json json = AE_JSON_INIT;
        AE_CLEANUP(ae_cleanup_free) char *text = NULL;
        int r;

        ae_json_object_begin(&json);
        ae_json_put_string(&json, "schema", "autoep.bench/1");
        ae_json_key(&json, "machine");
        ae_json_object_begin(&json);
        ae_json_put_string(&json, "kernels", machine->cpu);
        ae_json_put_u64(&json, "processors", machine->n_cpus);
        ae_json_put_u64(&json, "last_level_cache_len", machine->llc_len);
        ae_json_put_u64(&json, "memory_len", machine->memory_len);
        ae_json_put_bool(&json, "quick", machine->quick);
        ae_json_object_end(&json);
        ae_json_key(&json, "rows");
        ae_json_array_begin(&json);
        for (size_t i = 0; i < rows->n; i++)
                put_row(&json, &rows->items[i]);
        ae_json_array_end(&json);
        ae_json_object_end(&json);
        r = ae_json_finish(&json, &text, NULL);
        if (r < 0)
                return r;
        fprintf(out, "%s\n", text);
        return 0;
}
