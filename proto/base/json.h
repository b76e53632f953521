/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writes JSON (RFC 8259) from left to right into one growing buffer; there is no tree, so that a
 * reply with a hundred thousand rows costs its text and nothing more. One owner, any thread.
 *
 * Calls return nothing: the first failure (no memory) sticks and ae_json_finish() reports it. The
 * order of calls is the caller's own invariant and asserted: in an object every value has its key
 * before it, what was begun is ended, there is one value at the top.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AE_JSON_DEPTH_MAX 16

struct ae_json {
        char *data;   /* owned */
        size_t len;
        size_t size;
        uint32_t depth;
        char open[AE_JSON_DEPTH_MAX]; /* '{' or '[' per level */
        bool filled;   /* the open level, or the top, holds a value already */
        bool keyed;    /* a key was written, its value is missing */
        int status;    /* 0, or the first failure */
};

#define AE_JSON_INIT { .data = NULL }

/* Any state, also twice; leaves @json as AE_JSON_INIT. */
void ae_json_deinit(struct ae_json *json);

void ae_json_object_begin(struct ae_json *json);
void ae_json_object_end(struct ae_json *json);
void ae_json_array_begin(struct ae_json *json);
void ae_json_array_end(struct ae_json *json);
/* @key as ae_json_string(). */
void ae_json_key(struct ae_json *json, const char *key);

/* Quotes and escapes; each byte that isn't part of well-formed UTF-8 becomes U+FFFD, so that a
 * name from a peer can't spoil the reply. NULL gives null. */
void ae_json_string(struct ae_json *json, const char *string);
void ae_json_string_n(struct ae_json *json, const char *string, size_t len);
void ae_json_u64(struct ae_json *json, uint64_t value);
void ae_json_i64(struct ae_json *json, int64_t value);
/* The shortest of 15 to 17 digits that reads back as @value; null for NaN and infinities, which
 * JSON doesn't have. */
void ae_json_double(struct ae_json *json, double value);
void ae_json_bool(struct ae_json *json, bool value);
void ae_json_null(struct ae_json *json);

/* A key and its value in one call. */
void ae_json_put_string(struct ae_json *json, const char *key, const char *value);
void ae_json_put_u64(struct ae_json *json, const char *key, uint64_t value);
void ae_json_put_i64(struct ae_json *json, const char *key, int64_t value);
void ae_json_put_double(struct ae_json *json, const char *key, double value);
void ae_json_put_bool(struct ae_json *json, const char *key, bool value);

/*
 * Hands over the finished, NUL-terminated text, which the caller frees, and its length without the
 * NUL (ret_len may be NULL). @json is empty afterwards and may be used again. @return: 0 or
 * AE_ENOMEM.
 */
int ae_json_finish(struct ae_json *json, char **ret_text, size_t *ret_len);
