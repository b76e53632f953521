/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Overflow memory that is full: the round becomes a redo, and the text names the unit, whose piece
 * had no room, and the rank whose turn it is.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <string.h>

#define U 0u          /* w, and its tied use 1 */
#define V 1u
#define FULL "overflow memory of node 1 is full: "
#define PIECE_N 2048u /* more than all overflow memory */

static void post(struct bed_worker *worker, const struct ae_local_sqe *sqe)
{
        bed_submit(worker, sqe);
        bed_run(worker->bed);
}

/* Posts a piece, then wants the whole ring: one whose turn hasn't come must leave it. */
static void post_piece(struct bed_worker *worker, uint32_t unit, uint32_t micro, uint16_t use)
{
        struct ae_local_page *page = bed_page(worker);

        post(worker, &(struct ae_local_sqe){ .op = AE_SQ_PIECE, .unit = unit, .micro = micro,
                                             .use = use, .dtype = AE_DTYPE_F32, .n = PIECE_N,
                                             .len = PIECE_N * (uint32_t)sizeof(float) });
        atomic_store(&page->grad_wanted, page->grad_len);
        assert_int_equal(ae_core_worker_ring(worker->worker), 0);
        bed_run(worker->bed);
}

static void small_overflow(Autoep__Model *model)
{
        model->overflow_len = 4096;
}

/* Ranks 0 and 1 on node 1, and rank 2 on the decider's. */
static struct bed *new_three_ranks(void)
{
        static const uint32_t nodes[] = { 1, 1, 0 };
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        for (uint32_t rank = 0; rank < AE_ARRAY_LEN(nodes); rank++)
                assert_int_equal(bed_rank(bed, nodes[rank], rank, 3, &worker), 0);
        for (uint32_t rank = 0; rank < AE_ARRAY_LEN(nodes); rank++)
                bed_register(&bed->workers[rank], small_overflow);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        return bed;
}

/* All ask for the step; all nodes get the same verdict. */
static void check_redo(struct bed *bed, uint32_t unit, const char *text)
{
        for (uint32_t i = 0; i < bed->n_workers; i++) {
                struct ae_local_page *page = bed_page(&bed->workers[i]);

                page->step.round = 1;
                page->step.ask.n_groups = 1;
                post(&bed->workers[i], &(struct ae_local_sqe){ .op = AE_SQ_STEP, .token = 1 });
        }
        for (uint32_t node = 0; node < bed->n_nodes; node++) {
                const struct ae_wire_verdict *verdict = &bed_job(bed, node)->page->verdict;

                assert_int_equal(verdict->kind, AE_VERDICT_REDO);
                assert_int_equal(verdict->round, 1);
                assert_int_equal(verdict->bad.unit, unit);
                assert_string_equal(verdict->bad.text, text);
        }
        assert_int_equal(bed_job(bed, 0)->version, 0);
        bed_free(bed);
}

/* The lower rank hasn't scattered yet. */
static void test_waits_for_a_lower_rank(void **state)
{
        struct bed *bed = new_three_ranks();

        (void)state;
        post_piece(&bed->workers[1], V, 0, 0);
        check_redo(bed, V, FULL "unit 'v' of rank 1 waits for rank 0");
}

/* The higher rank is a micro-batch behind. */
static void test_waits_for_a_higher_rank(void **state)
{
        struct bed *bed = new_three_ranks();

        (void)state;
        post(&bed->workers[0], &(struct ae_local_sqe){ .op = AE_SQ_MICRO_END });
        post_piece(&bed->workers[0], V, 1, 0);
        check_redo(bed, V, FULL "unit 'v' of rank 0 waits for rank 1");
}

/* A tied use that comes before the unit itself waits for its own rank. */
static void test_waits_for_itself(void **state)
{
        struct bed *bed = new_three_ranks();

        (void)state;
        post_piece(&bed->workers[0], U, 0, 1);
        check_redo(bed, U, FULL "unit 'u' of rank 0 waits for rank 0");
}

/* Whose turn it is needs no overflow memory, however little there is. */
static void test_turns_need_none(void **state)
{
        struct bed *bed = new_three_ranks();

        (void)state;
        post_piece(&bed->workers[0], V, 0, 0);
        post(&bed->workers[0], &(struct ae_local_sqe){ .op = AE_SQ_SCATTERED, .unit = V });
        post_piece(&bed->workers[1], V, 0, 0);
        assert_false(bed_job(bed, 1)->redo);
        assert_int_equal(bed_page(&bed->workers[1])->grad_tail, PIECE_N * sizeof(float));
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_waits_for_a_lower_rank),
                cmocka_unit_test(test_waits_for_a_higher_rank),
                cmocka_unit_test(test_waits_for_itself),
                cmocka_unit_test(test_turns_need_none),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
