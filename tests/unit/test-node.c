/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A node over a transport that takes nothing for a while: what waits keeps its order and its bytes,
 * allocates nothing once as much has waited before, and has a bound. And what a peer says last.
 */
#include "tests/lib/fault.h"
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/sim.h"
#include "server/core/job.h"
#include "server/node.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MS UINT64_C(1000000)
#define LARGE_EVERY 50u

/* Node 0's transport, that of the simulation but for what the test decides. */
static struct line {
        const struct ae_net_ops *real;
        struct ae_net_ops ops;
        bool watched;                /* msgs and puts come here, and go no further */
        uint64_t n_takes;            /* so many before AE_EAGAIN */
        bool writable;               /* the next poll says so */
        struct ae_net_conn *conn;
        uint64_t n_taken;            /* in order, as numbered by the test */
        char last[AE_NET_MSG_MAX];
        size_t last_len;
} line;

static struct pair {
        struct ae_sim *sim;
        struct ae_node *nodes[2];
        char memory[65536]; /* node 0 puts from it */
        struct ae_region region;
        char log[1024]; /* node 0's last line */
} pair;

static size_t len_of(uint64_t i)
{
        return i % LARGE_EVERY == 7 ? AE_NET_MSG_MAX - i
                                    : sizeof(struct ae_wire_head) + i * 7919 % 9000;
}

static bool is_put(uint64_t i)
{
        return i % 5 == 3;
}

static const char *msg(uint64_t i)
{
        static char bytes[AE_NET_MSG_MAX];
        struct ae_wire_head head = { .op = AE_WIRE_CREDIT, .job = 3, .round = i };

        memset(bytes, (int)(i * 31 + 1), len_of(i));
        bytes[len_of(i) - 1] = (char)i;
        memcpy(bytes, &head, sizeof(head));
        return bytes;
}

static int line_msg(struct ae_net_conn *conn, const void *data, size_t len)
{
        if (!line.watched)
                return line.real->msg(conn, data, len);
        line.conn = conn;
        if (line.n_takes == 0)
                return AE_EAGAIN;
        line.n_takes--;
        memcpy(line.last, data, len);
        line.last_len = len;
        line.n_taken++;
        if (((const struct ae_wire_head *)line.last)->op != AE_WIRE_CREDIT)
                return 0;
        assert_false(is_put(line.n_taken - 1));
        assert_int_equal(len, len_of(line.n_taken - 1));
        assert_memory_equal(data, msg(line.n_taken - 1), len);
        return 0;
}

static int line_put(struct ae_net_conn *conn, const struct ae_net_key *key, uint64_t off,
                    struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
                    uint64_t cookie)
{
        line.conn = conn;
        if (line.n_takes == 0)
                return AE_EAGAIN;
        line.n_takes--;
        assert_int_equal(note, line.n_taken);
        assert_true(is_put(note));
        assert_int_equal(key->bytes[5], note % 256);
        assert_int_equal(off, 10 * note);
        assert_ptr_equal(src, pair.region.mem);
        assert_int_equal(src_off, 11 * note);
        assert_int_equal(len, 12 * note);
        assert_int_equal(cookie, 13 * note);
        line.n_taken++;
        return 0;
}

static int line_poll(struct ae_net *net, struct ae_net_event *events, int n_max)
{
        if (!line.writable)
                return line.real->poll(net, events, n_max);
        line.writable = false;
        events[0] = (struct ae_net_event){ .kind = AE_NET_EV_WRITABLE, .conn = line.conn };
        return 1;
}

/* ---- two nodes -------------------------------------------------------------------------- */

static void on_wake(void *user)
{
        (void)user;
}

static void on_log(void *user, int level, const char *text)
{
        (void)level;
        if (user == &pair.nodes[0])
                (void)snprintf(pair.log, sizeof(pair.log), "%s", text);
}

static void turn(uint32_t n)
{
        for (uint32_t i = 0; i < n; i++) {
                ae_sim_run(pair.sim, ae_sim_now(pair.sim) + 20 * MS);
                for (uint32_t k = 0; k < 2; k++) {
                        while (ae_node_poll(pair.nodes[k]))
                                continue;
                        ae_node_tick(pair.nodes[k], ae_sim_now(pair.sim) + 1);
                }
        }
}

static bool sees_peer(uint32_t node, uint32_t peer)
{
        struct ae_node_peer_info info;

        ae_node_peer_info(pair.nodes[node], peer, &info);
        return info.up;
}

static void begin(void)
{
        static const char *const peers[] = { "0", "1" };

        memset(&line, 0, sizeof(line));
        memset(&pair, 0, sizeof(pair));
        assert_int_equal(ae_sim_new(1, NULL, &pair.sim), 0);
        for (uint32_t i = 0; i < 2; i++) {
                struct ae_node_options options = {
                        .node = i, .n_nodes = 2, .peers = peers, .transport = "sim",
                        .loop = pair.sim, .incarnation = 10 + i, .memory_len = AE_GIB,
                        .n_threads = 1, .wake = on_wake, .log = on_log, .user = &pair.nodes[i],
                };

                assert_int_equal(ae_node_new(&options, &pair.nodes[i]), 0);
        }
        line.real = ae_node_net(pair.nodes[0])->ops;
        line.ops = *line.real;
        line.ops.msg = line_msg;
        line.ops.put = line_put;
        line.ops.poll = line_poll;
        ae_node_net(pair.nodes[0])->ops = &line.ops;
        turn(20);
        assert_true(sees_peer(0, 1) && sees_peer(1, 0));
        assert_int_equal(ae_net_map(ae_node_net(pair.nodes[0]), pair.memory, sizeof(pair.memory),
                                    -1, 0, &pair.region.mem), 0);
        line.watched = true;
}

static void end(void)
{
        ae_net_unmap(pair.region.mem);
        for (uint32_t i = 0; i < 2; i++)
                ae_node_free(pair.nodes[i]);
        ae_sim_free(pair.sim);
}

/* ---- what the core does ----------------------------------------------------------------- */

static void send_msg(const void *data, size_t len)
{
        const struct ae_core_options *options = &ae_node_core(pair.nodes[0])->options;

        options->ops->msg(options->user, 1, data, len);
}

static void send_nth(uint64_t i)
{
        const struct ae_core_options *options = &ae_node_core(pair.nodes[0])->options;
        struct ae_net_key key = { { 0 } };

        if (!is_put(i)) {
                send_msg(msg(i), len_of(i));
                return;
        }
        key.bytes[5] = (uint8_t)i;
        options->ops->put(options->user, 1, &key, 10 * i, &pair.region, 11 * i, 12 * i, i, 13 * i);
}

/* The transport takes @n more, then nothing again. */
static void let(uint64_t n)
{
        line.n_takes = n;
        line.writable = true;
        while (ae_node_poll(pair.nodes[0]))
                continue;
        line.n_takes = 0;
}

static void test_order(void **state)
{
        const uint64_t n = 400;
        uint64_t at = 0;

        (void)state;
        begin();
        line.n_takes = 3;
        for (uint64_t i = 0; i < n; i++)
                send_nth(i);
        assert_int_equal(line.n_taken, 3);
        for (uint64_t i = 0; i < 10; i++)
                let(i);
        assert_int_equal(line.n_taken, 3 + 45);
        line.n_takes = 100; /* room, but not before those that wait */
        send_nth(n);
        assert_int_equal(line.n_taken, 3 + 45);
        let(n);
        assert_int_equal(line.n_taken, n + 1);
        line.n_takes = 1;
        send_nth(n + 1); /* nothing waits */
        assert_int_equal(line.n_taken, n + 2);
        at = line.n_taken;
        let(10);
        assert_int_equal(line.n_taken, at);
        end();
}

static uint64_t allocations_of(uint64_t first, uint64_t n)
{
        uint64_t count;

        fault_alloc_arm(UINT64_MAX);
        for (uint64_t i = first; i < first + n; i++)
                send_nth(i);
        let(n / 2);
        let(n);
        count = fault_alloc_count();
        assert_false(fault_alloc_disarm());
        assert_int_equal(line.n_taken, first + n);
        return count;
}

static void test_no_allocation(void **state)
{
        (void)state;
        begin();
        assert_int_equal(allocations_of(0, 7), 0); /* a little has its place from the start */
        assert_true(allocations_of(7, 350) > 0);
        for (uint64_t round = 0; round < 5; round++)
                assert_int_equal(allocations_of(357 + round * 350, 350), 0);
        end();
}

static void test_bound(void **state)
{
        struct ae_wire_head head = { .op = AE_WIRE_CREDIT };
        struct ae_node_peer_info info;
        char bytes[3000] = { 0 };
        uint64_t n = 0;

        (void)state;
        begin();
        memcpy(bytes, &head, sizeof(head));
        for (; n < AE_NODE_BACKLOG_MAX / sizeof(bytes) + 100; n++) {
                send_msg(bytes, sizeof(bytes));
                if (n % 1000 == 0)
                        (void)ae_node_poll(pair.nodes[0]);
                ae_node_peer_info(pair.nodes[0], 1, &info);
                if (!info.up)
                        break;
        }
        assert_in_range(n, AE_NODE_BACKLOG_MAX / 5000, AE_NODE_BACKLOG_MAX / 4000);
        assert_int_equal(line.n_taken, 0);
        assert_non_null(strstr(info.why, "it takes too little: "));
        assert_non_null(strstr(info.why, " messages and 0 puts wait for it, more than the 64 MiB"));
        assert_non_null(strstr(pair.log, "node 1 is not connected: it takes too little"));
        assert_false(ae_node_core(pair.nodes[0])->peers[1].up);
        send_msg(bytes, sizeof(bytes)); /* to nobody */
        line.watched = false;
        turn(20);
        assert_true(sees_peer(0, 1)); /* it may come again */
        line.watched = true;
        send_nth(0);
        assert_int_equal(line.n_taken, 0);
        let(2);
        assert_int_equal(line.n_taken, 1);
        end();
}

static void send_waiting(uint32_t job, uint64_t round)
{
        struct ae_wire_waiting waiting = { .head = { .op = AE_WIRE_WAITING, .job = job,
                                                     .round = round } };

        send_msg(&waiting, sizeof(waiting));
}

static void assert_last_waiting(uint32_t job, uint64_t round)
{
        const struct ae_wire_waiting *waiting = (const struct ae_wire_waiting *)line.last;

        assert_int_equal(line.last_len, sizeof(*waiting));
        assert_int_equal(waiting->head.op, AE_WIRE_WAITING);
        assert_int_equal(waiting->head.job, job);
        assert_int_equal(waiting->head.round, round);
}

/* To a peer that stands still: of each job only the newest. */
static void test_waiting(void **state)
{
        (void)state;
        begin();
        send_nth(0);
        for (uint64_t round = 1; round <= 1000; round++) {
                send_waiting(4, round);
                send_waiting(5, round + 7);
        }
        send_waiting(6, 1);
        let(1);
        assert_int_equal(line.n_taken, 1);
        let(1);
        assert_last_waiting(4, 1000);
        send_waiting(6, 2); /* goes to the end, where it is already */
        send_waiting(4, 1001);
        let(1);
        assert_last_waiting(5, 1007);
        let(1);
        assert_last_waiting(6, 2);
        let(1);
        assert_last_waiting(4, 1001);
        let(10);
        assert_int_equal(line.n_taken, 5);
        end();
}

/* A message that is none, and then the connection: both come out of one poll. */
static void test_last_words(void **state)
{
        struct ae_wire_head head = { .op = AE_WIRE_CONTROL, .type = 9999 };
        const struct ae_core_options *options;
        struct ae_node_peer_info info;

        (void)state;
        begin();
        line.watched = false;
        options = &ae_node_core(pair.nodes[1])->options;
        options->ops->msg(options->user, 0, &head, sizeof(head));
        pair.nodes[1] = ae_node_free(pair.nodes[1]);
        ae_sim_run(pair.sim, ae_sim_now(pair.sim) + 20 * MS);
        while (ae_node_poll(pair.nodes[0]))
                continue;
        assert_non_null(strstr(pair.log, "node 1 broke the protocol"));
        ae_node_peer_info(pair.nodes[0], 1, &info);
        assert_false(info.up);
        end();
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_order), cmocka_unit_test(test_no_allocation),
                cmocka_unit_test(test_bound), cmocka_unit_test(test_waiting),
                cmocka_unit_test(test_last_words),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
