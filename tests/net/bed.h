/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The test bed of the conformance suite: endpoints of one transport in one thread, turned by hand
 * until something has happened. A turn polls every endpoint, counts its events and keeps a record
 * of each. With sim a turn also lets virtual time run.
 */
#pragma once

#include "tests/lib/count.h"
#include "tests/lib/test.h"

#include <stdbool.h>
#include <string.h>

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/net.h"
#include "proto/net/sim.h"

#define BED_PEERS 20
#define BED_KINDS 7
#define BED_VERSION 7
#define BED_CLUSTER UINT64_C(0x1122334455667788)

struct record {
        struct ae_net_event event;
        void *data;     /* copy of a msg; owned */
        char text[320]; /* copy of a cause */
};

struct peer {
        struct bed *bed;
        struct ae_net *net;
        uint32_t node;
        char address[AE_NET_ADDR_MAX];
        uint32_t n[BED_KINDS]; /* events by kind */
        struct record *records; /* owned; unless muted */
        size_t n_records;
        bool muted; /* only count */
        bool still; /* not polled by a turn */
        /* Sees every event as it is handed out; may be NULL. */
        void (*on_event)(struct peer *peer, const struct ae_net_event *event);
        void *user;
};

struct bed {
        const char *transport;
        struct ae_sim *sim;
        char dir[64];
        uint32_t n_peers;
        struct peer peers[BED_PEERS];
        int n_steps;     /* events of sim in one turn */
        uint64_t end_ns; /* of bed_spent_ns(), when a test that still turns has failed */
};

/* Memory that puts come from or go to: a sealed memfd, or private. */
struct area {
        char *base;
        uint64_t len;
        int fd;
};

extern const char *bed_transport;

static inline bool bed_is(const char *transport)
{
        return strcmp(bed_transport, transport) == 0;
}

int bed_setup(void **state);
int bed_teardown(void **state);

/* An address nobody uses yet; @address has AE_NET_ADDR_MAX bytes. */
void bed_address(struct bed *bed, char *address);
/* Opens an endpoint that listens, with hello { BED_VERSION, node, node + 100, BED_CLUSTER }. */
struct peer *bed_open(struct bed *bed, uint32_t node);
/* The same with more options; loop, listen and an unset hello are filled in. */
struct peer *bed_open_with(struct bed *bed, uint32_t node, struct ae_net_options *options);
void bed_close(struct peer *peer);

/*
 * Processor time of this process. A test that turns by hand never sleeps, so this tells a test that
 * waits in vain from one that a busy machine keeps waiting.
 */
uint64_t bed_spent_ns(void);

/* Polls everyone once. */
void bed_turn(struct bed *bed);
/* Turns until @peer has had @n events of @kind; fails the test after a while. */
void bed_wait(struct peer *peer, enum ae_net_event_kind kind, uint32_t n);
/* Turns a while: what ought not to come would have come by then. */
void bed_settle(struct bed *bed);

/* The @i-th record of @kind. */
struct record *bed_record(struct peer *peer, enum ae_net_event_kind kind, uint32_t i);
/* Connects @from to @to and waits until both are up. @ret_far: the acceptor's end, or NULL. */
struct ae_net_conn *bed_connect(struct peer *from, struct peer *to, struct ae_net_conn **ret_far);

struct area area_new(uint64_t len);
struct area area_private(uint64_t len);
void area_free(struct area *area);
struct ae_net_mem *area_map(struct peer *peer, const struct area *area);
/* Bytes that differ for every seed and place. */
void area_fill(const struct area *area, uint64_t off, uint64_t len, uint64_t seed);
bool area_has(const struct area *area, uint64_t off, uint64_t len, uint64_t seed, uint64_t skip);

struct ae_net_stats bed_stats(const struct peer *peer);
/* Puts, turning the bed while there is back-pressure. */
void bed_put(struct peer *peer, struct ae_net_conn *conn, const struct ae_net_key *key,
             uint64_t off, struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
             uint64_t cookie);
