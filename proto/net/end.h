/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of an endpoint that is alike in every transport on descriptors: options, wait set, queue
 * of events, door, mapped ranges, its connections, and those that are dead until their last event
 * has been handed out. A transport embeds struct ae_end as the first member of its endpoint, fills
 * an ae_end_ops, and puts the functions below into its row of the registry. Owner thread.
 */
#pragma once

#include "proto/net/door.h"
#include "proto/net/priv.h"

struct ae_conn;
struct ae_end;

/* What a transport does for the common life of its endpoints and connections (conn.h). */
struct ae_end_ops {
        const struct ae_net_ops *net; /* borrowed: static */
        /* Hellos that guests may say, and the first one's kind is that of the answer. */
        uint8_t hello_a, hello_b;
        int (*admit)(int fd); /* see struct ae_door, also greet */
        int (*greet)(struct ae_door *door, struct ae_guest *guest, const struct ae_hello *hello);
        /* All I/O of one poll: at least ae_wait_round(). The queue of events is empty. */
        void (*round)(struct ae_end *end);
        /* Lets go of descriptors and mappings, and ends every put that is unfinished. Once. */
        void (*shut)(struct ae_conn *conn);
        /* Grant @tag is revoked: what arrives for it now is dropped and counted as late. */
        void (*revoked)(struct ae_conn *conn, uint64_t tag);
        /* Frees a connection that was shut or never used, by way of ae_conn_deinit(). */
        void (*free)(struct ae_conn *conn);
};

struct ae_end {
        struct ae_net base;
        const struct ae_end_ops *ops; /* borrowed: static */
        struct ae_net_options options; /* with defaults filled in; listen is NULL */
        struct ae_wait wait;
        struct ae_evq events;
        struct ae_net_stats stats;
        struct ae_door door;
        struct ae_list conns;
        struct ae_list dead; /* connections, freed when their events are handed out */
        struct ae_list mems;
        char address[AE_NET_ADDR_MAX]; /* listened on; "" */
};

static inline struct ae_end *ae_end_of(const struct ae_net *net)
{
        return (struct ae_end *)(uintptr_t)ae_container_of(net, struct ae_end, base);
}

/* Fills a zeroed @end, whose door stays shut. On failure too, ae_end_deinit() comes later. */
int ae_end_init(struct ae_end *end, const struct ae_end_ops *ops,
                const struct ae_net_options *options);
/* Closes all connections without events, and frees all but what the transport added. */
void ae_end_deinit(struct ae_end *end);

/* Rows of struct ae_net_ops. */
int ae_end_address(struct ae_net *net, char ret_address[AE_NET_ADDR_MAX]);
int ae_end_map(struct ae_net *net, void *address, uint64_t len, int fd, uint64_t fd_off,
               struct ae_net_mem **ret_mem);
int ae_end_poll(struct ae_net *net, struct ae_net_event *events, int n_max);
int ae_end_arm(struct ae_net *net);
void ae_end_stats(const struct ae_net *net, struct ae_net_stats *ret_stats);
