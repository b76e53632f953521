/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The handle: what one process has of one job. Parts that any thread may use at the same time are
 * atomic or guarded by .lock, as noted; everything else is fixed once autoep_register() has opened
 * the gate, or belongs to the one thread that may be in the calls "for one thread at a time".
 *
 * No thread of its own. Calls that wait share the work, see pump.h.
 */
#pragma once

#include "client/autoep.h"
#include "client/map.h"
#include "client/ring.h"
#include "proto/base/list.h"
#include "proto/wire/group.h"
#include "proto/wire/local.h"
#include "proto/wire/model.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

/* What calls get past ae_handle_enter(). Written under .lock with release, read with acquire. */
enum ae_gate {
        AE_GATE_LIVE = 0, /* the model is committed */
        AE_GATE_NEW = 1,  /* connected */
        AE_GATE_LOST = 2, /* the daemon is gone or broke the protocol: broken_status, broken_text */
        AE_GATE_LEFT = 3, /* autoep_leave() */
};

struct ae_holds;    /* holds.h */
struct ae_requests; /* queue.h */
struct ae_plan;     /* plan.h */
struct ae_flows;    /* exchange.c */

/* One frame that is being received. */
struct ae_session_in {
        uint8_t head[8];
        size_t have;   /* bytes of head and body */
        uint32_t len;  /* of the body, once the head is there */
        uint16_t type;
        uint8_t *body; /* owned */
        int fds[AE_CONTROL_FDS_MAX]; /* owned */
        uint32_t n_fds;
};

struct ae_counters {
        _Atomic uint64_t gathers, gather_hits, gather_len, gather_wait_ns;
        _Atomic uint64_t scatters, scatter_len, scatter_wait_ns;
        _Atomic uint64_t exchanges, exchange_len, exchange_wait_ns;
        _Atomic uint64_t steps, step_wait_ns;
};

struct autoep {
        uint32_t generation;    /* of the process, see ae_handle_generation */
        _Atomic uint32_t gate;  /* enum ae_gate */
        struct ae_list link;    /* in the list of all handles */

        /* fixed by autoep_open() */
        uint32_t rank, world, node, n_nodes; /* a reader: rank AUTOEP_NONE; world by register */
        bool reader;
        int timeout_ms;
        char *job;              /* owned */
        char transport[16];
        int socket;             /* owned */
        int bell;               /* owned; rings the daemon, and hears it ring */
        int kick;               /* owned eventfd; our threads wake the one that leads */
        struct ae_map page_map, grad_map;
        struct ae_local_page *page; /* borrowed from page_map; NULL before hello is answered */

        /* fixed by autoep_register() */
        struct ae_map params_map, xout_map, xin_map;
        struct ae_local_params *params; /* read-only memory; NULL before registration */
        _Atomic uint64_t *units;        /* entries, params.n_units, read-only */
        const struct ae_local_slot *slots;
        uint32_t n_slots;
        const uint8_t *cache;
        uint64_t cache_len;
        uint64_t hold_len;
        struct ae_model *model;         /* owned, as rank 0 registered it */
        struct ae_layout *layout;       /* owned */
        struct ae_group_topology topology; /* a reader: of the world it looks at */
        uint32_t *rank_node;            /* owned; world of them */
        uint64_t n_counts;              /* elements of all buffers */
        uint32_t n_groups;              /* optimizer groups that dense tensors and experts name */
        bool register_cut;              /* a registration ended without its answer */

        /* owned parts */
        struct ae_holds *holds;
        struct ae_requests *requests;
        struct ae_plan *plans;          /* one per unit */
        struct ae_flows *flows;
        struct ae_counters counters;

        /* submission queue; any thread, under sq_lock */
        atomic_flag sq_lock;
        uint32_t sq_tail;

        /* scattering; the thread that has the ticket */
        _Atomic uint32_t scatter_ticket; /* 1: taken */
        _Atomic uint32_t n_ticket_waits; /* threads that wait for it */
        struct ae_ring grad;

        /* the round; the thread in scatter, micro_batch_end or step */
        _Atomic uint32_t micro;       /* micro-batches ended in this round */
        _Atomic bool micro_open;      /* something was scattered since the last end */
        _Atomic bool asked;           /* the step request is posted and its verdict not yet taken */
        uint64_t asked_round;
        _Atomic bool refused;         /* the round can only be asked for again */

        /* waiting, sockets and completions; under lock */
        pthread_mutex_t lock;
        pthread_cond_t wake;          /* CLOCK_MONOTONIC */
        struct ae_list waiters;       /* struct ae_wait */
        struct ae_list replies;       /* struct ae_session_reply */
        _Atomic uint32_t n_waiting;   /* length of waiters, read without the lock */
        bool pumping;                 /* a thread sleeps in ppoll for all */
        uint32_t cq_head;
        uint64_t next_id;
        struct ae_session_in in;
        int broken_status;
        char broken_text[768];
        pthread_mutex_t send_lock;    /* one frame at a time */
};

/* Counts forks: the child's number differs from that of each handle that it inherited. */
extern _Atomic uint32_t ae_handle_generation;

/* 0 when calls may pass; else the reason as an error. */
int ae_handle_enter_slow(const struct autoep *handle);
static inline int ae_handle_enter(const struct autoep *handle)
{
        if (handle &&
            handle->generation == atomic_load_explicit(&ae_handle_generation,
                                                       memory_order_relaxed) &&
            atomic_load_explicit(&handle->gate, memory_order_acquire) == AE_GATE_LIVE)
                return 0;
        return ae_handle_enter_slow(handle);
}
/* Whether the daemon is gone, in the process that opened the handle; NULL is not. */
bool ae_handle_is_lost(const struct autoep *handle);
/* The same as enter, for ranks of a job that has not failed: @what a reader doesn't do. */
int ae_handle_enter_rank(struct autoep *handle, const char *what);

/* The open round, for texts; 0 before registration. */
uint64_t ae_handle_round(const struct autoep *handle);
/* A unit's name; "?" when there is none of that number. */
const char *ae_handle_unit_name(const struct autoep *handle, uint32_t unit);
const char *ae_handle_tensor_name(const struct autoep *handle, uint32_t tensor);
/* AE_ENOENT unless there is a unit, a tensor of that number. */
int ae_handle_check_unit(const struct autoep *handle, uint32_t unit);
int ae_handle_check_tensor(const struct autoep *handle, uint32_t tensor);

static inline void ae_count(_Atomic uint64_t *counter, uint64_t n)
{
        atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}
