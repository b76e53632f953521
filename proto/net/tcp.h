/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the tcp transport share; see tcp.c for the protocol. Owner thread only. */
#pragma once

#include "proto/net/conn.h"

#define TCP_PUTS 512                       /* accepted, unfinished puts of one connection */
#define TCP_STRIPE_MIN ((uint64_t)1 << 19) /* bytes; a larger put is cut over all streams */
#define TCP_WINDOW 64                      /* striped puts that arrive at the same time */
#define TCP_JOINING_MAX 256                /* accepted connections that still lack streams */
#define TCP_TX_CAP ((uint32_t)2 * AE_NET_MSG_MAX + (1u << 16))
#define TCP_RX_CAP ((uint32_t)AE_NET_MSG_MAX + (1u << 16))
#define TCP_BUF_CAP (1u << 16) /* receive buffer of a data stream */

enum tcp_frame_type { TCP_FRAME_MSG = 1, TCP_FRAME_GO = 2 };

struct tcp_ctl_frame {
        uint32_t len; /* of what follows */
        uint8_t type;
        uint8_t zero[3];
};

#define TCP_PUT_TYPE 0x50

struct tcp_put_frame {
        uint8_t type;
        uint8_t n_parts; /* 1 or the number of data streams */
        uint8_t part;    /* which of them follows */
        uint8_t zero[5];
        uint8_t key[32];
        uint64_t off; /* of the whole put, from the start of the grant */
        uint64_t len; /* of the whole put */
        uint64_t note;
        uint64_t seq; /* numbers the striped puts of one connection, from 0; 0 when n_parts is 1 */
};

struct tcp_conn;

struct tcp_put {
        struct ae_post post;
        uint32_t n_parts_left;  /* 0: the slot is free */
        struct tcp_put *next_free;
};

struct tcp_part {
        struct tcp_put_frame frame;
        uint32_t head_left; /* bytes of the frame still to send */
        uint64_t left;      /* payload bytes still to send, at @data */
        const char *data;
        struct tcp_put *put; /* borrowed from the connection */
        struct tcp_part *next;
};

/* The part that a data stream is receiving. */
struct tcp_arrival {
        bool active;
        bool late;    /* the grant is revoked: bytes go to the sink */
        bool striped; /* belongs to window slot seq % TCP_WINDOW */
        uint64_t seq;
        uint64_t left; /* payload bytes to come */
        char *dst;
        uint64_t tag; /* of the grant */
        struct ae_net_mem *mem;
        uint64_t mem_off, len, note; /* what the NOTIFY will say */
};

/* A striped put of which some parts have come. */
struct tcp_open {
        uint8_t n_seen, n_done;
        struct tcp_put_frame frame; /* of the first part seen */
};

struct tcp_stream {
        struct ae_source source;
        struct tcp_conn *conn; /* borrowed */
        uint8_t index;
        bool greeted; /* connector: its hello is sent */
        struct tcp_part *first, *last;
        uint64_t queued; /* bytes in the list */
        char *buf;       /* owned; TCP_BUF_CAP */
        uint32_t buf_head, buf_tail;
        uint32_t ask; /* bytes to read when a frame is expected */
        bool paused;  /* the next frame is beyond the window */
        uint64_t next_seq;
        struct tcp_arrival in;
};

struct tcp_ctl {
        struct ae_source source;
        char *tx; /* owned; TCP_TX_CAP */
        uint32_t tx_head, tx_tail;
        char *rx; /* owned; TCP_RX_CAP */
        uint32_t rx_head, rx_tail;
        uint64_t round; /* in which rx was last moved to the front */
};

struct tcp_conn {
        struct ae_conn common;
        uint64_t token;
        struct tcp_ctl ctl;
        struct tcp_stream data[AE_NET_STREAMS_MAX];
        uint8_t n_streams;
        struct tcp_put *puts;   /* owned; TCP_PUTS */
        struct tcp_part *parts; /* owned; n_streams for each put */
        struct tcp_put *free_put;
        uint64_t next_seq;    /* of the next striped put */
        uint64_t window_base; /* the first striped put that is not complete */
        struct tcp_open window[TCP_WINDOW];
};

struct tcp_net {
        struct ae_end end;
        uint64_t round; /* counts I/O rounds */
        char *sink;     /* owned; where bytes of revoked grants go */
};

#define TCP_SINK_LEN (1u << 18)

static inline struct tcp_net *tcp_net_of(const struct tcp_conn *conn)
{
        return ae_container_of(ae_conn_end(&conn->common), struct tcp_net, end);
}

static inline struct tcp_conn *tcp_conn_of(struct ae_net_conn *conn)
{
        return ae_container_of(conn, struct tcp_conn, common.base);
}

/* Where part @part of a put of @len bytes in @n_parts begins; part n_parts begins at the end. */
uint64_t ae_tcp_part_off(uint64_t len, uint32_t n_parts, uint32_t part);

/* tcp.c: TCP_NODELAY and the like on a fresh socket. */
int ae_tcp_socket_setup(int fd);

/* tcp-conn.c */
int ae_tcp_connect(struct ae_net *net, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn);
void ae_tcp_conn_shut(struct ae_conn *common);
void ae_tcp_conn_free(struct ae_conn *common);
/* Take over the guest's socket, as a control stream or as a data stream. */
int ae_tcp_conn_accept(struct tcp_net *net, struct ae_guest *guest, const struct ae_hello *hello);
int ae_tcp_conn_join(struct tcp_net *net, struct ae_guest *guest, const struct ae_hello *hello);
void ae_tcp_go_up(struct tcp_conn *conn);

/* tcp-send.c */
int ae_tcp_msg(struct ae_net_conn *base, const void *data, size_t len);
int ae_tcp_put(struct ae_net_conn *base, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie);
/* 0, or negative when the connection broke. */
int ae_tcp_ctl_queue(struct tcp_conn *conn, enum tcp_frame_type type, const void *data, size_t len);
int ae_tcp_ctl_flush(struct tcp_conn *conn);
int ae_tcp_stream_send(struct tcp_stream *stream);
void ae_tcp_fail_puts(struct tcp_conn *conn);

/* tcp-recv.c: 0, or negative when the connection broke. */
int ae_tcp_ctl_receive(struct tcp_conn *conn);
int ae_tcp_stream_receive(struct tcp_stream *stream);
void ae_tcp_revoked(struct ae_conn *common, uint64_t tag);
