/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of a shm connection: regions, hello, attach; conn.h has the rest. Owner thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/shm.h"

#define REGION_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)

int ae_shm_socket_check(int fd)
{
        struct ucred who;
        socklen_t len = sizeof(who);

        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len) < 0)
                return ae_fail_sys(errno, "cannot see who is at the other end of a socket");
        if (who.uid != geteuid())
                return ae_fail(AE_EAUTH, "the peer runs as user %u, this daemon as user %u",
                               who.uid, geteuid());
        return 0;
}

/* --- regions --- */

static int make_region(struct shm_conn *conn)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        void *base;

        fd = memfd_create("autoep-shm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0 || fchmod(fd, 0400) < 0 || ftruncate(fd, sizeof(struct shm_region)) < 0)
                return ae_fail_sys(errno, "cannot make a region of %zu bytes",
                                   sizeof(struct shm_region));
        base = mmap(NULL, sizeof(struct shm_region), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED)
                return ae_fail_sys(errno, "cannot map a region of %zu bytes",
                                   sizeof(struct shm_region));
        conn->mine = base;
        (void)madvise(base, sizeof(struct shm_region), MADV_DONTDUMP); /* only makes dumps small */
        if (fcntl(fd, F_ADD_SEALS, REGION_SEALS) < 0)
                return ae_fail_sys(errno, "cannot seal a region");
        conn->region_fd = ae_steal_fd(&fd);
        return 0;
}

/* Maps the peer's region and takes over its bell; on failure the descriptors stay the caller's. */
static int attach(struct shm_conn *conn, int fds[2], uint32_t n_fds)
{
        struct stat st;
        void *base;
        int seals;

        if (n_fds != 2)
                return ae_fail(AE_EPROTO, "it sent %u descriptors, not its region and its bell",
                               n_fds);
        seals = fcntl(fds[0], F_GET_SEALS);
        if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fds[0], &st) < 0 ||
            st.st_size != (off_t)sizeof(struct shm_region))
                return ae_fail(AE_EPROTO, "its region is not a sealed memfd of %zu bytes",
                               sizeof(struct shm_region));
        base = mmap(NULL, sizeof(struct shm_region), PROT_READ, MAP_SHARED, fds[0], 0);
        if (base == MAP_FAILED)
                return ae_fail_sys(errno, "cannot map its region");
        conn->theirs = base;
        if (fcntl(fds[1], F_SETFL, O_NONBLOCK) < 0)
                return ae_fail_sys(errno, "cannot use its bell");
        conn->peer_bell = fds[1];
        (void)close(fds[0]); /* the mapping keeps it */
        return 0;
}

static void close_both(const int fds[2], uint32_t n_fds)
{
        for (uint32_t i = 0; i < n_fds; i++)
                (void)close(fds[i]); /* nobody will use them */
}

/* --- making and unmaking --- */

static void on_sock(struct ae_source *source);

static void on_bell(struct ae_source *source)
{
        uint64_t n;

        source->ready = 0;
        /* The poll that runs this looks at the rings anyway. */
        (void)!read(source->fd, &n, sizeof(n));
}

void ae_shm_conn_free(struct ae_conn *common)
{
        struct shm_conn *conn = ae_container_of(common, struct shm_conn, common);

        if (conn->mine)
                (void)munmap(conn->mine, sizeof(*conn->mine));
        if (conn->theirs)
                (void)munmap((void *)(uintptr_t)conn->theirs, sizeof(*conn->theirs));
        ae_cleanup_close(&conn->region_fd);
        ae_cleanup_close(&conn->peer_bell);
        free(conn->puts);
        free(conn->sent);
        free(conn->shown);
        free(conn->seen);
        free(conn->rx);
        ae_conn_deinit(common);
        free(conn);
}

static int fill(struct shm_conn *conn)
{
        int bell, r;

        r = make_region(conn);
        if (r < 0)
                return r;
        bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (bell < 0)
                return ae_fail_sys(errno, "cannot make a bell");
        r = ae_wait_add(&shm_net_of(conn)->end.wait, &conn->bell, bell);
        if (r < 0)
                return r;
        conn->puts = calloc(SHM_PUTS, sizeof(*conn->puts));
        conn->sent = calloc(SHM_DESCS, sizeof(*conn->sent));
        conn->rx = malloc(SHM_RX_CAP);
        if (!conn->puts || !conn->sent || !conn->rx)
                return ae_fail(AE_ENOMEM, "cannot make a connection: no memory for its buffers");
        return 0;
}

static int conn_new(struct shm_net *net, struct shm_conn **ret_conn)
{
        struct shm_conn *conn;
        int r;

        conn = calloc(1, sizeof(*conn));
        if (!conn)
                return ae_fail(AE_ENOMEM, "cannot make a connection: out of memory");
        r = ae_conn_init(&conn->common, &net->end);
        if (r < 0) {
                free(conn);
                return r;
        }
        conn->region_fd = conn->peer_bell = -1;
        ae_source_init(&conn->sock, on_sock);
        ae_source_init(&conn->bell, on_bell);
        r = fill(conn);
        if (r < 0) {
                ae_wait_remove(&net->end.wait, &conn->bell);
                ae_shm_conn_free(&conn->common);
                return r;
        }
        *ret_conn = conn;
        return 0;
}

void ae_shm_conn_shut(struct ae_conn *common)
{
        struct shm_conn *conn = ae_container_of(common, struct shm_conn, common);

        ae_wait_remove(&ae_conn_end(common)->wait, &conn->sock);
        ae_wait_remove(&ae_conn_end(common)->wait, &conn->bell);
        ae_shm_fail_puts(conn);
        ae_shm_forget_seen(conn);
        conn->n_shown = conn->n_hide = 0;
}

/* --- the connector's side --- */

/* Connecting a unix socket is done at once or not at all. */
static int dial(struct shm_conn *conn)
{
        struct ae_hello hello = { .kind = AE_HELLO_SHM, .who = shm_net_of(conn)->end.options.self };
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        uint8_t frame[AE_HELLO_SIZE];
        struct sockaddr_un addr;
        socklen_t len;
        int r;

        r = ae_shm_addr_parse(conn->common.address, &addr, &len);
        if (r < 0)
                return r;
        fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return ae_fail_sys(errno, "cannot make a socket to reach %s", conn->common.address);
        if (connect(fd, (struct sockaddr *)&addr, len) < 0)
                return ae_fail(AE_ELOST, "%s", errno == EAGAIN ? "too many wait at its door"
                                                               : strerror(errno));
        r = ae_shm_socket_check(fd);
        if (r < 0)
                return r;
        ae_hello_encode(&hello, frame);
        if (ae_shm_send(fd, frame, sizeof(frame), NULL, 0) != 0)
                return ae_fail(AE_ELOST, "cannot say hello: %s", strerror(errno));
        return ae_wait_add(&shm_net_of(conn)->end.wait, &conn->sock, ae_steal_fd(&fd));
}

int ae_shm_connect(struct ae_net *base, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn)
{
        struct shm_net *net = ae_container_of(base, struct shm_net, end.base);
        struct sockaddr_un addr;
        struct shm_conn *conn;
        socklen_t len;
        int r;

        r = ae_shm_addr_parse(address, &addr, &len);
        if (r < 0)
                return r;
        r = conn_new(net, &conn);
        if (r < 0)
                return r;
        ae_conn_set_dialled(&conn->common, node, address);
        r = dial(conn);
        if (r == 0)
                ae_conn_move(&conn->common, AE_CONN_GREETING);
        else
                ae_conn_break(&conn->common, r, "%s", ae_error_text());
        *ret_conn = &conn->common.base;
        return 0;
}

/* Sends @data with our region and bell, and forgets the region's descriptor. */
static int send_region(struct shm_conn *conn, const void *data, size_t len)
{
        int fds[2] = { conn->region_fd, conn->bell.fd };

        if (ae_shm_send(conn->sock.fd, data, len, fds, 2) != 0)
                return ae_fail(AE_ELOST, "cannot send the region: %s", strerror(errno));
        ae_cleanup_close(&conn->region_fd);
        conn->region_fd = -1;
        return 0;
}

static int finish_greeting(struct shm_conn *conn, const uint8_t *frame, ssize_t n, int fds[2],
                           uint32_t n_fds)
{
        struct shm_ctl record = { .type = SHM_CTL_ATTACH };
        struct ae_hello hello;
        int r = 0;

        if (n != AE_HELLO_SIZE)
                r = ae_fail(AE_EPROTO, "its hello has %zd bytes, not %d", n, AE_HELLO_SIZE);
        if (r == 0)
                r = ae_conn_take_hello(&conn->common, frame, AE_HELLO_SHM, &hello);
        if (r == 0)
                r = attach(conn, fds, n_fds);
        if (r < 0) {
                close_both(fds, n_fds);
                return r;
        }
        ae_conn_move(&conn->common, AE_CONN_JOINING);
        return send_region(conn, &record, sizeof(record));
}

/* --- the acceptor's side --- */

int ae_shm_conn_accept(struct shm_net *net, struct ae_guest *guest, const struct ae_hello *hello)
{
        struct ae_hello answer = { .kind = AE_HELLO_SHM, .who = net->end.options.self };
        uint8_t frame[AE_HELLO_SIZE];
        struct shm_conn *conn;
        int r;

        r = conn_new(net, &conn);
        if (r < 0)
                return r;
        ae_conn_set_accepted(&conn->common, &hello->who);
        ae_wait_move(&net->end.wait, &guest->source, &conn->sock);
        ae_hello_encode(&answer, frame);
        if (send_region(conn, frame, sizeof(frame)) < 0)
                ae_conn_break(&conn->common, AE_ELOST, "%s", ae_error_text());
        return 0;
}

static int finish_attaching(struct shm_conn *conn, const struct shm_ctl *record, ssize_t n,
                            int fds[2], uint32_t n_fds)
{
        int r = 0;

        if (n != (ssize_t)sizeof(*record) || record->type != SHM_CTL_ATTACH)
                r = ae_fail(AE_EPROTO, "a malformed record of %zd bytes instead of its region", n);
        if (r == 0)
                r = attach(conn, fds, n_fds);
        if (r < 0)
                close_both(fds, n_fds);
        return r;
}

/* --- both --- */

static void handshake(struct shm_conn *conn)
{
        uint8_t frame[AE_HELLO_SIZE + 1];
        struct shm_ctl record = { 0 };
        uint32_t n_fds;
        int fds[2], r;
        ssize_t n = ae_shm_receive(conn->sock.fd, frame, sizeof(frame), fds, &n_fds);

        if (n < 0 && errno == EAGAIN)
                return;
        if (n <= 0) {
                ae_conn_break(&conn->common, n < 0 ? AE_EPROTO : AE_ELOST, "%s",
                             n < 0 ? strerror(errno) : "it hung up during the handshake");
                return;
        }
        memcpy(&record, frame, AE_MIN((size_t)n, sizeof(record)));
        r = conn->common.accepted ? finish_attaching(conn, &record, n, fds, n_fds)
                           : finish_greeting(conn, frame, n, fds, n_fds);
        if (r < 0)
                ae_conn_break(&conn->common, r, "%s", ae_error_text());
        else
                ae_conn_go_up(&conn->common);
}

static void on_sock(struct ae_source *source)
{
        struct shm_conn *conn = ae_container_of(source, struct shm_conn, sock);

        if (conn->common.state < AE_CONN_UP)
                handshake(conn);
        if (conn->common.state == AE_CONN_UP)
                (void)ae_shm_ctl_receive(conn); /* a failure has broken the connection */
}
