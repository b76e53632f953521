/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of a connection that is alike in every transport on descriptors: its states, the
 * handshake's deadline, up and down with their events, grants, and what a put promises: taken or
 * turned away with AE_EAGAIN, one PUT_DONE for each that was taken, WRITABLE after back-pressure. A
 * transport embeds struct ae_conn as the first member of its connection and keeps how bytes move:
 * sockets, rings or queue pairs, how many of them, and in which order puts finish. Owner thread.
 */
#pragma once

#include "proto/net/end.h"

#define AE_CONN_TEXT_MAX 320

enum ae_conn_state {
        AE_CONN_DIALING,  /* connector: it is being reached */
        AE_CONN_GREETING, /* connector: hello sent, the acceptor's awaited */
        AE_CONN_JOINING,  /* hellos are exchanged; streams or regions are yet to come */
        AE_CONN_UP,
        AE_CONN_DOWN,   /* broken; DOWN or REFUSED is queued or handed out */
        AE_CONN_CLOSED, /* waits for its last events to be handed out */
};

struct ae_conn {
        struct ae_net_conn base;
        struct ae_list link; /* in end->conns or end->dead */
        enum ae_conn_state state;
        bool accepted;
        struct ae_net_hello peer;
        struct ae_deadline deadline;
        struct ae_net_grants grants;
        uint64_t in_flight;      /* bytes of unfinished puts */
        bool want_msg, want_put; /* AE_EAGAIN was returned for one of this size */
        uint64_t want_msg_len, want_put_len;
        bool writable_queued;
        char address[AE_NET_ADDR_MAX]; /* connector: dialled */
        char text[AE_CONN_TEXT_MAX];   /* of DOWN or REFUSED */
};

/* A put that was taken and is not finished. Embedded in what a transport keeps of it. */
struct ae_post {
        uint64_t cookie;
        uint64_t len;
        struct ae_net_mem *src; /* borrowed; NULL for a put of 0 bytes */
};

static inline struct ae_conn *ae_conn_of(struct ae_net_conn *conn)
{
        return ae_container_of(conn, struct ae_conn, base);
}

static inline struct ae_end *ae_conn_end(const struct ae_conn *conn)
{
        return ae_end_of(conn->base.net);
}

/* --- life --- */

/* Makes a zeroed @conn one of @end's, dialling, with its deadline running. */
int ae_conn_init(struct ae_conn *conn, struct ae_end *end);
/* Takes it out of its endpoint. All its events have been handed out or there were none. */
void ae_conn_deinit(struct ae_conn *conn);
/* Says whose connection it is: of the connector, and of the acceptor, which is then joining. */
void ae_conn_set_dialled(struct ae_conn *conn, uint32_t node, const char *address);
void ae_conn_set_accepted(struct ae_conn *conn, const struct ae_net_hello *peer);
/* The only way to change the state; a move that is not legal is a bug. */
void ae_conn_move(struct ae_conn *conn, enum ae_conn_state to);
/* The acceptor's answer: decoded, compared, from the node that was dialled, and kept as peer. */
int ae_conn_take_hello(struct ae_conn *conn, const uint8_t frame[AE_HELLO_SIZE], uint8_t kind,
                       struct ae_hello *ret_hello);
/* The handshake is complete. */
void ae_conn_go_up(struct ae_conn *conn);
/*
 * Shuts it and says DOWN with the text, or REFUSED if the owner never saw it. Harmless twice; the
 * caller must not touch the streams afterwards.
 */
void ae_conn_break(struct ae_conn *conn, int status, const char *format, ...)
        __attribute__((format(printf, 3, 4)));
/* Row of struct ae_net_ops. */
void ae_conn_close(struct ae_net_conn *base);

/* --- sending --- */

/*
 * Whether a msg or put is taken: 0 and counted; AE_ELOST; AE_EAGAIN when there is no room, kept in
 * mind for WRITABLE. @post: where the transport keeps the put, to be filled; NULL: it has no place.
 * One that was taken ends in ae_conn_post_done(), also by shut().
 */
int ae_conn_take_msg(struct ae_conn *conn, uint64_t len, bool has_room);
int ae_conn_take_put(struct ae_conn *conn, struct ae_net_mem *src, uint64_t len, uint64_t cookie,
                     struct ae_post *post);
void ae_conn_post_done(struct ae_conn *conn, const struct ae_post *post, int status);
/*
 * Tells the owner once when what was turned away would now be taken: a msg of want_msg_len if
 * @msg_room, a put if @put_room.
 */
void ae_conn_tell_writable(struct ae_conn *conn, bool msg_room, bool put_room);

/* --- receiving; ae_evq_room() has said yes --- */

void ae_conn_msg_arrived(struct ae_conn *conn, const void *data, uint32_t len);
/* All bytes of a put are in place. */
void ae_conn_put_arrived(struct ae_conn *conn, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                         uint64_t note, uint64_t tag);
/*
 * Where an announced put may go: *ret_grant, or NULL when that is revoked. AE_EPROTO for a put that
 * was never legal. @ret_tag names the grant.
 */
int ae_conn_find_target(struct ae_conn *conn, const uint8_t key[sizeof(struct ae_net_key)],
                        uint64_t off, uint64_t len, struct ae_net_grant **ret_grant,
                        uint64_t *ret_tag);

/* Rows of struct ae_net_ops. */
int ae_conn_grant(struct ae_net_conn *base, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                  struct ae_net_key *ret_key);
int ae_conn_revoke(struct ae_net_conn *base, const struct ae_net_key *key);
