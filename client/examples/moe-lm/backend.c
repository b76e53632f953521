/* SPDX-License-Identifier: Apache-2.0 */
/* What backends have in common. */
#include "client/examples/moe-lm/backend.h"

#include "proto/base/cleanup.h"
#include "proto/base/status.h"

#include <errno.h>
#include <stdlib.h>

int lm_total(struct lm_backend *backend, double *values, size_t n)
{
        struct ae_comm *all = backend->all;
        AE_CLEANUP(ae_cleanup_free) double *parts = calloc(n * all->size + 1, sizeof(*parts));
        int r;

        if (!parts)
                return ae_fail_sys(ENOMEM, "cannot add up %zu values over the ranks", n);
        r = ae_comm_allgather(all, values, n * sizeof(*values), parts, lm_deadline(backend));
        if (r < 0)
                return r;
        for (size_t i = 0; i < n; i++) {
                values[i] = parts[i];
                for (uint32_t p = 1; p < all->size; p++)
                        values[i] += parts[p * n + i];
        }
        return 0;
}
