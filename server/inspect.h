/* SPDX-License-Identifier: Apache-2.0 */
/* The daemon's side of autoep-ctl: JSON about what it holds, as client/ctl/SCHEMA.md says. */
#pragma once

#include "server/config.h"
#include "server/node.h"

struct ae_inspect {
        struct ae_node *node;           /* borrowed */
        const struct ae_config *config; /* borrowed */
        uint64_t uptime_ns;
};

/*
 * Answers @request; *ret_text is malloc'd JSON, the caller's to free. AE_ENOENT for an unknown job,
 * tensor or unit (the text says which there are), AE_EUNSUPPORTED for an unknown command,
 * AE_EOVERFLOW for an answer beyond a frame. Who may ask was settled by the socket's mode. Loop
 * thread, changes nothing.
 */
int ae_inspect(const struct ae_inspect *inspect, const Autoep__CtlRequest *request,
               char **ret_text);
