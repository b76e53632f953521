/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sending half of a tcp connection. A msg is written at once or copied into the control
 * stream's buffer; a put becomes one part, or one on every stream, that is written straight out of
 * the caller's memory. Nothing is allocated here. Owner thread.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/tcp.h"

#define IOV_MAX_PARTS 16
#define SEND_BUDGET ((size_t)16 << 20) /* bytes of one stream in one round */

/* --- back-pressure --- */

static bool can_msg(const struct tcp_ctl *ctl, uint64_t len)
{
        return ctl->tx_tail - ctl->tx_head + sizeof(struct tcp_ctl_frame) + len <= TCP_TX_CAP;
}

static void tell_writable(struct tcp_conn *conn)
{
        ae_conn_tell_writable(&conn->common, can_msg(&conn->ctl, conn->common.want_msg_len),
                              conn->free_put != NULL);
}

/* n < 0 of a send: 1 when the socket is full, negative when the connection is broken. */
static int send_failed(struct tcp_conn *conn, struct ae_source *source)
{
        if (errno == EINTR)
                return 0;
        if (errno == EAGAIN) {
                source->ready &= ~(uint32_t)EPOLLOUT;
                return 1;
        }
        ae_conn_break(&conn->common, AE_ELOST, "%s", strerror(errno));
        return AE_ELOST;
}

/* --- the control stream --- */

int ae_tcp_ctl_flush(struct tcp_conn *conn)
{
        struct tcp_ctl *ctl = &conn->ctl;
        int r = 0;

        while (r == 0 && ctl->tx_head < ctl->tx_tail && (ctl->source.ready & EPOLLOUT)) {
                ssize_t n = send(ctl->source.fd, ctl->tx + ctl->tx_head,
                                 ctl->tx_tail - ctl->tx_head, MSG_NOSIGNAL | MSG_DONTWAIT);

                if (n < 0)
                        r = send_failed(conn, &ctl->source);
                else
                        ctl->tx_head += (uint32_t)n;
        }
        if (r < 0)
                return r;
        if (ctl->tx_head == ctl->tx_tail)
                ctl->tx_head = ctl->tx_tail = 0;
        tell_writable(conn);
        return 0;
}

static void append(struct tcp_ctl *ctl, const void *data, size_t len)
{
        assert(ctl->tx_tail + len <= TCP_TX_CAP);
        memcpy(ctl->tx + ctl->tx_tail, data, len);
        ctl->tx_tail += (uint32_t)len;
}

/* Writes past an empty buffer; @ret_n: how many bytes of head and data went out. */
static int send_past(struct tcp_conn *conn, struct iovec iov[2], size_t *ret_n)
{
        struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };
        ssize_t n;
        int r;

        *ret_n = 0;
        if (!(conn->ctl.source.ready & EPOLLOUT))
                return 0;
        n = sendmsg(conn->ctl.source.fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
                r = send_failed(conn, &conn->ctl.source);
                return r < 0 ? r : 0;
        }
        *ret_n = (size_t)n;
        return 0;
}

int ae_tcp_ctl_queue(struct tcp_conn *conn, enum tcp_frame_type type, const void *data, size_t len)
{
        struct tcp_ctl *ctl = &conn->ctl;
        struct tcp_ctl_frame head = { .len = htole32((uint32_t)len), .type = (uint8_t)type };
        struct iovec iov[2] = { { &head, sizeof(head) }, { (void *)(uintptr_t)data, len } };
        size_t n = 0, n_head, n_data;
        int r;

        assert(can_msg(ctl, len));
        if (ctl->tx_head == ctl->tx_tail) {
                r = send_past(conn, iov, &n);
                if (r < 0)
                        return r;
        }
        if (n == sizeof(head) + len)
                return 0;
        if (ctl->tx_tail + sizeof(head) + len > TCP_TX_CAP) {
                memmove(ctl->tx, ctl->tx + ctl->tx_head, ctl->tx_tail - ctl->tx_head);
                ctl->tx_tail -= ctl->tx_head;
                ctl->tx_head = 0;
        }
        n_head = AE_MIN(n, sizeof(head));
        n_data = n - n_head;
        append(ctl, (char *)&head + n_head, sizeof(head) - n_head);
        if (len > n_data)
                append(ctl, (const char *)data + n_data, len - n_data);
        /* A write cut short means a full socket: the next edge continues. */
        if (ctl->source.ready & EPOLLOUT)
                ae_wait_again(&tcp_net_of(conn)->end.wait, &ctl->source);
        return 0;
}

int ae_tcp_msg(struct ae_net_conn *base, const void *data, size_t len)
{
        struct tcp_conn *conn = tcp_conn_of(base);
        int r;

        r = ae_conn_take_msg(&conn->common, len, can_msg(&conn->ctl, len));
        if (r == 0)
                (void)ae_tcp_ctl_queue(conn, TCP_FRAME_MSG, data, len); /* broken: says DOWN */
        return r;
}

/* --- puts --- */

static void put_done(struct tcp_conn *conn, struct tcp_put *put, int status)
{
        put->n_parts_left = 0;
        put->next_free = conn->free_put;
        conn->free_put = put;
        ae_conn_post_done(&conn->common, &put->post, status);
}

void ae_tcp_fail_puts(struct tcp_conn *conn)
{
        for (uint32_t i = 0; i < TCP_PUTS; i++)
                if (conn->puts[i].n_parts_left)
                        put_done(conn, &conn->puts[i], AE_ELOST);
        for (uint32_t i = 0; i < conn->n_streams; i++)
                conn->data[i].first = conn->data[i].last = NULL;
}

static void enqueue(struct tcp_stream *stream, struct tcp_part *part)
{
        part->next = NULL;
        if (stream->last)
                stream->last->next = part;
        else
                stream->first = part;
        stream->last = part;
        stream->queued += part->left + part->head_left;
}

static struct tcp_stream *least_queued(struct tcp_conn *conn)
{
        struct tcp_stream *best = &conn->data[0];

        for (uint32_t i = 1; i < conn->n_streams; i++)
                if (conn->data[i].queued < best->queued)
                        best = &conn->data[i];
        return best;
}

static void fill_part(struct tcp_part *part, struct tcp_put *put, const struct tcp_put_frame *frame,
                      const char *data)
{
        uint64_t begin = ae_tcp_part_off(put->post.len, frame->n_parts, frame->part);
        uint64_t end = ae_tcp_part_off(put->post.len, frame->n_parts, frame->part + 1u);

        part->frame = *frame;
        part->head_left = sizeof(part->frame);
        part->left = end - begin;
        part->data = data ? data + begin : NULL;
        part->put = put;
}

static void queue_put(struct tcp_conn *conn, struct tcp_put *put, struct tcp_put_frame *frame,
                      const char *data)
{
        struct tcp_part *parts = conn->parts + (size_t)(put - conn->puts) * conn->n_streams;

        if (put->post.len < TCP_STRIPE_MIN || conn->n_streams == 1) {
                frame->n_parts = 1;
                fill_part(&parts[0], put, frame, data);
                put->n_parts_left = 1;
                enqueue(least_queued(conn), &parts[0]);
                return;
        }
        frame->n_parts = conn->n_streams;
        frame->seq = htole64(conn->next_seq++);
        put->n_parts_left = conn->n_streams;
        for (uint8_t i = 0; i < conn->n_streams; i++) {
                frame->part = i;
                fill_part(&parts[i], put, frame, data);
                enqueue(&conn->data[i], &parts[i]);
        }
}

int ae_tcp_put(struct ae_net_conn *base, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie)
{
        struct tcp_conn *conn = tcp_conn_of(base);
        struct tcp_put_frame frame = { .type = TCP_PUT_TYPE, .off = htole64(off),
                                       .len = htole64(len), .note = htole64(note) };
        struct tcp_put *put = conn->free_put;
        int r;

        r = ae_conn_take_put(&conn->common, src, len, cookie, put ? &put->post : NULL);
        if (r < 0)
                return r;
        conn->free_put = put->next_free;
        memcpy(frame.key, key, sizeof(frame.key));
        queue_put(conn, put, &frame, len ? src->base + src_off : NULL);
        for (uint32_t i = 0; i < conn->n_streams; i++)
                if (ae_tcp_stream_send(&conn->data[i]) < 0)
                        break; /* broken: its PUT_DONE is queued */
        return 0;
}

/* --- a data stream --- */

static int gather(const struct tcp_stream *stream, struct iovec iov[2 * IOV_MAX_PARTS])
{
        int n = 0;

        for (struct tcp_part *part = stream->first; part && n < 2 * IOV_MAX_PARTS - 1;
             part = part->next) {
                if (part->head_left)
                        iov[n++] = (struct iovec){
                                (char *)&part->frame + sizeof(part->frame) - part->head_left,
                                part->head_left };
                if (part->left)
                        iov[n++] = (struct iovec){ (void *)(uintptr_t)part->data, part->left };
        }
        return n;
}

static void sent(struct tcp_stream *stream, size_t n)
{
        struct tcp_conn *conn = stream->conn;

        stream->queued -= n;
        while (stream->first) {
                struct tcp_part *part = stream->first;
                uint32_t n_head = (uint32_t)AE_MIN(n, part->head_left);
                uint64_t n_data = AE_MIN(n - n_head, part->left);

                part->head_left -= n_head;
                part->left -= n_data;
                if (n_data)
                        part->data += n_data;
                n -= n_head + n_data;
                if (part->head_left || part->left)
                        break;
                stream->first = part->next;
                if (!stream->first)
                        stream->last = NULL;
                if (--part->put->n_parts_left == 0)
                        put_done(conn, part->put, 0);
        }
        assert(n == 0);
}

int ae_tcp_stream_send(struct tcp_stream *stream)
{
        struct tcp_conn *conn = stream->conn;
        size_t budget = SEND_BUDGET;
        struct iovec iov[2 * IOV_MAX_PARTS];
        int r = 0;

        if (!stream->first)
                return 0;
        while (r == 0 && stream->first && (stream->source.ready & EPOLLOUT) && budget) {
                struct msghdr msg = { .msg_iov = iov };
                ssize_t n;

                msg.msg_iovlen = (size_t)gather(stream, iov);
                n = sendmsg(stream->source.fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
                if (n < 0) {
                        r = send_failed(conn, &stream->source);
                        continue;
                }
                sent(stream, (size_t)n);
                budget -= AE_MIN(budget, (size_t)n);
        }
        if (r < 0)
                return r;
        if (stream->first && (stream->source.ready & EPOLLOUT))
                ae_wait_again(&tcp_net_of(conn)->end.wait, &stream->source);
        tell_writable(conn);
        return 0;
}
