/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transport interface: how two daemon incarnations move bytes. Everything above net/ uses this
 * header and never a transport's own.
 *
 * An endpoint (struct ae_net) belongs to one thread, its owner; every call on it, on its
 * connections and on its memory is made there, and every event is handed out there. A connection
 * joins two endpoints and carries all jobs.
 *
 *   msg  small (at most AE_NET_MSG_MAX bytes), two-sided, in order per connection. The bytes are
 *        copied before ae_net_msg() returns.
 *   put  one-sided: local bytes into memory that the peer granted to this connection. It ends in
 *        exactly one AE_NET_EV_NOTIFY with its note at the receiver, when all its bytes are
 *        visible there, and in exactly one AE_NET_EV_PUT_DONE with its cookie at the sender, when
 *        the source may be used again (which says nothing about the receiver). A put of 0 bytes is
 *        a notify. No order holds between puts, nor between a put and a msg.
 *
 * Rules that every transport keeps and the conformance suite checks:
 *  - Nothing is called back from inside a call: events come out of ae_net_poll() alone.
 *  - Every put that was accepted (returned 0) has exactly one PUT_DONE, also when the connection
 *    breaks (status AE_ELOST then), before that connection's AE_NET_EV_DOWN. Until then the
 *    caller keeps the source bytes as they are.
 *  - Back-pressure is the status AE_EAGAIN from ae_net_put() or ae_net_msg(): nothing was taken;
 *    AE_NET_EV_WRITABLE follows when it is worth trying again.
 *  - A put outside its grant, or to a revoked grant, changes no byte outside the grant and does
 *    not notify. A put that was under way when its grant was revoked is swallowed: counted in
 *    stats.late_puts, its bytes dropped, the connection kept. A put that could never have been
 *    legal (key never granted to this connection, or bounds) breaks the connection.
 *  - Oversized or malformed frames break that connection and nothing else.
 *  - What the peer sent before it closed comes out before AE_NET_EV_DOWN: every msg that has
 *    reached this side, however many rounds they need.
 *  - After AE_NET_EV_DOWN the connection object is dead; ae_net_conn_close() frees it, and is the
 *    only call that still does something with it: the others return AE_ELOST, ae_net_revoke() 0.
 *    Its grants are gone, and so is the range's hold on them.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ae_net;      /* an endpoint; owned by who opened it */
struct ae_net_conn; /* one connection; owned by its endpoint until closed */
struct ae_net_mem;  /* a mapped memory range; owned by its endpoint until unmapped */

#define AE_NET_MSG_MAX ((size_t)1 << 20)  /* bytes in one msg */
#define AE_NET_PUT_MAX ((uint64_t)1 << 40) /* bytes in one put */
#define AE_NET_ADDR_MAX 128               /* bytes of a printed address, with the final NUL */

/* What a peer needs to put into a grant: opaque to everyone but the transport, sent as is. */
struct ae_net_key {
        uint8_t bytes[32];
};

/* Who speaks: exchanged in the transport's own handshake before AE_NET_EV_UP. */
struct ae_net_hello {
        uint32_t version;     /* protocol version, AE_WIRE_VERSION; the transport compares it */
        uint32_t node;        /* node id of the sender */
        uint64_t incarnation; /* of the sender's daemon */
        uint64_t cluster;     /* digest of the peer list; the transport compares it */
};

enum ae_net_event_kind {
        AE_NET_EV_UP,       /* handshake complete; peer in .hello */
        AE_NET_EV_DOWN,     /* broken or closed by the peer; why in .status and .text */
        AE_NET_EV_MSG,      /* .data, .len: valid until the next ae_net_poll() */
        AE_NET_EV_NOTIFY,   /* a put has arrived: .mem, .off, .len, .note */
        AE_NET_EV_PUT_DONE, /* own put finished: .cookie, .status */
        AE_NET_EV_WRITABLE, /* after AE_EAGAIN: try again */
        AE_NET_EV_REFUSED,  /* an incoming handshake was refused, .conn is NULL; .text says why */
};

struct ae_net_event {
        enum ae_net_event_kind kind;
        int status;                /* DOWN, PUT_DONE: 0 or a negative code */
        struct ae_net_conn *conn;  /* borrowed from the endpoint */
        struct ae_net_hello hello; /* UP; REFUSED with EMISMATCH or EVERSION: what it claims */
        const void *data;          /* MSG: borrowed from the endpoint */
        size_t len;                /* MSG, NOTIFY: bytes */
        struct ae_net_mem *mem;    /* NOTIFY: the mapped range that was written */
        uint64_t off;              /* NOTIFY: first byte written, from the start of mem */
        uint64_t note;             /* NOTIFY */
        uint64_t cookie;           /* PUT_DONE */
        const char *text;          /* DOWN, REFUSED: cause; borrowed until the next poll */
};

struct ae_net_stats {
        uint64_t msgs_sent, msgs_received;
        uint64_t msg_bytes_sent, msg_bytes_received;
        uint64_t puts_sent, puts_received;
        uint64_t put_bytes_sent, put_bytes_received;
        uint64_t late_puts, late_put_bytes; /* arrived for a revoked grant and dropped */
        uint64_t refused;                   /* handshakes refused */
};

struct ae_net_options {
        struct ae_net_hello self;
        void *loop;              /* uv_loop_t * of the owner thread, struct ae_sim * for sim; NULL:
                                    no wake, the owner only polls and ae_net_arm() says 1 */
        const char *listen;      /* address to listen on, transport syntax; NULL: only connect */
        uint32_t streams;        /* data streams per connection, tcp only; 0: 2; at most 8 */
        uint64_t max_in_flight;  /* bytes of accepted, unfinished puts per connection; 0: 256 MiB;
                                    a single put may be larger */
        uint64_t handshake_ns;   /* until a connection must be up; 0: 5 s */
        /*
         * Called from the loop when events are waiting, once per ae_net_arm() that returned 0; only
         * sets a flag or calls ae_net_poll(). Not NULL when there is a loop.
         */
        void (*wake)(void *user);
        void *user;
};

/* One row per transport; see proto/net/net.c. */
struct ae_net_ops {
        const char *name; /* "tcp", "shm", "sim", "verbs" */
        int (*open)(const struct ae_net_options *options, struct ae_net **ret_net);
        void (*close)(struct ae_net *net);
        int (*address)(struct ae_net *net, char ret_address[AE_NET_ADDR_MAX]);
        int (*connect)(struct ae_net *net, const char *address, uint32_t node,
                       struct ae_net_conn **ret_conn);
        void (*conn_close)(struct ae_net_conn *conn);
        int (*map)(struct ae_net *net, void *address, uint64_t len, int fd, uint64_t fd_off,
                   struct ae_net_mem **ret_mem);
        void (*unmap)(struct ae_net_mem *mem);
        int (*grant)(struct ae_net_conn *conn, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                     struct ae_net_key *ret_key);
        int (*revoke)(struct ae_net_conn *conn, const struct ae_net_key *key);
        int (*msg)(struct ae_net_conn *conn, const void *data, size_t len);
        int (*put)(struct ae_net_conn *conn, const struct ae_net_key *key, uint64_t off,
                   struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
                   uint64_t cookie);
        int (*poll)(struct ae_net *net, struct ae_net_event *events, int n_max);
        int (*arm)(struct ae_net *net);
        void (*stats)(const struct ae_net *net, struct ae_net_stats *ret_stats);
};

/* First member of every transport's endpoint and connection. */
struct ae_net {
        const struct ae_net_ops *ops; /* borrowed: static */
};
struct ae_net_conn {
        struct ae_net *net; /* borrowed */
        void *user;         /* the caller's; NULL at first */
        uint32_t node;      /* the peer's node id: as asked on connect, as told on accept */
};

/* NULL when there is no such transport in this build; ae_net_names() lists those there are. */
const struct ae_net_ops *ae_net_find(const char *name);
const char *ae_net_names(void);

/*
 * Opens an endpoint of transport @name and listens when options->listen is set. Addresses:
 *   tcp  "HOST:PORT" with a numeric host; port 0 takes a free one, see ae_net_address(). Loopback
 *        only, anything else is refused with AE_EUNSUPPORTED until daemons authenticate.
 *   shm  path of a unix socket in a private directory, or "@name" for an abstract one
 *   sim  a number; the network is options->loop, a struct ae_sim * (proto/net/sim.h)
 * @return: 0; AE_EINVAL bad address; AE_EEXIST address in use; AE_ESYS; AE_ENOMEM.
 */
int ae_net_open(const char *name, const struct ae_net_options *options, struct ae_net **ret_net);
/*
 * Breaks every connection without events, unmaps and frees all; NULL is fine. Returns NULL. A uv
 * loop must run once more before it is closed, to free the endpoint's handle.
 */
struct ae_net *ae_net_close(struct ae_net *net);
/* The address peers connect to, with the real port. AE_ESTATE when not listening. */
int ae_net_address(struct ae_net *net, char ret_address[AE_NET_ADDR_MAX]);

/*
 * Begins to connect; UP or DOWN follows. @node: whom we expect, another answer breaks it.
 * Never blocks. AE_EINVAL for an address it cannot parse.
 */
int ae_net_connect(struct ae_net *net, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn);
/*
 * Closes; the only events still to come are the PUT_DONEs of its outstanding puts (AE_ELOST), no
 * DOWN follows. In these .conn may be compared and its user pointer read; the object is freed by
 * the ae_net_poll() after the one that handed out the last.
 */
void ae_net_conn_close(struct ae_net_conn *conn);

/*
 * Makes [address, address + len) known, as source of puts and, after a grant, as their target.
 * @fd, @fd_off: the memfd behind it, borrowed, for shm, where the peer maps it (read-only) and
 * reads puts out of it; it must be sealed against shrinking (AE_EINVAL otherwise). -1: private
 * memory, out of which shm copies twice. Either may be a target. The range stays valid until
 * unmapped; unmapping with puts in flight or grants alive is a bug of the caller.
 */
int ae_net_map(struct ae_net *net, void *address, uint64_t len, int fd, uint64_t fd_off,
               struct ae_net_mem **ret_mem);
void ae_net_unmap(struct ae_net_mem *mem);

/* Lets the peer of @conn put into [off, off + len) of @mem until revoked or down. */
int ae_net_grant(struct ae_net_conn *conn, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                 struct ae_net_key *ret_key);
/* When it returns, no later byte of this grant is written and no NOTIFY of it is handed out. */
int ae_net_revoke(struct ae_net_conn *conn, const struct ae_net_key *key);

/* 0, AE_EAGAIN, AE_EOVERFLOW (beyond AE_NET_MSG_MAX), AE_ELOST (not up). */
int ae_net_msg(struct ae_net_conn *conn, const void *data, size_t len);
/*
 * @off: from the start of the grant. @src may be NULL when @len is 0.
 * @return: 0, AE_EAGAIN, AE_EINVAL (source range, sizes), AE_ELOST (not up).
 */
int ae_net_put(struct ae_net_conn *conn, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie);

/* Hands out up to @n_max events; returns how many, 0 when there are none. */
int ae_net_poll(struct ae_net *net, struct ae_net_event *events, int n_max);
/*
 * Before sleeping: 0 when wake() will be called at the next event, 1 "busy, poll first". Any other
 * call on the endpoint after it may leave events behind: arm again before sleeping then.
 */
int ae_net_arm(struct ae_net *net);
void ae_net_stats(const struct ae_net *net, struct ae_net_stats *ret_stats);
