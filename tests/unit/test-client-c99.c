/* SPDX-License-Identifier: Apache-2.0 */
/* autoep.h in strict C99, against the shared library. */
#include "client/autoep.h"

#include <string.h>

int main(void)
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        autoep *handle = NULL;

        if (view.size != sizeof(view) || verdict.size != sizeof(verdict))
                return 1;
        options.timeout_ms = -7;
        if (autoep_open(&options, &handle) != AUTOEP_EINVAL || handle)
                return 2;
        return strcmp(autoep_strerror(AUTOEP_EAUTH), "not allowed") != 0;
}
