/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compute threads: every task runs once and comes back once, in whatever order, also when far more
 * are out than the rings hold; and the owner, who sleeps until it is woken, is woken when it must
 * be and not for every task. A lost wake shows as a wait that reaches its limit.
 */
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/pool.h"

#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define N_TASKS 10000u
#define LIMIT_MS 20000

struct bed {
        struct ae_pool_threads *threads;
        int efd;
        _Atomic uint32_t n_wakes;
        uint32_t n_takes;
        struct ae_task *tasks;
        uint64_t *from, *to;
        uint32_t *n_back;
};

static void on_wake(void *user)
{
        struct bed *bed = user;
        const uint64_t one = 1;

        atomic_fetch_add_explicit(&bed->n_wakes, 1, memory_order_relaxed);
        if (write(bed->efd, &one, sizeof(one)) != sizeof(one))
                abort();
}

static void open_bed(struct bed *bed, uint32_t n_threads)
{
        *bed = (struct bed){ .efd = eventfd(0, EFD_CLOEXEC) };
        assert_true(bed->efd >= 0);
        bed->tasks = calloc(N_TASKS, sizeof(*bed->tasks));
        bed->from = calloc(N_TASKS, sizeof(*bed->from));
        bed->to = calloc(N_TASKS, sizeof(*bed->to));
        bed->n_back = calloc(N_TASKS, sizeof(*bed->n_back));
        assert_true(bed->tasks && bed->from && bed->to && bed->n_back);
        assert_int_equal(ae_threads_new(n_threads, on_wake, bed, &bed->threads), 0);
        assert_int_equal(ae_threads_running(bed->threads), 0);
}

static void close_bed(struct bed *bed)
{
        assert_null(ae_threads_free(bed->threads));
        close(bed->efd);
        free(bed->tasks);
        free(bed->from);
        free(bed->to);
        free(bed->n_back);
}

static void hand_out(struct bed *bed, uint32_t i)
{
        struct ae_task *task = &bed->tasks[i];

        bed->from[i] = UINT64_C(0x9e3779b97f4a7c15) * (i + 1);
        ae_list_init(&task->link);
        task->kind = AE_TASK_COPY;
        task->arg[0] = i;
        task->copy.to = &bed->to[i];
        task->copy.from = &bed->from[i];
        task->copy.len = sizeof(bed->to[i]);
        ae_threads_run(bed->threads, task);
}

static void sleep_until_woken(struct bed *bed)
{
        struct pollfd pollfd = { .fd = bed->efd, .events = POLLIN };
        uint64_t n;

        assert_int_equal(poll(&pollfd, 1, LIMIT_MS), 1);
        assert_int_equal(read(bed->efd, &n, sizeof(n)), sizeof(n));
}

/* Takes all that is there; returns how many. */
static uint32_t drain(struct bed *bed)
{
        struct ae_task *task;
        uint32_t n = 0;

        for (;;) {
                bed->n_takes++;
                task = ae_threads_take(bed->threads);
                if (!task)
                        return n;
                bed->n_back[task->arg[0]]++;
                n++;
        }
}

static void assert_all_back(const struct bed *bed, uint32_t n)
{
        for (uint32_t i = 0; i < n; i++) {
                assert_int_equal(bed->n_back[i], 1);
                assert_int_equal(bed->to[i], bed->from[i]);
        }
        assert_int_equal(ae_threads_running(bed->threads), 0);
}

static void run_all_at_once(uint32_t n_threads)
{
        struct bed bed;
        uint32_t n = 0;

        open_bed(&bed, n_threads);
        for (uint32_t i = 0; i < N_TASKS; i++)
                hand_out(&bed, i);
        assert_int_equal(ae_threads_running(bed.threads), N_TASKS);
        while (n < N_TASKS) {
                sleep_until_woken(&bed);
                n += drain(&bed);
                assert_int_equal(ae_threads_running(bed.threads), N_TASKS - n);
        }
        assert_all_back(&bed, N_TASKS);
        assert_int_equal(drain(&bed), 0);
        /* once told, a thread says nothing until the owner has looked */
        assert_true(atomic_load(&bed.n_wakes) <= bed.n_takes + 1);
        close_bed(&bed);
}

static void test_backlog_one_thread(void **state)
{
        (void)state;
        run_all_at_once(1);
}

static void test_backlog_three_threads(void **state)
{
        (void)state;
        run_all_at_once(3);
}

/* Ping-pong: the thread falls asleep and is woken over and over, one task at a time. */
static void test_one_at_a_time(void **state)
{
        struct bed bed;

        (void)state;
        open_bed(&bed, 2);
        for (uint32_t i = 0; i < 2000; i++) {
                uint32_t n = 0;

                hand_out(&bed, i);
                while (n == 0) { /* a wake may be for a task that was taken on the way */
                        sleep_until_woken(&bed);
                        n = drain(&bed);
                }
                assert_int_equal(n, 1);
        }
        assert_all_back(&bed, 2000);
        close_bed(&bed);
}

/* The owner does not look: however many tasks end, it is told once. */
static void test_told_once(void **state)
{
        struct bed bed;
        uint32_t n = 0;

        (void)state;
        open_bed(&bed, 1);
        for (uint32_t i = 0; i < 100; i++)
                hand_out(&bed, i);
        sleep_until_woken(&bed);
        assert_int_equal(atomic_load(&bed.n_wakes), 1);
        while ((n += drain(&bed)) < 100)
                sleep_until_woken(&bed);
        assert_all_back(&bed, 100);
        close_bed(&bed);
}

static void test_random_bursts(void **state)
{
        struct bed bed;
        uint32_t n_out = 0;
        uint32_t n_in = 0;

        (void)state;
        srand(5);
        open_bed(&bed, 3);
        while (n_in < N_TASKS) {
                uint32_t burst = (uint32_t)rand() % 700;

                for (uint32_t i = 0; i < burst && n_out < N_TASKS; i++)
                        hand_out(&bed, n_out++);
                if (rand() % 2 && n_in < n_out)
                        sleep_until_woken(&bed);
                n_in += drain(&bed);
        }
        assert_all_back(&bed, N_TASKS);
        close_bed(&bed);
}

struct held {
        struct bed bed;
        int ends[2];
        bool was_held; /* compute thread */
};

/* The first time, the thread stays here until the owner lets it go. */
static void on_wake_held(void *user)
{
        struct held *held = user;
        char word = 0;

        if (!held->was_held && (write(held->ends[1], &word, 1) != 1 ||
                                read(held->ends[1], &word, 1) != 1))
                abort();
        held->was_held = true;
        on_wake(&held->bed);
}

static void hand_out_empty(struct bed *bed, uint32_t i, enum ae_task_kind kind)
{
        struct ae_task *task = &bed->tasks[i];

        ae_list_init(&task->link);
        task->kind = kind;
        task->arg[0] = i;
        task->copy.to = &bed->to[i];
        task->copy.from = &bed->from[i];
        ae_threads_run(bed->threads, task);
}

static void hold(struct held *held)
{
        char word;

        open_bed(&held->bed, 1);
        assert_null(ae_threads_free(held->bed.threads));
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, held->ends), 0);
        assert_int_equal(ae_threads_new(1, on_wake_held, held, &held->bed.threads), 0);
        hand_out_empty(&held->bed, 0, AE_TASK_ROUND);
        assert_int_equal(read(held->ends[0], &word, 1), 1);
}

/* While the one thread is held it is given more than its rings take: 511 others, 512 copies. */
static void test_copies_first(void **state)
{
        const uint32_t n_others = 2000, n_copies = 700;
        struct held held = { 0 };
        uint32_t n = 0, last_copy = 0;

        (void)state;
        hold(&held);
        for (uint32_t i = 1; i <= n_others; i++)
                hand_out_empty(&held.bed, i, AE_TASK_ROUND);
        for (uint32_t i = n_others + 1; i <= n_others + n_copies; i++)
                hand_out_empty(&held.bed, i, AE_TASK_COPY);
        assert_int_equal(write(held.ends[0], "", 1), 1);
        while (n < 1 + n_others + n_copies) {
                struct ae_task *task = ae_threads_take(held.bed.threads);

                if (!task) {
                        sleep_until_woken(&held.bed);
                        continue;
                }
                if (n >= 1 && n <= 512)
                        assert_int_equal(task->kind, AE_TASK_COPY);
                if (task->kind == AE_TASK_COPY)
                        last_copy = n;
                held.bed.n_back[task->arg[0]]++;
                n++;
        }
        for (uint32_t i = 0; i < n; i++)
                assert_int_equal(held.bed.n_back[i], 1);
        /* the rest come before what no ring had room for, though not before what one had */
        assert_in_range(last_copy, n_copies, n_copies + 511);
        close_bed(&held.bed);
        close(held.ends[0]);
        close(held.ends[1]);
}

static void test_freed(void **state)
{
        struct bed bed;

        (void)state;
        assert_null(ae_threads_free(NULL));
        for (uint32_t i = 0; i < 20; i++) { /* asleep already or on the way to it */
                open_bed(&bed, 4);
                close_bed(&bed);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_backlog_one_thread),
                cmocka_unit_test(test_backlog_three_threads),
                cmocka_unit_test(test_one_at_a_time),
                cmocka_unit_test(test_told_once),
                cmocka_unit_test(test_random_bursts),
                cmocka_unit_test(test_copies_first),
                cmocka_unit_test(test_freed),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
