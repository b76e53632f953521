/* SPDX-License-Identifier: Apache-2.0 */
/* What run.c (the states) shares with start.c (the making of children). */
#pragma once

#include "client/run/child.h"
#include "client/run/guard.h"
#include "client/run/run.h"

enum ae_run_state {
        AE_RUN_STARTING, /* daemons, until all are ready */
        AE_RUN_RETRYING, /* a port was taken: they are killed and started again */
        AE_RUN_RUNNING,  /* workers */
        AE_RUN_STOPPING, /* workers were told to stop */
        AE_RUN_ENDING,   /* daemons were told to stop */
        AE_RUN_DONE,
        AE_RUN_N_STATES
};

enum { AE_RUN_SIGCHLD, AE_RUN_SIGINT, AE_RUN_SIGTERM, AE_RUN_SIGHUP, AE_RUN_N_SIGNALS };

struct ae_run {
        const struct ae_run_options *options; /* borrowed */
        struct ae_run_outcome *outcome;       /* borrowed */
        enum ae_run_state state;
        uv_loop_t loop;
        uv_signal_t signals[AE_RUN_N_SIGNALS];
        uv_timer_t timer;                     /* the state's deadline */
        struct ae_run_guard guard;
        char dir[AE_RUN_PATH_MAX];
        char *daemon_path;                    /* owned */
        char token[33];                       /* 128 random bits in hexadecimal */
        unsigned n_attempts;
        unsigned n_interrupts;
        bool failed;                          /* outcome has the first failure */
        uint32_t n_ready;
        uint32_t n_live_daemons, n_live_workers;
        struct ae_run_child daemons[AE_RUN_NODES_MAX];
        struct ae_run_child workers[AE_RUN_WORKERS_MAX];
};

/* Tokens, paths and the calls of each child. AE_… */
int ae_run_prepare(struct ae_run *run);
/* Starts all daemons at new addresses, counting the live ones. AE_… with some running. */
int ae_run_start_daemons(struct ae_run *run);
/* Starts all workers, counting the live ones. AE_… with some running. */
int ae_run_start_workers(struct ae_run *run);

/* Called by children; in run.c. */
void ae_run_on_ready(struct ae_run_child *child);
void ae_run_on_finished(struct ae_run_child *child);
