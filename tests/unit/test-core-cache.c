/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The node's cache: what is fetched before it is asked for and in which order; who waits for room
 * when it is full, who gets it, and who has to go.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <string.h>

#define RANGE_N (UINT64_C(100) << 10)
#define V 1u /* the larger unit */

static void post_range(struct bed_worker *worker, uint64_t token)
{
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_RANGE, .unit = V, .n = RANGE_N,
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

static uint32_t n_range_fetches(const struct bed *bed)
{
        const struct ae_job *job = bed_job(bed, 0);
        uint32_t n = 0;

        for (uint32_t i = 0; i < job->n_fetches; i++)
                n += job->fetches[i].used && job->fetches[i].range;
        return n;
}

/* Whoever asks for what is on its way waits for the same bytes, which cross once. */
static void test_ranges_share_a_fetch(void **state)
{
        struct bed *bed = bed_new(2, AE_GIB);
        struct bed_worker *worker = NULL;

        (void)state;
        for (uint32_t rank = 0; rank < 2; rank++)
                assert_int_equal(bed_rank(bed, rank, rank, 2, &worker), 0);
        for (uint32_t rank = 0; rank < 2; rank++)
                bed_register(&bed->workers[rank], NULL);
        worker = &bed->workers[0];
        post_range(worker, 1);
        post_range(worker, 2);
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_RANGE, .unit = V, .n = RANGE_N - 1,
                                                   .token = 3 });
        assert_int_equal(n_range_fetches(bed), 2);
        bed_run(bed);
        assert_int_equal(n_answers(worker), 3);
        assert_int_equal(n_range_fetches(bed), 0);
        for (uint32_t i = 0; i < 3; i++) {
                assert_int_equal(answer(worker, i)->status, 0);
                assert_int_equal(answer(worker, i)->slot == answer(worker, 0)->slot,
                                 answer(worker, i)->token != 3);
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

                bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_RANGE, .unit = V, .n = 64,
                                                           .token = i });
                bed_run(bed);
                assert_int_equal(n_answers(worker), i + 1);
                assert_int_equal(cqe->status, 0);
                atomic_store(&page->cq_head, i + 1);
                atomic_store(&page->holds[cqe->slot], 1);
                bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_UNPIN, .slot = cqe->slot });
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

/* ---- three units, room for two -------------------------------------------------------------- */

#define N_THREE 3u
#define THREE_N BED_W_N /* elements of each */
#define THREE_LEN (THREE_N * 2)

/* One tensor of THREE_N elements in each of units u, v and x; the cache has room for @n_room. */
static void three_units(Autoep__Model *model, uint64_t n_room)
{
        static char unit[] = "x", nothing[] = "";
        Autoep__Tensor *x = model->tensors[4];

        x->unit = unit;
        x->alias_of = nothing;
        model->tensors[1] = model->tensors[2];
        model->tensors[2] = x;
        model->n_tensors = N_THREE;
        for (uint32_t t = 0; t < N_THREE; t++)
                model->tensors[t]->dims[0] = THREE_N;
        model->cache_len = n_room * THREE_LEN;
}

static void room_for_two(Autoep__Model *model)
{
        three_units(model, 2);
}

static void room_for_three(Autoep__Model *model)
{
        three_units(model, 3);
}

static struct bed *new_three(uint32_t n_nodes, void (*change)(Autoep__Model *model))
{
        struct bed *bed = bed_new(n_nodes, AE_GIB);
        struct bed_worker *worker = NULL;

        bed->hold_len = THREE_LEN;
        for (uint32_t rank = 0; rank < n_nodes; rank++)
                assert_int_equal(bed_rank(bed, rank, rank, n_nodes, &worker), 0);
        for (uint32_t rank = 0; rank < n_nodes; rank++)
                bed_register(&bed->workers[rank], change);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        assert_int_equal(bed_job(bed, 0)->layout->n_units, N_THREE);
        return bed;
}

static bool is_cached(const struct bed *bed, uint32_t unit)
{
        uint64_t entry = atomic_load(&bed_job(bed, 0)->entries[unit]);

        return ae_local_entry_slot(entry) != AE_LOCAL_SLOT_NONE;
}

/* As a number with a bit for each unit. */
static uint32_t cached(const struct bed *bed)
{
        uint32_t bits = 0;

        for (uint32_t u = 0; u < N_THREE; u++)
                bits |= (uint32_t)is_cached(bed, u) << u;
        return bits;
}

/* A gather that is answered, and let go. */
static void gather(struct bed *bed, uint32_t unit)
{
        struct bed_worker *worker = &bed->workers[0];
        const struct ae_local_cqe *cqe = answer(worker, n_answers(worker));

        bed_gather(worker, unit);
        bed_run(bed);
        assert_ptr_equal(cqe + 1, answer(worker, n_answers(worker)));
        assert_int_equal(cqe->token, unit);
        assert_int_equal(cqe->status, 0);
        assert_true(is_cached(bed, unit));
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_UNPIN, .slot = cqe->slot });
}

static void hint(struct bed *bed, uint32_t unit)
{
        bed_submit(&bed->workers[0], &(struct ae_local_sqe){ .op = AE_SQ_PREFETCH, .unit = unit });
}

/* A new version of all units; what it wants is on its way. */
static void commit(struct bed *bed)
{
        struct ae_job *job = bed_job(bed, 0);

        for (uint32_t u = 0; u < N_THREE; u++)
                job->updated[u] = true;
        ae_cache_commit(job);
        ae_core_settle(bed->nodes[0].core);
}

/* Misses in this order, which a commit then follows. */
static void learn(struct bed *bed, const uint32_t *order, uint32_t n)
{
        for (uint32_t i = 0; i < n; i++)
                gather(bed, order[i]);
        commit(bed);
        bed_run(bed);
}

static const uint32_t orders[][N_THREE] = {
        { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 },
};

/* Whatever the order was, what is used last has no room after a commit. */
static void test_commit_wants_the_first(void **state)
{
        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(orders); i++) {
                for (uint32_t n_nodes = 1; n_nodes <= 2; n_nodes++) {
                        struct bed *bed = new_three(n_nodes, room_for_two);

                        learn(bed, orders[i], N_THREE);
                        assert_int_equal(cached(bed), 1u << orders[i][0] | 1u << orders[i][1]);
                        bed_free(bed);
                }
        }
}

/* And with room for all they are asked for, and here, in that order. */
static void test_commit_wants_in_order(void **state)
{
        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(orders); i++) {
                struct bed *bed = new_three(1, room_for_three);
                uint32_t seen = 0;

                for (uint32_t k = 0; k < N_THREE; k++)
                        gather(bed, orders[i][k]);
                commit(bed);
                assert_int_equal(cached(bed), 0);
                for (uint32_t k = 0; k < N_THREE; k++) {
                        while (cached(bed) == seen)
                                assert_true(bed_step(bed));
                        seen |= 1u << orders[i][k];
                        assert_int_equal(cached(bed), seen);
                }
                bed_free(bed);
        }
}

/* A round without a miss teaches nothing, and what was learnt stays. */
static void test_order_stays(void **state)
{
        static const uint32_t order[] = { 2, 0, 1 };
        struct bed *bed = new_three(1, room_for_two);

        (void)state;
        learn(bed, order, AE_ARRAY_LEN(order));
        commit(bed);
        bed_run(bed);
        assert_int_equal(cached(bed), 1u << 2 | 1u << 0);
        bed_free(bed);
}

/* Room that comes free while the step runs: a view of the old version was in the way. */
static void test_hint_fetches(void **state)
{
        struct bed *bed = new_three(2, room_for_two);
        struct bed_worker *worker = &bed->workers[0];
        struct ae_job *job = bed_job(bed, 0);
        _Atomic uint32_t *hold = &bed_page(worker)->holds[job->units[0].slot];
        uint32_t n_done;

        (void)state;
        assert_int_equal(cached(bed), 1u << 0 | 1u << 1);
        atomic_store(hold, 1);
        commit(bed);
        bed_run(bed);
        assert_int_equal(cached(bed), 1u << 0);
        hint(bed, 2);
        bed_run(bed);
        assert_int_equal(cached(bed), 1u << 0); /* no room yet */
        atomic_store(hold, 0);
        hint(bed, 2);
        bed_run(bed);
        assert_int_equal(cached(bed), 1u << 0 | 1u << 2);
        assert_int_equal(n_answers(worker), 0);
        assert_int_equal(job->units[2].n_misses, 0);
        n_done = bed->n_done;
        gather(bed, 2); /* there at once: the entry has it */
        assert_int_equal(bed->n_done, n_done);
        bed_free(bed);
}

static uint32_t n_fetches(const struct ae_job *job)
{
        uint32_t n = 0;

        for (uint32_t i = 0; i < job->n_fetches; i++)
                n += job->fetches[i].used;
        return n;
}

/* A gather of what a hint has begun to fetch waits for that and asks for nothing more. */
static void test_gather_joins_a_hint(void **state)
{
        struct bed *bed = new_three(2, room_for_two);
        struct bed_worker *worker = &bed->workers[0];
        struct ae_job *job = bed_job(bed, 0);
        uint32_t slot = job->units[0].slot;

        (void)state;
        atomic_store(&bed_page(worker)->holds[slot], 1);
        commit(bed);
        bed_run(bed);
        atomic_store(&bed_page(worker)->holds[slot], 0);
        hint(bed, 1);
        assert_int_equal(n_fetches(job), 1);
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_GATHER, .unit = 1, .token = 1 });
        assert_int_equal(n_fetches(job), 1);
        assert_int_equal(n_answers(worker), 0);
        bed_run(bed);
        assert_int_equal(n_answers(worker), 1);
        assert_int_equal(answer(worker, 0)->status, 0);
        bed_free(bed);
}

/* A hint takes no room from what the order doesn't place after it. */
static void test_hint_evicts_nothing_earlier(void **state)
{
        static const uint32_t order[] = { 0, 1, 2 };
        struct bed *bed = new_three(1, room_for_two);
        uint32_t n_done;

        (void)state;
        hint(bed, 2); /* no order is known */
        bed_run(bed);
        assert_int_equal(cached(bed), 1u << 0 | 1u << 1);
        learn(bed, order, AE_ARRAY_LEN(order));
        n_done = bed->n_done;
        hint(bed, 2);
        bed_run(bed);
        assert_int_equal(bed->n_done, n_done);
        assert_int_equal(cached(bed), 1u << 0 | 1u << 1);
        gather(bed, 2); /* unit 1 has to go, and comes back for unit 2 */
        assert_int_equal(cached(bed), 1u << 0 | 1u << 2);
        hint(bed, 1);
        bed_run(bed);
        assert_int_equal(cached(bed), 1u << 0 | 1u << 1);
        bed_free(bed);
}

/* Who is gathered needs room: the unit whose place in the order is farthest goes, unless it is
 * held; then the next. */
static void test_farthest_goes(void **state)
{
        (void)state;
        for (size_t i = 0; i < 2 * AE_ARRAY_LEN(orders); i++) {
                const uint32_t *order = orders[i / 2];
                struct bed *bed = new_three(1, room_for_two);
                struct ae_job *job = bed_job(bed, 0);
                uint32_t stays = order[i % 2];

                learn(bed, order, N_THREE);
                if (i % 2)
                        atomic_store(&bed_page(&bed->workers[0])->holds[job->units[stays].slot], 1);
                gather(bed, order[2]);
                assert_int_equal(cached(bed), 1u << stays | 1u << order[2]);
                bed_free(bed);
        }
}

/* What the order doesn't have counts as farther than all of it. */
static void test_unknown_goes_first(void **state)
{
        static const uint32_t order[] = { 0, 2 };
        struct bed *bed = new_three(1, room_for_two);

        (void)state;
        learn(bed, order, AE_ARRAY_LEN(order));
        gather(bed, 1);
        assert_int_equal(cached(bed), 1u << 0 | 1u << 1); /* unit 2 is the later one */
        gather(bed, 2);
        assert_int_equal(cached(bed), 1u << 0 | 1u << 2);
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_range_waits_for_room),
                cmocka_unit_test(test_ranges_share_a_fetch),
                cmocka_unit_test(test_range_waits_for_views),
                cmocka_unit_test(test_range_evicts_for_a_slot),
                cmocka_unit_test(test_range_of_one_gone),
                cmocka_unit_test(test_range_of_a_failed_job),
                cmocka_unit_test(test_commit_wants_the_first),
                cmocka_unit_test(test_commit_wants_in_order),
                cmocka_unit_test(test_order_stays),
                cmocka_unit_test(test_hint_fetches),
                cmocka_unit_test(test_gather_joins_a_hint),
                cmocka_unit_test(test_hint_evicts_nothing_earlier),
                cmocka_unit_test(test_farthest_goes),
                cmocka_unit_test(test_unknown_goes_first),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
