/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A shard in its memfd: header, undo records, block versions, master, moments, weights. Everything
 * that a restarted daemon needs lies here: which version the weights are at, the verdict that was
 * noted, which blocks have been applied, and the old state of a block that was being changed.
 *
 * A block is AE_SHARD_BLOCK_N state elements, counted from the shard's first; an apply task covers
 * whole blocks, so no two tasks share one. It saves a block to its thread's undo record, changes
 * it, stamps its version, and ends the record. Repair after a kill puts back what was not stamped.
 */
#pragma once

#include "proto/wire/layout.h"
#include "proto/wire/wire.h"

#include <stdatomic.h>

#define AE_SHARD_MAGIC UINT64_C(0x3144524853504541) /* "AEPSHRD1" */
/* 2 KiB of master: what is saved, changed and fetched ahead of that stays in the first cache. */
#define AE_SHARD_BLOCK_N 512u
#define AE_SHARD_NO_BLOCK UINT64_MAX

struct ae_shard_undo {
        _Atomic uint64_t block; /* being changed; AE_SHARD_NO_BLOCK: none. Release after the save */
        uint64_t version;         /* that it is being brought to */
        uint64_t n;               /* elements */
        _Alignas(64) float master[AE_SHARD_BLOCK_N];
        float moment1[AE_SHARD_BLOCK_N];
        float moment2[AE_SHARD_BLOCK_N];
};

struct ae_shard_header {
        uint64_t magic;
        uint32_t version;          /* AE_WIRE_VERSION */
        uint32_t n_undo;
        uint64_t state_n, weight_len;
        uint64_t undo_off, blocks_off, master_off, moment1_off, moment2_off, weight_off;
        _Atomic uint64_t job_version; /* every slice is at least here */
        _Atomic uint64_t prepared; /* round + 1 of the noted verdict; 0: none. Release after it */
        _Atomic uint64_t committed;/* round + 1 of the last committed one */
        struct ae_wire_verdict verdict;
};

/* Views into the mapped memory; nothing owned. */
struct ae_shard {
        struct ae_shard_header *header;
        struct ae_shard_undo *undo;
        uint32_t *blocks;  /* low 32 bits of the version that the block was last brought to */
        float *master, *moment1, *moment2;
        char *weight;
        uint64_t state_n, weight_len;
};

/* Bytes that a shard of this size needs. */
uint64_t ae_shard_len(uint64_t state_n, uint64_t weight_len, uint32_t n_undo);
/* Lays a fresh, zeroed mapping of ae_shard_len() bytes out. */
void ae_shard_format(void *base, uint64_t state_n, uint64_t weight_len, uint32_t n_undo,
                     struct ae_shard *ret_shard);
/* Opens a mapping that was formatted before: AE_EPROTO when it is not one. */
int ae_shard_open(void *base, uint64_t len, struct ae_shard *ret_shard);
struct ae_task_apply;
struct ae_apply_run;

/*
 * Puts blocks back that were being changed and are not stamped; their weights, which a record does
 * not hold, are the masters rounded once more. @runs: all of the shard's, in order. Returns how
 * many blocks were put back.
 */
uint32_t ae_shard_repair(struct ae_shard *shard, const struct ae_apply_run *runs, uint32_t n_runs);

/* Runs the optimizer over the task's runs, block by block. @thread: its undo record. */
void ae_shard_apply(const struct ae_task_apply *apply, uint32_t thread);
