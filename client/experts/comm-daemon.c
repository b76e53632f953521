/* SPDX-License-Identifier: Apache-2.0 */
/* The backend of daemon-carried groups. Runs on the caller's thread. */
#include "client/experts/comm-daemon.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/group.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>

/* Rounded up, so that a deadline ahead is never taken for "do not wait". */
static int timeout_of(uint64_t deadline_ns)
{
        const uint64_t now = ae_now_ns();
        const uint64_t left = deadline_ns > now ? deadline_ns - now : 0;

        return (int)AE_MIN(ae_div_up(left, AE_NS_PER_MS), (uint64_t)INT_MAX);
}

static int daemon_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len,
                            void *recv, const uint64_t *recv_len, uint64_t deadline_ns)
{
        struct ae_comm_daemon *daemon = (struct ae_comm_daemon *)comm;
        int r = autoep_announce(daemon->handle, daemon->group, (enum autoep_collective)comm->kind,
                                0, comm->total);

        if (r == 0)
                r = autoep_exchange(daemon->handle, daemon->group, send, send_len, recv, recv_len,
                                    timeout_of(deadline_ns));
        return r < 0 ? ae_fail(r, "%s", autoep_last_error()) : 0;
}

static const struct ae_comm_ops daemon_ops = { .name = "daemon", .alltoallv = daemon_alltoallv };

/* Fills @ranks with the members of this rank's group, by position. */
static void list_members(const struct ae_group_topology *topology, enum autoep_group group,
                         uint32_t rank, uint32_t size, uint32_t *ranks)
{
        for (uint32_t p = 0; p < size; p++) {
                ranks[p] = p;
                if (group == AUTOEP_GROUP_EP)
                        ranks[p] = ae_group_ep_member(topology, ae_group_ep_index(topology, rank),
                                                      p);
                if (group == AUTOEP_GROUP_EDP)
                        ranks[p] = ae_group_edp_member(topology,
                                                       ae_group_edp_index(topology, rank), p);
        }
}

int ae_comm_daemon_init(struct ae_comm_daemon *daemon, autoep *handle, enum autoep_group group,
                        uint32_t order)
{
        struct autoep_info info = { .size = sizeof(info) };
        struct ae_comm_daemon made = { .handle = handle, .group = group };
        AE_CLEANUP(ae_cleanup_free) uint32_t *ranks = NULL;
        struct ae_group_topology topology;
        uint32_t size, position;
        int r = autoep_info(handle, &info);

        if (r < 0)
                return ae_fail(r, "%s", autoep_last_error());
        r = ae_group_init(info.world, info.ep_size, order, &topology);
        if (r < 0)
                return r;
        size = group == AUTOEP_GROUP_EP ? info.ep_size
               : group == AUTOEP_GROUP_EDP ? info.edp_size : info.world;
        position = group == AUTOEP_GROUP_EP ? info.ep_rank
                   : group == AUTOEP_GROUP_EDP ? info.edp_rank : info.rank;
        ranks = calloc(size, sizeof(*ranks));
        if (!ranks)
                return ae_fail_sys(ENOMEM, "cannot form a group of %u ranks", size);
        list_members(&topology, group, info.rank, size, ranks);
        if (ranks[position] != info.rank)
                return ae_fail(AE_EMISMATCH, "cannot form a group: rank %u stands at position %u, "
                               "where rank %u belongs by this order", info.rank, position,
                               ranks[position]);
        r = ae_comm_init(&made.comm, &daemon_ops, ranks, size, position);
        if (r < 0)
                return r;
        *daemon = made;
        return 0;
}

void ae_comm_daemon_deinit(struct ae_comm_daemon *daemon)
{
        ae_comm_deinit(&daemon->comm);
        *daemon = (struct ae_comm_daemon){ 0 };
}
