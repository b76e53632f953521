/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole job in one process and on a virtual clock: simulated daemons (struct ae_node over the
 * transport "sim"), their tasks, and workers that are scripts over the real shared pages. A seed
 * decides everything: the model, where ranks live, what they scatter and gather, in which order and
 * when. Gradients are small multiples of a power of two, so that sums are exact, and a reference
 * computed beside it must equal weights, masters, moments, norms and gathered images in every bit.
 *
 * What isn't as it must be fails the cmocka test, naming the seed. One thread.
 */
#pragma once

#include "proto/net/sim.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct simjob;

struct simjob_params {
        uint64_t seed;
        uint32_t n_nodes,
                n_ranks; /* ranks are spread over the nodes by the seed, at most 4 on one */
        uint32_t n_steps;
        uint32_t slots;            /* inbox slots per sender; 0: 2 */
        uint32_t large_one_in;     /* a unit is large with this chance; 0: never */
        bool huge;                 /* the first unit is larger than a cell */
        uint32_t max_units;        /* 0: 6 */
        bool pads;                 /* rings look small: pieces lie far apart in them */
        bool tight_cache;          /* the cache is as small as it may be */
        bool tight_overflow;       /* rounds may have to be redone for want of overflow memory */
        bool narrow_wire;          /* sums travel as bf16 */
        bool sgd;
        bool exchange, ranges, gets, puts;
        bool nan;                  /* some steps have a NaN somewhere */
        bool redo;                 /* some rounds a rank cannot finish */
        bool refuse;               /* some steps a rank asks for something else at first */
        bool misorder;             /* a rank takes part in other exchanges than all others */
        bool keep_views;           /* a rank may hold a view over the end of a step */
        uint32_t n_readers;        /* processes without a rank, which come and go */
        /* Puts also of what steps don't change, exchanges that fill their rings, hints without
         * end, and rings of odd lengths. */
        bool wild;
        bool may_fail;             /* a failed job is no error: faults are on their way */
        /* Tensors are addresses alone, for many nodes. Workers and optimizers then take
         * milliseconds, as they do, so that not all puts of a step are under way at once; and a
         * node that is woken finds more to do. */
        bool no_data;
        uint32_t n_units;          /* no_data: units, */
        uint32_t slices_per_unit;  /* and into how many slices each is cut */
        struct ae_sim_params net;
};

/* What a seed alone decides, for the runs of many seeds. */
void simjob_draw(uint64_t seed, struct simjob_params *ret_params);

struct simjob *simjob_new(const struct simjob_params *params);
/* Ends what has not ended, checks that nothing is left behind. NULL is fine. Returns NULL. */
struct simjob *simjob_free(struct simjob *job);

/* Runs until every worker has ended or @limit_ns of virtual time have passed; false then. */
bool simjob_run(struct simjob *job, uint64_t limit_ns);
/* Runs; a hang is a failure with a report of who waits for what. */
void simjob_run_to_end(struct simjob *job, uint64_t limit_ns);
void simjob_report(struct simjob *job, FILE *to);

struct ae_sim *simjob_sim(struct simjob *job);
/* The transport's endpoint of a node, for partitions. */
struct ae_net *simjob_net(struct simjob *job, uint32_t node);
struct ae_core *simjob_core(struct simjob *job, uint32_t node);
uint32_t simjob_rank_node(const struct simjob *job, uint32_t rank);
/* The step that the job is at: steps applied or skipped by now. */
uint32_t simjob_step(const struct simjob *job);
/* The virtual time at which the initial weights were in place; 0: not yet. */
uint64_t simjob_live_ns(const struct simjob *job);
/* Views that readers have let go, and found as they were. */
uint32_t simjob_n_reads(const struct simjob *job);
uint32_t simjob_n_verdicts(const struct simjob *job, uint32_t kind);

/* The daemon and all workers of a node are gone from one moment to the next. */
void simjob_kill_node(struct simjob *job, uint32_t node);
void simjob_kill_worker(struct simjob *job, uint32_t rank);

/* The one that @misorder is about. */
uint32_t simjob_misordered(const struct simjob *job);

struct simjob_end {
        bool ended, failed, killed; /* killed: by us, and told nothing */
        int status;                 /* of a failed one */
        const char *why;            /* borrowed */
        uint64_t at_ns;
};
void simjob_end(const struct simjob *job, uint32_t rank, struct simjob_end *ret_end);
