/* SPDX-License-Identifier: Apache-2.0 */
/* Line assembly, levels, output. */
#include "client/run/lines.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"

#include <ctype.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void give(const char *line, size_t len, ae_run_line_fn *fn, void *arg)
{
        const char *start;

        if (len > 0 && line[len - 1] == '\r')
                len--;
        start = memrchr(line, '\r', len);
        start = start ? start + 1 : line;
        fn(arg, start, len - (size_t)(start - line));
}

static bool reserve(struct ae_run_lines *lines, size_t len)
{
        size_t size = AE_MAX(2 * lines->size, (size_t)512);
        char *data;

        if (len <= lines->size)
                return true;
        size = AE_MIN(AE_MAX(size, len), (size_t)AE_RUN_LINE_MAX);
        data = realloc(lines->data, size);
        if (!data)
                return false;
        lines->data = data;
        lines->size = size;
        return true;
}

static void give_held(struct ae_run_lines *lines, ae_run_line_fn *fn, void *arg)
{
        give(lines->data, lines->len, fn, arg);
        lines->len = 0;
}

/* Keeps what has no newline yet. */
static void hold(struct ae_run_lines *lines, const char *data, size_t len, ae_run_line_fn *fn,
                 void *arg)
{
        while (len > 0) {
                size_t part = AE_MIN(len, AE_RUN_LINE_MAX - lines->len);

                if (!reserve(lines, lines->len + part)) {
                        if (lines->len > 0)
                                give_held(lines, fn, arg);
                        give(data, len, fn, arg);
                        return;
                }
                memcpy(lines->data + lines->len, data, part);
                lines->len += part;
                data += part;
                len -= part;
                if (lines->len == AE_RUN_LINE_MAX)
                        give_held(lines, fn, arg);
        }
}

void ae_run_lines_feed(struct ae_run_lines *lines, const char *data, size_t len,
                       ae_run_line_fn *fn, void *arg)
{
        while (len > 0) {
                const char *newline = memchr(data, '\n', len);
                size_t part = newline ? (size_t)(newline - data) : len;

                if (newline && lines->len == 0 && part <= AE_RUN_LINE_MAX) {
                        give(data, part, fn, arg);
                } else {
                        hold(lines, data, part, fn, arg);
                        if (newline)
                                give_held(lines, fn, arg);
                }
                part += newline != NULL;
                data += part;
                len -= part;
        }
}

void ae_run_lines_finish(struct ae_run_lines *lines, ae_run_line_fn *fn, void *arg)
{
        if (lines->len > 0)
                give_held(lines, fn, arg);
        free(lines->data);
        *lines = (struct ae_run_lines){ 0 };
}

/* The @nth word of a line, divided by single blanks; "" when there are fewer. */
static size_t word_at(const char *line, size_t len, unsigned nth, const char **ret_word)
{
        const char *end = line + len, *blank;

        for (; nth > 0; nth--) {
                blank = memchr(line, ' ', (size_t)(end - line));
                if (!blank)
                        return 0;
                line = blank + 1;
        }
        blank = memchr(line, ' ', (size_t)(end - line));
        *ret_word = line;
        return (size_t)((blank ? blank : end) - line);
}

enum ae_log_level ae_run_line_level(const char *line, size_t len)
{
        const char *word = NULL;
        size_t n = word_at(line, len, 2, &word);
        enum ae_log_level level;
        char name[8];

        if (!isdigit((unsigned char)(len ? line[0] : 0)) || n < 2 || n > sizeof(name) ||
            word[n - 1] != ':')
                return AE_LOG_ERROR;
        memcpy(name, word, n - 1);
        name[n - 1] = '\0';
        return ae_log_level_parse(name, &level) == 0 ? level : AE_LOG_ERROR;
}

bool ae_run_line_has(const char *line, size_t len, const char *words)
{
        size_t n = strlen(words);

        for (size_t i = 0; i + n <= len; i++) {
                if (strncasecmp(line + i, words, n) == 0)
                        return true;
        }
        return false;
}

/* A terminal may be in non-blocking mode because of another program that shares it. */
static void write_all(int fd, const char *data, size_t len)
{
        while (len > 0) {
                ssize_t n = write(fd, data, len);

                if (n < 0 && errno == EAGAIN)
                        (void)poll(&(struct pollfd){ .fd = fd, .events = POLLOUT }, 1, -1);
                else if (n < 0 && errno != EINTR)
                        return;
                if (n > 0) {
                        data += n;
                        len -= (size_t)n;
                }
        }
}

void ae_run_line_write(int fd, const char *prefix, const char *line, size_t len)
{
        const char *wipe = isatty(fd) ? "\r\033[K" : "";
        size_t head = strlen(wipe) + strlen(prefix);
        AE_CLEANUP(ae_cleanup_free) char *text = malloc(head + len + 2);

        if (!text) {
                write_all(fd, line, len);
                write_all(fd, "\n", 1);
                return;
        }
        (void)snprintf(text, head + 1, "%s%s", wipe, prefix);
        memcpy(text + head, line, len);
        text[head + len] = '\n';
        write_all(fd, text, head + len + 1);
}

void ae_run_tail_add(struct ae_run_tail *tail, const char *line, size_t len)
{
        char *copy = malloc(len + 1); /* without memory, one line fewer */

        if (copy) {
                memcpy(copy, line, len); /* @line does not end with a NUL */
                copy[len] = '\0';
        }
        free(tail->lines[tail->next]);
        tail->lines[tail->next] = copy;
        tail->next = (tail->next + 1) % AE_RUN_TAIL_LINES;
}

void ae_run_tail_take(struct ae_run_tail *tail, ae_run_line_fn *fn, void *arg)
{
        for (unsigned i = 0; i < AE_RUN_TAIL_LINES; i++) {
                const char *line = tail->lines[(tail->next + i) % AE_RUN_TAIL_LINES];

                if (line)
                        fn(arg, line, strlen(line));
        }
        ae_run_tail_deinit(tail);
}

void ae_run_tail_deinit(struct ae_run_tail *tail)
{
        for (unsigned i = 0; i < AE_RUN_TAIL_LINES; i++)
                free(tail->lines[i]);
        *tail = (struct ae_run_tail){ 0 };
}
