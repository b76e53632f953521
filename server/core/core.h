/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core of a daemon: what it decides, as state machines without sockets, clocks or threads.
 * Events are the functions below; actions go out through struct ae_core_ops. One thread calls it.
 * The server runs it on libuv and a transport (server/node.c), the simulator on a virtual network
 * and clock. The core writes the shared pages of its workers, but never the tensors: those are
 * touched by tasks alone.
 *
 * The decider is the lowest node of the peer list. It forms jobs and turns votes into verdicts.
 */
#pragma once

#include "proto/base/list.h"
#include "proto/net/net.h"
#include "proto/wire/control.h"
#include "proto/wire/local.h"
#include "proto/wire/model.h"
#include "proto/wire/wire.h"

#include <stdbool.h>
#include <stdint.h>

struct ae_core;
struct ae_job;
struct ae_worker;
struct ae_task;

/* Memory that the executor made. Base addresses stay while the region lives. */
struct ae_region {
        char *base;             /* first byte */
        uint64_t len;
        int fd;                 /* memfd, -1: private */
        int fd_ro;              /* the same, opened read-only; -1: others may write it */
        struct ae_net_mem *mem; /* mapped with the transport; NULL: never leaves the node */
};

struct ae_region_spec {
        const char *name;  /* memfd name, for /proc */
        uint64_t len;
        bool shared;       /* a memfd, to be passed to a worker or kept over a restart */
        bool read_only;    /* shared, and nobody else may write it: it has fd_ro */
        bool net;          /* source or target of puts */
        bool data;         /* tensor bytes: a simulator without data reserves addresses only */
};

struct ae_core_ops {
        /* Sends a msg; the executor queues under back-pressure. Bytes are copied. */
        void (*msg)(void *user, uint32_t node, const void *data, size_t len);
        /* Puts; queued likewise; ends in ae_core_put_done() with the cookie. */
        void (*put)(void *user, uint32_t node, const struct ae_net_key *key, uint64_t off,
                    struct ae_region *src, uint64_t src_off, uint64_t len, uint64_t note,
                    uint64_t cookie);
        int (*grant)(void *user, uint32_t node, struct ae_region *region, uint64_t off,
                     uint64_t len, struct ae_net_key *ret_key);
        void (*revoke)(void *user, uint32_t node, const struct ae_net_key *key);
        /* Runs a task, later, anywhere; ends in ae_core_task_done(). */
        void (*task)(void *user, struct ae_task *task);
        int (*region_new)(void *user, const struct ae_region_spec *spec, struct ae_region **ret);
        void (*region_free)(void *user, struct ae_region *region);
        /* A control message to a worker's session, with descriptors (borrowed). */
        void (*worker_send)(void *user, struct ae_worker *worker, uint32_t type,
                            const ProtobufCMessage *message, const int *fds, size_t n_fds);
        /* A worker may be asleep: look at its page and wake it. */
        void (*worker_wake)(void *user, struct ae_worker *worker);
        void (*log)(void *user, int level, const char *text);
};

struct ae_core_options {
        uint32_t node, n_nodes;
        uint64_t incarnation;
        uint64_t memory_len;     /* most bytes for all jobs together */
        uint32_t n_undo;         /* compute threads, each with an undo record */
        const char *transport;   /* name, for workers; borrowed for life */
        const struct ae_core_ops *ops; /* borrowed for life */
        void *user;
};

int ae_core_new(const struct ae_core_options *options, struct ae_core **ret_core);
struct ae_core *ae_core_free(struct ae_core *core);

/* ---- events: network -------------------------------------------------------------------- */

void ae_core_peer_up(struct ae_core *core, uint32_t node, uint64_t incarnation);
/* Jobs that need this node fail; @text says why it is gone. */
void ae_core_peer_down(struct ae_core *core, uint32_t node, const char *text);
/* Why a peer that is not up yet is not, for texts; NULL clears. Copied. */
void ae_core_peer_note(struct ae_core *core, uint32_t node, const char *text);
/* A negative return means that the peer broke the protocol: the executor closes the connection. */
int ae_core_msg(struct ae_core *core, uint32_t node, const void *data, size_t len);
void ae_core_notify(struct ae_core *core, uint32_t node, struct ae_net_mem *mem, uint64_t off,
                    uint64_t len, uint64_t note);
void ae_core_put_done(struct ae_core *core, uint64_t cookie, int status);
void ae_core_task_done(struct ae_core *core, struct ae_task *task);

/* @now_ns: monotonic; called about every 20 ms and whenever a deadline may have passed. */
void ae_core_tick(struct ae_core *core, uint64_t now_ns);

/* ---- events: workers -------------------------------------------------------------------- */

struct ae_worker_spec {
        const Autoep__Hello *hello; /* borrowed during the call */
        int32_t pid;
        uint32_t uid;
        void *session;              /* the executor's */
};

/* Hello: checks and, when it is fit, makes the worker's pages. The answer (HELLO_OK or ERROR) goes
 * out through worker_send once the decider has agreed. */
int ae_core_worker_new(struct ae_core *core, const struct ae_worker_spec *spec,
                       struct ae_worker **ret_worker);
/* @bell: the worker's end of its bell, the executor's, which stays as long as the worker; -1 where
 * no process listens. Then the rank joins. */
void ae_core_worker_attach(struct ae_worker *worker, int bell);
/* A control message of the worker; takes @message over. @fd: the descriptor that came with it or
 * -1, taken over too. Negative: the worker broke the protocol. */
int ae_core_worker_message(struct ae_worker *worker, uint32_t type, ProtobufCMessage *message,
                           int fd);
/* Drains its submission ring. Negative: it wrote nonsense; the executor ends the session. */
int ae_core_worker_ring(struct ae_worker *worker);
/* Whether its submission ring holds entries that the core would take now: those posted while a put
 * is decided stay there. The executor looks before it sleeps, and drains the ring again. */
bool ae_core_worker_pending(const struct ae_worker *worker);
/* Session over. Without a LEAVE before it the rank is lost. @text: why. Frees the worker. */
void ae_core_worker_gone(struct ae_worker *worker, const char *text);
void *ae_core_worker_session(const struct ae_worker *worker);
struct ae_region *ae_core_worker_page(const struct ae_worker *worker);

/* ---- looking inside --------------------------------------------------------------------- */

struct ae_core_stats {
        uint64_t msgs_sent, msgs_received; /* without those to itself */
        uint64_t puts_sent, put_bytes_sent;
        uint64_t memory_len;               /* bytes of all regions, planned */
        /* Bytes of the core's own tables, layouts and pools; without models and what a get, a put
         * or a message kept for later takes for a while. */
        uint64_t tables_len;
};
void ae_core_stats(const struct ae_core *core, struct ae_core_stats *ret_stats);
