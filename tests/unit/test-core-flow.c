/* SPDX-License-Identifier: Apache-2.0 */
/* Exchanges and ranks that leave: what was sent arrives, what is waited for in vain is said. */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"
#include "tests/unit/test-core-bed.h"

#include <string.h>

#define LEN ((uint32_t)sizeof(struct ae_local_xhead))
#define N 10u /* messages, more than a flow has slots */

static void look(struct bed_worker *worker)
{
        assert_int_equal(ae_core_worker_ring(worker->worker), 0);
        bed_run(worker->bed);
}

static void post_send(struct bed_worker *worker, uint32_t i)
{
        memset(worker->worker->xout->base + i * LEN, (int)i, LEN);
        bed_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_XSEND, .rank = 1 - worker->rank,
                                                 .len = LEN, .pos = i * LEN });
}

static void leave(struct bed_worker *worker)
{
        Autoep__Leave *message = calloc(1, sizeof(*message));

        assert_non_null(message);
        autoep__leave__init(message);
        message->id = 9;
        worker->type = 0;
        assert_int_equal(ae_core_worker_message(worker->worker, AE_CONTROL_LEAVE, &message->base,
                                                -1), 0);
        bed_run(worker->bed);
}

/* Two ranks, on one node or on two. */
static struct bed *new_pair(uint32_t n_nodes)
{
        struct bed *bed = bed_new(n_nodes, AE_GIB);
        struct bed_worker *worker = NULL;

        for (uint32_t rank = 0; rank < 2; rank++)
                assert_int_equal(bed_rank(bed, rank % n_nodes, rank, 2, &worker), 0);
        for (uint32_t rank = 0; rank < 2; rank++)
                bed_register(&bed->workers[rank], NULL);
        assert_int_equal(bed_job(bed, 0)->state, AE_JOB_LIVE);
        return bed;
}

/* Takes message @i out of the flow of the other rank. */
static void receive(struct bed_worker *worker, uint32_t i)
{
        const struct ae_region *region = worker->worker->xin;
        const struct ae_local_xin *xin = (const struct ae_local_xin *)(void *)region->base;
        uint32_t from = 1 - worker->rank;
        uint64_t off = xin->slots_off +
                       (from * AE_LOCAL_XSLOTS + i % AE_LOCAL_XSLOTS) * xin->slot_len;

        assert_int_equal(atomic_load(&xin->flows[from].ready[i % AE_LOCAL_XSLOTS]), i + 1);
        assert_int_equal(region->base[off], i);
        bed_post(worker, &(struct ae_local_sqe){ .op = AE_SQ_XACK, .rank = from, .n = i + 1 });
        look(worker);
}

static void check_sent_before_leave(uint32_t n_nodes)
{
        struct bed *bed = new_pair(n_nodes);
        struct bed_worker *sender = &bed->workers[0];
        struct bed_worker *receiver = &bed->workers[1];

        for (uint32_t i = 0; i < N; i++)
                post_send(sender, i);
        leave(sender);
        assert_int_equal(sender->type, AE_CONTROL_DONE);
        bed_gone(sender, "it has left");
        for (uint32_t i = 0; i < N; i++)
                receive(receiver, i);
        assert_int_equal(bed_job(bed, receiver->node)->state, AE_JOB_LIVE);
        leave(receiver);
        bed_free(bed);
}

static void test_sent_before_leave(void **state)
{
        (void)state;
        check_sent_before_leave(1);
        check_sent_before_leave(2);
}

static void assert_failed(struct bed *bed, uint32_t node, const char *words)
{
        const struct ae_job *job = bed_job(bed, node);

        assert_int_equal(job->state, AE_JOB_FAILED);
        assert_int_equal(job->fail_status, AE_ELOST);
        if (!strstr(job->why, words))
                fail_msg("'%s' does not say '%s'", job->why, words);
}

/* Who sends to a rank that has left would wait for its part for ever. */
static void check_send_to_one_gone(uint32_t n_nodes, bool gone)
{
        struct bed *bed = new_pair(n_nodes);

        leave(&bed->workers[1]);
        if (gone)
                bed_gone(&bed->workers[1], "it has left");
        post_send(&bed->workers[0], 0);
        look(&bed->workers[0]);
        assert_failed(bed, 0, "rank 1 has left job 'job', and rank 0 is in an exchange with it");
        bed_free(bed);
}

static void test_send_to_one_gone(void **state)
{
        (void)state;
        for (uint32_t n_nodes = 1; n_nodes <= 2; n_nodes++) {
                check_send_to_one_gone(n_nodes, false);
                check_send_to_one_gone(n_nodes, true);
        }
}

/* It leaves with a message that it has not consumed: its sender waits for it. */
static void test_leave_in_an_exchange(void **state)
{
        (void)state;
        for (uint32_t n_nodes = 1; n_nodes <= 2; n_nodes++) {
                struct bed *bed = new_pair(n_nodes);

                post_send(&bed->workers[0], 0);
                look(&bed->workers[0]);
                leave(&bed->workers[1]);
                assert_failed(bed, 0, "rank 1 has left job 'job', and rank 0 is in an exchange");
                bed_free(bed);
        }
}

/* What is posted while a put is prepared stays in the ring, and so does the leave behind it. */
static void test_leave_during_put(void **state)
{
        struct bed *bed = new_pair(2);
        struct ae_job *job = bed_job(bed, 0);

        (void)state;
        job->put_prepared = true;
        post_send(&bed->workers[0], 0);
        leave(&bed->workers[0]);
        assert_int_equal(bed->workers[0].type, 0);
        job->put_prepared = false;
        look(&bed->workers[0]);
        assert_int_equal(bed->workers[0].type, AE_CONTROL_DONE);
        bed_gone(&bed->workers[0], "it has left");
        receive(&bed->workers[1], 0);
        bed_free(bed);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_sent_before_leave),
                cmocka_unit_test(test_send_to_one_gone),
                cmocka_unit_test(test_leave_in_an_exchange),
                cmocka_unit_test(test_leave_during_put),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
