/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core's own structures, shared by its files and by nobody else: a job on this node, its
 * workers, its peers. Owned by the core's thread. Which file moves what:
 *
 *   core.c    entry of events, loopback of messages to oneself, task pool
 *   early.c   what came before its time
 *   form.c    ranks join                      start.c  from Start to a live job
 *   life.c    states of a job, failing, leaving, freeing
 *   memory.c  the regions of a job, its budget, grants
 *   ring.c    a worker's submission ring
 *   cache.c   gather: the node's cache        serve.c  gather: the owner's side
 *   fold.c    scatter: this node's sums       owner.c  scatter: the owner's sums
 *   round.c   end, vote, verdict              apply.c  optimizer after a verdict
 *   wait.c    who is waited for, in words check.c   what a peer may say
 *   flow.c    exchange between workers        order.c  order of a group's collectives
 *   state.c   get and put: entry, staging     get.c, put.c  each of them
 *
 * Below these and without a job: extent.c (allocation of ranges), shard.c (the shard's format, its
 * undo records, the optimizer over it), task.c (what compute threads run).
 */
#pragma once

#include "proto/base/pool.h"
#include "proto/wire/group.h"
#include "server/core/core.h"
#include "server/core/extent.h"
#include "server/core/shard.h"
#include "server/core/task.h"

#define AE_LANE_DONE UINT32_MAX /* lane_micro of a lane that has nothing more in the round */

/* ---- sums ------------------------------------------------------------------------------- */

/* A sum group: consecutive ranks of one node, first summed among themselves. */
struct ae_sum_group {
        uint32_t node;
        uint32_t local;      /* its index among the groups of its node */
        uint32_t first_rank; /* the lowest */
        uint32_t n_ranks;
        uint32_t *ranks;     /* owned; ascending */
};

enum ae_piece_state {
        AE_PIECE_RING,
        AE_PIECE_MOVING,
        AE_PIECE_OVERFLOW,
        AE_PIECE_FOLDING,
        AE_PIECE_N_STATES
};

/* A piece of a gradient that waits for its turn or is being folded. */
struct ae_piece {
        struct ae_list link;      /* in its cell's pending list or in a fold */
        struct ae_worker *worker; /* borrowed */
        struct ae_cell *cell;     /* borrowed */
        enum ae_piece_state state;
        uint32_t unit, micro, lane;
        uint32_t dtype;
        uint64_t first, n;        /* elements of the unit's gradient image */
        const char *data;         /* in the worker's ring or in overflow */
        uint64_t ring_pos;        /* absolute */
        uint32_t len;
        bool in_ring;             /* its ring bytes are not free yet */
        bool in_order;            /* its worker's order still names it */
        bool done;                /* folded or dropped; freed once out of the order */
};

/* At most AE_LOCAL_PIECE_N elements of a unit's gradient image, as summed by one group. */
struct ae_cell {
        struct ae_list pending; /* struct ae_piece by (micro, lane) */
        struct ae_list folding; /* those of the running fold, in its order */
        struct ae_sum *sum;     /* borrowed */
        uint32_t index;
        bool busy;              /* a fold runs on it */
        bool started;           /* the accumulator holds this round's sum */
};

/* One unit's sum in one local group. */
struct ae_sum {
        struct ae_job *job;
        uint32_t group;          /* local index */
        uint32_t unit;
        uint32_t n_lanes, n_uses;
        uint32_t *lane_micro;    /* owned; per lane: micro-batches before it are settled */
        uint32_t n_open;         /* lanes that are not AE_LANE_DONE */
        struct ae_cell *cells;   /* owned */
        uint32_t n_cells;
        uint32_t n_pending;      /* pieces not folded yet, over all cells */
        bool any;                /* somebody scattered */
        bool final;              /* no more pieces this round */
        bool queued;             /* its parts are on their way to the owners */
};

/* Where one part of a slice stands at its owner. */
struct ae_part {
        uint16_t next;      /* first global group that is not settled */
        bool busy, started, complete;
};

/* What lies in one of a sender's slots here until it is folded. */
struct ae_arrival {
        const struct ae_part *part; /* borrowed; NULL: nothing */
        uint32_t group;             /* global */
};

/* A slice that this node owns. */
struct ae_owned {
        struct ae_job *job;
        uint32_t slice;          /* layout index */
        uint32_t unit;
        bool trainable;
        uint64_t content;        /* version at which its bytes last changed */
        bool ready;              /* not being changed */
        uint32_t n_puts;         /* posted from its weights and not done */
        uint32_t n_tasks;        /* apply tasks that touch it and are not done */
        struct ae_list waiting;  /* struct ae_serve: wanted when it is ready */
        struct ae_part *parts;   /* owned; trainable only */
        uint32_t n_parts;
        uint32_t n_incomplete;
};

/* A slice that a requester wants. */
struct ae_serve {
        struct ae_list link;
        struct ae_owned *owned;
        uint32_t node;
        struct ae_wire_want_item item;
        uint64_t version;
};

/* A part on its way to an owner that has no free slot, or being narrowed. */
struct ae_send {
        struct ae_list link;
        struct ae_job *job;
        uint32_t group;  /* local */
        uint32_t slice;
        uint32_t part;   /* next to send */
        uint32_t slot;   /* NARROW under way: its slot */
};

/* ---- cache ------------------------------------------------------------------------------ */

enum ae_slot_state {
        AE_SLOT_FREE,
        AE_SLOT_FILLING,
        AE_SLOT_PUBLISHED,
        AE_SLOT_RETIRED,
        AE_SLOT_N_STATES
};

struct ae_cache_slot {
        enum ae_slot_state state;
        uint32_t unit;       /* AE_WIRE_NONE: a range */
        uint32_t n_pins;     /* answered requests that have not unpinned */
        uint64_t off, len;
        uint64_t content;    /* version of its bytes */
        bool whole;          /* frozen segments are in it, as they are now */
};

struct ae_waiter {
        struct ae_list link;
        struct ae_worker *worker;
        uint64_t token;
        uint32_t unit;           /* of a range that could not begin for want of room: */
        uint64_t first, len;
};

struct ae_fetch {
        bool used;
        uint32_t unit, slot;
        bool range;
        uint64_t first, len;     /* bytes of the unit's image */
        uint64_t content;        /* expected version of the slices */
        uint32_t n_left;         /* slices not here yet */
        bool mixed;              /* some came at another version */
        uint32_t first_slice;    /* of those that it waits for */
        uint64_t arrived;        /* a range's: bit k, slice first_slice + k is here; for k < 64 */
        struct ae_list waiters;  /* struct ae_waiter */
};

struct ae_cache_unit {
        uint32_t slot;       /* published or filling; AE_LOCAL_SLOT_NONE */
        uint32_t fetch;      /* AE_WIRE_NONE */
        uint64_t content;    /* version at which the unit last changed */
        bool frozen;         /* all its segments are */
        bool wanted;         /* a fetch could not begin for want of room */
        uint64_t n_misses;   /* gathers that asked for it */
        struct ae_list waiters; /* of a fetch that could not begin */
};

/* ---- peers and workers ------------------------------------------------------------------ */

struct ae_job_peer {
        bool granted;                /* its Grants came */
        bool ready, prepared, voted, ended; /* decider and round */
        struct ae_net_key cache, inbox;
        uint32_t n_ranks;            /* of the job on that node */
        struct ae_net_key *xin;      /* owned; one per such rank */
        bool own;                    /* we granted it: */
        struct ae_net_key own_cache, own_inbox;
        struct ae_net_key *own_xin;  /* owned; one per local rank */
        /* as sender of parts to it */
        uint32_t *free_slots;        /* owned stack */
        uint32_t n_free;
        struct ae_list sends;        /* struct ae_send */
        /* as owner, what it asked for that cannot be read yet */
        uint64_t n_serves;           /* slices it wants, in those's lists */
        uint64_t deferred_len;       /* bytes of its fetches of state */
        /* as owner of parts from it */
        struct ae_arrival *arrived;  /* owned; per slot */
        uint32_t *credit;            /* owned; slots to give back */
        uint32_t n_credit;
        uint32_t n_held;             /* slots whose parts are not folded yet */
        uint8_t *scattered;          /* owned; its END bitmap of the round */
        uint32_t *groups;            /* borrowed from the job's group_index */
        uint32_t n_groups;           /* sum groups it has */
        struct ae_wire_vote *vote;   /* owned; decider */
        size_t vote_len;
        struct ae_list unsent;       /* in the job's: its wants or credits may have to be sent */
        struct ae_wire_want *want;   /* owned; being filled */
        uint32_t cap_wants;
};

struct ae_flow_out { /* from a local rank to any */
        uint64_t sent, consumed;
        struct ae_list pending; /* struct ae_flow_msg */
};

/* What a local rank sends. It outlives the rank's leave: others may wait for its last messages. */
struct ae_outbox {
        struct ae_job *job;
        struct ae_worker *worker; /* borrowed; NULL: it has left */
        uint32_t rank;
        struct ae_region *xout, *xin; /* borrowed; buried in the job when the rank is gone */
        struct ae_flow_out *flows;  /* owned; per rank of the world */
        struct ae_list order;       /* struct ae_flow_msg by ring position */
        uint64_t free;              /* absolute ring position */
};

struct ae_flow_msg {
        struct ae_list link;      /* in its flow's pending list */
        struct ae_outbox *outbox; /* borrowed */
        uint32_t dst;             /* rank */
        uint64_t pos;
        uint32_t len;
        uint64_t seq;
        bool done;
        struct ae_list order; /* among the outbox's, for freeing its ring in order */
};

struct ae_worker {
        struct ae_list link;      /* core's list */
        struct ae_core *core;
        struct ae_job *job;       /* borrowed; NULL after failing to join */
        void *session;            /* the executor's */
        bool reader, joined, asked, registered, left, dead; /* asked: Register not answered */
        uint32_t rank, local;     /* local: index among the node's ranks */
        uint32_t group, lane0;    /* its sum group (local) and place in it */
        int32_t pid;
        uint32_t uid;
        uint64_t incarnation;
        uint64_t hold_len;
        struct ae_region *page, *grad, *xout, *xin;
        int bell;                 /* executor's: the worker's end */
        struct ae_model *model;   /* owned; what it registered */
        struct ae_region *init;   /* owned; initial values */
        uint32_t sq_head, cq_tail;
        bool told;                /* its page says what it waits for */
        bool closed;              /* asked for the step in this round */
        uint32_t micro;           /* in which micro-batch it is */
        uint32_t n_waiting;       /* gathers not answered */
        uint32_t *pins;           /* owned; per slot: its share of the slot's n_pins */
        uint32_t n_pins;          /* their sum */
        uint64_t grad_free, grad_head; /* absolute ring positions: free before, written before */
        struct ae_piece **order;  /* owned ring: pieces in ring order */
        uint32_t order_head, order_tail, order_cap;
        struct ae_local_step *step; /* owned copy of the request */
        struct ae_outbox *outbox;   /* borrowed from the job */
        uint64_t *flow_in;          /* owned; per source rank: next sequence number expected */
        uint64_t *flow_acked;       /* owned; likewise: how many it has consumed */
        bool leaving;               /* its leave waits for entries that wait for a put */
        uint64_t leave_id;
};

/* Ranks as the decider sees them while a job forms. */
struct ae_member {
        bool joined, left, closed;
        uint32_t node;
        int32_t pid;
        uint64_t incarnation;
        uint64_t pause_until_ns; /* on all nodes, as the next; 0: it has not announced a pause */
        char *pause_why;         /* owned; of its last pause */
};

/* Most bytes of a peer's fetches of state that wait, but for one that is larger alone. */
#define AE_DEFERRED_MAX (8 * AE_MIB)

/* Most bytes that are kept of one peer: its Grants; of the next round END, VOTE, CLOSED, parts. */
#define AE_EARLY_MAX (8 * AE_MIB)

/* What came before its time: a peer that heard of Start or Commit before us. */
struct ae_early {
        struct ae_list link;
        uint32_t node;
        uint32_t job;       /* id */
        bool notify;        /* a put's note; otherwise a msg in data */
        uint64_t note, off, put_len;
        size_t len;
        char data[];
};

struct ae_ahead {
        struct ae_list list; /* struct ae_early */
        uint64_t *lens;      /* owned; per node */
        uint32_t n_nodes;
};

enum ae_job_state {
        AE_JOB_FORMING,  /* ranks join, rank 0 offers a model */
        AE_JOB_STARTING, /* memory, grants, ready */
        AE_JOB_LOADING,  /* initial values on their way */
        AE_JOB_LIVE,
        AE_JOB_FAILED,
        AE_JOB_ENDED,
        AE_JOB_N_STATES
};

enum ae_round_state {
        AE_ROUND_OPEN,     /* ranks scatter and close */
        AE_ROUND_ENDED,    /* END sent */
        AE_ROUND_VOTED,
        AE_ROUND_PREPARED, /* verdict noted */
        AE_ROUND_N_STATES
};

/* A put that passes through this node, as requester or as owner. */
struct ae_stage {
        struct ae_list link;
        uint64_t put_id;
        uint32_t node;             /* whose put */
        struct ae_region *region;  /* owned: the bytes */
        Autoep__Stage *message;    /* owned: the items */
        struct ae_net_key key;     /* what the requester was granted */
        bool granted;
        uint64_t n_left;           /* items whose bytes have not come */
        bool committed;            /* being written: */
        size_t item;               /* the item at work, */
        uint64_t item_n;           /* how many of its elements are in place, */
        uint64_t off;              /* and the byte of the region that comes next */
};

struct ae_request; /* state.c: a get or put of a local worker */

struct ae_job {
        struct ae_list link; /* core's list */
        struct ae_core *core;
        char *name, *token;  /* owned */
        uint32_t uid;
        uint32_t id;         /* decider's number; AE_WIRE_NONE until known */
        enum ae_job_state state;
        int fail_status;
        char why[AE_WIRE_TEXT * 2];
        uint32_t world;
        uint64_t epoch, round, version;
        uint32_t n_tasks_out, n_puts_out; /* in the executor's hands; freed only without */
        bool released;       /* to be freed as soon as they are done */
        bool committed;      /* initial values are in place */

        /* decider */
        struct ae_member *members; /* owned; per rank */
        uint32_t n_joined, n_ready, n_votes, n_prepared, n_left;
        struct ae_model *offer;    /* owned */
        bool deciding;             /* a verdict is on its way */
        uint16_t decision;         /* its number */
        uint64_t closed_since_ns;  /* first rank closed the round; 0: none */
        uint64_t waiting_sent_ns;
        uint64_t pause_ns;         /* by which deadlines have grown in this epoch */
        uint32_t n_present;        /* other nodes: the decider's last word; AE_WIRE_NONE: none */

        /* from Start on */
        struct ae_model *model;    /* owned */
        struct ae_layout *layout;  /* owned */
        struct ae_group_topology topology;
        struct ae_order *orders;   /* owned; of collectives, see order.c */
        uint32_t *rank_node;       /* owned */
        uint32_t *rank_local;      /* owned; index among its node's ranks */
        struct ae_sum_group *groups; /* owned; in order of first rank */
        uint32_t n_groups;
        uint32_t *group_index;     /* owned; global indices, node after node */
        const uint32_t *local_groups; /* borrowed from it; this node's */
        uint32_t n_local_groups;
        uint32_t n_local;          /* ranks of this node */
        uint32_t n_granted;        /* peers whose Grants came */
        struct ae_worker **locals; /* owned array; by local index; NULL when gone */
        struct ae_outbox **outboxes; /* owned, and each; likewise, but kept when gone */
        uint32_t *n_uses;          /* owned; per unit */
        struct ae_job_peer *peers; /* owned; per node */
        struct ae_list unsent;     /* struct ae_job_peer */

        /* memory */
        struct ae_region **buried; /* owned array: regions of ranks that are gone */
        uint32_t n_buried;
        struct ae_region *params, *shard_region, *acc, *total, *inbox, *overflow, *out;
        struct ae_local_params *page; /* in params */
        _Atomic uint64_t *entries;
        struct ae_local_slot *slot_table;
        struct ae_shard shard;
        uint64_t memory_len;
        uint64_t slot_len;
        uint32_t part_n;           /* elements of a part */
        struct ae_extents overflow_free, cache_free;

        /* sums */
        struct ae_sum *sums;       /* owned; local group major, then unit */
        uint32_t n_closed;         /* local ranks that asked for the step */
        struct ae_owned *owned;    /* owned; by layout order */
        uint32_t n_owned;
        uint64_t serves_max;       /* most slices of ours that a peer may wait for */
        uint32_t *owned_of_slice;  /* owned; AE_WIRE_NONE: not ours */
        uint32_t *owned_of_unit;   /* owned; where each unit's begin in owned, and their end */
        uint32_t n_incomplete;     /* parts */
        struct ae_longacc norm2;   /* of the complete ones */
        bool infinite;             /* one of them holds a NaN or Inf */
        enum ae_round_state round_state;
        bool kept; /* REFUSED, a put: sums and micro-batches stay for the next round */
        uint32_t n_ended;          /* nodes whose END came */
        struct ae_wire_bad bad;    /* first trouble seen on this node in the round */
        bool redo;                 /* overflow was full: why in bad.text */
        struct ae_wire_verdict verdict; /* noted */
        uint16_t noted;            /* number of that decision */
        uint64_t *counts;          /* owned; of the verdict */
        uint32_t n_counts, n_buffer_counts;
        struct ae_wire_end *end;         /* owned; being sent */
        struct ae_wire_vote *vote;       /* owned; likewise */
        struct ae_wire_prepare *prepare; /* owned; decider */
        bool *updated;             /* owned; per unit: its bytes changed in the last commit */
        bool *stepped;             /* owned; per unit: somebody scattered it */
        uint64_t *steps;           /* owned; optimizer steps per tensor */
        struct ae_adamw *adamw;    /* owned; per tensor */
        struct ae_sgd *sgd;
        bool *absent;
        struct ae_apply_run *runs; /* owned; all trainable runs of the shard, in order */
        uint32_t n_runs;
        struct ae_apply_run *step_runs; /* owned; those of the running step */
        uint32_t n_applying;       /* apply tasks, and a put's writing, not done */
        struct ae_ahead early;     /* of the next round */
        struct ae_list applies;    /* apply tasks that wait for puts */
        struct ae_list deferred;   /* fetches of state that wait for it */

        /* cache */
        struct ae_cache_slot *slots;   /* owned */
        uint32_t n_slots;
        uint32_t n_retired;            /* slots that may become free */
        uint32_t slot_hint, fetch_hint; /* none before it is free */
        struct ae_cache_unit *units;   /* owned */
        uint8_t *here;                 /* owned bitmap; per slice: arrived for its unit's fetch */
        struct ae_fetch *fetches;      /* owned */
        uint32_t n_fetches;
        uint32_t *order;               /* owned; units in order of use in the last round */
        uint32_t n_order, cap_order;
        uint32_t *next_order;          /* owned; of this round, being learnt */
        uint32_t n_next;
        struct ae_list ranges;         /* struct ae_waiter: ranges that wait for room */
        bool starved;                  /* somebody waits for room */

        /* state from outside */
        struct ae_list stages;    /* struct ae_stage */
        struct ae_list requests;  /* struct ae_request */
        bool put_prepared;        /* STEPs wait until it commits or is called off */
        bool owes_prepared;       /* the decider hears of it when the last apply is through */
        uint64_t put_id, put_node;/* of the put being decided (decider) */
};

struct ae_core {
        struct ae_core_options options;
        struct ae_list jobs;      /* struct ae_job */
        struct ae_list workers;   /* struct ae_worker without a job or with */
        struct ae_list loop, loop_free; /* messages to oneself, FIFO */
        bool settling;
        struct ae_peer {
                bool up;
                uint64_t incarnation;
                char note[AE_WIRE_TEXT];
                /* a control message that comes in pieces: */
                char *data;       /* owned; its head and what is here of it */
                size_t len, cap;
                uint64_t n_left;  /* bytes still to come; 0: none is under way */
        } *peers;                 /* owned; per node */
        struct ae_pool tasks, cookies, pieces, sends, serves, waiters, flow_msgs;
        struct ae_ahead early;    /* for jobs that have not started here yet */
        uint64_t now_ns;
        uint32_t next_job;
        uint64_t memory_len;      /* of all jobs */
        size_t tables_len;        /* of all tables, see ae_table_new() */
        uint32_t next_token;
        struct ae_core_stats stats;
};

/* ---- early.c ---------------------------------------------------------------------------- */

void ae_ahead_init(struct ae_ahead *ahead, uint32_t n_nodes);
void ae_ahead_deinit(struct ae_ahead *ahead);
/* Keeps a msg or a note for later. AE_EPROTO when there is too much of that node. */
int ae_early_msg(struct ae_ahead *ahead, uint32_t job, uint32_t node, const void *data,
                 size_t len);
int ae_early_note(struct ae_ahead *ahead, uint32_t node, uint64_t note, uint64_t off,
                  uint64_t len);
/* Moves what is for @job to @taken, the caller's to free. */
void ae_early_take(struct ae_ahead *ahead, uint32_t job, struct ae_list *taken);
void ae_early_drop(struct ae_ahead *ahead, uint32_t node);

/* ---- core.c ----------------------------------------------------------------------------- */

/* Works off messages to oneself and sends what was collected; at the end of every event. */
void ae_core_settle(struct ae_core *core);
bool ae_core_is_decider(const struct ae_core *core);
void ae_core_log(struct ae_core *core, int level, const char *format, ...)
        __attribute__((format(printf, 3, 4)));
/* To a node, the own one included. */
void ae_job_msg(struct ae_job *job, uint32_t node, const void *data, size_t len);
/* Wants or credits for it are to be sent at the end of the event. */
void ae_job_unsent(struct ae_job *job, uint32_t node);
void ae_job_msg_all(struct ae_job *job, const void *data, size_t len);
void ae_core_control(struct ae_core *core, uint32_t node, uint32_t job_id, uint32_t type,
                     const ProtobufCMessage *message);
void ae_job_control(struct ae_job *job, uint32_t node, uint32_t type,
                    const ProtobufCMessage *message);
struct ae_wire_head ae_job_head(const struct ae_job *job, enum ae_wire_op op);
struct ae_job *ae_core_job(struct ae_core *core, uint32_t id);
struct ae_job *ae_core_job_named(struct ae_core *core, const char *name);

/* A task from the pool; never NULL. Returns to the pool after its done(). */
struct ae_task *ae_job_task(struct ae_job *job, enum ae_task_kind kind,
                            void (*done)(struct ae_task *task), void *owner);
void ae_job_run(struct ae_task *task);

void ae_worker_error(struct ae_worker *worker, uint64_t id, int status, const char *text);
void ae_worker_wake(struct ae_worker *worker);
void ae_worker_drop_init(struct ae_worker *worker); /* its initial values; life.c */
/* What came early for a job, played back in its order. */
void ae_early_play(struct ae_core *core, struct ae_ahead *ahead, uint32_t job);
/* Aborts on failure: what an event or a request needs for a while. Freed by free(). */
void *ae_core_alloc(size_t n, size_t size);
/* The same for tables, which live as long as a job, a worker or the core: their bytes are counted.
 * New ones are zeroed, what one grows by isn't. NULL may be freed, and grown to a new one. */
void *ae_table_new(struct ae_core *core, size_t n, size_t size);
void *ae_table_grow(struct ae_core *core, void *table, size_t len);
void *ae_table_free(struct ae_core *core, void *table); /* returns NULL */

/* ---- check.c ---------------------------------------------------------------------------- */

/* No id is left for another job. */
bool ae_core_jobs_full(const struct ae_core *core);
/* AE_EPROTO when a peer may not say that, or not now; @job: NULL when there is none of that id. */
int ae_check_control(const struct ae_core *core, const struct ae_job *job, uint32_t node,
                     const struct ae_wire_head *head, const ProtobufCMessage *message);
int ae_check_hot(const struct ae_job *job, uint32_t node, const struct ae_wire_head *head,
                 size_t len);

/* ---- life.c, start.c ----------------------------------------------------------------------- */

struct ae_job *ae_job_new(struct ae_core *core, const char *name, uint32_t world,
                          const char *token, uint32_t uid);
bool ae_job_has_workers(const struct ae_job *job);
/* The job it wanted to join has ended: it is a rank of the next one of that name. */
void ae_form_again(struct ae_worker *worker);
void ae_form_gone(struct ae_worker *worker); /* takes back what the decider has not answered */
void ae_form_left(struct ae_job *job, uint32_t rank); /* decider: a rank has left */
void ae_start_maybe(struct ae_job *job);              /* decider: Start, when all are there */
void ae_start_on(struct ae_core *core, uint32_t id, const Autoep__Start *start);
void ae_start_peer_up(struct ae_job *job);            /* a peer is connected that Start may lack */
void ae_start_ready(struct ae_job *job, uint32_t node, const Autoep__Ready *ready);

/* ---- form.c ----------------------------------------------------------------------------- */

void ae_job_move(struct ae_job *job, enum ae_job_state to);
/* The job cannot go on: tells everyone, once. @text names what was lost and the round. */
void ae_job_fail(struct ae_job *job, int status, const char *format, ...)
        __attribute__((format(printf, 3, 4)));
void ae_job_failed(struct ae_job *job, int status, const char *text); /* told by another */
/* Frees the job when no worker is attached any more. */
void ae_job_release(struct ae_job *job);
void ae_form_control(struct ae_core *core, uint32_t job_id, uint32_t node, uint32_t type,
                     const ProtobufCMessage *message);
void ae_form_register(struct ae_worker *worker, Autoep__Register *message, int fd);
void ae_form_leave(struct ae_worker *worker, uint64_t id);
void ae_form_committed(struct ae_job *job); /* initial values are in: the job is live */
void ae_form_granted(struct ae_job *job);
void ae_form_tick(struct ae_job *job);
/* Shows a text to the workers that wait to be registered. */
void ae_form_show(struct ae_job *job, const char *text);

/* ---- memory.c --------------------------------------------------------------------------- */

/* Plans and makes all regions; AE_EBUDGET with the figures. */
int ae_memory_new(struct ae_job *job);
void ae_memory_free(struct ae_job *job);
/* Memory for state on its way in or out, counted in the job's budget; AE_EBUDGET has figures. */
int ae_memory_transfer(struct ae_job *job, const char *name, uint64_t len,
                       struct ae_region **ret_region);
void ae_memory_transferred(struct ae_job *job, struct ae_region *region);
/* Bytes that a process may hold when it does not say: the two largest units. */
uint64_t ae_memory_allowance(const struct ae_job *job);
int ae_memory_grant(struct ae_job *job, uint32_t node);
void ae_memory_granted(struct ae_job *job, uint32_t node, const Autoep__Grants *grants);
uint64_t ae_memory_inbox_off(const struct ae_job *job, uint32_t node);
int ae_memory_worker(struct ae_worker *worker); /* xout and xin, once the world is known */

/* ---- ring.c, cache.c, serve.c ----------------------------------------------------------- */

/* AE_EPROTO when the worker wrote nonsense. */
int ae_ring_drain(struct ae_worker *worker);
bool ae_ring_empty(const struct ae_worker *worker);
void ae_ring_answer(struct ae_worker *worker, const struct ae_local_cqe *cqe);

int ae_cache_new(struct ae_job *job);
void ae_cache_free(struct ae_job *job);
int ae_cache_gather(struct ae_worker *worker, const struct ae_local_sqe *sqe);
int ae_cache_range(struct ae_worker *worker, const struct ae_local_sqe *sqe);
int ae_cache_unpin(struct ae_worker *worker, const struct ae_local_sqe *sqe);
int ae_cache_prefetch(struct ae_worker *worker, const struct ae_local_sqe *sqe);
void ae_cache_arrived(struct ae_job *job, uint32_t token, uint32_t slice, uint32_t stamp);
/* A new version is there: units in job->updated have changed. */
void ae_cache_commit(struct ae_job *job);
void ae_cache_retry(struct ae_job *job); /* somebody waits for room */
void ae_cache_fail(struct ae_job *job);
void ae_cache_worker_gone(struct ae_worker *worker);
void ae_cache_flush(struct ae_job *job, uint32_t node); /* sends collected wants */
uint32_t ae_cache_missing_node(struct ae_job *job, const struct ae_fetch *fetch);

void ae_serve_new(struct ae_job *job);
int ae_serve_want(struct ae_job *job, uint32_t node, const struct ae_wire_want *want);
void ae_serve_ready(struct ae_owned *owned); /* it can be read again */
void ae_serve_put_done(struct ae_owned *owned);
/* Slices of @unit that overlap [first, first + len) of its image, frozen ones only if wanted. */
typedef void (*ae_slice_fn)(struct ae_job *job, uint32_t slice, void *user);
void ae_serve_each(struct ae_job *job, const struct ae_wire_want_item *item, ae_slice_fn fn,
                   void *user);

/* ---- fold.c, owner.c -------------------------------------------------------------------- */

int ae_fold_new(struct ae_job *job);
void ae_fold_free(struct ae_job *job);
int ae_fold_piece(struct ae_worker *worker, const struct ae_local_sqe *sqe);
/* Frees what the worker says it wants of its ring, as far as that waits for others. */
void ae_fold_make_room(struct ae_worker *worker);
int ae_fold_scattered(struct ae_worker *worker, const struct ae_local_sqe *sqe);
int ae_fold_micro_end(struct ae_worker *worker, uint32_t micro);
void ae_fold_close(struct ae_worker *worker); /* the rank closes its round */
void ae_fold_reset(struct ae_job *job);       /* a new round begins */
bool ae_fold_started(const struct ae_job *job);
/* Whether all local sums are through: what they found of NaN and Inf is known. */
bool ae_fold_ended(const struct ae_job *job);
void ae_fold_worker_gone(struct ae_worker *worker);
void ae_fold_send(struct ae_job *job, uint32_t node); /* slots came free */
void ae_fold_put_slot(struct ae_job *job, uint32_t node, uint32_t slot);

int ae_owner_new(struct ae_job *job);
void ae_owner_free(struct ae_job *job);
int ae_owner_arrived(struct ae_job *job, uint32_t node, uint64_t note, uint64_t off, uint64_t len);
void ae_owner_local_final(struct ae_job *job, uint32_t group, uint32_t slice);
void ae_owner_pump(struct ae_owned *owned); /* its sums may be written again */
void ae_owner_settle(struct ae_job *job); /* more is known about who scatters nothing */
void ae_owner_reset(struct ae_job *job);
void ae_owner_flush(struct ae_job *job, uint32_t node); /* gives credits back that are due */
void ae_owner_voted(struct ae_job *job);                /* all credits are due */
struct ae_sum *ae_job_sum(const struct ae_job *job, uint32_t local_group, uint32_t unit);
/* 1 yes, 0 no, -1 not known yet: whether a global group scattered a unit in this round. */
int ae_round_scattered(const struct ae_job *job, uint32_t group, uint32_t unit);

/* ---- round.c, apply.c ------------------------------------------------------------------- */

void ae_round_begin(struct ae_job *job);
int ae_round_step(struct ae_worker *worker, uint64_t round);
void ae_round_applied(struct ae_job *job);  /* nothing of the last commit is under way any more */
void ae_round_progress(struct ae_job *job); /* something that END or VOTE waits for has happened */
int ae_round_msg(struct ae_job *job, uint32_t node, const struct ae_wire_head *head, size_t len);
void ae_round_put(struct ae_job *job, uint32_t node, uint64_t put_id, uint64_t version,
                  bool initial); /* decider */
bool ae_round_next_may_come(const struct ae_job *job);
void ae_round_put_reply(struct ae_job *job, uint32_t node, const Autoep__DecideReply *reply);
void ae_round_pause(struct ae_job *job, const Autoep__PauseNote *note);
void ae_round_tick(struct ae_job *job); /* wait.c, like those below */
int ae_wait_closed(struct ae_job *job, const struct ae_wire_closed *closed, size_t len);
/* On another node than the decider's: until it says more. */
void ae_wait_for_word(struct ae_job *job);
int ae_wait_shown(struct ae_job *job, const struct ae_wire_waiting *waiting, size_t len);
void ae_wait_left(struct ae_job *job); /* decider: the others are told */
/* Ranks that have joined and not left; AE_WIRE_NONE as long as the decider has said nothing. */
uint32_t ae_wait_n_present(const struct ae_job *job);
/* What is left of the pause that @rank announced; 0: none, or it has asked for the step since. */
uint64_t ae_wait_pause_ns(const struct ae_job *job, uint32_t rank);
/* "rank 3 pauses for 12 s more: WHY, rank 5 ..."; "" when nobody pauses. */
void ae_wait_pauses(const struct ae_job *job, char *text, size_t size);
void ae_wait_pauses_over(struct ae_job *job);
void ae_round_bad(struct ae_job *job, const struct ae_piece *piece);

int ae_apply_new(struct ae_job *job);
void ae_apply_free(struct ae_job *job);
void ae_apply_step(struct ae_job *job);  /* job->verdict says APPLIED */
void ae_apply_pump(struct ae_job *job);  /* puts have finished */
/* A task that changes a slice: runs when nothing is being sent from it any more. */
void ae_apply_add(struct ae_task *task);
void ae_apply_finished(struct ae_owned *owned); /* one of n_tasks */
void ae_apply_one_done(struct ae_job *job);     /* one of n_applying */

/* ---- flow.c, state.c -------------------------------------------------------------------- */

int ae_flow_send(struct ae_worker *worker, const struct ae_local_sqe *sqe);
int ae_flow_ack(struct ae_worker *worker, const struct ae_local_sqe *sqe);
int ae_flow_arrived(struct ae_job *job, uint64_t note);
int ae_flow_credit(struct ae_job *job, const struct ae_wire_xcredit *credit, size_t len);
void ae_flow_put_done(struct ae_flow_msg *message);
void ae_flow_new(struct ae_worker *worker);
/* A rank leaves: the job fails if others are in an exchange with it. */
void ae_flow_leave(struct ae_worker *worker);
void ae_flow_worker_gone(struct ae_worker *worker);
void ae_flow_free(struct ae_job *job);

/* ---- order.c ---------------------------------------------------------------------------- */

void ae_order_init(struct ae_job *job); /* once the topology is known */
void ae_order_deinit(struct ae_job *job);
/*
 * A message of at least a header from @src to @dst is about to be sent or has come. Fails the job
 * when it belongs to another collective than the group's other ranks have begun.
 */
void ae_order_see(struct ae_job *job, const void *message, uint32_t src, uint32_t dst);

void ae_state_request(struct ae_worker *worker, uint32_t type, ProtobufCMessage *message, int fd);
void ae_state_initial(struct ae_worker *worker); /* rank 0's initial values */
int ae_state_control(struct ae_job *job, uint32_t node, uint32_t type,
                     const ProtobufCMessage *message);
void ae_state_arrived(struct ae_job *job, uint32_t node, struct ae_net_mem *mem, uint64_t note);
/* The put that the verdict names takes effect here; fills job->updated. */
void ae_state_commit(struct ae_job *job);
/* After it: tells the requester's node that gathers here have the put's version. */
void ae_put_shown(struct ae_job *job);
void ae_put_seen(struct ae_job *job, uint64_t put_id); /* at the requester: by one more node */
/* A put that this node asked for will not take effect. */
void ae_state_put_off(struct ae_job *job, uint64_t put_id, int status, const char *text);
void ae_state_pump(struct ae_job *job);  /* slices became ready */
/* Whether a request of @worker waits; says for whom. */
bool ae_state_waits(const struct ae_worker *worker, char *text, size_t size);
void ae_state_put_done(struct ae_request *request); /* one from its memory */
void ae_state_worker_gone(struct ae_worker *worker);
void ae_state_fail(struct ae_job *job);
void ae_state_free(struct ae_job *job);

/* ---- put cookies ------------------------------------------------------------------------ */

/* What a finished put belongs to; the cookie is its address. */
struct ae_cookie {
        struct ae_list link;
        enum ae_cookie_kind {
                AE_COOKIE_SERVE,
                AE_COOKIE_PART,
                AE_COOKIE_FLOW,
                AE_COOKIE_STATE
        } kind;
        struct ae_job *job;
        void *owner;
};
void ae_job_put(struct ae_job *job, uint32_t node, enum ae_cookie_kind kind, void *owner,
                const struct ae_net_key *key, uint64_t off, struct ae_region *src, uint64_t src_off,
                uint64_t len, uint64_t note);
