/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What daemons say to each other on the hot path, as packed little-endian structs, and the notes
 * that puts carry. PROTOCOL.md draws them. Cold messages (forming a job, get and put of state,
 * control) are protobuf, see control.proto; both travel as one ae_net msg that begins with struct
 * ae_wire_head. Who reads one from a peer's bytes checks the length first.
 */
#pragma once

#include "proto/base/longacc.h"

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define AE_WIRE_VERSION 2

#define AE_WIRE_MAX_WORLD 65536u
#define AE_WIRE_MAX_JOBS 256u
#define AE_WIRE_MAX_GROUPS 32u  /* optimizer groups */
#define AE_WIRE_MAX_NODE_SUM_GROUPS 16u /* sum groups on one node: 4 bits of a note */
#define AE_WIRE_MAX_SLICES (1u << 22)
#define AE_WIRE_MAX_PARTS (1u << 20) /* parts of one slice */
#define AE_WIRE_MAX_COUNTS 65536u    /* load counts in one vote */
/* tokens, micro-batches or one load count of a rank in a round: no sum over all ranks can wrap */
#define AE_WIRE_COUNT_MAX (UINT64_C(1) << 47)
static_assert(AE_WIRE_COUNT_MAX <= UINT64_MAX / AE_WIRE_MAX_WORLD, "sums of counts fit");
#define AE_WIRE_PAUSE_MAX_S (7 * 24 * 3600u) /* of one autoep_pause() */
#define AE_WIRE_TEXT 256u            /* bytes of a reason, with the final NUL */
/* What one rank, or one node, reports of the norm squared is below 2^this: more than any gradients
 * give, and the sums over the ranks of a node and over all nodes still fit. */
#define AE_WIRE_RANK_NORM2 310
#define AE_WIRE_NODE_NORM2 326
static_assert(AE_WIRE_RANK_NORM2 + 16 <= AE_WIRE_NODE_NORM2, "AE_WIRE_MAX_WORLD ranks fit");
static_assert(AE_WIRE_NODE_NORM2 + 1 + 10 <= AE_LONGACC_END, "two sums of 1,024 nodes fit");

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "autoep's wire format is little-endian and so must be the host"
#endif

/*            name      value  what */
#define AE_WIRE_OP_TABLE(X)                                                                       \
        X(CONTROL,  1, "a protobuf message of control.proto, its number in .type")                \
        X(WANT,     2, "a requester wants its slices of these units at a version")                \
        X(CREDIT,   3, "an owner has emptied inbox slots of this sender")                         \
        X(END,      4, "all ranks of the sender's node have closed the round")                    \
        X(VOTE,     5, "a daemon's sums are complete; what the decider needs")                    \
        X(PREPARE,  6, "the decider's verdict, to be noted")                                      \
        X(PREPARED, 7, "the verdict is noted")                                                    \
        X(COMMIT,   8, "the verdict counts")                                                      \
        X(XCREDIT,  9, "a worker has emptied slots of an exchange flow")                          \
        X(CLOSED,  10, "a rank has closed its round (to the decider)")                            \
        X(WAITING, 11, "what the round waits for, in words (from the decider)")

enum ae_wire_op {
#define AE_WIRE_OP_ENUM(name, value, what) AE_WIRE_##name = value,
        AE_WIRE_OP_TABLE(AE_WIRE_OP_ENUM)
#undef AE_WIRE_OP_ENUM
};

struct ae_wire_head {
        uint16_t op;
        uint16_t type;  /* CONTROL: enum ae_control_type; PREPARE, PREPARED, COMMIT: the decision's
                         * number, for a put may be called off and another follow; otherwise 0 */
        uint32_t job;   /* job id, as the decider numbered it */
        uint64_t epoch;
        uint64_t round; /* the round it speaks of; WANT: the version */
} __attribute__((packed));
static_assert(sizeof(struct ae_wire_head) == 24, "wire format");

struct ae_wire_want_item {
        uint32_t unit;
        uint32_t token;     /* the requester's; comes back in the note */
        uint64_t cache_off; /* where the unit's image begins in the requester's cache grant */
        uint64_t first, len;/* bytes of the image that are wanted; whole unit: 0, unit.len */
        uint32_t changed_only; /* 1: frozen segments are there already */
        uint32_t zero;
} __attribute__((packed));
static_assert(sizeof(struct ae_wire_want_item) == 40, "wire format");

struct ae_wire_want {
        struct ae_wire_head head;
        uint32_t n_items;
        uint32_t zero;
        struct ae_wire_want_item items[];
} __attribute__((packed));
static_assert(sizeof(struct ae_wire_want) == 32, "wire format");

struct ae_wire_credit {
        struct ae_wire_head head;
        uint32_t n_slots;
        uint32_t slots[]; /* indices among this sender's slots */
} __attribute__((packed));

struct ae_wire_end {
        struct ae_wire_head head;
        uint32_t n_groups;  /* sum groups on the sender's node */
        uint32_t n_units;
        uint8_t scattered[]; /* bitmap, group-major: bit g * n_units + u */
} __attribute__((packed));

struct ae_wire_hyper {
        double lr, beta1, beta2, eps, weight_decay;
} __attribute__((packed));

/* What every rank must ask for alike. Compared field by field; rank 0's counts. */
struct ae_wire_ask {
        double scale;
        double max_norm;
        double balance_rate;
        uint32_t use_tokens;
        uint32_t n_groups;
        uint32_t absent_groups;
        uint32_t zero;
        struct ae_wire_hyper hyper[AE_WIRE_MAX_GROUPS];
} __attribute__((packed));
static_assert(sizeof(struct ae_wire_ask) == 40 + 40 * 32, "wire format");

#define AE_WIRE_NONE UINT32_MAX /* no unit, tensor, rank */
/* Where a NaN or Inf was first read. */
struct ae_wire_bad {
        uint32_t rank;
        uint32_t unit, tensor; /* expert: both AE_WIRE_NONE, name in text */
        uint32_t found;        /* 0 none, 1 dense, 2 expert */
        char text[AE_WIRE_TEXT];
} __attribute__((packed));
static_assert(sizeof(struct ae_wire_bad) == 16 + 256, "wire format");

struct ae_wire_vote {
        struct ae_wire_head head;
        uint64_t tokens, micro_batches; /* sums over the node's ranks */
        struct ae_longacc norm2;        /* of this owner's slices, unscaled */
        struct ae_longacc expert_norm2; /* sum over the node's ranks, unscaled */
        uint32_t ask_rank;              /* lowest rank of the node; AE_WIRE_NONE: no ranks here */
        uint32_t redo;                  /* a rank cannot finish, or overflow: why in bad.text */
        uint32_t disagree;              /* ranks of this node disagree: what in bad.text */
        uint32_t n_counts;
        uint32_t infinite;              /* a sum of this owner holds a NaN or Inf */
        uint32_t zero;
        struct ae_wire_ask ask;
        struct ae_wire_bad bad;
        uint64_t counts[];              /* sums over the node's ranks */
} __attribute__((packed));
static_assert(offsetof(struct ae_wire_vote, norm2) == 40, "wire format");
static_assert(sizeof(struct ae_wire_vote) == 224 + 1320 + 272, "wire format");

enum ae_verdict_kind { AE_VERDICT_APPLIED = 1, AE_VERDICT_SKIPPED = 2, AE_VERDICT_REDO = 3,
                       AE_VERDICT_PUT = 4, AE_VERDICT_REFUSED = 5 };

/* The decision about a round; also noted in the shard header and shown to workers. */
struct ae_wire_verdict {
        uint32_t kind; /* enum ae_verdict_kind; REFUSED: the ranks disagree, the round stays
                        * open and can be asked for again */
        uint32_t put_node;      /* PUT: whose, */
        uint64_t put_id;        /* PUT: which staged put takes effect */
        uint64_t epoch, round;  /* the round that it ends */
        uint64_t version;       /* after it */
        uint64_t tokens, micro_batches;
        double scale, norm, clip, grad_scale;
        struct ae_wire_ask ask; /* rank 0's */
        struct ae_wire_bad bad;
} __attribute__((packed));
static_assert(sizeof(struct ae_wire_verdict) == 88 + 1320 + 272, "wire format");

struct ae_wire_prepare {
        struct ae_wire_head head;
        struct ae_wire_verdict verdict;
        uint32_t n_counts;
        uint32_t zero;
        uint64_t counts[];      /* sums over all ranks, for balancing */
} __attribute__((packed));

struct ae_wire_xcredit {
        struct ae_wire_head head;
        uint32_t src, dst; /* ranks of the flow */
        uint64_t consumed; /* messages consumed since the epoch began */
} __attribute__((packed));

struct ae_wire_closed {
        struct ae_wire_head head;
        uint32_t rank;
        uint32_t zero;
} __attribute__((packed));

struct ae_wire_waiting {
        struct ae_wire_head head;
        uint64_t pause_ns;  /* by which deadlines have grown in this epoch */
        uint32_t n_present; /* ranks that have joined and not left */
        uint32_t zero;
        char text[AE_WIRE_TEXT];
} __attribute__((packed));

/*
 * The note of a put, 64 bits from the top:
 *   gather   kind 2 | job 8 | version 8 | slice 22 | token 24
 *   part     kind 2 | job 8 | round 8 | group 4 | slice 22 | part 20
 *   flow     kind 2 | job 8 | epoch 8 | seq 14 | src 16 | dst 16
 *   state    kind 2 | job 8 | version 8 | zero 14 | token 32
 */
enum ae_note_kind { AE_NOTE_GATHER = 0, AE_NOTE_PART = 1, AE_NOTE_FLOW = 2, AE_NOTE_STATE = 3 };

static inline uint64_t ae_note_gather(uint32_t job, uint64_t version, uint32_t slice,
                                      uint32_t token)
{
        assert(job < AE_WIRE_MAX_JOBS && slice < AE_WIRE_MAX_SLICES && token < 1u << 24);
        return (uint64_t)AE_NOTE_GATHER << 62 | (uint64_t)job << 54 | (version & 0xff) << 46 |
               (uint64_t)slice << 24 | token;
}

static inline uint64_t ae_note_part(uint32_t job, uint64_t round, uint32_t group, uint32_t slice,
                                    uint32_t part)
{
        assert(job < AE_WIRE_MAX_JOBS && group < AE_WIRE_MAX_NODE_SUM_GROUPS);
        assert(slice < AE_WIRE_MAX_SLICES && part < AE_WIRE_MAX_PARTS);
        return (uint64_t)AE_NOTE_PART << 62 | (uint64_t)job << 54 | (round & 0xff) << 46 |
               (uint64_t)group << 42 | (uint64_t)slice << 20 | part;
}

static inline uint64_t ae_note_flow(uint32_t job, uint64_t epoch, uint64_t seq, uint32_t src,
                                    uint32_t dst)
{
        assert(job < AE_WIRE_MAX_JOBS && src < AE_WIRE_MAX_WORLD && dst < AE_WIRE_MAX_WORLD);
        return (uint64_t)AE_NOTE_FLOW << 62 | (uint64_t)job << 54 | (epoch & 0xff) << 46 |
               (seq & 0x3fff) << 32 | (uint64_t)src << 16 | dst;
}

static inline uint64_t ae_note_state(uint32_t job, uint64_t version, uint32_t token)
{
        assert(job < AE_WIRE_MAX_JOBS);
        return (uint64_t)AE_NOTE_STATE << 62 | (uint64_t)job << 54 | (version & 0xff) << 46 | token;
}

static inline enum ae_note_kind ae_note_kind(uint64_t note)
{
        return (enum ae_note_kind)(note >> 62);
}

static inline uint32_t ae_note_job(uint64_t note)
{
        return (note >> 54) & 0xff;
}

/* The eight low bits of the version, round or epoch. */
static inline uint32_t ae_note_stamp(uint64_t note)
{
        return (note >> 46) & 0xff;
}
