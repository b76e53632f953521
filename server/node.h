/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A node: the core with a transport under it. Carries out the core's actions over struct ae_net,
 * keeps the connections to the peers up, queues under back-pressure within a bound, and turns the
 * transport's events into the core's. The daemon runs it on a uv loop, the simulator on a virtual
 * network; one thread each, the owner of the endpoint.
 */
#pragma once

#include "server/core/core.h"

struct ae_node;

/* Memory of what may wait for one peer; a peer for which more does is dropped. */
#define AE_NODE_BACKLOG_MAX (64 * AE_MIB)

struct ae_node_options {
        uint32_t node, n_nodes;
        const char *const *peers;  /* addresses by node id; borrowed during the call */
        const char *transport;     /* borrowed for life; unused with one node */
        void *loop;                /* what the transport wants */
        uint64_t incarnation;
        uint64_t memory_len;
        uint32_t n_threads;        /* that run tasks */
        /* what the owner does for it */
        void (*wake)(void *user);  /* on the loop: events wait; ae_node_poll() before it sleeps */
        void (*task)(void *user, struct ae_task *task); /* run it, then ae_node_task_done() */
        int (*region_new)(void *user, const struct ae_region_spec *spec, struct ae_region **ret);
        void (*region_free)(void *user, struct ae_region *region);
        void (*worker_send)(void *user, struct ae_worker *worker, uint32_t type,
                            const ProtobufCMessage *message, const int *fds, size_t n_fds);
        void (*worker_wake)(void *user, struct ae_worker *worker);
        void (*log)(void *user, int level, const char *text);
        void *user;
};

int ae_node_new(const struct ae_node_options *options, struct ae_node **ret_node);
/* Sessions have ended, tasks are done. NULL is fine. Returns NULL. */
struct ae_node *ae_node_free(struct ae_node *node);

struct ae_core *ae_node_core(struct ae_node *node);
/* The address others reach it at, with its real port; "" with one node. */
const char *ae_node_address(const struct ae_node *node);

/* Works off the transport's events. Returns false when it may sleep until wake(). */
bool ae_node_poll(struct ae_node *node);
void ae_node_task_done(struct ae_node *node, struct ae_task *task);
/* About every 20 ms: reconnects, and the core's tick. */
void ae_node_tick(struct ae_node *node, uint64_t now_ns);

struct ae_node_peer_info {
        bool self, up;
        uint64_t incarnation;
        uint64_t sent_len;     /* bytes of puts that the transport took for it */
        uint64_t received_len; /* bytes of puts of its that arrived here */
        const char *address;   /* borrowed */
        const char *why;       /* borrowed; why it is not up, "" */
};
void ae_node_peer_info(const struct ae_node *node, uint32_t peer, struct ae_node_peer_info *ret);
void ae_node_net_stats(const struct ae_node *node, struct ae_net_stats *ret_stats);
/* Its endpoint, NULL with one node: for a simulator's partitions. */
struct ae_net *ae_node_net(struct ae_node *node);
