/* SPDX-License-Identifier: Apache-2.0 */
/* Frames and requests, see session.h. Receiving runs with the handle's lock held. */
#include "client/session.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>

/* ---- connecting ------------------------------------------------------------------------- */

static int explain_connect(int err, const char *path)
{
        struct stat st;

        if (stat(path, &st) == 0 && !S_ISSOCK(st.st_mode))
                return ae_fail(AE_ENOENT, "'%s' is not a socket: set $AUTOEP_SOCKET to that of "
                               "autoepd", path);
        if (err == EACCES || err == EPERM)
                return ae_fail(AE_EAUTH, "cannot connect to '%s': this user may not write to it",
                               path);
        if (err == EAGAIN || err == EINPROGRESS || err == EINTR)
                return ae_fail(AE_ETIMEDOUT, "the daemon at '%s' has not accepted the connection "
                               "in time", path);
        if (err == ENOENT || err == ENOTDIR)
                return ae_fail(AE_ENOENT, "there is no socket '%s': start autoepd, or set "
                               "$AUTOEP_SOCKET", path);
        if (err == EPROTOTYPE) /* of another type, as that of the shm transport is */
                return ae_fail(AE_ENOENT, "'%s' is not autoepd's socket for workers: set "
                               "$AUTOEP_SOCKET to that one", path);
        if (err == ECONNREFUSED)
                return ae_fail(AE_ENOENT, "no daemon listens at '%s': start autoepd", path);
        return ae_fail_sys(err, "cannot connect to '%s'", path);
}

/* connect() on a unix socket waits as long as SO_SNDTIMEO says when the backlog is full (unix(7));
 * a non-blocking one would fail at once, with nothing to poll for. */
static int set_send_timeout(int fd, uint64_t left_ns)
{
        uint64_t us = AE_MAX(left_ns / 1000, UINT64_C(1)); /* 0 would mean for ever */
        struct timeval timeout = { .tv_sec = (time_t)(us / 1000000),
                                   .tv_usec = (suseconds_t)(us % 1000000) };

        if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) < 0)
                return ae_fail_sys(errno, "cannot set a timeout on a socket");
        return 0;
}

int ae_session_connect(struct autoep *h, const char *path, const struct ae_deadline *deadline)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        int r;

        assert(h->socket < 0);
        if (strlen(path) >= sizeof(address.sun_path))
                return ae_fail(AE_EINVAL, "the socket's path '%s' is longer than %zu bytes", path,
                               sizeof(address.sun_path) - 1);
        memcpy(address.sun_path, path, strlen(path) + 1);
        h->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (h->socket < 0)
                return ae_fail_sys(errno, "cannot make a socket");
        r = set_send_timeout(h->socket, ae_deadline_left_ns(h, deadline));
        if (r < 0)
                return r;
        if (connect(h->socket, (struct sockaddr *)&address, sizeof(address)) < 0)
                return explain_connect(errno, path);
        if (fcntl(h->socket, F_SETFL, O_NONBLOCK) < 0)
                return ae_fail_sys(errno, "cannot make a socket non-blocking");
        return 0;
}

/* ---- sending ---------------------------------------------------------------------------- */

struct out {
        const uint8_t *data; /* borrowed */
        size_t len;
        int fd;              /* borrowed; goes with the first byte; -1: none */
};

static ssize_t send_some(int sock, const struct out *out)
{
        union {
                struct cmsghdr align;
                char space[CMSG_SPACE(sizeof(int))];
        } control = { .space = { 0 } };
        struct iovec iov = { .iov_base = (void *)(uintptr_t)out->data, .iov_len = out->len };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

        if (out->fd >= 0) {
                struct cmsghdr *cmsg;

                msg.msg_control = control.space;
                msg.msg_controllen = sizeof(control.space);
                cmsg = CMSG_FIRSTHDR(&msg);
                cmsg->cmsg_level = SOL_SOCKET;
                cmsg->cmsg_type = SCM_RIGHTS;
                cmsg->cmsg_len = CMSG_LEN(sizeof(int));
                memcpy(CMSG_DATA(cmsg), &out->fd, sizeof(int));
        }
        return sendmsg(sock, &msg, MSG_NOSIGNAL);
}

/* 0 also when the daemon has hung up: what it said before that is still to be read, and whoever
 * waits for the answer then finds out. */
static int send_all(struct autoep *h, struct out out, const struct ae_deadline *deadline)
{
        while (out.len > 0) {
                ssize_t n = send_some(h->socket, &out);
                struct pollfd fd = { .fd = h->socket, .events = POLLOUT };
                uint64_t left_ns = ae_deadline_left_ns(h, deadline);

                if (n > 0) {
                        out.data += n;
                        out.len -= (size_t)n;
                        out.fd = -1;
                } else if (errno == EPIPE || errno == ECONNRESET) {
                        return 0;
                } else if (errno != EAGAIN && errno != EINTR) {
                        return ae_fail_sys(errno, "cannot send to the daemon");
                } else if (left_ns == 0) {
                        return ae_fail(AE_ETIMEDOUT, "the daemon has not read a request in time");
                } else {
                        struct timespec timeout = {
                                .tv_sec = (time_t)(left_ns / AE_NS_PER_S),
                                .tv_nsec = (long)(left_ns % AE_NS_PER_S),
                        };

                        (void)ppoll(&fd, 1, &timeout,
                                    NULL); /* the next round sees what came of it */
                }
        }
        return 0;
}

static int send_frame(struct autoep *h, const struct ae_session_call *call,
                      const struct ae_deadline *deadline)
{
        AE_CLEANUP(ae_cleanup_free) uint8_t *data = NULL;
        struct ae_control_frame frame = { .type = (uint16_t)call->type };
        size_t len = ae_control_size(call->message);
        int r;

        if (len > AE_CONTROL_FRAME_MAX)
                return ae_fail(AE_EOVERFLOW, "a %s message of %zu bytes is beyond the limit of %u",
                               ae_control_name(call->type), len, AE_CONTROL_FRAME_MAX);
        frame.len = (uint32_t)len;
        data = malloc(sizeof(frame) + len);
        if (!data)
                return ae_fail(AE_ENOMEM, "no memory for a %s message of %zu bytes",
                               ae_control_name(call->type), len);
        memcpy(data, &frame, sizeof(frame));
        ae_control_pack(call->message, data + sizeof(frame));
        pthread_mutex_lock(&h->send_lock);
        r = send_all(h, (struct out){ data, sizeof(frame) + len, call->fd }, deadline);
        pthread_mutex_unlock(&h->send_lock);
        /* A frame that was sent in part can't be taken back. */
        return r < 0 ? ae_pump_break(h, r) : 0;
}

/* ---- receiving -------------------------------------------------------------------------- */

static void close_fds(int *fds, uint32_t *n_fds)
{
        for (uint32_t i = 0; i < *n_fds; i++)
                ae_cleanup_close(&fds[i]);
        *n_fds = 0;
}

void ae_session_in_deinit(struct ae_session_in *in)
{
        close_fds(in->fds, &in->n_fds);
        free(in->body);
        *in = (struct ae_session_in){ .body = NULL };
}

/* Keeps descriptors as long as there is room and closes the rest. */
static int take_fds(struct ae_session_in *in, struct msghdr *msg)
{
        bool too_many = msg->msg_flags & MSG_CTRUNC;

        for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
                size_t n;

                if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
                        continue;
                n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
                for (size_t i = 0; i < n; i++) {
                        int fd;

                        memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
                        if (in->n_fds < AE_CONTROL_FDS_MAX) {
                                in->fds[in->n_fds++] = fd;
                        } else {
                                ae_cleanup_close(&fd);
                                too_many = true;
                        }
                }
        }
        return too_many ? ae_fail(AE_EPROTO, "the daemon passed more than %d descriptors at once",
                                  AE_CONTROL_FDS_MAX) : 0;
}

/* Bytes read, 0 when none are there now. */
static ssize_t receive_some(struct autoep *h, void *to, size_t len)
{
        union {
                struct cmsghdr align;
                char space[CMSG_SPACE(AE_CONTROL_FDS_MAX * sizeof(int))];
        } control;
        struct iovec iov = { .iov_base = to, .iov_len = len };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                              .msg_controllen = sizeof(control.space) };
        ssize_t n = recvmsg(h->socket, &msg, MSG_CMSG_CLOEXEC);
        int r;

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return 0;
        if (n == 0 || (n < 0 && errno == ECONNRESET))
                return ae_fail(AE_ELOST, "the daemon of node %u has closed the connection in round "
                               "%llu: see its log", h->node,
                               (unsigned long long)ae_handle_round(h));
        if (n < 0)
                return ae_fail_sys(errno, "cannot receive from the daemon");
        r = take_fds(&h->in, &msg);
        return r < 0 ? r : n;
}

static int begin_body(struct ae_session_in *in)
{
        struct ae_control_frame frame;

        memcpy(&frame, in->head, sizeof(frame));
        if (frame.len > AE_CONTROL_FRAME_MAX || frame.zero)
                return ae_fail(AE_EPROTO, "the daemon sent a frame of %u bytes, the limit is %u",
                               frame.len, AE_CONTROL_FRAME_MAX);
        in->len = frame.len;
        in->type = frame.type;
        in->body = malloc((size_t)frame.len + 1);
        if (!in->body)
                return ae_fail(AE_ENOMEM, "no memory for a message of %u bytes", frame.len);
        return 0;
}

static uint64_t id_of(uint32_t type, const ProtobufCMessage *message)
{
        if (type == AE_CONTROL_DONE)
                return ((const Autoep__Done *)message)->id;
        return type == AE_CONTROL_ERROR ? ((const Autoep__Error *)message)->id : 0;
}

static struct ae_session_reply *reply_for(struct autoep *h, uint32_t type, uint64_t id)
{
        struct ae_session_reply *reply;

        ae_list_for_each(reply, &h->replies, link) {
                if (!reply->done && reply->id == id &&
                    (type == reply->want || type == AE_CONTROL_ERROR))
                        return reply;
        }
        return NULL;
}

/* An answer to nothing is fine when the call that asked has gone at its deadline. */
static int check_stray(const struct autoep *h, uint32_t type, uint64_t id)
{
        bool done = type == AE_CONTROL_DONE || type == AE_CONTROL_ERROR;

        if (done && id != 0 && id < h->next_id)
                return 0;
        if (h->register_cut && (type == AE_CONTROL_REGISTERED || (type == AE_CONTROL_ERROR &&
                                                                  id == 0)))
                return 0;
        return ae_fail(AE_EPROTO, "the daemon sent %s (%u, id %llu), which was not asked for",
                       ae_control_name(type), type, (unsigned long long)id);
}

static int take_frame(struct autoep *h)
{
        AE_CLEANUP(ae_control_free_p) ProtobufCMessage *message = NULL;
        struct ae_session_in *in = &h->in;
        struct ae_session_reply *reply;
        uint64_t id;
        int r;

        r = ae_control_unpack(in->type, in->body, in->len, &message);
        if (r < 0)
                return r;
        id = id_of(in->type, message);
        reply = reply_for(h, in->type, id);
        if (!reply)
                return check_stray(h, in->type, id);
        reply->type = in->type;
        reply->message = ae_steal(message);
        memcpy(reply->fds, in->fds, sizeof(reply->fds));
        reply->n_fds = in->n_fds;
        in->n_fds = 0;
        reply->done = true;
        return 0;
}

int ae_session_receive(struct autoep *h)
{
        struct ae_session_in *in = &h->in;
        size_t n_head = sizeof(struct ae_control_frame);

        for (;;) {
                bool head = in->have < n_head;
                uint8_t *to = head ? in->head + in->have : in->body + in->have - n_head;
                size_t want = n_head - in->have + (head ? 0 : in->len);
                ssize_t n = receive_some(h, to, want);
                int r = n < 0 ? (int)n : 0;

                if (n <= 0)
                        return r;
                in->have += (size_t)n;
                if (in->have == n_head)
                        r = begin_body(in);
                if (r == 0 && in->have >= n_head && in->have == in->len + n_head) {
                        r = take_frame(h);
                        ae_session_in_deinit(in);
                }
                if (r < 0)
                        return r;
        }
}

/* ---- requests --------------------------------------------------------------------------- */

static bool is_answered(struct autoep *h, const struct ae_wait *wait)
{
        const struct ae_session_reply *reply = wait->arg;

        (void)h;
        return reply->done;
}

static int status_of(const struct ae_session_reply *reply)
{
        const Autoep__Error *error = (const Autoep__Error *)reply->message;

        if (reply->type == reply->want)
                return 0;
        assert(reply->type == AE_CONTROL_ERROR);
        if (error->status >= 0 || error->status < AE_EOVERFLOW)
                return ae_fail(AE_EPROTO, "the daemon refused with the unknown status %d: %s",
                               error->status, error->text);
        return ae_fail(error->status, "%s", error->text);
}

int ae_session_call(struct autoep *h, const struct ae_session_call *call,
                    const struct ae_deadline *deadline, struct ae_session_reply *ret_reply)
{
        struct ae_wait wait = { .done = is_answered, .arg = ret_reply, .deadline = deadline };
        int r;

        *ret_reply = (struct ae_session_reply){ .id = call->id, .want = call->want };
        pthread_mutex_lock(&h->lock);
        ae_list_push(&h->replies, &ret_reply->link);
        pthread_mutex_unlock(&h->lock);
        r = send_frame(h, call, deadline);
        if (r == 0)
                r = ae_pump_wait(h, &wait);
        pthread_mutex_lock(&h->lock);
        ae_list_unlink(&ret_reply->link);
        pthread_mutex_unlock(&h->lock);
        return r < 0 ? r : status_of(ret_reply);
}

void ae_session_reply_deinit(struct ae_session_reply *reply)
{
        (void)ae_control_free(reply->message);
        reply->message = NULL;
        close_fds(reply->fds, &reply->n_fds);
}

uint64_t ae_session_next_id(struct autoep *h)
{
        uint64_t id;

        pthread_mutex_lock(&h->lock);
        id = h->next_id++;
        pthread_mutex_unlock(&h->lock);
        return id;
}
