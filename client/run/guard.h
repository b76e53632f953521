/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small process that outlives the launcher, for a launcher that is killed cleans nothing up. It
 * holds the reading end of a pipe and learns from it which process groups live. When the pipe ends,
 * because the launcher closed it or is no more, it kills what is left and removes the private
 * directory. Children also die with the launcher by PR_SET_PDEATHSIG; but that reaches neither
 * their own children nor the directory.
 */
#pragma once

#include <sys/types.h>

struct ae_run_guard {
        pid_t pid;
        int fd;          /* writing end; a child before its exec() inherits it */
        const char *dir; /* borrowed */
};

#define AE_RUN_GUARD_INIT { .pid = -1, .fd = -1 }

/* Call it while the process has one thread. AE_ESYS. */
int ae_run_guard_start(const char *dir, struct ae_run_guard *ret_guard);

/*
 * Process group @pid lives, or is no more. The first is said by the child itself, so that there is
 * no moment at which it could be missed; async-signal-safe.
 */
void ae_run_guard_born(int fd, pid_t pid);
void ae_run_guard_gone(int fd, pid_t pid);

/* Ends the guard and waits until everything is gone. Without a guard only removes the directory. */
void ae_run_guard_finish(struct ae_run_guard *guard);
