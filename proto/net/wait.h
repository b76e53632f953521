/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a transport on descriptors waits: one edge-triggered epoll set per endpoint, seen by the
 * owner's libuv loop as a single descriptor, and a list of sources that still have something to do.
 * All I/O happens in ae_wait_round(), which ae_net_poll() calls; the loop only wakes the owner. One
 * timer serves the deadlines of handshakes. Owner thread.
 */
#pragma once

#include <uv.h>

#include "proto/base/list.h"
#include "proto/net/net.h"

/* A descriptor in the set. Embedded; @run is called with what became ready since its last run. */
struct ae_source {
        int fd;              /* owned; -1: not in a set */
        uint32_t ready;      /* EPOLL* bits, for @run to read and clear; EPOLLIN with a hangup */
        struct ae_list link; /* in the set's ready list */
        void (*run)(struct ae_source *source);
};

struct ae_deadline {
        struct ae_list link;
        uint64_t due_ns;
        void (*fire)(struct ae_deadline *deadline);
};

struct ae_wait {
        int epfd;
        struct ae_source timer;
        struct ae_list ready;     /* sources to run in the next round */
        struct ae_list deadlines; /* all of one length, so the first is due first */
        uint64_t deadline_ns;     /* that length */
        uv_poll_t *poll;          /* owned by the loop after close; NULL without a loop */
        bool armed;
        void (*wake)(void *user);
        void *user;
};

int ae_wait_open(struct ae_wait *wait, const struct ae_net_options *options);
/* Every source has been removed. The loop must run once more to free its handle. */
void ae_wait_close(struct ae_wait *wait);

static inline void ae_source_init(struct ae_source *source, void (*run)(struct ae_source *))
{
        *source = (struct ae_source){ .fd = -1, .run = run };
        ae_list_init(&source->link);
}

/* Takes over @fd, also on failure. */
int ae_wait_add(struct ae_wait *wait, struct ae_source *source, int fd);
/* Takes the source out of the set and closes its descriptor; harmless twice. */
void ae_wait_remove(struct ae_wait *wait, struct ae_source *source);
/* Hands the descriptor of @from to @to, which starts as ready for everything. */
void ae_wait_move(struct ae_wait *wait, struct ae_source *from, struct ae_source *to);
/* Runs @source again in the next round. */
void ae_wait_again(struct ae_wait *wait, struct ae_source *source);

void ae_wait_deadline(struct ae_wait *wait, struct ae_deadline *deadline);

/* Asks the kernel once, without waiting, and runs every ready source once. */
void ae_wait_round(struct ae_wait *wait);
/* 1 when a source is ready; otherwise 0, and wake() comes with the next one. */
int ae_wait_arm(struct ae_wait *wait);
