/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counts what the data path must not do: allocations and locks, by preloading (LD_PRELOAD) into a
 * program. SIGUSR1 begins to count, SIGUSR2 ends it and writes a report to the file
 * $INTERPOSE_OUT.PID: lines "NAME N", the frames of the first calls, and at last "total N". A
 * program that knows of it calls interpose_begin() and interpose_end() itself. Calls of all threads
 * count.
 */
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TRACES 24
#define FRAMES 10
#define EARLY_LEN 65536

enum what { MALLOC, CALLOC, REALLOC, FREE, LOCK, COND_WAIT, COND_SIGNAL, N_WHAT };

static const char *const names[N_WHAT] = { "malloc",
                                           "calloc",
                                           "realloc",
                                           "free",
                                           "pthread_mutex_lock",
                                           "pthread_cond_wait",
                                           "pthread_cond_signal" };

static _Atomic bool counting;
static _Atomic uint64_t counts[N_WHAT];
static _Atomic uint32_t n_traces;
static struct {
        enum what what;
        int n;
        void *frames[FRAMES];
} traces[TRACES];
static _Thread_local bool inside;

static char early[EARLY_LEN]; /* what dlsym() itself asks for */
static size_t early_len;

static void count(enum what what)
{
        uint32_t i;

        if (!atomic_load_explicit(&counting, memory_order_relaxed) || inside)
                return;
        inside = true;
        atomic_fetch_add(&counts[what], 1);
        i = atomic_fetch_add(&n_traces, 1);
        if (i < TRACES) {
                traces[i].what = what;
                traces[i].n = backtrace(traces[i].frames, FRAMES);
        }
        inside = false;
}

static void *real(const char *name)
{
        void *found;

        inside = true;
        found = dlsym(RTLD_NEXT, name);
        inside = false;
        return found;
}

static bool is_early(const void *p)
{
        return (const char *)p >= early && (const char *)p < early + EARLY_LEN;
}

static void *take_early(size_t size)
{
        char *p = early + early_len;

        early_len += (size + 15) / 16 * 16;
        if (early_len > EARLY_LEN)
                abort();
        return p;
}

void *malloc(size_t size)
{
        static void *(*next)(size_t);

        if (!next) {
                if (inside)
                        return take_early(size);
                *(void **)(void *)&next = real("malloc");
        }
        count(MALLOC);
        return next(size);
}

void *calloc(size_t n, size_t size)
{
        static void *(*next)(size_t, size_t);

        if (!next) {
                if (inside)
                        return take_early(n * size);
                *(void **)(void *)&next = real("calloc");
        }
        count(CALLOC);
        return next(n, size);
}

void *realloc(void *p, size_t size)
{
        static void *(*next)(void *, size_t);

        if (!next)
                *(void **)(void *)&next = real("realloc");
        count(REALLOC);
        return next(p, size);
}

void free(void *p)
{
        static void (*next)(void *);

        if (!p || is_early(p))
                return;
        if (!next)
                *(void **)(void *)&next = real("free");
        count(FREE);
        next(p);
}

int pthread_mutex_lock(pthread_mutex_t *mutex)
{
        static int (*next)(pthread_mutex_t *);

        if (!next)
                *(void **)(void *)&next = real("pthread_mutex_lock");
        count(LOCK);
        return next(mutex);
}

int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
        static int (*next)(pthread_cond_t *, pthread_mutex_t *);

        if (!next)
                *(void **)(void *)&next = real("pthread_cond_wait");
        count(COND_WAIT);
        return next(cond, mutex);
}

int pthread_cond_signal(pthread_cond_t *cond)
{
        static int (*next)(pthread_cond_t *);

        if (!next)
                *(void **)(void *)&next = real("pthread_cond_signal");
        count(COND_SIGNAL);
        return next(cond);
}

/* ---- marks ------------------------------------------------------------------------------- */

static void say(int fd, const char *text, uint64_t n)
{
        char line[64];
        size_t len = strlen(text);
        char digits[24];
        size_t n_digits = 0;

        memcpy(line, text, len);
        do {
                digits[n_digits++] = (char)('0' + n % 10);
                n /= 10;
        } while (n);
        line[len++] = ' ';
        while (n_digits)
                line[len++] = digits[--n_digits];
        line[len++] = '\n';
        if (write(fd, line, len) < 0)
                return;
}

static char out_path[200];

void interpose_begin(void);
unsigned long interpose_end(int fd);

void interpose_begin(void)
{
        for (int i = 0; i < N_WHAT; i++)
                atomic_store(&counts[i], 0);
        atomic_store(&n_traces, 0);
        atomic_store(&counting, true);
}

/* Returns the total; writes to @fd what the calls were when there were any. */
unsigned long interpose_end(int fd)
{
        uint64_t total = 0;

        atomic_store(&counting, false);
        for (int i = 0; i < N_WHAT; i++)
                total += atomic_load(&counts[i]);
        for (int i = 0; i < N_WHAT; i++)
                if (counts[i])
                        say(fd, names[i], atomic_load(&counts[i]));
        for (uint32_t i = 0; i < TRACES && i < n_traces; i++) {
                say(fd, names[traces[i].what], 1);
                backtrace_symbols_fd(traces[i].frames, traces[i].n, fd);
        }
        return total;
}

static void on_mark(int number)
{
        int saved = errno;

        if (number == SIGUSR1) {
                interpose_begin();
        } else {
                int fd = open(out_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

                say(fd, "total", interpose_end(fd)); /* last: who sees it has seen all */
                close(fd);
        }
        errno = saved;
}

__attribute__((constructor)) static void begin(void)
{
        struct sigaction action = { .sa_handler = on_mark, .sa_flags = SA_RESTART };
        const char *out = getenv("INTERPOSE_OUT");
        void *frames[2];

        (void)backtrace(frames, 2); /* loads what it needs, which allocates */
        if (!out)
                return;
        (void)snprintf(out_path, sizeof(out_path), "%s.%d", out, (int)getpid());
        sigaction(SIGUSR1, &action, NULL);
        sigaction(SIGUSR2, &action, NULL);
}
