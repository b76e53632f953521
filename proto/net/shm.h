/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the shm transport share; see shm.c for the protocol. Owner thread only. */
#pragma once

#include <assert.h>
#include <stdatomic.h>

#include "proto/net/conn.h"

#define SHM_PUTS 512                 /* accepted, unfinished puts of one connection */
#define SHM_DESCS 1024               /* slots of the put ring */
#define SHM_MSGS ((uint64_t)4 << 20) /* bytes of the msg ring */
#define SHM_STAGE ((uint64_t)8 << 20)
#define SHM_RX_CAP ((uint32_t)AE_NET_MSG_MAX + (1u << 16))
#define SHM_MEMS_MAX 4096 /* ranges that one peer may show us */

/* Each counter on a line of its own; written by the region's owner alone, only ever growing. */
struct shm_head {
        _Alignas(64) _Atomic uint64_t msg_tail; /* bytes written to my msg ring */
        _Alignas(64) _Atomic uint64_t put_tail; /* slots filled in my put ring */
        _Alignas(64) _Atomic uint64_t msg_head; /* bytes that I have read of the peer's */
        _Alignas(64) _Atomic uint64_t put_head; /* slots of the peer's that I have finished */
        _Alignas(64) _Atomic uint32_t asleep;   /* ring my bell */
};

enum shm_desc_kind { SHM_DIRECT = 1, SHM_STAGED = 2 };

/* One slot of a put ring: a put, or the next piece of one that goes through the stage. */
struct shm_desc {
        uint32_t kind;
        uint32_t mem_id; /* SHM_DIRECT: the range shown earlier */
        uint8_t key[32];
        uint64_t off, len; /* of the whole put */
        uint64_t note;
        uint64_t part_off, part_len; /* this piece, from the start of the put */
        uint64_t src_off;            /* in the range or the stage */
        uint8_t zero[40];
};
static_assert(sizeof(struct shm_desc) == 128, "a slot is two cache lines");

struct shm_region {
        union {
                struct shm_head head;
                uint8_t page[4096];
        };
        struct shm_desc puts[SHM_DESCS];
        uint8_t msgs[SHM_MSGS];
        uint8_t stage[SHM_STAGE];
};
static_assert(sizeof(struct shm_region) == 4096 + SHM_DESCS * 128 + SHM_MSGS + SHM_STAGE,
              "no padding: peers compare the size");
static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "the counters are shared between processes");

struct shm_msg_head {
        uint32_t len;
        uint32_t zero;
};

enum shm_ctl_type { SHM_CTL_ATTACH = 1, SHM_CTL_SHOW = 2, SHM_CTL_HIDE = 3 };

/* One record on the unix socket after the hellos. */
struct shm_ctl {
        uint32_t type;
        uint32_t id;
        uint64_t off, len;
};

/* A peer's range, mapped here read-only. */
struct shm_seen {
        uint32_t id;
        const char *base; /* owned mapping; from a page boundary */
        size_t map_len;
        uint64_t skip; /* where the range begins in the mapping */
        uint64_t len;
};

/* A range of ours that the peer has mapped. */
struct shm_shown {
        uint32_t id;
        bool hide; /* unmapped here; the peer is yet to be told */
};

struct shm_put {
        struct ae_post post;
        struct ae_net_key key;
        uint64_t src_off, off, note;
        uint64_t emitted; /* bytes in slots so far */
};

/* What a slot of our put ring stands for. */
struct shm_sent {
        bool last; /* of its put */
        uint32_t staged;
};

/* The peer's put that is arriving. */
struct shm_arrival {
        bool open; /* pieces of it have come */
        bool late; /* its grant is revoked: bytes are skipped */
        bool busy; /* desc is being copied */
        struct shm_desc first, desc;
        uint64_t tag;
        uint64_t done; /* bytes of finished pieces */
        struct ae_net_mem *mem;
        uint64_t mem_off;
        char *dst;       /* of the piece */
        const char *src; /* of the piece */
        uint64_t copied; /* of the piece */
};

struct shm_conn {
        struct ae_conn common;
        struct ae_source sock;
        struct ae_source bell; /* the peer rings it */
        int peer_bell;         /* owned; -1: none yet */
        struct shm_region *mine;         /* owned mapping */
        const struct shm_region *theirs; /* owned mapping; NULL until attached */
        int region_fd;                   /* owned, of mine, until passed on */

        /* Private copies of our counters: shared memory is written, never read back. */
        uint64_t msg_tail, put_tail, msg_head, put_head;
        uint64_t peer_msg_head, peer_put_head; /* of our rings; last seen, checked */

        struct shm_put *puts; /* owned; a ring of SHM_PUTS */
        uint64_t puts_done, puts_emitted, puts_end;
        struct shm_sent *sent; /* owned; SHM_DESCS */
        uint64_t stage_head, stage_tail;

        struct shm_shown *shown; /* owned */
        uint32_t n_shown, shown_cap, n_hide;
        struct shm_seen *seen; /* owned */
        uint32_t n_seen, seen_cap;

        struct shm_arrival in;
        char *rx; /* owned; SHM_RX_CAP; messages of this round */
        uint32_t rx_used;
        bool hung_up;           /* the peer has gone; up to hung_up_tail its messages count */
        uint64_t hung_up_tail;
        bool ring; /* the peer has something to see */
};

struct shm_net {
        struct ae_end end;
        uint32_t next_mem_id;
        bool asleep; /* the flags of the regions are set */
};

static inline struct shm_net *shm_net_of(const struct shm_conn *conn)
{
        return ae_container_of(ae_conn_end(&conn->common), struct shm_net, end);
}

static inline struct shm_conn *shm_conn_of(struct ae_net_conn *conn)
{
        return ae_container_of(conn, struct shm_conn, common.base);
}

/* shm-conn.c */
int ae_shm_connect(struct ae_net *net, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn);
int ae_shm_conn_accept(struct shm_net *net, struct ae_guest *guest, const struct ae_hello *hello);
void ae_shm_conn_shut(struct ae_conn *common);
void ae_shm_conn_free(struct ae_conn *common);
/* Checks that the other end of a fresh socket belongs to our user. */
int ae_shm_socket_check(int fd);

/* shm-ctl.c: records and descriptors on the unix socket */
struct sockaddr_un;
int ae_shm_addr_parse(const char *address, struct sockaddr_un *ret_addr, uint32_t *ret_len);
/* Takes @n_fds descriptors along. 0; 1: the socket is full; negative: errno is set. */
int ae_shm_send(int fd, const void *data, size_t len, const int *fds, uint32_t n_fds);
/* @return: bytes; 0 end of file; negative: errno is set. Descriptors are the caller's. */
ssize_t ae_shm_receive(int fd, void *data, size_t len, int ret_fds[2], uint32_t *ret_n_fds);
/* Reads all records of an attached connection. Negative: it broke. */
int ae_shm_ctl_receive(struct shm_conn *conn);
/* 0: the peer knows @mem; 1: not now; 2: it never will, go through the stage; negative: broke. */
int ae_shm_show(struct shm_conn *conn, const struct ae_net_mem *mem);
/* @mem is being unmapped. */
void ae_shm_hide(struct shm_conn *conn, const struct ae_net_mem *mem);
int ae_shm_hide_flush(struct shm_conn *conn);
void ae_shm_forget_seen(struct shm_conn *conn);
/* NULL when the peer has never shown it or has hidden it. */
const struct shm_seen *ae_shm_find_seen(const struct shm_conn *conn, uint32_t id);

/* shm-send.c and shm-recv.c: the rings */
int ae_shm_msg(struct ae_net_conn *base, const void *data, size_t len);
int ae_shm_put(struct ae_net_conn *base, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie);
/* What the peer has finished, and new slots. Negative: the connection broke. */
int ae_shm_progress_send(struct shm_conn *conn);
int ae_shm_progress_receive(struct shm_conn *conn);
void ae_shm_fail_puts(struct shm_conn *conn);
void ae_shm_ring_bell(struct shm_conn *conn);
/* Whether the peer's counters say that there is something to do. */
bool ae_shm_pending(const struct shm_conn *conn);
void ae_shm_revoked(struct ae_conn *common, uint64_t tag);
