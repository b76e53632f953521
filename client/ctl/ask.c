/* SPDX-License-Identifier: Apache-2.0 */
/* Connects, sends one frame, reads one. All of it under one deadline. */
#include "client/ctl/ask.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/status.h"
#include "proto/wire/control.h"
#include "proto/wire/wire.h"

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

struct link {
        int fd;
        const char *socket;   /* borrowed, for messages */
        uint64_t deadline_ns;
};

static int wait_for(const struct link *link, short events)
{
        struct pollfd poll_fd = { .fd = link->fd, .events = events };
        int r;

        do {
                uint64_t now = ae_now_ns();
                uint64_t left_ns = now < link->deadline_ns ? link->deadline_ns - now : 0;

                /* Rounded up, so that the last wait doesn't spin. */
                r = poll(&poll_fd, 1, (int)((left_ns + AE_NS_PER_MS - 1) / AE_NS_PER_MS));
        } while (r < 0 && errno == EINTR);
        if (r < 0)
                return ae_fail_sys(errno, "cannot wait for the daemon at %s", link->socket);
        if (r == 0)
                return ae_fail(AE_ETIMEDOUT, "the daemon at %s did not answer in time",
                               link->socket);
        return 0;
}

static int send_all(const struct link *link, const void *data, size_t len)
{
        const char *at = data;
        ssize_t n;
        int r;

        while (len > 0) {
                n = send(link->fd, at, len, MSG_NOSIGNAL | MSG_DONTWAIT);
                if (n < 0 && errno != EAGAIN && errno != EINTR)
                        return ae_fail(AE_ELOST, "the daemon at %s hung up: %s", link->socket,
                                       strerror(errno));
                if (n < 0) {
                        r = wait_for(link, POLLOUT);
                        if (r < 0)
                                return r;
                        continue;
                }
                at += n;
                len -= (size_t)n;
        }
        return 0;
}

static int receive_all(const struct link *link, void *ret, size_t len)
{
        char *at = ret;
        ssize_t n;
        int r;

        while (len > 0) {
                r = wait_for(link, POLLIN);
                if (r < 0)
                        return r;
                n = recv(link->fd, at, len, MSG_DONTWAIT);
                if (n < 0 && (errno == EAGAIN || errno == EINTR))
                        continue;
                if (n <= 0)
                        return ae_fail(AE_ELOST, "the daemon at %s hung up without an answer%s%s",
                                       link->socket, n < 0 ? ": " : "",
                                       n < 0 ? strerror(errno) : "");
                at += n;
                len -= (size_t)n;
        }
        return 0;
}

static int explain_connect(int err, const char *path)
{
        struct stat st;

        if (stat(path, &st) == 0 && !S_ISSOCK(st.st_mode))
                return ae_fail(AE_ELOST, "%s is not a socket", path);
        if (err == EACCES || err == EPERM)
                return ae_fail(AE_EAUTH, "cannot reach the daemon at %s: %s", path, strerror(err));
        if (err == ENOENT || err == ENOTDIR)
                return ae_fail(AE_ELOST, "there is no socket %s", path);
        if (err == EPROTOTYPE) /* of another type, as that of the shm transport is */
                return ae_fail(AE_ELOST, "%s is not autoepd's socket for workers", path);
        if (err == ECONNREFUSED)
                return ae_fail(AE_ELOST, "no daemon listens at %s", path);
        return ae_fail(AE_ELOST, "cannot reach the daemon at %s: %s", path, strerror(err));
}

static int link_open(const char *socket_path, uint64_t timeout_ns, struct link *ret_link)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct sockaddr_un address = { .sun_family = AF_UNIX };

        if (strlen(socket_path) >= sizeof(address.sun_path))
                return ae_fail(AE_EINVAL, "the socket's path %s is longer than %zu bytes",
                               socket_path, sizeof(address.sun_path) - 1);
        memcpy(address.sun_path, socket_path, strlen(socket_path));
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0)
                return ae_fail_sys(errno, "cannot open a unix socket");
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
                return explain_connect(errno, socket_path);
        *ret_link = (struct link){ .fd = ae_steal_fd(&fd), .socket = socket_path,
                                   .deadline_ns = ae_now_ns() + timeout_ns };
        return 0;
}

static int send_question(const struct link *link, const struct ae_ctl_question *question)
{
        Autoep__CtlRequest request = AUTOEP__CTL_REQUEST__INIT;
        AE_CLEANUP(ae_cleanup_free) uint8_t *data = NULL;
        struct ae_control_frame frame = { .type = htole16(AE_CONTROL_CTL_REQUEST) };
        size_t len;

        request.version = AE_WIRE_VERSION;
        request.command = (char *)question->command; /* protobuf-c has no const; it only reads */
        request.job = (char *)question->job;
        request.tensor = (char *)question->tensor;
        request.unit = (char *)question->unit;
        len = ae_control_size(&request.base);
        assert(len < AE_CONTROL_FRAME_MAX);
        frame.len = htole32((uint32_t)len);
        data = malloc(sizeof(frame) + len);
        if (!data)
                return ae_fail(AE_ENOMEM, "no memory for a request of %zu bytes", len);
        memcpy(data, &frame, sizeof(frame));
        ae_control_pack(&request.base, data + sizeof(frame));
        return send_all(link, data, sizeof(frame) + len);
}

static int receive_answer(const struct link *link, uint16_t *ret_type,
                          ProtobufCMessage **ret_message)
{
        AE_CLEANUP(ae_cleanup_free) uint8_t *data = NULL;
        struct ae_control_frame frame;
        uint32_t len;
        int r;

        r = receive_all(link, &frame, sizeof(frame));
        if (r < 0)
                return r;
        len = le32toh(frame.len);
        *ret_type = le16toh(frame.type);
        if (len > AE_CONTROL_FRAME_MAX)
                return ae_fail(AE_EPROTO, "the daemon at %s announces an answer of %u bytes",
                               link->socket, len);
        if (*ret_type != AE_CONTROL_CTL_REPLY && *ret_type != AE_CONTROL_ERROR)
                return ae_fail(AE_EPROTO, "the daemon at %s answers with a message of type %u (%s)",
                               link->socket, *ret_type, ae_control_name(*ret_type));
        data = malloc(len ? len : 1);
        if (!data)
                return ae_fail(AE_ENOMEM, "no memory for an answer of %u bytes", len);
        r = receive_all(link, data, len);
        if (r < 0)
                return r;
        return ae_control_unpack(*ret_type, data, len, ret_message);
}

/* The daemon's own refusal, in its words. */
static int refused(int status, const char *text)
{
        if (status >= 0)
                status = AE_EPROTO;
        if (!text || !*text)
                text = ae_status_words(status);
        return ae_fail(status, "the daemon says: %s", text);
}

static int ask(const struct ae_ctl_question *question, bool *ret_heard, char **ret_text)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        AE_CLEANUP(ae_control_free_p) ProtobufCMessage *message = NULL;
        const Autoep__CtlReply *reply;
        struct link link = { .fd = -1 };
        uint16_t type;
        int r;

        r = link_open(question->socket, question->timeout_ns, &link);
        if (r < 0)
                return r;
        fd = link.fd;
        r = send_question(&link, question);
        if (r < 0)
                return r;
        r = receive_answer(&link, &type, &message);
        if (r < 0)
                return r;
        *ret_heard = true;
        if (type == AE_CONTROL_ERROR) {
                const Autoep__Error *error = (const Autoep__Error *)message;

                return refused(error->status, error->text);
        }
        reply = (const Autoep__CtlReply *)message;
        if (reply->status != 0)
                return refused(reply->status, reply->text);
        *ret_text = strdup(reply->text);
        return *ret_text ? 0 : ae_fail(AE_ENOMEM, "no memory for the daemon's answer");
}

enum ae_ctl_exit ae_ctl_ask(const struct ae_ctl_question *question, char **ret_text,
                            int *ret_status)
{
        bool heard = false;
        int r = ask(question, &heard, ret_text);

        *ret_status = r;
        if (r == 0)
                return AE_CTL_EXIT_OK;
        if (r == AE_EAUTH)
                return AE_CTL_EXIT_DENIED;
        if (!heard && (r == AE_ELOST || r == AE_ETIMEDOUT))
                return AE_CTL_EXIT_UNREACHABLE;
        return AE_CTL_EXIT_FAILED;
}
