/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The clock of the simulated network: a heap of events ordered by (time, number), slabs that events
 * and puts come from, the generator, timers, partitions and the death of endpoints. sim-net.c has
 * the endpoints, sim-conn.c the connections, sim-data.c what they carry. One thread.
 */
#include "proto/net/sim.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/clock.h"
#include "proto/base/status.h"
#include "proto/net/sim-priv.h"

#define SLAB 256
#define NO_MEMORY "the simulation is out of memory"

/* --- memory --- */

void *ae_sim_alloc(size_t len)
{
        void *memory = calloc(1, len);

        if (!memory) {
                fputs(NO_MEMORY "\n", stderr);
                abort();
        }
        return memory;
}

void *ae_sim_grow(void *array, size_t n, size_t size)
{
        size_t cap;

        if (n != 0 && (n < 16 || (n & (n - 1)) != 0))
                return array;
        cap = n ? n * 2 : 16;
        array = realloc(array, cap * size);
        if (!array) {
                fputs(NO_MEMORY "\n", stderr);
                abort();
        }
        return array;
}

static void *slab(struct ae_sim *sim, size_t size)
{
        void *block = ae_sim_alloc(SLAB * size);

        sim->slabs = ae_sim_grow(sim->slabs, sim->n_slabs, sizeof(*sim->slabs));
        sim->slabs[sim->n_slabs++] = block;
        return block;
}

static void event_put_back(struct ae_sim *sim, struct sim_event *event)
{
        event->seq = 0; /* a timer's handle no longer fits */
        event->next = sim->free_events;
        sim->free_events = event;
}

struct sim_event *ae_sim_event_new(struct ae_sim *sim, enum sim_kind kind, struct sim_conn *from,
                                   struct sim_conn *to)
{
        struct sim_event *event;

        if (!sim->free_events) {
                struct sim_event *block = slab(sim, sizeof(*block));

                for (size_t i = 0; i < SLAB; i++)
                        event_put_back(sim, &block[i]);
        }
        event = sim->free_events;
        sim->free_events = event->next;
        *event = (struct sim_event){ .kind = kind, .from = from, .to = to };
        if (from)
                ae_sim_conn_ref(from);
        if (to)
                ae_sim_conn_ref(to);
        return event;
}

static void event_free(struct ae_sim *sim, struct sim_event *event)
{
        if (event->kind == SIM_MSG && event->u.msg.buf)
                ae_sim_buf_free(sim, event->u.msg.buf);
        if (event->kind == SIM_PIECE || event->kind == SIM_PUT_DONE)
                ae_sim_put_unref(sim, event->u.put.put);
        if (event->kind == SIM_DOWN)
                free(event->u.down.text);
        if (event->from)
                ae_sim_conn_unref(event->from);
        if (event->to)
                ae_sim_conn_unref(event->to);
        event_put_back(sim, event);
}

struct sim_put *ae_sim_put_new(struct ae_sim *sim)
{
        struct sim_put *put;

        if (!sim->free_puts) {
                struct sim_put *block = slab(sim, sizeof(*block));

                for (size_t i = 0; i < SLAB; i++) {
                        block[i].next_free = sim->free_puts;
                        sim->free_puts = &block[i];
                }
        }
        put = sim->free_puts;
        sim->free_puts = put->next_free;
        *put = (struct sim_put){ 0 };
        ae_list_init(&put->link);
        return put;
}

void ae_sim_put_unref(struct ae_sim *sim, struct sim_put *put)
{
        assert(put->n_refs > 0);
        if (--put->n_refs)
                return;
        assert(ae_list_empty(&put->link));
        free(put->copy);
        put->copy = NULL;
        ae_sim_conn_unref(put->from);
        ae_sim_conn_unref(put->to);
        put->next_free = sim->free_puts;
        sim->free_puts = put;
}

struct sim_buf *ae_sim_buf_new(struct ae_sim *sim, size_t len)
{
        struct sim_buf *buf;
        uint32_t c = 0;

        while (c < SIM_BUF_CLASSES && ((size_t)64 << c) < len)
                c++;
        if (c < SIM_BUF_CLASSES && sim->free_bufs[c]) {
                buf = sim->free_bufs[c];
                sim->free_bufs[c] = buf->next;
                return buf;
        }
        buf = ae_sim_alloc(sizeof(*buf) + (c < SIM_BUF_CLASSES ? (size_t)64 << c : len));
        buf->size_class = c;
        return buf;
}

void ae_sim_buf_free(struct ae_sim *sim, struct sim_buf *buf)
{
        if (buf->size_class == SIM_BUF_CLASSES) {
                free(buf);
                return;
        }
        buf->next = sim->free_bufs[buf->size_class];
        sim->free_bufs[buf->size_class] = buf;
}

/* --- chance: xoshiro256** (Blackman and Vigna), seeded by splitmix64 --- */

static uint64_t rotl(uint64_t x, int k)
{
        return x << k | x >> (64 - k);
}

uint64_t ae_sim_random(struct ae_sim *sim)
{
        uint64_t *s = sim->random, result = rotl(s[1] * 5, 7) * 9, t = s[1] << 17;

        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = rotl(s[3], 45);
        return result;
}

static void seed_random(struct ae_sim *sim, uint64_t seed)
{
        for (size_t i = 0; i < AE_ARRAY_LEN(sim->random); i++) {
                uint64_t z = seed += UINT64_C(0x9e3779b97f4a7c15);

                z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
                z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
                sim->random[i] = z ^ z >> 31;
        }
}

bool ae_sim_chance(struct ae_sim *sim, uint32_t ppm)
{
        return ppm && ae_sim_random(sim) % 1000000 < ppm;
}

uint64_t ae_sim_latency(struct ae_sim *sim, uint64_t len)
{
        const struct ae_sim_params *p = &sim->params;
        uint64_t span = p->latency_max_ns - p->latency_min_ns;

        return p->latency_min_ns + ae_sim_random(sim) % (span + 1) + len * p->ns_per_kib / 1024;
}

/* --- the heap: four children a node, for fewer cache misses on the way down --- */

static bool before(const struct sim_heap_item *a, const struct sim_heap_item *b)
{
        return a->when != b->when ? a->when < b->when : a->seq < b->seq;
}

static void grow_heap(struct ae_sim *sim)
{
        sim->heap_cap = sim->heap_cap ? sim->heap_cap * 2 : 1024;
        sim->heap = realloc(sim->heap, sim->heap_cap * sizeof(*sim->heap));
        if (!sim->heap) {
                fputs(NO_MEMORY "\n", stderr);
                abort();
        }
}

void ae_sim_schedule(struct ae_sim *sim, struct sim_event *event, uint64_t when)
{
        struct sim_heap_item item;
        size_t i = sim->n_heap;

        assert(when >= sim->now);
        event->when = when;
        event->seq = ++sim->seq;
        item = (struct sim_heap_item){ when, event->seq, event };
        if (sim->n_heap == sim->heap_cap)
                grow_heap(sim);
        sim->n_heap++;
        while (i > 0) {
                size_t parent = (i - 1) / 4;

                if (!before(&item, &sim->heap[parent]))
                        break;
                sim->heap[i] = sim->heap[parent];
                i = parent;
        }
        sim->heap[i] = item;
}

static size_t least_child(const struct ae_sim *sim, size_t i)
{
        size_t best = i * 4 + 1, end = AE_MIN(i * 4 + 5, sim->n_heap);

        for (size_t c = best + 1; c < end; c++)
                if (before(&sim->heap[c], &sim->heap[best]))
                        best = c;
        return best;
}

static struct sim_event *heap_pop(struct ae_sim *sim)
{
        struct sim_event *event = sim->heap[0].event;
        struct sim_heap_item last = sim->heap[--sim->n_heap];
        size_t i = 0;

        while (i * 4 + 1 < sim->n_heap) {
                size_t child = least_child(sim, i);

                if (!before(&sim->heap[child], &last))
                        break;
                sim->heap[i] = sim->heap[child];
                i = child;
        }
        sim->heap[i] = last;
        return event;
}

/* --- who reaches whom --- */

static struct sim_pair *find_pair(const struct ae_sim *sim, uint32_t a, uint32_t b)
{
        for (uint32_t i = 0; i < sim->n_pairs; i++)
                if ((sim->pairs[i].a == a && sim->pairs[i].b == b) ||
                    (sim->pairs[i].a == b && sim->pairs[i].b == a))
                        return &sim->pairs[i];
        return NULL;
}

bool ae_sim_reachable(const struct ae_sim *sim, uint32_t a, uint32_t b)
{
        return sim->places[a].group == sim->places[b].group &&
               (!sim->n_pairs || !find_pair(sim, a, b));
}

/* Whether what goes from one end to the other cannot pass now. */
static bool blocked(const struct ae_sim *sim, const struct sim_event *event)
{
        return event->from && event->to &&
               !ae_sim_reachable(sim, event->from->index, event->to->index);
}

static void hold(struct ae_sim *sim, struct sim_event *event)
{
        event->next = NULL;
        *sim->held_end = event;
        sim->held_end = &event->next;
}

void ae_sim_schedule_list(struct ae_sim *sim, struct sim_event *first)
{
        while (first) {
                struct sim_event *next = first->next;

                ae_sim_schedule(sim, first, sim->now);
                first = next;
        }
}

/* Lets everything that was held back try again, in the order in which it was held. */
static void release(struct ae_sim *sim)
{
        struct sim_event *first = sim->held;

        sim->held = NULL;
        sim->held_end = &sim->held;
        ae_sim_schedule_list(sim, first);
}

static void cut_event(struct ae_sim *sim, enum sim_kind kind, uint32_t index, uint64_t epoch)
{
        struct sim_event *event = ae_sim_event_new(sim, kind, NULL, NULL);

        event->u.net.net = index;
        event->u.net.epoch = epoch;
        ae_sim_schedule(sim, event, sim->now + sim->params.cut_ns);
}

void ae_sim_partition(struct ae_net *base_a, struct ae_net *base_b)
{
        struct sim_net *a = sim_net_of(base_a), *b = sim_net_of(base_b);
        struct ae_sim *sim = a->sim;

        assert(a != b);
        if (find_pair(sim, a->index, b->index))
                return;
        sim->pairs = ae_sim_grow(sim->pairs, sim->n_pairs, sizeof(*sim->pairs));
        sim->pairs[sim->n_pairs++] = (struct sim_pair){ a->index, b->index, ++sim->epoch };
        cut_event(sim, SIM_CUT_PAIR, a->index, sim->epoch);
}

void ae_sim_heal(struct ae_net *base_a, struct ae_net *base_b)
{
        struct sim_net *a = sim_net_of(base_a), *b = sim_net_of(base_b);
        struct ae_sim *sim = a->sim;
        struct sim_pair *pair = find_pair(sim, a->index, b->index);

        if (!pair)
                return;
        /* The array grows at powers of two only, so shrinking it by one never loses room. */
        *pair = sim->pairs[--sim->n_pairs];
        release(sim);
}

void ae_sim_place(struct ae_net *base, uint32_t group)
{
        struct sim_net *net = sim_net_of(base);

        struct sim_place *place = &net->sim->places[net->index];

        if (place->group == group)
                return;
        place->group = group;
        place->epoch = ++net->sim->epoch;
        cut_event(net->sim, SIM_CUT, net->index, place->epoch);
        release(net->sim);
}

/* Breaks the connections of endpoint @index to @only (UINT32_MAX: all) that cannot be reached. */
static void cut_conns(struct ae_sim *sim, uint32_t index, uint32_t only)
{
        static const char text[] = "no answer: the network is cut";
        struct sim_net *net = sim->nets[index];
        struct sim_conn *conn;

        if (!net)
                return;
        ae_list_for_each(conn, &net->conns, link)
                if (conn->peer && (only == UINT32_MAX || conn->peer->index == only) &&
                    !ae_sim_reachable(sim, index, conn->peer->index))
                        ae_sim_break(sim, conn, AE_ELOST, text, text);
}

static void on_cut(struct ae_sim *sim, const struct sim_event *event)
{
        uint32_t index = event->u.net.net;

        if (sim->places[index].epoch != event->u.net.epoch)
                return;
        cut_conns(sim, index, UINT32_MAX);
        /* Its endpoint may be gone; what others still have with it lies at their side. */
        for (uint32_t i = 0; !sim->nets[index] && i < sim->n_nets; i++)
                cut_conns(sim, i, index);
}

static void on_cut_pair(struct ae_sim *sim, const struct sim_event *event)
{
        for (uint32_t i = 0; i < sim->n_pairs; i++) {
                struct sim_pair *pair = &sim->pairs[i];

                if (pair->epoch != event->u.net.epoch)
                        continue;
                cut_conns(sim, pair->a, pair->b);
                cut_conns(sim, pair->b, pair->a);
                return;
        }
}

void ae_sim_kill(struct ae_net *base)
{
        struct sim_net *net = sim_net_of(base);
        struct ae_sim *sim = net->sim;
        struct sim_conn *conn;

        if (net->killed)
                return;
        net->killed = true;
        net->armed = false;
        if (net->address != UINT64_MAX)
                sim->addresses[net->address] = NULL;
        ae_list_for_each(conn, &net->conns, link) {
                uint64_t when = sim->now + ae_sim_latency(sim, 0);

                if (conn->peer && conn->state <= SIM_UP)
                        ae_sim_tell_down(sim, conn->peer, conn, AE_ELOST, "the peer died",
                                         AE_MAX(conn->last_msg_at, when));
        }
}

/* --- running --- */

static void on_wake(struct ae_sim *sim, const struct sim_event *event)
{
        struct sim_net *net = sim->nets[event->u.net.net];

        if (net && !net->killed)
                net->options.wake(net->options.user);
}

/* True: the event was put off and is not to be freed. */
static bool run_event(struct ae_sim *sim, struct sim_event *event)
{
        switch (event->kind) {
        case SIM_TIMER:
                if (event->u.timer.fn)
                        event->u.timer.fn(event->u.timer.user);
                break;
        case SIM_WAKE:
                on_wake(sim, event);
                break;
        case SIM_SYN:
                ae_sim_on_syn(sim, event);
                break;
        case SIM_ACK:
                ae_sim_on_ack(sim, event);
                break;
        case SIM_MSG:
                return ae_sim_on_msg(sim, event);
        case SIM_PIECE:
                return ae_sim_on_piece(sim, event);
        case SIM_PUT_DONE:
                ae_sim_on_put_done(sim, event);
                break;
        case SIM_DOWN:
                ae_sim_on_down(sim, event);
                break;
        case SIM_TIMEOUT:
                ae_sim_on_timeout(sim, event);
                break;
        case SIM_CUT:
                on_cut(sim, event);
                break;
        case SIM_CUT_PAIR:
                on_cut_pair(sim, event);
                break;
        }
        return false;
}

bool ae_sim_step(struct ae_sim *sim)
{
        struct sim_event *event;

        if (!sim->n_heap)
                return false;
        event = heap_pop(sim);
        __builtin_prefetch(sim->heap[0].event); /* the next one, most likely; cold among millions */
        assert(event->when >= sim->now);
        sim->now = event->when;
        if (blocked(sim, event))
                hold(sim, event);
        else if (!run_event(sim, event))
                event_free(sim, event);
        return true;
}

void ae_sim_run(struct ae_sim *sim, uint64_t until_ns)
{
        while (sim->n_heap && sim->heap[0].when <= until_ns)
                ae_sim_step(sim);
        sim->now = AE_MAX(sim->now, until_ns);
}

void ae_sim_after(struct ae_sim *sim, uint64_t delay_ns, void (*fn)(void *user), void *user,
                  struct ae_sim_timer *ret_timer)
{
        struct sim_event *event = ae_sim_event_new(sim, SIM_TIMER, NULL, NULL);

        event->u.timer.fn = fn;
        event->u.timer.user = user;
        ae_sim_schedule(sim, event, sim->now + delay_ns);
        if (ret_timer)
                *ret_timer = (struct ae_sim_timer){ event, event->seq };
}

void ae_sim_cancel(struct ae_sim *sim, struct ae_sim_timer *timer)
{
        struct sim_event *event = timer->event;

        (void)sim;
        if (event && event->seq == timer->seq)
                event->u.timer.fn = NULL;
        timer->event = NULL;
}

uint64_t ae_sim_now(const struct ae_sim *sim)
{
        return sim->now;
}

int ae_sim_new(uint64_t seed, const struct ae_sim_params *params, struct ae_sim **ret_sim)
{
        struct ae_sim *sim = calloc(1, sizeof(*sim));

        if (!sim)
                return ae_fail(AE_ENOMEM, "cannot make a simulated network: out of memory");
        if (params)
                sim->params = *params;
        if (!sim->params.latency_min_ns && !sim->params.latency_max_ns) {
                sim->params.latency_min_ns = 5000;
                sim->params.latency_max_ns = 50000;
        }
        if (!sim->params.pieces_max)
                sim->params.pieces_max = 4;
        if (!sim->params.cut_ns)
                sim->params.cut_ns = 10 * AE_NS_PER_S;
        assert(sim->params.latency_min_ns <= sim->params.latency_max_ns);
        assert(sim->params.pieces_max <= SIM_PIECES_MAX);
        sim->held_end = &sim->held;
        seed_random(sim, seed);
        *ret_sim = sim;
        return 0;
}

struct ae_sim *ae_sim_free(struct ae_sim *sim)
{
        if (!sim)
                return NULL;
        for (uint32_t i = 0; i < sim->n_nets; i++)
                assert(!sim->nets[i]);
        release(sim);
        while (sim->n_heap)
                event_free(sim, heap_pop(sim));
        for (size_t c = 0; c < SIM_BUF_CLASSES; c++) {
                while (sim->free_bufs[c]) {
                        struct sim_buf *buf = sim->free_bufs[c];

                        sim->free_bufs[c] = buf->next;
                        free(buf);
                }
        }
        for (size_t i = 0; i < sim->n_slabs; i++)
                free(sim->slabs[i]);
        free(sim->slabs);
        free(sim->heap);
        free(sim->nets);
        free(sim->places);
        free(sim->addresses);
        free(sim->pairs);
        free(sim);
        return NULL;
}
