/* SPDX-License-Identifier: Apache-2.0 */
/* autoep.h from C++, against the shared library; prints nothing and exits 0. */
#include "client/autoep.h"

#include <cstring>

int main()
{
        struct autoep_options options = AUTOEP_OPTIONS_INIT;
        struct autoep_view view = AUTOEP_VIEW_INIT;
        struct autoep_verdict verdict = AUTOEP_VERDICT_INIT;
        struct autoep_norm2 sum = {};
        autoep *handle = nullptr;

        if (view.size != sizeof(view) || verdict.size != sizeof(verdict) || verdict.why[0])
                return 1;
        options.socket = "/nonexistent/autoepd.sock";
        options.job = "test";
        options.rank = 0;
        options.world = 1;
        if (autoep_open(&options, &handle) != AUTOEP_ENOENT || handle)
                return 2;
        if (!std::strstr(autoep_last_error(), "/nonexistent/autoepd.sock"))
                return 3;
        autoep_close(handle);
        if (autoep_norm2_add(&sum, -1.0) != AUTOEP_EINVAL || sum.limb[9])
                return 4;
        if (autoep_announce(nullptr, AUTOEP_GROUP_EDP, AUTOEP_ALL_REDUCE, 0, 0) != AUTOEP_EINVAL)
                return 5;
        return 0;
}
