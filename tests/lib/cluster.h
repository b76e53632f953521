/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A cluster as threads of one process: daemons, each on a thread of its own with a loop of its own,
 * and workers that use libautoep over the real rings and sockets, of one job or of several at once.
 * One cluster at a time; the thread that calls cluster_run() waits for all others.
 *
 * A worker reports what it finds through CLUSTER_TRY and CLUSTER_CHECK, never with the asserts of
 * cmocka, which belong to the test's own thread.
 */
#pragma once

#include "client/autoep.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CLUSTER_NODES_MAX 8
#define CLUSTER_TIMEOUT_MS 20000 /* default of a worker's waits; a sanitizer's build is slow */

struct cluster_spec {
        uint32_t n_nodes;                    /* 1 to CLUSTER_NODES_MAX */
        uint32_t workers[CLUSTER_NODES_MAX]; /* of each node; ranks count from node 0 on */
        const char *transport;               /* "shm" (NULL) or "tcp" */
        uint32_t threads;                    /* compute threads of a daemon; 0: 1 */
        uint64_t hold_len, ring_len;         /* of every worker's options; ring_len 0: the least */
};

struct cluster;
struct cluster_crew;

struct cluster_worker {
        struct cluster *cluster;   /* borrowed */
        struct cluster_crew *crew; /* borrowed; the workers of its job */
        autoep *handle;          /* open; cluster_run() leaves the job and closes it */
        void *user;              /* borrowed from cluster_run()'s caller, shared by all workers */
        uint32_t rank, world, node, n_nodes;
};

/* What a worker does, on its own thread: 0; negative after it has reported a failure; positive when
 * its job has come to an end in which there is nothing to leave. */
typedef int (*cluster_fn)(struct cluster_worker *worker);

/*
 * Starts the daemons, then the workers; runs @fn for each of them and stops everything. Returns the
 * number of failures, all of them printed: of workers, of the start, and of anything that is left
 * behind (descriptors, threads, shared memory, files).
 */
int cluster_run(const struct cluster_spec *spec, cluster_fn fn, void *user);

/* The same with several jobs side by side; those of @spec have no part in it. */
struct cluster_job {
        uint32_t workers[CLUSTER_NODES_MAX];
        cluster_fn fn;
        void *user;
};
#define CLUSTER_JOBS_MAX 2
int cluster_run_jobs(const struct cluster_spec *spec, const struct cluster_job *jobs,
                     uint32_t n_jobs);

/* Workers of all nodes. */
uint32_t cluster_world(const struct cluster_spec *spec);

/* Options to open another handle at the worker's daemon: a reader. */
struct autoep_options cluster_reader_options(const struct cluster_worker *worker);

/* Waits for all workers of the job; negative when one of them has failed or returned. */
int cluster_barrier(struct cluster_worker *worker);

/* Notes a failure; returns -1. Use the macros. */
int cluster_failed(struct cluster_worker *worker, const char *file, int line, const char *format,
                   ...) __attribute__((format(printf, 4, 5)));

/* Returns from the calling function unless @call gives 0. */
#define CLUSTER_TRY(worker, call)                                                                 \
        do {                                                                                      \
                int try_ = (call);                                                                \
                if (try_ != 0)                                                                    \
                        return cluster_failed(worker, __FILE__, __LINE__, "%s gives %d: %s",      \
                                              #call, try_, autoep_last_error());                  \
        } while (0)

/* The same for a condition, with words and values. */
#define CLUSTER_CHECK(worker, condition, ...)                                                     \
        do {                                                                                      \
                if (!(condition))                                                                 \
                        return cluster_failed(worker, __FILE__, __LINE__, __VA_ARGS__);           \
        } while (0)

/* The same for a call that must fail with @code and a text that names @what. */
#define CLUSTER_REFUSED(worker, call, code, what)                                                 \
        do {                                                                                      \
                int refused_ = (call);                                                            \
                if (!cluster_is_refused(refused_, code, what))                                    \
                        return cluster_failed(worker, __FILE__, __LINE__,                         \
                                              "%s gives %d, not %d with '%s': %s", #call,         \
                                              refused_, code, what, autoep_last_error());         \
        } while (0)
bool cluster_is_refused(int result, int code, const char *what);
