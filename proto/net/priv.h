/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the transports share behind net.h: mapped ranges, the table of grants of one connection, and
 * the rows of the registry. Everything here belongs to the endpoint's owner thread.
 */
#pragma once

#include "proto/base/list.h"
#include "proto/net/net.h"

#define AE_NET_STREAMS_DEFAULT 2
#define AE_NET_STREAMS_MAX 8
#define AE_NET_IN_FLIGHT_DEFAULT ((uint64_t)256 << 20)
#define AE_NET_HANDSHAKE_NS ((uint64_t)5 * 1000000000)
#define AE_NET_PENDING_MAX 64   /* incoming connections that have not said hello yet */
#define AE_NET_GRANTS_MAX 65536 /* live grants of one connection */

extern const struct ae_net_ops ae_net_tcp;
extern const struct ae_net_ops ae_net_shm;
extern const struct ae_net_ops ae_net_sim;

struct ae_net_mem {
        struct ae_net *net;  /* borrowed */
        struct ae_list link; /* in the endpoint's list of ranges */
        char *base;          /* borrowed from the caller */
        uint64_t len;
        int fd; /* borrowed from the caller; -1: private memory */
        uint64_t fd_off;
        int share_fd; /* shm: read-only, passed to peers; owned; -1: none */
        uint32_t id;  /* shm: names the range to peers; never used twice in one endpoint */
        uint32_t n_grants; /* alive */
        uint32_t n_puts;   /* unfinished puts out of this range */
};

/* Fills and links a range; @return AE_ENOMEM. */
int ae_net_mem_new(struct ae_net *net, struct ae_list *mems, void *address, uint64_t len, int fd,
                   uint64_t fd_off, struct ae_net_mem **ret_mem);
void ae_net_mem_free(struct ae_net_mem *mem);
void ae_net_mem_free_all(struct ae_list *mems);

struct ae_net_grant {
        struct ae_net_mem *mem; /* borrowed; NULL while the slot is free */
        uint64_t off;           /* from the start of mem */
        uint64_t len;
        uint32_t generation; /* of the present or last grant in this slot, from 1 */
        uint32_t next_free;
};

/* Keys are {connection, slot, generation}: one that was revoked stays recognizable for ever. */
struct ae_net_grants {
        struct ae_net_grant *slots; /* owned */
        uint64_t conn_id;           /* random, in every key: another connection's don't fit */
        uint32_t n_slots;
        uint32_t free_head;
        uint32_t n_live;
};

enum ae_net_lookup {
        AE_NET_KEY_NEVER, /* was never granted on this connection */
        AE_NET_KEY_REVOKED,
        AE_NET_KEY_LIVE,
};

void ae_net_grants_init(struct ae_net_grants *grants, uint64_t conn_id);
/* Drops every grant, so that their ranges may be unmapped; keys of them read as revoked. */
void ae_net_grants_drop_all(struct ae_net_grants *grants);
void ae_net_grants_deinit(struct ae_net_grants *grants);
/* @return: 0; AE_ENOMEM; AE_EOVERFLOW beyond AE_NET_GRANTS_MAX. */
int ae_net_grants_add(struct ae_net_grants *grants, struct ae_net_mem *mem, uint64_t off,
                      uint64_t len, struct ae_net_key *ret_key);
/* @ret_grant is set for a live key; @ret_tag, unless never granted, names the grant in events. */
enum ae_net_lookup ae_net_grants_find(const struct ae_net_grants *grants,
                                      const struct ae_net_key *key,
                                      struct ae_net_grant **ret_grant, uint64_t *ret_tag);
/* @grant is live. */
void ae_net_grants_drop(struct ae_net_grants *grants, struct ae_net_grant *grant);

/* A random 64-bit value of the kernel, never 0; AE_ESYS when there is none. */
int ae_net_random(uint64_t *ret_value);
