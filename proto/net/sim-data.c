/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What connections of the simulated network carry. A put is cut into pieces that land at times of
 * their own; a piece is copied when it lands, out of the source itself or, for puts whose PUT_DONE
 * comes early, out of a copy made when it was posted.
 */
#include <assert.h>
#include <string.h>

#include "proto/base/status.h"
#include "proto/net/sim-priv.h"

static const char lost_text[] = "the network lost a packet for good";

static int check_up(const struct sim_conn *conn)
{
        if (conn->state == SIM_UP && !sim_conn_net(conn)->killed)
                return 0;
        return ae_fail(AE_ELOST, "node %u is not connected", conn->base.node);
}

/* --- grants --- */

int ae_sim_grant(struct ae_net_conn *base, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                 struct ae_net_key *ret_key)
{
        struct sim_conn *conn = sim_conn_of(base);

        if (check_up(conn) < 0)
                return AE_ELOST;
        if (!conn->grants) {
                conn->grants = ae_sim_alloc(sizeof(*conn->grants));
                ae_net_grants_init(conn->grants, ++sim_conn_net(conn)->sim->next_conn_id);
        }
        return ae_net_grants_add(conn->grants, mem, off, len, ret_key);
}

static enum ae_net_lookup find(const struct sim_conn *conn, const struct ae_net_key *key,
                               struct ae_net_grant **ret_grant, uint64_t *ret_tag)
{
        if (!conn->grants)
                return AE_NET_KEY_NEVER;
        return ae_net_grants_find(conn->grants, key, ret_grant, ret_tag);
}

int ae_sim_revoke(struct ae_net_conn *base, const struct ae_net_key *key)
{
        struct sim_conn *conn = sim_conn_of(base);
        struct sim_net *net = sim_conn_net(conn);
        struct ae_net_grant *grant = NULL;
        uint64_t tag = 0;

        if (find(conn, key, &grant, &tag) == AE_NET_KEY_NEVER)
                return ae_fail(AE_ENOENT, "cannot revoke: node %u was never granted this key",
                               base->node);
        ae_evq_drop_grant(&net->events, base, tag, &net->stats);
        if (grant)
                ae_net_grants_drop(conn->grants, grant);
        return 0;
}

/* --- back-pressure --- */

static bool can_msg(const struct sim_conn *conn)
{
        return conn->n_msgs_out < SIM_MSGS_OUT && conn->msg_bytes_out < SIM_MSG_BYTES_OUT;
}

static bool can_put(const struct sim_conn *conn, uint64_t len)
{
        return conn->in_flight == 0 ||
               conn->in_flight + len <= sim_conn_net(conn)->options.max_in_flight;
}

static void tell_writable(struct sim_conn *conn)
{
        bool msg = conn->want_msg && can_msg(conn);
        bool put = conn->want_put && can_put(conn, conn->want_put_len);

        if ((!msg && !put) || conn->writable_queued || conn->state != SIM_UP)
                return;
        conn->want_msg &= !msg;
        conn->want_put &= !put;
        conn->writable_queued = true;
        ae_sim_push(sim_conn_net(conn),
                    &(struct ae_net_event){ .kind = AE_NET_EV_WRITABLE, .conn = &conn->base }, 0);
}

/* --- msgs --- */

int ae_sim_msg(struct ae_net_conn *base, const void *data, size_t len)
{
        struct sim_conn *conn = sim_conn_of(base);
        struct sim_net *net = sim_conn_net(conn);
        struct ae_sim *sim = net->sim;
        struct sim_event *event;
        uint64_t at;

        if (check_up(conn) < 0)
                return AE_ELOST;
        if (!can_msg(conn)) {
                conn->want_msg = true;
                return AE_EAGAIN;
        }
        net->stats.msgs_sent++;
        net->stats.msg_bytes_sent += len;
        if (ae_sim_chance(sim, sim->params.loss_ppm))
                ae_sim_break(sim, conn, AE_ELOST, lost_text, lost_text);
        if (conn->cut)
                return 0; /* DOWN is on its way */
        event = ae_sim_event_new(sim, SIM_MSG, conn, conn->peer);
        event->u.msg.buf = ae_sim_buf_new(sim, len);
        event->u.msg.len = (uint32_t)len;
        if (len)
                memcpy(event->u.msg.buf->data, data, len);
        conn->n_msgs_out++;
        conn->msg_bytes_out += (uint32_t)len;
        at = sim->now + ae_sim_latency(sim, len);
        conn->last_msg_at = AE_MAX(conn->last_msg_at, at);
        ae_sim_schedule(sim, event, conn->last_msg_at);
        return 0;
}

/* True: @event waits until the owner of @net has polled. */
static bool must_wait(struct sim_net *net, struct sim_event *event)
{
        if (!net->waiting && ae_evq_room(&net->events))
                return false;
        event->next = NULL;
        *net->waiting_end = event;
        net->waiting_end = &event->next;
        return true;
}

static bool can_arrive(const struct sim_conn *from, const struct sim_conn *to)
{
        return to->state == SIM_UP && !from->cut && !sim_conn_net(to)->killed;
}

bool ae_sim_on_msg(struct ae_sim *sim, struct sim_event *event)
{
        struct sim_conn *from = event->from, *to = event->to;
        struct sim_net *net;

        (void)sim;
        if (can_arrive(from, to)) {
                net = sim_conn_net(to);
                if (must_wait(net, event))
                        return true;
                net->stats.msgs_received++;
                net->stats.msg_bytes_received += event->u.msg.len;
                event->u.msg.buf->next = net->delivered;
                net->delivered = event->u.msg.buf;
                ae_sim_push(net,
                            &(struct ae_net_event){ .kind = AE_NET_EV_MSG, .conn = &to->base,
                                                    .data = event->u.msg.buf->data,
                                                    .len = event->u.msg.len }, 0);
                event->u.msg.buf = NULL;
        }
        from->n_msgs_out--;
        from->msg_bytes_out -= event->u.msg.len;
        if (from->state == SIM_UP)
                tell_writable(from);
        return false;
}

/* --- puts --- */

static void schedule_put(struct ae_sim *sim, enum sim_kind kind, struct sim_put *put,
                         uint32_t piece, uint64_t when)
{
        bool lands = kind == SIM_PIECE;
        struct sim_event *event = ae_sim_event_new(sim, kind, lands ? put->from : NULL,
                                                   lands ? put->to : NULL);

        event->u.put.put = put;
        event->u.put.piece = piece;
        put->n_refs++;
        ae_sim_schedule(sim, event, when);
}

/* Cuts anywhere, so that elements and cache lines tear too. */
static void cut_put(struct ae_sim *sim, struct sim_put *put)
{
        uint32_t n = 1 + (uint32_t)(ae_sim_random(sim) % sim->params.pieces_max);

        put->n_left = put->len < n ? 1 : n;
        for (uint32_t i = 1; i < put->n_left; i++) {
                uint64_t at = ae_sim_random(sim) % put->len;
                uint32_t j = i;

                for (; j > 1 && put->cut[j - 1] > at; j--)
                        put->cut[j] = put->cut[j - 1];
                put->cut[j] = at;
        }
        put->cut[put->n_left] = put->len;
}

static void finish(struct sim_conn *conn, struct sim_put *put, int status)
{
        struct sim_net *net = sim_conn_net(conn);

        assert(!put->finished && conn->in_flight >= put->len);
        put->finished = true;
        conn->in_flight -= put->len;
        if (put->src)
                put->src->n_puts--;
        put->src = NULL;
        ae_list_unlink(&put->link);
        ae_sim_push(net, &(struct ae_net_event){ .kind = AE_NET_EV_PUT_DONE, .status = status,
                                              .conn = &conn->base, .cookie = put->cookie }, 0);
        ae_sim_put_unref(net->sim, put);
}

void ae_sim_fail_puts(struct sim_conn *conn)
{
        while (!ae_list_empty(&conn->puts))
                finish(conn, ae_list_entry(conn->puts.next, struct sim_put, link), AE_ELOST);
}

void ae_sim_on_put_done(struct ae_sim *sim, struct sim_event *event)
{
        struct sim_put *put = event->u.put.put;

        (void)sim;
        if (put->finished || sim_conn_net(put->from)->killed)
                return;
        finish(put->from, put, 0);
        tell_writable(put->from);
}

static void launch(struct ae_sim *sim, struct sim_put *put)
{
        uint32_t n = put->n_left;

        for (uint32_t i = 0; i < n; i++)
                schedule_put(sim, SIM_PIECE, put, i, sim->now + ae_sim_latency(sim, put->len));
        if (!put->len || sim->params.no_data || !ae_sim_chance(sim, sim->params.early_done_ppm))
                return;
        put->copy = ae_sim_alloc(put->len);
        memcpy(put->copy, put->src->base + put->src_off, put->len);
        schedule_put(sim, SIM_PUT_DONE, put, 0, sim->now + ae_sim_random(sim) % 1000);
}

int ae_sim_put(struct ae_net_conn *base, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie)
{
        struct sim_conn *conn = sim_conn_of(base);
        struct sim_net *net = sim_conn_net(conn);
        struct ae_sim *sim = net->sim;
        struct sim_put *put;

        if (check_up(conn) < 0)
                return AE_ELOST;
        if (!can_put(conn, len)) {
                conn->want_put = true;
                conn->want_put_len = len;
                return AE_EAGAIN;
        }
        if (ae_evq_reserve(&net->events, 1) < 0)
                return AE_ENOMEM;
        put = ae_sim_put_new(sim);
        put->n_refs = 1;
        put->from = conn;
        put->to = conn->peer;
        ae_sim_conn_ref(put->from);
        ae_sim_conn_ref(put->to);
        put->key = *key;
        put->src = len ? src : NULL;
        put->src_off = src_off;
        put->off = off;
        put->len = len;
        put->note = note;
        put->cookie = cookie;
        if (put->src)
                put->src->n_puts++;
        conn->in_flight += len;
        ae_list_push(&conn->puts, &put->link);
        net->stats.puts_sent++;
        net->stats.put_bytes_sent += len;
        if (ae_sim_chance(sim, sim->params.loss_ppm))
                ae_sim_break(sim, conn, AE_ELOST, lost_text, lost_text);
        if (conn->cut)
                return 0; /* DOWN is on its way, and ends it */
        cut_put(sim, put);
        launch(sim, put);
        return 0;
}

/* Whether the bytes of @put can still be read. */
static bool source_there(const struct sim_put *put)
{
        return put->copy || put->len == 0 ||
               (put->from->state == SIM_UP && !sim_conn_net(put->from)->killed);
}

static void land(struct sim_net *net, struct sim_put *put, uint32_t piece,
                 const struct ae_net_grant *grant)
{
        uint64_t begin = put->cut[piece], len = put->cut[piece + 1] - begin;
        const char *src;

        if (!grant) {
                put->late = true;
                net->stats.late_put_bytes += len;
                return;
        }
        net->stats.put_bytes_received += len;
        if (!len || net->sim->params.no_data)
                return;
        src = put->copy ? put->copy : put->src->base + put->src_off;
        memcpy(grant->mem->base + grant->off + put->off + begin, src + begin, len);
}

static void landed(struct sim_net *net, struct sim_put *put, const struct ae_net_grant *grant,
                   uint64_t tag)
{
        struct ae_sim *sim = net->sim;

        if (!put->copy)
                schedule_put(sim, SIM_PUT_DONE, put, 0, sim->now + ae_sim_latency(sim, 0));
        if (put->late) {
                net->stats.late_puts++;
                return;
        }
        net->stats.puts_received++;
        ae_sim_push(net,
                    &(struct ae_net_event){ .kind = AE_NET_EV_NOTIFY, .conn = &put->to->base,
                                            .mem = grant->mem, .off = grant->off + put->off,
                                            .len = put->len, .note = put->note }, tag);
}

bool ae_sim_on_piece(struct ae_sim *sim, struct sim_event *event)
{
        struct sim_put *put = event->u.put.put;
        struct ae_net_grant *grant = NULL;
        enum ae_net_lookup found;
        struct sim_net *net;
        uint64_t tag = 0;

        if (!can_arrive(put->from, put->to) || !source_there(put))
                return false;
        net = sim_conn_net(put->to);
        if (put->n_left == 1 && must_wait(net, event))
                return true;
        found = find(put->to, &put->key, &grant, &tag);
        if (found == AE_NET_KEY_NEVER || (grant && !ae_range_ok(put->off, put->len, grant->len))) {
                ae_sim_break(sim, put->to, AE_EPROTO,
                             grant ? "a put outside its grant"
                                   : "a put with a key that was never granted",
                             "the peer closed it");
                return false;
        }
        land(net, put, event->u.put.piece, grant);
        if (--put->n_left == 0)
                landed(net, put, grant, tag);
        return false;
}
