/* SPDX-License-Identifier: Apache-2.0 */
/* Group communication composed of alltoallv: order of sums, equality, odd sizes, faults. */
#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include "tests/lib/comm-local.h"
#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>

#define PIECE_FLOATS (AE_COMM_PIECE_LEN / sizeof(float))

static struct ae_group_topology one_group(uint32_t size)
{
        struct ae_group_topology topology;

        assert_int_equal(ae_group_init(size, size, AE_ORDER_ED, &topology), 0);
        return topology;
}

/* Values of very different size, so that another order of the sum gives other bits. */
static float value_of(uint32_t rank, size_t i)
{
        uint32_t x = (uint32_t)i * 2654435761u ^ (rank + 1) * 2246822519u;
        float size = 1;

        x = (x ^ (x >> 15)) * 2246822519u;
        x ^= x >> 13;
        for (uint32_t s = x % 25; s > 0; s--)
                size *= 2;
        return size * ((float)(x >> 8) / (float)(1 << 23) - 1);
}

struct reduce_job {
        size_t n;
        float *data[COMM_LOCAL_RANKS_MAX]; /* owned */
};

static int reduce_body(const struct local_rank *self)
{
        struct reduce_job *job = self->arg;

        return ae_comm_allreduce_sum_f32(self->ep, job->data[self->rank], job->n,
                                         self->deadline_ns);
}

/* How many elements another order of the ranks gives other bits for. */
static size_t check_fold(const struct reduce_job *job, uint32_t size)
{
        size_t n_ordered = 0;

        for (size_t i = 0; i < job->n; i++) {
                float sum = value_of(0, i), reverse = value_of(size - 1, i);

                for (uint32_t r = 1; r < size; r++) {
                        sum += value_of(r, i);
                        reverse += value_of(size - 1 - r, i);
                }
                n_ordered += memcmp(&sum, &reverse, sizeof(sum)) != 0;
                if (memcmp(&sum, &job->data[0][i], sizeof(sum)) != 0)
                        fail_msg("%u ranks, element %zu of %zu: %a, folded %a", size, i, job->n,
                                 (double)job->data[0][i], (double)sum);
        }
        for (uint32_t r = 1; r < size && job->n > 0; r++)
                assert_memory_equal(job->data[0], job->data[r], job->n * sizeof(float));
        return n_ordered;
}

static size_t reduce_once(uint32_t size, size_t n)
{
        const struct ae_group_topology topology = one_group(size);
        struct reduce_job job = { .n = n };
        size_t n_ordered;

        for (uint32_t r = 0; r < size; r++) {
                job.data[r] = malloc(n * sizeof(float) + 1);
                for (size_t i = 0; i < n; i++)
                        job.data[r][i] = value_of(r, i);
        }
        if (local_world_run(&topology, reduce_body, &job) < 0)
                fail_msg("%s", ae_error_text());
        n_ordered = check_fold(&job, size);
        for (uint32_t r = 0; r < size; r++)
                free(job.data[r]);
        return n_ordered;
}

static void allreduce_is_the_left_fold_in_every_bit(void **state)
{
        static const size_t lengths[] = { 0, 1, 2, 3, 7, 8, 9, 1001 };

        (void)state;
        for (uint32_t size = 1; size <= 8; size++) {
                for (size_t l = 0; l < AE_ARRAY_LEN(lengths); l++)
                        (void)reduce_once(size, lengths[l]);
        }
        assert_true(reduce_once(8, 1001) > 100);
}

static void allreduce_cuts_long_arrays_in_pieces(void **state)
{
        (void)state;
        (void)reduce_once(3, PIECE_FLOATS);
        (void)reduce_once(3, PIECE_FLOATS + 1);
        (void)reduce_once(2, 2 * PIECE_FLOATS + 13);
}

/* More ranks than one sum call takes. */
static void allreduce_of_many_ranks_keeps_the_order(void **state)
{
        (void)state;
        assert_true(reduce_once(19, 301) > 100);
        assert_true(reduce_once(33, 65) > 20);
}

struct gather_job {
        size_t len;
        unsigned char *all[COMM_LOCAL_RANKS_MAX]; /* owned */
};

static unsigned char byte_of(uint32_t rank, size_t i)
{
        return (unsigned char)(i * 31 + i / 251 + rank * 57);
}

static int gather_body(const struct local_rank *self)
{
        struct gather_job *job = self->arg;
        AE_CLEANUP(ae_cleanup_free) unsigned char *mine = malloc(job->len + 1);

        for (size_t i = 0; i < job->len; i++)
                mine[i] = byte_of(self->rank, i);
        return ae_comm_allgather(self->ep, mine, job->len, job->all[self->rank],
                                 self->deadline_ns);
}

static void allgather_gives_everyone_everything(void **state)
{
        static const size_t lengths[] = { 0, 1, 17, AE_COMM_PIECE_LEN / 3 + 5 };

        (void)state;
        for (uint32_t size = 1; size <= 5; size += 2) {
                const struct ae_group_topology topology = one_group(size);

                for (size_t l = 0; l < AE_ARRAY_LEN(lengths); l++) {
                        struct gather_job job = { .len = lengths[l] };

                        for (uint32_t r = 0; r < size; r++)
                                job.all[r] = calloc(size, lengths[l] + 1);
                        assert_int_equal(local_world_run(&topology, gather_body, &job), 0);
                        for (uint32_t r = 0; r < size; r++) {
                                for (size_t i = 0; i < size * lengths[l]; i++) {
                                        if (job.all[r][i] != byte_of((uint32_t)(i / lengths[l]),
                                                                     i % lengths[l]))
                                                fail_msg("rank %u, byte %zu", r, i);
                                }
                                free(job.all[r]);
                        }
                }
        }
}

/* Rank r sends r + 2 * p - 3 bytes, none below 0, to position p: several blocks are empty. */
static uint64_t block_len(uint32_t from, uint32_t to)
{
        return from + 2 * to > 3 ? from + 2 * to - 3 : 0;
}

static int exchange_body(const struct local_rank *self)
{
        uint64_t send_len[8], recv_len[8], n_send = 0, n_recv = 0, at = 0;
        unsigned char send[256], recv[256];

        for (uint32_t p = 0; p < self->ep->size; p++) {
                n_send += send_len[p] = block_len(self->rank, p);
                n_recv += recv_len[p] = block_len(p, self->rank);
        }
        memset(send, (int)self->rank, sizeof(send));
        int r = ae_comm_alltoallv(self->ep, n_send ? send : NULL, send_len, n_recv ? recv : NULL,
                                  recv_len, self->deadline_ns);

        for (uint32_t p = 0; r == 0 && p < self->ep->size; p++) {
                for (uint64_t i = 0; i < recv_len[p]; i++) {
                        if (recv[at++] != p)
                                return ae_fail(AE_EPROTO, "a byte of rank %u came wrong", p);
                }
        }
        return r;
}

static void empty_blocks_are_legal(void **state)
{
        (void)state;
        for (uint32_t size = 1; size <= 6; size++) {
                const struct ae_group_topology topology = one_group(size);

                if (local_world_run(&topology, exchange_body, NULL) < 0)
                        fail_msg("%s", ae_error_text());
        }
}

static int mismatch_body(const struct local_rank *self)
{
        uint64_t send_len[3] = { 0 }, recv_len[3] = { 0 };
        char byte = 0;

        if (self->rank == 2)
                recv_len[1] = 1;
        return ae_comm_alltoallv(self->ep, &byte, send_len, &byte, recv_len, self->deadline_ns);
}

static void a_mismatch_names_both_ranks(void **state)
{
        const struct ae_group_topology topology = one_group(3);

        (void)state;
        assert_int_equal(local_world_run(&topology, mismatch_body, NULL), AE_EMISMATCH);
        assert_non_null(strstr(ae_error_text(), "rank 1 sends 0 bytes to rank 2"));
}

static int missing_body(const struct local_rank *self)
{
        float data[4] = { 1, 2, 3, 4 };
        int r = ae_comm_allreduce_sum_f32(self->edp, data, 4, self->deadline_ns);

        if (r < 0 || self->rank == 5)
                return r; /* from now on it takes no part */
        return ae_comm_allreduce_sum_f32(self->edp, data, 4, ae_now_ns() + 200 * AE_NS_PER_MS);
}

static void a_missing_rank_is_named_at_the_deadline(void **state)
{
        struct ae_group_topology topology;

        (void)state;
        assert_int_equal(ae_group_init(6, 2, AE_ORDER_ED, &topology), 0); /* EDP: 1, 3, 5 */
        assert_int_equal(local_world_run(&topology, missing_body, NULL), AE_ETIMEDOUT);
        assert_non_null(strstr(ae_error_text(), "waited for rank 5"));
}

static int own_calls;

static int own_alltoallv(struct ae_comm *comm, const void *send, const uint64_t *send_len,
                         void *recv, const uint64_t *recv_len, uint64_t deadline_ns)
{
        (void)comm, (void)send, (void)send_len, (void)recv, (void)recv_len, (void)deadline_ns;
        return AE_ELOST;
}

static int own_allreduce(struct ae_comm *comm, float *data, size_t n, uint64_t deadline_ns)
{
        (void)comm, (void)data, (void)n, (void)deadline_ns;
        own_calls += 1;
        return 0;
}

static int own_allgather(struct ae_comm *comm, const void *send, uint64_t len, void *recv,
                         uint64_t deadline_ns)
{
        (void)comm, (void)send, (void)len, (void)recv, (void)deadline_ns;
        own_calls += 10;
        return 0;
}

static void a_backend_may_bring_its_own(void **state)
{
        static const struct ae_comm_ops ops = { .name = "own", .alltoallv = own_alltoallv,
                                                .allreduce_sum_f32 = own_allreduce,
                                                .allgather = own_allgather };
        static const struct ae_comm_ops less = { .name = "less", .alltoallv = own_alltoallv };
        static const uint32_t ranks[2] = { 4, 9 };
        struct ae_comm comm;
        float data[2] = { 0 }, all[4];

        (void)state;
        assert_int_equal(ae_comm_init(&comm, &ops, ranks, 2, 1), 0);
        assert_int_equal(ae_comm_allreduce_sum_f32(&comm, data, 2, 0), 0);
        assert_int_equal(ae_comm_allgather(&comm, data, sizeof(data), all, 0), 0);
        assert_int_equal(own_calls, 11);
        ae_comm_deinit(&comm);

        assert_int_equal(ae_comm_init(&comm, &less, ranks, 2, 1), 0);
        assert_int_equal(ae_comm_allreduce_sum_f32(&comm, data, 2, 0), AE_ELOST);
        assert_int_equal(ae_comm_allgather(&comm, data, sizeof(data), all, 0), AE_ELOST);
        ae_comm_deinit(&comm);
        assert_int_equal(ae_comm_init(&comm, &less, ranks, 0, 0), AE_EINVAL);
        assert_int_equal(ae_comm_init(&comm, &less, ranks, 2, 2), AE_EINVAL);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(allreduce_is_the_left_fold_in_every_bit),
                cmocka_unit_test(allreduce_cuts_long_arrays_in_pieces),
                cmocka_unit_test(allreduce_of_many_ranks_keeps_the_order),
                cmocka_unit_test(allgather_gives_everyone_everything),
                cmocka_unit_test(empty_blocks_are_legal),
                cmocka_unit_test(a_mismatch_names_both_ranks),
                cmocka_unit_test(a_missing_rank_is_named_at_the_deadline),
                cmocka_unit_test(a_backend_may_bring_its_own),
        };

        return cmocka_run_group_tests_name("expert-comm", tests, NULL, NULL);
}
