/* SPDX-License-Identifier: Apache-2.0 */
/* What the simulated network promises beyond net.h: clock, timers, replay, partitions, deaths. */
#include "tests/lib/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/sim.h"

#define MS AE_NS_PER_MS

struct node {
        struct ae_sim *sim;
        struct ae_net *net;
        struct ae_net_conn *conn;
        uint32_t n[7];
        uint64_t down_at, seen; /* a digest of all events with their times */
        int down_status;
        char memory[4096];
        struct ae_net_mem *mem;
        struct ae_net_key key, peer_key;
        bool torn; /* at some event part of a put was there */
};

static void poll_node(struct node *node)
{
        struct ae_net_event events[8];
        int n;

        do {
                n = ae_net_poll(node->net, events, 8);
                for (int i = 0; i < n; i++) {
                        struct ae_net_event *event = &events[i];

                        node->n[event->kind]++;
                        node->seen = (node->seen ^ ae_sim_now(node->sim)) * 0x100000001b3u;
                        node->seen = (node->seen ^ (event->kind + event->len + event->note)) *
                                     0x100000001b3u;
                        if (event->kind == AE_NET_EV_UP)
                                node->conn = event->conn;
                        if (event->kind == AE_NET_EV_DOWN) {
                                node->down_at = ae_sim_now(node->sim);
                                node->down_status = event->status;
                        }
                }
        } while (n > 0 || ae_net_arm(node->net) == 1);
}

static void on_wake(void *user)
{
        poll_node(user);
}

static void node_open(struct node *node, struct ae_sim *sim, uint32_t id)
{
        char address[16];
        struct ae_net_options options = { .self = { 1, id, 1, 1 }, .loop = sim, .wake = on_wake,
                                          .user = node, .listen = address };

        snprintf(address, sizeof(address), "%u", id);
        *node = (struct node){ .sim = sim };
        assert_int_equal(ae_net_open("sim", &options, &node->net), 0);
        assert_int_equal(ae_net_map(node->net, node->memory, sizeof(node->memory), -1, 0,
                                    &node->mem), 0);
        poll_node(node);
}

static void node_connect(struct node *a, struct node *b, uint32_t id)
{
        struct ae_net_conn *conn;
        char address[16];

        snprintf(address, sizeof(address), "%u", id);
        assert_int_equal(ae_net_connect(a->net, address, id, &conn), 0);
        poll_node(a);
        ae_sim_run(a->sim, ae_sim_now(a->sim) + MS);
        assert_int_equal(a->n[AE_NET_EV_UP], 1);
        assert_int_equal(b->n[AE_NET_EV_UP], 1);
        assert_int_equal(ae_net_grant(a->conn, a->mem, 0, 2048, &b->peer_key), 0);
        assert_int_equal(ae_net_grant(b->conn, b->mem, 0, 2048, &a->peer_key), 0);
}

static void pair_open(struct node nodes[2], uint64_t seed, const struct ae_sim_params *params)
{
        struct ae_sim *sim;

        assert_int_equal(ae_sim_new(seed, params, &sim), 0);
        node_open(&nodes[0], sim, 1);
        node_open(&nodes[1], sim, 2);
        node_connect(&nodes[0], &nodes[1], 2);
}

static void pair_close(struct node nodes[2])
{
        ae_net_close(nodes[0].net);
        ae_net_close(nodes[1].net);
        ae_sim_free(nodes[0].sim);
}

/* --- clock and timers --- */

struct tick {
        struct ae_sim *sim;
        uint64_t at[8];
        uint32_t n;
};

static void on_tick(void *user)
{
        struct tick *tick = user;

        tick->at[tick->n++] = ae_sim_now(tick->sim);
        if (tick->n < 4)
                ae_sim_after(tick->sim, 10, on_tick, tick, NULL);
}

static void timers_in_order(void **state)
{
        struct tick tick = { 0 }, late = { .n = 4 }, never = { .n = 4 };
        struct ae_sim_timer timer, other;

        (void)state;
        assert_int_equal(ae_sim_new(1, NULL, &tick.sim), 0);
        late.sim = never.sim = tick.sim;
        assert_false(ae_sim_step(tick.sim));
        ae_sim_after(tick.sim, 100, on_tick, &late, &other);
        ae_sim_after(tick.sim, 5, on_tick, &tick, NULL);
        ae_sim_after(tick.sim, 7, on_tick, &never, &timer);
        ae_sim_cancel(tick.sim, &timer);
        ae_sim_run(tick.sim, 50);
        assert_int_equal(ae_sim_now(tick.sim), 50);
        assert_int_equal(tick.n, 4);
        for (uint64_t i = 0; i < 4; i++)
                assert_int_equal(tick.at[i], 5 + 10 * i);
        assert_int_equal(never.n, 4);
        assert_int_equal(late.n, 4);
        assert_true(ae_sim_step(tick.sim));
        assert_int_equal(ae_sim_now(tick.sim), 100);
        assert_int_equal(late.n, 5);
        ae_sim_cancel(tick.sim, &other); /* has run: nothing */
        assert_false(ae_sim_step(tick.sim));
        ae_sim_free(tick.sim);
        assert_null(ae_sim_free(NULL));
}

/* --- replay --- */

static uint64_t run_seed(uint64_t seed)
{
        struct ae_sim_params params = { .early_done_ppm = 300000, .loss_ppm = 500 };
        struct node nodes[2];
        uint64_t seen;

        pair_open(nodes, seed, &params);
        for (uint32_t i = 0; i < 300; i++) {
                struct node *from = &nodes[i % 2];

                if (ae_net_put(from->conn, &from->peer_key, i, from->mem, 2048, 100 + i, i, i) < 0)
                        break;
                (void)ae_net_msg(from->conn, &i, sizeof(i));
                ae_sim_run(from->sim, ae_sim_now(from->sim) + 1000);
                poll_node(from);
        }
        while (ae_sim_step(nodes[0].sim))
                continue;
        seen = nodes[0].seen ^ nodes[1].seen;
        pair_close(nodes);
        return seen;
}

static void a_seed_replays(void **state)
{
        (void)state;
        for (uint64_t seed = 1; seed < 6; seed++) {
                assert_int_equal(run_seed(seed), run_seed(seed));
                assert_int_not_equal(run_seed(seed), run_seed(seed + 100));
        }
}

/* --- tearing --- */

static void puts_tear_and_overtake(void **state)
{
        uint32_t n_torn = 0, n_early = 0, n_overtaken = 0;
        struct ae_sim_params params = { .early_done_ppm = 500000, .pieces_max = 8 };

        (void)state;
        for (uint64_t seed = 0; seed < 50; seed++) {
                struct node nodes[2];
                bool done_first = false, msg_first = false;

                pair_open(nodes, seed, &params);
                memset(nodes[0].memory + 2048, 1, 1000);
                assert_int_equal(ae_net_put(nodes[0].conn, &nodes[0].peer_key, 0, nodes[0].mem,
                                            2048, 1000, 7, 7), 0);
                assert_int_equal(ae_net_msg(nodes[0].conn, "m", 1), 0);
                while (!nodes[1].n[AE_NET_EV_NOTIFY]) {
                        uint32_t n_there = 0;

                        assert_true(ae_sim_step(nodes[0].sim));
                        for (size_t i = 0; i < 1000; i++)
                                n_there += nodes[1].memory[i] == 1;
                        n_torn += n_there > 0 && n_there < 1000;
                        if (nodes[1].n[AE_NET_EV_NOTIFY])
                                break;
                        done_first |= nodes[0].n[AE_NET_EV_PUT_DONE] > 0;
                        msg_first |= nodes[1].n[AE_NET_EV_MSG] > 0;
                        if (done_first) /* the source is the sender's again */
                                memset(nodes[0].memory + 2048, 9, 1000);
                }
                for (size_t i = 0; i < 1000; i++)
                        assert_int_equal(nodes[1].memory[i], 1);
                n_early += done_first;
                n_overtaken += msg_first;
                pair_close(nodes);
        }
        assert_true(n_torn > 20);
        assert_in_range(n_early, 10, 40);
        assert_in_range(n_overtaken, 10, 49);
}

/* --- faults --- */

static void partition_holds_and_heals(void **state)
{
        struct node nodes[2];
        uint32_t i;

        (void)state;
        pair_open(nodes, 3, NULL);
        for (i = 0; i < 50; i++)
                assert_int_equal(ae_net_msg(nodes[0].conn, &i, sizeof(i)), 0);
        ae_sim_partition(nodes[0].net, nodes[1].net);
        ae_sim_partition(nodes[1].net, nodes[0].net); /* already */
        assert_int_equal(ae_net_put(nodes[0].conn, &nodes[0].peer_key, 0, nodes[0].mem, 0, 10, 1,
                                    1), 0);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 9000 * MS);
        assert_int_equal(nodes[1].n[AE_NET_EV_MSG] + nodes[1].n[AE_NET_EV_NOTIFY], 0);
        ae_sim_heal(nodes[0].net, nodes[1].net);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 9000 * MS);
        assert_int_equal(nodes[1].n[AE_NET_EV_MSG], 50);
        assert_int_equal(nodes[1].n[AE_NET_EV_NOTIFY], 1);
        assert_int_equal(nodes[0].n[AE_NET_EV_PUT_DONE], 1);
        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN] + nodes[1].n[AE_NET_EV_DOWN], 0);
        pair_close(nodes);
}

static void long_partition_breaks(void **state)
{
        struct ae_sim_params params = { .cut_ns = 100 * MS };
        struct ae_net_conn *conn;
        struct node nodes[2];

        (void)state;
        pair_open(nodes, 4, &params);
        ae_sim_place(nodes[0].net, 1);
        assert_int_equal(ae_net_put(nodes[0].conn, &nodes[0].peer_key, 0, nodes[0].mem, 0, 10, 1,
                                    1), 0);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 99 * MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN] + nodes[1].n[AE_NET_EV_DOWN], 0);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 2 * MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN], 1);
        assert_int_equal(nodes[1].n[AE_NET_EV_DOWN], 1);
        assert_int_equal(nodes[0].n[AE_NET_EV_PUT_DONE], 1);
        assert_int_equal(nodes[1].n[AE_NET_EV_NOTIFY], 0);
        /* A connection begun in the dark ends at the handshake's deadline. */
        assert_int_equal(ae_net_connect(nodes[0].net, "2", 2, &conn), 0);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 4900 * MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN], 1);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 200 * MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN], 2);
        assert_int_equal(nodes[0].down_status, AE_ETIMEDOUT);
        ae_sim_place(nodes[0].net, 0);
        assert_int_equal(ae_net_connect(nodes[0].net, "2", 2, &conn), 0);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_UP], 2);
        pair_close(nodes);
}

static void loss_breaks(void **state)
{
        struct ae_sim_params params = { .loss_ppm = 10000 };
        struct node nodes[2];
        uint32_t n = 0;

        (void)state;
        pair_open(nodes, 5, &params);
        while (ae_net_msg(nodes[0].conn, &n, sizeof(n)) == 0) {
                n++;
                assert_true(n < 100000);
                ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 1000);
        }
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN], 1);
        assert_int_equal(nodes[1].n[AE_NET_EV_DOWN], 1);
        assert_true(nodes[1].n[AE_NET_EV_MSG] < n);
        pair_close(nodes);
}

static void the_dead_are_silent(void **state)
{
        uint32_t n_partial = 0;

        (void)state;
        for (uint64_t seed = 0; seed < 40; seed++) {
                struct node nodes[2];
                uint32_t n_there = 0;

                pair_open(nodes, seed, NULL);
                memset(nodes[0].memory + 2048, 1, 1000);
                assert_int_equal(ae_net_put(nodes[0].conn, &nodes[0].peer_key, 0, nodes[0].mem,
                                            2048, 1000, 7, 7), 0);
                ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + 25000);
                if (nodes[1].n[AE_NET_EV_NOTIFY] == 0) {
                        ae_sim_kill(nodes[0].net);
                        assert_int_equal(ae_net_msg(nodes[0].conn, "x", 1), AE_ELOST);
                        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + MS);
                        for (size_t i = 0; i < 1000; i++)
                                n_there += nodes[1].memory[i] == 1;
                        n_partial += n_there > 0;
                        assert_int_equal(nodes[1].n[AE_NET_EV_NOTIFY], 0);
                        assert_int_equal(nodes[1].n[AE_NET_EV_DOWN], 1);
                        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN], 0);
                }
                pair_close(nodes);
        }
        assert_true(n_partial > 3);
}

static void a_restart_takes_the_address(void **state)
{
        struct node nodes[2], again;
        struct ae_net_conn *conn;

        (void)state;
        pair_open(nodes, 6, NULL);
        ae_sim_kill(nodes[1].net);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_DOWN], 1);
        node_open(&again, nodes[0].sim, 2);
        assert_int_equal(ae_net_connect(nodes[0].net, "2", 2, &conn), 0);
        ae_sim_run(nodes[0].sim, ae_sim_now(nodes[0].sim) + MS);
        assert_int_equal(nodes[0].n[AE_NET_EV_UP], 2);
        assert_int_equal(again.n[AE_NET_EV_UP], 1);
        ae_net_close(again.net);
        pair_close(nodes);
}

/* --- scale --- */

#define MANY 100

static void all_to_all(void **state)
{
        struct node *nodes = calloc(MANY, sizeof(*nodes));
        struct ae_net_conn *conn;
        struct ae_sim *sim;
        char address[16];

        (void)state;
        assert_non_null(nodes);
        assert_int_equal(ae_sim_new(7, NULL, &sim), 0);
        for (uint32_t i = 0; i < MANY; i++)
                node_open(&nodes[i], sim, i);
        for (uint32_t i = 0; i < MANY; i++) {
                for (uint32_t j = 0; j < i; j++) {
                        snprintf(address, sizeof(address), "%u", j);
                        assert_int_equal(ae_net_connect(nodes[i].net, address, j, &conn), 0);
                }
                poll_node(&nodes[i]);
        }
        while (ae_sim_step(sim))
                continue;
        for (uint32_t i = 0; i < MANY; i++) {
                assert_int_equal(nodes[i].n[AE_NET_EV_UP], MANY - 1);
                assert_int_equal(nodes[i].n[AE_NET_EV_DOWN], 0);
                nodes[i].net = ae_net_close(nodes[i].net);
        }
        while (ae_sim_step(sim))
                continue;
        ae_sim_free(sim);
        free(nodes);
}

int main(void)
{
        static const struct CMUnitTest tests[] = {
                cmocka_unit_test(timers_in_order),
                cmocka_unit_test(a_seed_replays),
                cmocka_unit_test(puts_tear_and_overtake),
                cmocka_unit_test(partition_holds_and_heals),
                cmocka_unit_test(long_partition_breaks),
                cmocka_unit_test(loss_breaks),
                cmocka_unit_test(the_dead_are_silent),
                cmocka_unit_test(a_restart_takes_the_address),
                cmocka_unit_test(all_to_all),
        };

        return cmocka_run_group_tests_name("net-sim", tests, NULL, NULL);
}
