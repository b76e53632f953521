/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Communication inside one expert group (EP or EDP), as the experts part needs it.
 *
 * A backend (the exchange that daemons carry; NCCL) embeds struct ae_comm and fills a table of
 * operations. Only alltoallv is required: all-reduce and all-gather are built from it here, in
 * bounded pieces, and a backend that has a faster one with the same results puts it in the table.
 *
 * Every rank of the group takes part in every operation, in the same order, also with nothing to
 * send. An operation ends at its absolute deadline (ae_now_ns() time) with AE_ETIMEDOUT, or earlier
 * with AE_ELOST or AE_EMISMATCH, and the error text names the rank that was missing or differed.
 * Ranks that issue operations in different orders, or of different kinds or sizes, get
 * AE_EMISMATCH. After an error the group is broken and must be formed again. One thread per struct
 * at a time; operations block.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define AE_COMM_SIZE_MAX 65536
#define AE_COMM_PIECE_LEN (1024 * 1024) /* bytes of one piece of a composed operation */

struct ae_comm;

/* See the functions of the same names. */
struct ae_comm_ops {
        const char *name;
        int (*alltoallv)(struct ae_comm *comm, const void *send, const uint64_t *send_len,
                         void *recv, const uint64_t *recv_len, uint64_t deadline_ns);
        /* These may be NULL. */
        int (*allreduce_sum_f32)(struct ae_comm *comm, float *data, size_t n,
                                 uint64_t deadline_ns);
        int (*allgather)(struct ae_comm *comm, const void *send, uint64_t len, void *recv,
                         uint64_t deadline_ns);
};

struct ae_comm {
        const struct ae_comm_ops *ops; /* borrowed from the backend */
        uint32_t size;
        uint32_t position;  /* of this rank, [0, size) */
        uint32_t *ranks;    /* owned; job rank by position, for error texts */
        uint64_t *lens;     /* owned; 2 * size block lengths of composed operations */
        void *pieces;       /* owned; two pieces, NULL when size is 1 */

        /* What runs, for a backend that compares it between ranks. */
        uint32_t kind;      /* enum ae_collective */
        uint64_t total;     /* bytes, where they are alike on all ranks; otherwise 0 */
};

/*
 * Prepares the common part; the backend calls it from its own constructor. @ranks (size of them)
 * is copied. AE_EINVAL when size is 0 or above AE_COMM_SIZE_MAX or position is not in it;
 * AE_ENOMEM. Deinit accepts a zeroed struct and does not touch the backend.
 */
int ae_comm_init(struct ae_comm *comm, const struct ae_comm_ops *ops, const uint32_t *ranks,
                 uint32_t size, uint32_t position);
void ae_comm_deinit(struct ae_comm *comm);

/*
 * Exchanges blocks of bytes. @send holds one block per position, back to back in position order,
 * send_len[p] bytes for position p; @recv the same way from each position. What p sends to q must
 * be as long as what q expects from p. The own block is copied. @send and @recv do not overlap;
 * either may be NULL when its lengths are all 0.
 */
int ae_comm_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len, void *recv,
                      const uint64_t *recv_len, uint64_t deadline_ns);

/*
 * In place: data[i] becomes ((x_0[i] + x_1[i]) + x_2[i]) + ..., the left fold over positions in
 * fp32, with equal bits on every rank. @n is the same on every rank; 0 exchanges nothing.
 */
int ae_comm_allreduce_sum_f32(struct ae_comm *comm, float *data, size_t n, uint64_t deadline_ns);

/* @len bytes from every rank, in position order, into @recv (size * len bytes). */
int ae_comm_allgather(struct ae_comm *comm, const void *send, uint64_t len, void *recv,
                      uint64_t deadline_ns);
