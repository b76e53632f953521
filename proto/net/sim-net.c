/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The endpoints of the simulated network and the sim row of the registry. An endpoint's address is
 * a number; its events come in virtual time only, so that a wake() is itself an event.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/status.h"
#include "proto/net/sim-priv.h"

int ae_sim_parse_address(const char *text, uint64_t *ret_address)
{
        char *end;
        unsigned long long value = strtoull(text, &end, 10);

        if (text[0] < '0' || text[0] > '9' || *end || value >= SIM_ADDRESS_MAX)
                return ae_fail(AE_EINVAL, "%s is not a simulated address, a number below %llu",
                               text, (unsigned long long)SIM_ADDRESS_MAX);
        *ret_address = value;
        return 0;
}

void ae_sim_push(struct sim_net *net, const struct ae_net_event *event, uint64_t tag)
{
        struct sim_event *wake;

        if (net->killed)
                return;
        ae_evq_push(&net->events, event, tag);
        if (!net->armed)
                return;
        net->armed = false;
        wake = ae_sim_event_new(net->sim, SIM_WAKE, NULL, NULL);
        wake->u.net.net = net->index;
        ae_sim_schedule(net->sim, wake, net->sim->now);
}

const char *ae_sim_text(struct sim_net *net, const char *format, ...)
{
        struct sim_text *text = ae_sim_alloc(sizeof(*text) + 320);
        va_list args;

        va_start(args, format);
        vsnprintf(text->text, 320, format, args);
        va_end(args);
        text->next = net->texts;
        net->texts = text;
        return text->text;
}

static int listen_on(struct sim_net *net, const char *listen)
{
        struct ae_sim *sim = net->sim;
        uint64_t address = 0;
        int r;

        r = ae_sim_parse_address(listen, &address);
        if (r < 0)
                return r;
        while (sim->n_addresses <= address) {
                sim->addresses = ae_sim_grow(sim->addresses, sim->n_addresses,
                                             sizeof(struct sim_net *));
                sim->addresses[sim->n_addresses++] = NULL;
        }
        if (sim->addresses[address])
                return ae_fail(AE_EEXIST, "cannot listen on %s: the address is in use", listen);
        sim->addresses[address] = net;
        net->address = address;
        return 0;
}

/* What the queue no longer refers to. */
static void free_handed(struct sim_net *net)
{
        while (net->delivered) {
                struct sim_buf *buf = net->delivered;

                net->delivered = buf->next;
                ae_sim_buf_free(net->sim, buf);
        }
        while (net->texts) {
                struct sim_text *text = net->texts;

                net->texts = text->next;
                free(text);
        }
}

static void retry_waiting(struct sim_net *net)
{
        struct sim_event *first = net->waiting;

        net->waiting = NULL;
        net->waiting_end = &net->waiting;
        ae_sim_schedule_list(net->sim, first);
}

static void sim_close(struct ae_net *base)
{
        struct sim_net *net = sim_net_of(base);

        while (!ae_list_empty(&net->conns))
                ae_sim_conn_close(&ae_list_entry(net->conns.next, struct sim_conn, link)->base);
        ae_sim_reap(net);
        retry_waiting(net); /* they find their connections closed */
        free_handed(net);
        ae_net_mem_free_all(&net->mems);
        ae_evq_deinit(&net->events);
        if (net->address != UINT64_MAX && !net->killed)
                net->sim->addresses[net->address] = NULL;
        net->sim->nets[net->index] = NULL;
        free(net);
}

static int sim_open(const struct ae_net_options *options, struct ae_net **ret_net)
{
        struct ae_sim *sim = options->loop;
        struct sim_net *net;
        int r;

        if (!sim)
                return ae_fail(AE_EINVAL, "a sim endpoint needs its network as loop");
        net = ae_sim_alloc(sizeof(*net));
        net->base.ops = &ae_net_sim;
        net->sim = sim;
        net->options = *options;
        net->options.listen = NULL; /* borrowed for this call only */
        if (!net->options.max_in_flight)
                net->options.max_in_flight = AE_NET_IN_FLIGHT_DEFAULT;
        net->address = UINT64_MAX;
        net->waiting_end = &net->waiting;
        ae_list_init(&net->conns);
        ae_list_init(&net->dead);
        ae_list_init(&net->mems);
        sim->nets = ae_sim_grow(sim->nets, sim->n_nets, sizeof(*sim->nets));
        sim->places = ae_sim_grow(sim->places, sim->n_nets, sizeof(*sim->places));
        net->index = sim->n_nets++;
        sim->nets[net->index] = net;
        sim->places[net->index] = (struct sim_place){ 0 };
        r = ae_evq_init(&net->events);
        if (r == 0 && options->listen)
                r = listen_on(net, options->listen);
        if (r < 0)
                sim_close(&net->base);
        else
                *ret_net = &net->base;
        return r;
}

static int sim_address(struct ae_net *base, char ret_address[AE_NET_ADDR_MAX])
{
        struct sim_net *net = sim_net_of(base);

        if (net->address == UINT64_MAX)
                return ae_fail(AE_ESTATE, "the sim endpoint of node %u is not listening",
                               net->options.self.node);
        snprintf(ret_address, AE_NET_ADDR_MAX, "%llu", (unsigned long long)net->address);
        return 0;
}

static int sim_map(struct ae_net *base, void *address, uint64_t len, int fd, uint64_t fd_off,
                   struct ae_net_mem **ret_mem)
{
        return ae_net_mem_new(base, &sim_net_of(base)->mems, address, len, fd, fd_off, ret_mem);
}

static int sim_poll(struct ae_net *base, struct ae_net_event *events, int n_max)
{
        struct sim_net *net = sim_net_of(base);
        int n;

        if (net->killed)
                return 0;
        net->armed = false;
        if (ae_evq_empty(&net->events)) {
                free_handed(net);
                ae_sim_reap(net);
                retry_waiting(net);
        }
        n = ae_evq_pop(&net->events, events, n_max);
        for (int i = 0; i < n; i++) {
                if (events[i].kind == AE_NET_EV_WRITABLE)
                        sim_conn_of(events[i].conn)->writable_queued = false;
                if (events[i].kind == AE_NET_EV_REFUSED)
                        ae_evq_release(&net->events, 1);
        }
        return n;
}

static int sim_arm(struct ae_net *base)
{
        struct sim_net *net = sim_net_of(base);

        if (net->killed)
                return 0;
        if (!net->options.wake || !ae_evq_empty(&net->events))
                return 1;
        net->armed = true;
        retry_waiting(net);
        return 0;
}

static void sim_stats(const struct ae_net *base, struct ae_net_stats *ret_stats)
{
        *ret_stats = ae_container_of(base, const struct sim_net, base)->stats;
}

const struct ae_net_ops ae_net_sim = {
        .name = "sim",
        .open = sim_open,
        .close = sim_close,
        .address = sim_address,
        .connect = ae_sim_connect,
        .conn_close = ae_sim_conn_close,
        .map = sim_map,
        .unmap = ae_net_mem_free,
        .grant = ae_sim_grant,
        .revoke = ae_sim_revoke,
        .msg = ae_sim_msg,
        .put = ae_sim_put,
        .poll = sim_poll,
        .arm = sim_arm,
        .stats = sim_stats,
};
