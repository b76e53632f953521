/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shared memory between a daemon and the workers of its node. All of it is memfds passed over the
 * unix socket; PROTOCOL.md draws them. One per trust boundary:
 *
 *   params  one per job and node; daemon writes, workers map read-only: job state, verdict,
 *           published units, gather cache
 *   page    one per worker, both write: rings, holds, step request
 *   grad    one per worker; worker writes, daemon reads: gradient ring
 *   xout    one per worker; worker writes, daemon reads: exchange ring
 *   xin     one per worker; daemon writes, worker read-only: exchange inbox
 *
 * Nothing that the other side wrote is trusted: entries are copied, then checked; ring indices are
 * checked against the ring's size on every look. Each atomic names its pair.
 */
#pragma once

#include "proto/wire/wire.h"

#include <stdatomic.h>
#include <stdbool.h>

#define AE_LOCAL_MAGIC UINT64_C(0x31304c5045415541) /* "AUAEPL01" */

#define AE_LOCAL_SQ_LEN 1024u     /* entries, a power of two */
#define AE_LOCAL_CQ_LEN 1024u
#define AE_LOCAL_REQUESTS_MAX 256u /* of a worker, not answered or not unpinned */
#define AE_LOCAL_SLOTS_MAX 65536u /* cache slots of a job */
#define AE_LOCAL_RANGES_MAX 256u  /* views of ranges that a worker may hold: each takes a slot */
#define AE_LOCAL_SLOT_NONE 0xffffffu
#define AE_LOCAL_VERSION_ANY ((UINT64_C(1) << 40) - 1)
#define AE_LOCAL_PIECE_N (1u << 20) /* elements: pieces of a unit's gradient image are cut here */
#define AE_LOCAL_PIECE_LEN (AE_LOCAL_PIECE_N * sizeof(float)) /* the most bytes of one */
/* A gradient ring holds four such pieces: two while their turn has not come (more leave it for
 * overflow memory), the next one, and what is left out before that. */
#define AE_LOCAL_RING_MIN (UINT64_C(4) * AE_LOCAL_PIECE_LEN)
#define AE_LOCAL_RING_MAX (UINT64_C(64) << 30)

/* ---- params ----------------------------------------------------------------------------- */

enum ae_local_job_state { AE_LOCAL_FORMING = 0, AE_LOCAL_LIVE = 1, AE_LOCAL_FAILED = 2 };

/* A text that changes under a sequence lock: odd while it is written. */
struct ae_local_text {
        _Atomic uint32_t seq; /* pairs with itself: writer release, reader acquire */
        char text[AE_WIRE_TEXT * 2];
};

struct ae_local_params {
        uint64_t magic;
        uint32_t version;       /* AE_WIRE_VERSION */
        uint32_t n_units;
        uint64_t units_off;     /* _Atomic uint64_t[n_units], see ae_local_entry() */
        uint64_t slots_off;     /* struct ae_local_slot[n_slots] */
        uint32_t n_slots;
        uint32_t world;
        uint64_t cache_off, cache_len;
        _Atomic uint64_t job_version; /* pairs: daemon release on commit, worker acquire */
        _Atomic uint64_t round;       /* the open round; written after the verdict, release */
        _Atomic uint64_t epoch;
        _Atomic uint32_t state;       /* enum ae_local_job_state; release after why */
        int32_t fail_status;          /* written before state */
        _Atomic uint64_t pause_ns;    /* by how much deadlines have grown in this epoch; after: */
        _Atomic uint64_t pause_until_ns; /* when the pause ends, CLOCK_MONOTONIC; 0: none */
        struct ae_local_text why;     /* FAILED: the reason */
        struct ae_local_text waiting; /* what the open round waits for */
        struct ae_wire_verdict verdict; /* of the last step; stays until all ranks asked again */
        /* this node's figures for the job */
        _Atomic uint64_t gather_recv_len, scatter_sent_len, exchange_sent_len, messages_sent;
};

struct ae_local_slot {
        uint64_t off; /* from cache_off; valid while an entry names the slot */
        uint64_t len;
};

/* A unit's entry: version in the upper 40 bits, slot in the lower 24; one atomic word, written by
 * the daemon with release (publish) or seq_cst (withdraw), read by workers around their hold. */
static inline uint64_t ae_local_entry(uint64_t version, uint32_t slot)
{
        return version << 24 | slot;
}
static inline uint64_t ae_local_entry_version(uint64_t entry)
{
        return entry >> 24;
}
static inline uint32_t ae_local_entry_slot(uint64_t entry)
{
        return (uint32_t)(entry & 0xffffff);
}

/* ---- page ------------------------------------------------------------------------------- */

enum ae_local_op {
        AE_SQ_GATHER = 1, /* unit; token. Answer: cqe; the daemon pins the slot for the request */
        AE_SQ_RANGE = 2,  /* unit, first, n: bytes of its image; token. Answer: cqe with the slot of
                           * exactly those bytes, pinned */
        AE_SQ_UNPIN = 3,  /* slot: the pin of one answered request ends */
        AE_SQ_PREFETCH = 4,  /* unit */
        AE_SQ_PIECE = 5,     /* unit, micro, use, dtype, first, n (elements of the unit's gradient
                              * image, inside one AE_LOCAL_PIECE_N cell), pos, len */
        AE_SQ_SCATTERED = 6, /* unit, micro, use; flags: all its pieces have been posted */
        AE_SQ_MICRO_END = 7, /* micro */
        AE_SQ_STEP = 8,      /* the step request lies in page.step; token: its round */
        AE_SQ_XSEND = 9,     /* rank: destination; pos, len: one message in xout */
        AE_SQ_XACK = 10      /* rank: source; n: messages of its flow consumed in all */
};

#define AE_SQ_LAST 1u /* SCATTERED: this lane has nothing more in this round */

struct ae_local_sqe {
        uint16_t op;
        uint16_t flags;
        uint32_t unit;
        uint32_t micro;
        uint16_t use;   /* 0: the unit's own tensors; k: its k-th alias use, see below */
        uint16_t dtype;
        uint32_t rank;
        uint32_t slot;
        uint64_t token;
        uint64_t first, n;
        uint64_t pos;   /* absolute position in the ring, bytes since it was made */
        uint32_t len;   /* bytes of data at pos */
        uint32_t zero;
};
static_assert(sizeof(struct ae_local_sqe) == 64, "shared format");

/*
 * Lanes. A unit's gradient sum takes, per micro-batch and rank, its own tensors (use 0) and then
 * each alias of one of its tensors (uses 1, 2, … in registration order over the whole model). A
 * PIECE and a SCATTERED for an alias name the unit that has the storage, and its use.
 */

struct ae_local_cqe {
        uint64_t token;
        int32_t status; /* 0 or negative; the words are in page.why */
        uint32_t slot;
        uint64_t version;
        uint64_t off;   /* of the data, from params.cache_off */
        uint64_t len;
        uint8_t zero[24];
};
static_assert(sizeof(struct ae_local_cqe) == 64, "shared format");

/* A step request, complete before AE_SQ_STEP is posted. */
struct ae_local_step {
        uint64_t round;         /* which round it closes */
        uint64_t tokens;
        uint64_t micro_batches; /* this rank's in the round */
        struct ae_longacc expert_norm2; /* of what this rank counts */
        uint32_t redo;
        uint32_t bad_expert;    /* 1: NaN or Inf in expert tensor bad_text */
        uint32_t n_counts;
        uint32_t zero;
        char bad_text[AE_WIRE_TEXT];
        struct ae_wire_ask ask;
        uint64_t counts[AE_WIRE_MAX_COUNTS];
};

struct ae_local_page {
        uint64_t magic;
        uint32_t version;
        uint32_t rank;
        uint64_t grad_len, xout_len; /* bytes of the rings; xout 0 until registered */
        /* worker to daemon */
        _Alignas(
                64) _Atomic uint32_t sq_tail; /* worker, release; pairs with the daemon's acquire */
        _Atomic uint32_t worker_waits;         /* worker before sleeping, seq_cst: wake me */
        _Atomic uint64_t grad_wanted;          /* worker, seq_cst, before it looks at grad_tail once
                                                * more: let that come here, and wake me then; 0: no
                                                * need */
        _Alignas(64) _Atomic uint32_t sq_head; /* daemon, release: entries before it are free */
        _Atomic uint32_t daemon_sleeps;        /* daemon before sleeping, seq_cst: wake me */
        _Atomic uint64_t grad_tail;            /* daemon, release: ring bytes before it are free */
        _Atomic uint64_t xout_tail;
        /* daemon to worker */
        _Alignas(64) _Atomic uint32_t cq_tail; /* daemon, release */
        _Alignas(64) _Atomic uint32_t cq_head; /* worker, release */
        struct ae_local_text why; /* daemon: about this worker's last refusal or wait */
        _Alignas(64) struct ae_local_sqe sq[AE_LOCAL_SQ_LEN];
        struct ae_local_cqe cq[AE_LOCAL_CQ_LEN];
        struct ae_local_step step;
        /* holds[slot]: how often this worker holds it. Worker: add, seq_cst fence, read the entry
         * again. Daemon: withdraw the entry, seq_cst fence, read holds. */
        _Atomic uint32_t holds[AE_LOCAL_SLOTS_MAX];
};

/* ---- exchange --------------------------------------------------------------------------- */

#define AE_LOCAL_XSLOTS 4u /* slots of a flow */

/*
 * xin: for each source rank a flow of AE_LOCAL_XSLOTS slots of slot_len bytes; message number s of
 * a flow goes to slot s % AE_LOCAL_XSLOTS. ready[] is s + 1 once it is all there.
 */
struct ae_local_xflow {
        _Atomic uint64_t
                ready[AE_LOCAL_XSLOTS]; /* daemon, release; pairs with the worker's acquire */
        uint64_t zero[4];
};
static_assert(sizeof(struct ae_local_xflow) == 64, "shared format");

struct ae_local_xin {
        uint64_t magic;
        uint64_t slot_len;  /* bytes, header included; a multiple of 64 */
        uint64_t slots_off; /* of flow 0 slot 0; flow r slot s: + (r * AE_LOCAL_XSLOTS + s) *
                               slot_len */
        uint64_t zero[5];
        struct ae_local_xflow flows[]; /* one per rank of the world */
};

/* What an exchange is part of. The values are those of enum autoep_collective. */
#define AE_COLLECTIVE_TABLE(X)                                                                    \
        X(EXCHANGE, 0, "exchange")                                                                \
        X(ALL_REDUCE, 1, "all-reduce")                                                            \
        X(ALL_GATHER, 2, "all-gather")                                                            \
        X(DISPATCH, 3, "dispatch")                                                                \
        X(COMBINE, 4, "combine")

#define AE_COLLECTIVE_VALUE(name, number, text) AE_COLLECTIVE_##name = (number),
enum ae_collective { AE_COLLECTIVE_TABLE(AE_COLLECTIVE_VALUE) };

/*
 * In front of every exchanged message, written by the sending library, checked by the receiving
 * one, and by the daemons at both ends for the order of the group's collectives.
 */
struct ae_local_xhead {
        uint64_t magic;
        uint8_t group;      /* enum autoep_group */
        uint8_t kind;       /* enum ae_collective */
        uint16_t zero;
        uint16_t src, dst;  /* ranks */
        uint32_t id;        /* what the collective is about; the caller's */
        uint32_t len;       /* bytes behind this header */
        uint64_t seq;       /* number of the exchange in this group, per rank */
        uint64_t round;
        uint64_t off;       /* of these bytes in the block */
        uint64_t block_len; /* of the whole block */
        uint64_t total;     /* bytes of the collective, alike on all ranks; 0: none are */
};
static_assert(sizeof(struct ae_local_xhead) == 64, "shared format");
static_assert(offsetof(struct ae_local_xhead, seq) == 24, "shared format");

#define AE_LOCAL_XGROUPS 3u    /* kinds of groups: EP, EDP, world */
#define AE_LOCAL_XTEXT 112     /* bytes of a printed collective */

/* Whether two messages belong to the same collective, at the same place of its group's order. */
static inline bool ae_local_same_collective(const struct ae_local_xhead *a,
                                            const struct ae_local_xhead *b)
{
        return a->group == b->group && a->seq == b->seq && a->kind == b->kind && a->id == b->id &&
               a->total == b->total;
}

/* "all-reduce 17 of the EDP group (id 2, 4096 bytes)". Returns @ret_text. */
const char *ae_local_print_collective(const struct ae_local_xhead *head,
                                      char ret_text[AE_LOCAL_XTEXT]);

/* ---- helpers ---------------------------------------------------------------------------- */

/* Writes @text, cut to fit. One writer at a time. */
void ae_local_text_set(struct ae_local_text *where, const char *text);
/* Copies the text to @to (at least sizeof(where->text) bytes); "" when it never came to rest. */
void ae_local_text_get(struct ae_local_text *where, char *to);
