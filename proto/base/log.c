/* SPDX-License-Identifier: Apache-2.0 */
/* The log of programs. Any thread: a line is built on the stack and written with one call. */
#include "proto/base/log.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *program = "autoep";
static enum ae_log_level threshold = AE_LOG_INFO;
static const char *const words[] = { "error", "warn", "info", "debug" };
/* sd-daemon(3): systemd reads the priority from the line's head. */
static const char *const priorities[] = { "<3>", "<4>", "<6>", "<7>" };

void ae_log_init(const char *name, enum ae_log_level level)
{
        program = name;
        threshold = level;
}

int ae_log_level_parse(const char *word, enum ae_log_level *ret_level)
{
        for (size_t i = 0; i < AE_ARRAY_LEN(words); i++) {
                if (strcmp(word, words[i]) == 0) {
                        *ret_level = (enum ae_log_level)i;
                        return 0;
                }
        }
        return ae_fail(AE_EINVAL, "unknown log level '%s': use error, warn, info or debug", word);
}

static size_t line_head(char *line, size_t size, enum ae_log_level level)
{
        struct timespec now;
        struct tm tm;
        char stamp[32];

        if (getenv("JOURNAL_STREAM"))
                return (size_t)snprintf(line, size, "%s%s: ", priorities[level], program);
        clock_gettime(CLOCK_REALTIME, &now);
        localtime_r(&now.tv_sec, &tm);
        strftime(stamp, sizeof(stamp), "%H:%M:%S", &tm);
        return (size_t)snprintf(line, size, "%s.%03ld %s %s: ", stamp, now.tv_nsec / 1000000,
                                program, words[level]);
}

void ae_log(enum ae_log_level level, const char *format, ...)
{
        char line[1280];
        size_t head;
        size_t len;
        va_list args;

        if (level > threshold)
                return;
        head = line_head(line, sizeof(line), level);
        va_start(args, format);
        (void)vsnprintf(line + head, sizeof(line) - head - 1, format, args);
        va_end(args);
        len = strlen(line);
        line[len++] = '\n';
        if (write(STDERR_FILENO, line, len) < 0)
                return; /* nobody reads the log; there is nowhere to say so */
}
