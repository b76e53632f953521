/* SPDX-License-Identifier: Apache-2.0 */
/* The guard: a table of process groups and a loop around read(). */
#include "client/run/guard.h"

#include "client/run/options.h"

#include "proto/base/cleanup.h"
#include "proto/base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define GROUPS_MAX (AE_RUN_NODES_MAX + AE_RUN_WORKERS_MAX)

/* Smaller than PIPE_BUF, so that writers don't mix theirs. */
struct record {
        int32_t pid;
        int32_t lives;
};

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *where)
{
        (void)info;
        (void)kind;
        (void)where;
        (void)remove(path); /* the rest may still go */
        return 0;
}

static void remove_dir(const char *dir)
{
        (void)nftw(dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

static void note(pid_t groups[GROUPS_MAX], const struct record *record)
{
        pid_t from = record->lives ? 0 : record->pid;

        for (size_t i = 0; i < GROUPS_MAX; i++) {
                if (groups[i] == from) {
                        groups[i] = record->lives ? record->pid : 0;
                        return;
                }
        }
}

/* In a session of its own, where no terminal and no signal to the launcher's group reaches it. */
static void detach(int fd)
{
        int null = open("/dev/null", O_RDWR);

        (void)setsid();
        (void)signal(SIGINT, SIG_IGN);
        (void)signal(SIGTERM, SIG_IGN);
        (void)signal(SIGHUP, SIG_IGN);
        (void)prctl(PR_SET_NAME, "autoep-guard");
        (void)dup2(fd, STDERR_FILENO + 1);
        for (int i = STDIN_FILENO; null >= 0 && i <= STDERR_FILENO; i++)
                (void)dup2(null, i);
        (void)close_range(STDERR_FILENO + 2, ~0U, 0);
}

static void watch(int fd, const char *dir)
{
        pid_t groups[GROUPS_MAX] = { 0 };
        struct record record;
        ssize_t n;

        while ((n = read(fd, &record, sizeof(record))) != 0) {
                if (n == (ssize_t)sizeof(record))
                        note(groups, &record);
                else if (n > 0 || errno != EINTR)
                        break;
        }
        for (size_t i = 0; i < GROUPS_MAX; i++) {
                if (groups[i] > 0)
                        (void)kill(-groups[i], SIGKILL);
        }
        remove_dir(dir);
}

int ae_run_guard_start(const char *dir, struct ae_run_guard *ret_guard)
{
        int ends[2];
        pid_t pid;
        int err;

        if (pipe2(ends, O_CLOEXEC) < 0)
                return ae_fail_sys(errno, "cannot open a pipe to the guard");
        pid = fork();
        if (pid == 0) {
                detach(ends[0]);
                watch(STDERR_FILENO + 1, dir);
                _exit(0);
        }
        err = errno;
        close(ends[0]);
        if (pid < 0) {
                close(ends[1]);
                return ae_fail_sys(err, "cannot start the guard");
        }
        *ret_guard = (struct ae_run_guard){ .pid = pid, .fd = ends[1], .dir = dir };
        return 0;
}

static void tell(int fd, pid_t pid, int32_t lives)
{
        struct record record = { .pid = (int32_t)pid, .lives = lives };

        if (write(fd, &record, sizeof(record)) < 0)
                return; /* the guard was killed; ae_run_guard_finish() sees that */
}

void ae_run_guard_born(int fd, pid_t pid)
{
        tell(fd, pid, 1);
}

void ae_run_guard_gone(int fd, pid_t pid)
{
        tell(fd, pid, 0);
}

void ae_run_guard_finish(struct ae_run_guard *guard)
{
        int status = -1;

        if (guard->fd >= 0)
                close(guard->fd);
        if (guard->pid > 0) {
                while (waitpid(guard->pid, &status, 0) < 0 && errno == EINTR)
                        continue;
        }
        if (status != 0 && guard->dir)
                remove_dir(guard->dir);
        *guard = (struct ae_run_guard)AE_RUN_GUARD_INIT;
}
