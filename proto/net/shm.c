/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The shm transport, for daemons on one host: endpoint and the row of the registry. A unix socket
 * (SOCK_SEQPACKET) carries the handshake, descriptors, and by its hangup the peer's death. All
 * else goes through two regions of shared memory, one made by each side, mapped read-write by its
 * maker and read-only by the other (F_SEAL_FUTURE_WRITE), so that a peer can say wrong things but
 * can never change what we have written. shm-conn.c has the life of a connection, shm-ctl.c the
 * socket, shm-send.c and shm-recv.c the rings. Owner thread.
 *
 * Who copies. The receiver: a put is a slot in the sender's put ring that names the grant and where
 * the bytes are, and the receiver copies them, once, out of the sender's memfd, which it has mapped
 * read-only. The other way, the sender writing into the receiver's memory, costs the same one copy,
 * but then a revoke would depend on the peer: one that is stopped in the middle of its copy would
 * go on writing after any bounded wait, even after its connection was broken. With the receiver
 * copying in ae_net_poll(), on the thread that calls ae_net_revoke(), no byte can follow; bounds
 * are checked by the side whose memory is at stake; and daemons never map each other's state
 * writable. Puts out of private memory (no memfd) are copied by the sender into the stage of its
 * region, a piece at a time, and by the receiver out of it.
 *
 * Handshake: connector's hello; the acceptor's hello with its region and an eventfd, its bell; an
 * ATTACH with the connector's region and bell. Both sides run as one user (SO_PEERCRED).
 *
 * A region, native integers since both sides are on one machine:
 *
 *      0            4096              +128 KiB        +4 MiB           +8 MiB
 *      +------------+-----------------+---------------+----------------+
 *      | counters   | put ring        | msg ring      | stage          |
 *      +------------+-----------------+---------------+----------------+
 *
 *      counters, 64 bytes apart: msg_tail, put_tail (what I have produced), msg_head, put_head (how
 *      far I have got with yours), asleep (ring my bell). All but the last only grow.
 *
 *      put ring: 1,024 slots of 128 bytes
 *      0      4        8          40    48    56     64         72         80        88      128
 *      +------+--------+----------+-----+-----+------+----------+----------+---------+-------+
 *      | kind | mem_id | key (32) | off | len | note | part_off | part_len | src_off | zero  |
 *      +------+--------+----------+-----+-----+------+----------+----------+---------+-------+
 *
 *      msg ring: { u32 len; u32 zero; bytes }, padded to 8, wrapping anywhere
 *
 *      records on the socket: { u32 type; u32 id; u64 off; u64 len }: 1 ATTACH, 2 SHOW a range
 *      (with its memfd), 3 HIDE it
 *
 * Counters from a peer are checked against our own, and slots and messages are copied before they
 * are looked at; whatever doesn't fit breaks the connection. A producer publishes its counter and
 * then looks at `asleep`; a consumer sets `asleep` and then looks at the counters; both are
 * sequentially consistent, so one of the two sees the other.
 */
#include "proto/net/shm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

/* --- open and close --- */

/* Whether a socket file is left from a daemon that has died; then it's removed. */
static bool clear_stale(const struct sockaddr_un *addr, socklen_t len)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct stat st;

        fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0 || addr->sun_path[0] == '\0')
                return false;
        if (lstat(addr->sun_path, &st) < 0 || !S_ISSOCK(st.st_mode))
                return false;
        if (connect(fd, (const struct sockaddr *)addr, len) == 0 || errno != ECONNREFUSED)
                return false;
        return unlink(addr->sun_path) == 0;
}

static int listen_on(struct shm_net *net, const char *address)
{
        AE_CLEANUP(ae_cleanup_close) int fd = -1;
        struct sockaddr_un addr;
        socklen_t len;
        int r;

        r = ae_shm_addr_parse(address, &addr, &len);
        if (r < 0)
                return r;
        fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
                return ae_fail_sys(errno, "cannot make a socket to listen on %s", address);
        r = bind(fd, (struct sockaddr *)&addr, len);
        if (r < 0 && errno == EADDRINUSE && clear_stale(&addr, len))
                r = bind(fd, (struct sockaddr *)&addr, len);
        if (r < 0 && errno == EADDRINUSE)
                return ae_fail(AE_EEXIST, "cannot listen on %s: the address is in use", address);
        if (r < 0)
                return ae_fail_sys(errno, "cannot listen on %s", address);
        /* From here on the file is ours to remove. */
        snprintf(net->end.address, sizeof(net->end.address), "%s", address);
        if (address[0] != '@' && chmod(address, 0600) < 0)
                return ae_fail_sys(errno, "cannot make %s private", address);
        if (listen(fd, 512) < 0)
                return ae_fail_sys(errno, "cannot listen on %s", address);
        return ae_door_open(&net->end.door, ae_steal_fd(&fd));
}

static int greet(struct ae_door *door, struct ae_guest *guest, const struct ae_hello *hello)
{
        return ae_shm_conn_accept(ae_container_of(door, struct shm_net, end.door), guest, hello);
}

static void shm_close(struct ae_net *base)
{
        struct shm_net *net = ae_container_of(base, struct shm_net, end.base);

        ae_end_deinit(&net->end);
        if (net->end.address[0] && net->end.address[0] != '@')
                (void)unlink(net->end.address); /* a path that is gone already is fine */
        free(net);
}

/* --- memory --- */

/* A read-only descriptor of the memfd @fd that peers may have. */
static int share(int fd, uint64_t fd_off, uint64_t len, int *ret_fd)
{
        int seals = fcntl(fd, F_GET_SEALS);
        char path[64];
        struct stat st;
        int shared;

        if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &st) < 0 ||
            !ae_range_ok(fd_off, len, (uint64_t)st.st_size))
                return ae_fail(AE_EINVAL, "cannot map %llu bytes at %llu of descriptor %d: it is "
                               "not a memfd of that size that is sealed against shrinking",
                               (unsigned long long)len, (unsigned long long)fd_off, fd);
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        shared = open(path, O_RDONLY | O_CLOEXEC);
        if (shared < 0)
                return ae_fail_sys(errno, "cannot open descriptor %d again for reading", fd);
        *ret_fd = shared;
        return 0;
}

static int shm_map(struct ae_net *base, void *address, uint64_t len, int fd, uint64_t fd_off,
                   struct ae_net_mem **ret_mem)
{
        struct shm_net *net = ae_container_of(base, struct shm_net, end.base);
        AE_CLEANUP(ae_cleanup_close) int shared = -1;
        struct ae_net_mem *mem;
        int r;

        if (fd >= 0) {
                r = share(fd, fd_off, len, &shared);
                if (r < 0)
                        return r;
        }
        r = ae_net_mem_new(base, &net->end.mems, address, len, fd, fd_off, &mem);
        if (r < 0)
                return r;
        mem->share_fd = ae_steal_fd(&shared);
        mem->id = ++net->next_mem_id;
        *ret_mem = mem;
        return 0;
}

static void shm_unmap(struct ae_net_mem *mem)
{
        struct shm_net *net = ae_container_of(mem->net, struct shm_net, end.base);
        struct shm_conn *conn;

        ae_list_for_each(conn, &net->end.conns, common.link)
                ae_shm_hide(conn, mem);
        ae_net_mem_free(mem);
}

/* --- poll and arm --- */

static void set_asleep(struct shm_net *net, uint32_t asleep)
{
        struct shm_conn *conn;

        ae_list_for_each(conn, &net->end.conns, common.link)
                if (conn->common.state == AE_CONN_UP) /* pairs with ae_shm_ring_bell() */
                        atomic_store_explicit(&conn->mine->head.asleep, asleep,
                                              memory_order_seq_cst);
        net->asleep = asleep;
}

static void turn(struct ae_end *end)
{
        struct shm_conn *conn;

        ae_wait_round(&end->wait);
        ae_list_for_each_safe(conn, &end->conns, common.link) {
                if (conn->common.state != AE_CONN_UP)
                        continue;
                if (ae_shm_progress_send(conn) < 0 || ae_shm_progress_receive(conn) < 0)
                        continue; /* broken: DOWN is queued */
                ae_shm_ring_bell(conn);
        }
}

static int shm_poll(struct ae_net *base, struct ae_net_event *events, int n_max)
{
        struct shm_net *net = ae_container_of(base, struct shm_net, end.base);

        if (net->asleep)
                set_asleep(net, 0);
        return ae_end_poll(base, events, n_max);
}

static int shm_arm(struct ae_net *base)
{
        struct shm_net *net = ae_container_of(base, struct shm_net, end.base);
        struct shm_conn *conn;

        if (ae_end_arm(base) != 0)
                return 1;
        set_asleep(net, 1);
        ae_list_for_each(conn, &net->end.conns, common.link) {
                if (conn->common.state != AE_CONN_UP || !ae_shm_pending(conn))
                        continue;
                set_asleep(net, 0);
                net->end.wait.armed = false;
                return 1;
        }
        return 0;
}

/* --- the row --- */

static const struct ae_end_ops end_ops = {
        .net = &ae_net_shm,
        .hello_a = AE_HELLO_SHM,
        .hello_b = AE_HELLO_SHM,
        .admit = ae_shm_socket_check,
        .greet = greet,
        .round = turn,
        .shut = ae_shm_conn_shut,
        .revoked = ae_shm_revoked,
        .free = ae_shm_conn_free,
};

static int shm_open_net(const struct ae_net_options *options, struct ae_net **ret_net)
{
        struct shm_net *net = calloc(1, sizeof(*net));
        int r;

        if (!net)
                return ae_fail(AE_ENOMEM, "cannot open a shm endpoint: out of memory");
        r = ae_end_init(&net->end, &end_ops, options);
        if (r == 0 && options->listen)
                r = listen_on(net, options->listen);
        if (r < 0)
                shm_close(&net->end.base);
        else
                *ret_net = &net->end.base;
        return r;
}

const struct ae_net_ops ae_net_shm = {
        .name = "shm",
        .open = shm_open_net,
        .close = shm_close,
        .address = ae_end_address,
        .connect = ae_shm_connect,
        .conn_close = ae_conn_close,
        .map = shm_map,
        .unmap = shm_unmap,
        .grant = ae_conn_grant,
        .revoke = ae_conn_revoke,
        .msg = ae_shm_msg,
        .put = ae_shm_put,
        .poll = shm_poll,
        .arm = shm_arm,
        .stats = ae_end_stats,
};
