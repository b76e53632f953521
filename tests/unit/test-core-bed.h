/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cores without a network: as many nodes as a test wants in one process and thread, joined by one
 * queue of messages, puts and tasks, which bed_run() works off in order. A test can put messages of
 * its own between them. Everything fails the running cmocka test when it can't be done.
 */
#pragma once

#include "server/core/core.h"

#define BED_NODES_MAX 3u
#define BED_WORKERS_MAX 8u
#define BED_UNITS 2u
#define BED_W_N 4096u    /* unit u: w, with a tied use in v, and bias */
#define BED_BIAS_N 8u
#define BED_BIG_N 300000u /* unit v: big, cut over two nodes, and fixed (frozen) */
#define BED_FIXED_N 100u

struct bed_worker {
        struct bed *bed;          /* borrowed */
        struct ae_worker *worker; /* NULL: it was refused or is gone */
        uint32_t node, rank;
        /* the last control message it got */
        uint32_t type;
        int status;               /* ERROR's */
        char text[512];
};

struct bed_node {
        struct bed *bed; /* borrowed */
        struct ae_core *core;
        uint32_t node;
};

/* Memory of node @owner into which node @peer may put. */
struct bed_grant {
        struct ae_region *region; /* borrowed */
        uint64_t off, len;
        uint32_t owner, peer;
        bool live;
};

/* A direction of the connection of two nodes. */
struct bed_line {
        bool up;
        uint32_t generation; /* grows whenever it comes up */
};

struct bed {
        uint32_t n_nodes;
        struct bed_node nodes[BED_NODES_MAX];
        struct bed_line lines[BED_NODES_MAX][BED_NODES_MAX];
        struct bed_grant *grants; /* owned; a key names one by its index */
        uint32_t n_grants;
        uint64_t big_n;        /* elements of big; BED_BIG_N unless changed before ranks register */
        uint64_t hold_len;     /* what workers say that they hold; 0: nothing is said */
        bool stopped;          /* bed_run() does nothing: the test steps */
        struct bed_worker workers[BED_WORKERS_MAX];
        uint32_t n_workers;
        struct ae_list events; /* struct event of test-core-bed.c */
        /* Tasks that wait for bed_let_go(); NULL: none do. */
        bool (*holds)(const struct ae_task *task);
        struct ae_list held;   /* likewise */
        uint64_t now_ns;
        uint32_t n_done;       /* events worked off, to see that nothing happened */
        uint32_t n_wakes;      /* of workers */
        uint32_t n_refused;    /* messages of cores that cores refused */
        char log[1024];        /* the last line */
};

struct bed_hello {
        uint32_t version, rank, world, uid;
        const char *job, *token;
        uint64_t incarnation;
        bool reader;
};

/* Nodes that know each other; @memory_len is each one's budget. */
struct bed *bed_new(uint32_t n_nodes, uint64_t memory_len);
/* All workers go, all cores are freed. Returns NULL. */
struct bed *bed_free(struct bed *bed);
void bed_run(struct bed *bed);
/* The key of a grant, as its peer has been told. */
struct ae_net_key bed_key(uint32_t grant);
/* Held tasks join the queue, and none is held any more. */
void bed_let_go(struct bed *bed);
/* Works off one event; false when there is none. */
bool bed_step(struct bed *bed);
/* The connection of two nodes breaks, with what is under way on it; or is there again. */
void bed_cut(struct bed *bed, uint32_t a, uint32_t b);
void bed_join(struct bed *bed, uint32_t a, uint32_t b);
/* Time passes: a tick on all nodes. */
void bed_tick(struct bed *bed, uint64_t ns);

/* What ae_core_worker_new() returns; then, when it was fine, its rank joins. */
int bed_hello(struct bed *bed, uint32_t node, const struct bed_hello *hello,
              struct bed_worker **ret_worker);
/* A hello with which nothing is wrong: job "job", token "secret", uid 1000. */
int bed_rank(struct bed *bed, uint32_t node, uint32_t rank, uint32_t world,
             struct bed_worker **ret_worker);
void bed_gone(struct bed_worker *worker, const char *text);
/* The test model, with initial values from rank 0; @change may alter it. */
void bed_register(struct bed_worker *worker, void (*change)(Autoep__Model *model));
/* With so many bytes of initial values from rank 0, right or wrong. */
#define BED_INIT_RIGHT UINT64_MAX /* as many as the model has */
void bed_register_init(struct bed_worker *worker, void (*change)(Autoep__Model *model),
                       uint64_t len);
void bed_register_reader(struct bed_worker *worker);
struct ae_local_page *bed_page(const struct bed_worker *worker);
/* An entry in the worker's ring, of which the core doesn't know yet. */
void bed_post(struct bed_worker *worker, const struct ae_local_sqe *sqe);
/* One that the core takes, and finds nothing wrong with. */
void bed_submit(struct bed_worker *worker, const struct ae_local_sqe *sqe);
/* A gather, whose token is the unit. */
void bed_gather(struct bed_worker *worker, uint32_t unit);
struct ae_job *bed_job(const struct bed *bed, uint32_t node);

/* A job of one rank a node that is live. */
struct bed *bed_new_live(uint32_t n_nodes);
/* The same of a bed without ranks. */
void bed_go_live(struct bed *bed);
/* A message as from @from at @to. */
int bed_inject(struct bed *bed, uint32_t from, uint32_t to, const void *data, size_t len);
