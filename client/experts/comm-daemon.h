/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Group communication for CPU workers: struct ae_comm over autoep_exchange(), which the daemons
 * carry. Needs libautoep. One thread per struct at a time, and one for all groups of a handle that
 * overlap in ranks, so that every rank issues their operations in the same order.
 */
#pragma once

#include "client/autoep.h"
#include "client/experts/comm.h"

struct ae_comm_daemon {
        struct ae_comm comm;    /* what to pass on */
        autoep *handle;         /* borrowed */
        enum autoep_group group;
};

/*
 * Forms this rank's EP or EDP group, or the world, of the model that @handle has registered with
 * @order (enum autoep_order). Exchanges nothing. Errors of autoep_info() and ae_comm_init().
 */
int ae_comm_daemon_init(struct ae_comm_daemon *daemon, autoep *handle, enum autoep_group group,
                        uint32_t order);
void ae_comm_daemon_deinit(struct ae_comm_daemon *daemon); /* accepts a zeroed struct */
