/* SPDX-License-Identifier: Apache-2.0 */
/* The common life of endpoints; see end.h. */
#include "proto/net/end.h"

#include <string.h>

#include "proto/base/status.h"
#include "proto/net/conn.h"

int ae_end_init(struct ae_end *end, const struct ae_end_ops *ops,
                const struct ae_net_options *options)
{
        int r;

        end->base.ops = ops->net;
        end->ops = ops;
        end->options = *options;
        end->options.listen = NULL; /* borrowed for the call that opens */
        if (!end->options.max_in_flight)
                end->options.max_in_flight = AE_NET_IN_FLIGHT_DEFAULT;
        end->door = (struct ae_door){
                .wait = &end->wait,
                .events = &end->events,
                .stats = &end->stats,
                .self = options->self,
                .kind_a = ops->hello_a,
                .kind_b = ops->hello_b,
                .admit = ops->admit,
                .greet = ops->greet,
        };
        ae_door_init(&end->door);
        ae_list_init(&end->conns);
        ae_list_init(&end->dead);
        ae_list_init(&end->mems);
        r = ae_wait_open(&end->wait, options);
        if (r == 0)
                r = ae_evq_init(&end->events);
        return r;
}

/* Everything of those that are dead has been handed out. */
static void reap(struct ae_end *end)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(&end->dead)))
                end->ops->free(ae_list_entry(entry, struct ae_conn, link));
        ae_door_reap(&end->door);
}

void ae_end_deinit(struct ae_end *end)
{
        while (!ae_list_empty(&end->conns))
                ae_conn_close(&ae_list_entry(end->conns.next, struct ae_conn, link)->base);
        reap(end);
        ae_door_close(&end->door);
        ae_net_mem_free_all(&end->mems);
        ae_wait_close(&end->wait);
        ae_evq_deinit(&end->events);
}

int ae_end_address(struct ae_net *net, char ret_address[AE_NET_ADDR_MAX])
{
        const struct ae_end *end = ae_end_of(net);

        if (end->door.listener.fd < 0)
                return ae_fail(AE_ESTATE, "the %s endpoint of node %u is not listening",
                               net->ops->name, end->options.self.node);
        memcpy(ret_address, end->address, AE_NET_ADDR_MAX);
        return 0;
}

int ae_end_map(struct ae_net *net, void *address, uint64_t len, int fd, uint64_t fd_off,
               struct ae_net_mem **ret_mem)
{
        return ae_net_mem_new(net, &ae_end_of(net)->mems, address, len, fd, fd_off, ret_mem);
}

int ae_end_poll(struct ae_net *net, struct ae_net_event *events, int n_max)
{
        struct ae_end *end = ae_end_of(net);
        int n;

        if (ae_evq_empty(&end->events)) {
                reap(end);
                if (end->door.starved)
                        ae_door_retry(&end->door);
                end->ops->round(end);
        }
        n = ae_evq_pop(&end->events, events, n_max);
        for (int i = 0; i < n; i++)
                if (events[i].kind == AE_NET_EV_WRITABLE)
                        ae_conn_of(events[i].conn)->writable_queued = false;
        return n;
}

int ae_end_arm(struct ae_net *net)
{
        struct ae_end *end = ae_end_of(net);

        return ae_evq_empty(&end->events) ? ae_wait_arm(&end->wait) : 1;
}

void ae_end_stats(const struct ae_net *net, struct ae_net_stats *ret_stats)
{
        *ret_stats = ae_end_of(net)->stats;
}
