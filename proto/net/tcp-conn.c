/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of a tcp connection: dialling, hello, joining of the data streams; conn.h has the rest.
 * Owner thread.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/tcp-addr.h"
#include "proto/net/tcp.h"

/* --- making and unmaking --- */

static void on_ctl(struct ae_source *source);
static void on_stream(struct ae_source *source);

static int alloc_puts(struct tcp_conn *conn)
{
        conn->puts = calloc(TCP_PUTS, sizeof(*conn->puts));
        conn->parts = calloc((size_t)TCP_PUTS * conn->n_streams, sizeof(*conn->parts));
        if (!conn->puts || !conn->parts)
                return AE_ENOMEM;
        for (uint32_t i = TCP_PUTS; i-- > 0;) {
                conn->puts[i].next_free = conn->free_put;
                conn->free_put = &conn->puts[i];
        }
        return 0;
}

static int alloc_buffers(struct tcp_conn *conn)
{
        conn->ctl.tx = malloc(TCP_TX_CAP);
        conn->ctl.rx = malloc(TCP_RX_CAP);
        if (!conn->ctl.tx || !conn->ctl.rx || alloc_puts(conn) < 0)
                return AE_ENOMEM;
        for (uint32_t i = 0; i < conn->n_streams; i++) {
                conn->data[i].buf = malloc(TCP_BUF_CAP);
                if (!conn->data[i].buf)
                        return AE_ENOMEM;
        }
        return 0;
}

void ae_tcp_conn_free(struct ae_conn *common)
{
        struct tcp_conn *conn = ae_container_of(common, struct tcp_conn, common);

        for (uint32_t i = 0; i < conn->n_streams; i++)
                free(conn->data[i].buf);
        free(conn->ctl.tx);
        free(conn->ctl.rx);
        free(conn->puts);
        free(conn->parts);
        ae_conn_deinit(common);
        free(conn);
}

static int conn_new(struct tcp_net *net, uint32_t n_streams, struct tcp_conn **ret_conn)
{
        struct tcp_conn *conn;
        int r;

        assert(n_streams >= 1 && n_streams <= AE_NET_STREAMS_MAX);
        conn = calloc(1, sizeof(*conn));
        if (!conn)
                return ae_fail(AE_ENOMEM, "cannot make a connection: out of memory");
        r = ae_conn_init(&conn->common, &net->end);
        if (r < 0) {
                free(conn);
                return r;
        }
        conn->n_streams = (uint8_t)n_streams;
        ae_source_init(&conn->ctl.source, on_ctl);
        for (uint32_t i = 0; i < AE_NET_STREAMS_MAX; i++) {
                ae_source_init(&conn->data[i].source, on_stream);
                conn->data[i].conn = conn;
                conn->data[i].index = (uint8_t)i;
                conn->data[i].ask = TCP_BUF_CAP;
        }
        if (alloc_buffers(conn) < 0) {
                ae_tcp_conn_free(&conn->common);
                return ae_fail(AE_ENOMEM, "cannot make a connection: no memory for its buffers");
        }
        *ret_conn = conn;
        return 0;
}

void ae_tcp_conn_shut(struct ae_conn *common)
{
        struct tcp_conn *conn = ae_container_of(common, struct tcp_conn, common);
        struct ae_wait *wait = &ae_conn_end(common)->wait;

        ae_wait_remove(wait, &conn->ctl.source);
        for (uint32_t i = 0; i < conn->n_streams; i++)
                ae_wait_remove(wait, &conn->data[i].source);
        ae_tcp_fail_puts(conn);
}

/* --- the connector's side --- */

/* Begins a connect(); its outcome is read by dial_done(). */
static int dial(struct tcp_conn *conn, struct ae_source *source)
{
        struct sockaddr_storage addr;
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        socklen_t len;
        int r;

        r = ae_tcp_addr_parse(conn->common.address, &addr, &len);
        if (r < 0)
                return r;
        fd = socket(addr.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return ae_fail_sys(errno, "cannot make a socket to reach %s", conn->common.address);
        r = ae_tcp_socket_setup(fd);
        if (r < 0)
                return r;
        if (connect(fd, (struct sockaddr *)&addr, len) < 0 && errno != EINPROGRESS)
                return ae_fail(AE_ELOST, "%s", strerror(errno));
        return ae_wait_add(&tcp_net_of(conn)->end.wait, source, ae_steal_fd(&fd));
}

/* 1 while connecting, 0 when connected, negative when the connection broke. */
static int dial_done(struct tcp_conn *conn, struct ae_source *source)
{
        socklen_t len = sizeof(int);
        int err = 0;

        if (!(source->ready & (EPOLLOUT | EPOLLERR | EPOLLHUP)))
                return 1;
        if (getsockopt(source->fd, SOL_SOCKET, SO_ERROR, &err, &len) < 0)
                err = errno;
        if (err == 0)
                return 0;
        ae_conn_break(&conn->common, AE_ELOST, "%s", strerror(err));
        return AE_ELOST;
}

static int say_hello(struct tcp_conn *conn, struct ae_source *source, struct ae_hello *hello)
{
        uint8_t frame[AE_HELLO_SIZE];
        ssize_t n;

        hello->who = tcp_net_of(conn)->end.options.self;
        hello->n_streams = conn->n_streams;
        ae_hello_encode(hello, frame);
        n = send(source->fd, frame, sizeof(frame), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n == (ssize_t)sizeof(frame))
                return 0;
        /* A fresh socket has room for 64 bytes: anything short is a failure. */
        ae_conn_break(&conn->common, AE_ELOST, "cannot say hello: %s",
                     n < 0 ? strerror(errno) : "short write");
        return AE_ELOST;
}

int ae_tcp_connect(struct ae_net *base, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn)
{
        struct tcp_net *net = ae_container_of(base, struct tcp_net, end.base);
        struct sockaddr_storage addr;
        struct tcp_conn *conn;
        socklen_t len;
        int r;

        r = ae_tcp_addr_parse(address, &addr, &len);
        if (r < 0)
                return r;
        r = conn_new(net, net->end.options.streams, &conn);
        if (r < 0)
                return r;
        ae_conn_set_dialled(&conn->common, node, address);
        r = dial(conn, &conn->ctl.source);
        if (r < 0)
                ae_conn_break(&conn->common, r, "%s", ae_error_text());
        *ret_conn = &conn->common.base;
        return 0;
}

/* Reads the acceptor's hello into ctl.rx. 1: not all there yet. */
static int read_hello(struct tcp_conn *conn, struct ae_hello *ret_hello)
{
        struct tcp_ctl *ctl = &conn->ctl;
        ssize_t n;
        int r;

        n = recv(ctl->source.fd, ctl->rx + ctl->rx_tail, AE_HELLO_SIZE - ctl->rx_tail,
                 MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return 1;
        if (n <= 0) {
                ae_conn_break(&conn->common, AE_ELOST, "%s", n < 0 ? strerror(errno)
                                                      : "it hung up during the handshake");
                return AE_ELOST;
        }
        ctl->rx_tail += (uint32_t)n;
        if (ctl->rx_tail < AE_HELLO_SIZE) {
                ae_wait_again(&tcp_net_of(conn)->end.wait, &ctl->source);
                return 1;
        }
        ctl->rx_tail = 0;
        r = ae_conn_take_hello(&conn->common, (const uint8_t *)ctl->rx, AE_HELLO_TCP, ret_hello);
        if (r == 0 && ret_hello->token == 0)
                r = ae_fail(AE_EPROTO, "it refused without a reason");
        if (r < 0)
                ae_conn_break(&conn->common, r, "%s", ae_error_text());
        return r;
}

static void greeted(struct tcp_conn *conn, const struct ae_hello *hello)
{
        int r;

        conn->token = hello->token;
        ae_conn_move(&conn->common, AE_CONN_JOINING);
        for (uint32_t i = 0; i < conn->n_streams; i++) {
                r = dial(conn, &conn->data[i].source);
                if (r < 0) {
                        ae_conn_break(&conn->common, r, "%s", ae_error_text());
                        return;
                }
        }
}

static void join_stream(struct tcp_stream *stream)
{
        struct tcp_conn *conn = stream->conn;
        struct ae_hello hello = { .kind = AE_HELLO_STREAM, .stream = stream->index,
                                  .token = conn->token };

        if (conn->common.accepted || stream->greeted || dial_done(conn, &stream->source) != 0)
                return;
        if (say_hello(conn, &stream->source, &hello) == 0)
                stream->greeted = true;
}

/* --- the acceptor's side --- */

static uint32_t count_joining(const struct tcp_net *net)
{
        const struct tcp_conn *conn;
        uint32_t n = 0;

        ae_list_for_each(conn, &net->end.conns, common.link)
                n += conn->common.accepted && conn->common.state == AE_CONN_JOINING;
        return n;
}

int ae_tcp_conn_accept(struct tcp_net *net, struct ae_guest *guest, const struct ae_hello *hello)
{
        struct ae_hello answer = { .kind = AE_HELLO_TCP };
        struct tcp_conn *conn;
        int r;

        if (hello->n_streams < 1 || hello->n_streams > AE_NET_STREAMS_MAX)
                return ae_fail(AE_EPROTO, "node %u wants %u streams, at most %d", hello->who.node,
                               hello->n_streams, AE_NET_STREAMS_MAX);
        if (count_joining(net) >= TCP_JOINING_MAX)
                return ae_fail(AE_EOVERFLOW, "%d handshakes are under way", TCP_JOINING_MAX);
        r = conn_new(net, hello->n_streams, &conn);
        if (r < 0)
                return r;
        r = ae_net_random(&conn->token);
        if (r < 0) {
                ae_tcp_conn_free(&conn->common);
                return r;
        }
        ae_conn_set_accepted(&conn->common, &hello->who);
        ae_wait_move(&net->end.wait, &guest->source, &conn->ctl.source);
        answer.token = conn->token;
        (void)say_hello(conn, &conn->ctl.source, &answer); /* a failure has broken the connection */
        return 0;
}

int ae_tcp_conn_join(struct tcp_net *net, struct ae_guest *guest, const struct ae_hello *hello)
{
        struct tcp_conn *conn, *found = NULL;
        uint32_t n_joined = 0;

        ae_list_for_each(conn, &net->end.conns, common.link)
                if (conn->common.accepted && conn->common.state == AE_CONN_JOINING &&
                    conn->token == hello->token)
                        found = conn;
        if (!found || hello->stream >= found->n_streams ||
            found->data[hello->stream].source.fd >= 0)
                return ae_fail(AE_EPROTO, "data stream %u of node %u belongs to no connection",
                               hello->stream, hello->who.node);
        ae_wait_move(&net->end.wait, &guest->source, &found->data[hello->stream].source);
        for (uint32_t i = 0; i < found->n_streams; i++)
                n_joined += found->data[i].source.fd >= 0;
        if (n_joined == found->n_streams && ae_tcp_ctl_queue(found, TCP_FRAME_GO, NULL, 0) == 0)
                ae_tcp_go_up(found);
        return 0;
}

/* --- both --- */

void ae_tcp_go_up(struct tcp_conn *conn)
{
        ae_conn_go_up(&conn->common);
        for (uint32_t i = 0; i < conn->n_streams; i++)
                ae_wait_again(&tcp_net_of(conn)->end.wait, &conn->data[i].source);
}

static void greet(struct tcp_conn *conn)
{
        struct ae_hello hello = { .kind = AE_HELLO_TCP };

        if (dial_done(conn, &conn->ctl.source) != 0)
                return;
        ae_conn_move(&conn->common, AE_CONN_GREETING);
        (void)say_hello(conn, &conn->ctl.source, &hello); /* a failure has broken the connection */
}

static void on_ctl(struct ae_source *source)
{
        struct tcp_conn *conn = ae_container_of(source, struct tcp_conn, ctl.source);
        struct ae_hello hello;

        if (conn->common.state == AE_CONN_DIALING)
                return greet(conn);
        if (conn->common.state == AE_CONN_GREETING) {
                if (read_hello(conn, &hello) == 0)
                        greeted(conn, &hello);
                return;
        }
        if (ae_tcp_ctl_flush(conn) == 0)
                (void)ae_tcp_ctl_receive(conn); /* a failure has broken the connection */
}

static void on_stream(struct ae_source *source)
{
        struct tcp_stream *stream = ae_container_of(source, struct tcp_stream, source);

        if (stream->conn->common.state == AE_CONN_JOINING)
                return join_stream(stream);
        if (ae_tcp_stream_send(stream) == 0)
                (void)ae_tcp_stream_receive(stream); /* a failure has broken the connection */
}
