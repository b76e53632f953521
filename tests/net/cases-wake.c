/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Conformance: sleeping and waking. Owners that only poll when woken, in one loop and in two
 * threads; a wake-up that gets lost leaves them asleep for ever, which the watchdog turns into a
 * failure.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <uv.h>

#include "proto/base/clock.h"
#include "tests/net/conformance.h"

#define ROUNDS 3000
#define PUTS 400
#define PUT_LEN ((uint64_t)1 << 18)

/* An endpoint whose owner sleeps. */
struct sleeper {
        struct ae_net *net;
        struct ae_net_conn *conn;
        uv_loop_t loop;
        uv_idle_t busy;     /* runs while arm() says 1 */
        uv_prepare_t arm;   /* before the loop sleeps */
        bool serves;        /* sends the first msg and the puts */
        struct ae_sim *sim; /* instead of the loop */
        struct area area;
        struct ae_net_mem *mem;
        struct ae_net_key key; /* the other's */
        bool has_key;
        uint32_t n_hellos, n_msgs, n_notified, n_posted, n_done, n_wakes, n_down, n_writable;
        bool finished;
        bool quiet; /* answers nothing and posts nothing by itself */
        bool sleepy; /* wakes only set a flag; see doze() */
        bool armed, woken;
        char address[AE_NET_ADDR_MAX];
};

static void drain(struct sleeper *s);

static void on_wake(void *user)
{
        struct sleeper *s = user;

        s->n_wakes++;
        s->woken = true;
        if (!s->sleepy)
                drain(s);
}

void arm_says_busy(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *conn = bed_connect(a, b, NULL);

        /* Without a loop there is no one to wake. */
        if (!((struct bed *)*state)->sim) {
                assert_int_equal(ae_net_arm(a->net), 1);
                return;
        }
        bed_settle(*state);
        assert_int_equal(ae_net_arm(b->net), 0);
        assert_int_equal(ae_net_msg(conn, "x", 1), 0);
        b->still = true;
        bed_settle(*state);
        assert_int_equal(ae_net_arm(b->net), 1);
}

/* --- one message back and forth, puts alongside --- */

static void post(struct sleeper *s)
{
        while (s->has_key && s->n_posted < PUTS) {
                int r = ae_net_put(s->conn, &s->key, 0, s->mem, 0, PUT_LEN, s->n_posted,
                                   s->n_posted);

                if (r == AE_EAGAIN)
                        return;
                assert_int_equal(r, 0);
                s->n_posted++;
        }
}

static void greet(struct sleeper *s)
{
        struct ae_net_key key;

        assert_int_equal(ae_net_grant(s->conn, s->mem, PUT_LEN, PUT_LEN, &key), 0);
        assert_int_equal(ae_net_msg(s->conn, &key, sizeof(key)), 0);
}

static void on_msg(struct sleeper *s, const struct ae_net_event *event)
{
        if (!s->has_key) {
                assert_int_equal(event->len, sizeof(s->key));
                memcpy(&s->key, event->data, sizeof(s->key));
                s->has_key = true;
                s->n_hellos++;
                if (s->serves && !s->quiet)
                        assert_int_equal(ae_net_msg(s->conn, "ball", 4), 0);
                return;
        }
        assert_int_equal(event->len, 4);
        s->n_msgs++;
        if (!s->quiet && (s->n_msgs < ROUNDS || !s->serves))
                assert_int_equal(ae_net_msg(s->conn, "ball", 4), 0);
}

static void on_event(struct sleeper *s, const struct ae_net_event *event)
{
        switch (event->kind) {
        case AE_NET_EV_UP:
                s->conn = event->conn;
                greet(s);
                break;
        case AE_NET_EV_MSG:
                on_msg(s, event);
                break;
        case AE_NET_EV_NOTIFY:
                s->n_notified++;
                break;
        case AE_NET_EV_PUT_DONE:
                s->n_done++;
                break;
        case AE_NET_EV_DOWN:
                s->n_down++;
                break;
        case AE_NET_EV_WRITABLE:
                s->n_writable++;
                break;
        case AE_NET_EV_REFUSED:
                break;
        }
}

static void drain(struct sleeper *s)
{
        struct ae_net_event events[4];
        int n;

        do {
                n = ae_net_poll(s->net, events, 4);
                for (int i = 0; i < n; i++)
                        on_event(s, &events[i]);
                if (s->conn && !s->quiet)
                        post(s);
        } while (n > 0 || (s->sim && ae_net_arm(s->net) == 1));
        if (s->n_msgs >= ROUNDS && s->n_notified == PUTS && s->n_done == PUTS)
                s->finished = true;
}

/* --- in a uv loop --- */

static void on_idle(uv_idle_t *idle)
{
        drain(idle->data);
}

static void on_prepare(uv_prepare_t *prepare)
{
        struct sleeper *s = prepare->data;

        if (ae_net_arm(s->net) == 1)
                uv_idle_start(&s->busy, on_idle);
        else
                uv_idle_stop(&s->busy);
}

static void sleeper_open(struct sleeper *s, struct bed *bed, uint32_t node, uv_loop_t *loop)
{
        struct ae_net_options options = {
                .self = { BED_VERSION, node, 1, BED_CLUSTER },
                .loop = bed->sim ? (void *)bed->sim : loop,
                .wake = on_wake,
                .user = s,
        };
        char address[AE_NET_ADDR_MAX];

        bed_address(bed, address);
        if (!bed->sim && bed_is("shm"))
                snprintf(address, sizeof(address), "%s/s%u", bed->dir, node);
        options.listen = node == 2 ? address : NULL;
        s->sim = bed->sim;
        s->serves = node == 1;
        assert_int_equal(ae_net_open(bed->transport, &options, &s->net), 0);
        if (options.listen)
                assert_int_equal(ae_net_address(s->net, s->address), 0);
        s->area = area_new(2 * PUT_LEN);
        assert_int_equal(ae_net_map(s->net, s->area.base, s->area.len, s->area.fd, 0, &s->mem), 0);
        if (bed->sim) {
                assert_int_equal(ae_net_arm(s->net), 0);
                return;
        }
        uv_idle_init(loop, &s->busy);
        uv_prepare_init(loop, &s->arm);
        s->busy.data = s->arm.data = s;
        uv_prepare_start(&s->arm, on_prepare);
}

/* What came after the last poll and before arm() must not be slept over. */
static void check_woken(struct sleeper *s, uv_loop_t *loop)
{
        uint32_t n_wakes = s->n_wakes;
        uint64_t end_ns = bed_spent_ns() + AE_NS_PER_S;

        if (ae_net_arm(s->net) == 1)
                return;
        while (s->n_wakes == n_wakes) {
                uv_run(loop, UV_RUN_NOWAIT);
                if (bed_spent_ns() > end_ns)
                        fail_msg("nobody was woken");
        }
}

static void poll_both(struct sleeper *a, struct sleeper *b)
{
        for (int i = 0; i < 100; i++) {
                drain(a);
                drain(b);
        }
}

/* Back-pressure ends between the last poll and arm(). */
static void check_woken_writable(struct sleeper *a, struct sleeper *b, uv_loop_t *loop)
{
        uint32_t n_sent = b->n_msgs;

        while (ae_net_msg(a->conn, "ball", 4) == 0)
                n_sent++;
        drain(a);
        while (a->n_writable == 0) { /* in time what is on its way takes up no more */
                assert_int_equal(ae_net_msg(a->conn, "ball", 4), AE_EAGAIN);
                drain(b);
                check_woken(a, loop);
                drain(a);
        }
        poll_both(a, b);
        while (b->n_msgs < n_sent)
                poll_both(a, b);
        assert_int_equal(b->n_msgs, n_sent);
}

static void sleeper_close(struct sleeper *s)
{
        s->net = ae_net_close(s->net);
        area_free(&s->area);
        if (s->sim)
                return;
        uv_close((uv_handle_t *)&s->busy, NULL);
        uv_close((uv_handle_t *)&s->arm, NULL);
}

void what_came_before_arm(void **state)
{
        struct sleeper a = { .quiet = true }, b = { .quiet = true };
        struct ae_net_conn *conn;
        uv_loop_t loop;

        if (((struct bed *)*state)->sim)
                skip(); /* there wakes are events */
        assert_int_equal(uv_loop_init(&loop), 0);
        sleeper_open(&b, *state, 2, &loop);
        sleeper_open(&a, *state, 1, &loop);
        uv_prepare_stop(&a.arm);
        uv_prepare_stop(&b.arm);
        assert_int_equal(ae_net_connect(a.net, b.address, 2, &conn), 0);
        while (!a.has_key || !b.has_key)
                poll_both(&a, &b);
        for (uint32_t i = 0; i < 50; i++) {
                assert_int_equal(ae_net_msg(a.conn, "ball", 4), 0);
                check_woken(&b, &loop);
                poll_both(&a, &b);
                assert_int_equal(b.n_msgs, i + 1);
                assert_int_equal(ae_net_put(a.conn, &a.key, 0, a.mem, 0, 1000, 1, 1), 0);
                check_woken(&b, &loop);
                drain(&b);
                check_woken(&a, &loop); /* PUT_DONE */
                poll_both(&a, &b);
                assert_int_equal(b.n_notified, i + 1);
                assert_int_equal(a.n_done, i + 1);
        }
        check_woken_writable(&a, &b, &loop);
        ae_net_conn_close(a.conn);
        a.conn = NULL;
        check_woken(&b, &loop); /* DOWN */
        poll_both(&a, &b);
        assert_int_equal(b.n_down, 1);
        sleeper_close(&a);
        sleeper_close(&b);
        uv_run(&loop, UV_RUN_DEFAULT);
        assert_int_equal(uv_loop_close(&loop), 0);
}

/*
 * An owner that keeps to what arm() says: it polls once when it was woken or told that there is
 * more, and otherwise sleeps.
 */
static void doze(struct sleeper *s)
{
        static struct ae_net_event events[4096];
        int n;

        if (!s->armed && !s->woken) {
                s->armed = ae_net_arm(s->net) == 0;
                s->woken = !s->armed;
        }
        if (!s->woken)
                return;
        s->armed = s->woken = false;
        n = ae_net_poll(s->net, events, 4096);
        for (int i = 0; i < n; i++)
                on_event(s, &events[i]);
}

static void doze_until(struct sleeper *a, struct sleeper *b, uv_loop_t *loop, const uint32_t *count,
                       uint32_t n)
{
        uint64_t end_ns = bed_spent_ns() + 10 * AE_NS_PER_S;

        while (*count < n) {
                doze(a);
                doze(b);
                if (a->sim)
                        (void)ae_sim_step(a->sim); /* that nothing is left shows by the clock */
                else
                        uv_run(loop, UV_RUN_NOWAIT);
                if (bed_spent_ns() > end_ns)
                        fail_msg("of %u events %u came: nobody was woken for the rest", n, *count);
        }
}

void sleeps_only_when_all_is_done(void **state)
{
        struct sleeper a = { .quiet = true, .sleepy = true }, b = { .quiet = true, .sleepy = true };
        struct area area = area_new((uint64_t)80 << 20);
        struct ae_net_mem *from, *to;
        struct ae_net_conn *conn;
        struct ae_net_key key;
        uv_loop_t loop;
        uint32_t n = 0;

        assert_int_equal(uv_loop_init(&loop), 0);
        sleeper_open(&b, *state, 2, &loop);
        sleeper_open(&a, *state, 1, &loop);
        if (!a.sim) {
                uv_prepare_stop(&a.arm);
                uv_prepare_stop(&b.arm);
        }
        assert_int_equal(ae_net_connect(a.net, b.address, 2, &conn), 0);
        while (!a.has_key || !b.has_key)
                doze_until(&a, &b, &loop, a.has_key ? &b.n_hellos : &a.n_hellos, 1);
        /* More msgs than are queued at once, of which nothing but the first shows on the socket. */
        while (n < 5000 && ae_net_msg(a.conn, "ball", 4) == 0)
                n++;
        assert_true(n == 5000 || a.sim); /* that has a window of its own */
        a.armed = false;
        doze_until(&a, &b, &loop, &b.n_msgs, n);
        /* And more notifies. */
        for (n = 0; n < 5000; n++) {
                while (ae_net_put(a.conn, &a.key, 0, NULL, 0, 0, n, n) == AE_EAGAIN) {
                        a.armed = false;
                        doze_until(&a, &b, &loop, &a.n_writable, a.n_writable + 1);
                }
        }
        a.armed = false;
        doze_until(&a, &b, &loop, &b.n_notified, n);
        doze_until(&a, &b, &loop, &a.n_done, n);
        /* A put that is longer than what one round sends and receives. */
        assert_int_equal(ae_net_map(a.net, area.base, area.len, area.fd, 0, &from), 0);
        assert_int_equal(ae_net_map(b.net, area.base, area.len, area.fd, 0, &to), 0);
        assert_int_equal(ae_net_grant(b.conn, to, 0, area.len, &key), 0);
        assert_int_equal(ae_net_put(a.conn, &key, 0, from, 0, area.len, 1, 1), 0);
        a.armed = b.armed = false;
        doze_until(&a, &b, &loop, &b.n_notified, n + 1);
        doze_until(&a, &b, &loop, &a.n_done, n + 1);
        sleeper_close(&a);
        sleeper_close(&b);
        area_free(&area);
        uv_run(&loop, UV_RUN_DEFAULT);
        assert_int_equal(uv_loop_close(&loop), 0);
}

void wakes_from_the_loop_alone(void **state)
{
        struct sleeper a = { .quiet = true, .sleepy = true }, b = { .quiet = true, .sleepy = true };
        struct ae_net_conn *conn;
        struct ae_net_mem *mem;
        struct ae_net_key key;
        uint32_t n_wakes;
        uv_loop_t loop;

        if (((struct bed *)*state)->sim)
                skip(); /* there wakes are events */
        assert_int_equal(uv_loop_init(&loop), 0);
        sleeper_open(&b, *state, 2, &loop);
        sleeper_open(&a, *state, 1, &loop);
        uv_prepare_stop(&a.arm);
        uv_prepare_stop(&b.arm);
        assert_int_equal(ae_net_connect(a.net, b.address, 2, &conn), 0);
        while (!a.has_key || !b.has_key)
                poll_both(&a, &b);
        while (ae_net_arm(b.net) == 1)
                poll_both(&a, &b);
        n_wakes = b.n_wakes;
        for (uint32_t i = 0; i < 10; i++)
                assert_int_equal(ae_net_msg(a.conn, "ball", 4), 0);
        /* Whatever is called while events wait, nothing comes back from inside. */
        assert_int_equal(ae_net_msg(b.conn, "ball", 4), 0);
        assert_int_equal(ae_net_put(b.conn, &b.key, 0, b.mem, 0, 100, 1, 1), 0);
        assert_int_equal(ae_net_grant(b.conn, b.mem, 0, 100, &key), 0);
        assert_int_equal(ae_net_revoke(b.conn, &key), 0);
        assert_int_equal(ae_net_map(b.net, b.area.base, 100, -1, 0, &mem), 0);
        ae_net_unmap(mem);
        assert_int_equal(b.n_wakes, n_wakes);
        /* Once for an arm() that said 0, and not again before the next. */
        for (int i = 0; i < 200 && b.n_wakes == n_wakes; i++) {
                drain(&a);
                uv_run(&loop, UV_RUN_NOWAIT);
        }
        for (int i = 0; i < 20; i++) {
                assert_int_equal(ae_net_msg(a.conn, "ball", 4), 0);
                drain(&a);
                uv_run(&loop, UV_RUN_NOWAIT);
        }
        assert_int_equal(b.n_wakes, n_wakes + 1);
        poll_both(&a, &b);
        assert_int_equal(b.n_msgs, 30);
        sleeper_close(&a);
        sleeper_close(&b);
        uv_run(&loop, UV_RUN_DEFAULT);
        assert_int_equal(uv_loop_close(&loop), 0);
}

void ping_pong_by_wake(void **state)
{
        struct bed *bed = *state;
        struct sleeper a = { 0 }, b = { 0 };
        struct ae_net_conn *conn;
        uint32_t before;
        uv_loop_t loop;

        alarm(200); /* a lost wake-up ends the test here */
        assert_int_equal(uv_loop_init(&loop), 0);
        before = count_fds();
        sleeper_open(&b, bed, 2, &loop);
        sleeper_open(&a, bed, 1, &loop);
        assert_int_equal(ae_net_connect(a.net, b.address, 2, &conn), 0);
        while (!a.finished || !b.finished)
                assert_true(bed->sim ? ae_sim_step(bed->sim) : uv_run(&loop, UV_RUN_ONCE));
        assert_true(a.n_wakes + b.n_wakes > 0); /* in one thread they mostly find each other busy */
        assert_int_equal(a.n_down + b.n_down, 0);
        sleeper_close(&a);
        sleeper_close(&b);
        uv_run(&loop, UV_RUN_DEFAULT);
        assert_int_equal(count_fds(), before);
        assert_int_equal(uv_loop_close(&loop), 0);
        alarm(0);
}

/* --- two threads --- */

struct far_side {
        struct sleeper sleeper;
        uv_loop_t loop;
        atomic_uint *n_finished;
        pthread_barrier_t *start;
        const char *address; /* to connect to; NULL: listens */
        struct bed *bed;
};

static void on_tick(uv_timer_t *timer)
{
        (void)timer; /* the loop's turn is what matters */
}

static void *run_side(void *user)
{
        struct far_side *side = user;
        struct sleeper *s = &side->sleeper;
        struct ae_net_conn *conn;
        bool counted = false;
        uv_timer_t tick;

        uv_loop_init(&side->loop);
        sleeper_open(s, side->bed, side->address ? 1 : 2, &side->loop);
        pthread_barrier_wait(side->start);
        if (side->address)
                assert_int_equal(ae_net_connect(s->net, side->address, 2, &conn), 0);
        uv_timer_init(&side->loop, &tick);
        while (atomic_load(side->n_finished) < 2) {
                if (s->finished && !counted) {
                        counted = true;
                        atomic_fetch_add(side->n_finished, 1);
                        /* Only who has finished looks around by itself. */
                        uv_timer_start(&tick, on_tick, 1, 1);
                        continue;
                }
                uv_run(&side->loop, UV_RUN_ONCE);
        }
        pthread_barrier_wait(side->start);
        sleeper_close(s);
        uv_close((uv_handle_t *)&tick, NULL);
        uv_run(&side->loop, UV_RUN_DEFAULT);
        assert_int_equal(uv_loop_close(&side->loop), 0);
        return NULL;
}

void two_threads(void **state)
{
        struct bed *bed = *state;
        struct far_side side[2] = { { .bed = bed }, { .bed = bed } };
        pthread_barrier_t start;
        atomic_uint n_finished = 0;
        pthread_t thread[2];

        if (bed->sim)
                skip(); /* all of sim is one thread */
        alarm(200); /* a lost wake-up ends the test here */
        pthread_barrier_init(&start, NULL, 2);
        side[0].n_finished = side[1].n_finished = &n_finished;
        side[0].start = side[1].start = &start;
        side[1].address = side[0].sleeper.address; /* filled before the barrier */
        for (int i = 0; i < 2; i++)
                assert_int_equal(pthread_create(&thread[i], NULL, run_side, &side[i]), 0);
        for (int i = 0; i < 2; i++)
                pthread_join(thread[i], NULL);
        pthread_barrier_destroy(&start);
        assert_int_equal(side[0].sleeper.n_down + side[1].sleeper.n_down, 0);
        assert_true(side[1].sleeper.n_wakes > 10);
        alarm(0);
}
