/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The optimizer beside gathers of the version that it makes: what is done can be gathered while the
 * rest is still being worked on, on the owner's node and on another one.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <string.h>

#define U 0u         /* the early unit: tensor w is all that is trainable in it */
#define V 1u         /* the late one, with the tensor big */
#define W 0u
#define MINUS_1 0xbf80u /* as bf16 */

/* @n gradients of 1 at absolute position @pos of the ring. */
static void scatter(struct bed_worker *worker, uint32_t unit, uint64_t pos, uint32_t n)
{
        float *ring = (float *)(void *)worker->worker->grad->base;

        assert_true((pos + n) * sizeof(float) <= bed_page(worker)->grad_len);
        for (uint64_t i = 0; i < n; i++)
                ring[pos + i] = 1;
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_PIECE, .unit = unit,
                                                   .dtype = AE_DTYPE_F32, .n = n,
                                                   .pos = pos * sizeof(float),
                                                   .len = n * (uint32_t)sizeof(float) });
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_SCATTERED, .unit = unit });
}

/* Plain SGD: masters and weights, all 0 before, become minus the sum of all ranks' gradients. The
 * buffer of unit U is balanced. */
static void ask(struct bed_worker *worker)
{
        struct ae_local_page *page = bed_page(worker);
        uint64_t round = bed_job(worker->bed, worker->node)->round;

        page->step.round = round;
        page->step.ask.n_groups = 1;
        page->step.ask.scale = 1;
        page->step.ask.hyper[0].lr = 1;
        page->step.ask.balance_rate = 1;
        page->step.n_counts = BED_BIAS_N;
        page->step.counts[0] = 1;
        bed_submit(worker, &(struct ae_local_sqe){ .op = AE_SQ_STEP, .token = round });
}

static void use_sgd(Autoep__Model *model)
{
        model->optimizer = AE_OPT_SGD;
}

static bool is_late(const struct ae_task *task)
{
        if (task->kind != AE_TASK_APPLY)
                return false;
        for (uint32_t i = 0; i < task->apply.n_runs; i++) {
                if (task->apply.runs[i].tensor == W)
                        return false;
        }
        return true;
}

static bool is_balance(const struct ae_task *task)
{
        return task->kind == AE_TASK_BALANCE;
}

/* One rank a node; rank 0 alone scatters, all ask. Tasks of the apply are held. */
static struct bed *new_half_applied(uint32_t n_nodes, uint64_t big_n,
                                    bool (*holds)(const struct ae_task *task))
{
        struct bed *bed = bed_new(n_nodes, AE_GIB);
        struct bed_worker *worker = NULL;
        uint32_t n_applying = 0;

        bed->big_n = big_n;
        for (uint32_t i = 0; i < n_nodes; i++)
                assert_int_equal(bed_rank(bed, i, i, n_nodes, &worker), 0);
        for (uint32_t i = 0; i < n_nodes; i++)
                bed_register(&bed->workers[i], use_sgd);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        bed->holds = holds;
        scatter(&bed->workers[0], U, 0, BED_W_N);
        scatter(&bed->workers[0], V, BED_W_N, (uint32_t)big_n);
        for (uint32_t i = 0; i < n_nodes; i++)
                ask(&bed->workers[i]);
        bed_run(bed);
        for (uint32_t i = 0; i < n_nodes; i++) {
                assert_int_equal(bed_job(bed, i)->version, 1);
                n_applying += bed_job(bed, i)->n_applying;
        }
        assert_true(n_applying > 0);
        return bed;
}

/* The last answer of a worker: to a gather of @unit, at version 1. */
static void check_answer(const struct bed_worker *worker, uint32_t n_answers, uint32_t unit)
{
        const struct ae_local_page *page = bed_page(worker);
        const struct ae_job *job = bed_job(worker->bed, worker->node);
        const struct ae_local_cqe *cqe = &page->cq[n_answers - 1];
        const uint16_t *weights;

        assert_int_equal(atomic_load(&page->cq_tail), n_answers);
        assert_int_equal(cqe->token, unit);
        assert_int_equal(cqe->status, 0);
        assert_int_equal(cqe->version, 1);
        weights = (const uint16_t *)(const void *)(job->params->base + job->page->cache_off +
                                                   cqe->off);
        for (uint32_t i = 0; i < BED_W_N; i++) {
                if (weights[i] != MINUS_1)
                        fail_msg("node %u, unit %u: element %u is %#x, not %#x", worker->node, unit,
                                 i, weights[i], MINUS_1);
        }
}

static void check_overlap(uint32_t n_nodes, uint64_t big_n)
{
        struct bed *bed = new_half_applied(n_nodes, big_n, is_late);

        for (uint32_t i = 0; i < n_nodes; i++) {
                struct bed_worker *worker = &bed->workers[i];
                struct ae_job *job = bed_job(bed, i);
                uint64_t entry = atomic_load(&job->entries[U]);

                assert_int_equal(ae_local_entry_version(entry), 1);
                assert_int_not_equal(ae_local_entry_slot(entry), AE_LOCAL_SLOT_NONE);
                entry = atomic_load(&job->entries[V]);
                assert_int_equal(ae_local_entry_slot(entry), AE_LOCAL_SLOT_NONE);
                bed_gather(worker, U);
                bed_run(bed);
                check_answer(worker, 1, U);
                bed_gather(worker, V);
                bed_run(bed);
                assert_int_equal(atomic_load(&bed_page(worker)->cq_tail), 1);
                assert_true(job->n_applying > 0);
        }
        bed_let_go(bed);
        bed_run(bed);
        for (uint32_t i = 0; i < n_nodes; i++) {
                assert_int_equal(bed_job(bed, i)->n_applying, 0);
                check_answer(&bed->workers[i], 2, V);
        }
        bed_free(bed);
}

/* The owner's own workers. */
static void test_gathers_beside_apply(void **state)
{
        (void)state;
        check_overlap(1, BED_BIG_N);
}

/* Others: a put goes out of a shard that is still being changed elsewhere. */
static void test_gathers_from_another_node(void **state)
{
        (void)state;
        check_overlap(2, 1000000);
        check_overlap(3, 1000000);
}

/* The next step waits for the rest, also for buffers, which have no sums. */
static void check_next(bool (*holds)(const struct ae_task *task))
{
        struct bed *bed = new_half_applied(2, 1000000, holds);

        for (uint32_t i = 0; i < 2; i++)
                ask(&bed->workers[i]);
        bed_run(bed);
        assert_int_equal(bed_job(bed, 0)->version, 1);
        bed_let_go(bed);
        bed_run(bed);
        assert_int_equal(bed_job(bed, 0)->version, 2);
        assert_int_equal(bed_job(bed, 1)->version, 2);
        bed_free(bed);
}

static void test_step_waits_for_apply(void **state)
{
        (void)state;
        check_next(is_late);
        check_next(is_balance);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_gathers_beside_apply),
                cmocka_unit_test(test_gathers_from_another_node),
                cmocka_unit_test(test_step_waits_for_apply),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
