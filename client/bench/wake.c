/* SPDX-License-Identifier: Apache-2.0 */
/* Ping-pong over two eventfds or over two futex words in shared memory. */
#include "client/bench/wake.h"

#include "proto/base/clock.h"
#include "proto/base/status.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct table {
        enum ae_bench_wake how;
        int fds[2];
        _Atomic uint32_t *words; /* one per direction, how often it was told */
};

static bool tell(const struct table *table, int side)
{
        uint64_t one = 1;

        if (table->how == AE_BENCH_WAKE_EVENTFD)
                return write(table->fds[side], &one, sizeof(one)) == sizeof(one);
        atomic_fetch_add(&table->words[side], 1);
        return syscall(SYS_futex, &table->words[side], FUTEX_WAKE, 1, NULL, NULL, 0) >= 0;
}

/* Until @side was told for the @nth time, counted from 1. */
static bool hear(const struct table *table, int side, uint32_t nth)
{
        uint64_t count;

        if (table->how == AE_BENCH_WAKE_EVENTFD)
                return read(table->fds[side], &count, sizeof(count)) == sizeof(count);
        while (atomic_load(&table->words[side]) != nth) {
                long r = syscall(SYS_futex, &table->words[side], FUTEX_WAIT, nth - 1, NULL, NULL,
                                 0);

                if (r < 0 && errno != EAGAIN && errno != EINTR)
                        return false;
        }
        return true;
}

static void child_main(const struct table *table, uint32_t n)
{
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (uint32_t i = 1; i <= n; i++) {
                if (!hear(table, 0, i) || !tell(table, 1))
                        _exit(1);
        }
        _exit(0);
}

static int play(const struct table *table, uint32_t n, uint32_t pause_us, uint64_t *ret_ns)
{
        for (uint32_t i = 0; i < n; i++) {
                uint64_t start_ns;

                (void)usleep(pause_us);
                start_ns = ae_now_ns();
                if (!tell(table, 0) || !hear(table, 1, i + 1))
                        return ae_fail_sys(errno, "cannot wake the other process");
                ret_ns[i] = ae_now_ns() - start_ns;
        }
        return 0;
}

static int play_both(const struct table *table, uint32_t n, uint32_t pause_us, uint64_t *ret_ns)
{
        pid_t pid = fork();
        int r;

        if (pid < 0)
                return ae_fail_sys(errno, "cannot start a process to wake");
        if (pid == 0)
                child_main(table, n);
        r = play(table, n, pause_us, ret_ns);
        if (r < 0)
                (void)kill(pid, SIGKILL);
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
                continue;
        return r;
}

int ae_bench_wake_run(enum ae_bench_wake how, uint32_t n, uint32_t pause_us, uint64_t *ret_ns)
{
        const size_t len = 2 * sizeof(uint32_t);
        struct table table = { .how = how };
        void *words = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        int r;

        if (words == MAP_FAILED)
                return ae_fail_sys(errno, "cannot share memory with a process to wake");
        table.words = words;
        table.fds[0] = eventfd(0, EFD_CLOEXEC);
        table.fds[1] = eventfd(0, EFD_CLOEXEC);
        if (table.fds[0] < 0 || table.fds[1] < 0)
                r = ae_fail_sys(errno, "cannot make an eventfd");
        else
                r = play_both(&table, n, pause_us, ret_ns);
        for (int i = 0; i < 2; i++) {
                if (table.fds[i] >= 0)
                        (void)close(table.fds[i]);
        }
        (void)munmap(words, len);
        return r;
}
