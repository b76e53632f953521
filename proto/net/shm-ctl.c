/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The unix socket of a shm connection: addresses, records with descriptors, and the ranges that
 * each side has shown to the other. Descriptors that nobody asked for are closed. Owner thread.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/shm.h"

#define FDS_MAX 2

int ae_shm_addr_parse(const char *address, struct sockaddr_un *ret_addr, uint32_t *ret_len)
{
        size_t n = strlen(address);
        bool abstract = address[0] == '@';

        if (n < 2 || n >= sizeof(ret_addr->sun_path) || (!abstract && address[0] != '/'))
                return ae_fail(AE_EINVAL, "%s is neither the full path of a socket nor @name, of "
                               "at most %zu bytes", address, sizeof(ret_addr->sun_path) - 1);
        memset(ret_addr, 0, sizeof(*ret_addr));
        ret_addr->sun_family = AF_UNIX;
        memcpy(ret_addr->sun_path, address, n);
        *ret_len = ae_u32(offsetof(struct sockaddr_un, sun_path) + n + !abstract);
        if (abstract)
                ret_addr->sun_path[0] = '\0';
        return 0;
}

/* --- records --- */

int ae_shm_send(int fd, const void *data, size_t len, const int *fds, uint32_t n_fds)
{
        struct iovec iov = { (void *)(uintptr_t)data, len };
        union {
                struct cmsghdr head;
                char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
        } control = { .bytes = { 0 } };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
        struct cmsghdr *head = &control.head;

        assert(n_fds <= FDS_MAX);
        if (n_fds) {
                msg.msg_control = control.bytes;
                msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
                head->cmsg_level = SOL_SOCKET;
                head->cmsg_type = SCM_RIGHTS;
                head->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
                memcpy(CMSG_DATA(head), fds, n_fds * sizeof(int));
        }
        while (sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
                if (errno == EINTR)
                        continue;
                return errno == EAGAIN || errno == ENOBUFS ? 1 : AE_ELOST;
        }
        return 0;
}

/* Moves what came with a record to @fds; more than asked for is closed. */
static uint32_t take_fds(struct msghdr *msg, int fds[FDS_MAX])
{
        uint32_t n = 0;

        for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
                size_t n_here;

                if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
                        continue;
                n_here = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
                for (size_t i = 0; i < n_here; i++) {
                        int fd;

                        memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
                        if (n < FDS_MAX)
                                fds[n++] = fd;
                        else
                                (void)close(fd); /* not asked for */
                }
        }
        return n;
}

ssize_t ae_shm_receive(int fd, void *data, size_t len, int ret_fds[2], uint32_t *ret_n_fds)
{
        struct iovec iov = { data, len };
        union {
                struct cmsghdr head;
                char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
        } control;
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                              .msg_controllen = sizeof(control.bytes) };
        ssize_t n;

        *ret_n_fds = 0;
        do
                n = recvmsg(fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        while (n < 0 && errno == EINTR);
        if (n < 0)
                return errno == ECONNRESET ? 0 : n; /* the peer went with records unread */
        *ret_n_fds = take_fds(&msg, ret_fds);
        if (!(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
                return n;
        for (uint32_t i = 0; i < *ret_n_fds; i++)
                (void)close(ret_fds[i]); /* a record that was cut isn't used */
        *ret_n_fds = 0;
        errno = EBADMSG;
        return -1;
}

/* --- ranges that the peer has shown --- */

const struct shm_seen *ae_shm_find_seen(const struct shm_conn *conn, uint32_t id)
{
        for (uint32_t i = 0; i < conn->n_seen; i++)
                if (conn->seen[i].id == id)
                        return &conn->seen[i];
        return NULL;
}

void ae_shm_forget_seen(struct shm_conn *conn)
{
        for (uint32_t i = 0; i < conn->n_seen; i++)
                (void)munmap((void *)(uintptr_t)conn->seen[i].base, conn->seen[i].map_len);
        conn->n_seen = 0;
}

static int grow_seen(struct shm_conn *conn)
{
        uint32_t cap = conn->seen_cap ? conn->seen_cap * 2 : 8;
        struct shm_seen *seen;

        if (conn->n_seen < conn->seen_cap)
                return 0;
        if (conn->n_seen == SHM_MEMS_MAX)
                return ae_fail(AE_EPROTO, "it shows more than %d ranges", SHM_MEMS_MAX);
        seen = realloc(conn->seen, cap * sizeof(*seen));
        if (!seen)
                return ae_fail(AE_ENOMEM, "no memory for a table of %u ranges", cap);
        conn->seen = seen;
        conn->seen_cap = cap;
        return 0;
}

static int see(struct shm_conn *conn, const struct shm_ctl *record, int fd)
{
        struct shm_seen seen = { .id = record->id, .len = record->len };
        int seals = fcntl(fd, F_GET_SEALS), r;
        uint64_t page, begin;
        struct stat st;
        void *base;

        if (ae_shm_find_seen(conn, record->id))
                return ae_fail(AE_EPROTO, "it shows range %u twice", record->id);
        if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &st) < 0 || record->len == 0 ||
            !ae_range_ok(record->off, record->len, (uint64_t)st.st_size))
                return ae_fail(AE_EPROTO, "range %u is not inside a memfd that is sealed against "
                               "shrinking", record->id);
        r = grow_seen(conn);
        if (r < 0)
                return r;
        page = AE_MAX(UINT64_C(4096), (uint64_t)st.st_blksize); /* of huge pages: their size */
        begin = record->off / page * page;
        seen.skip = record->off - begin;
        seen.map_len = ae_div_up(seen.skip + record->len, page) * page;
        base = mmap(NULL, seen.map_len, PROT_READ, MAP_SHARED, fd, (off_t)begin);
        if (base == MAP_FAILED)
                return ae_fail_sys(errno, "cannot map %zu bytes of its memory", seen.map_len);
        seen.base = base;
        conn->seen[conn->n_seen++] = seen;
        return 0;
}

static int unsee(struct shm_conn *conn, uint32_t id)
{
        struct shm_seen *seen = (struct shm_seen *)(uintptr_t)ae_shm_find_seen(conn, id);

        if (!seen)
                return ae_fail(AE_EPROTO, "it hides range %u, which it never showed", id);
        if (conn->in.busy && conn->in.desc.kind == SHM_DIRECT && conn->in.desc.mem_id == id)
                return ae_fail(AE_EPROTO, "it hides range %u during a put out of it", id);
        (void)munmap((void *)(uintptr_t)seen->base, seen->map_len);
        *seen = conn->seen[--conn->n_seen];
        return 0;
}

static int take_record(struct shm_conn *conn, const struct shm_ctl *record, ssize_t n, int *fds,
                       uint32_t n_fds)
{
        if (n == (ssize_t)sizeof(*record) && record->type == SHM_CTL_SHOW && n_fds == 1)
                return see(conn, record, fds[0]);
        if (n == (ssize_t)sizeof(*record) && record->type == SHM_CTL_HIDE && n_fds == 0)
                return unsee(conn, record->id);
        return ae_fail(AE_EPROTO, "a malformed record (type %u, %zd bytes, %u descriptors)",
                       n >= 4 ? record->type : 0, n, n_fds);
}

int ae_shm_ctl_receive(struct shm_conn *conn)
{
        while ((conn->sock.ready & EPOLLIN) && !conn->hung_up) {
                struct shm_ctl record = { 0 };
                int fds[FDS_MAX], r;
                uint32_t n_fds;
                ssize_t n = ae_shm_receive(conn->sock.fd, &record, sizeof(record), fds, &n_fds);

                if (n < 0 && errno == EAGAIN) {
                        conn->sock.ready &= ~(uint32_t)EPOLLIN;
                        return 0;
                }
                if (n == 0) {
                        conn->hung_up = true;
                        conn->hung_up_tail = atomic_load_explicit(&conn->theirs->head.msg_tail,
                                                                  memory_order_acquire);
                        return 0;
                }
                r = n < 0 ? ae_fail(AE_EPROTO, "%s", strerror(errno))
                          : take_record(conn, &record, n, fds, n_fds);
                for (uint32_t i = 0; i < n_fds; i++)
                        (void)close(fds[i]); /* mappings keep what they need */
                if (r < 0) {
                        ae_conn_break(&conn->common, r, "%s", ae_error_text());
                        return r;
                }
        }
        return 0;
}

/* --- ranges that we have shown --- */

static int grow_shown(struct shm_conn *conn)
{
        uint32_t cap = conn->shown_cap ? conn->shown_cap * 2 : 8;
        struct shm_shown *shown;

        if (conn->n_shown < conn->shown_cap)
                return 0;
        if (conn->n_shown == SHM_MEMS_MAX)
                return AE_EOVERFLOW;
        shown = realloc(conn->shown, cap * sizeof(*shown));
        if (!shown)
                return AE_ENOMEM;
        conn->shown = shown;
        conn->shown_cap = cap;
        return 0;
}

/* 0; 1 when the socket is full; negative when the connection broke. */
static int send_record(struct shm_conn *conn, const struct shm_ctl *record, const int *fd)
{
        int r = ae_shm_send(conn->sock.fd, record, sizeof(*record), fd, fd ? 1 : 0);

        if (r == 1)
                conn->sock.ready &= ~(uint32_t)EPOLLOUT;
        if (r < 0 && (errno == EPIPE || errno == ECONNRESET)) {
                conn->sock.ready |= EPOLLIN; /* the read will say that it hung up */
                ae_wait_again(&shm_net_of(conn)->end.wait, &conn->sock);
                return 1;
        }
        if (r < 0)
                ae_conn_break(&conn->common, AE_ELOST, "%s", strerror(errno));
        return r;
}

int ae_shm_show(struct shm_conn *conn, const struct ae_net_mem *mem)
{
        struct shm_ctl record = { SHM_CTL_SHOW, mem->id, mem->fd_off, mem->len };
        int r;

        for (uint32_t i = 0; i < conn->n_shown; i++)
                if (conn->shown[i].id == mem->id)
                        return 0;
        if (grow_shown(conn) < 0)
                return 2;
        r = send_record(conn, &record, &mem->share_fd);
        if (r == 0)
                conn->shown[conn->n_shown++] = (struct shm_shown){ .id = mem->id };
        return r;
}

void ae_shm_hide(struct shm_conn *conn, const struct ae_net_mem *mem)
{
        for (uint32_t i = 0; i < conn->n_shown; i++) {
                if (conn->shown[i].id != mem->id)
                        continue;
                conn->shown[i].hide = true;
                conn->n_hide++;
                if (conn->common.state == AE_CONN_UP)
                        (void)ae_shm_hide_flush(conn); /* a broken connection says DOWN */
                return;
        }
}

int ae_shm_hide_flush(struct shm_conn *conn)
{
        uint32_t i = 0;

        while (conn->n_hide && i < conn->n_shown) {
                struct shm_ctl record = { SHM_CTL_HIDE, conn->shown[i].id, 0, 0 };
                int r;

                if (!conn->shown[i].hide) {
                        i++;
                        continue;
                }
                r = send_record(conn, &record, NULL);
                if (r != 0)
                        return r < 0 ? r : 0;
                conn->shown[i] = conn->shown[--conn->n_shown];
                conn->n_hide--;
        }
        return 0;
}
