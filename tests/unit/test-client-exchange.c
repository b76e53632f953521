/* SPDX-License-Identifier: Apache-2.0 */
/* The exchange between handles on one fake daemon: blocks of all sizes, backpressure,
 * disagreements. */
#include "tests/lib/client-job.h"
#include "tests/lib/test.h"

#include <stdlib.h>
#include <string.h>

#define WORLD 3

struct rank {
        pthread_t thread;
        struct fake_daemon *d;
        autoep *h;
        uint32_t id, n;
        int (*run)(struct rank *rank);
        int r;
        char text[512];
};

static void *run_rank(void *arg)
{
        struct rank *rank = arg;

        rank->r = rank->run(rank);
        strncpy(rank->text, autoep_last_error(), sizeof(rank->text) - 1);
        return NULL;
}

/* One thread per rank; false if it cannot be started. */
static void run_all(struct rank *ranks, uint32_t n, int (*run)(struct rank *))
{
        for (uint32_t i = 0; i < n; i++) {
                ranks[i].run = run;
                assert_int_equal(pthread_create(&ranks[i].thread, NULL, run_rank, &ranks[i]), 0);
        }
        for (uint32_t i = 0; i < n; i++)
                pthread_join(ranks[i].thread, NULL);
}

static int join_job(struct rank *rank)
{
        struct job_model m;

        job_model_fill(&m);
        m.model.n_tensors = JOB_BIG; /* a small cache */
        m.model.ep_size = rank->n == 2 ? 2 : 1;
        return autoep_register(rank->h, &m.model, 10000);
}

static void join_all(struct rank *ranks, struct fake_daemon *d, uint32_t n)
{
        for (uint32_t i = 0; i < n; i++)
                ranks[i] = (struct rank){ .d = d, .id = i, .n = n, .h = job_open(d, (int)i) };
        run_all(ranks, n, join_job);
        for (uint32_t i = 0; i < n; i++)
                assert_int_equal(ranks[i].r, 0);
}

static void close_all(struct rank *ranks, uint32_t n)
{
        for (uint32_t i = 0; i < n; i++)
                autoep_close(ranks[i].h);
}

/* Bytes from @src to @dst in call @call. */
static uint64_t len_of(uint32_t call, uint32_t src, uint32_t dst)
{
        static const uint64_t lens[] = { 0, 1, 64, 960, 961, 4000, 100000 };

        return lens[(call * 5 + src * 3 + dst) % 7];
}

static uint8_t byte_of(uint32_t call, uint32_t src, uint32_t dst, uint64_t i)
{
        return (uint8_t)(call * 101 + src * 53 + dst * 17 + i * 7);
}

static int exchange_once(struct rank *rank, uint32_t call, enum autoep_group group)
{
        uint8_t *send = malloc(WORLD * 100000);
        uint8_t *recv = malloc(WORLD * 100000);
        uint64_t send_len[WORLD], recv_len[WORLD];
        uint64_t at = 0;
        int r;

        for (uint32_t p = 0; p < rank->n; p++) {
                send_len[p] = len_of(call, rank->id, p);
                recv_len[p] = len_of(call, p, rank->id);
                for (uint64_t i = 0; i < send_len[p]; i++)
                        send[at++] = byte_of(call, rank->id, p, i);
        }
        r = autoep_exchange(rank->h, group, send, send_len, recv, recv_len, 10000);
        at = 0;
        for (uint32_t p = 0; p < rank->n && r == 0; p++) {
                for (uint64_t i = 0; i < recv_len[p]; i++) {
                        if (recv[at++] != byte_of(call, p, rank->id, i))
                                r = 1;
                }
        }
        free(send);
        free(recv);
        return r;
}

static int exchange_often(struct rank *rank)
{
        for (uint32_t call = 0; call < 21; call++) {
                int r = exchange_once(rank, call, AUTOEP_GROUP_WORLD);

                if (r != 0)
                        return r;
        }
        return 0;
}

static void check_often(uint32_t n, uint64_t xout_len)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = n,
                                                                         .xout_len = xout_len });
        struct autoep_stats stats = { .size = sizeof(stats) };
        struct rank ranks[WORLD];

        join_all(ranks, d, n);
        run_all(ranks, n, exchange_often);
        for (uint32_t i = 0; i < n; i++) {
                if (ranks[i].r != 0)
                        fail_msg("rank %u: %d %s", i, ranks[i].r, ranks[i].text);
                assert_int_equal(autoep_stats(ranks[i].h, &stats), 0);
                assert_int_equal(stats.exchanges, 21);
        }
        fake_sync(d);
        for (uint32_t i = 0; i < n; i++) {
                for (uint32_t k = 0; k < n; k++) /* every message was acknowledged */
                        assert_int_equal(d->workers[i].flow_acked[k], d->workers[i].flow_sent[k]);
        }
        close_all(ranks, n);
        fake_daemon_stop(d);
}

static void blocks_of_all_sizes_arrive(void **state)
{
        (void)state;
        check_often(3, 0);
}

static void a_narrow_ring_is_no_deadlock(void **state)
{
        (void)state;
        check_often(3, 2 * 1024); /* two messages */
}

static void one_rank_copies(void **state)
{
        (void)state;
        check_often(1, 0);
}

static int exchange_in_groups(struct rank *rank)
{
        int r = 0;

        for (uint32_t call = 0; call < 4 && r == 0; call++) {
                uint32_t own = rank->id;
                uint64_t len = 8;
                uint64_t value = rank->id;
                uint64_t copy = 77;

                r = exchange_once(rank, call, AUTOEP_GROUP_EP); /* ep_size 2: both ranks */
                if (r == 0)
                        r = autoep_exchange(rank->h, AUTOEP_GROUP_EDP, &value, &len, &copy, &len,
                                            5000);
                if (r == 0 && copy != own)
                        r = 1;
        }
        return r;
}

static void groups_count_their_own_calls(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 2 });
        struct rank ranks[2];

        (void)state;
        join_all(ranks, d, 2);
        run_all(ranks, 2, exchange_in_groups);
        for (int i = 0; i < 2; i++) {
                if (ranks[i].r != 0)
                        fail_msg("rank %d: %d %s", i, ranks[i].r, ranks[i].text);
        }
        close_all(ranks, 2);
        fake_daemon_stop(d);
}

/* ---- disagreements ---------------------------------------------------------------------- */

static int disagree_on_length(struct rank *rank)
{
        uint8_t send[64] = { 0 };
        uint8_t recv[64];
        uint64_t send_len[2] = { 16, 16 };
        uint64_t recv_len[2] = { 16, 16 };

        if (rank->id == 0)
                recv_len[1] = 24; /* rank 1 sends 16 */
        return autoep_exchange(rank->h, AUTOEP_GROUP_WORLD, send, send_len, recv, recv_len, 5000);
}

static int disagree_on_group(struct rank *rank)
{
        uint8_t bytes[64] = { 0 };
        uint8_t recv[64];
        uint64_t len[2] = { 16, 16 };

        return autoep_exchange(rank->h, rank->id ? AUTOEP_GROUP_EP : AUTOEP_GROUP_WORLD, bytes, len,
                               recv, len, 5000);
}

/* Both sums have the same lengths: only what they are about tells them apart. */
static int disagree_on_layer(struct rank *rank)
{
        uint8_t bytes[64] = { 0 };
        uint8_t recv[64];
        uint64_t len[2] = { 16, 16 };
        int r = autoep_announce(rank->h, AUTOEP_GROUP_WORLD, AUTOEP_ALL_REDUCE, 1 + rank->id, 32);

        if (r < 0)
                return r;
        return autoep_exchange(rank->h, AUTOEP_GROUP_WORLD, bytes, len, recv, len, 5000);
}

static void disagreements_name_both_figures(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 2 });
        struct rank ranks[2];

        (void)state;
        join_all(ranks, d, 2);
        run_all(ranks, 2, disagree_on_length);
        assert_int_equal(ranks[0].r, AUTOEP_EMISMATCH);
        assert_non_null(strstr(ranks[0].text, "rank 1 sends a block of 16 bytes"));
        assert_non_null(strstr(ranks[0].text, "expects 24"));
        assert_int_equal(disagree_on_length(&ranks[0]), AUTOEP_ESTATE); /* it was the last one */
        close_all(ranks, 2);
        fake_daemon_stop(d);

        d = fake_daemon_start(&(struct fake_config){ .world = 2 });
        join_all(ranks, d, 2);
        run_all(ranks, 2, disagree_on_group);
        assert_int_equal(ranks[0].r, AUTOEP_EMISMATCH);
        assert_int_equal(ranks[1].r, AUTOEP_EMISMATCH);
        assert_non_null(strstr(ranks[1].text, "rank 0"));
        close_all(ranks, 2);
        fake_daemon_stop(d);

        d = fake_daemon_start(&(struct fake_config){ .world = 2 });
        join_all(ranks, d, 2);
        assert_int_equal(autoep_announce(ranks[0].h, (enum autoep_group)7, AUTOEP_EXCHANGE, 0, 0),
                         AUTOEP_EINVAL);
        assert_int_equal(autoep_announce(ranks[0].h, AUTOEP_GROUP_EP,
                                         (enum autoep_collective)99, 0, 0), AUTOEP_EINVAL);
        run_all(ranks, 2, disagree_on_layer);
        for (int i = 0; i < 2; i++) {
                assert_int_equal(ranks[i].r, AUTOEP_EMISMATCH);
                assert_non_null(strstr(ranks[i].text, "rank 0"));
                assert_non_null(strstr(ranks[i].text, "rank 1"));
                assert_non_null(strstr(ranks[i].text,
                                       "all-reduce 0 of the world group (id 1, 32 bytes)"));
                assert_non_null(strstr(ranks[i].text,
                                       "all-reduce 0 of the world group (id 2, 32 bytes)"));
        }
        close_all(ranks, 2);
        fake_daemon_stop(d);
}

static void a_deadline_names_the_missing(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 3 });
        struct rank ranks[3];
        uint8_t bytes[48] = { 0 };
        uint8_t recv[48];
        uint64_t len[3] = { 16, 16, 16 };
        uint64_t start;

        (void)state;
        join_all(ranks, d, 3);
        ae_local_text_set(&d->params->waiting, "rank 2 is in the debugger");
        start = job_now_ms();
        assert_int_equal(autoep_exchange(ranks[0].h, AUTOEP_GROUP_WORLD, bytes, len, recv, len, 50),
                         AUTOEP_ETIMEDOUT);
        job_assert_took(job_now_ms() - start, 50);
        job_assert_error_names("ranks 1 (node 0), 2 (node 0)");
        job_assert_error_names("rank 2 is in the debugger");
        close_all(ranks, 3);
        fake_daemon_stop(d);
}

static void wrong_arguments_are_refused(void **state)
{
        struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 1 });
        autoep *h = job_join(d);
        uint64_t len = 4;
        uint64_t other = 5;
        char data[8] = "";
        char recv[8];

        (void)state;
        assert_int_equal(autoep_exchange(h, (enum autoep_group)7, data, &len, recv, &len, 0),
                         AUTOEP_EINVAL);
        assert_int_equal(autoep_exchange(h, AUTOEP_GROUP_EP, data, NULL, recv, &len, 0),
                         AUTOEP_EINVAL);
        assert_int_equal(autoep_exchange(h, AUTOEP_GROUP_EP, NULL, &len, recv, &len, 0),
                         AUTOEP_EINVAL);
        assert_int_equal(autoep_exchange(h, AUTOEP_GROUP_EP, data, &len, recv, &other, 0),
                         AUTOEP_EINVAL);
        assert_int_equal(autoep_exchange(h, AUTOEP_GROUP_EP, data, &len, recv, &len, 0), 0);
        autoep_close(h);
        fake_daemon_stop(d);
}

/* ---- what a flow may hold --------------------------------------------------------------- */

/* Rank 0 waits for 16 bytes of rank 1; @head is what comes instead. */
static int receive_head(struct fake_daemon *d, autoep *h, const struct ae_local_xhead *head,
                        uint64_t ready)
{
        struct fake_worker *w = &d->workers[0];
        uint8_t send[32] = { 0 };
        uint8_t recv[32];
        uint64_t len[2] = { 16, 16 };

        memcpy((uint8_t *)w->xin + w->xin->slots_off + AE_LOCAL_XSLOTS * d->config.slot_len, head,
               sizeof(*head));
        atomic_store(&w->xin->flows[1].ready[0], ready);
        return autoep_exchange(h, AUTOEP_GROUP_WORLD, send, len, recv, len, 100);
}

static void every_word_of_a_header_is_checked(void **state)
{
        static const struct ae_local_xhead good = { .magic = AE_LOCAL_MAGIC, .src = 1, .len = 16,
                                                    .group = AUTOEP_GROUP_WORLD, .block_len = 16 };
        struct ae_local_xhead bad[8];
        int expected[8] = { AUTOEP_EPROTO, AUTOEP_EPROTO, AUTOEP_EPROTO, AUTOEP_EPROTO,
                            AUTOEP_EMISMATCH, AUTOEP_EPROTO, AUTOEP_EPROTO, AUTOEP_EPROTO };

        (void)state;
        for (int i = 0; i < 8; i++)
                bad[i] = good;
        bad[0].magic = 1;
        bad[1].src = 0;
        bad[2].dst = 1;
        bad[3].len = 4096;
        bad[4].seq = 1;
        bad[5].off = 8;
        bad[6].len = 0;
        for (int i = 0; i < 8; i++) {
                struct fake_daemon *d = fake_daemon_start(&(struct fake_config){ .world = 2 });
                struct rank ranks[2];
                int r;

                join_all(ranks, d, 2);
                r = receive_head(d, ranks[0].h, &bad[i], i == 7 ? 9 : 1);
                if (r != expected[i])
                        fail_msg("header %d gives %d: %s", i, r, autoep_last_error());
                close_all(ranks, 2);
                fake_daemon_stop(d);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(blocks_of_all_sizes_arrive),
                cmocka_unit_test(a_narrow_ring_is_no_deadlock),
                cmocka_unit_test(one_rank_copies),
                cmocka_unit_test(groups_count_their_own_calls),
                cmocka_unit_test(disagreements_name_both_figures),
                cmocka_unit_test(a_deadline_names_the_missing),
                cmocka_unit_test(wrong_arguments_are_refused),
                cmocka_unit_test(every_word_of_a_header_is_checked),
        };

        return cmocka_run_group_tests_name("client-exchange", tests, NULL, NULL);
}
