/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The passes over memory and wire that a step declares, each with the time of its floor: what the
 * end-to-end figure of a scatter is held against. Bytes of all ranks and nodes of one machine,
 * since they share its memory; as many threads as the pass has in the cluster, at most the
 * processors.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/*        name         words */
#define AE_BENCH_PASS_TABLE(X)                                                                    \
        X(RING,        "ring copy")  /* bf16 gradients into the rings of all ranks */             \
        X(FOLD,        "node fold")  /* a node's ranks into its fp32 sum */                       \
        X(WIRE,        "wire")       /* sums to the owners elsewhere */                           \
        X(OWNER_FOLD,  "owner fold") /* the nodes' sums into the owner's total */                 \
        X(APPLY,       "apply")      /* AdamW */                                                  \
        X(CACHE,       "weights")    /* the new bf16 weights into every node's cache */

enum ae_bench_pass {
#define AE_BENCH_PASS_ENUM(name, words) AE_BENCH_PASS_##name,
        AE_BENCH_PASS_TABLE(AE_BENCH_PASS_ENUM)
#undef AE_BENCH_PASS_ENUM
        AE_BENCH_N_PASSES
};

struct ae_bench_passes_of {
        uint64_t n;              /* gradient elements of one rank */
        uint32_t nodes, workers; /* workers of each node */
        uint32_t n_cpus;
        uint32_t node_threads;   /* compute threads of a daemon */
        bool tcp;
        uint32_t repeats;
};

/* @ret_ns: nanoseconds of each pass. AE_ENOMEM, AE_ESYS. */
int ae_bench_passes(const struct ae_bench_passes_of *of, uint64_t ret_ns[AE_BENCH_N_PASSES]);
const char *ae_bench_pass_words(enum ae_bench_pass pass);
