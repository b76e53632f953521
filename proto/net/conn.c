/* SPDX-License-Identifier: Apache-2.0 */
/* The common life of connections; see conn.h. The legal moves between states are one table. */
#include "proto/net/conn.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "proto/base/num.h"
#include "proto/base/status.h"

#define BIT(state) (1u << (state))
#define EVENTS_PER_CONN 3 /* UP, DOWN or REFUSED, and one WRITABLE */
#define ENDS (BIT(AE_CONN_DOWN) | BIT(AE_CONN_CLOSED))

static const uint32_t legal_moves[] = {
        [AE_CONN_DIALING] = BIT(AE_CONN_GREETING) | BIT(AE_CONN_JOINING) | ENDS,
        [AE_CONN_GREETING] = BIT(AE_CONN_JOINING) | ENDS,
        [AE_CONN_JOINING] = BIT(AE_CONN_UP) | ENDS,
        [AE_CONN_UP] = ENDS,
        [AE_CONN_DOWN] = BIT(AE_CONN_CLOSED),
        [AE_CONN_CLOSED] = 0,
};

void ae_conn_move(struct ae_conn *conn, enum ae_conn_state to)
{
        assert(legal_moves[conn->state] & BIT(to));
        conn->state = to;
}

/* --- life --- */

static void on_late(struct ae_deadline *deadline)
{
        struct ae_conn *conn = ae_container_of(deadline, struct ae_conn, deadline);

        ae_conn_break(conn, AE_ETIMEDOUT, "the handshake was not done within its deadline");
}

int ae_conn_init(struct ae_conn *conn, struct ae_end *end)
{
        uint64_t id;
        int r;

        r = ae_net_random(&id);
        if (r == 0)
                r = ae_evq_reserve(&end->events, EVENTS_PER_CONN);
        if (r < 0)
                return r;
        conn->base.net = &end->base;
        conn->state = AE_CONN_DIALING;
        conn->deadline.fire = on_late;
        ae_net_grants_init(&conn->grants, id);
        ae_list_push(&end->conns, &conn->link);
        ae_wait_deadline(&end->wait, &conn->deadline);
        return 0;
}

void ae_conn_deinit(struct ae_conn *conn)
{
        ae_list_unlink(&conn->deadline.link);
        ae_net_grants_deinit(&conn->grants);
        ae_evq_release(&ae_conn_end(conn)->events, EVENTS_PER_CONN);
        ae_list_unlink(&conn->link);
}

void ae_conn_set_dialled(struct ae_conn *conn, uint32_t node, const char *address)
{
        conn->base.node = node;
        snprintf(conn->address, sizeof(conn->address), "%s", address);
}

void ae_conn_set_accepted(struct ae_conn *conn, const struct ae_net_hello *peer)
{
        conn->accepted = true;
        conn->base.node = peer->node;
        conn->peer = *peer;
        ae_conn_move(conn, AE_CONN_JOINING);
}

int ae_conn_take_hello(struct ae_conn *conn, const uint8_t frame[AE_HELLO_SIZE], uint8_t kind,
                       struct ae_hello *ret_hello)
{
        int r;

        r = ae_hello_decode(frame, kind, kind, ret_hello);
        if (r == 0)
                r = ae_hello_compare(&ae_conn_end(conn)->options.self, &ret_hello->who);
        if (r == 0)
                r = ae_hello_expect(conn->base.node, &ret_hello->who);
        if (r == 0)
                conn->peer = ret_hello->who;
        return r;
}

void ae_conn_go_up(struct ae_conn *conn)
{
        ae_conn_move(conn, AE_CONN_UP);
        ae_list_unlink(&conn->deadline.link);
        ae_evq_push(&ae_conn_end(conn)->events,
                    &(struct ae_net_event){ .kind = AE_NET_EV_UP, .conn = &conn->base,
                                            .hello = conn->peer }, 0);
}

/* Lets go of everything but the memory; the PUT_DONEs are queued. */
static void shut(struct ae_conn *conn)
{
        struct ae_end *end = ae_conn_end(conn);

        ae_list_unlink(&conn->deadline.link);
        end->ops->shut(conn);
        assert(conn->in_flight == 0);
        ae_net_grants_drop_all(&conn->grants);
        ae_door_retry(&end->door);
}

/* Nothing more will be queued of it. */
static void retire(struct ae_conn *conn)
{
        ae_conn_move(conn, AE_CONN_CLOSED);
        ae_list_unlink(&conn->link);
        ae_list_push(&ae_conn_end(conn)->dead, &conn->link);
}

void ae_conn_break(struct ae_conn *conn, int status, const char *format, ...)
{
        struct ae_end *end = ae_conn_end(conn);
        struct ae_net_event event = { .kind = AE_NET_EV_DOWN, .status = status,
                                      .conn = &conn->base, .text = conn->text };
        bool refused = conn->accepted && conn->state != AE_CONN_UP;
        va_list args;
        int n;

        if (conn->state >= AE_CONN_DOWN)
                return;
        n = snprintf(conn->text, sizeof(conn->text), "connection %s node %u%s%s%s: ",
                     conn->accepted ? "from" : "to", conn->base.node,
                     conn->accepted ? "" : " at ", conn->address,
                     conn->state == AE_CONN_UP ? " broke" : " failed");
        va_start(args, format);
        vsnprintf(conn->text + n, sizeof(conn->text) - (size_t)n, format, args);
        va_end(args);
        shut(conn);
        ae_conn_move(conn, AE_CONN_DOWN);
        if (refused) {
                event.kind = AE_NET_EV_REFUSED;
                event.conn = NULL;
                end->stats.refused++;
                retire(conn); /* the owner never saw it */
        }
        ae_evq_push(&end->events, &event, 0);
}

void ae_conn_close(struct ae_net_conn *base)
{
        struct ae_conn *conn = ae_conn_of(base);

        assert(conn->state != AE_CONN_CLOSED);
        ae_evq_drop_conn(&ae_conn_end(conn)->events, base);
        if (conn->state != AE_CONN_DOWN)
                shut(conn);
        retire(conn);
}

/* --- sending --- */

int ae_conn_take_msg(struct ae_conn *conn, uint64_t len, bool has_room)
{
        struct ae_net_stats *stats = &ae_conn_end(conn)->stats;

        if (conn->state != AE_CONN_UP)
                return ae_fail(AE_ELOST, "cannot send a message to node %u: it is not connected",
                               conn->base.node);
        if (!has_room) {
                conn->want_msg = true;
                conn->want_msg_len = len;
                return AE_EAGAIN;
        }
        stats->msgs_sent++;
        stats->msg_bytes_sent += len;
        return 0;
}

/* One put may be larger than all that may be in flight: it goes alone. */
static bool fits_window(const struct ae_conn *conn, uint64_t len)
{
        return conn->in_flight == 0 ||
               conn->in_flight + len <= ae_conn_end(conn)->options.max_in_flight;
}

int ae_conn_take_put(struct ae_conn *conn, struct ae_net_mem *src, uint64_t len, uint64_t cookie,
                     struct ae_post *post)
{
        struct ae_end *end = ae_conn_end(conn);

        if (conn->state != AE_CONN_UP)
                return ae_fail(AE_ELOST, "cannot put to node %u: it is not connected",
                               conn->base.node);
        if (!post || !fits_window(conn, len)) {
                conn->want_put = true;
                conn->want_put_len = len;
                return AE_EAGAIN;
        }
        if (ae_evq_reserve(&end->events, 1) < 0)
                return AE_ENOMEM;
        *post = (struct ae_post){ .cookie = cookie, .len = len, .src = len ? src : NULL };
        if (post->src)
                post->src->n_puts++;
        conn->in_flight += len;
        end->stats.puts_sent++;
        end->stats.put_bytes_sent += len;
        return 0;
}

void ae_conn_post_done(struct ae_conn *conn, const struct ae_post *post, int status)
{
        assert(conn->in_flight >= post->len);
        conn->in_flight -= post->len;
        if (post->src)
                post->src->n_puts--;
        ae_evq_push(&ae_conn_end(conn)->events,
                    &(struct ae_net_event){ .kind = AE_NET_EV_PUT_DONE, .status = status,
                                            .conn = &conn->base, .cookie = post->cookie }, 0);
}

void ae_conn_tell_writable(struct ae_conn *conn, bool msg_room, bool put_room)
{
        bool msg = conn->want_msg && msg_room;
        bool put = conn->want_put && put_room && fits_window(conn, conn->want_put_len);

        if ((!msg && !put) || conn->writable_queued || conn->state != AE_CONN_UP)
                return;
        conn->want_msg &= !msg;
        conn->want_put &= !put;
        conn->writable_queued = true;
        ae_evq_push(&ae_conn_end(conn)->events,
                    &(struct ae_net_event){ .kind = AE_NET_EV_WRITABLE, .conn = &conn->base }, 0);
}

/* --- receiving --- */

void ae_conn_msg_arrived(struct ae_conn *conn, const void *data, uint32_t len)
{
        struct ae_end *end = ae_conn_end(conn);

        end->stats.msgs_received++;
        end->stats.msg_bytes_received += len;
        ae_evq_push(&end->events,
                    &(struct ae_net_event){ .kind = AE_NET_EV_MSG, .conn = &conn->base,
                                            .data = data, .len = len }, 0);
}

void ae_conn_put_arrived(struct ae_conn *conn, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                         uint64_t note, uint64_t tag)
{
        struct ae_end *end = ae_conn_end(conn);

        end->stats.puts_received++;
        ae_evq_push(&end->events,
                    &(struct ae_net_event){ .kind = AE_NET_EV_NOTIFY, .conn = &conn->base,
                                            .mem = mem, .off = off, .len = len, .note = note },
                    tag);
}

int ae_conn_find_target(struct ae_conn *conn, const uint8_t key[sizeof(struct ae_net_key)],
                        uint64_t off, uint64_t len, struct ae_net_grant **ret_grant,
                        uint64_t *ret_tag)
{
        struct ae_net_grant *grant = NULL;
        struct ae_net_key copy;
        uint64_t tag = 0;

        memcpy(&copy, key, sizeof(copy));
        if (ae_net_grants_find(&conn->grants, &copy, &grant, &tag) == AE_NET_KEY_NEVER)
                return ae_fail(AE_EPROTO, "a put of %llu bytes at %llu has a key that was never "
                               "granted", (unsigned long long)len, (unsigned long long)off);
        if (grant && !ae_range_ok(off, len, grant->len))
                return ae_fail(AE_EPROTO, "a put of %llu bytes at %llu is outside its grant",
                               (unsigned long long)len, (unsigned long long)off);
        *ret_grant = grant;
        *ret_tag = tag;
        return 0;
}

int ae_conn_grant(struct ae_net_conn *base, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                  struct ae_net_key *ret_key)
{
        struct ae_conn *conn = ae_conn_of(base);

        if (conn->state != AE_CONN_UP)
                return ae_fail(AE_ELOST, "cannot grant memory to node %u: it is not connected",
                               base->node);
        return ae_net_grants_add(&conn->grants, mem, off, len, ret_key);
}

int ae_conn_revoke(struct ae_net_conn *base, const struct ae_net_key *key)
{
        struct ae_conn *conn = ae_conn_of(base);
        struct ae_end *end = ae_conn_end(conn);
        struct ae_net_grant *grant = NULL;
        uint64_t tag = 0;

        if (ae_net_grants_find(&conn->grants, key, &grant, &tag) == AE_NET_KEY_NEVER)
                return ae_fail(AE_ENOENT, "cannot revoke: node %u was never granted this key",
                               base->node);
        end->ops->revoked(conn, tag);
        ae_evq_drop_grant(&end->events, base, tag, &end->stats);
        if (grant)
                ae_net_grants_drop(&conn->grants, grant);
        return 0;
}
