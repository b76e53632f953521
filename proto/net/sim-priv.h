/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the simulated network share; see sim.h. */
#pragma once

#include "proto/base/num.h"
#include "proto/net/events.h"
#include "proto/net/priv.h"
#include "proto/net/sim.h"

#define SIM_PIECES_MAX 8
#define SIM_ADDRESS_MAX ((uint64_t)1 << 20)
#define SIM_MSGS_OUT 1024              /* undelivered msgs of one connection */
#define SIM_MSG_BYTES_OUT ((uint32_t)4 << 20)
#define SIM_BUF_CLASSES 7 /* 64 bytes to 4 KiB */

struct sim_net;
struct sim_conn;

/* The bytes of one msg. */
struct sim_buf {
        struct sim_buf *next;
        uint32_t size_class; /* SIM_BUF_CLASSES: from malloc */
        char data[];
};

enum sim_kind {
        SIM_TIMER,
        SIM_WAKE,     /* net: it is armed and has events */
        SIM_SYN,      /* from: asks `address` for a connection */
        SIM_ACK,      /* to: the acceptor has taken it */
        SIM_MSG,      /* from, to, buf, len */
        SIM_PIECE,    /* put, piece */
        SIM_PUT_DONE, /* put */
        SIM_DOWN,     /* to, status, text; from: the other end, or NULL when the network says it */
        SIM_TIMEOUT,  /* to: the handshake's deadline */
        SIM_CUT,      /* net, epoch: a placement has lasted cut_ns */
        SIM_CUT_PAIR, /* epoch: a partition of two has lasted cut_ns */
};

struct sim_event {
        uint64_t when, seq;
        enum sim_kind kind;
        struct sim_event *next; /* in a free, held or waiting list */
        struct sim_conn *from, *to; /* counted */
        union {
                struct {
                        void (*fn)(void *user); /* NULL: cancelled */
                        void *user;
                } timer;
                struct {
                        struct sim_buf *buf; /* owned */
                        uint32_t len;
                } msg;
                struct {
                        struct sim_put *put; /* counted */
                        uint32_t piece;
                } put;
                struct {
                        int status;
                        char *text; /* owned */
                } down;
                struct {
                        uint32_t net; /* index */
                        uint64_t epoch;
                } net;
                uint64_t address;
        } u;
};

struct sim_put {
        struct sim_put *next_free;
        struct ae_list link;       /* in from->puts until PUT_DONE is queued */
        struct sim_conn *from, *to; /* counted */
        struct ae_net_key key;
        struct ae_net_mem *src; /* NULL for 0 bytes, or when @copy has them */
        char *copy;             /* owned; the source as it was when posted */
        uint64_t src_off, off, len, note, cookie;
        uint64_t cut[SIM_PIECES_MAX + 1]; /* piece i is [cut[i], cut[i+1]) */
        uint32_t n_left;                  /* pieces still to land */
        uint32_t n_refs;
        bool late;     /* a piece met a revoked grant */
        bool finished; /* PUT_DONE is queued */
};

enum sim_state { SIM_CONNECTING, SIM_UP, SIM_DOWN_STATE, SIM_CLOSED };

/* A million of these must fit: what few connections need hangs off pointers. */
struct sim_conn {
        struct ae_net_conn base;
        struct ae_list link;          /* in net->conns or net->dead */
        struct sim_conn *peer;        /* counted; NULL before the acceptor's is there */
        struct ae_net_grants *grants; /* owned; NULL: never granted anything */
        struct ae_list puts;          /* unfinished */
        uint64_t in_flight;
        uint64_t last_msg_at; /* when what was sent last arrives */
        uint64_t want_put_len;
        uint32_t msg_bytes_out;
        uint16_t n_msgs_out;
        uint8_t state; /* enum sim_state */
        bool cut : 1;  /* nothing more that it has sent arrives */
        bool want_msg : 1, want_put : 1, writable_queued : 1;
        bool reaped : 1; /* its endpoint has let go of it, and may be gone */
        uint32_t n_refs; /* of events, puts and its peer */
        uint32_t index;  /* of its endpoint in sim->nets */
};

struct sim_text {
        struct sim_text *next;
        char text[];
};

struct sim_net {
        struct ae_net base;
        struct ae_sim *sim; /* borrowed */
        struct ae_net_options options;
        struct ae_evq events;
        struct ae_net_stats stats;
        struct ae_list conns, dead, mems;
        struct sim_buf *delivered;         /* msgs in the queue or handed out */
        struct sim_text *texts;            /* of events in the queue or handed out */
        struct sim_event *waiting;         /* deliveries that found the queue full, in order */
        struct sim_event **waiting_end;
        uint64_t address; /* UINT64_MAX: not listening */
        uint32_t index;   /* in sim->nets and sim->places */
        bool armed, killed;
};

struct sim_place {
        uint32_t group;
        uint64_t epoch;
};

struct sim_pair {
        uint32_t a, b; /* indices of endpoints */
        uint64_t epoch;
};

struct sim_heap_item {
        uint64_t when, seq;
        struct sim_event *event;
};

struct ae_sim {
        struct ae_sim_params params;
        uint64_t now, seq, epoch, next_conn_id;
        uint64_t random[4];
        struct sim_heap_item *heap; /* owned; 4-ary */
        size_t n_heap, heap_cap;
        struct sim_event *free_events;
        struct sim_put *free_puts;
        struct sim_buf *free_bufs[SIM_BUF_CLASSES];
        void **slabs; /* owned: blocks of events and puts */
        size_t n_slabs;
        struct sim_net **nets;    /* by index; NULL once closed */
        struct sim_place *places; /* by index; stay when the endpoint is closed */
        uint32_t n_nets;
        struct sim_net **addresses; /* by address */
        uint64_t n_addresses;
        struct sim_pair *pairs; /* few */
        uint32_t n_pairs;
        struct sim_event *held; /* due, but between the parts of a partition; in order */
        struct sim_event **held_end;
};

static inline struct sim_net *sim_net_of(const struct ae_net *net)
{
        return ae_container_of(net, struct sim_net, base);
}

static inline struct sim_net *sim_conn_net(const struct sim_conn *conn)
{
        return sim_net_of(conn->base.net);
}

static inline struct sim_conn *sim_conn_of(struct ae_net_conn *conn)
{
        return ae_container_of(conn, struct sim_conn, base);
}

/* sim.c: memory that cannot run out, the queue, chance. */
void *ae_sim_alloc(size_t len);
void *ae_sim_grow(void *array, size_t n, size_t size); /* doubles when n is a power of two >= 16 */
struct sim_event *ae_sim_event_new(struct ae_sim *sim, enum sim_kind kind, struct sim_conn *from,
                                   struct sim_conn *to);
void ae_sim_schedule(struct ae_sim *sim, struct sim_event *event, uint64_t when);
/* Schedules a whole list for now, in its order. */
void ae_sim_schedule_list(struct ae_sim *sim, struct sim_event *first);
uint64_t ae_sim_latency(struct ae_sim *sim, uint64_t len);
bool ae_sim_chance(struct ae_sim *sim, uint32_t ppm);
struct sim_put *ae_sim_put_new(struct ae_sim *sim);
void ae_sim_put_unref(struct ae_sim *sim, struct sim_put *put);
struct sim_buf *ae_sim_buf_new(struct ae_sim *sim, size_t len);
void ae_sim_buf_free(struct ae_sim *sim, struct sim_buf *buf);
/* Indices of endpoints. */
bool ae_sim_reachable(const struct ae_sim *sim, uint32_t a, uint32_t b);

/* sim-conn.c */
void ae_sim_conn_ref(struct sim_conn *conn);
void ae_sim_conn_unref(struct sim_conn *conn);
/* Queues an event at @net and wakes it. */
void ae_sim_push(struct sim_net *net, const struct ae_net_event *event, uint64_t tag);
const char *ae_sim_text(struct sim_net *net, const char *format, ...)
        __attribute__((format(printf, 2, 3)));
/* Both ends will see DOWN, and nothing that is under way or sent later arrives. */
void ae_sim_break(struct ae_sim *sim, struct sim_conn *conn, int status, const char *text,
                  const char *peer_text);
/* @from: the end whose doing it is, so that a partition can hold it back; NULL: the network's. */
void ae_sim_tell_down(struct ae_sim *sim, struct sim_conn *conn, struct sim_conn *from, int status,
                      const char *text, uint64_t when);
void ae_sim_on_syn(struct ae_sim *sim, struct sim_event *event);
void ae_sim_on_ack(struct ae_sim *sim, struct sim_event *event);
void ae_sim_on_down(struct ae_sim *sim, struct sim_event *event);
void ae_sim_on_timeout(struct ae_sim *sim, struct sim_event *event);
int ae_sim_connect(struct ae_net *net, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn);
void ae_sim_conn_close(struct ae_net_conn *base);
int ae_sim_parse_address(const char *text, uint64_t *ret_address);
void ae_sim_reap(struct sim_net *net);

/* sim-data.c */
int ae_sim_grant(struct ae_net_conn *base, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                 struct ae_net_key *ret_key);
int ae_sim_revoke(struct ae_net_conn *base, const struct ae_net_key *key);
int ae_sim_msg(struct ae_net_conn *base, const void *data, size_t len);
int ae_sim_put(struct ae_net_conn *base, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie);
/* Both take the event over when they put it off. True: they have. */
bool ae_sim_on_msg(struct ae_sim *sim, struct sim_event *event);
bool ae_sim_on_piece(struct ae_sim *sim, struct sim_event *event);
void ae_sim_on_put_done(struct ae_sim *sim, struct sim_event *event);
void ae_sim_fail_puts(struct sim_conn *conn);
