/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon: a uv loop with a node, compute threads and sessions on it. Construction and
 * destruction order stand in daemon.c on one screen. One thread, the loop's; several daemons may
 * live in one process, each with a loop of its own.
 */
#pragma once

#include "server/config.h"

#include <stdint.h>

struct ae_daemon;

/* Opens everything; nothing is served before ae_daemon_run(). The config is borrowed for life. */
int ae_daemon_new(const struct ae_config *config, struct ae_daemon **ret_daemon);
/* NULL is fine. Returns NULL. */
struct ae_daemon *ae_daemon_free(struct ae_daemon *daemon);

/* Serves until ae_daemon_stop(); says READY=1 on the way when @notify. */
void ae_daemon_run(struct ae_daemon *daemon, int notify);
/* From any thread or a signal's callback on the loop. */
void ae_daemon_stop(struct ae_daemon *daemon);
