/* SPDX-License-Identifier: Apache-2.0 */
/* Formatting by kind: every kind writes to a stream in memory, which one function collects. */
#include "client/ctl/cell.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

json_t *ae_ctl_cell_find(const json_t *row, const char *key)
{
        const char *dot = strchr(key, '.');
        char head[32];

        if (!dot)
                return json_object_get(row, key);
        (void)snprintf(head, sizeof(head), "%.*s", (int)(dot - key), key);
        return json_object_get(json_object_get(row, head), dot + 1);
}

bool ae_ctl_cell_has_value(const json_t *value)
{
        if (!value || json_is_null(value))
                return false;
        if (json_is_string(value))
                return json_string_length(value) > 0;
        return !json_is_array(value) || json_array_size(value) > 0;
}

/* The C0 and C1 controls and DEL could move the cursor or worse. */
static void put_text(FILE *out, const char *text)
{
        for (const unsigned char *at = (const unsigned char *)text; *at; at++) {
                if (at[0] == 0xc2 && at[1] >= 0x80 && at[1] < 0xa0) {
                        fputc('?', out);
                        at++;
                } else {
                        fputc(*at < 0x20 || *at == 0x7f ? '?' : *at, out);
                }
        }
}

static void put_number(FILE *out, const json_t *value)
{
        if (json_is_integer(value))
                fprintf(out, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        else
                fprintf(out, "%.6g", json_number_value(value));
}

static void put_size(FILE *out, const json_t *value)
{
        static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
        double size = json_number_value(value);
        size_t unit = 0;

        /* 1023.95 would be shown as 1024.0. */
        for (; fabs(size) >= (unit ? 1023.95 : 1024.0) && unit + 1 < AE_ARRAY_LEN(units); unit++)
                size /= 1024;
        fprintf(out, unit ? "%.1f %s" : "%.0f %s", size, units[unit]);
}

static void put_duration(FILE *out, const json_t *value)
{
        double seconds = json_number_value(value);
        uint64_t s;

        if (!(seconds >= 0 && seconds < 1e12)) {
                put_number(out, value);
                return;
        }
        s = (uint64_t)seconds;
        if (s < 60)
                fprintf(out, "%.1f s", seconds);
        else if (s < 3600)
                fprintf(out, "%" PRIu64 " min %" PRIu64 " s", s / 60, s % 60);
        else if (s < 86400)
                fprintf(out, "%" PRIu64 " h %" PRIu64 " min", s / 3600, s / 60 % 60);
        else
                fprintf(out, "%" PRIu64 " d %" PRIu64 " h", s / 86400, s / 3600 % 24);
}

static void put_shape(FILE *out, const json_t *value)
{
        fputc('[', out);
        for (size_t i = 0; i < json_array_size(value); i++) {
                fputs(i ? "," : "", out);
                put_number(out, json_array_get(value, i));
        }
        fputc(']', out);
}

static void put_ranks(FILE *out, const json_t *value)
{
        size_t n = json_array_size(value);

        for (size_t i = 0, end; i < n; i = end) {
                json_int_t first = json_integer_value(json_array_get(value, i));

                for (end = i + 1; end < n; end++) {
                        json_int_t rank = json_integer_value(json_array_get(value, end));

                        if (rank != first + (json_int_t)(end - i))
                                break;
                }
                fprintf(out, "%s%" JSON_INTEGER_FORMAT, i ? "," : "", first);
                if (end - i > 1)
                        fprintf(out, "%s%" JSON_INTEGER_FORMAT, end - i > 2 ? "-" : ",",
                                first + (json_int_t)(end - i - 1));
        }
}

static void put_words(FILE *out, const json_t *value)
{
        for (size_t i = 0; i < json_array_size(value); i++) {
                const char *word = json_string_value(json_array_get(value, i));

                fputs(i ? "," : "", out);
                put_text(out, word ? word : "-");
        }
}

static void put_value(FILE *out, const json_t *value, const json_t *row)
{
        const char *unit = json_string_value(json_object_get(row, "unit"));

        if (unit && strcmp(unit, "bytes") == 0) {
                put_size(out, value);
        } else {
                put_number(out, value);
                fputs(unit && strcmp(unit, "seconds") == 0 ? " s" : "", out);
        }
}

/* A value of another type than its kind means is shown as it is. */
static void put_any(FILE *out, const json_t *value)
{
        if (json_is_string(value))
                put_text(out, json_string_value(value));
        else if (json_is_number(value))
                put_number(out, value);
        else if (json_is_boolean(value))
                fputs(json_is_true(value) ? "yes" : "no", out);
        else
                fputs("-", out);
}

static void put_cell(FILE *out, const json_t *value, const json_t *row, enum ae_ctl_kind kind)
{
        bool number = json_is_number(value);
        bool array = json_is_array(value);

        /* An empty shape is a scalar's. */
        if (!ae_ctl_cell_has_value(value) && !(kind == AE_CTL_SHAPE && array))
                fputc('-', out);
        else if (kind == AE_CTL_SIZE && number)
                put_size(out, value);
        else if (kind == AE_CTL_DURATION && number)
                put_duration(out, value);
        else if (kind == AE_CTL_VALUE && number)
                put_value(out, value, row);
        else if (kind == AE_CTL_SHAPE && array)
                put_shape(out, value);
        else if (kind == AE_CTL_RANKS && array)
                put_ranks(out, value);
        else if (kind == AE_CTL_WORDS && array)
                put_words(out, value);
        else
                put_any(out, value);
}

char *ae_ctl_cell_text(const json_t *row, const struct ae_ctl_column *column)
{
        const json_t *value = ae_ctl_cell_find(row, column->key);
        AE_CLEANUP(ae_cleanup_free) char *text = NULL;
        size_t len;
        FILE *out = open_memstream(&text, &len);

        if (!out)
                return NULL;
        put_cell(out, value, row, column->kind);
        if (fclose(out) != 0)
                return NULL;
        return ae_steal(text);
}

static bool listed(const char *word, const char *const *words, size_t n_words)
{
        for (size_t i = 0; i < n_words; i++) {
                if (strcmp(word, words[i]) == 0)
                        return true;
        }
        return false;
}

bool ae_ctl_state_is_bad(const char *state)
{
        static const char *const bad[] = { "failed", "lost", "degraded" };

        return listed(state, bad, AE_ARRAY_LEN(bad));
}

enum ae_ctl_paint ae_ctl_cell_paint(const json_t *row, const struct ae_ctl_column *column)
{
        static const char *const good[] = { "ok", "self", "up", "running", "stepping" };
        const char *state = json_string_value(ae_ctl_cell_find(row, column->key));

        if (column->kind != AE_CTL_STATE || !state)
                return AE_CTL_PLAIN;
        if (ae_ctl_state_is_bad(state))
                return AE_CTL_BAD;
        return listed(state, good, AE_ARRAY_LEN(good)) ? AE_CTL_GOOD : AE_CTL_PLAIN;
}

bool ae_ctl_cell_right(const struct ae_ctl_column *column)
{
        return column->kind == AE_CTL_NUMBER || column->kind == AE_CTL_SIZE ||
               column->kind == AE_CTL_DURATION || column->kind == AE_CTL_VALUE;
}
