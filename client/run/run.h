/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The run: daemons first, workers when all daemons are ready, and an orderly end whatever happens.
 * One thread, one libuv loop. States and their moves stand in run.c.
 */
#pragma once

#include "client/run/options.h"

#define AE_RUN_STOP_NS (3 * AE_NS_PER_S)   /* from SIGTERM to SIGKILL for workers */
#define AE_RUN_END_NS (5 * AE_NS_PER_S)    /* likewise for daemons */
#define AE_RUN_ATTEMPTS 3                  /* at free ports */

#define AE_RUN_REASON_MAX 512

struct ae_run_outcome {
        int code;                        /* for exit() */
        char reason[AE_RUN_REASON_MAX];  /* of the first failure; "" when there was none */
};

/*
 * Runs everything to its end; blocks. Nothing is left running and the private directory is gone
 * when it returns. The code is 0; the first failing worker's or daemon's exit code, or 128 and the
 * signal that killed it; 128 and the signal that stopped the launcher; 127 and 126 as shells have
 * it for a program that can't be started; 1 for anything else.
 */
void ae_run(const struct ae_run_options *options, struct ae_run_outcome *ret_outcome);
