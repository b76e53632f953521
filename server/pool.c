/* SPDX-License-Identifier: Apache-2.0 */
/* Compute threads over rings of one writer and one reader. */
#include "server/pool.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <assert.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RING_LEN 1024u

struct ring {
        _Alignas(64) _Atomic uint32_t head; /* reader */
        _Alignas(64) _Atomic uint32_t tail; /* writer */
        struct ae_task *tasks[RING_LEN];
};

struct thread {
        struct ae_pool_threads *threads; /* borrowed */
        pthread_t id;
        bool started;
        uint32_t index;
        uint32_t n_out;                  /* owner thread: given and not taken back */
        _Atomic uint32_t sleeps;         /* futex word: 1 asleep or about to be */
        struct ring first, todo, done;   /* first: before what is in todo */
};

struct ae_pool_threads {
        uint32_t n;
        _Atomic bool stop;
        _Atomic bool told;      /* the owner has been woken and has not looked yet */
        void (*wake)(void *user);
        void *user;
        struct ae_list backlog; /* owner thread: tasks that no ring had room for */
        uint32_t n_out;
        struct thread *threads; /* owned */
};

static bool ring_push(struct ring *ring, struct ae_task *task)
{
        uint32_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);

        /* pairs with the reader's release of head */
        if (tail - atomic_load_explicit(&ring->head, memory_order_acquire) == RING_LEN)
                return false;
        ring->tasks[tail % RING_LEN] = task;
        atomic_store_explicit(&ring->tail, tail + 1, memory_order_release);
        return true;
}

static struct ae_task *ring_pop(struct ring *ring)
{
        uint32_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
        struct ae_task *task;

        /* pairs with the writer's release of tail */
        if (head == atomic_load_explicit(&ring->tail, memory_order_acquire))
                return NULL;
        task = ring->tasks[head % RING_LEN];
        atomic_store_explicit(&ring->head, head + 1, memory_order_release);
        return task;
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
        (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL,
                      0); /* looked at again */
}

static void futex_wake(_Atomic uint32_t *word)
{
        (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static struct ae_task *pop_task(struct thread *thread)
{
        struct ae_task *task = ring_pop(&thread->first);

        return task ? task : ring_pop(&thread->todo);
}

/* A task to run; NULL: stop. */
static struct ae_task *next_task(struct thread *thread)
{
        for (;;) {
                struct ae_task *task = pop_task(thread);

                if (task)
                        return task;
                if (atomic_load(&thread->threads->stop))
                        return NULL;
                /* say so, then look again: the giver pushes, then looks here */
                atomic_store(&thread->sleeps, 1);
                atomic_thread_fence(memory_order_seq_cst);
                task = pop_task(thread);
                if (!task && !atomic_load(&thread->threads->stop))
                        futex_wait(&thread->sleeps, 1);
                atomic_store(&thread->sleeps, 0);
                if (task)
                        return task;
        }
}

static void *thread_main(void *user)
{
        struct thread *thread = user;
        struct ae_pool_threads *threads = thread->threads;
        struct ae_task *task;

        while ((task = next_task(thread))) {
                bool pushed;

                ae_task_run(task, thread->index);
                pushed = ring_push(&thread->done, task);
                assert(pushed); /* no more are out than the ring holds */
                atomic_thread_fence(memory_order_seq_cst);
                if (!atomic_exchange(&threads->told, true))
                        threads->wake(threads->user);
        }
        return NULL;
}

static int start_thread(struct ae_pool_threads *threads, uint32_t i)
{
        struct thread *thread = &threads->threads[i];
        sigset_t all;
        sigset_t old;
        int r;

        thread->threads = threads;
        thread->index = i;
        sigfillset(&all); /* signals are the control loop's */
        pthread_sigmask(SIG_SETMASK, &all, &old);
        r = pthread_create(&thread->id, NULL, thread_main, thread);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        if (r != 0)
                return ae_fail_sys(r, "cannot start compute thread %u", i);
        thread->started = true;
        return 0;
}

int ae_threads_new(uint32_t n, void (*wake)(void *user), void *user,
                   struct ae_pool_threads **ret_threads)
{
        struct ae_pool_threads *threads = calloc(1, sizeof(*threads));
        int r = 0;

        if (!threads)
                return ae_fail(AE_ENOMEM, "no memory for compute threads");
        threads->n = n;
        threads->wake = wake;
        threads->user = user;
        ae_list_init(&threads->backlog);
        threads->threads = aligned_alloc(64, n * sizeof(*threads->threads));
        if (!threads->threads) {
                free(threads);
                return ae_fail(AE_ENOMEM, "no memory for %u compute threads", n);
        }
        memset(threads->threads, 0, n * sizeof(*threads->threads));
        for (uint32_t i = 0; i < n && r == 0; i++)
                r = start_thread(threads, i);
        if (r < 0) {
                ae_threads_free(threads);
                return r;
        }
        *ret_threads = threads;
        return 0;
}

struct ae_pool_threads *ae_threads_free(struct ae_pool_threads *threads)
{
        if (!threads)
                return NULL;
        assert(threads->n_out == 0);
        atomic_store(&threads->stop, true);
        for (uint32_t i = 0; i < threads->n; i++) {
                atomic_store(&threads->threads[i].sleeps, 0);
                futex_wake(&threads->threads[i].sleeps);
                if (threads->threads[i].started)
                        pthread_join(threads->threads[i].id, NULL);
        }
        free(threads->threads);
        free(threads);
        return NULL;
}

/* Copies are what workers wait for: the weights of the next pass, which otherwise come only after
 * all that the optimizer has still to do. No task waits for another, so their order is free. */
static bool goes_first(const struct ae_task *task)
{
        return task->kind == AE_TASK_COPY;
}

static bool give(struct ae_pool_threads *threads, struct ae_task *task)
{
        struct thread *best = &threads->threads[0];
        bool first = goes_first(task);

        for (uint32_t i = 1; i < threads->n; i++) {
                if (threads->threads[i].n_out < best->n_out)
                        best = &threads->threads[i];
        }
        /* what is out must fit into the ring of what is done; half of that is for the first */
        if (best->n_out >= (first ? RING_LEN : RING_LEN / 2) ||
            !ring_push(first ? &best->first : &best->todo, task))
                return false;
        best->n_out++;
        atomic_thread_fence(memory_order_seq_cst); /* pairs with the one in next_task() */
        if (atomic_exchange(&best->sleeps, 0))
                futex_wake(&best->sleeps);
        return true;
}

void ae_threads_run(struct ae_pool_threads *threads, struct ae_task *task)
{
        threads->n_out++;
        if (goes_first(task)) {
                if (!give(threads, task))
                        ae_list_push_front(&threads->backlog, &task->link);
        } else if (!ae_list_empty(&threads->backlog) || !give(threads, task)) {
                ae_list_push(&threads->backlog, &task->link);
        }
}

static void give_backlog(struct ae_pool_threads *threads)
{
        while (!ae_list_empty(&threads->backlog)) {
                struct ae_task *task = ae_list_entry(threads->backlog.next, struct ae_task, link);

                ae_list_unlink(&task->link);
                if (give(threads, task))
                        continue;
                ae_list_push_front(&threads->backlog, &task->link);
                return;
        }
}

struct ae_task *ae_threads_take(struct ae_pool_threads *threads)
{
        atomic_store(&threads->told, false);
        atomic_thread_fence(memory_order_seq_cst);
        for (uint32_t i = 0; i < threads->n; i++) {
                struct ae_task *task = ring_pop(&threads->threads[i].done);

                if (!task)
                        continue;
                threads->threads[i].n_out--;
                threads->n_out--;
                give_backlog(threads);
                return task;
        }
        return NULL;
}

uint32_t ae_threads_running(const struct ae_pool_threads *threads)
{
        return threads->n_out;
}
