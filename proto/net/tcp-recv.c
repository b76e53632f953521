/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiving half of a tcp connection: frames of the control stream, put frames and their bytes.
 * Whatever a peer sends is copied out of the buffer, checked against the grants and the limits,
 * and only then used; a frame that could not have been legal breaks the connection. Owner thread.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/tcp.h"

#define RECEIVE_BUDGET ((size_t)8 << 20) /* bytes of one stream in one round */
#define LARGE ((uint64_t)1 << 18)        /* after a part of this size only a frame is asked for */

/* n <= 0 of a read: 1 when there is nothing now, 0 to try again, negative when it broke. */
static int receive_failed(struct tcp_conn *conn, struct ae_source *source, ssize_t n)
{
        if (n == 0) {
                ae_conn_break(&conn->common, AE_ELOST, "the peer closed it");
                return AE_ELOST;
        }
        if (errno == EINTR)
                return 0;
        if (errno == EAGAIN) {
                source->ready &= ~(uint32_t)EPOLLIN;
                return 1;
        }
        ae_conn_break(&conn->common, AE_ELOST, "%s", strerror(errno));
        return AE_ELOST;
}

/* A read that was cut short took all there was, see epoll(7): more, or the end, comes as a new
 * edge. An end that has come already is still to be read. */
static void mark_read(struct ae_source *source, size_t n, size_t asked)
{
        if (n < asked && !(source->ready & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)))
                source->ready &= ~(uint32_t)EPOLLIN;
}

/* --- the control stream --- */

static int take_frame(struct tcp_conn *conn, const struct tcp_ctl_frame *head, const char *data,
                      uint32_t len)
{
        if (head->type == TCP_FRAME_GO && !conn->common.accepted &&
            conn->common.state == AE_CONN_JOINING && len == 0) {
                ae_tcp_go_up(conn);
                return 0;
        }
        if (head->type != TCP_FRAME_MSG || conn->common.state != AE_CONN_UP) {
                ae_conn_break(&conn->common, AE_EPROTO,
                              "a control frame of type %u came out of turn", head->type);
                return AE_EPROTO;
        }
        ae_conn_msg_arrived(&conn->common, data, len);
        return 0;
}

/* 1: no whole frame is left, or no room for its event; then the rest waits for the next round. */
static int take_frames(struct tcp_conn *conn)
{
        struct tcp_net *net = tcp_net_of(conn);
        struct tcp_ctl *ctl = &conn->ctl;
        struct tcp_ctl_frame head;
        uint32_t len;
        int r;

        while (ctl->rx_tail - ctl->rx_head >= sizeof(head)) {
                memcpy(&head, ctl->rx + ctl->rx_head, sizeof(head));
                len = le32toh(head.len);
                if (len > AE_NET_MSG_MAX || head.zero[0] || head.zero[1] || head.zero[2]) {
                        ae_conn_break(&conn->common, AE_EPROTO,
                                     "a malformed control frame (type %u, %u bytes)", head.type,
                                     len);
                        return AE_EPROTO;
                }
                if (ctl->rx_tail - ctl->rx_head - sizeof(head) < len)
                        return 1;
                if (!ae_evq_room(&net->end.events)) {
                        ae_wait_again(&net->end.wait, &ctl->source);
                        return 1;
                }
                ctl->rx_head += sizeof(head);
                r = take_frame(conn, &head, ctl->rx + ctl->rx_head, len);
                if (r < 0)
                        return r;
                ctl->rx_head += len;
        }
        return 1;
}

int ae_tcp_ctl_receive(struct tcp_conn *conn)
{
        struct tcp_net *net = tcp_net_of(conn);
        struct tcp_ctl *ctl = &conn->ctl;
        int r;

        if (ctl->round != net->round) { /* the messages of earlier rounds are handed out */
                memmove(ctl->rx, ctl->rx + ctl->rx_head, ctl->rx_tail - ctl->rx_head);
                ctl->rx_tail -= ctl->rx_head;
                ctl->rx_head = 0;
                ctl->round = net->round;
        }
        for (;;) {
                size_t room;
                ssize_t n;

                r = take_frames(conn);
                if (r < 0)
                        return r;
                if (!(ctl->source.ready & EPOLLIN))
                        return 0;
                if (ctl->rx_tail == TCP_RX_CAP || !ae_evq_room(&net->end.events)) {
                        ae_wait_again(&net->end.wait, &ctl->source);
                        return 0;
                }
                room = TCP_RX_CAP - ctl->rx_tail;
                n = recv(ctl->source.fd, ctl->rx + ctl->rx_tail, room, MSG_DONTWAIT);
                if (n > 0) {
                        mark_read(&ctl->source, (size_t)n, room);
                        ctl->rx_tail += (uint32_t)n;
                        continue;
                }
                r = receive_failed(conn, &ctl->source, n);
                if (r != 0)
                        return r < 0 ? r : 0;
        }
}

/* --- put frames --- */

/* Moves the window on and wakes streams that waited for it. */
static void slide(struct tcp_conn *conn)
{
        struct tcp_open *open = &conn->window[conn->window_base % TCP_WINDOW];

        while (open->n_done == conn->n_streams) {
                *open = (struct tcp_open){ 0 };
                conn->window_base++;
                open = &conn->window[conn->window_base % TCP_WINDOW];
        }
        for (uint32_t i = 0; i < conn->n_streams; i++) {
                if (!conn->data[i].paused)
                        continue;
                conn->data[i].paused = false;
                ae_wait_again(&tcp_net_of(conn)->end.wait, &conn->data[i].source);
        }
}

static void part_done(struct tcp_stream *stream)
{
        struct tcp_conn *conn = stream->conn;
        struct tcp_arrival *in = &stream->in;
        struct tcp_open *open = &conn->window[in->seq % TCP_WINDOW];
        bool whole = true; /* once one part is late, those that end after it are too */

        assert(in->active && in->left == 0);
        in->active = false;
        if (in->striped) {
                open->n_done++;
                whole = open->n_done == conn->n_streams;
        }
        if (whole && in->late)
                tcp_net_of(conn)->end.stats.late_puts++;
        else if (whole)
                ae_conn_put_arrived(&conn->common, in->mem, in->mem_off, in->len, in->note,
                                    in->tag);
        if (in->striped && whole)
                slide(conn);
}

/* Enters a part of a striped put into the window. 1: it is too far ahead, negative: broke. */
static int open_striped(struct tcp_stream *stream, const struct tcp_put_frame *frame)
{
        struct tcp_conn *conn = stream->conn;
        uint64_t seq = le64toh(frame->seq);
        struct tcp_open *open = &conn->window[seq % TCP_WINDOW];
        struct tcp_put_frame same = *frame;

        if (seq != stream->next_seq) {
                ae_conn_break(&conn->common, AE_EPROTO, "stream %u: put %llu came instead of %llu",
                             stream->index, (unsigned long long)seq,
                             (unsigned long long)stream->next_seq);
                return AE_EPROTO;
        }
        assert(seq >= conn->window_base);
        if (seq >= conn->window_base + TCP_WINDOW)
                return 1;
        if (open->n_seen == 0)
                open->frame = *frame;
        same.part = open->frame.part;
        if (memcmp(&same, &open->frame, sizeof(same)) != 0) {
                ae_conn_break(&conn->common, AE_EPROTO, "stream %u: the parts of put %llu differ",
                             stream->index, (unsigned long long)seq);
                return AE_EPROTO;
        }
        open->n_seen++;
        stream->next_seq++;
        return 0;
}

static int check_frame(struct tcp_stream *stream, const struct tcp_put_frame *frame)
{
        static const uint8_t zero[sizeof(frame->zero)];
        struct tcp_conn *conn = stream->conn;
        bool striped = frame->n_parts != 1;

        if (frame->type == TCP_PUT_TYPE && memcmp(frame->zero, zero, sizeof(zero)) == 0 &&
            le64toh(frame->len) <= AE_NET_PUT_MAX && le64toh(frame->off) <= AE_NET_PUT_MAX &&
            (striped ? frame->n_parts == conn->n_streams && frame->part == stream->index
                     : frame->part == 0 && frame->seq == 0))
                return 0;
        ae_conn_break(&conn->common, AE_EPROTO,
                      "stream %u: a malformed put frame (type %u, part %u of %u, "
                      "%llu bytes)",
                      stream->index, frame->type, frame->part, frame->n_parts,
                      (unsigned long long)le64toh(frame->len));
        return AE_EPROTO;
}

/* 0; 1: beyond the window, ask again later; negative: the connection broke. */
static int begin_part(struct tcp_stream *stream, const struct tcp_put_frame *frame)
{
        struct tcp_conn *conn = stream->conn;
        uint64_t off = le64toh(frame->off), len = le64toh(frame->len), begin, tag = 0;
        struct ae_net_grant *grant = NULL;
        int r;

        r = check_frame(stream, frame);
        if (r < 0)
                return r;
        r = ae_conn_find_target(&conn->common, frame->key, off, len, &grant, &tag);
        if (r < 0) {
                ae_conn_break(&conn->common, r, "%s", ae_error_text());
                return r;
        }
        if (frame->n_parts > 1) {
                r = open_striped(stream, frame);
                if (r != 0)
                        return r;
        }
        begin = ae_tcp_part_off(len, frame->n_parts, frame->part);
        stream->in = (struct tcp_arrival){
                .active = true,
                .late = !grant,
                .striped = frame->n_parts > 1,
                .seq = le64toh(frame->seq),
                .left = ae_tcp_part_off(len, frame->n_parts, frame->part + 1u) - begin,
                .tag = tag,
                .len = len,
                .note = le64toh(frame->note),
        };
        if (grant) {
                stream->in.mem = grant->mem;
                stream->in.mem_off = grant->off + off;
                stream->in.dst = grant->mem->base + grant->off + off + begin;
        }
        stream->ask = stream->in.left >= LARGE ? sizeof(*frame) : TCP_BUF_CAP;
        return 0;
}

/* --- the bytes of a data stream --- */

static void arrived(struct tcp_stream *stream, uint64_t n)
{
        struct tcp_arrival *in = &stream->in;
        struct ae_net_stats *stats = &tcp_net_of(stream->conn)->end.stats;

        assert(n <= in->left);
        in->left -= n;
        if (in->late) {
                stats->late_put_bytes += n;
                return;
        }
        in->dst += n;
        stats->put_bytes_received += n;
}

/* 0; 1: more bytes are needed, or the part must wait; negative: the connection broke. */
static int consume(struct tcp_stream *stream)
{
        struct tcp_arrival *in = &stream->in;
        uint32_t n = stream->buf_tail - stream->buf_head;
        struct tcp_put_frame frame;
        int r;

        if (!in->active) {
                if (n < sizeof(frame))
                        return 1;
                memcpy(&frame, stream->buf + stream->buf_head, sizeof(frame));
                r = begin_part(stream, &frame);
                stream->paused = r == 1;
                if (r != 0)
                        return r;
                stream->buf_head += sizeof(frame);
                n -= (uint32_t)sizeof(frame);
        }
        n = (uint32_t)AE_MIN((uint64_t)n, in->left);
        if (n && !in->late)
                memcpy(in->dst, stream->buf + stream->buf_head, n);
        stream->buf_head += n;
        arrived(stream, n);
        if (in->left)
                return 1;
        part_done(stream);
        return 0;
}

/* One read: the rest of the part straight into place, then what follows into the buffer. */
static ssize_t read_some(struct tcp_stream *stream)
{
        struct tcp_net *net = tcp_net_of(stream->conn);
        struct tcp_arrival *in = &stream->in;
        struct iovec iov[2];
        uint64_t direct = 0;
        int n_iov = 0;
        ssize_t n;

        memmove(stream->buf, stream->buf + stream->buf_head, stream->buf_tail - stream->buf_head);
        stream->buf_tail -= stream->buf_head;
        stream->buf_head = 0;
        if (in->active) {
                assert(stream->buf_tail == 0);
                direct = in->late ? AE_MIN(in->left, (uint64_t)TCP_SINK_LEN)
                                  : AE_MIN(in->left, (uint64_t)RECEIVE_BUDGET);
                iov[n_iov++] = (struct iovec){ in->late ? net->sink : in->dst, direct };
        }
        if (!in->active || direct == in->left)
                iov[n_iov++] = (struct iovec){ stream->buf + stream->buf_tail,
                                               AE_MAX(stream->ask, stream->buf_tail + 1) -
                                                       stream->buf_tail };
        n = readv(stream->source.fd, iov, n_iov);
        if (n <= 0)
                return n;
        /* In the middle of a part the peer is writing still, and another look may save a sleep. */
        if ((uint64_t)n >= direct)
                mark_read(&stream->source, (size_t)n,
                          iov[0].iov_len + (n_iov == 2 ? iov[1].iov_len : 0));
        stream->buf_tail += (uint32_t)((uint64_t)n - AE_MIN((uint64_t)n, direct));
        if (in->active)
                arrived(stream, AE_MIN((uint64_t)n, direct));
        return n;
}

/*
 * The peer has closed a data stream: its last messages come out before DOWN does, in as many rounds
 * as they need.
 */
static int hung_up(struct tcp_stream *stream, ssize_t n)
{
        struct tcp_conn *conn = stream->conn;
        struct tcp_net *net = tcp_net_of(conn);
        int r = n < 0 ? errno : 0;

        conn->ctl.source.ready |= EPOLLIN;
        if (ae_tcp_ctl_receive(conn) < 0)
                return AE_ELOST;
        if ((conn->ctl.source.ready & EPOLLIN) || !ae_evq_room(&net->end.events)) {
                ae_wait_again(&net->end.wait, &stream->source);
                return 1;
        }
        errno = r;
        return receive_failed(conn, &stream->source, n);
}

int ae_tcp_stream_receive(struct tcp_stream *stream)
{
        struct tcp_net *net = tcp_net_of(stream->conn);
        size_t budget = RECEIVE_BUDGET;
        int r = 0;

        while (budget && ae_evq_room(&net->end.events)) {
                ssize_t n;

                if (stream->in.active && stream->in.left == 0)
                        part_done(stream);
                do
                        r = ae_evq_room(&net->end.events) ? consume(stream) : 1;
                while (r == 0);
                if (r < 0)
                        return r;
                if (!ae_evq_room(&net->end.events))
                        break;
                if (stream->paused || !(stream->source.ready & EPOLLIN))
                        return 0;
                n = read_some(stream);
                if (n > 0) {
                        budget -= AE_MIN(budget, (size_t)n);
                        continue;
                }
                if (n < 0 && (errno == EAGAIN || errno == EINTR))
                        r = receive_failed(stream->conn, &stream->source, n);
                else
                        r = hung_up(stream, n);
                if (r != 0)
                        return r < 0 ? r : 0;
        }
        ae_wait_again(&net->end.wait, &stream->source);
        return 0;
}

/* --- revoke --- */

void ae_tcp_revoked(struct ae_conn *common, uint64_t tag)
{
        struct tcp_conn *conn = ae_container_of(common, struct tcp_conn, common);

        for (uint32_t i = 0; i < conn->n_streams; i++)
                if (conn->data[i].in.active && conn->data[i].in.tag == tag)
                        conn->data[i].in.late = true;
}
