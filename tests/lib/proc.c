/* SPDX-License-Identifier: Apache-2.0 */
/* Daemons as child processes, see proc.h. */
#include "tests/lib/proc.h"

#include "proto/base/clock.h"
#include "proto/base/num.h"
#include "tests/lib/test.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define START_MS 10000
#define END_MS 10000

uint64_t proc_now_ms(void)
{
        return ae_now_ns() / AE_NS_PER_MS;
}

uint64_t proc_starved_ns(void)
{
        FILE *file = fopen("/proc/thread-self/schedstat", "re");
        unsigned long long ran, waited = 0;

        if (!file)
                return 0;
        if (fscanf(file, "%llu %llu", &ran, &waited) != 2)
                waited = 0;
        fclose(file);
        return waited;
}

void proc_sleep_ms(int ms)
{
        struct timespec time = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L };

        nanosleep(&time, NULL);
}

const char *proc_autoepd(void)
{
        const char *path = getenv("AUTOEPD");

        if (!path)
                fail_msg("$AUTOEPD is not set");
        return path;
}

void proc_die_with_parent(pid_t parent)
{
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
                _exit(1);
}

int proc_wait(pid_t pid, int ms)
{
        uint64_t until = proc_now_ms() + (uint64_t)ms;
        int status = 0;
        pid_t r;

        while ((r = waitpid(pid, &status, WNOHANG)) == 0 && proc_now_ms() < until)
                proc_sleep_ms(1);
        if (r != pid)
                fail_msg("pid %d has not ended within %d ms", (int)pid, ms);
        return status;
}

/* ---- the bed ---------------------------------------------------------------------------- */

/* Free ports of the loopback; all are held until the last is found, so that they differ. */
static void take_ports(struct proc_bed *bed)
{
        int fds[PROC_NODES_MAX];

        for (uint32_t i = 0; i < bed->n_nodes; i++) {
                struct sockaddr_in address = { .sin_family = AF_INET,
                                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
                socklen_t len = sizeof(address);

                fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
                assert_true(fds[i] >= 0);
                assert_int_equal(bind(fds[i], (struct sockaddr *)&address, len), 0);
                assert_int_equal(getsockname(fds[i], (struct sockaddr *)&address, &len), 0);
                (void)snprintf(bed->daemons[i].peer, sizeof(bed->daemons[i].peer), "127.0.0.1:%u",
                               ntohs(address.sin_port));
        }
        for (uint32_t i = 0; i < bed->n_nodes; i++)
                close(fds[i]);
}

void proc_bed_init(struct proc_bed *bed, uint32_t n_nodes, const char *transport)
{
        size_t len = 0;

        assert_in_range(n_nodes, 1, PROC_NODES_MAX);
        *bed = (struct proc_bed){ .n_nodes = n_nodes, .transport = transport };
        (void)snprintf(bed->dir, sizeof(bed->dir), "/tmp/autoep-story.XXXXXX");
        assert_non_null(mkdtemp(bed->dir));
        if (strcmp(transport, "tcp") == 0)
                take_ports(bed);
        for (uint32_t i = 0; i < n_nodes; i++) {
                struct proc_daemon *d = &bed->daemons[i];

                (void)snprintf(d->socket, sizeof(d->socket), "%s/node-%u.sock", bed->dir, i);
                (void)snprintf(d->log, sizeof(d->log), "%s/node-%u.log", bed->dir, i);
                if (!d->peer[0])
                        (void)snprintf(d->peer, sizeof(d->peer), "%s/peer-%u.sock", bed->dir, i);
                len += (size_t)snprintf(bed->peers + len, sizeof(bed->peers) - len, "%s%s",
                                        i ? "," : "", d->peer);
        }
}

static void remove_dir(const char *path)
{
        DIR *dir = opendir(path);
        struct dirent *entry;

        while (dir && (entry = readdir(dir)))
                (void)unlinkat(dirfd(dir), entry->d_name, 0); /* "." and ".." stay */
        if (dir)
                closedir(dir);
        (void)rmdir(path);
}

void proc_bed_deinit(struct proc_bed *bed)
{
        for (uint32_t i = 0; i < bed->n_nodes; i++) {
                if (bed->daemons[i].pid == 0)
                        continue;
                (void)kill(bed->daemons[i].pid, SIGKILL);
                (void)waitpid(bed->daemons[i].pid, NULL, 0);
                bed->daemons[i].pid = 0;
        }
        if (bed->dir[0])
                remove_dir(bed->dir);
        bed->dir[0] = '\0';
}

static char *read_log(const struct proc_bed *bed, uint32_t node)
{
        int fd = open(bed->daemons[node].log, O_RDONLY | O_CLOEXEC);
        size_t size = 1 << 20;
        char *text = calloc(1, size);
        ssize_t n = fd >= 0 && text ? pread(fd, text, size - 1, 0) : 0;

        assert_non_null(text);
        text[n > 0 ? n : 0] = '\0';
        if (fd >= 0)
                close(fd);
        return text;
}

void proc_bed_show(const struct proc_bed *bed)
{
        for (uint32_t i = 0; i < bed->n_nodes; i++) {
                char *text = read_log(bed, i);

                fprintf(stderr, "---- node %u\n%s", i, text);
                free(text);
        }
}

bool proc_daemon_log_has(const struct proc_bed *bed, uint32_t node, const char *text)
{
        char *log = read_log(bed, node);
        bool has = strstr(log, text) != NULL;

        free(log);
        return has;
}

void proc_daemon_log_line(const struct proc_bed *bed, uint32_t node, const char *text, char *ret,
                          size_t size)
{
        char *log = read_log(bed, node);
        const char *line = strstr(log, text);

        if (!line)
                fail_msg("the log of node %u does not say '%s'", node, text);
        (void)snprintf(ret, size, "%.*s", (int)strcspn(line, "\n"), line);
        free(log);
}

void proc_daemon_await_log(struct proc_bed *bed, uint32_t node, const char *text, int ms)
{
        uint64_t until = proc_now_ms() + (uint64_t)ms;

        while (!proc_daemon_log_has(bed, node, text)) {
                if (!proc_daemon_alive(bed, node) || proc_now_ms() > until) {
                        proc_bed_show(bed);
                        fail_msg("the log of node %u does not say '%s' after %d ms", node, text,
                                 ms);
                }
                proc_sleep_ms(2);
        }
}

/* ---- daemons ---------------------------------------------------------------------------- */

static void exec_daemon(const struct proc_bed *bed, uint32_t node)
{
        const struct proc_daemon *d = &bed->daemons[node];
        const char *argv[32] = { proc_autoepd(), "--dev", "--socket",  d->socket,
                                 "--log-level",  "debug", "--threads", "1" };
        size_t n = 8;
        char number[16];
        int fd = open(d->log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);

        (void)snprintf(number, sizeof(number), "%u", node);
        if (bed->n_nodes > 1) {
                const char *more[] = { "--node",   number,        "--peers",
                                       bed->peers, "--transport", bed->transport };

                memcpy(argv + n, more, sizeof(more));
                n += AE_ARRAY_LEN(more);
        }
        for (size_t i = 0; i < AE_ARRAY_LEN(bed->flags) && bed->flags[i]; i++)
                argv[n++] = bed->flags[i];
        argv[n] = NULL;
        if (bed->preload)
                setenv("LD_PRELOAD", bed->preload, 1);
        dup2(fd, STDOUT_FILENO);
        dup2(fd, STDERR_FILENO);
        execv(argv[0], (char *const *)(uintptr_t)argv);
        _exit(127);
}

void proc_daemon_start(struct proc_bed *bed, uint32_t node)
{
        struct proc_daemon *d = &bed->daemons[node];
        pid_t self = getpid();

        assert_int_equal(d->pid, 0);
        (void)proc_autoepd(); /* says so here when there is none */
        (void)unlink(d->log);
        d->pid = fork();
        assert_true(d->pid >= 0);
        if (d->pid == 0) {
                proc_die_with_parent(self);
                exec_daemon(bed, node);
        }
        proc_daemon_await_log(bed, node, "serves node=", START_MS);
}

void proc_daemon_start_all(struct proc_bed *bed)
{
        for (uint32_t i = 0; i < bed->n_nodes; i++)
                proc_daemon_start(bed, i);
}

int proc_daemon_signal(struct proc_bed *bed, uint32_t node, int signal)
{
        struct proc_daemon *d = &bed->daemons[node];
        int status;

        assert_int_not_equal(d->pid, 0);
        assert_int_equal(kill(d->pid, signal), 0);
        if (signal == SIGSTOP || signal == SIGCONT) {
                d->stopped = signal == SIGSTOP;
                return 0;
        }
        status = proc_wait(d->pid, END_MS);
        d->pid = 0;
        return status;
}

bool proc_daemon_alive(struct proc_bed *bed, uint32_t node)
{
        struct proc_daemon *d = &bed->daemons[node];

        if (d->pid == 0 || waitpid(d->pid, NULL, WNOHANG) == 0)
                return d->pid != 0;
        d->pid = 0;
        return false;
}

/* ---- any process ------------------------------------------------------------------------ */

static size_t read_until(int fd, uint64_t until, char *output, size_t size)
{
        size_t len = 0;

        for (;;) {
                struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
                uint64_t now = proc_now_ms();
                char rest[256];
                ssize_t n;

                if (now >= until || poll(&poll_fd, 1, (int)(until - now)) <= 0)
                        return len;
                n = len + 1 < size ? read(fd, output + len, size - 1 - len) :
                                     read(fd, rest, sizeof(rest));
                if (n <= 0)
                        return len;
                if (len + 1 < size)
                        len += (size_t)n;
        }
}

int proc_run(const char *const *argv, int ms, char *output, size_t size)
{
        uint64_t until = proc_now_ms() + (uint64_t)ms;
        pid_t self = getpid();
        pid_t pid;
        int fds[2];
        int status;

        assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
        pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
                proc_die_with_parent(self);
                dup2(fds[1], STDOUT_FILENO);
                dup2(fds[1], STDERR_FILENO);
                execv(argv[0], (char *const *)(uintptr_t)argv);
                _exit(127);
        }
        close(fds[1]);
        output[read_until(fds[0], until, output, size)] = '\0';
        close(fds[0]);
        if (proc_now_ms() >= until) {
                kill(pid, SIGKILL);
                waitpid(pid, NULL, 0);
                fail_msg("%s has not ended within %d ms and said: %s", argv[0], ms, output);
        }
        status = proc_wait(pid, 1000);
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static long count_dir(const char *path)
{
        DIR *dir = opendir(path);
        long n = -2; /* "." and ".." */

        assert_non_null(dir);
        while (readdir(dir))
                n++;
        closedir(dir);
        return n;
}

struct proc_stat proc_stat_of(pid_t pid)
{
        struct proc_stat stat = { 0 };
        char path[64], line[256];
        FILE *in;

        (void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
        stat.n_fds = count_dir(path);
        (void)snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
        stat.n_threads = count_dir(path);
        (void)snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
        in = fopen(path, "re");
        assert_non_null(in);
        while (fgets(line, sizeof(line), in)) {
                if (strncmp(line, "VmRSS:", 6) == 0)
                        stat.rss_kib = strtol(line + 6, NULL, 10);
                if (strncmp(line, "RssAnon:", 8) == 0)
                        stat.anon_kib = strtol(line + 8, NULL, 10);
        }
        fclose(in);
        return stat;
}
