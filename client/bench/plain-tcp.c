/* SPDX-License-Identifier: Apache-2.0 */
/* Two children and the sockets between them; the one that connects returns the time by a pipe. */
#include "client/bench/plain-tcp.h"

#include "client/bench/measure.h"

#include "proto/base/cleanup.h"
#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "proto/base/status.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define STALL_MS 20000
#define OWN_SLICE (UINT64_C(256) << 10)
#define N_FDS (AE_BENCH_TCP_STREAMS_MAX + 1)
#define CTL AE_BENCH_TCP_STREAMS_MAX

/* One of the two processes. */
struct side {
        const struct ae_bench_tcp *tcp;
        bool asks, serves;
        struct pollfd fds[N_FDS]; /* the streams, then the control connection */
        char *from, *to;
        char *own_from, *own_to; /* own_len bytes, as many times as from and to */
};

/* One transfer. */
struct turn {
        char *from, *to;
        char *own_from, *own_to;
        uint64_t tx_left[AE_BENCH_TCP_STREAMS_MAX], rx_left[AE_BENCH_TCP_STREAMS_MAX];
        uint64_t tx_all, rx_all, own_left;
        bool asked; /* by the other side */
};

static uint64_t part_off(const struct ae_bench_tcp *tcp, uint32_t stream)
{
        return tcp->len / tcp->streams * stream;
}

static uint64_t part_len(const struct ae_bench_tcp *tcp, uint32_t stream)
{
        uint64_t end = stream + 1 == tcp->streams ? tcp->len : part_off(tcp, stream + 1);

        return end - part_off(tcp, stream);
}

static void turn_init(const struct side *side, uint32_t index, struct turn *turn)
{
        const struct ae_bench_tcp *tcp = side->tcp;

        *turn = (struct turn){ .from = side->from + index % tcp->n_from * tcp->len,
                               .to = side->to + index % tcp->n_to * tcp->len,
                               .own_from = side->own_from + index % tcp->n_from * tcp->own_len,
                               .own_to = side->own_to + index % tcp->n_to * tcp->own_len,
                               .own_left = side->asks ? tcp->own_len : 0 };
        for (uint32_t i = 0; i < tcp->streams; i++) {
                turn->tx_left[i] = side->serves ? part_len(tcp, i) : 0;
                turn->rx_left[i] = side->asks ? part_len(tcp, i) : 0;
                turn->tx_all += turn->tx_left[i];
                turn->rx_all += turn->rx_left[i];
        }
}

/* What a non-blocking call moved; 0 when it would block, negative when the other side is gone. */
static ssize_t moved(ssize_t n)
{
        if (n > 0)
                return n;
        return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

static int move_stream(struct side *side, struct turn *turn, uint32_t i)
{
        uint64_t end = part_off(side->tcp, i) + part_len(side->tcp, i);
        ssize_t n;

        if (turn->rx_left[i] && side->fds[i].revents & (POLLIN | POLLHUP | POLLERR)) {
                n = moved(recv(side->fds[i].fd, turn->to + end - turn->rx_left[i],
                               turn->rx_left[i], 0));
                if (n < 0)
                        return -1;
                turn->rx_left[i] -= (uint64_t)n;
                turn->rx_all -= (uint64_t)n;
        }
        if (turn->asked && turn->tx_left[i] && side->fds[i].revents & (POLLOUT | POLLERR)) {
                n = moved(send(side->fds[i].fd, turn->from + end - turn->tx_left[i],
                               turn->tx_left[i], MSG_NOSIGNAL));
                if (n < 0)
                        return -1;
                turn->tx_left[i] -= (uint64_t)n;
                turn->tx_all -= (uint64_t)n;
        }
        return 0;
}

static int look(struct side *side, const struct turn *turn)
{
        for (uint32_t i = 0; i < side->tcp->streams; i++)
                side->fds[i].events = (short)((turn->rx_left[i] ? POLLIN : 0) |
                                              (turn->asked && turn->tx_left[i] ? POLLOUT : 0));
        side->fds[CTL].events = turn->asked || !side->serves ? 0 : POLLIN;
        if (turn->own_left) /* the copy is what it does while nothing has come */
                return poll(side->fds, N_FDS, 0) >= 0 ? 0 : -1;
        return poll(side->fds, N_FDS, STALL_MS) > 0 ? 0 : -1;
}

/* A slice of what it has itself, where the last look found nothing to read. */
static void copy_own(const struct side *side, struct turn *turn)
{
        const uint64_t at = side->tcp->own_len - turn->own_left;
        const uint64_t n = AE_MIN(turn->own_left, OWN_SLICE);

        for (uint32_t i = 0; i < side->tcp->streams; i++) {
                if (turn->rx_left[i] && side->fds[i].revents)
                        return;
        }
        memcpy(turn->own_to + at, turn->own_from + at, n);
        turn->own_left -= n;
}

/* Asks, serves, and returns when all is done; the time that its own bytes took. */
static int take_turn(struct side *side, struct turn *turn, uint64_t *ret_ns)
{
        uint64_t start_ns = ae_now_ns();
        bool in = turn->rx_all == 0 && turn->own_left == 0;
        char word = 0;

        if (side->asks && send(side->fds[CTL].fd, &word, 1, MSG_NOSIGNAL) != 1)
                return -1;
        while (turn->rx_all || turn->tx_all || turn->own_left) {
                if (look(side, turn) < 0)
                        return -1;
                if (!turn->asked && side->fds[CTL].revents) {
                        if (recv(side->fds[CTL].fd, &word, 1, 0) != 1)
                                return -1;
                        turn->asked = true;
                }
                for (uint32_t i = 0; i < side->tcp->streams; i++) {
                        if (move_stream(side, turn, i) < 0)
                                return -1;
                }
                copy_own(side, turn);
                if (!in && turn->rx_all == 0 && turn->own_left == 0) {
                        *ret_ns = ae_now_ns() - start_ns;
                        in = true;
                }
        }
        return 0;
}

static int play(struct side *side, uint64_t *ret_best_ns)
{
        struct turn turn;
        uint64_t ns = UINT64_MAX;

        *ret_best_ns = UINT64_MAX;
        side->from = ae_bench_memory_new(side->tcp->len * side->tcp->n_from);
        side->to = ae_bench_memory_new(side->tcp->len * side->tcp->n_to);
        side->own_from = ae_bench_memory_new(AE_MAX(side->tcp->own_len, 1u) * side->tcp->n_from);
        side->own_to = ae_bench_memory_new(AE_MAX(side->tcp->own_len, 1u) * side->tcp->n_to);
        if (!side->from || !side->to || !side->own_from || !side->own_to)
                return -1;
        for (uint32_t i = 0; i <= side->tcp->repeats; i++) {
                turn_init(side, i, &turn);
                if (take_turn(side, &turn, &ns) < 0)
                        return -1;
                if (i > 0 || side->tcp->repeats == 0)
                        *ret_best_ns = AE_MIN(*ret_best_ns, ns);
        }
        return 0;
}

/* The connections in order: the streams, then control. */
static int join(struct side *side, int listener, const struct sockaddr_in *address)
{
        int one = 1;

        for (uint32_t i = 0; i < N_FDS; i++) {
                int fd;

                side->fds[i].fd = -1; /* poll passes over it */
                if (i != CTL && i >= side->tcp->streams)
                        continue;
                fd = address ? socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
                             : accept4(listener, NULL, NULL, SOCK_CLOEXEC);
                if (fd < 0 || (address && connect(fd, (const struct sockaddr *)address,
                                                  sizeof(*address)) < 0))
                        return -1;
                (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
                if (i != CTL && fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
                        return -1;
                side->fds[i].fd = fd;
        }
        return 0;
}

/* A child's life; it sees nothing of its parent's but these arguments. */
static void child_main(struct side *side, int listener, const struct sockaddr_in *address, int out)
{
        uint64_t best_ns;

        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (join(side, listener, address) < 0 || play(side, &best_ns) < 0)
                _exit(1);
        if (out >= 0 && write(out, &best_ns, sizeof(best_ns)) != sizeof(best_ns))
                _exit(1);
        _exit(0);
}

static int listen_here(int *ret_fd, struct sockaddr_in *ret_address)
{
        AE_CLEANUP(ae_cleanup_close) int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        socklen_t len = sizeof(*ret_address);

        *ret_address = (struct sockaddr_in){ .sin_family = AF_INET,
                                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
        if (fd < 0 || bind(fd, (struct sockaddr *)ret_address, len) < 0 ||
            getsockname(fd, (struct sockaddr *)ret_address, &len) < 0 || listen(fd, N_FDS) < 0)
                return ae_fail_sys(errno, "cannot listen on 127.0.0.1");
        *ret_fd = ae_steal_fd(&fd);
        return 0;
}

static bool ended_well(pid_t pid)
{
        int status = -1;

        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
                continue;
        return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int ae_bench_tcp_run(const struct ae_bench_tcp *tcp, uint64_t *ret_ns)
{
        AE_CLEANUP(ae_cleanup_close) int listener = -1;
        AE_CLEANUP(ae_cleanup_close) int in = -1;
        AE_CLEANUP(ae_cleanup_close) int out = -1;
        struct side server = { .tcp = tcp, .serves = true, .asks = tcp->both_ways };
        struct side client = { .tcp = tcp, .serves = tcp->both_ways, .asks = true };
        struct sockaddr_in address;
        pid_t pids[2];
        int ends[2], r;
        bool ok;

        assert(tcp->len >= tcp->streams && tcp->n_from > 0 && tcp->n_to > 0);
        assert(tcp->streams >= 1 && tcp->streams <= AE_BENCH_TCP_STREAMS_MAX);
        r = listen_here(&listener, &address);
        if (r < 0)
                return r;
        if (pipe2(ends, O_CLOEXEC) < 0)
                return ae_fail_sys(errno, "cannot make a pipe");
        in = ends[0];
        out = ends[1];
        pids[0] = fork();
        if (pids[0] == 0)
                child_main(&server, listener, NULL, -1);
        pids[1] = pids[0] > 0 ? fork() : -1;
        if (pids[1] == 0)
                child_main(&client, listener, &address, out);
        ok = pids[1] > 0 && ended_well(pids[1]);
        if (pids[0] > 0 && !ok)
                (void)kill(pids[0], SIGKILL); /* it may wait for who never came */
        ok = pids[0] > 0 && ended_well(pids[0]) && ok;
        if (!ok || read(in, ret_ns, sizeof(*ret_ns)) != sizeof(*ret_ns))
                return ae_fail(AE_ESYS, "the plain TCP program failed");
        return 0;
}
