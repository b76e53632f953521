/* SPDX-License-Identifier: Apache-2.0 */
/* Status names and the per-thread error text. Any thread; no allocation. */
#include "proto/base/status.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

struct status_row {
        int status;
        const char *name;
        const char *code;
        const char *words;
};

static const struct status_row rows[] = {
        { AE_OK, "OK", "AEP_OK", "fine" },
#define STATUS_ROW(name, value, code, words) { value, #name, code, words },
        AE_STATUS_TABLE(STATUS_ROW)
#undef STATUS_ROW
};

static const struct status_row unknown = { 0, "UNKNOWN", "AEP_UNKNOWN_STATUS", "unknown status" };

static _Thread_local char error_text[1024];

static const struct status_row *row_of(int status)
{
        for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
                if (rows[i].status == status)
                        return &rows[i];
        }
        return &unknown;
}

const char *ae_status_words(int status)
{
        return row_of(status)->words;
}

const char *ae_status_code(int status)
{
        return row_of(status)->code;
}

const char *ae_status_name(int status)
{
        return row_of(status)->name;
}

int ae_failv(int status, const char *format, va_list args)
{
        /* An argument may be the old text itself, so the new one is built beside it. */
        char text[sizeof(error_text)];

        (void)vsnprintf(text, sizeof(text), format, args); /* a cut text is still a text */
        memcpy(error_text, text, sizeof(text));
        return status;
}

int ae_fail(int status, const char *format, ...)
{
        va_list args;

        va_start(args, format);
        ae_failv(status, format, args);
        va_end(args);
        return status;
}

int ae_fail_sys(int err, const char *format, ...)
{
        char reason[128];
        size_t len;
        va_list args;

        va_start(args, format);
        ae_failv(AE_ESYS, format, args);
        va_end(args);
        len = strlen(error_text);
        (void)snprintf(error_text + len, sizeof(error_text) - len, ": %s",
                       strerror_r(err, reason, sizeof(reason)));
        return err == ENOMEM ? AE_ENOMEM : AE_ESYS;
}

const char *ae_error_text(void)
{
        return error_text;
}
