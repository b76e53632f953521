/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tcp transport: endpoint, listener and the row of the registry. One control stream and
 * `streams` data streams join two endpoints; all are non-blocking sockets in one edge-triggered
 * epoll set (wait.h), with TCP_NODELAY, on loopback addresses only. tcp-conn.c has the life of a
 * connection, tcp-send.c and tcp-recv.c its two directions. Owner thread.
 *
 * Handshake. The connector opens the control stream and says hello (hello.h); the acceptor answers
 * with its own hello and a random token, or with its hello and an end of file when it refuses, so
 * that both sides can name both values. The connector then opens the data streams, each beginning
 * with a hello that repeats the token. When all have come, the acceptor is up and sends GO on the
 * control stream; the connector is up when it reads that, and only then reads data streams.
 *
 * All integers are little-endian. The control stream carries frames of this form:
 *
 *      0        4      5          8
 *      +--------+------+----------+-----------------+
 *      | len    | type | zero     | len bytes       |     type 1 MSG, len <= 1 MiB
 *      +--------+------+----------+-----------------+     type 2 GO, len = 0, acceptor only, once
 *
 * A data stream carries put frames:
 *
 *      0      1       2      3       8             40       48       56       64       72
 *      +------+-------+------+-------+-------------+--------+--------+--------+--------+-------
 *      | 0x50 |n_parts| part | zero  | key (32)    | off    | len    | note   | seq    | bytes
 *      +------+-------+------+-------+-------------+--------+--------+--------+--------+-------
 *
 * n_parts is 1 (the whole put follows, on any stream) or the number of data streams (part i follows
 * on stream i; off, len and note are those of the whole put). Part i of n covers the bytes
 * [cut(i), cut(i+1)) of the put, where cut(i) is len/n*i rounded down to a multiple of 4096 and
 * cut(n) is len: both sides compute it, so parts cannot overlap or leave holes. Striped puts are
 * numbered from 0 by seq and stand in the same order on every stream; a receiver keeps at most 64
 * open and leaves a stream unread that runs further ahead. The oldest open one never waits for an
 * unread stream, so this cannot lock.
 *
 * There are no acknowledgements: a put is done for the sender when the kernel has its last byte.
 * The receiver reads straight into the granted range. A part whose grant is revoked goes to a sink,
 * as does the rest of one that is being read when the grant is revoked; since reading happens in
 * ae_net_poll() on the thread that calls ae_net_revoke(), nothing is written once that returns.
 */
#include "proto/net/tcp.h"

#include <assert.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/tcp-addr.h"

static_assert(sizeof(struct tcp_ctl_frame) == 8, "a control frame's head is 8 bytes");
static_assert(sizeof(struct tcp_put_frame) == 72, "a put frame's head is 72 bytes");
static_assert(offsetof(struct tcp_put_frame, key) == 8, "no padding");
static_assert(offsetof(struct tcp_put_frame, seq) == 64, "no padding");

uint64_t ae_tcp_part_off(uint64_t len, uint32_t n_parts, uint32_t part)
{
        assert(part <= n_parts);
        return part == n_parts ? len : (len / n_parts * part) & ~(uint64_t)4095;
}

int ae_tcp_socket_setup(int fd)
{
        int on = 1;

        if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) < 0)
                return ae_fail_sys(errno, "cannot set TCP_NODELAY");
        return 0;
}

static int listen_on(struct tcp_net *net, const char *address)
{
        struct sockaddr_storage addr;
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        socklen_t len;
        int on = 1, r;

        r = ae_tcp_addr_parse(address, &addr, &len);
        if (r < 0)
                return r;
        fd = socket(addr.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return ae_fail_sys(errno, "cannot make a socket to listen on %s", address);
        if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0)
                return ae_fail_sys(errno, "cannot set SO_REUSEADDR for %s", address);
        if (bind(fd, (struct sockaddr *)&addr, len) < 0 || listen(fd, 512) < 0) {
                if (errno == EADDRINUSE)
                        return ae_fail(AE_EEXIST, "cannot listen on %s: the address is in use",
                                       address);
                return ae_fail_sys(errno, "cannot listen on %s", address);
        }
        if (getsockname(fd, (struct sockaddr *)&addr, &len) < 0)
                return ae_fail_sys(errno, "cannot read the address of the listener on %s", address);
        ae_tcp_addr_print(&addr, net->end.address);
        return ae_door_open(&net->end.door, ae_steal_fd(&fd));
}

static void tcp_close(struct ae_net *base)
{
        struct tcp_net *net = ae_container_of(base, struct tcp_net, end.base);

        ae_end_deinit(&net->end);
        free(net->sink);
        free(net);
}

static int greet(struct ae_door *door, struct ae_guest *guest, const struct ae_hello *hello)
{
        struct tcp_net *net = ae_container_of(door, struct tcp_net, end.door);

        return hello->kind == AE_HELLO_TCP ? ae_tcp_conn_accept(net, guest, hello)
                                           : ae_tcp_conn_join(net, guest, hello);
}

static void turn(struct ae_end *end)
{
        ae_container_of(end, struct tcp_net, end)->round++;
        ae_wait_round(&end->wait);
}

static const struct ae_end_ops end_ops = {
        .net = &ae_net_tcp,
        .hello_a = AE_HELLO_TCP,
        .hello_b = AE_HELLO_STREAM,
        .admit = ae_tcp_socket_setup,
        .greet = greet,
        .round = turn,
        .shut = ae_tcp_conn_shut,
        .revoked = ae_tcp_revoked,
        .free = ae_tcp_conn_free,
};

static int tcp_open(const struct ae_net_options *options, struct ae_net **ret_net)
{
        struct tcp_net *net = calloc(1, sizeof(*net));
        int r;

        if (!net)
                return ae_fail(AE_ENOMEM, "cannot open a tcp endpoint: out of memory");
        r = ae_end_init(&net->end, &end_ops, options);
        if (!options->streams)
                net->end.options.streams = AE_NET_STREAMS_DEFAULT;
        if (r == 0) {
                net->sink = malloc(TCP_SINK_LEN);
                if (!net->sink)
                        r = ae_fail(AE_ENOMEM, "cannot open a tcp endpoint: out of memory");
        }
        if (r == 0 && options->listen)
                r = listen_on(net, options->listen);
        if (r < 0)
                tcp_close(&net->end.base);
        else
                *ret_net = &net->end.base;
        return r;
}

const struct ae_net_ops ae_net_tcp = {
        .name = "tcp",
        .open = tcp_open,
        .close = tcp_close,
        .address = ae_end_address,
        .connect = ae_tcp_connect,
        .conn_close = ae_conn_close,
        .map = ae_end_map,
        .unmap = ae_net_mem_free,
        .grant = ae_conn_grant,
        .revoke = ae_conn_revoke,
        .msg = ae_tcp_msg,
        .put = ae_tcp_put,
        .poll = ae_end_poll,
        .arm = ae_end_arm,
        .stats = ae_end_stats,
};
