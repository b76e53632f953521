/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front door of an endpoint on sockets (tcp, shm): the listener, and guests, which are accepted
 * sockets that have not said hello. At most AE_NET_PENDING_MAX guests are let in at once, more wait
 * in the kernel's backlog; each has the handshake's deadline. Who is turned away is told why when
 * hellos differ, and the owner gets a REFUSED. Owner thread.
 */
#pragma once

#include "proto/net/events.h"
#include "proto/net/hello.h"
#include "proto/net/wait.h"

struct ae_door;

struct ae_guest {
        struct ae_source source;
        struct ae_deadline deadline;
        struct ae_door *door; /* borrowed */
        struct ae_list link;  /* in door->guests or door->gone */
        uint8_t hello[AE_HELLO_SIZE];
        uint32_t n_hello;
        char text[256];
};

struct ae_door {
        struct ae_wait *wait;       /* borrowed, as the rest of the endpoint's */
        struct ae_evq *events;
        struct ae_net_stats *stats;
        struct ae_net_hello self;
        struct ae_source listener;
        struct ae_list guests;
        struct ae_list gone; /* freed when their REFUSED is handed out */
        uint32_t n_guests;
        bool starved; /* without a descriptor or memory for the next one: every poll looks again */
        uint8_t kind_a, kind_b; /* of hello that guests may say; kind_a is the answer's */
        /* Sets up and checks a fresh socket. */
        int (*admit)(int fd);
        /* The hello fits ours. 0: the socket was taken by ae_wait_move(); negative: refuse. */
        int (*greet)(struct ae_door *door, struct ae_guest *guest, const struct ae_hello *hello);
};

void ae_door_init(struct ae_door *door);
/* Takes over @fd, a listening socket. */
int ae_door_open(struct ae_door *door, int fd);
void ae_door_close(struct ae_door *door);
/* Descriptors or places are free again. */
void ae_door_retry(struct ae_door *door);
/* The queue of events is empty: those who are gone may be freed. */
void ae_door_reap(struct ae_door *door);
