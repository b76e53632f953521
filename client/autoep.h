/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libautoep: the C interface of autoep for training processes.
 *
 * A process opens a handle to the daemon of its node, registers the model, and then, step after
 * step, gathers the weights of a unit when it needs them and scatters the unit's gradients when it
 * has them; the daemons reduce, clip and run the optimizer. Experts stay in the process; their
 * tokens and gradients travel through autoep_exchange().
 *
 * Results. Every call returns 0 or a negative AUTOEP_E… code; outputs are written on success only.
 * autoep_last_error() gives the calling thread's last failure as text: what was tried, why it
 * failed, what to try.
 *
 * Time. Every call that may wait for others takes timeout_ms: 0 does not wait,
 * AUTOEP_DEFAULT_TIMEOUT is the handle's default, which is finite; open, micro_batch_end and pause
 * always have that one. A wait never outlives it: AUTOEP_ETIMEDOUT or AUTOEP_ELOST
 * then name the rank or node, unit and round that were missing.
 *
 * Threads. Any thread may call gather, release, prefetch, scatter and the lookups on one handle at
 * the same time; order is kept per thread. The other calls are for one thread at a time. After
 * fork() the handle is dead in the child: every call but autoep_close() gives AUTOEP_EFORKED.
 *
 * Structs. Every struct that is passed in or out starts with its size in bytes, but for
 * autoep_hyper and autoep_norm2; set it, with the rest zeroed, through the initialisers below.
 * Names are UTF-8 and NUL-terminated. Sizes are bytes when named len, elements when named n.
 */
#ifndef AUTOEP_H
#define AUTOEP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AUTOEP_VERSION_MAJOR 0
#define AUTOEP_VERSION_MINOR 1

#define AUTOEP_DEFAULT_TIMEOUT (-1)
#define AUTOEP_NONE 0xffffffffu /* no unit, tensor, rank */
#define AUTOEP_MAX_DIMS 8
#define AUTOEP_MAX_GROUPS 32     /* optimizer groups */

#if defined(__GNUC__)
#define AUTOEP_API __attribute__((visibility("default")))
#else
#define AUTOEP_API
#endif

enum autoep_error {
        AUTOEP_EINVAL = -1,     /* an argument is wrong; nothing happened */
        AUTOEP_ENOMEM = -2,     /* no memory in this process or the daemon */
        AUTOEP_ESYS = -3,       /* a system call failed */
        AUTOEP_ETIMEDOUT = -4,  /* the deadline passed; the text names what was missing */
        AUTOEP_ELOST = -5,      /* a rank or node was lost; the text names it and the round */
        AUTOEP_EPROTO = -6,     /* the other side broke the protocol */
        AUTOEP_EVERSION = -7,   /* library and daemon speak different protocol versions */
        AUTOEP_EAUTH = -8,      /* wrong token or user */
        AUTOEP_EEXIST = -9,     /* already there: a rank claimed twice, a double scatter */
        AUTOEP_ENOENT = -10,    /* unknown job, unit, tensor, or no daemon at the socket */
        AUTOEP_ESTATE = -11,    /* not possible now, e.g. a gather before the model is committed */
        AUTOEP_EHELD = -12,     /* a step was asked for while views are held; the text names them */
        AUTOEP_EAGAIN = -13,    /* no room now; nothing was taken; try again */
        AUTOEP_EBUDGET = -14,   /* over a memory budget or the handle's allowance of views */
        AUTOEP_EMISMATCH = -15, /* ranks disagree; the text names the first difference */
        AUTOEP_EUNSUPPORTED = -16, /* a legal wish that this build or version does not fulfil */
        AUTOEP_EFORKED = -17,      /* the handle belongs to the parent process */
        AUTOEP_ECLOSED = -18,      /* the handle has left the job, or all ranks have */
        AUTOEP_ENONFINITE = -19,   /* a gradient holds NaN or Inf and the job says stop */
        AUTOEP_EOVERFLOW = -20     /* a size is beyond its limit */
};

enum autoep_dtype { AUTOEP_F32 = 1, AUTOEP_BF16 = 2, AUTOEP_I64 = 3 };
enum autoep_class { AUTOEP_DENSE = 1, AUTOEP_EXPERT = 2, AUTOEP_BUFFER = 3 };
enum autoep_order { AUTOEP_E_THEN_D = 0, AUTOEP_D_THEN_E = 1 };
enum autoep_optimizer { AUTOEP_ADAMW = 1, AUTOEP_SGD = 2, AUTOEP_EXTERNAL = 3 };
enum autoep_init { AUTOEP_INIT_RANK0 = 0, AUTOEP_INIT_ALL_EQUAL = 1 };
enum autoep_nonfinite { AUTOEP_NONFINITE_SKIP = 0, AUTOEP_NONFINITE_STOP = 1 };
enum autoep_group { AUTOEP_GROUP_EP = 0, AUTOEP_GROUP_EDP = 1, AUTOEP_GROUP_WORLD = 2 };
/* What an exchange is part of, for autoep_announce(). */
enum autoep_collective {
        AUTOEP_EXCHANGE = 0,
        AUTOEP_ALL_REDUCE = 1,
        AUTOEP_ALL_GATHER = 2,
        AUTOEP_DISPATCH = 3,
        AUTOEP_COMBINE = 4
};
enum autoep_verdict_kind { AUTOEP_APPLIED = 1, AUTOEP_SKIPPED = 2, AUTOEP_REDO = 3 };
enum autoep_what {
        AUTOEP_WEIGHT = 1,  /* in the tensor's dtype */
        AUTOEP_MASTER = 2,  /* fp32 */
        AUTOEP_MOMENT1 = 3, /* fp32; AdamW m, SGD momentum */
        AUTOEP_MOMENT2 = 4, /* fp32; AdamW v */
        AUTOEP_GRADIENT = 5 /* fp32; the sum of the last finished round, before s and clip */
};

#define AUTOEP_FROZEN 1u      /* autoep_tensor.flags: no gradient, no optimizer state */
#define AUTOEP_LAST 1u        /* autoep_scatter() flags: this rank's last of the unit this round */
#define AUTOEP_STEP_REDO 1u   /* autoep_step.flags: this rank cannot finish the round */
#define AUTOEP_USE_TOKENS 2u  /* autoep_step.flags: s = 1 / (tokens of all ranks) */

typedef struct autoep autoep;

/* ---- life of a handle ------------------------------------------------------------------- */

struct autoep_options {
        size_t size;
        const char *socket;  /* daemon's socket; NULL: $AUTOEP_SOCKET, /run/autoep/autoepd.sock */
        const char *job;     /* job name; NULL: $AUTOEP_JOB */
        const char *token;   /* job token; NULL: $AUTOEP_TOKEN, else none */
        int rank, world;     /* -1: $AUTOEP_RANK and $AUTOEP_WORLD, else the launcher's variables */
        int reader;          /* 1: attach without a rank: may gather, get and put, is never waited
                                for */
        int timeout_ms;      /* default of every wait; 0: 600 s */
        uint64_t hold_len;   /* most bytes this process will hold in views at a time; 0: its two
                                largest units */
        uint64_t ring_len;   /* bytes of its gradient ring, 16 MiB to 64 GiB; 0: 32 MiB */
};
#define AUTOEP_OPTIONS_INIT { sizeof(struct autoep_options), NULL, NULL, NULL, -1, -1, 0, 0, 0, 0 }

/*
 * Connects to the daemon, proves who this is and claims the rank. Waits for the daemon's answer,
 * not for other ranks. @return: 0; AUTOEP_ENOENT no daemon or job; AUTOEP_EAUTH; AUTOEP_EEXIST rank
 * already claimed (the text has the holder's pid); AUTOEP_EVERSION; AUTOEP_EINVAL;
 * AUTOEP_ETIMEDOUT.
 */
AUTOEP_API int autoep_open(const struct autoep_options *options, autoep **ret_handle);

/*
 * Leaves the job in order: not a death, nobody gets an error for it; refused with AUTOEP_EHELD
 * while views are held. Then only autoep_close() is left. The last leave frees the job in the
 * daemons.
 */
AUTOEP_API int autoep_leave(autoep *handle, int timeout_ms);
/* Frees the handle; without autoep_leave() before it the others see a lost rank. NULL is fine. */
AUTOEP_API void autoep_close(autoep *handle);

/* The calling thread's last failure, "" when there was none; valid until its next failing call. */
AUTOEP_API const char *autoep_last_error(void);
/* Words for a code, never NULL. */
AUTOEP_API const char *autoep_strerror(int error);

/* ---- the model -------------------------------------------------------------------------- */

struct autoep_tensor {
        size_t size;
        const char *name;     /* unique in the job */
        const char *unit;     /* tensors of one unit are gathered and scattered together */
        uint32_t dtype;       /* enum autoep_dtype: of the weights as gathered; I64: buffers only */
        uint32_t tensor_class;/* enum autoep_class; experts are recorded, their data stays here */
        uint32_t group;       /* optimizer group, < AUTOEP_MAX_GROUPS */
        uint32_t flags;       /* AUTOEP_FROZEN */
        uint32_t n_dims;      /* 0: a scalar */
        uint64_t dims[AUTOEP_MAX_DIMS];
        const char *alias_of; /* NULL, or the tensor whose storage this one shares (tied weights) */
        const void *init;     /* initial values: fp32 for trainable tensors, else in dtype; borrowed
                                 during autoep_register(). Rank 0 gives them for all tensors but
                                 experts and aliases; other ranks' count only with
                                 AUTOEP_INIT_ALL_EQUAL */
};

struct autoep_model {
        size_t size;
        const struct autoep_tensor *tensors; /* borrowed during the call; ids are their indices */
        uint32_t n_tensors;
        uint32_t optimizer;   /* enum autoep_optimizer; 0: AdamW */
        uint32_t ep_size;     /* 0: 1 */
        uint32_t order;       /* enum autoep_order */
        uint32_t sum_group;   /* ranks added first; 0: the workers of a node; must divide each
                                 node's count of workers otherwise */
        uint32_t grad_wire;   /* dtype of sums between nodes; 0: fp32 */
        uint32_t init;        /* enum autoep_init */
        uint32_t nonfinite;   /* enum autoep_nonfinite */
        uint32_t tp_size, pp_size, sp_size; /* 0 or 1; others are refused by name */
        uint32_t slots;       /* inbox slots per (sender, owner); 0: 4; at least 2 */
        uint64_t slot_len;    /* bytes of an inbox slot, at most 2^30; 0: chosen by size */
        uint64_t overflow_len; /* bytes per node for gradients that come before their turn, at most
                                  2^56; 0: chosen */
        uint64_t cache_len;   /* bytes of each node's gather cache, at most 2^56; 0: all dense
                                 weights, more where readers hold old versions */
        uint64_t budget_len;  /* most bytes per daemon for this job; 0: the daemon's own limit */
        uint64_t exchange_len;/* bytes per pair of ranks for autoep_exchange(), at most 2^33; 0:
                                 1 MiB */
};

/*
 * Registers the model: rank 0's counts, the others' is compared with it, and the first difference
 * is named on every rank (AUTOEP_EMISMATCH). Waits for all ranks and for the initial values to be
 * in place on every node; after it the model is committed at version 0. A reader passes NULL and
 * waits for a committed model. @return also AUTOEP_EBUDGET (with the figures), AUTOEP_EINVAL
 * (naming the tensor), AUTOEP_ETIMEDOUT (with the list of ranks missing).
 */
AUTOEP_API int autoep_register(autoep *handle, const struct autoep_model *model, int timeout_ms);

/* Ids by name; AUTOEP_NONE when unknown. Units are numbered in order of first mention. */
AUTOEP_API uint32_t autoep_unit(const autoep *handle, const char *name);
AUTOEP_API uint32_t autoep_tensor(const autoep *handle, const char *name);

struct autoep_info {
        size_t size;
        uint32_t rank, world, node, n_nodes;
        uint32_t ep_size, ep_rank, edp_size, edp_rank;
        uint32_t n_units, n_tensors;
        uint64_t version, round, epoch;
        char transport[16];   /* between daemons: "tcp", "shm", or "none" with one node */
};
/* Where this process is, what the job has reached; what registration would tell is 0 before it. */
AUTOEP_API int autoep_info(const autoep *handle, struct autoep_info *ret_info);

/* ---- gather ----------------------------------------------------------------------------- */

/* Read-only weights in shared memory, the same address for all who hold them on this node. */
struct autoep_view {
        size_t size;
        const void *data; /* the unit's image, or the range asked for; 256-byte aligned for units */
        uint64_t len;       /* bytes */
        uint64_t version;
        uint32_t unit;
        uint32_t slot;      /* the library's */
};
#define AUTOEP_VIEW_INIT { sizeof(struct autoep_view), NULL, 0, 0, 0, 0 }

/*
 * The weights of @unit at the job's current version. On the node's cache it is a look into shared
 * memory, without a message or a copy; otherwise the daemon fetches it, once for all who wait.
 * Views are counted: each gather has its autoep_release(). @return: 0; AUTOEP_EBUDGET past
 * hold_len; AUTOEP_ESTATE before the model is committed; AUTOEP_ENOENT; AUTOEP_ETIMEDOUT;
 * AUTOEP_ELOST.
 */
AUTOEP_API int autoep_gather(autoep *handle, uint32_t unit, int timeout_ms,
                             struct autoep_view *ret_view);
/* Elements [first, first + n) of one tensor, e.g. an embedding's rows; fetches no more than that.
 * AUTOEP_EBUDGET also when this process holds 256 views of ranges that no unit's slot has. */
AUTOEP_API int autoep_gather_range(autoep *handle, uint32_t tensor, uint64_t first, uint64_t n,
                                   int timeout_ms, struct autoep_view *ret_view);
/* Ends the view; its data must not be touched afterwards. AUTOEP_EINVAL when it isn't held. */
AUTOEP_API int autoep_release(autoep *handle, struct autoep_view *view);
/* Where @tensor (an alias too) lies in a unit's view; NULL when it isn't part of that unit. */
AUTOEP_API const void *autoep_view_tensor(const autoep *handle, const struct autoep_view *view,
                                          uint32_t tensor);
/* A hint that these units are wanted next, in this order. Never waits. */
AUTOEP_API int autoep_prefetch(autoep *handle, const uint32_t *units, size_t n);

/* ---- scatter and step ------------------------------------------------------------------- */

struct autoep_gradient {
        size_t size;
        uint32_t tensor;     /* of the unit, trainable */
        uint32_t dtype;      /* AUTOEP_F32 or AUTOEP_BF16 */
        const void *data;    /* the whole tensor, dense; may be used again after the call */
};

/*
 * Adds this rank's gradients of @unit for the current micro-batch: the sum over its tokens, never a
 * mean. One call per unit and micro-batch, with all its trainable tensors (AUTOEP_EINVAL otherwise;
 * twice is AUTOEP_EEXIST). Copies into the ring and returns; it waits for ring space, which depends
 * on the own daemon alone, never on another rank. timeout_ms 0: AUTOEP_EAGAIN with nothing taken
 * when there is no room. @flags: AUTOEP_LAST lets the sum leave the node before the step is asked
 * for.
 */
AUTOEP_API int autoep_scatter(autoep *handle, uint32_t unit,
                              const struct autoep_gradient *gradients, size_t n, uint32_t flags,
                              int timeout_ms);
/* Ends a micro-batch: units not scattered in it count as nothing from this rank. */
AUTOEP_API int autoep_micro_batch_end(autoep *handle);

struct autoep_hyper {
        double lr, beta1, beta2, eps, weight_decay; /* SGD: beta1 is the momentum */
};

/* A sum of squares of fp32 values, exact: that of limb[i] * 2^(64 i - 298). Zeroed it is empty. */
struct autoep_norm2 {
        uint64_t limb[10];
};
/*
 * Adds @square, a sum of squares of fp32 values in double, exactly, so that the order of these
 * calls and who makes them can't be seen in the norm. Nor can the way in which experts are spread
 * over ranks, if each call adds a block of 4,096 elements of one expert's tensor. AUTOEP_EINVAL for
 * what no such sum can be (negative, not finite, not a multiple of 2^-298), and for a @sum that was
 * never zeroed. Any thread; no handle.
 */
AUTOEP_API int autoep_norm2_add(struct autoep_norm2 *sum, double square);

struct autoep_step {
        size_t size;
        const struct autoep_hyper *hyper; /* one per optimizer group; every rank passes the same */
        uint32_t n_groups;
        uint32_t absent_groups; /* bit g: group g takes no part in this step */
        uint32_t flags;
        double scale;           /* s; 0: 1 / (micro-batches of all ranks) */
        double max_norm;        /* 0: no clipping */
        uint64_t tokens;        /* this rank's, with AUTOEP_USE_TOKENS; at most 2^47 */
        double balance_rate;    /* u of aux-loss-free balancing; 0: off */
        const uint64_t *counts; /* tokens per expert: for each buffer tensor of the model in order,
                                   one count per element, at most 2^47; NULL with n_counts 0 */
        uint32_t n_counts;
        struct autoep_norm2 expert_norm2; /* of the reduced expert gradients this rank counts */
        const char *expert_nonfinite; /* NULL, or the expert tensor in which NaN or Inf was found */
};

struct autoep_verdict {
        size_t size;
        uint32_t kind;          /* enum autoep_verdict_kind */
        uint64_t version, round, epoch; /* after it; the round that it ended is round - 1 */
        double scale;           /* s as used */
        double norm;            /* of s * gradient, dense and experts; SKIPPED: not finite */
        double clip;            /* factor <= 1 */
        double grad_scale;      /* s * clip, what optimizers multiply gradients with */
        uint64_t tokens, micro_batches; /* of all ranks */
        uint32_t n_groups, absent_groups;
        struct autoep_hyper hyper[AUTOEP_MAX_GROUPS]; /* rank 0's; expert optimizers use these */
        double balance_rate;
        uint32_t bad_unit, bad_tensor, bad_rank; /* SKIPPED: where NaN or Inf was first found */
        char why[256];          /* SKIPPED, REDO: in words */
};
#define AUTOEP_VERDICT_INIT { sizeof(struct autoep_verdict), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, \
                              { { 0, 0, 0, 0, 0 } }, 0, 0, 0, 0, { 0 } }

/*
 * Closes this rank's round (and its open micro-batch) and waits for the verdict that all ranks and
 * daemons share. AUTOEP_EHELD while this handle holds views. AUTOEP_EMISMATCH when ranks disagree
 * on the request (rank and field are named; nothing was applied and the round can be asked for
 * again).
 */
AUTOEP_API int autoep_step(autoep *handle, const struct autoep_step *step, int timeout_ms,
                           struct autoep_verdict *ret_verdict);

/* Promises the others that this rank is alive but busy: their deadlines grow by @seconds, those of
 * waits that begin meanwhile by what is left of them, until the next verdict. What autoep-ctl shows
 * is @reason; borrowed during the call. */
AUTOEP_API int autoep_pause(autoep *handle, const char *reason, uint32_t seconds);

/* ---- state from outside, between steps --------------------------------------------------- */

/* Copies elements [first, first + n) of @tensor's @what into @data (fp32, weights in their dtype):
 * all as they are at one version, also beside a step or a put of others; but a gradient is only
 * whole until a rank scatters again. AUTOEP_ENOENT; AUTOEP_EINVAL for a range outside the tensor or
 * state that it doesn't have; AUTOEP_EBUDGET when a node has no memory left for the transfer. */
AUTOEP_API int autoep_get(autoep *handle, uint32_t tensor, uint32_t what, uint64_t first,
                          uint64_t n, void *data, int timeout_ms);

struct autoep_put_item {
        size_t size;
        uint32_t tensor, what; /* AUTOEP_MASTER (sets the weight with it), moments, or AUTOEP_WEIGHT
                                  of frozen tensors and buffers */
        uint64_t first, n;
        const void *data;       /* borrowed during the call */
};
/*
 * Replaces state: all items or none, seen by every rank as one new version. Only between steps:
 * AUTOEP_ESTATE when the version isn't @version, or when any rank has begun to scatter or has asked
 * for the step; AUTOEP_EBUDGET when a node has no memory left for it. Called by one rank or reader
 * at a time.
 */
AUTOEP_API int autoep_put(autoep *handle, uint64_t version, const struct autoep_put_item *items,
                          size_t n, int timeout_ms);

/* ---- exchange for CPU workers ------------------------------------------------------------ */

/*
 * All-to-all with variable block sizes inside this rank's group, carried by the daemons. Every rank
 * of the group calls it in the same order. @send: blocks for position 0, 1, … back to back;
 * send_len, recv_len: bytes per position. Zero-byte blocks are fine. AUTOEP_EMISMATCH when a peer's
 * block has another size than recv_len says or belongs to another call; when announcements differ
 * the job fails with it, so that every rank hears who differed.
 */
AUTOEP_API int autoep_exchange(autoep *handle, enum autoep_group group, const void *send,
                               const uint64_t *send_len, void *recv, const uint64_t *recv_len,
                               int timeout_ms);

/*
 * Says what the exchanges of the group are part of from here on: kind, a number of the caller's
 * (layer, tensor), and the bytes if they are alike on all ranks, otherwise 0. Libraries and daemons
 * compare these three and the exchange's number between the ranks of the group, so that two
 * collectives in another order on one rank are AUTOEP_EMISMATCH and never a wrong sum. At first
 * AUTOEP_EXCHANGE, 0, 0. AUTOEP_EINVAL when there is no such group or kind; AUTOEP_ESTATE before
 * registration and for a reader.
 */
AUTOEP_API int autoep_announce(autoep *handle, enum autoep_group group,
                               enum autoep_collective kind, uint32_t id, uint64_t len);

/* ---- figures ---------------------------------------------------------------------------- */

struct autoep_stats {
        size_t size;
        uint64_t gathers, gather_hits, gather_len, gather_wait_ns; /* this handle; bytes */
        uint64_t scatters, scatter_len, scatter_wait_ns;
        uint64_t exchanges, exchange_len, exchange_wait_ns;
        uint64_t steps, step_wait_ns;
        uint64_t node_gather_recv_len;  /* this node's daemon, this job: weights from other nodes */
        uint64_t node_scatter_sent_len; /* gradients to other nodes */
        uint64_t node_exchange_sent_len;
        uint64_t node_messages_sent;    /* control messages to other daemons */
};
AUTOEP_API int autoep_stats(const autoep *handle, struct autoep_stats *ret_stats);

#ifdef __cplusplus
}
#endif

#endif
