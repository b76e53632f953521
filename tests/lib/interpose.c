/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counts what the data path must not do: allocations, maps and locks, by preloading (LD_PRELOAD)
 * into a program. SIGUSR1 begins to count, SIGUSR2 ends it and writes a report to the file
 * $INTERPOSE_OUT.PID: lines "NAME N", the frames of the first calls, "live N", which are the bytes
 * allocated since the program began and not freed, and at last "total N". A program that knows of
 * it calls interpose_begin(), interpose_end(), interpose_memory() (how many of the calls were not
 * about locks) and interpose_live() itself. Calls of all threads count.
 */
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define TRACES 24
#define FRAMES 10
#define EARLY_LEN 65536

enum what { MALLOC, CALLOC, REALLOC, ALIGNED, MEMALIGN, FREE, MMAP, MUNMAP, LOCK, TRYLOCK,
            TIMEDLOCK, RDLOCK, WRLOCK, COND_WAIT, COND_TIMEDWAIT, COND_SIGNAL, COND_BROADCAST,
            SEM_WAIT, N_WHAT };

static const char *const names[N_WHAT] = { "malloc",
                                           "calloc",
                                           "realloc",
                                           "aligned_alloc",
                                           "posix_memalign",
                                           "free",
                                           "mmap",
                                           "munmap",
                                           "pthread_mutex_lock",
                                           "pthread_mutex_trylock",
                                           "pthread_mutex_timedlock",
                                           "pthread_rwlock_rdlock",
                                           "pthread_rwlock_wrlock",
                                           "pthread_cond_wait",
                                           "pthread_cond_timedwait",
                                           "pthread_cond_signal",
                                           "pthread_cond_broadcast",
                                           "sem_wait" };

static _Atomic bool counting;
static _Atomic uint64_t counts[N_WHAT];
static _Atomic int64_t live; /* bytes */
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

/* Returns @p. */
static void *born(void *p)
{
        if (p)
                atomic_fetch_add(&live, (int64_t)malloc_usable_size(p));
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
        return born(next(size));
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
        return born(next(n, size));
}

void *realloc(void *p, size_t size)
{
        static void *(*next)(void *, size_t);
        int64_t len = (int64_t)malloc_usable_size(p); /* 0 of NULL */
        void *moved;

        if (!next)
                *(void **)(void *)&next = real("realloc");
        count(REALLOC);
        atomic_fetch_sub(&live, len);
        moved = next(p, size);
        if (!moved && size)
                atomic_fetch_add(&live, len);
        return born(moved);
}

void *aligned_alloc(size_t alignment, size_t size)
{
        static void *(*next)(size_t, size_t);

        if (!next)
                *(void **)(void *)&next = real("aligned_alloc");
        count(ALIGNED);
        return born(next(alignment, size));
}

int posix_memalign(void **ret, size_t alignment, size_t size)
{
        static int (*next)(void **, size_t, size_t);
        int r;

        if (!next)
                *(void **)(void *)&next = real("posix_memalign");
        count(MEMALIGN);
        r = next(ret, alignment, size);
        if (r == 0)
                born(*ret);
        return r;
}

void free(void *p)
{
        static void (*next)(void *);

        if (!p || is_early(p))
                return;
        if (!next)
                *(void **)(void *)&next = real("free");
        count(FREE);
        atomic_fetch_sub(&live, (int64_t)malloc_usable_size(p));
        next(p);
}

/* The same for a call that changes nothing but that it is counted. */
#define PASS(what, type, name, params, ...)                                                       \
        type name params                                                                          \
        {                                                                                         \
                static type(*next) params;                                                        \
                                                                                                  \
                if (!next)                                                                        \
                        *(void **)(void *)&next = real(#name);                                    \
                count(what);                                                                      \
                return next(__VA_ARGS__);                                                         \
        }

PASS(MMAP, void *, mmap, (void *at, size_t len, int prot, int flags, int fd, off_t off), at, len,
     prot, flags, fd, off)
PASS(MUNMAP, int, munmap, (void *at, size_t len), at, len)
PASS(LOCK, int, pthread_mutex_lock, (pthread_mutex_t *mutex), mutex)
PASS(TRYLOCK, int, pthread_mutex_trylock, (pthread_mutex_t *mutex), mutex)
PASS(TIMEDLOCK, int, pthread_mutex_timedlock,
     (pthread_mutex_t *mutex, const struct timespec *until), mutex, until)
PASS(RDLOCK, int, pthread_rwlock_rdlock, (pthread_rwlock_t *lock), lock)
PASS(WRLOCK, int, pthread_rwlock_wrlock, (pthread_rwlock_t *lock), lock)
PASS(COND_WAIT, int, pthread_cond_wait, (pthread_cond_t *cond, pthread_mutex_t *mutex), cond, mutex)
PASS(COND_TIMEDWAIT, int, pthread_cond_timedwait,
     (pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until), cond, mutex,
     until)
PASS(COND_SIGNAL, int, pthread_cond_signal, (pthread_cond_t *cond), cond)
PASS(COND_BROADCAST, int, pthread_cond_broadcast, (pthread_cond_t *cond), cond)
PASS(SEM_WAIT, int, sem_wait, (sem_t *sem), sem)

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
unsigned long interpose_live(void);
unsigned long interpose_memory(void);

unsigned long interpose_memory(void)
{
        uint64_t n = 0;

        for (int i = 0; i < LOCK; i++)
                n += atomic_load(&counts[i]);
        return n;
}

unsigned long interpose_live(void)
{
        return (unsigned long)atomic_load(&live);
}

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

                unsigned long total = interpose_end(fd);

                say(fd, "live", interpose_live());
                say(fd, "total", total); /* last: who sees it has seen all */
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
