/* SPDX-License-Identifier: Apache-2.0 */
/* Where things are: the private directory, its sockets, the daemons' addresses and program. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* What a unix socket's path may have, with its NUL: sockaddr_un.sun_path. */
#define AE_RUN_PATH_MAX 108

/*
 * Makes a directory of mode 0700 under $XDG_RUNTIME_DIR, $TMPDIR or /tmp, the first that is there,
 * may be written and leaves room for the names of sockets. AE_ESYS.
 */
int ae_run_place_new(char ret_dir[AE_RUN_PATH_MAX]);

/* "DIR/KIND-NODE.sock"; the directory is from ae_run_place_new(). */
void ae_run_place_socket(const char *dir, const char *kind, uint32_t node,
                         char ret_path[AE_RUN_PATH_MAX]);

/*
 * The addresses of @n daemons, divided by commas: sockets in @dir for shm, for tcp ports of the
 * loopback that were free just now. The caller frees. AE_ESYS, AE_ENOMEM.
 */
int ae_run_place_peers(const char *transport, const char *dir, uint32_t n, char **ret_peers);

/*
 * The daemon's program: $AUTOEP_AUTOEPD; else beside this one, as built or as installed; else in
 * PATH. The caller frees. AE_ENOENT.
 */
int ae_run_place_daemon(char **ret_path);
