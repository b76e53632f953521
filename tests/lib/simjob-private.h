/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of simjob share: simjob.c nodes and life, simjob-worker.c scripts, simjob-plan.c
 * what ranks do, simjob-reader.c readers, simjob-ref.c the reference. It looks into the core on
 * purpose. */
#pragma once

#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "server/node.h"
#include "tests/lib/simjob.h"

#include <stdlib.h>
#include <string.h>

#define SIM_VERSIONS 4u   /* versions whose weights the reference keeps */
#define SIM_HELD 2u       /* views that a worker holds, at most */
#define SIM_UNIT_MAX 16u
#define SIM_XSLOT_LEN 4096u /* bytes of a slot of the exchange */

struct simgap {
        uint32_t unit;
        uint64_t first, n;
};

/* The reference: the whole job as plain arrays. */
struct simref {
        uint64_t next_round, version;
        uint32_t step, attempt; /* of the open round */
        bool refused;           /* the attempt has been refused once */
        bool calm;              /* the last attempt ran out of overflow memory */
        uint32_t n_kinds[8];
        float **p, **m, **v, **g;      /* per unit: its gradient image */
        char **image[SIM_VERSIONS];    /* by version, per unit: its gathered image */
        float **state[SIM_VERSIONS];   /* likewise: masters, then first moments */
        uint64_t *steps;               /* per tensor */
        struct ae_wire_verdict seen[8];/* by round */
        struct simgap *gaps;
        uint32_t n_gaps;
        float *table;                  /* gradients: values at any offset below 65536 */
        ae_bf16 *narrow;               /* the same */
};

struct simput { /* the put under way */
        bool active;
        uint32_t tensor;
        uint64_t first, n;
        float *values; /* masters, then moments; of what isn't stepped, weights as they are */
};

struct simnode {
        struct simjob *job;
        struct ae_node *node; /* NULL: killed */
        uint32_t id;
        bool polls;           /* a poll is scheduled */
        struct ae_list tasks; /* struct simtask */
        uint32_t n_regions;
        uint64_t checked;     /* version + 1 whose shard has been compared */
};

struct simtask {
        struct ae_list link;
        struct simnode *node;
        struct ae_task *task;
        bool ran;
        struct ae_sim_timer timer;
};

enum simaction_kind {
        SIM_RELEASE_ALL,
        SIM_PUT,
        SIM_PUT_WAIT,
        SIM_GET,
        SIM_XSEND,
        SIM_XRECV,
        SIM_GATHER,
        SIM_RANGE,
        SIM_PREFETCH,
        SIM_RELEASE,
        SIM_SCATTER,
        SIM_MICRO_END,
        SIM_STEP,
        SIM_IDLE,
        SIM_LEAVE
};

struct simaction {
        enum simaction_kind kind;
        uint32_t unit, micro, use;
        uint32_t rank, nth; /* exchange */
};

struct simheld {
        uint32_t unit, slot;
        uint64_t version, off, first, len;
        uint64_t digest; /* a reader's: of its bytes when it was taken */
};

struct simworker {
        struct simjob *job;
        struct simnode *node;
        uint32_t rank;            /* a reader: some number behind the last */
        bool reader;
        uint64_t idle_until_ns;
        struct ae_worker *worker; /* NULL: gone */
        struct ae_local_page *page;
        struct ae_local_params *params; /* NULL until registered */
        bool scheduled, rings;    /* a look, a doorbell are on their way */
        bool ended, failed, killed;
        int status;
        char why[1024];
        uint64_t ended_ns;
        uint32_t sq_tail, cq_head;
        uint64_t grad_pos, xout_pos;
        uint32_t step, attempt;
        struct simaction *actions;
        uint32_t n_actions, cap_actions, at;
        bool begun;               /* the action at @at has been begun and waits */
        uint32_t piece;           /* of the scatter at @at */
        uint64_t piece_pos;       /* where it goes; 0: not drawn */
        uint64_t token, asked_round;
        bool again;               /* the request was refused: ask without scattering */
        struct simheld held[SIM_HELD];
        uint32_t n_held;
        uint64_t *xsent, *xgot;   /* per rank */
        uint64_t *xsent_before, *xgot_before; /* the same when the round began */
        uint64_t *xacked;         /* per rank, of those it got */
        bool answered;            /* to the request at @at */
        int answer_status;
        uint64_t answer_version;
        int fd;                   /* memory of a get */
};

struct simjob {
        struct simjob_params params;
        struct ae_sim *sim;
        struct simnode *nodes;
        struct simworker *workers;
        uint32_t *rank_node;
        struct ae_group_topology topology;
        uint8_t *packed;          /* the model */
        size_t packed_len;
        struct ae_model *model;
        struct ae_layout *layout;
        uint32_t *n_uses;
        uint32_t n_counts;
        uint64_t init_len;
        char *init;
        struct simref ref;
        struct simput put;
        uint32_t put_done;        /* attempts whose put has been settled */
        uint32_t n_workers;       /* ranks, then readers */
        uint32_t n_ended;         /* ranks */
        uint32_t n_reads;
        uint64_t live_ns;
        bool freeing;
        int alias_fd;             /* no_data: memory that everything shares */
        char *reserved;           /* no_data: addresses of tensors */
        uint64_t reserved_len;
};

#define simjob_fail(job, ...)                                                                     \
        do {                                                                                      \
                fprintf(stderr, "simjob: seed %llu, at %llu us: ",                                \
                        (unsigned long long)(job)->params.seed,                                   \
                        (unsigned long long)(ae_sim_now((job)->sim) / 1000));                     \
                fprintf(stderr, __VA_ARGS__);                                                     \
                fputc('\n', stderr);                                                              \
                simjob_report(job, stderr);                                                       \
                fail();                                                                           \
        } while (0)

/* ---- simjob-plan.c: pure functions of the seed ------------------------------------------- */

uint64_t simplan_hash(const struct simjob *job, uint64_t what, uint64_t a, uint64_t b, uint64_t c,
                      uint64_t d);
void simplan_model(struct simjob *job);
uint32_t simplan_n_micro(const struct simjob *job, uint32_t step, uint32_t rank);
bool simplan_scatters(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t micro,
                      uint32_t unit, uint32_t use);
struct simpiece {
        uint64_t first, n;
        bool skipped;
};
/* Piece @k of a lane; false when there is none. Walks from piece 0. */
bool simplan_piece(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t micro,
                   uint32_t unit, uint32_t use, uint32_t k, struct simpiece *ret_piece);
/* Where the lane's values begin in the table. */
uint32_t simplan_table(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t micro,
                       uint32_t unit, uint32_t use);
/* Element @i of all gradients is multiplied by 2^this: powers so far apart that squares don't add
 * up exactly in double, while sums of one element over all ranks do, in any type that travels. */
uint32_t simplan_power(uint64_t i);
bool simplan_is_narrow(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t unit);
struct simnan {
        uint32_t rank, micro, unit, use;
        uint64_t element; /* of the unit's gradient image */
};
bool simplan_nan(const struct simjob *job, uint32_t step, struct simnan *ret_nan);
/* The rank that cannot finish this attempt, AE_WIRE_NONE: all can. */
uint32_t simplan_redo(const struct simjob *job, uint32_t attempt);
/* The rank that asks for something else at first; likewise. */
uint32_t simplan_refuse(const struct simjob *job, uint32_t attempt);
/* The rank that puts before this attempt; likewise. */
uint32_t simplan_put(const struct simjob *job, uint32_t attempt);
void simplan_ask(const struct simjob *job, uint32_t step, struct ae_wire_ask *ret_ask);
uint64_t simplan_tokens(const struct simjob *job, uint32_t step, uint32_t rank);
double simplan_expert_norm2(const struct simjob *job, uint32_t step, uint32_t rank);
uint32_t simplan_n_counts(const struct simjob *job, uint32_t step);
uint64_t simplan_count(const struct simjob *job, uint32_t step, uint32_t rank, uint32_t i);
uint32_t simplan_n_messages(const struct simjob *job, uint32_t attempt, uint32_t src, uint32_t dst);
/* The header of a message of @len bytes in all; @later: not the first of its flow in the round. */
struct ae_local_xhead simplan_header(const struct simjob *job, uint32_t attempt, uint32_t src,
                                     uint32_t dst, bool later, uint32_t len);
uint32_t simplan_message_len(const struct simjob *job, uint32_t src, uint32_t dst, uint64_t seq);
uint8_t simplan_message_byte(uint32_t src, uint32_t dst, uint64_t seq, uint32_t i);

/* ---- simjob-ref.c ------------------------------------------------------------------------ */

void simref_init(struct simjob *job);
void simref_deinit(struct simjob *job);
/* A verdict that a node shows: checked against the plan, and once for each round taken up. */
void simref_verdict(struct simjob *job, const struct ae_wire_verdict *verdict);
/* Compares a node's shard when nothing works on it. */
void simref_check_shard(struct simnode *node);
const char *simref_image(const struct simjob *job, uint64_t version, uint32_t unit);
/* Masters at that version, and n_grad further on first moments. */
const float *simref_state(const struct simjob *job, uint64_t version, uint32_t unit);
/* Takes up what the nodes have committed. */
void simref_catch_up(struct simjob *job);
uint64_t simref_grad_of(const struct simjob *job, uint32_t tensor); /* in its unit's image */
/* Whether steps change the tensor: it has masters and moments. */
bool simref_is_stepped(const struct simjob *job, uint32_t tensor);

/* ---- simjob-worker.c, -scatter.c, -exchange.c, -state.c ----------------------------------- */

void simworker_send(struct simworker *worker, uint32_t type, const ProtobufCMessage *message,
                    int fd);
int simworker_memory(const void *data, uint64_t len);
uint64_t simworker_chance(struct simworker *worker, uint64_t n); /* below n */
void simworker_post(struct simworker *worker, const struct ae_local_sqe *sqe);
/* Actions: whether they are done. */
bool simworker_scatter(struct simworker *worker, const struct simaction *action);
bool simworker_declare_scattered(struct simworker *worker, const struct simaction *action);
bool simworker_xsend(struct simworker *worker, const struct simaction *action);
bool simworker_xreceive(struct simworker *worker, const struct simaction *action);
bool simworker_put(struct simworker *worker);
bool simworker_get(struct simworker *worker);

void simworker_hello(struct simworker *worker);
void simworker_add(struct simworker *worker, struct simaction action);
void simworker_start(struct simworker *worker);
void simworker_wake(struct simworker *worker);
/* The executor looks before it sleeps: entries that the core would not take before. */
void simworker_ring_left(struct ae_worker *worker);
void simworker_message(struct simworker *worker, uint32_t type, const ProtobufCMessage *message);
void simworker_end(struct simworker *worker, bool failed, int status, const char *why);
const char *simworker_text(const struct simworker *worker);

/* ---- simjob-reader.c ---------------------------------------------------------------------- */

/* Attaches when there is something to read. */
void simreader_start(struct simworker *worker);
void simreader_plan(struct simworker *worker);
/* Of the segments in a view; what lies between them is undefined. */
uint64_t simreader_digest(const struct simworker *worker, const struct simheld *view);
bool simreader_idle(struct simworker *worker);
/* No rank is left: what it asked for may end with the job. */
bool simreader_is_over(const struct simworker *worker);

/* ---- simjob.c ----------------------------------------------------------------------------- */

void simnode_kick(struct simnode *node); /* something was done to it: poll it soon */
struct ae_job *simnode_job(const struct simnode *node); /* NULL: none */
