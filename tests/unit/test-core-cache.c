/* SPDX-License-Identifier: Apache-2.0 */
/* The node's cache when it is full: who waits for room, and who gets it. */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <string.h>

#define RANGE_N (UINT64_C(100) << 10)
#define V 1u /* the larger unit */

static void post(struct bed_worker *worker, const struct ae_local_sqe *sqe)
{
        struct ae_local_page *page = bed_page(worker);
        uint32_t tail = atomic_load(&page->sq_tail);

        page->sq[tail % AE_LOCAL_SQ_LEN] = *sqe;
        atomic_store(&page->sq_tail, tail + 1);
        assert_int_equal(ae_core_worker_ring(worker->worker), 0);
}

static void post_range(struct bed_worker *worker, uint64_t token)
{
        post(worker, &(struct ae_local_sqe){ .op = AE_SQ_RANGE, .unit = V, .n = RANGE_N,
                                             .token = token });
}

static const struct ae_local_cqe *answer(const struct bed_worker *worker, uint32_t i)
{
        return &bed_page(worker)->cq[i];
}

static uint32_t n_answers(const struct bed_worker *worker)
{
        return atomic_load(&bed_page(worker)->cq_tail);
}

/* Room for all units and nothing else. */
static void small_cache(Autoep__Model *model)
{
        model->cache_len = ae_align_up(BED_W_N * 2 + 256, 256) + ae_align_up(BED_BIG_N * 2, 256) +
                           1024;
        model->cache_len = ae_align_up(model->cache_len, 4096);
}

static struct bed *new_full(void)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        for (uint32_t rank = 0; rank < 2; rank++)
                assert_int_equal(bed_rank(bed, rank, rank, 2, &worker), 0);
        for (uint32_t rank = 0; rank < 2; rank++)
                bed_register(&bed->workers[rank], small_cache);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        return bed;
}

/* As a new version does: everything is on its way and nothing may be evicted. */
static void fill(struct bed *bed)
{
        struct ae_job *job = bed_job(bed, 0);

        for (uint32_t u = 0; u < BED_UNITS; u++)
                job->updated[u] = true;
        ae_cache_commit(job);
        ae_core_settle(bed->nodes[0].core);
        for (uint32_t u = 0; u < BED_UNITS; u++)
                assert_int_equal(job->slots[job->units[u].slot].state, AE_SLOT_FILLING);
}

static void test_range_waits_for_room(void **state)
{
        struct bed *bed = new_full();
        struct bed_worker *worker = &bed->workers[0];

        (void)state;
        fill(bed);
        post_range(worker, 1);
        post_range(worker, 2);
        assert_int_equal(n_answers(worker), 0);
        bed_run(bed);
        assert_int_equal(n_answers(worker), 2);
        for (uint32_t i = 0; i < 2; i++) {
                assert_int_equal(answer(worker, i)->token, i + 1);
                assert_int_equal(answer(worker, i)->status, 0);
                assert_int_equal(answer(worker, i)->len, RANGE_N);
        }
        bed_free(bed);
}

/* Views that nobody lets go: the text says what it waits for, and a release is seen by a tick. */
static void test_range_waits_for_views(void **state)
{
        struct bed *bed = new_full();
        struct bed_worker *worker = &bed->workers[0];
        struct ae_job *job = bed_job(bed, 0);
        struct ae_local_page *page = bed_page(worker);
        char why[sizeof(page->why.text)];

        (void)state;
        for (uint32_t u = 0; u < BED_UNITS; u++)
                atomic_store(&page->holds[job->units[u].slot], 1);
        post_range(worker, 1);
        bed_tick(bed, 20000000);
        assert_int_equal(n_answers(worker), 0);
        ae_local_text_get(&page->why, why);
        if (!strstr(why, "no room"))
                fail_msg("'%s' does not say that there is no room", why);
        atomic_store(&page->holds[job->units[V].slot], 0);
        bed_tick(bed, 20000000);
        assert_int_equal(n_answers(worker), 1);
        assert_int_equal(answer(worker, 0)->status, 0);
        bed_free(bed);
}

/* Ranges that are held have all slots but those of the units, which nobody holds: they give way. */
static void test_range_evicts_for_a_slot(void **state)
{
        struct bed *bed = bed_new_live(2);
        struct bed_worker *worker = &bed->workers[0];
        struct ae_job *job = bed_job(bed, 0);
        struct ae_local_page *page = bed_page(worker);

        (void)state;
        for (uint32_t i = 0; i < job->n_slots; i++) {
                const struct ae_local_cqe *cqe = &page->cq[i % AE_LOCAL_CQ_LEN];

                post(worker, &(struct ae_local_sqe){ .op = AE_SQ_RANGE, .unit = V, .n = 64,
                                                     .token = i });
                bed_run(bed);
                assert_int_equal(n_answers(worker), i + 1);
                assert_int_equal(cqe->status, 0);
                atomic_store(&page->cq_head, i + 1);
                atomic_store(&page->holds[cqe->slot], 1);
                post(worker, &(struct ae_local_sqe){ .op = AE_SQ_UNPIN, .slot = cqe->slot });
        }
        for (uint32_t u = 0; u < BED_UNITS; u++)
                assert_int_equal(job->units[u].slot, AE_LOCAL_SLOT_NONE);
        bed_free(bed);
}

/* One who waits and goes. */
static void test_range_of_one_gone(void **state)
{
        struct bed *bed = new_full();
        static const struct bed_hello hello = { .version = AE_WIRE_VERSION, .uid = 1000,
                                                .job = "job", .token = "secret", .reader = true };
        struct bed_worker *reader = NULL;

        (void)state;
        assert_int_equal(bed_hello(bed, 0, &hello, &reader), 0);
        bed_register_reader(reader);
        fill(bed);
        post_range(reader, 1);
        post_range(&bed->workers[0], 2);
        bed_gone(reader, "it ended"); /* and the queue is worked off */
        assert_int_equal(answer(&bed->workers[0], 0)->status, 0);
        bed_free(bed);
}

static void test_range_of_a_failed_job(void **state)
{
        struct bed *bed = new_full();

        (void)state;
        fill(bed);
        post_range(&bed->workers[0], 1);
        ae_job_fail(bed_job(bed, 0), AE_ELOST, "something was lost");
        assert_int_equal(answer(&bed->workers[0], 0)->status, AE_ELOST);
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_range_waits_for_room),
                cmocka_unit_test(test_range_waits_for_views),
                cmocka_unit_test(test_range_evicts_for_a_slot),
                cmocka_unit_test(test_range_of_one_gone),
                cmocka_unit_test(test_range_of_a_failed_job),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
