/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Starts a program in a process group of its own that dies with the launcher. uv_spawn() can't set
 * PR_SET_PDEATHSIG, hence fork() and exec() here.
 */
#pragma once

#include <stdbool.h>
#include <sys/types.h>

struct ae_run_spawn {
        char **argv;       /* argv[0] is looked for in PATH; all borrowed */
        char **vars;
        int in, out, err;  /* what becomes descriptors 0 to 2; -1: /dev/null */
        int guard_fd;
};

/*
 * @ret_pid leads the new group. @return: 0; AE_ENOENT when there is no such program; AE_ESYS for
 * anything else that stops it from running, exec() included.
 */
int ae_run_spawn(const struct ae_run_spawn *spawn, pid_t *ret_pid);
