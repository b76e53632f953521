/* SPDX-License-Identifier: Apache-2.0 */
/* Conformance: handshakes, refusals, many peers, closing and death. */
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <uv.h>

#include "tests/lib/fault.h"
#include "tests/net/conformance.h"

#define N_LAST_WORDS 3000 /* more than an endpoint queues at once */

void up_with_hellos(void **state)
{
        struct peer *a = bed_open(*state, 3), *b = bed_open(*state, 5);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct ae_net_hello at_a = bed_record(a, AE_NET_EV_UP, 0)->event.hello;
        struct ae_net_hello at_b = bed_record(b, AE_NET_EV_UP, 0)->event.hello;

        assert_ptr_equal(bed_record(a, AE_NET_EV_UP, 0)->event.conn, conn);
        assert_int_equal(at_a.node, 5);
        assert_int_equal(at_a.incarnation, 105);
        assert_int_equal(at_b.node, 3);
        assert_int_equal(at_b.incarnation, 103);
        assert_int_equal(at_b.version, BED_VERSION);
        assert_int_equal(at_b.cluster, BED_CLUSTER);
        assert_int_equal(conn->node, 5);
        assert_int_equal(far->node, 3);
        assert_null(conn->user);
        assert_null(far->user);
        assert_ptr_equal(conn->net, a->net);
        bed_settle(*state);
        assert_int_equal(a->n[AE_NET_EV_UP], 1);
        assert_int_equal(b->n[AE_NET_EV_UP], 1);
        assert_int_equal(a->n[AE_NET_EV_DOWN] + b->n[AE_NET_EV_DOWN], 0);
}

/* @a, at node 1, is turned away by @b, at node 2; both texts hold @one and @two. */
static void check_refused(struct peer *a, struct peer *b, int status, const char *one,
                          const char *two)
{
        struct record *down, *refused;
        struct ae_net_conn *conn;

        assert_int_equal(ae_net_connect(a->net, b->address, 2, &conn), 0);
        bed_wait(a, AE_NET_EV_DOWN, 1);
        bed_wait(b, AE_NET_EV_REFUSED, 1);
        down = bed_record(a, AE_NET_EV_DOWN, 0);
        refused = bed_record(b, AE_NET_EV_REFUSED, 0);
        assert_int_equal(down->event.status, status);
        assert_ptr_equal(down->event.conn, conn);
        assert_int_equal(refused->event.status, status);
        assert_null(refused->event.conn);
        assert_non_null(strstr(down->text, one));
        assert_non_null(strstr(down->text, two));
        assert_non_null(strstr(refused->text, one));
        assert_non_null(strstr(refused->text, two));
        assert_int_equal(a->n[AE_NET_EV_UP] + b->n[AE_NET_EV_UP], 0);
        assert_int_equal(bed_stats(b).refused, 1);
        ae_net_conn_close(conn);
}

void version_differs(void **state)
{
        struct ae_net_options options = { .self.version = 41 };
        struct peer *a = bed_open(*state, 1), *b = bed_open_with(*state, 2, &options);

        check_refused(a, b, AE_EVERSION, "41", "7");
}

void cluster_differs(void **state)
{
        struct ae_net_options options = { .self.cluster = 0xabcdef };
        struct peer *a = bed_open(*state, 1), *b = bed_open_with(*state, 2, &options);

        check_refused(a, b, AE_EMISMATCH, "0000000000abcdef", "1122334455667788");
}

void node_is_another(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *conn;
        struct record *down;

        assert_int_equal(ae_net_connect(a->net, b->address, 9, &conn), 0);
        bed_wait(a, AE_NET_EV_DOWN, 1);
        bed_wait(b, AE_NET_EV_REFUSED, 1);
        down = bed_record(a, AE_NET_EV_DOWN, 0);
        assert_int_equal(down->event.status, AE_EMISMATCH);
        assert_non_null(strstr(down->text, "node 2"));
        assert_non_null(strstr(down->text, "node 9"));
        assert_int_equal(b->n[AE_NET_EV_UP], 0);
        ae_net_conn_close(conn);
}

void nobody_listens(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *conn;

        bed_close(b);
        assert_int_equal(ae_net_connect(a->net, b->address, 2, &conn), 0);
        bed_wait(a, AE_NET_EV_DOWN, 1);
        assert_int_equal(bed_record(a, AE_NET_EV_DOWN, 0)->event.status, AE_ELOST);
        assert_non_null(strstr(bed_record(a, AE_NET_EV_DOWN, 0)->text, "node 2"));
        ae_net_conn_close(conn);
        bed_settle(*state);
        assert_int_equal(a->n[AE_NET_EV_DOWN], 1);
}

void bad_addresses(void **state)
{
        static const char *const bad[] = { "", "nonsense", "localhost:80", "127.0.0.1:",
                                           "127.0.0.1:65536", "relative/path", "-1", "@",
                                           "[::1:5" };
        struct bed *bed = *state;
        struct peer *a = bed_open(bed, 1);
        struct ae_net_options again = { .listen = a->address, .loop = bed->sim };
        struct ae_net_conn *conn;
        char longest[300];
        struct ae_net *net;

        if (bed->sim)
                again.wake = (void (*)(void *))bed_close; /* never called */
        for (size_t i = 0; i < AE_ARRAY_LEN(bad); i++)
                assert_int_equal(ae_net_connect(a->net, bad[i], 2, &conn), AE_EINVAL);
        memset(longest, '1', sizeof(longest));
        longest[0] = '/';
        longest[sizeof(longest) - 1] = '\0';
        assert_int_equal(ae_net_connect(a->net, longest, 2, &conn), AE_EINVAL);
        if (bed_is("tcp")) {
                static const char *const outside[] = { "0.0.0.0:0", "192.0.2.1:0", "[::]:0" };

                assert_int_equal(ae_net_connect(a->net, "192.0.2.1:80", 2, &conn),
                                 AE_EUNSUPPORTED);
                assert_non_null(strstr(ae_error_text(), "192.0.2.1:80"));
                for (size_t i = 0; i < AE_ARRAY_LEN(outside); i++) {
                        struct ae_net_options listen = { .listen = outside[i] };

                        assert_int_equal(ae_net_open("tcp", &listen, &net), AE_EUNSUPPORTED);
                        assert_non_null(strstr(ae_error_text(), outside[i]));
                }
        }
        assert_int_equal(ae_net_open(bed->transport, &again, &net), AE_EEXIST);
        assert_non_null(strstr(ae_error_text(), a->address));
}

void bad_options(void **state)
{
        struct bed *bed = *state;
        struct ae_net_options options = { .streams = 99, .loop = bed->sim };
        char address[AE_NET_ADDR_MAX];
        struct ae_net *net;

        assert_null(ae_net_find("verbs"));
        assert_int_equal(ae_net_open("verbs", &options, &net), AE_EUNSUPPORTED);
        assert_non_null(strstr(ae_error_text(), "this build has no verbs transport"));
        assert_int_equal(ae_net_open("pigeon", &options, &net), AE_EINVAL);
        assert_non_null(strstr(ae_error_text(), ae_net_names()));
        assert_int_equal(ae_net_open(bed->transport, &options, &net), AE_EINVAL);
        options = (struct ae_net_options){ .loop = bed };
        assert_int_equal(ae_net_open(bed->transport, &options, &net), AE_EINVAL); /* no wake */
        options = (struct ae_net_options){ .loop = bed->sim };
        if (bed->sim)
                options.wake = (void (*)(void *))bed_close; /* never called */
        assert_int_equal(ae_net_open(bed->transport, &options, &net), 0);
        assert_int_equal(ae_net_address(net, address), AE_ESTATE);
        assert_null(ae_net_close(net));
        assert_null(ae_net_close(NULL));
        ae_net_conn_close(NULL);
        ae_net_unmap(NULL);
}

static int try_open(void *arg)
{
        struct ae_net_options options = { .self = { BED_VERSION, 9, 1, BED_CLUSTER },
                                          .loop = arg, .wake = (void (*)(void *))bed_close };
        struct ae_net *net;
        int r = ae_net_open(bed_transport, &options, &net);

        if (r == 0)
                ae_net_close(net);
        return r;
}

static int try_connect(void *arg)
{
        struct peer *peer = arg;
        struct ae_net_conn *conn;
        int r = ae_net_connect(peer->net, peer->address, peer->node, &conn);

        if (r == 0)
                ae_net_conn_close(conn);
        return r;
}

void allocations_fail(void **state)
{
        struct peer *peer = bed_open(*state, 1);
        uint32_t before;
        uv_loop_t loop;

        if (((struct bed *)*state)->sim)
                skip(); /* sim aborts instead */
        assert_int_equal(uv_loop_init(&loop), 0);
        before = count_fds();
        assert_true(fault_alloc_sweep(try_open, &loop, AE_ENOMEM) >= 3);
        assert_true(fault_alloc_sweep(try_connect, peer, AE_ENOMEM) >= 4);
        uv_run(&loop, UV_RUN_DEFAULT);
        bed_settle(*state);
        assert_int_equal(count_fds(), before);
        assert_int_equal(uv_loop_close(&loop), 0);
}

void sixteen_peers(void **state)
{
        struct peer *hub = bed_open(*state, 0), *peers[16];
        struct area target = area_new(16 * 4096), source = area_new(4096);
        struct ae_net_mem *to = area_map(hub, &target);
        struct ae_net_conn *conns[16], *far[16];
        struct ae_net_key keys[16];

        for (uint32_t i = 0; i < 16; i++) {
                peers[i] = bed_open(*state, i + 1);
                assert_int_equal(ae_net_connect(peers[i]->net, hub->address, 0, &conns[i]), 0);
        }
        bed_wait(hub, AE_NET_EV_UP, 16);
        for (uint32_t i = 0; i < 16; i++) {
                struct ae_net_conn *conn = bed_record(hub, AE_NET_EV_UP, i)->event.conn;

                bed_wait(peers[i], AE_NET_EV_UP, 1);
                far[conn->node - 1] = conn;
        }
        for (uint32_t i = 0; i < 16; i++) {
                struct ae_net_mem *from = area_map(peers[i], &source);

                assert_int_equal(ae_net_grant(far[i], to, i * 4096, 4096, &keys[i]), 0);
                area_fill(&source, 0, 4096, i);
                bed_put(peers[i], conns[i], &keys[i], 0, from, 0, 4096, i, i);
                assert_int_equal(ae_net_msg(conns[i], &i, sizeof(i)), 0);
                bed_wait(peers[i], AE_NET_EV_PUT_DONE, 1);
                bed_wait(hub, AE_NET_EV_NOTIFY, i + 1);
                bed_wait(hub, AE_NET_EV_MSG, i + 1);
                assert_true(area_has(&target, i * 4096, 4096, i, 0));
                assert_int_equal(bed_record(hub, AE_NET_EV_NOTIFY, i)->event.off, i * 4096);
                assert_ptr_equal(bed_record(hub, AE_NET_EV_NOTIFY, i)->event.conn, far[i]);
        }
        for (uint32_t i = 0; i < 16; i++)
                bed_close(peers[i]);
        bed_wait(hub, AE_NET_EV_DOWN, 16);
        bed_close(hub);
        area_free(&target);
        area_free(&source);
}

/* Posts puts of 8 MiB into @far's grant without letting @b poll; @return how many were taken. */
static uint32_t post_some(struct ae_net_conn *conn, const struct ae_net_key *key,
                          struct ae_net_mem *from, uint32_t n_max)
{
        uint32_t n = 0;

        while (n < n_max && ae_net_put(conn, key, 0, from, 0, 8 << 20, n, 1000 + n) == 0)
                n++;
        assert_true(n > 2);
        return n;
}

/* Every cookie from 1000 on has come once; @return how many of them as lost. */
static uint32_t check_done(struct peer *peer, uint32_t n)
{
        uint32_t seen[64] = { 0 }, n_lost = 0;

        assert_true(n <= 64);
        assert_int_equal(peer->n[AE_NET_EV_PUT_DONE], n);
        for (uint32_t i = 0; i < n; i++) {
                struct ae_net_event *event = &bed_record(peer, AE_NET_EV_PUT_DONE, i)->event;

                assert_in_range(event->cookie, 1000, 1000 + n - 1);
                assert_int_equal(seen[event->cookie - 1000]++, 0);
                assert_true(event->status == 0 || event->status == AE_ELOST);
                n_lost += event->status == AE_ELOST;
        }
        return n_lost;
}

/* The object of a closed connection is there until its last PUT_DONE is handed out. */
static void expect_user(struct peer *peer, const struct ae_net_event *event)
{
        assert_ptr_equal(event->conn->user, peer->user);
}

void close_with_outstanding(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area target = area_new(8 << 20), source = area_new(8 << 20);
        struct ae_net_mem *to = area_map(b, &target), *from = area_map(a, &source);
        struct ae_net_key key;
        uint32_t n;

        assert_int_equal(ae_net_grant(far, to, 0, target.len, &key), 0);
        conn->user = &key;
        a->on_event = expect_user;
        a->user = &key;
        b->still = true;
        n = post_some(conn, &key, from, 10);
        ae_net_conn_close(conn);
        ae_net_unmap(from); /* nothing of it is in flight any more */
        bed_wait(a, AE_NET_EV_PUT_DONE, n);
        assert_true(check_done(a, n) > 0);
        assert_ptr_equal(bed_record(a, AE_NET_EV_PUT_DONE, 0)->event.conn, conn);
        b->still = false;
        bed_wait(b, AE_NET_EV_DOWN, 1);
        bed_settle(*state);
        assert_int_equal(a->n[AE_NET_EV_PUT_DONE], n);
        assert_int_equal(a->n[AE_NET_EV_DOWN], 0);
        ae_net_conn_close(far);
        ae_net_unmap(to); /* its grants ended with the connection */
        area_free(&target);
        area_free(&source);
}

void close_before_up(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *conn;

        for (int i = 0; i < 12; i++) {
                assert_int_equal(ae_net_connect(a->net, b->address, 2, &conn), 0);
                for (int j = 0; j < i; j++)
                        if (a->n[AE_NET_EV_UP] == 0)
                                bed_turn(*state);
                ae_net_conn_close(conn);
                a->n[AE_NET_EV_UP] = 0;
        }
        bed_settle(*state);
        assert_int_equal(a->n[AE_NET_EV_DOWN], 0);
        assert_int_equal(b->n[AE_NET_EV_UP], b->n[AE_NET_EV_DOWN]);
        bed_connect(a, b, NULL);
}

static void die(struct peer *peer)
{
        if (peer->bed->sim)
                ae_sim_kill(peer->net);
        else
                bed_close(peer);
}

void death_with_outstanding(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area target = area_new(8 << 20), source = area_new(8 << 20);
        struct ae_net_mem *to = area_map(b, &target), *from = area_map(a, &source);
        struct ae_net_key key;
        uint32_t n;

        assert_int_equal(ae_net_grant(far, to, 0, target.len, &key), 0);
        b->still = true;
        n = post_some(conn, &key, from, 10);
        die(b);
        bed_wait(a, AE_NET_EV_DOWN, 1);
        assert_true(check_done(a, n) > 0);
        /* DOWN is the last that is heard of it. */
        assert_int_equal(a->records[a->n_records - 1].event.kind, AE_NET_EV_DOWN);
        assert_int_equal(a->records[a->n_records - 1].event.status, AE_ELOST);
        bed_settle(*state);
        assert_int_equal(a->n[AE_NET_EV_DOWN], 1);
        check_done(a, n);
        ae_net_conn_close(conn);
        ae_net_unmap(from);
        bed_close(b);
        area_free(&target);
        area_free(&source);
}

void dead_connection_is_inert(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area area = area_new(4096);
        struct ae_net_mem *mem = area_map(b, &area);
        struct ae_net_key key, other;

        assert_int_equal(ae_net_grant(far, mem, 0, 4096, &key), 0);
        ae_net_conn_close(conn);
        bed_wait(b, AE_NET_EV_DOWN, 1);
        assert_int_equal(ae_net_msg(far, "x", 1), AE_ELOST);
        assert_int_equal(ae_net_put(far, &key, 0, NULL, 0, 0, 0, 0), AE_ELOST);
        assert_int_equal(ae_net_grant(far, mem, 0, 4096, &other), AE_ELOST);
        assert_int_equal(ae_net_revoke(far, &key), 0);
        ae_net_unmap(mem);
        ae_net_conn_close(far);
        bed_settle(*state);
        assert_int_equal(b->n[AE_NET_EV_DOWN], 1);
        area_free(&area);
}

void last_words_arrive(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *conn = bed_connect(a, b, NULL);
        uint32_t n = 0;

        b->still = true;
        while (n < N_LAST_WORDS && ae_net_msg(conn, &n, sizeof(n)) == 0)
                n++;
        assert_true(n >= (bed_is("sim") ? 10 : N_LAST_WORDS)); /* that has a window of its own */
        ae_net_conn_close(conn);
        b->still = false;
        bed_wait(b, AE_NET_EV_DOWN, 1);
        assert_int_equal(b->n[AE_NET_EV_MSG], n);
        assert_int_equal(b->records[b->n_records - 1].event.kind, AE_NET_EV_DOWN);
}

void close_drops_what_is_queued(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct ae_net_conn *other, *other_far;
        struct ae_net_event event;

        other = bed_connect(a, b, &other_far);
        b->still = true;
        for (uint32_t i = 0; i < 3; i++) {
                assert_int_equal(ae_net_msg(conn, "one", 3), 0);
                assert_int_equal(ae_net_msg(other, "other", 5), 0);
        }
        ae_net_conn_close(conn);
        bed_settle(*state);
        while (ae_net_poll(b->net, &event, 1) == 0)
                bed_turn(*state);
        ae_net_conn_close(far); /* its messages and its DOWN may be queued */
        b->still = false;
        bed_wait(b, AE_NET_EV_MSG, event.conn == other_far ? 2 : 3);
        bed_settle(*state);
        assert_int_equal(b->n[AE_NET_EV_MSG], event.conn == other_far ? 2 : 3);
        assert_int_equal(b->n[AE_NET_EV_DOWN], 0);
        for (size_t i = 0; i < b->n_records; i++)
                if (b->records[i].event.kind == AE_NET_EV_MSG)
                        assert_ptr_equal(b->records[i].event.conn, other_far);
}

/* Listens at the address of a transport on sockets, and never accepts. */
static int listen_deaf(struct bed *bed, char *address)
{
        bool tcp = bed_is("tcp");
        struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
        struct sockaddr_un un = { .sun_family = AF_UNIX };
        socklen_t len = sizeof(in);
        int fd = socket(tcp ? AF_INET : AF_UNIX, tcp ? SOCK_STREAM : SOCK_SEQPACKET, 0);

        assert_true(fd >= 0);
        if (tcp) {
                assert_int_equal(bind(fd, (void *)&in, sizeof(in)), 0);
                assert_int_equal(getsockname(fd, (void *)&in, &len), 0);
                snprintf(address, AE_NET_ADDR_MAX, "127.0.0.1:%u", ntohs(in.sin_port));
        } else {
                snprintf(un.sun_path, sizeof(un.sun_path), "%s/deaf", bed->dir);
                snprintf(address, AE_NET_ADDR_MAX, "%s", un.sun_path);
                assert_int_equal(bind(fd, (void *)&un, sizeof(un)), 0);
        }
        assert_int_equal(listen(fd, 8), 0);
        return fd;
}

void connector_gives_up(void **state)
{
        struct ae_net_options options = { .handshake_ns = 20 * UINT64_C(1000000) };
        struct bed *bed = *state;
        char address[AE_NET_ADDR_MAX];
        struct ae_net_conn *conn;
        struct peer *a;
        int fd;

        if (bed->sim)
                skip(); /* there nobody can listen and not answer */
        a = bed_open_with(bed, 1, &options);
        fd = listen_deaf(bed, address);
        assert_int_equal(ae_net_connect(a->net, address, 2, &conn), 0);
        bed_wait(a, AE_NET_EV_DOWN, 1);
        assert_int_equal(bed_record(a, AE_NET_EV_DOWN, 0)->event.status, AE_ETIMEDOUT);
        assert_non_null(strstr(bed_record(a, AE_NET_EV_DOWN, 0)->text, "node 2"));
        assert_non_null(strstr(bed_record(a, AE_NET_EV_DOWN, 0)->text, address));
        assert_non_null(strstr(bed_record(a, AE_NET_EV_DOWN, 0)->text, "deadline"));
        ae_net_conn_close(conn);
        close(fd);
        if (bed_is("shm"))
                assert_int_equal(unlink(address), 0);
}

void endpoint_close_with_all_alive(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area target = area_new(8 << 20), source = area_new(8 << 20);
        struct ae_net_mem *to = area_map(b, &target), *from = area_map(a, &source);
        struct ae_net_key key;

        assert_int_equal(ae_net_connect(a->net, b->address, 2, &conn), 0); /* half open */
        conn = bed_record(a, AE_NET_EV_UP, 0)->event.conn;
        assert_int_equal(ae_net_grant(far, to, 0, target.len, &key), 0);
        post_some(conn, &key, from, 10);
        bed_turn(*state);
        bed_close(a);
        bed_close(b);
        area_free(&target);
        area_free(&source);
}

void no_descriptor_growth(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct area area = area_new(65536);
        struct ae_net_mem *to = area_map(b, &area), *from = area_map(a, &area);
        uint32_t before = 0, after;

        for (uint32_t i = 0; i < 200; i++) {
                struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
                struct ae_net_key key;

                assert_int_equal(ae_net_grant(far, to, 0, 4096, &key), 0);
                bed_put(a, conn, &key, 0, from, 8192, 100, i, i);
                bed_wait(b, AE_NET_EV_NOTIFY, i + 1);
                bed_wait(a, AE_NET_EV_PUT_DONE, i + 1);
                ae_net_conn_close(i % 2 ? conn : far);
                bed_wait(i % 2 ? b : a, AE_NET_EV_DOWN, i / 2 + 1);
                ae_net_conn_close(i % 2 ? far : conn);
                bed_turn(*state);
                if (i == 10)
                        before = count_fds();
        }
        bed_turn(*state);
        after = count_fds();
        assert_int_equal(after, before);
        bed_close(a);
        bed_close(b);
        area_free(&area);
}
