/* SPDX-License-Identifier: Apache-2.0 */
/* What autoep_open() takes from the environment. Read once, by the opening thread. */
#pragma once

#include "client/autoep.h"

struct ae_env {
        const char *socket, *job, *token; /* borrowed from the options or the environment */
        uint32_t rank, world;             /* a reader: AUTOEP_NONE and 0 */
};

/*
 * Fills what @options leave open: $AUTOEP_SOCKET, $AUTOEP_JOB, $AUTOEP_TOKEN; rank and world from
 * the first launcher that set both of its variables. AE_EINVAL when something is missing or isn't
 * a number, naming it.
 */
int ae_env_resolve(const struct autoep_options *options, struct ae_env *ret_env);
