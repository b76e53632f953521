/* SPDX-License-Identifier: Apache-2.0 */
/* One question to the daemon over its unix socket. Blocks until the answer or the deadline. */
#pragma once

#include "client/ctl/commands.h"

#include <stdint.h>

struct ae_ctl_question {
        const char *socket;  /* all borrowed */
        const char *command;
        const char *job, *tensor, *unit; /* "" for none */
        uint64_t timeout_ns;
};

/*
 * @ret_text: the JSON of the answer, freed by the caller; untouched on failure. @ret_status: 0, or
 * the code of the failure. @return: OK; UNREACHABLE when there is no socket, nobody listens, no
 * answer comes in time or the daemon hangs up; DENIED; FAILED when it says no or breaks the
 * protocol.
 */
enum ae_ctl_exit ae_ctl_ask(const struct ae_ctl_question *question, char **ret_text,
                            int *ret_status);
