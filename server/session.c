/* SPDX-License-Identifier: Apache-2.0 */
/* Sessions on the daemon's unix socket. Loop thread. */
#include "server/session.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/log.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define UNKNOWN_MAX 64u                     /* sessions that have not said hello */
#define UNKNOWN_NS (5 * AE_NS_PER_S)
#define HELLO_MAX (4 * AE_KIB)              /* bytes of a frame before hello */
#define IDLE_FDS 4u

struct out_frame {
        struct ae_list link;
        size_t len, sent;
        int fds[AE_CONTROL_FDS_MAX]; /* owned duplicates */
        size_t n_fds;
        char data[];
};

struct session {
        struct ae_list link;
        struct ae_sessions *sessions;
        uv_poll_t poll, bell_poll;
        int fd;
        int bell, worker_bell;     /* a socket pair: each side rings and hears its end; -1 */
        uint32_t n_handles;        /* of the two polls */
        bool known, broken, closing;
        bool refused;              /* its hello was; it has been told and should go */
        uint64_t since_ns;
        struct ucred peer;
        struct ae_worker *worker;  /* NULL: none */
        char *in;                  /* owned; the frame being read */
        size_t in_len, in_cap;
        int in_fd;                 /* owned; came with it */
        struct ae_list out;        /* struct out_frame */
        char why[256];
};

struct ae_sessions {
        struct ae_sessions_options options;
        char *path;                /* owned */
        int fd;
        uv_poll_t poll;
        struct ae_list list;       /* struct session */
        uint32_t n, n_unknown, n_handles;
        int spare;                 /* a descriptor to accept on when no other is left; -1 */
        bool full;                 /* nor that one: not listening until one is free again */
        bool freed;
};

static void on_ready(uv_poll_t *poll, int status, int events);
static void on_accept(uv_poll_t *poll, int status, int events);

/* ---- life ------------------------------------------------------------------------------- */

static void maybe_free(struct ae_sessions *sessions)
{
        if (!sessions->freed || sessions->n_handles)
                return;
        free(sessions->path);
        free(sessions);
}

static void free_frame(struct out_frame *frame)
{
        for (size_t i = 0; i < frame->n_fds; i++)
                ae_cleanup_close(&frame->fds[i]);
        free(frame);
}

/* Has a descriptor in reserve again, if it may, and then listens again. */
static void keep_spare(struct ae_sessions *sessions)
{
        if (sessions->spare < 0)
                sessions->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
        if (sessions->spare < 0 || !sessions->full)
                return;
        sessions->full = false;
        ae_log_info("accepts sessions again");
        uv_poll_start(&sessions->poll, UV_READABLE, on_accept);
}

static void on_session_closed(uv_handle_t *handle)
{
        struct session *session = handle->data;
        struct ae_sessions *sessions = session->sessions;
        struct ae_list *entry;

        if (--session->n_handles)
                return;
        while ((entry = ae_list_pop(&session->out)))
                free_frame(ae_list_entry(entry, struct out_frame, link));
        ae_cleanup_close(&session->fd);
        ae_cleanup_close(&session->bell);
        ae_cleanup_close(&session->worker_bell);
        ae_cleanup_close(&session->in_fd);
        free(session->in);
        free(session);
        sessions->n_handles--;
        if (!sessions->freed)
                keep_spare(sessions);
        maybe_free(sessions);
}

static void end_session(struct session *session, const char *why)
{
        struct ae_worker *worker = session->worker;

        if (session->closing)
                return;
        session->closing = true;
        ae_list_unlink(&session->link);
        session->sessions->n--;
        if (!session->known)
                session->sessions->n_unknown--;
        session->worker = NULL;
        uv_close((uv_handle_t *)&session->poll, on_session_closed);
        if (session->n_handles > 1)
                uv_close((uv_handle_t *)&session->bell_poll, on_session_closed);
        if (worker)
                ae_core_worker_gone(worker, why);
}

/* Makes room: a process that means it says hello at once, so the oldest is the one to go. */
static void end_silent(struct ae_sessions *sessions)
{
        struct session *session;

        ae_list_for_each(session, &sessions->list, link) {
                if (session->known)
                        continue;
                end_session(session, "it said nothing");
                return;
        }
}

static bool is_out_of_room(int error)
{
        return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

/*
 * Without a descriptor for it a connection would stay at the head of the queue and wake the loop
 * without end. The one in reserve lets who connects hear why it can't be served; when that is gone
 * too the others wait until a session ends.
 */
static int accept_one(struct ae_sessions *sessions)
{
        int flags = SOCK_CLOEXEC | SOCK_NONBLOCK;
        int fd = accept4(sessions->fd, NULL, NULL, flags);

        if (fd >= 0 || !is_out_of_room(errno))
                return fd;
        if (sessions->spare >= 0) {
                ae_cleanup_close(&sessions->spare);
                sessions->spare = -1;
                fd = accept4(sessions->fd, NULL, NULL, flags);
                if (fd >= 0 || !is_out_of_room(errno))
                        return fd;
        }
        ae_log_warn("accepts no session until one of %u ends: %s", sessions->n, strerror(errno));
        sessions->full = true;
        uv_poll_stop(&sessions->poll);
        return -1;
}

static void on_accept(uv_poll_t *poll, int status, int events)
{
        struct ae_sessions *sessions = poll->data;
        struct session *session;
        socklen_t len = sizeof(session->peer);
        int fd;

        (void)events;
        if (status < 0)
                return;
        fd = accept_one(sessions);
        if (fd < 0)
                return;
        if (sessions->n_unknown >= UNKNOWN_MAX)
                end_silent(sessions);
        session = calloc(1, sizeof(*session));
        if (!session)
                abort();
        session->sessions = sessions;
        session->fd = fd;
        session->bell = session->worker_bell = session->in_fd = -1;
        session->since_ns = ae_now_ns();
        session->poll.data = session;
        ae_list_init(&session->out);
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &session->peer, &len) < 0 ||
            uv_poll_init(sessions->options.loop, &session->poll, fd) < 0) {
                (void)close(fd);
                free(session);
                return;
        }
        session->n_handles = 1;
        sessions->n_handles++;
        sessions->n++;
        sessions->n_unknown++;
        ae_list_push(&sessions->list, &session->link);
        uv_poll_start(&session->poll, UV_READABLE, on_ready);
}

static int clear_path(const char *path)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct stat stat;

        if (lstat(path, &stat) < 0)
                return errno == ENOENT ? 0 : ae_fail_sys(errno, "cannot look at %s", path);
        if (!S_ISSOCK(stat.st_mode))
                return ae_fail(AE_EEXIST, "%s is there and is not a socket: it is left alone",
                               path);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return ae_fail_sys(errno, "cannot make a socket");
        (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
                return ae_fail(AE_EEXIST, "another daemon answers at %s", path);
        if (unlink(path) < 0)
                return ae_fail_sys(errno, "cannot remove the stale socket %s", path);
        return 0;
}

static int listen_at(struct ae_sessions *sessions)
{
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        mode_t mask;
        int r;

        if (strlen(sessions->path) >= sizeof(address.sun_path))
                return ae_fail(AE_EINVAL, "the socket path %s is longer than %zu bytes",
                               sessions->path, sizeof(address.sun_path) - 1);
        r = clear_path(sessions->path);
        if (r < 0)
                return r;
        sessions->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (sessions->fd < 0)
                return ae_fail_sys(errno, "cannot make a socket");
        (void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", sessions->path);
        mask = umask(0117); /* 0660: the job's user, or the group that may control */
        r = bind(sessions->fd, (struct sockaddr *)&address, sizeof(address));
        umask(mask);
        if (r < 0 || listen(sessions->fd, 128) < 0)
                return ae_fail_sys(errno, "cannot listen at %s", sessions->path);
        return 0;
}

AE_DEFINE_CLEANUP(struct ae_sessions *, ae_sessions_free)

int ae_sessions_new(const struct ae_sessions_options *options, struct ae_sessions **ret_sessions)
{
        AE_CLEANUP(ae_sessions_free_p) struct ae_sessions *sessions = calloc(1, sizeof(*sessions));
        int r;

        if (!sessions)
                return ae_fail(AE_ENOMEM, "no memory for sessions");
        sessions->options = *options;
        sessions->fd = sessions->spare = -1;
        ae_list_init(&sessions->list);
        sessions->path = strdup(options->path);
        if (!sessions->path)
                return ae_fail(AE_ENOMEM, "no memory for a path");
        r = listen_at(sessions);
        if (r < 0)
                return r;
        r = uv_poll_init(options->loop, &sessions->poll, sessions->fd);
        if (r < 0)
                return ae_fail(AE_ESYS, "cannot poll %s: %s", options->path, uv_strerror(r));
        sessions->n_handles = 1;
        sessions->poll.data = sessions;
        uv_poll_start(&sessions->poll, UV_READABLE, on_accept);
        keep_spare(sessions);
        *ret_sessions = ae_steal(sessions);
        return 0;
}

static void on_listener_closed(uv_handle_t *handle)
{
        struct ae_sessions *sessions = handle->data;

        sessions->n_handles--;
        maybe_free(sessions);
}

struct ae_sessions *ae_sessions_free(struct ae_sessions *sessions)
{
        struct session *session;

        if (!sessions)
                return NULL;
        ae_list_for_each_safe(session, &sessions->list, link)
                end_session(session, "the daemon stops");
        if (sessions->n_handles)
                uv_close((uv_handle_t *)&sessions->poll, on_listener_closed);
        if (sessions->fd >= 0) {
                ae_cleanup_close(&sessions->fd);
                (void)unlink(sessions->path); /* the next daemon would remove it too */
        }
        ae_cleanup_close(&sessions->spare);
        sessions->freed = true;
        maybe_free(sessions);
        return NULL;
}

/* ---- out -------------------------------------------------------------------------------- */

static ssize_t write_some(struct session *session, struct out_frame *frame)
{
        union {
                struct cmsghdr head;
                char space[CMSG_SPACE(sizeof(int) * AE_CONTROL_FDS_MAX)];
        } control = { 0 };
        struct iovec iov = { .iov_base = frame->data + frame->sent,
                             .iov_len = frame->len - frame->sent };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

        if (frame->sent == 0 && frame->n_fds) {
                struct cmsghdr *head = &control.head;

                msg.msg_control = control.space;
                msg.msg_controllen = CMSG_SPACE(sizeof(int) * frame->n_fds);
                head->cmsg_level = SOL_SOCKET;
                head->cmsg_type = SCM_RIGHTS;
                head->cmsg_len = CMSG_LEN(sizeof(int) * frame->n_fds);
                memcpy(CMSG_DATA(head), frame->fds, sizeof(int) * frame->n_fds);
        }
        return sendmsg(session->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Sends what the socket takes. A broken session ends on its next event, not inside the core. */
static void flush_out(struct session *session)
{
        while (!ae_list_empty(&session->out) && !session->broken) {
                struct out_frame *frame = ae_list_entry(session->out.next, struct out_frame, link);
                ssize_t n = write_some(session, frame);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0) {
                        session->broken = errno != EAGAIN;
                        break;
                }
                frame->sent += (size_t)n;
                if (frame->sent < frame->len)
                        continue;
                ae_list_unlink(&frame->link);
                free_frame(frame);
        }
        uv_poll_start(&session->poll,
                      ae_list_empty(&session->out) ? UV_READABLE : UV_READABLE | UV_WRITABLE,
                      on_ready);
}

static int no_descriptors(const struct session *session, int error)
{
        struct rlimit limit;

        if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
                limit.rlim_cur = 0;
        return ae_fail_sys(error,
                           "node %u has no descriptors left for this process: raise its limit"
                           " of open files (%llu, LimitNOFILE) or end other processes",
                           session->sessions->options.node, (unsigned long long)limit.rlim_cur);
}

static int copy_fds(struct out_frame *frame, const int *fds, size_t n_fds)
{
        for (size_t i = 0; i < n_fds; i++) {
                int fd = fcntl(fds[i], F_DUPFD_CLOEXEC, 0);

                if (fd < 0)
                        return -errno;
                frame->fds[frame->n_fds++] = fd;
        }
        return 0;
}

/* What was to be sent can't be; instead of it the process hears why. */
static void refuse(struct session *session, int status);

static void send_frame(struct session *session, uint32_t type, const ProtobufCMessage *message,
                       const int *fds, size_t n_fds)
{
        int r;

        size_t len = ae_control_size(message);
        struct ae_control_frame head = { .len = ae_u32(len), .type = (uint16_t)type };
        struct out_frame *frame = malloc(sizeof(*frame) + sizeof(head) + len);

        if (!frame)
                abort();
        assert(n_fds <= AE_CONTROL_FDS_MAX);
        memset(frame, 0, sizeof(*frame));
        frame->len = sizeof(head) + len;
        memcpy(frame->data, &head, sizeof(head));
        ae_control_pack(message, (uint8_t *)frame->data + sizeof(head));
        r = copy_fds(frame, fds, n_fds);
        if (r < 0) {
                free_frame(frame);
                refuse(session, no_descriptors(session, -r));
                return;
        }
        ae_list_push(&session->out, &frame->link);
        flush_out(session);
}

void ae_sessions_send(struct ae_worker *worker, uint32_t type, const ProtobufCMessage *message,
                      const int *fds, size_t n_fds)
{
        struct session *session = ae_core_worker_session(worker);

        if (!session->closing)
                send_frame(session, type, message, fds, n_fds);
}

/* ---- bells ------------------------------------------------------------------------------ */

/*
 * Each side has an end of its own. A worker may let its end block, fill it, or leave what it hears:
 * that is nothing to the daemon, which says in each call that it will not wait.
 */
static void on_bell(uv_poll_t *poll, int status, int events)
{
        struct session *session = poll->data;
        char rings[512];
        ssize_t n = recv(session->bell, rings, sizeof(rings), MSG_DONTWAIT);

        (void)status;
        (void)events;
        /* Closed: its socket says so too. If not, it is heard when the loop runs for others. */
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
                uv_poll_stop(poll);
}

static int make_bell(struct session *session)
{
        int ends[2];
        int r;

        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) < 0)
                return no_descriptors(session, errno);
        session->bell = ends[0];
        session->worker_bell = ends[1];
        r = uv_poll_init(session->sessions->options.loop, &session->bell_poll, session->bell);
        if (r < 0)
                return ae_fail(AE_ESYS, "cannot poll a bell: %s", uv_strerror(r));
        session->bell_poll.data = session;
        session->n_handles++;
        uv_poll_start(&session->bell_poll, UV_READABLE, on_bell);
        return 0;
}

void ae_sessions_wake(struct ae_worker *worker)
{
        struct session *session = ae_core_worker_session(worker);
        struct ae_local_page *page = (struct ae_local_page *)ae_core_worker_page(worker)->base;

        /* what was published stands before the look; pairs with the worker's seq_cst store of
         * worker_waits and its second look */
        atomic_thread_fence(memory_order_seq_cst);
        if (!atomic_load_explicit(&page->worker_waits, memory_order_seq_cst))
                return;
        /* full: it rings already; broken: the session is about to end */
        (void)!send(session->bell, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* ---- in --------------------------------------------------------------------------------- */

static void send_error(struct session *session, int status, const char *text)
{
        Autoep__Error error = AUTOEP__ERROR__INIT;

        error.status = status;
        error.text = (char *)(uintptr_t)text;
        send_frame(session, AE_CONTROL_ERROR, &error.base, NULL, 0);
}

static bool has_hung_up(const struct session *session)
{
        struct pollfd fd = { .fd = session->fd, .events = POLLRDHUP };

        return poll(&fd, 1, 0) == 1;
}

/* A process that died may have its successor's hello in front of its own end in this turn of the
 * loop: what it said, and that it is gone, counts first. */
static void hear_the_dead(struct ae_sessions *sessions)
{
        struct session *session;

        ae_list_for_each_safe(session, &sessions->list, link) {
                if (session->worker && has_hung_up(session))
                        on_ready(&session->poll, 0, UV_READABLE);
        }
}

static void refuse(struct session *session, int status)
{
        ae_log_warn("refused pid %d: %s", session->peer.pid, ae_error_text());
        session->refused = true;
        send_error(session, status, ae_error_text());
}

static int on_hello(struct session *session, const Autoep__Hello *hello)
{
        struct ae_worker_spec spec = { .hello = hello, .pid = session->peer.pid,
                                       .uid = session->peer.uid, .session = session };
        int r;

        if (session->known)
                return ae_fail(AE_EPROTO, "it says hello twice");
        if (has_hung_up(session)) /* it gave up while the daemon stood still */
                return ae_fail(AE_ECLOSED, "the process closed its socket");
        session->known = true;
        session->sessions->n_unknown--;
        r = make_bell(session);
        if (r == 0) {
                hear_the_dead(session->sessions);
                r = ae_core_worker_new(session->sessions->options.core, &spec, &session->worker);
        }
        if (r < 0) {
                refuse(session, r);
                return 0;
        }
        ae_core_worker_attach(session->worker, session->worker_bell);
        return 0;
}

static int on_ctl(struct session *session, const Autoep__CtlRequest *request)
{
        struct ae_sessions_options *options = &session->sessions->options;
        Autoep__CtlReply reply = AUTOEP__CTL_REPLY__INIT;
        AE_CLEANUP(ae_cleanup_free) char *text = NULL;

        if (!session->known) {
                session->known = true;
                session->sessions->n_unknown--;
        }
        if (session->worker)
                return ae_fail(AE_EPROTO, "a worker asks for control");
        if (request->version != AE_WIRE_VERSION)
                reply.status =
                        ae_fail(AE_EVERSION,
                                "autoep-ctl speaks protocol version %u, this daemon version %u",
                                request->version, AE_WIRE_VERSION);
        else
                reply.status = options->inspect(options->user, request, &text);
        reply.text = text ? text : (char *)(uintptr_t)ae_error_text();
        send_frame(session, AE_CONTROL_CTL_REPLY, &reply.base, NULL, 0);
        return 0;
}

/* One whole frame. */
static int on_frame(struct session *session, const struct ae_control_frame *head, const char *body)
{
        ProtobufCMessage *message = NULL;
        int r;

        /* what else a descriptor may be, a read of it could make the loop wait */
        if (session->in_fd >= 0 && fcntl(session->in_fd, F_GET_SEALS) < 0)
                return ae_fail(AE_EPROTO, "it passes a descriptor that is not a memfd");
        r = ae_control_unpack(head->type, body, head->len, &message);
        if (r < 0)
                return r;
        if (session->worker) {
                int fd = ae_steal_fd(&session->in_fd);

                return ae_core_worker_message(session->worker, head->type, message, fd);
        }
        if (head->type == AE_CONTROL_HELLO)
                r = on_hello(session, (const Autoep__Hello *)message);
        else if (head->type == AE_CONTROL_CTL_REQUEST)
                r = on_ctl(session, (const Autoep__CtlRequest *)message);
        else
                r = ae_fail(AE_EPROTO, "it sends %s before hello", ae_control_name(head->type));
        ae_control_free(message);
        return r;
}

static ssize_t read_some(struct session *session, void *to, size_t len)
{
        union {
                struct cmsghdr head;
                char space[CMSG_SPACE(sizeof(int) * IDLE_FDS)];
        } control;
        struct iovec iov = { .iov_base = to, .iov_len = len };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                              .msg_controllen = sizeof(control.space) };
        ssize_t n = recvmsg(session->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

        for (struct cmsghdr *c = n >= 0 ? CMSG_FIRSTHDR(&msg) : NULL; c; c = CMSG_NXTHDR(&msg, c)) {
                size_t n_fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
                int fds[IDLE_FDS];

                if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
                        continue;
                memcpy(fds, CMSG_DATA(c), n_fds * sizeof(int));
                for (size_t i = 0; i < n_fds; i++) {
                        ae_cleanup_close(&session->in_fd); /* one a frame; the last counts */
                        session->in_fd = fds[i];
                }
        }
        return n;
}

static int reserve(struct session *session, size_t len)
{
        char *in;

        if (len <= session->in_cap)
                return 0;
        in = realloc(session->in, len);
        if (!in)
                return ae_fail(AE_ENOMEM, "no memory for a frame of %zu bytes", len);
        session->in = in;
        session->in_cap = len;
        return 0;
}

/* How many bytes the frame needs as far as is known; negative when it is too long. */
static int64_t frame_len(const struct session *session)
{
        struct ae_control_frame head;

        if (session->in_len < sizeof(head))
                return sizeof(head);
        memcpy(&head, session->in, sizeof(head));
        if (head.len > (session->known ? AE_CONTROL_FRAME_MAX : HELLO_MAX))
                return ae_fail(AE_EPROTO, "it sends a frame of %u bytes", head.len);
        return (int64_t)(sizeof(head) + head.len);
}

/* 1: a frame was handled, 0: no more bytes now, negative: the session ends. */
static int read_frame(struct session *session)
{
        int64_t want = frame_len(session);
        struct ae_control_frame head;
        ssize_t n;
        int r;

        if (want < 0)
                return (int)want;
        r = reserve(session, (size_t)want);
        if (r < 0)
                return r;
        if (session->in_len < (size_t)want) {
                n = read_some(session, session->in + session->in_len,
                              (size_t)want - session->in_len);
                if (n == 0)
                        return ae_fail(AE_ECLOSED, "the process closed its socket");
                if (n < 0)
                        return errno == EAGAIN || errno == EINTR
                                       ? 0
                                       : ae_fail_sys(errno, "its socket broke");
                session->in_len += (size_t)n;
                return 1;
        }
        memcpy(&head, session->in, sizeof(head));
        session->in_len = 0;
        r = on_frame(session, &head, session->in + sizeof(head));
        return r < 0 ? r : 1;
}

static void on_ready(uv_poll_t *poll, int status, int events)
{
        struct session *session = poll->data;
        char why[256];
        int r = 1;

        if (status < 0)
                session->broken = true;
        if (events & UV_WRITABLE)
                flush_out(session);
        while (!session->broken && !session->closing && r > 0)
                r = read_frame(session);
        if (session->closing || (r >= 0 && !session->broken))
                return;
        (void)snprintf(why, sizeof(why), "%s",
                       session->broken ? "its socket broke" : ae_error_text());
        if (r == AE_EPROTO)
                ae_log_warn("pid %d broke the protocol: %s", session->peer.pid, why);
        end_session(session, why);
}

/* ---- rings ------------------------------------------------------------------------------ */

void ae_sessions_drain(struct ae_sessions *sessions)
{
        struct session *session;
        char why[256];

        ae_list_for_each_safe(session, &sessions->list, link) {
                if (!session->worker || ae_core_worker_ring(session->worker) == 0)
                        continue;
                (void)snprintf(why, sizeof(why), "it broke the protocol: %s", ae_error_text());
                ae_log_warn("pid %d: %s", session->peer.pid, why);
                end_session(session, why);
        }
}

static struct ae_local_page *page_of(const struct session *session)
{
        return (struct ae_local_page *)ae_core_worker_page(session->worker)->base;
}

static void set_sleeps(struct ae_sessions *sessions, uint32_t value)
{
        struct session *session;

        ae_list_for_each(session, &sessions->list, link) {
                if (session->worker)
                        atomic_store_explicit(&page_of(session)->daemon_sleeps, value,
                                              memory_order_seq_cst);
        }
}

bool ae_sessions_sleep(struct ae_sessions *sessions)
{
        struct session *session;

        set_sleeps(sessions, 1);
        /* pairs with the worker's fence between its sq_tail and its look at daemon_sleeps */
        atomic_thread_fence(memory_order_seq_cst);
        ae_list_for_each(session, &sessions->list, link) {
                const struct ae_local_page *page = session->worker ? page_of(session) : NULL;

                if (page && ae_core_worker_pending(session->worker))
                        return false;
        }
        return true;
}

void ae_sessions_awake(struct ae_sessions *sessions)
{
        set_sleeps(sessions, 0);
}

void ae_sessions_tick(struct ae_sessions *sessions, uint64_t now_ns)
{
        struct session *session;

        keep_spare(sessions);
        ae_list_for_each_safe(session, &sessions->list, link) {
                if (session->broken)
                        end_session(session, "its socket broke");
                else if ((!session->known || session->refused) &&
                         now_ns - session->since_ns > UNKNOWN_NS)
                        end_session(session, session->known ? "it was refused" : "it said nothing");
        }
}
