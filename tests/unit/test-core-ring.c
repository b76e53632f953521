/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Nonsense in a worker's submission ring: every entry with a field out of range is refused as a
 * breach of protocol, and the core does nothing else for it: no message, no task, no put, no
 * answer.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <stdlib.h>
#include <string.h>

#define PIECE_N 128u
#define PIECE_LEN (PIECE_N * 4)
#define XHEAD_LEN ((uint32_t)sizeof(struct ae_local_xhead))

static int post(struct bed_worker *worker, const struct ae_local_sqe *sqe)
{
        bed_post(worker, sqe);
        return ae_core_worker_ring(worker->worker);
}

static struct ae_local_sqe piece(void)
{
        return (struct ae_local_sqe){ .op = AE_SQ_PIECE, .dtype = AE_DTYPE_F32, .n = PIECE_N,
                                      .len = PIECE_LEN };
}

/* What the core has done so far, in figures. */
struct trace {
        uint64_t n_done, cq_tail, grad_tail, xout_tail, idle; /* no gaps: compared as bytes */
};

static struct trace trace_of(struct bed *bed)
{
        const struct ae_local_page *page = bed_page(&bed->workers[0]);

        return (struct trace){ .n_done = bed->n_done, .cq_tail = page->cq_tail,
                               .grad_tail = page->grad_tail, .xout_tail = page->xout_tail,
                               .idle = ae_list_empty(&bed->events) };
}

static void assert_nonsense(struct bed *bed, const struct ae_local_sqe *sqe)
{
        struct trace before = trace_of(bed);
        struct trace after;

        if (post(&bed->workers[0], sqe) != AE_EPROTO)
                fail_msg("entry %u was taken (unit %u use %u micro %u dtype %u rank %u slot %u)",
                         sqe->op, sqe->unit, sqe->use, sqe->micro, sqe->dtype, sqe->rank,
                         sqe->slot);
        after = trace_of(bed);
        assert_memory_equal(&before, &after, sizeof(before));
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
}

static const uint32_t bad_units[] = { BED_UNITS, 1000, UINT32_MAX };

static void test_units(void **state)
{
        static const uint16_t unit_ops[] = { AE_SQ_GATHER, AE_SQ_RANGE, AE_SQ_PREFETCH, AE_SQ_PIECE,
                                             AE_SQ_SCATTERED };
        struct bed *bed = bed_new_live(2);

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(unit_ops); i++) {
                for (size_t k = 0; k < AE_ARRAY_LEN(bad_units); k++) {
                        struct ae_local_sqe sqe = piece();

                        sqe.op = unit_ops[i];
                        sqe.unit = bad_units[k];
                        assert_nonsense(bed, &sqe);
                }
        }
        bed_free(bed);
}

static void test_unknown_ops(void **state)
{
        static const uint16_t unknown[] = { 0, 11, 12, 255, UINT16_MAX };
        struct bed *bed = bed_new_live(2);

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(unknown); i++)
                assert_nonsense(bed, &(struct ae_local_sqe){ .op = unknown[i] });
        bed_free(bed);
}

static void test_ranges_and_slots(void **state)
{
        static const struct {
                uint64_t first, n;
        } ranges[] = { { 0, 0 }, { 0, UINT64_MAX }, { UINT64_MAX, 1 }, { 1, UINT64_MAX },
                       { 1u << 20, 1 }, { 0, 1u << 20 }, { UINT64_MAX, UINT64_MAX } };
        static const uint32_t slots[] = { 0, 1, 323, 324, AE_LOCAL_SLOTS_MAX - 1,
                                          AE_LOCAL_SLOT_NONE, UINT32_MAX };
        struct bed *bed = bed_new_live(2);

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(ranges); i++)
                assert_nonsense(bed, &(struct ae_local_sqe){ .op = AE_SQ_RANGE,
                                                            .first = ranges[i].first,
                                                             .n = ranges[i].n });
        for (size_t i = 0; i < AE_ARRAY_LEN(slots); i++) /* nothing is pinned */
                assert_nonsense(bed, &(struct ae_local_sqe){ .op = AE_SQ_UNPIN, .slot = slots[i] });
        bed_free(bed);
}

static void test_pieces(void **state)
{
        struct bed *bed = bed_new_live(2);
        uint64_t ring = bed_page(&bed->workers[0])->grad_len;
        const struct ae_local_sqe good = piece();
        struct ae_local_sqe bad[19];
        size_t n = 0;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(bad); i++)
                bad[i] = good;
        bad[n++].use = 2; /* unit u: its own and one tied use */
        bad[n++].use = UINT16_MAX;
        bad[n++].micro = 1;
        bad[n++].micro = UINT32_MAX;
        bad[n++].dtype = 0;
        bad[n++].dtype = AE_DTYPE_I64;
        bad[n++].dtype = UINT16_MAX;
        bad[n++].dtype = AE_DTYPE_BF16; /* the length is of fp32 */
        bad[n++].n = 0;
        bad[n++].n = UINT64_MAX / 4 + 1 + PIECE_N; /* times four it is the length again */
        bad[n++].first = UINT64_MAX - 1;
        bad[n++].first = BED_W_N;
        bad[n++].first = BED_W_N - PIECE_N + 1;
        bad[n++].len = PIECE_LEN - 4;
        bad[n++].pos = AE_LOCAL_PIECE_LEN + 4; /* more is left out than a piece may have */
        bad[n++].pos = ring + 1;
        bad[n++].pos = ring - PIECE_LEN + 4; /* likewise, and across the end */
        bad[n++].pos = 2; /* not a multiple of an element */
        bad[n++].pos = UINT64_MAX - PIECE_LEN;
        assert_int_equal(n, AE_ARRAY_LEN(bad));
        for (size_t i = 0; i < n; i++)
                assert_nonsense(bed, &bad[i]);
        assert_int_equal(post(&bed->workers[0], &good), 0); /* the good one is good */
        bed_run(bed);
        bed_free(bed);
}

/* A piece that leaves the ring wakes nobody but a worker that waits for as much room. */
static void test_room(void **state)
{
        struct bed *bed = bed_new_live(1);
        struct ae_local_page *page = bed_page(&bed->workers[0]);
        struct ae_local_sqe sqe = piece();
        static const struct {
                uint64_t wanted; /* pieces */
                bool wakes;
        } cases[] = { { 0, false }, { 2, true }, { 4, false }, { 1, true }, { 5, true } };

        (void)state;
        for (uint64_t i = 0; i < AE_ARRAY_LEN(cases); i++) {
                uint32_t before = bed->n_wakes;

                sqe.unit = (uint32_t)i % BED_UNITS;
                sqe.first = i / BED_UNITS * PIECE_N;
                sqe.pos = i * PIECE_LEN;
                atomic_store(&page->grad_wanted, cases[i].wanted * PIECE_LEN);
                assert_int_equal(post(&bed->workers[0], &sqe), 0);
                bed_run(bed);
                assert_int_equal(page->grad_tail, (i + 1) * PIECE_LEN);
                assert_int_equal(bed->n_wakes - before, cases[i].wakes);
        }
        bed_free(bed);
}

static void test_lanes(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_local_sqe scattered = { .op = AE_SQ_SCATTERED, .unit = 0 };
        struct ae_local_sqe end = { .op = AE_SQ_MICRO_END, .micro = 0 };
        struct ae_local_sqe again = piece();

        (void)state;
        assert_int_equal(post(&bed->workers[0], &scattered), 0);
        bed_run(bed);
        assert_nonsense(bed, &scattered); /* twice in one micro-batch */
        assert_nonsense(bed, &again);
        end.micro = 1;
        assert_nonsense(bed, &end);
        end.micro = UINT32_MAX;
        assert_nonsense(bed, &end);
        end.micro = 0;
        assert_int_equal(post(&bed->workers[0], &end), 0);
        bed_run(bed);
        assert_nonsense(bed, &end);
        assert_nonsense(bed, &scattered);
        bed_free(bed);
}

static void test_steps(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct ae_local_step *step = &bed_page(&bed->workers[0])->step;
        struct ae_local_sqe ask = { .op = AE_SQ_STEP, .token = bed_job(bed, 0)->round };
        static const uint32_t counts[] = { 1, BED_BIAS_N - 1, BED_BIAS_N + 1,
                                          AE_WIRE_MAX_COUNTS + 1,
                                           UINT32_MAX };
        struct ae_local_sqe late = piece();

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(counts); i++) {
                step->n_counts = counts[i];
                assert_nonsense(bed, &ask);
        }
        step->n_counts = 0;
        assert_nonsense(bed, &ask); /* the request is of another round than the entry */
        step->round = ask.token;
        step->ask.n_groups = AE_WIRE_MAX_GROUPS + 1;
        assert_nonsense(bed, &ask);
        step->ask.n_groups = 1;
        step->expert_norm2.limb[9] = UINT64_C(1) << (AE_WIRE_RANK_NORM2 - AE_LONGACC_LOW) % 64;
        assert_nonsense(bed, &ask);
        step->expert_norm2.limb[9] = UINT64_MAX;
        assert_nonsense(bed, &ask);
        memset(&step->expert_norm2, 0, sizeof(step->expert_norm2));
        step->tokens = AE_WIRE_COUNT_MAX + 1; /* of all ranks they would wrap */
        assert_nonsense(bed, &ask);
        step->tokens = 0;
        step->micro_batches = UINT64_MAX;
        assert_nonsense(bed, &ask);
        step->micro_batches = 0;
        step->n_counts = BED_BIAS_N;
        step->counts[BED_BIAS_N - 1] = UINT64_MAX;
        assert_nonsense(bed, &ask);
        step->counts[BED_BIAS_N - 1] = 0;
        step->n_counts = 0;
        step->round = ++ask.token; /* one that has not come */
        assert_nonsense(bed, &ask);
        step->round = --ask.token;
        memset(step->bad_text, 'x', sizeof(step->bad_text)); /* no end: cut, not refused */
        assert_int_equal(post(&bed->workers[0], &ask), 0);
        bed_run(bed);
        assert_nonsense(bed, &ask);
        assert_nonsense(bed, &late);
        bed_free(bed);
}

static void test_exchange(void **state)
{
        struct bed *bed = bed_new_live(2);
        uint64_t ring = bed_page(&bed->workers[0])->xout_len;
        const struct ae_local_sqe good = { .op = AE_SQ_XSEND, .rank = 1, .len = XHEAD_LEN };
        struct ae_local_sqe bad[] = { good, good, good, good, good, good, good, good, good };
        size_t n = 0;

        (void)state;
        bad[n++].rank = 0; /* itself */
        bad[n++].rank = 2;
        bad[n++].rank = UINT32_MAX;
        bad[n++].len = XHEAD_LEN - 1;
        bad[n++].len = 0;
        bad[n++].len = UINT32_MAX;
        bad[n++].pos = ring + 1;
        bad[n++].pos = ring - XHEAD_LEN + 1;
        bad[n++].pos = UINT64_MAX;
        assert_int_equal(n, AE_ARRAY_LEN(bad));
        for (size_t i = 0; i < n; i++)
                assert_nonsense(bed, &bad[i]);
        assert_nonsense(bed, &(struct ae_local_sqe){ .op = AE_SQ_XACK, .rank = 2 });
        assert_nonsense(bed, &(struct ae_local_sqe){ .op = AE_SQ_XACK, .rank = UINT32_MAX });
        assert_nonsense(bed, &(struct ae_local_sqe){ .op = AE_SQ_XACK, .rank = 1, .n = 1 });
        assert_nonsense(bed, &(struct ae_local_sqe){ .op = AE_SQ_XACK, .rank = 1,
                                                    .n = UINT64_MAX });
        assert_int_equal(post(&bed->workers[0], &good), 0);
        bed_run(bed);
        assert_int_equal(bed->n_refused, 0);
        bed_free(bed);
}

/* Rank @rank of two sends the other a message of this collective of the world. */
static void send_collective(struct bed *bed, uint32_t rank, uint32_t id, uint64_t seq)
{
        struct bed_worker *worker = &bed->workers[rank];
        struct ae_local_xhead head = { .magic = AE_LOCAL_MAGIC, .group = 2, .id = id, .seq = seq,
                                       .kind = AE_COLLECTIVE_ALL_REDUCE, .total = 64,
                                       .round = 3 };
        struct ae_local_sqe sqe = { .op = AE_SQ_XSEND, .rank = 1 - rank, .len = XHEAD_LEN,
                                    .pos = seq * XHEAD_LEN };

        memcpy(worker->worker->xout->base + sqe.pos, &head, sizeof(head));
        assert_int_equal(post(worker, &sqe), 0);
}

/* The first announcement of a number counts, on each node; who differs is named everywhere. */
static void test_collective_order(void **state)
{
        static const char *const words[] = { "rank 0", "rank 1", "all-reduce 6 of the world group",
                                             "(id 7, 64 bytes)", "(id 8, 64 bytes)", "round 3" };

        (void)state;
        for (int both = 0; both < 2; both++) {
                struct bed *bed = bed_new_live(2);

                for (uint64_t seq = 0; seq < 6; seq++) { /* more than are kept */
                        send_collective(bed, 0, (uint32_t)seq, seq);
                        bed_run(bed);
                        send_collective(bed, 1, (uint32_t)seq, seq);
                        bed_run(bed);
                        for (uint32_t i = 0; i < 2; i++) {
                                struct ae_local_sqe ack = { .op = AE_SQ_XACK, .rank = 1 - i,
                                                            .n = seq + 1 };

                                assert_int_equal(post(&bed->workers[i], &ack), 0);
                        }
                        bed_run(bed);
                }
                assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
                send_collective(bed, 0, 7, 6);
                if (both) /* the messages cross, and are compared when they arrive */
                        send_collective(bed, 1, 8, 6);
                bed_run(bed);
                if (!both) /* compared when it is sent */
                        send_collective(bed, 1, 8, 6);
                bed_run(bed);
                for (uint32_t node = 0; node < 2; node++) {
                        assert_int_equal(bed_job(bed, node)->state, AE_JOB_FAILED);
                        assert_int_equal(bed_job(bed, node)->fail_status, AE_EMISMATCH);
                        for (size_t i = 0; i < AE_ARRAY_LEN(words); i++)
                                if (!strstr(bed_job(bed, node)->why, words[i]))
                                        fail_msg("no '%s' in '%s'", words[i],
                                                 bed_job(bed, node)->why);
                }
                assert_int_equal(bed->n_refused, 0);
                bed_free(bed);
        }
}

static void test_index(void **state)
{
        static const uint32_t jumps[] = { AE_LOCAL_SQ_LEN + 1, 1u << 31, UINT32_MAX };
        struct bed *bed = bed_new_live(1);
        struct ae_local_page *page = bed_page(&bed->workers[0]);
        uint32_t tail = atomic_load(&page->sq_tail);

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(jumps); i++) {
                atomic_store(&page->sq_tail, tail + jumps[i]);
                assert_int_equal(ae_core_worker_ring(bed->workers[0].worker), AE_EPROTO);
        }
        atomic_store(&page->sq_tail, tail);
        assert_int_equal(ae_core_worker_ring(bed->workers[0].worker), 0);
        bed_free(bed);
}

static void test_reader(void **state)
{
        static const uint16_t forbidden[] = { AE_SQ_PIECE, AE_SQ_SCATTERED, AE_SQ_MICRO_END,
                                             AE_SQ_STEP,
                                              AE_SQ_XSEND, AE_SQ_XACK };
        static const struct bed_hello hello = { .version = AE_WIRE_VERSION, .uid = 1000,
                                               .job = "job",
                                                .token = "secret", .reader = true };
        Autoep__Register *message = malloc(sizeof(*message));
        struct bed *bed = bed_new_live(1);
        struct bed_worker *reader = NULL;

        (void)state;
        assert_non_null(message);
        autoep__register__init(message);
        assert_int_equal(bed_hello(bed, 0, &hello, &reader), 0);
        assert_int_equal(ae_core_worker_message(reader->worker, AE_CONTROL_REGISTER,
                                                &message->base, -1),
                         0);
        assert_int_equal(reader->type, AE_CONTROL_REGISTERED);
        for (size_t i = 0; i < AE_ARRAY_LEN(forbidden); i++)
                assert_int_equal(post(reader, &(struct ae_local_sqe){ .op = forbidden[i] }),
                                 AE_EPROTO);
        assert_int_equal(post(reader, &(struct ae_local_sqe){ .op = AE_SQ_GATHER, .token = 5 }), 0);
        bed_run(bed);
        bed_gone(reader, "it ended"); /* a reader takes nobody with it */
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        bed_free(bed);
}

/* Entries of random bits, most with a legal op: taken or refused, never the daemon's end. */
static void test_random(void **state)
{
        struct bed *bed = bed_new_live(2);

        (void)state;
        srand(41);
        for (uint32_t i = 0; i < 20000; i++) {
                struct ae_local_sqe sqe;
                uint8_t *bytes = (uint8_t *)&sqe;

                for (size_t k = 0; k < sizeof(sqe); k++)
                        bytes[k] = rand() % 3 ? 0 : (uint8_t)(rand() % (rand() % 2 ? 4 : 256));
                sqe.op = (uint16_t)(rand() % 12);
                (void)post(&bed->workers[rand() % 2], &sqe);
                bed_run(bed);
                if (bed_job(bed, 0)->state == AE_JOB_LIVE)
                        continue;
                bed_free(bed);
                bed = bed_new_live(2);
        }
        bed_free(bed);
}

/* Two ranks and a reader on one node. */
static struct bed *new_shared(void)
{
        static const struct bed_hello reader = { AE_WIRE_VERSION, 0, 0, 1000, "job", "secret", 0,
                                                 true };
        struct bed *bed = bed_new(1, AE_GIB);
        struct bed_worker *worker = NULL;

        for (uint32_t rank = 0; rank < 2; rank++)
                assert_int_equal(bed_rank(bed, 0, rank, 2, &worker), 0);
        for (uint32_t rank = 0; rank < 2; rank++)
                bed_register(&bed->workers[rank], NULL);
        assert_int_equal(bed_hello(bed, 0, &reader, &worker), 0);
        bed_register_reader(worker);
        assert_int_equal(worker->type, AE_CONTROL_REGISTERED);
        return bed;
}

/* The slot that @worker is given for unit 0. */
static uint32_t gather(struct bed_worker *worker)
{
        struct ae_local_page *page = bed_page(worker);
        const struct ae_local_cqe *cqe = &page->cq[page->cq_tail % AE_LOCAL_CQ_LEN];

        assert_int_equal(post(worker, &(struct ae_local_sqe){ .op = AE_SQ_GATHER }), 0);
        bed_run(worker->bed);
        assert_int_equal(cqe->status, 0);
        atomic_store(&page->cq_head, page->cq_tail);
        return cqe->slot;
}

/* A pin is its worker's: no other one takes it off, and it goes with its worker. */
static void test_pins(void **state)
{
        struct bed *bed = new_shared();
        uint32_t slot = gather(&bed->workers[0]);
        const struct ae_local_sqe unpin = { .op = AE_SQ_UNPIN, .slot = slot };

        (void)state;
        assert_int_equal(bed_job(bed, 0)->slots[slot].n_pins, 1);
        for (uint32_t other = 1; other < 3; other++) {
                assert_int_equal(post(&bed->workers[other], &unpin), AE_EPROTO);
                assert_int_equal(bed_job(bed, 0)->slots[slot].n_pins, 1);
        }
        assert_int_equal(gather(&bed->workers[2]), slot);
        assert_int_equal(gather(&bed->workers[2]), slot);
        assert_int_equal(bed_job(bed, 0)->slots[slot].n_pins, 3);
        bed_gone(&bed->workers[2], "it ended"); /* a reader: the job goes on */
        assert_int_equal(bed_job(bed, 0)->slots[slot].n_pins, 1);
        assert_int_equal(post(&bed->workers[0], &unpin), 0);
        assert_int_equal(bed_job(bed, 0)->slots[slot].n_pins, 0);
        assert_int_equal(post(&bed->workers[0], &unpin), AE_EPROTO);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        bed_free(bed);
}

/* Answered or not, requests that have not been unpinned are counted. */
static void test_too_many_requests(void **state)
{
        static const struct ae_local_sqe request = { .op = AE_SQ_GATHER };
        struct bed *bed = new_shared();

        (void)state;
        for (uint32_t i = 0; i < AE_LOCAL_REQUESTS_MAX; i++) {
                if (i % 2)
                        (void)gather(&bed->workers[1]);
                else
                        assert_int_equal(post(&bed->workers[1], &request), 0);
        }
        assert_int_equal(post(&bed->workers[1], &request), AE_EPROTO);
        assert_int_equal(
                post(&bed->workers[1], &(struct ae_local_sqe){ .op = AE_SQ_RANGE, .n = 1 }),
                AE_EPROTO);
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_units),    cmocka_unit_test(test_unknown_ops),
                cmocka_unit_test(test_ranges_and_slots), cmocka_unit_test(test_pieces),
                cmocka_unit_test(test_room),
                cmocka_unit_test(test_lanes),    cmocka_unit_test(test_steps),
                cmocka_unit_test(test_exchange),
                cmocka_unit_test(test_collective_order), cmocka_unit_test(test_index),
                cmocka_unit_test(test_reader),   cmocka_unit_test(test_random),
                cmocka_unit_test(test_pins),     cmocka_unit_test(test_too_many_requests),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
