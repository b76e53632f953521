/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connections of the simulated network: made lazily, one small object at each end, counted because
 * events under way still refer to them. What an end has been told decides its state; the other may
 * be told later.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/status.h"
#include "proto/net/hello.h"
#include "proto/net/sim-priv.h"

#define EVENTS_PER_CONN 3 /* UP, DOWN and one WRITABLE */
#define BIT(state) (1u << (state))

static const uint32_t legal_moves[] = {
        [SIM_CONNECTING] = BIT(SIM_UP) | BIT(SIM_DOWN_STATE) | BIT(SIM_CLOSED),
        [SIM_UP] = BIT(SIM_DOWN_STATE) | BIT(SIM_CLOSED),
        [SIM_DOWN_STATE] = BIT(SIM_CLOSED),
        [SIM_CLOSED] = 0,
};

static void sim_move(struct sim_conn *conn, enum sim_state to)
{
        assert(legal_moves[conn->state] & BIT(to));
        conn->state = (uint8_t)to;
}

void ae_sim_conn_ref(struct sim_conn *conn)
{
        conn->n_refs++;
}

void ae_sim_conn_unref(struct sim_conn *conn)
{
        assert(conn->n_refs > 0);
        if (--conn->n_refs == 0 && conn->reaped)
                free(conn);
}

static struct sim_conn *conn_new(struct sim_net *net, uint32_t node)
{
        struct sim_conn *conn = ae_sim_alloc(sizeof(*conn));

        if (ae_evq_reserve(&net->events, EVENTS_PER_CONN) < 0)
                abort(); /* as everywhere inside the simulation */
        conn->base.net = &net->base;
        conn->base.node = node;
        conn->index = net->index;
        ae_list_init(&conn->puts);
        ae_list_push(&net->conns, &conn->link);
        return conn;
}

/* Lets go of what a connection holds at its end, once. */
static void shut(struct sim_conn *conn)
{
        ae_sim_fail_puts(conn);
        if (!conn->grants)
                return;
        ae_net_grants_drop_all(conn->grants);
}

void ae_sim_reap(struct sim_net *net)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(&net->dead))) {
                struct sim_conn *conn = ae_list_entry(entry, struct sim_conn, link);

                ae_evq_release(&net->events, EVENTS_PER_CONN);
                if (conn->grants)
                        ae_net_grants_deinit(conn->grants);
                free(conn->grants);
                conn->grants = NULL;
                conn->reaped = true;
                if (conn->peer)
                        ae_sim_conn_unref(conn->peer);
                conn->peer = NULL;
                if (conn->n_refs == 0)
                        free(conn);
        }
}

void ae_sim_conn_close(struct ae_net_conn *base)
{
        struct sim_conn *conn = sim_conn_of(base);
        struct sim_net *net = sim_conn_net(conn);
        struct ae_sim *sim = net->sim;
        uint8_t was = conn->state;

        assert(was != SIM_CLOSED);
        ae_evq_drop_conn(&net->events, base);
        if (was != SIM_DOWN_STATE)
                shut(conn);
        sim_move(conn, SIM_CLOSED);
        /* What it has said goes ahead of its end; of a killed one peers have been told. */
        if (was != SIM_DOWN_STATE && conn->peer && !net->killed)
                ae_sim_tell_down(sim, conn->peer, conn, AE_ELOST, "the peer closed it",
                                 AE_MAX(conn->last_msg_at, sim->now + ae_sim_latency(sim, 0)));
        ae_list_unlink(&conn->link);
        ae_list_push(&net->dead, &conn->link);
}

/* --- down --- */

void ae_sim_tell_down(struct ae_sim *sim, struct sim_conn *conn, struct sim_conn *from, int status,
                      const char *text, uint64_t when)
{
        struct sim_event *event;

        if (conn->state >= SIM_DOWN_STATE)
                return;
        event = ae_sim_event_new(sim, SIM_DOWN, from, conn);
        event->u.down.status = status;
        event->u.down.text = strdup(text);
        if (!event->u.down.text)
                abort(); /* as everywhere inside the simulation */
        ae_sim_schedule(sim, event, when);
}

void ae_sim_break(struct ae_sim *sim, struct sim_conn *conn, int status, const char *text,
                  const char *peer_text)
{
        conn->cut = true;
        ae_sim_tell_down(sim, conn, NULL, status, text, sim->now);
        if (!conn->peer)
                return;
        conn->peer->cut = true;
        ae_sim_tell_down(sim, conn->peer, NULL, AE_ELOST, peer_text,
                         sim->now + ae_sim_latency(sim, 0));
}

void ae_sim_on_down(struct ae_sim *sim, struct sim_event *event)
{
        struct sim_conn *conn = event->to;
        struct ae_net_event down = { .kind = AE_NET_EV_DOWN, .status = event->u.down.status,
                                     .conn = &conn->base };
        bool was_up = conn->state == SIM_UP;
        struct sim_net *net;

        (void)sim;
        if (conn->state >= SIM_DOWN_STATE)
                return;
        net = sim_conn_net(conn);
        if (net->killed)
                return;
        sim_move(conn, SIM_DOWN_STATE);
        shut(conn);
        down.text = ae_sim_text(net, "connection with node %u %s: %s", conn->base.node,
                                was_up ? "broke" : "failed", event->u.down.text);
        ae_sim_push(net, &down, 0);
}

void ae_sim_on_timeout(struct ae_sim *sim, struct sim_event *event)
{
        if (event->to->state == SIM_CONNECTING)
                ae_sim_tell_down(sim, event->to, NULL, AE_ETIMEDOUT,
                                 "the handshake was not done within its deadline", sim->now);
}

/* --- up --- */

int ae_sim_connect(struct ae_net *base, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn)
{
        struct sim_net *net = sim_net_of(base);
        struct sim_conn *conn;
        struct sim_event *event;
        uint64_t number;
        int r;

        r = ae_sim_parse_address(address, &number);
        if (r < 0)
                return r;
        conn = conn_new(net, node);
        *ret_conn = &conn->base;
        if (net->killed)
                return 0;
        event = ae_sim_event_new(net->sim, SIM_SYN, conn, NULL);
        event->u.address = number;
        ae_sim_schedule(net->sim, event, net->sim->now + ae_sim_latency(net->sim, 0));
        return 0;
}

/* Both ends compare, as both do on a real wire. 0: they fit. */
static int introduce(struct ae_sim *sim, struct sim_conn *conn, struct sim_net *acceptor)
{
        const struct ae_net_hello *asks = &sim_conn_net(conn)->options.self;
        const struct ae_net_hello *answers = &acceptor->options.self;
        struct ae_net_event refused = { .kind = AE_NET_EV_REFUSED, .hello = *asks };
        int r;

        r = ae_hello_compare(answers, asks);
        if (r == 0)
                r = ae_hello_expect(conn->base.node, answers);
        if (r == 0)
                return 0;
        refused.status = r;
        refused.text = ae_sim_text(acceptor, "refused an incoming connection: %s", ae_error_text());
        if (ae_evq_reserve(&acceptor->events, 1) < 0)
                abort(); /* as everywhere inside the simulation */
        acceptor->stats.refused++;
        ae_sim_push(acceptor, &refused, 0);
        if (ae_hello_compare(asks, answers) == 0)
                (void)ae_hello_expect(conn->base.node, answers); /* for its text */
        ae_sim_tell_down(sim, conn, NULL, r, ae_error_text(), sim->now + ae_sim_latency(sim, 0));
        return r;
}

void ae_sim_on_syn(struct ae_sim *sim, struct sim_event *event)
{
        struct sim_conn *conn = event->from, *accepted;
        struct sim_net *acceptor = NULL;
        struct sim_event *ack;

        if (conn->state != SIM_CONNECTING || sim_conn_net(conn)->killed)
                return;
        if (event->u.address < sim->n_addresses)
                acceptor = sim->addresses[event->u.address];
        if (!acceptor) {
                ae_sim_tell_down(sim, conn, NULL, AE_ELOST, "connection refused",
                                 sim->now + ae_sim_latency(sim, 0));
                return;
        }
        if (!ae_sim_reachable(sim, conn->index, acceptor->index)) {
                uint64_t limit = sim_conn_net(conn)->options.handshake_ns;

                ae_sim_schedule(sim, ae_sim_event_new(sim, SIM_TIMEOUT, NULL, conn),
                                sim->now + (limit ? limit : AE_NET_HANDSHAKE_NS));
                return;
        }
        if (introduce(sim, conn, acceptor) < 0)
                return;
        accepted = conn_new(acceptor, sim_conn_net(conn)->options.self.node);
        sim_move(accepted, SIM_UP);
        accepted->peer = conn;
        conn->peer = accepted;
        ae_sim_conn_ref(conn);
        ae_sim_conn_ref(accepted);
        ae_sim_push(acceptor,
                    &(struct ae_net_event){ .kind = AE_NET_EV_UP, .conn = &accepted->base,
                                            .hello = sim_conn_net(conn)->options.self }, 0);
        ack = ae_sim_event_new(sim, SIM_ACK, accepted, conn);
        accepted->last_msg_at = sim->now + ae_sim_latency(sim, 0);
        ae_sim_schedule(sim, ack, accepted->last_msg_at);
}

void ae_sim_on_ack(struct ae_sim *sim, struct sim_event *event)
{
        struct sim_conn *conn = event->to;

        (void)sim;
        /* An acceptor that is gone by now has sent a DOWN after this. */
        if (conn->state != SIM_CONNECTING || event->from->reaped || event->from->cut)
                return;
        sim_move(conn, SIM_UP);
        ae_sim_push(sim_conn_net(conn),
                    &(struct ae_net_event){ .kind = AE_NET_EV_UP, .conn = &conn->base,
                                            .hello = sim_conn_net(event->from)->options.self }, 0);
}
