/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A communication backend for tests: the ranks of a group are threads of this process and read each
 * other's send buffers between two barriers. And a world of such threads to run a test body in.
 * cmocka's assertions belong to the main thread: bodies return a status and leave results for it.
 */
#pragma once

#include "client/experts/comm.h"
#include "proto/wire/group.h"

#include <stdint.h>

#define COMM_LOCAL_RANKS_MAX 64

struct comm_local;

/* One group; @ranks (size of them) are the job ranks by position. NULL when memory is short. */
struct comm_local *comm_local_new(const uint32_t *ranks, uint32_t size);
void comm_local_free(struct comm_local *group);
/* The view of one member: its own comm, to be used by one thread, freed by comm_local_leave(). */
int comm_local_join(struct comm_local *group, uint32_t position, struct ae_comm **ret_comm);
void comm_local_leave(struct ae_comm *comm);

/* What a body runs with; borrowed until it returns. */
struct local_rank {
        void *arg;
        const struct ae_group_topology *topology;
        uint32_t rank;
        struct ae_comm *ep, *edp;
        uint64_t deadline_ns;
};

/*
 * Runs @body on one thread per rank of a world with the given groups. Returns 0 when all bodies
 * did, else the first failed rank's status; its error text is then this thread's. The deadline is
 * 10 s from now.
 */
int local_world_run(const struct ae_group_topology *topology,
                    int (*body)(const struct local_rank *self), void *arg);
