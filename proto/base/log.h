/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's log: one line an event, to stderr, a lower-case sentence and then key=value. Only
 * programs and the daemon's outer layers log; libraries return codes. Any thread.
 */
#pragma once

enum ae_log_level { AE_LOG_ERROR, AE_LOG_WARN, AE_LOG_INFO, AE_LOG_DEBUG };

/* Lines above @level are dropped; @name stands in front of each line and is borrowed for ever. */
void ae_log_init(const char *name, enum ae_log_level level);
/* Parses "error", "warn", "info" or "debug"; AE_EINVAL otherwise. */
int ae_log_level_parse(const char *word, enum ae_log_level *ret_level);

void ae_log(enum ae_log_level level, const char *format, ...)
        __attribute__((format(printf, 2, 3)));

#define ae_log_warn(...) ae_log(AE_LOG_WARN, __VA_ARGS__)
#define ae_log_info(...) ae_log(AE_LOG_INFO, __VA_ARGS__)
