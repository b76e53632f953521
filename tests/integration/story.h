/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Worker processes for stories: a child of the test that holds one handle of libautoep and runs,
 * one after another, the functions that the test sends it. The test posts a call and takes its
 * result later, so that several ranks wait at the same time; a result has the status, the text and
 * how long it took. The test's thread; everything asserts.
 */
#pragma once

#include "client/autoep.h"
#include "tests/lib/proc.h"

#define STORY_WORLD_MAX 4
#define STORY_UNITS 3

struct story_args {
        uint32_t unit, what, flags;
        uint32_t n;
        int timeout_ms;
};

struct story_result {
        int status;
        int ms;         /* that it took, without those it had no processor */
        uint64_t value;
        char text[700];
};

/* What a worker knows; set before story_worker_start(), later its own. */
struct story_self {
        const struct proc_bed *bed; /* borrowed */
        const char *job, *token;    /* borrowed */
        uint32_t rank, world, node;
        uint32_t uid;                 /* 0: as the test */
        int timeout_ms;               /* of the handle */
        uint32_t unit_n[STORY_UNITS]; /* elements of the units */
        uint64_t hold_len, ring_len;
        void (*tweak)(const struct story_self *self, struct autoep_model *model,
                      struct autoep_tensor *tensors); /* NULL, or changes the model */
        autoep *handle;
        struct autoep_view view;
        float *data; /* as many as the largest unit has */
};

/* Runs in the worker. Returns the call's status; value may be set. */
typedef int story_fn(struct story_self *self, const struct story_args *args,
                     struct story_result *result);

struct story_worker {
        pid_t pid; /* 0: none */
        int fd;
        bool stopped;
        struct story_self self;
};

struct story_job {
        struct proc_bed *bed;
        const char *name;
        uint32_t world;
        struct story_worker workers[STORY_WORLD_MAX];
};

/* What a test has as its state. */
struct story {
        struct proc_bed bed;
        struct story_job job, other; /* other: a healthy one beside it */
};

/* Every how many-th of many cases to take: $STORY_THIN, by default 1, that is all. */
uint32_t story_thin(void);

int story_setup_tcp(void **state); /* 2 nodes, started */
int story_setup_shm(void **state);
int story_setup_one(void **state); /* 1 node */
int story_teardown(void **state);

/* ---- counting, by tests/lib/interpose.c, which is $INTERPOSE --------------------------------- */

/* First in main(): runs the program anew with the counter preloaded. */
void story_preload(const char *name);
/* 2 nodes whose daemons have it. */
int story_setup_counted(void **state, const char *transport);
/* SIGUSR1 begins to count in all daemons, SIGUSR2 ends it. */
void story_mark(const struct proc_bed *bed, int signal);
/* What the daemon's report after the last SIGUSR2 says of @word; the whole into @text. */
unsigned long story_report_of(const struct proc_bed *bed, uint32_t node, const char *word,
                              char *text, size_t size);
/* In a worker. */
struct story_counter {
        void (*begin)(void);
        unsigned long (*end)(int fd); /* calls; what they were to @fd */
        unsigned long (*memory)(void); /* calls that ended counting, but for locks */
        unsigned long (*live)(void);   /* bytes */
};
struct story_counter story_counter(void);

/* ---- workers ---------------------------------------------------------------------------- */

void story_worker_start(struct story_worker *worker);
void story_worker_end(struct story_worker *worker); /* SIGKILL; NULL pid is fine */
void story_post(struct story_worker *worker, story_fn *fn, struct story_args args);
/* The result of the oldest call, within @ms. */
struct story_result story_take(struct story_worker *worker, int ms);
struct story_result story_call(struct story_worker *worker, story_fn *fn, struct story_args args);
/* Asserts that it went well. */
void story_must(struct story_worker *worker, story_fn *fn, struct story_args args);
/* Asserts status and words, up to NULL, of a failure. */
void story_expect(const struct story_result *result, int status, ...);

/* ---- jobs ------------------------------------------------------------------------------- */

/* Defaults: ranks spread over the nodes in order, three units, 4 s of time. */
void story_job_init(struct story_job *job, struct proc_bed *bed, const char *name, uint32_t world);
/* Starts the workers, opens and registers. */
void story_job_up(struct story_job *job);
/* @n steps on all ranks, all applied. */
void story_job_steps(struct story_job *job, uint32_t n);
void story_job_leave(struct story_job *job);
void story_job_end(struct story_job *job);
/* Posts @fn to all and takes the results, which must be fine. */
void story_job_must(struct story_job *job, story_fn *fn, struct story_args args);

story_fn story_open, story_register, story_gather, story_release, story_scatter, story_step;
story_fn story_gather_range; /* the first n elements of a unit */
story_fn story_steps; /* n whole steps: gather, release, scatter of all units, step */
story_fn story_until; /* steps until the flag is set, see story_stop_flag() */
story_fn story_redo;  /* a step that gives the round up, after a release */
story_fn story_exchange, story_get, story_put, story_leave, story_close;
story_fn story_pause; /* for n seconds */

/* Makes story_until() of all workers that were started after it return; shared memory. */
void story_until_stop(void);
void story_until_reset(void);
/* Steps that story_until() of the other job has made so far. */
uint64_t story_until_count(void);
