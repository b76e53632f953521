/* SPDX-License-Identifier: Apache-2.0 */
/* autoep.h in strict C99, against the shared library. */
#include "client/autoep.h"

#include <string.h>

int main(void)
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        struct autoep_norm2 sum = { { 0 } };
        autoep *handle = NULL;

        if (view.size != sizeof(view) || verdict.size != sizeof(verdict))
                return 1;
        options.timeout_ms = -7;
        if (autoep_open(&options, &handle) != AUTOEP_EINVAL || handle)
                return 2;
        /* 1 is 2^298 of the units of 2^-298: bit 42 of limb 4. */
        if (autoep_norm2_add(&sum, 1.0) != 0 || sum.limb[4] != UINT64_C(1) << 42)
                return 3;
        if (autoep_announce(NULL, AUTOEP_GROUP_EP, AUTOEP_DISPATCH, 0, 0) != AUTOEP_EINVAL)
                return 4;
        return strcmp(autoep_strerror(AUTOEP_EAUTH), "not allowed") != 0;
}
