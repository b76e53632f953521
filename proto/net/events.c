/* SPDX-License-Identifier: Apache-2.0 */
/* A ring of events with reserved room; see events.h. */
#include "proto/net/events.h"

#include <assert.h>
#include <stdlib.h>

#include "proto/base/status.h"

int ae_evq_init(struct ae_evq *queue)
{
        *queue = (struct ae_evq){ .cap = 2 * AE_EVQ_SOFT_MAX };
        queue->items = calloc(queue->cap, sizeof(*queue->items));
        if (!queue->items)
                return ae_fail(AE_ENOMEM, "cannot open an endpoint: no memory for its events");
        return 0;
}

void ae_evq_deinit(struct ae_evq *queue)
{
        free(queue->items);
        queue->items = NULL;
}

static struct ae_evq_item *at(struct ae_evq *queue, uint32_t i)
{
        return &queue->items[(queue->head + i) & (queue->cap - 1)];
}

int ae_evq_reserve(struct ae_evq *queue, uint32_t n)
{
        uint64_t need = (uint64_t)queue->n_reserved + n + AE_EVQ_SOFT_MAX;
        uint32_t cap = queue->cap;
        struct ae_evq_item *items;

        while (cap < need)
                cap *= 2;
        if (cap != queue->cap) {
                items = calloc(cap, sizeof(*items));
                if (!items)
                        return ae_fail(AE_ENOMEM, "no memory for %u events of one endpoint", cap);
                for (uint32_t i = 0; i < queue->count; i++)
                        items[i] = *at(queue, i);
                free(queue->items);
                queue->items = items;
                queue->cap = cap;
                queue->head = 0;
        }
        queue->n_reserved += n;
        return 0;
}

void ae_evq_release(struct ae_evq *queue, uint32_t n)
{
        assert(queue->n_reserved >= n);
        queue->n_reserved -= n;
}

static bool soft(const struct ae_net_event *event)
{
        return event->kind == AE_NET_EV_MSG || event->kind == AE_NET_EV_NOTIFY;
}

void ae_evq_push(struct ae_evq *queue, const struct ae_net_event *event, uint64_t tag)
{
        assert(queue->count < queue->cap);
        if (soft(event)) {
                assert(ae_evq_room(queue));
                queue->n_soft++;
        }
        *at(queue, queue->count) = (struct ae_evq_item){ *event, tag };
        queue->count++;
}

int ae_evq_pop(struct ae_evq *queue, struct ae_net_event *events, int n_max)
{
        int n = 0;

        for (; n < n_max && queue->count; n++) {
                events[n] = at(queue, 0)->event;
                queue->head = (queue->head + 1) & (queue->cap - 1);
                queue->count--;
                if (soft(&events[n]))
                        queue->n_soft--;
                else if (events[n].kind == AE_NET_EV_PUT_DONE)
                        ae_evq_release(queue, 1);
        }
        if (!queue->count)
                queue->head = 0; /* stay in the part of the ring that is cached */
        return n;
}

/* Takes out one item at a time of what the caller rejected; order is kept. */
static void keep(struct ae_evq *queue, uint32_t *n_kept, uint32_t i)
{
        if (*n_kept != i)
                *at(queue, *n_kept) = *at(queue, i);
        (*n_kept)++;
}

void ae_evq_drop_conn(struct ae_evq *queue, const struct ae_net_conn *conn)
{
        uint32_t n_kept = 0;

        for (uint32_t i = 0; i < queue->count; i++) {
                const struct ae_net_event *event = &at(queue, i)->event;

                if (event->conn != conn || event->kind == AE_NET_EV_PUT_DONE)
                        keep(queue, &n_kept, i);
                else if (soft(event))
                        queue->n_soft--;
        }
        queue->count = n_kept;
}

void ae_evq_drop_grant(struct ae_evq *queue, const struct ae_net_conn *conn, uint64_t tag,
                       struct ae_net_stats *stats)
{
        uint32_t n_kept = 0;

        for (uint32_t i = 0; i < queue->count; i++) {
                const struct ae_evq_item *item = at(queue, i);

                if (item->event.kind != AE_NET_EV_NOTIFY || item->event.conn != conn ||
                    item->tag != tag) {
                        keep(queue, &n_kept, i);
                        continue;
                }
                queue->n_soft--;
                stats->late_puts++;
                stats->puts_received--;
        }
        queue->count = n_kept;
}
