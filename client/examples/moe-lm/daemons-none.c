/* SPDX-License-Identifier: Apache-2.0 */
/* The autoep backend of a build without libautoep. */
#include "client/examples/moe-lm/daemons.h"

#include "proto/base/status.h"

int lm_daemons_new(const struct lm_spec *spec, const struct lm_daemons_config *config,
                   struct lm_backend **ret_backend)
{
        (void)spec;
        (void)config;
        (void)ret_backend;
        return ae_fail(AE_EUNSUPPORTED, "cannot join a job: this moe-lm was built without "
                       "libautoep; --reference trains without it");
}

struct lm_daemons_job lm_daemons_job(const struct lm_backend *backend)
{
        return (struct lm_daemons_job){ .topology = backend->place, .sum_group = 1 };
}
