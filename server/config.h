/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's settings: one table gives the key of the file, the flag, the default and the help.
 * File, then environment AUTOEPD_<KEY>, then flags. Main thread, before anything runs.
 */
#pragma once

#include "proto/base/log.h"

#include <stdbool.h>
#include <stdint.h>

#define AE_CONFIG_PEERS_MAX 1024

struct ae_config {
        bool dev;
        uint32_t node;
        char *peers;       /* owned; addresses by node id, comma-separated */
        char *socket;      /* owned */
        char *transport;   /* owned */
        uint64_t memory;   /* bytes */
        uint32_t threads;
        enum ae_log_level log_level;
        /* derived */
        char **peer_list;  /* owned */
        uint32_t n_peers;
};

/*
 * Reads everything. Returns 0, or 1 after --help, --version or --check-config (printed, all well),
 * or a negative code whose text names the key and where it was set.
 */
int ae_config_read(struct ae_config *config, int argc, char **argv);
void ae_config_free(struct ae_config *config);
