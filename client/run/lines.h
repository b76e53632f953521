/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From bytes of a pipe to whole lines, and from lines to the launcher's own output. One thread.
 */
#pragma once

#include "proto/base/log.h"

#include <stdbool.h>
#include <stddef.h>

/* A longer line is cut into several. */
#define AE_RUN_LINE_MAX 65536

struct ae_run_lines {
        char *data;  /* owned: a line that isn't whole yet */
        size_t len;
        size_t size;
};

/* @line has no newline and no NUL behind it, and is borrowed for the call. */
typedef void ae_run_line_fn(void *arg, const char *line, size_t len);

/*
 * Calls @fn for each line that is whole now. Of a line that a carriage return rewrote only the last
 * state is given, as a terminal would show it. Without memory the bytes at hand become a line.
 */
void ae_run_lines_feed(struct ae_run_lines *lines, const char *data, size_t len,
                       ae_run_line_fn *fn, void *arg);
/* The rest, which no newline ended, as a line; then frees. */
void ae_run_lines_finish(struct ae_run_lines *lines, ae_run_line_fn *fn, void *arg);

/*
 * The level of a line that ae_log() wrote: "HH:MM:SS.mmm NAME LEVEL: ...". AE_LOG_ERROR for lines
 * of any other form: an assertion or a sanitizer speaks without a level.
 */
enum ae_log_level ae_run_line_level(const char *line, size_t len);

/* Whether @words are in the line, in any case of letters. */
bool ae_run_line_has(const char *line, size_t len, const char *words);

/*
 * Writes "PREFIX LINE\n" to @fd with one write where possible; blocks. When @fd is a terminal, what
 * a live line left in this row is wiped first. An @fd that nobody reads any more drops it.
 */
void ae_run_line_write(int fd, const char *prefix, const char *line, size_t len);

/* The last lines of a daemon that weren't shown, for the day that it fails. */
#define AE_RUN_TAIL_LINES 12
struct ae_run_tail {
        char *lines[AE_RUN_TAIL_LINES]; /* owned; a ring, NULL where there is none */
        unsigned next;
};

void ae_run_tail_add(struct ae_run_tail *tail, const char *line, size_t len);
/* Oldest first; the tail is empty afterwards. */
void ae_run_tail_take(struct ae_run_tail *tail, ae_run_line_fn *fn, void *arg);
void ae_run_tail_deinit(struct ae_run_tail *tail);
