/* SPDX-License-Identifier: Apache-2.0 */
/* Between fork() and exec() only async-signal-safe calls. */
#include "client/run/spawn.h"

#include "client/run/guard.h"

#include "proto/base/cleanup.h"
#include "proto/base/status.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* Handlers would run the launcher's code in the child, ignored signals would stay ignored. */
static void reset_signals(const sigset_t *mask)
{
        for (int i = 1; i < NSIG; i++)
                (void)signal(i, SIG_DFL); /* not for all signals; those are as they must be */
        /* A background group that writes to its terminal may be stopped for it (stty tostop). */
        (void)signal(SIGTTOU, SIG_IGN);
        (void)sigprocmask(SIG_SETMASK, mask, NULL);
}

/* Descriptors above 2 first, or one of the three could be overwritten before it is used. */
static int set_descriptors(const struct ae_run_spawn *spawn)
{
        int from[3] = { spawn->in, spawn->out, spawn->err };

        for (int i = 0; i < 3; i++) {
                if (from[i] < 0)
                        from[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
                from[i] = from[i] < 0 ? -1 : fcntl(from[i], F_DUPFD_CLOEXEC, 3);
                if (from[i] < 0)
                        return -1;
        }
        for (int i = 0; i < 3; i++) {
                if (dup2(from[i], i) < 0)
                        return -1;
        }
        return 0;
}

__attribute__((noreturn))
static void child_main(const struct ae_run_spawn *spawn, pid_t parent, const sigset_t *mask,
                       int report)
{
        int err = ESRCH;

        (void)setpgid(0, 0);
        ae_run_guard_born(spawn->guard_fd, getpid());
        /* The parent may have died before the request was in place. */
        if (prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == parent &&
            set_descriptors(spawn) == 0) {
                reset_signals(mask);
                execvpe(spawn->argv[0], spawn->argv, spawn->vars);
                err = errno;
        } else if (getppid() == parent) {
                err = errno;
        }
        (void)!write(report, &err, sizeof(err));
        _exit(127);
}

/* Waits until the child's exec() closed its end, or says why there is none. */
static int exec_result(int report, pid_t pid, const char *program, int guard_fd)
{
        int err = 0;
        ssize_t n;

        do {
                n = read(report, &err, sizeof(err));
        } while (n < 0 && errno == EINTR);
        if (n != (ssize_t)sizeof(err))
                return 0;
        (void)waitpid(pid, NULL, 0);
        ae_run_guard_gone(guard_fd, pid);
        ae_fail_sys(err, "cannot start %s", program);
        return err == ENOENT ? AE_ENOENT : AE_ESYS;
}

int ae_run_spawn(const struct ae_run_spawn *spawn, pid_t *ret_pid)
{
        AE_CLEANUP(ae_cleanup_close) int reader = -1;
        pid_t parent = getpid(), pid;
        sigset_t all, mask;
        int ends[2];
        int err, r;

        if (pipe2(ends, O_CLOEXEC) < 0)
                return ae_fail_sys(errno, "cannot open a pipe to start %s", spawn->argv[0]);
        reader = ends[0];
        sigfillset(&all);
        (void)sigprocmask(SIG_SETMASK, &all, &mask);
        pid = fork();
        if (pid == 0)
                child_main(spawn, parent, &mask, ends[1]);
        err = errno;
        (void)sigprocmask(SIG_SETMASK, &mask, NULL);
        close(ends[1]);
        if (pid < 0)
                return ae_fail_sys(err, "cannot start %s", spawn->argv[0]);
        r = exec_result(reader, pid, spawn->argv[0], spawn->guard_fd);
        if (r < 0)
                return r;
        *ret_pid = pid;
        return 0;
}
