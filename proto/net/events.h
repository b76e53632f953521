/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The queue of events that an endpoint has not handed out yet. Two classes: events that must come
 * (PUT_DONE, UP, DOWN, WRITABLE, REFUSED), for which room is reserved when the work that ends in
 * them is accepted, and events that the transport may hold back (MSG, NOTIFY), which are only
 * pushed while ae_evq_room() says so. Hence a push never allocates and never fails. Owner thread.
 */
#pragma once

#include "proto/net/net.h"

#define AE_EVQ_SOFT_MAX 1024 /* MSG and NOTIFY waiting at once */

struct ae_evq_item {
        struct ae_net_event event;
        uint64_t tag; /* NOTIFY: names the grant, see ae_net_grants_find() */
};

struct ae_evq {
        struct ae_evq_item *items; /* owned; a ring */
        uint32_t cap;              /* a power of two */
        uint32_t head, count;
        uint32_t n_soft;     /* MSG and NOTIFY in the ring */
        uint32_t n_reserved; /* room for events that must come, queued or still to come */
};

int ae_evq_init(struct ae_evq *queue);
void ae_evq_deinit(struct ae_evq *queue);
/* Room for @n events that must come, until released. PUT_DONE releases its own when popped. */
int ae_evq_reserve(struct ae_evq *queue, uint32_t n);
void ae_evq_release(struct ae_evq *queue, uint32_t n);

static inline bool ae_evq_empty(const struct ae_evq *queue)
{
        return queue->count == 0;
}

/* Whether one more MSG or NOTIFY may be pushed. */
static inline bool ae_evq_room(const struct ae_evq *queue)
{
        return queue->n_soft < AE_EVQ_SOFT_MAX;
}

void ae_evq_push(struct ae_evq *queue, const struct ae_net_event *event, uint64_t tag);
int ae_evq_pop(struct ae_evq *queue, struct ae_net_event *events, int n_max);
/* Takes out all of @conn but its PUT_DONEs. */
void ae_evq_drop_conn(struct ae_evq *queue, const struct ae_net_conn *conn);
/* Takes out the NOTIFYs of one grant and counts them as late in @stats. */
void ae_evq_drop_grant(struct ae_evq *queue, const struct ae_net_conn *conn, uint64_t tag,
                       struct ae_net_stats *stats);
