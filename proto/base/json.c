/* SPDX-License-Identifier: Apache-2.0 */
/* The JSON writer. Whatever the value, text is added in one place: append(). */
#include "proto/base/json.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FIRST_SIZE 512
#define REPLACEMENT "\xef\xbf\xbd" /* U+FFFD */

static int grow(struct ae_json *json, size_t len)
{
        size_t need, size;
        char *data;

        if (ae_add_overflows(json->len, len, &need) || ae_add_overflows(need, (size_t)1, &need) ||
            ae_mul_overflows(need, (size_t)2, &size))
                return ae_fail(AE_ENOMEM, "cannot hold a JSON text of %zu bytes and %zu more",
                               json->len, len);
        if (need <= json->size)
                return 0;
        size = size < FIRST_SIZE ? FIRST_SIZE : size;
        data = realloc(json->data, size);
        if (!data)
                return ae_fail(AE_ENOMEM, "no memory for %zu bytes of JSON text", size);
        json->data = data;
        json->size = size;
        return 0;
}

static void append(struct ae_json *json, const char *text, size_t len)
{
        if (json->status < 0)
                return;
        json->status = grow(json, len);
        if (json->status < 0)
                return;
        memcpy(json->data + json->len, text, len);
        json->len += len;
}

/* What stands before a value or a key: a comma when it isn't the first. */
static void separate(struct ae_json *json)
{
        if (json->filled)
                append(json, ",", 1);
        json->filled = true;
}

static void value_begin(struct ae_json *json)
{
        bool in_object = json->depth > 0 && json->open[json->depth - 1] == '{';

        assert(in_object == json->keyed && "a key for each value of an object, and for no other");
        assert((json->depth > 0 || !json->filled) && "one value at the top");
        if (!json->keyed)
                separate(json);
        json->keyed = false;
}

static void level_begin(struct ae_json *json, char open)
{
        value_begin(json);
        assert(json->depth < AE_JSON_DEPTH_MAX);
        append(json, &open, 1);
        json->open[json->depth++] = open;
        json->filled = false;
}

static void level_end(struct ae_json *json, char open, char close)
{
        assert(json->depth > 0 && json->open[json->depth - 1] == open);
        assert(!json->keyed && "a key without its value");
        append(json, &close, 1);
        json->depth--;
        json->filled = true;
}

/*
 * Bytes of the well-formed UTF-8 sequence at @text, 0 when there is none. Table 3-7 of the Unicode
 * standard: no overlong forms, no surrogates, nothing past U+10FFFF.
 */
static size_t utf8_len(const unsigned char *text, size_t len)
{
        unsigned char low = 0x80, high = 0xbf;
        size_t n;

        if (text[0] < 0x80)
                return 1;
        if (text[0] < 0xc2 || text[0] > 0xf4)
                return 0;
        n = text[0] < 0xe0 ? 2 : text[0] < 0xf0 ? 3 : 4;
        switch (text[0]) {
        case 0xe0:
                low = 0xa0;
                break;
        case 0xed:
                high = 0x9f;
                break;
        case 0xf0:
                low = 0x90;
                break;
        case 0xf4:
                high = 0x8f;
                break;
        }
        if (len < n || text[1] < low || text[1] > high)
                return 0;
        for (size_t i = 2; i < n; i++) {
                if (text[i] < 0x80 || text[i] > 0xbf)
                        return 0;
        }
        return n;
}

/* DEL and the C1 controls are legal in JSON, but no terminal should meet them. */
static bool is_control(const unsigned char *text, size_t len)
{
        return (len == 1 && (text[0] < 0x20 || text[0] == 0x7f)) ||
               (len == 2 && text[0] == 0xc2 && text[1] < 0xa0);
}

static void append_escaped(struct ae_json *json, const unsigned char *text, size_t len)
{
        static const char plain[] = "\"\\\n\r\t";
        static const char letters[] = "\"\\nrt";
        const char *at = len == 1 && *text ? strchr(plain, *text) : NULL;
        char escape[8];

        if (at) {
                append(json, (char[]){ '\\', letters[at - plain] }, 2);
        } else if (is_control(text, len)) {
                (void)snprintf(escape, sizeof(escape), "\\u%04x", text[len - 1]);
                append(json, escape, 6);
        } else {
                append(json, (const char *)text, len);
        }
}

static void append_quoted(struct ae_json *json, const char *string, size_t len)
{
        const unsigned char *text = (const unsigned char *)string;

        append(json, "\"", 1);
        for (size_t i = 0, n; i < len; i += n) {
                n = utf8_len(text + i, len - i);
                if (n > 0) {
                        append_escaped(json, text + i, n);
                } else {
                        append(json, REPLACEMENT, strlen(REPLACEMENT));
                        n = 1;
                }
        }
        append(json, "\"", 1);
}

void ae_json_deinit(struct ae_json *json)
{
        free(json->data);
        *json = (struct ae_json)AE_JSON_INIT;
}

void ae_json_object_begin(struct ae_json *json)
{
        level_begin(json, '{');
}

void ae_json_object_end(struct ae_json *json)
{
        level_end(json, '{', '}');
}

void ae_json_array_begin(struct ae_json *json)
{
        level_begin(json, '[');
}

void ae_json_array_end(struct ae_json *json)
{
        level_end(json, '[', ']');
}

void ae_json_key(struct ae_json *json, const char *key)
{
        assert(json->depth > 0 && json->open[json->depth - 1] == '{');
        assert(!json->keyed && "two keys in a row");
        separate(json);
        append_quoted(json, key, strlen(key));
        append(json, ":", 1);
        json->keyed = true;
}

void ae_json_string(struct ae_json *json, const char *string)
{
        if (string)
                ae_json_string_n(json, string, strlen(string));
        else
                ae_json_null(json);
}

void ae_json_string_n(struct ae_json *json, const char *string, size_t len)
{
        value_begin(json);
        append_quoted(json, string, len);
}

void ae_json_u64(struct ae_json *json, uint64_t value)
{
        char text[24];

        value_begin(json);
        append(json, text, (size_t)snprintf(text, sizeof(text), "%" PRIu64, value));
}

void ae_json_i64(struct ae_json *json, int64_t value)
{
        char text[24];

        value_begin(json);
        append(json, text, (size_t)snprintf(text, sizeof(text), "%" PRId64, value));
}

void ae_json_double(struct ae_json *json, double value)
{
        char text[32];
        char *comma;
        int len = 0;

        if (!isfinite(value)) {
                ae_json_null(json);
                return;
        }
        value_begin(json);
        for (int digits = 15; digits <= 17; digits++) {
                len = snprintf(text, sizeof(text), "%.*g", digits, value);
                if (strtod(text, NULL) == value)
                        break;
        }
        comma = strchr(text, ','); /* in locales that write it so */
        if (comma)
                *comma = '.';
        append(json, text, (size_t)len);
}

void ae_json_bool(struct ae_json *json, bool value)
{
        value_begin(json);
        append(json, value ? "true" : "false", value ? 4 : 5);
}

void ae_json_null(struct ae_json *json)
{
        value_begin(json);
        append(json, "null", 4);
}

void ae_json_put_string(struct ae_json *json, const char *key, const char *value)
{
        ae_json_key(json, key);
        ae_json_string(json, value);
}

void ae_json_put_u64(struct ae_json *json, const char *key, uint64_t value)
{
        ae_json_key(json, key);
        ae_json_u64(json, value);
}

void ae_json_put_i64(struct ae_json *json, const char *key, int64_t value)
{
        ae_json_key(json, key);
        ae_json_i64(json, value);
}

void ae_json_put_double(struct ae_json *json, const char *key, double value)
{
        ae_json_key(json, key);
        ae_json_double(json, value);
}

void ae_json_put_bool(struct ae_json *json, const char *key, bool value)
{
        ae_json_key(json, key);
        ae_json_bool(json, value);
}

int ae_json_finish(struct ae_json *json, char **ret_text, size_t *ret_len)
{
        int status = json->status;

        assert(json->depth == 0 && json->filled && "one whole value");
        if (status < 0) {
                ae_json_deinit(json);
                return status;
        }
        json->data[json->len] = '\0'; /* grow() keeps one byte for it */
        if (ret_len)
                *ret_len = json->len;
        *ret_text = ae_steal(json->data);
        ae_json_deinit(json);
        return 0;
}
