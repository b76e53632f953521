/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A daemon for tests of libautoep: one thread that speaks the unix socket and the shared memory of
 * proto/wire/local.h, holds one job, and does what a test says: answers, stays silent, lies, dies.
 * It reduces and optimizes nothing. A failing system call aborts.
 *
 * The bytes of unit u at version v are fake_byte(u, v, offset). A gather that misses is answered
 * from a slot of its own; only fake_publish() publishes entries.
 */
#pragma once

#include "proto/wire/local.h"
#include "proto/wire/model.h"

#include <pthread.h>

#define FAKE_WORKERS_MAX 4

/* Untruths, each told where it says. */
enum fake_lie {
        FAKE_HONEST,
        FAKE_HELLO_MUTE,         /* accepts and never answers */
        FAKE_HELLO_NO_FDS,
        FAKE_HELLO_FRAME_HUGE,   /* a frame header of 4 GiB */
        FAKE_HELLO_JUNK,         /* a frame whose body is no message */
        FAKE_HELLO_NODE,         /* node 5 of 1 */
        FAKE_HELLO_VERSION,
        FAKE_PAGE_MAGIC,
        FAKE_PAGE_SHORT,         /* the memfd is shorter than HelloOk says */
        FAKE_PAGE_UNSEALED,
        FAKE_GRAD_SHORT,         /* page.grad_len is not the ring's */
        FAKE_REGISTERED_NO_MODEL,
        FAKE_REGISTERED_RANK,
        FAKE_PARAMS_MAGIC,
        FAKE_PARAMS_UNITS,       /* n_units is another one */
        FAKE_PARAMS_OFF,         /* cache_off beyond the end */
        FAKE_PARAMS_SLOTS,       /* n_slots beyond the end */
        FAKE_XIN_SLOTS,          /* slot_len beyond the end */
        FAKE_CQE_TOKEN, FAKE_CQE_SLOT, FAKE_CQE_OFF, FAKE_CQE_STATUS,
        FAKE_VERDICT_ROUND, FAKE_VERDICT_KIND,
};

struct fake_config {
        uint32_t world;          /* 0: 1 */
        const char *token;       /* borrowed; NULL: any will do */
        uint64_t hold_len;       /* 0: no limit worth the name */
        uint64_t slot_len;       /* of the exchange; 0: 1024 */
        uint64_t xout_len;       /* 0: 16 slots */
        enum fake_lie lie;
        int register_status;     /* negative: Register is refused with it */
};

/* What the thread does not do for now: it stops in front of such an entry of a queue. */
enum fake_hold {
        FAKE_HOLD_GATHER = 1, FAKE_HOLD_PIECE = 2, FAKE_HOLD_STEP = 4, FAKE_HOLD_XSEND = 8,
        FAKE_HOLD_STATE = 16, /* get, put, pause, leave are not answered */
        FAKE_HOLD_REGISTER = 32, FAKE_HOLD_ALL = 64,
};

/* A piece as it came, with its bytes. */
struct fake_piece {
        struct ae_local_sqe sqe;
        uint8_t *data; /* owned */
};

struct fake_message {
        struct ae_local_sqe sqe;
        bool delivered;
};

/* A connection. Under the daemon's lock, but for the shared memory. */
struct fake_worker {
        uint32_t rank;
        bool reader, registered;
        int socket, bell, worker_bell; /* owned */
        struct ae_local_page *page;
        uint8_t *grad, *xout;
        struct ae_local_xin *xin;
        uint64_t grad_len, xout_len, xin_len;
        uint32_t sq_head;
        struct ae_local_sqe *log;       /* owned; everything that was posted */
        size_t n_log;
        struct fake_piece *pieces;      /* owned */
        size_t n_pieces;
        struct fake_message *sends;     /* owned */
        size_t n_sends;
        uint64_t flow_sent[FAKE_WORKERS_MAX];  /* by source */
        uint64_t flow_acked[FAKE_WORKERS_MAX];
        struct ae_local_step step;
        bool asked;
};

struct fake_daemon {
        struct fake_config config;
        char dir[64], path[128];
        pthread_t thread;
        pthread_mutex_t lock;
        int listener, control_fd;
        _Atomic bool stop;
        _Atomic uint32_t holds;         /* enum fake_hold */
        struct fake_worker workers[FAKE_WORKERS_MAX];
        uint32_t n_workers;
        /* the job */
        struct ae_model *model;         /* owned; rank 0's */
        struct ae_layout *layout;       /* owned */
        uint8_t *init;                  /* owned; rank 0's initial values */
        uint64_t init_len;
        int params_fd;
        uint64_t params_len;
        struct ae_local_params *params;
        _Atomic uint64_t *units;
        struct ae_local_slot *slots;
        uint8_t *cache;
        uint64_t cell_len;              /* of a slot in the cache */
        uint32_t pins[256];             /* by slot */
        int64_t unpins;
        uint32_t n_gathers;             /* answered */
        /* the next verdict */
        enum ae_verdict_kind verdict_kind;
        struct ae_wire_bad bad;
        /* state */
        int state_status;               /* negative: get and put are refused with it */
        uint8_t *put;                   /* owned; what the last put brought */
        uint64_t put_len;
};

struct fake_daemon *fake_daemon_start(const struct fake_config *config);
void fake_daemon_stop(struct fake_daemon *daemon);

static inline uint8_t fake_byte(uint32_t unit, uint64_t version, uint64_t off)
{
        return (uint8_t)(unit * 31 + version * 7 + off % 251 + 1);
}

/* Publishes @unit at @version; its slot of before is overwritten if nobody holds it. */
void fake_publish(struct fake_daemon *daemon, uint32_t unit, uint64_t version);
/* Takes the entry away and overwrites its slot as soon as nobody holds it; false: somebody does. */
bool fake_withdraw(struct fake_daemon *daemon, uint32_t unit);
void fake_set_version(struct fake_daemon *daemon, uint64_t version);
/* Holds in all pages on all slots. */
uint32_t fake_n_holds(struct fake_daemon *daemon);

/* Replaces the set of held things (enum fake_hold) and makes the thread look again. */
void fake_set_holds(struct fake_daemon *daemon, uint32_t holds);
/* Returns when the thread has read everything that the workers have posted and that isn't held;
 * orders what the test and the thread do before and after it, as the thread sanitizer sees it. */
void fake_sync(struct fake_daemon *daemon);
void fake_fail_job(struct fake_daemon *daemon, int status, const char *why);
/* The next verdict; afterwards rounds are applied again. @bad may be NULL. */
void fake_set_verdict(struct fake_daemon *daemon, enum ae_verdict_kind kind,
                      const struct ae_wire_bad *bad);
/* Negative: get and put are refused with it. */
void fake_set_state_status(struct fake_daemon *daemon, int status);
/* A pause of @ns that is over, or that lasts so long from now on. */
void fake_grow_pause(struct fake_daemon *daemon, uint64_t ns);
void fake_begin_pause(struct fake_daemon *daemon, uint64_t ns);
/* Closes all connections, as a daemon that was killed. */
void fake_hang_up(struct fake_daemon *daemon);
/* Writes bytes to every socket. */
void fake_send_raw(struct fake_daemon *daemon, const void *data, size_t len);
