/* SPDX-License-Identifier: Apache-2.0 */
/* Codes and texts of failures, per thread. No allocation, no locks. */
#include "client/error.h"

#include "client/autoep.h"

#include <assert.h>
#include <stdio.h>

#define ERROR_SAME(name, value, code, words)                                                      \
        static_assert((int)AUTOEP_##name == (int)AE_##name, "autoep.h and status.h must agree");
AE_STATUS_TABLE(ERROR_SAME)
#undef ERROR_SAME

static _Thread_local char last_error[1280];

int ae_api(const char *call, int status)
{
        assert(status <= 0);
        if (status < 0)
                (void)snprintf(last_error, sizeof(last_error), "%s: %s", call, ae_error_text());
        return status;
}

int ae_check_size(const char *what, size_t size, size_t known)
{
        if (size == known)
                return 0;
        return ae_fail(AE_EINVAL, "struct %s says that it has %zu bytes, this library (%d.%d) "
                       "knows %zu: set .size = sizeof, and build against the header of this "
                       "version", what, size, AUTOEP_VERSION_MAJOR, AUTOEP_VERSION_MINOR, known);
}

const char *autoep_last_error(void)
{
        return last_error;
}

const char *autoep_strerror(int error)
{
        return ae_status_words(error);
}
