/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of a shm connection: regions, hello, attach, up, down. The legal moves between its
 * states are one table. Owner thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
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

#define BIT(state) (1u << (state))
#define EVENTS_PER_CONN 3 /* UP, DOWN or REFUSED, and one WRITABLE */
#define REGION_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)

static const uint32_t legal_moves[] = {
        [SHM_GREETING] = BIT(SHM_ATTACHING) | BIT(SHM_UP) | BIT(SHM_DOWN) | BIT(SHM_CLOSED),
        [SHM_ATTACHING] = BIT(SHM_UP) | BIT(SHM_DOWN) | BIT(SHM_CLOSED),
        [SHM_UP] = BIT(SHM_DOWN) | BIT(SHM_CLOSED),
        [SHM_DOWN] = BIT(SHM_CLOSED),
        [SHM_CLOSED] = 0,
};

static void shm_move(struct shm_conn *conn, enum shm_state to)
{
        assert(legal_moves[conn->state] & BIT(to));
        conn->state = to;
}

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

static void on_late(struct ae_deadline *deadline)
{
        struct shm_conn *conn = ae_container_of(deadline, struct shm_conn, deadline);

        ae_shm_break(conn, AE_ETIMEDOUT, "the handshake was not done within its deadline");
}

void ae_shm_conn_free(struct shm_conn *conn)
{
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
        ae_net_grants_deinit(&conn->grants);
        ae_evq_release(&shm_net_of(conn)->events, EVENTS_PER_CONN);
        ae_list_unlink(&conn->link);
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
        r = ae_wait_add(&shm_net_of(conn)->wait, &conn->bell, bell);
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
        uint64_t id;
        int r;

        r = ae_net_random(&id);
        if (r == 0)
                r = ae_evq_reserve(&net->events, EVENTS_PER_CONN);
        if (r < 0)
                return r;
        conn = calloc(1, sizeof(*conn));
        if (!conn) {
                ae_evq_release(&net->events, EVENTS_PER_CONN);
                return ae_fail(AE_ENOMEM, "cannot make a connection: out of memory");
        }
        conn->base.net = &net->base;
        conn->state = SHM_GREETING;
        conn->region_fd = conn->peer_bell = -1;
        conn->deadline.fire = on_late;
        ae_list_init(&conn->deadline.link);
        ae_net_grants_init(&conn->grants, id);
        ae_source_init(&conn->sock, on_sock);
        ae_source_init(&conn->bell, on_bell);
        ae_list_push(&net->conns, &conn->link);
        r = fill(conn);
        if (r < 0) {
                ae_wait_remove(&net->wait, &conn->bell);
                ae_shm_conn_free(conn);
                return r;
        }
        ae_wait_deadline(&net->wait, &conn->deadline);
        *ret_conn = conn;
        return 0;
}

/* Lets go of everything but the memory; the PUT_DONEs are queued. */
static void shut(struct shm_conn *conn)
{
        struct shm_net *net = shm_net_of(conn);

        ae_list_unlink(&conn->deadline.link);
        ae_wait_remove(&net->wait, &conn->sock);
        ae_wait_remove(&net->wait, &conn->bell);
        ae_shm_fail_puts(conn);
        ae_shm_forget_seen(conn);
        conn->n_shown = conn->n_hide = 0;
        ae_net_grants_drop_all(&conn->grants);
        ae_door_retry(&net->door);
}

void ae_shm_break(struct shm_conn *conn, int status, const char *format, ...)
{
        struct shm_net *net = shm_net_of(conn);
        struct ae_net_event event = { .kind = AE_NET_EV_DOWN, .status = status,
                                      .conn = &conn->base, .text = conn->text };
        bool refused = conn->accepted && conn->state != SHM_UP;
        va_list args;
        int n;

        if (conn->state >= SHM_DOWN)
                return;
        n = snprintf(conn->text, sizeof(conn->text), "connection %s node %u%s%s%s: ",
                     conn->accepted ? "from" : "to", conn->base.node,
                     conn->accepted ? "" : " at ", conn->address,
                     conn->state == SHM_UP ? " broke" : " failed");
        va_start(args, format);
        vsnprintf(conn->text + n, sizeof(conn->text) - (size_t)n, format, args);
        va_end(args);
        shut(conn);
        shm_move(conn, SHM_DOWN);
        if (refused) {
                event.kind = AE_NET_EV_REFUSED;
                event.conn = NULL;
                net->stats.refused++;
                shm_move(conn, SHM_CLOSED); /* the caller never saw it */
                ae_list_unlink(&conn->link);
                ae_list_push(&net->dead, &conn->link);
        }
        ae_evq_push(&net->events, &event, 0);
}

void ae_shm_conn_close(struct ae_net_conn *base)
{
        struct shm_conn *conn = shm_conn_of(base);
        struct shm_net *net = shm_net_of(conn);

        assert(conn->state != SHM_CLOSED);
        ae_evq_drop_conn(&net->events, base);
        if (conn->state != SHM_DOWN)
                shut(conn);
        shm_move(conn, SHM_CLOSED);
        ae_list_unlink(&conn->link);
        ae_list_push(&net->dead, &conn->link);
}

static void go_up(struct shm_conn *conn)
{
        shm_move(conn, SHM_UP);
        ae_list_unlink(&conn->deadline.link);
        ae_evq_push(&shm_net_of(conn)->events,
                    &(struct ae_net_event){ .kind = AE_NET_EV_UP, .conn = &conn->base,
                                            .hello = conn->peer }, 0);
}

/* --- the connector's side --- */

/* Connecting a unix socket is done at once or not at all. */
static int dial(struct shm_conn *conn)
{
        struct ae_hello hello = { .kind = AE_HELLO_SHM, .who = shm_net_of(conn)->options.self };
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        uint8_t frame[AE_HELLO_SIZE];
        struct sockaddr_un addr;
        socklen_t len;
        int r;

        r = ae_shm_addr_parse(conn->address, &addr, &len);
        if (r < 0)
                return r;
        fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return ae_fail_sys(errno, "cannot make a socket to reach %s", conn->address);
        if (connect(fd, (struct sockaddr *)&addr, len) < 0)
                return ae_fail(AE_ELOST, "%s", errno == EAGAIN ? "too many wait at its door"
                                                               : strerror(errno));
        r = ae_shm_socket_check(fd);
        if (r < 0)
                return r;
        ae_hello_encode(&hello, frame);
        if (ae_shm_send(fd, frame, sizeof(frame), NULL, 0) != 0)
                return ae_fail(AE_ELOST, "cannot say hello: %s", strerror(errno));
        return ae_wait_add(&shm_net_of(conn)->wait, &conn->sock, ae_steal_fd(&fd));
}

int ae_shm_connect(struct ae_net *base, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn)
{
        struct shm_net *net = ae_container_of(base, struct shm_net, base);
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
        conn->base.node = node;
        snprintf(conn->address, sizeof(conn->address), "%s", address);
        r = dial(conn);
        if (r < 0)
                ae_shm_break(conn, r, "%s", ae_error_text());
        *ret_conn = &conn->base;
        return 0;
}

static int check_hello(struct shm_conn *conn, const uint8_t *frame, ssize_t n,
                       struct ae_hello *ret_hello)
{
        int r;

        if (n != AE_HELLO_SIZE)
                return ae_fail(AE_EPROTO, "its hello has %zd bytes, not %d", n, AE_HELLO_SIZE);
        r = ae_hello_decode(frame, AE_HELLO_SHM, AE_HELLO_SHM, ret_hello);
        if (r == 0)
                r = ae_hello_compare(&shm_net_of(conn)->options.self, &ret_hello->who);
        if (r == 0)
                r = ae_hello_expect(conn->base.node, &ret_hello->who);
        return r;
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
        int r;

        r = check_hello(conn, frame, n, &hello);
        if (r == 0)
                r = attach(conn, fds, n_fds);
        if (r < 0) {
                close_both(fds, n_fds);
                return r;
        }
        conn->peer = hello.who;
        return send_region(conn, &record, sizeof(record));
}

/* --- the acceptor's side --- */

int ae_shm_conn_accept(struct shm_net *net, struct ae_guest *guest, const struct ae_hello *hello)
{
        struct ae_hello answer = { .kind = AE_HELLO_SHM, .who = net->options.self };
        uint8_t frame[AE_HELLO_SIZE];
        struct shm_conn *conn;
        int r;

        r = conn_new(net, &conn);
        if (r < 0)
                return r;
        conn->accepted = true;
        conn->base.node = hello->who.node;
        conn->peer = hello->who;
        shm_move(conn, SHM_ATTACHING);
        ae_wait_move(&net->wait, &guest->source, &conn->sock);
        ae_hello_encode(&answer, frame);
        if (send_region(conn, frame, sizeof(frame)) < 0)
                ae_shm_break(conn, AE_ELOST, "%s", ae_error_text());
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
                ae_shm_break(conn, n < 0 ? AE_EPROTO : AE_ELOST, "%s",
                             n < 0 ? strerror(errno) : "it hung up during the handshake");
                return;
        }
        memcpy(&record, frame, AE_MIN((size_t)n, sizeof(record)));
        r = conn->accepted ? finish_attaching(conn, &record, n, fds, n_fds)
                           : finish_greeting(conn, frame, n, fds, n_fds);
        if (r < 0)
                ae_shm_break(conn, r, "%s", ae_error_text());
        else
                go_up(conn);
}

static void on_sock(struct ae_source *source)
{
        struct shm_conn *conn = ae_container_of(source, struct shm_conn, sock);

        if (source->ready & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                source->ready |= EPOLLIN; /* a read says what happened */
        if (conn->state == SHM_GREETING || conn->state == SHM_ATTACHING)
                handshake(conn);
        if (conn->state == SHM_UP)
                (void)ae_shm_ctl_receive(conn); /* a failure has broken the connection */
}
