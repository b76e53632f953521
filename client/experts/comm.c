/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Group communication: the operations that are composed of alltoallv. An all-reduce piece is cut
 * over the positions; each folds its own part in position order (ordered, so that the bits depend
 * on nothing but the group), then everyone sends its part to all. Runs on the caller's thread.
 */
#include "client/experts/comm.h"

#include "kernels/ops.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/local.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PIECE_FLOATS (AE_COMM_PIECE_LEN / sizeof(float))

/* A part is rounded up to whole elements, so that all replicated parts together can be longer than
 * a piece by one element per rank. */
static size_t piece_room(uint32_t size)
{
        return AE_COMM_PIECE_LEN + size * sizeof(float);
}

int ae_comm_init(struct ae_comm *comm, const struct ae_comm_ops *ops, const uint32_t *ranks,
                 uint32_t size, uint32_t position)
{
        struct ae_comm made = { .ops = ops, .size = size, .position = position };

        if (size == 0 || size > AE_COMM_SIZE_MAX || position >= size)
                return ae_fail(AE_EINVAL,
                               "cannot form a group of %u ranks with this one at position %u: "
                               "the size is 1..%d and the position below it",
                               size, position, AE_COMM_SIZE_MAX);
        assert(ops->alltoallv);
        made.ranks = calloc(size, sizeof(*made.ranks));
        made.lens = calloc(2 * (size_t)size, sizeof(*made.lens));
        made.pieces = size > 1 ? malloc(2 * piece_room(size)) : NULL;
        if (!made.ranks || !made.lens || (size > 1 && !made.pieces)) {
                ae_comm_deinit(&made);
                return ae_fail_sys(ENOMEM, "cannot form a group of %u ranks", size);
        }
        memcpy(made.ranks, ranks, size * sizeof(*ranks));
        *comm = made;
        return 0;
}

void ae_comm_deinit(struct ae_comm *comm)
{
        free(comm->ranks);
        free(comm->lens);
        free(comm->pieces);
        *comm = (struct ae_comm){ 0 };
}

int ae_comm_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len, void *recv,
                      const uint64_t *recv_len, uint64_t deadline_ns)
{
        assert(send_len[comm->position] == recv_len[comm->position]);
        return comm->ops->alltoallv(comm, send, send_len, recv, recv_len, deadline_ns);
}

/* Elements of @n that belong to @position when they are cut evenly. */
static size_t part_of(size_t n, uint32_t size, uint32_t position)
{
        return n / size + (position < n % size);
}

/* Folds size blocks of @n floats, back to back at @blocks, into @acc, in block order. */
static void fold_blocks(float *acc, const float *blocks, uint32_t size, size_t n)
{
        struct ae_ops_input inputs[AE_OPS_SUM_MAX];

        for (uint32_t first = 0; first < size; first += AE_OPS_SUM_MAX) {
                const uint32_t count = AE_MIN(size - first, (uint32_t)AE_OPS_SUM_MAX);
                struct ae_ops_sum sum = { .acc = acc, .n = n, .inputs = inputs,
                                          .n_inputs = count, .keep = first > 0 };

                for (uint32_t i = 0; i < count; i++)
                        inputs[i] = (struct ae_ops_input){ .data = blocks + (first + i) * n,
                                                           .dtype = AE_DTYPE_F32 };
                ae_ops()->sum(&sum);
        }
}

static void replicate(char *blocks, uint32_t size, size_t len)
{
        for (uint32_t p = 1; p < size; p++)
                memcpy(blocks + p * len, blocks, len);
}

static int reduce_piece(struct ae_comm *comm, float *data, size_t n, uint64_t deadline_ns)
{
        const size_t mine = part_of(n, comm->size, comm->position);
        uint64_t *parts = comm->lens;
        uint64_t *same = comm->lens + comm->size;
        char *arrived = comm->pieces;
        char *folded = arrived + piece_room(comm->size);
        int r;

        assert(mine * sizeof(float) * comm->size <= piece_room(comm->size));
        for (uint32_t p = 0; p < comm->size; p++) {
                parts[p] = part_of(n, comm->size, p) * sizeof(float);
                same[p] = mine * sizeof(float);
        }
        r = ae_comm_alltoallv(comm, data, parts, arrived, same, deadline_ns);
        if (r < 0)
                return r;
        fold_blocks((float *)folded, (const float *)arrived, comm->size, mine);
        replicate(folded, comm->size, mine * sizeof(float));
        return ae_comm_alltoallv(comm, folded, same, data, parts, deadline_ns);
}

static void begin(struct ae_comm *comm, enum ae_collective kind, uint64_t total)
{
        comm->kind = kind;
        comm->total = total;
}

static int end(struct ae_comm *comm, int r)
{
        comm->kind = AE_COLLECTIVE_EXCHANGE;
        comm->total = 0;
        return r;
}

int ae_comm_allreduce_sum_f32(struct ae_comm *comm, float *data, size_t n, uint64_t deadline_ns)
{
        int r = 0;

        if (comm->ops->allreduce_sum_f32)
                return comm->ops->allreduce_sum_f32(comm, data, n, deadline_ns);
        if (comm->size == 1)
                return 0;
        begin(comm, AE_COLLECTIVE_ALL_REDUCE, n * sizeof(*data));
        for (size_t at = 0; r == 0 && at < n; at += PIECE_FLOATS)
                r = reduce_piece(comm, data + at, AE_MIN(n - at, PIECE_FLOATS), deadline_ns);
        return end(comm, r);
}

/* Bytes [at, at + len) of every rank's @total bytes. */
static int gather_piece(struct ae_comm *comm, const char *send, size_t len, char *recv,
                        size_t total, uint64_t deadline_ns)
{
        uint64_t *same = comm->lens;
        char *arrived = comm->pieces;
        char *copies = arrived + piece_room(comm->size);
        int r;

        assert(len * comm->size <= piece_room(comm->size));
        for (uint32_t p = 0; p < comm->size; p++)
                same[p] = len;
        memcpy(copies, send, len);
        replicate(copies, comm->size, len);
        r = ae_comm_alltoallv(comm, copies, same, arrived, same, deadline_ns);
        if (r < 0)
                return r;
        for (uint32_t p = 0; p < comm->size; p++)
                memcpy(recv + p * total, arrived + p * len, len);
        return 0;
}

int ae_comm_allgather(struct ae_comm *comm, const void *send, uint64_t len, void *recv,
                      uint64_t deadline_ns)
{
        const size_t piece = AE_COMM_PIECE_LEN / comm->size;
        int r = 0;

        if (comm->ops->allgather)
                return comm->ops->allgather(comm, send, len, recv, deadline_ns);
        if (comm->size == 1) {
                if (len > 0)
                        memcpy(recv, send, len);
                return 0;
        }
        begin(comm, AE_COLLECTIVE_ALL_GATHER, len);
        for (size_t at = 0; r == 0 && at < len; at += piece)
                r = gather_piece(comm, (const char *)send + at, AE_MIN(len - at, piece),
                                 (char *)recv + at, len, deadline_ns);
        return end(comm, r);
}
