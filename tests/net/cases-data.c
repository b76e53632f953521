/* SPDX-License-Identifier: Apache-2.0 */
/* Conformance: messages and puts of all sizes, both ways, with back-pressure. */
#include <string.h>

#include "tests/net/conformance.h"

#define N_PUTS 1500
#define SLOT 65536
#define N_SLOTS 64

void msgs_of_all_sizes(void **state)
{
        static const size_t sizes[] = { 0, 1, 7, 8, 9, 4096, 65535, 65536, 1000000,
                                        AE_NET_MSG_MAX - 1, AE_NET_MSG_MAX, 0, 3 };
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *conn = bed_connect(a, b, NULL);
        struct area area = area_private(AE_NET_MSG_MAX + 1);
        uint64_t total = 0;

        for (uint32_t i = 0; i < AE_ARRAY_LEN(sizes); i++) {
                area_fill(&area, 0, sizes[i], i);
                while (ae_net_msg(conn, area.base, sizes[i]) == AE_EAGAIN)
                        bed_wait(a, AE_NET_EV_WRITABLE, a->n[AE_NET_EV_WRITABLE] + 1);
                memset(area.base, 0, sizes[i]); /* the bytes were copied */
                total += sizes[i];
        }
        bed_wait(b, AE_NET_EV_MSG, AE_ARRAY_LEN(sizes));
        for (uint32_t i = 0; i < AE_ARRAY_LEN(sizes); i++) {
                struct record *record = bed_record(b, AE_NET_EV_MSG, i);
                struct area got = { .base = record->data, .len = record->event.len };

                assert_int_equal(record->event.len, sizes[i]);
                assert_true(area_has(&got, 0, sizes[i], i, 0));
        }
        assert_int_equal(ae_net_msg(conn, area.base, AE_NET_MSG_MAX + 1), AE_EOVERFLOW);
        assert_int_equal(bed_stats(b).msg_bytes_received, total);
        assert_int_equal(bed_stats(a).msg_bytes_sent, total);
        assert_int_equal(bed_stats(a).msgs_sent, AE_ARRAY_LEN(sizes));
        area_free(&area);
}

/* Expects its msgs to carry 0, 1, 2, … and to be as long as that says. */
static size_t length_of(uint32_t i)
{
        return sizeof(i) + (i * 37) % 3000;
}

static void expect_next(struct peer *peer, const struct ae_net_event *event)
{
        uint32_t *next = peer->user, got;

        if (event->kind != AE_NET_EV_MSG)
                return;
        memcpy(&got, event->data, sizeof(got));
        assert_int_equal(got, *next);
        assert_int_equal(event->len, length_of(got));
        (*next)++;
}

void msgs_in_order(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        uint32_t at_a = 0, at_b = 0;
        char buf[4096] = { 0 };

        a->muted = b->muted = true;
        a->on_event = b->on_event = expect_next;
        a->user = &at_a;
        b->user = &at_b;
        for (uint32_t i = 0; i < 3000; i++) {
                memcpy(buf, &i, sizeof(i));
                while (ae_net_msg(conn, buf, length_of(i)) == AE_EAGAIN)
                        bed_turn(*state);
                while (ae_net_msg(far, buf, length_of(i)) == AE_EAGAIN)
                        bed_turn(*state);
                if (i % 100 == 0)
                        bed_turn(*state);
        }
        bed_wait(a, AE_NET_EV_MSG, 3000);
        bed_wait(b, AE_NET_EV_MSG, 3000);
        assert_int_equal(at_a, 3000);
        assert_int_equal(at_b, 3000);
}

void msgs_back_pressure(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *conn = bed_connect(a, b, NULL);
        uint32_t n_sent = 0, n_got = 0, n_full = 0;
        char buf[4096] = { 0 };

        b->muted = true;
        b->on_event = expect_next;
        b->user = &n_got;
        while (n_full < 3) {
                uint32_t n_writable = a->n[AE_NET_EV_WRITABLE];
                int r = 0;

                b->still = true;
                while (r == 0) {
                        memcpy(buf, &n_sent, sizeof(n_sent));
                        r = ae_net_msg(conn, buf, length_of(n_sent));
                        n_sent += r == 0;
                        assert_true(n_sent < 1000000);
                        if (n_sent % 64 == 0)
                                bed_turn(*state);
                }
                assert_int_equal(r, AE_EAGAIN);
                n_full++;
                for (int i = 0; i < 50; i++)
                        bed_turn(*state);
                b->still = false;
                bed_wait(a, AE_NET_EV_WRITABLE, n_writable + 1);
                assert_int_equal(ae_net_msg(conn, memcpy(buf, &n_sent, sizeof(n_sent)),
                                            length_of(n_sent)), 0);
                n_sent++;
        }
        bed_wait(b, AE_NET_EV_MSG, n_sent);
        assert_int_equal(n_got, n_sent);
        bed_settle(*state);
        assert_int_equal(b->n[AE_NET_EV_MSG], n_sent);
}

void msg_stays_until_next_poll(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area area = area_private(65536);
        struct ae_net_event events[16];
        uint32_t n_got = 0;

        b->still = true;
        for (uint32_t i = 0; i < 100; i++) {
                area_fill(&area, 0, 60000, i);
                while (ae_net_msg(conn, area.base, 60000 - i) == AE_EAGAIN) {
                        b->still = false;
                        n_got = b->n[AE_NET_EV_MSG];
                        bed_wait(a, AE_NET_EV_WRITABLE, a->n[AE_NET_EV_WRITABLE] + 1);
                        b->still = true;
                }
        }
        n_got = b->n[AE_NET_EV_MSG];
        while (n_got < 100) {
                int n = ae_net_poll(b->net, events, 16);

                if (n == 0)
                        bed_turn(*state);
                assert_int_equal(ae_net_msg(far, area.base, 100), 0);
                for (int i = 0; i < n; i++, n_got++) {
                        struct area got = { .base = (char *)(uintptr_t)events[i].data,
                                            .len = events[i].len };

                        assert_int_equal(events[i].kind, AE_NET_EV_MSG);
                        assert_int_equal(got.len, 60000 - n_got);
                        assert_true(area_has(&got, 0, got.len, n_got, 0));
                }
        }
        area_free(&area);
}

static void put_64_mib(struct bed *bed, struct area source)
{
        struct peer *a = bed_open(bed, 1), *b = bed_open(bed, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        uint64_t len = 64 << 20, edge = 3 * 4096 + 13;
        struct area target = area_new(len + 2 * edge);
        struct ae_net_mem *to = area_map(b, &target), *from = area_map(a, &source);
        struct ae_net_event *event;
        struct ae_net_key key;

        memset(target.base, 0x5a, target.len);
        area_fill(&source, 0, source.len, 77);
        assert_int_equal(ae_net_grant(far, to, edge, len, &key), 0);
        assert_int_equal(ae_net_put(conn, &key, 5, from, 4099, len - 6, UINT64_MAX, 42), 0);
        bed_wait(b, AE_NET_EV_NOTIFY, 1);
        assert_true(area_has(&target, edge + 5, len - 6, 77, 4099));
        for (uint64_t i = 0; i < edge + 5; i++)
                assert_int_equal(target.base[i], 0x5a);
        for (uint64_t i = edge + len - 1; i < target.len; i++)
                assert_int_equal(target.base[i], 0x5a);
        bed_wait(a, AE_NET_EV_PUT_DONE, 1);
        event = &bed_record(b, AE_NET_EV_NOTIFY, 0)->event;
        assert_ptr_equal(event->mem, to);
        assert_ptr_equal(event->conn, far);
        assert_int_equal(event->off, edge + 5);
        assert_int_equal(event->len, len - 6);
        assert_int_equal(event->note, UINT64_MAX);
        event = &bed_record(a, AE_NET_EV_PUT_DONE, 0)->event;
        assert_int_equal(event->cookie, 42);
        assert_int_equal(event->status, 0);
        bed_settle(bed);
        assert_int_equal(a->n[AE_NET_EV_PUT_DONE], 1);
        assert_int_equal(b->n[AE_NET_EV_NOTIFY], 1);
        assert_int_equal(bed_stats(b).put_bytes_received, len - 6);
        assert_int_equal(bed_stats(a).put_bytes_sent, len - 6);
        bed_close(a);
        bed_close(b);
        area_free(&target);
        area_free(&source);
}

void put_of_64_mib(void **state)
{
        put_64_mib(*state, area_new((64 << 20) + 4099));
}

void put_of_64_mib_private(void **state)
{
        put_64_mib(*state, area_private((64 << 20) + 4099));
}

void put_of_nothing(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area target = area_new(4096), source = area_new(4096);
        struct ae_net_mem *to = area_map(b, &target), *from = area_map(a, &source);
        struct ae_net_key key, empty;

        area_fill(&source, 0, 4096, 1);
        assert_int_equal(ae_net_grant(far, to, 0, 4096, &key), 0);
        assert_int_equal(ae_net_grant(far, to, 4096, 0, &empty), 0);
        assert_int_equal(ae_net_put(conn, &key, 4096, from, 4096, 0, 11, 21), 0);
        assert_int_equal(ae_net_put(conn, &empty, 0, NULL, 0, 0, 12, 22), 0);
        bed_wait(b, AE_NET_EV_NOTIFY, 2);
        bed_wait(a, AE_NET_EV_PUT_DONE, 2);
        for (uint32_t i = 0; i < 2; i++) {
                struct ae_net_event *event = &bed_record(b, AE_NET_EV_NOTIFY, i)->event;

                assert_int_equal(event->len, 0);
                assert_int_equal(event->off, 4096);
                assert_in_range(event->note, 11, 12);
        }
        for (size_t i = 0; i < 4096; i++)
                assert_int_equal(target.base[i], 0);
        bed_close(a);
        bed_close(b);
        area_free(&target);
        area_free(&source);
}

/* One side of puts_both_ways: puts into the other's slots, and checks its own. */
struct side {
        struct peer *peer;
        struct ae_net_conn *conn;
        struct area source, target, plain;
        struct ae_net_mem *from, *to, *from_plain;
        struct ae_net_key key; /* the other's */
        bool busy[N_SLOTS];    /* at the other end, until it has seen the NOTIFY */
        bool in_use[N_SLOTS]; /* of the source, until PUT_DONE */
        uint32_t n_posted, n_checked, n_done;
        struct side *other;
};

static uint64_t len_of(uint32_t i)
{
        if (i % 50 == 0)
                return SLOT; /* large ones among many small */
        return (i * UINT64_C(2654435761)) % (i % 3 ? 300 : 20000);
}

static void on_side(struct peer *peer, const struct ae_net_event *event)
{
        struct side *side = peer->user;

        if (event->kind == AE_NET_EV_PUT_DONE) {
                assert_int_equal(event->status, 0);
                side->in_use[event->cookie % N_SLOTS] = false;
                side->n_done++;
                return;
        }
        if (event->kind != AE_NET_EV_NOTIFY)
                return;
        assert_int_equal(event->len, len_of((uint32_t)event->note));
        assert_true(area_has(&side->target, event->off, event->len, event->note, 0));
        assert_true(side->other->busy[event->off / SLOT]);
        side->other->busy[event->off / SLOT] = false;
        side->n_checked++;
}

static bool post_one(struct side *side)
{
        uint32_t i = side->n_posted, slot = 0;
        uint64_t len = len_of(i);
        bool plain = i % 5 == 0;
        int r;

        while (slot < N_SLOTS && side->busy[slot])
                slot++;
        if (slot == N_SLOTS || side->in_use[i % N_SLOTS])
                return false; /* its place at the other end, or its source, is in use */
        area_fill(plain ? &side->plain : &side->source, (uint64_t)(i % N_SLOTS) * SLOT, len, i);
        r = ae_net_put(side->conn, &side->key, (uint64_t)slot * SLOT,
                       plain ? side->from_plain : side->from, (uint64_t)(i % N_SLOTS) * SLOT, len,
                       i, i);
        if (r == AE_EAGAIN)
                return false;
        assert_int_equal(r, 0);
        side->busy[slot] = side->in_use[i % N_SLOTS] = true;
        side->n_posted++;
        return true;
}

static void side_open(struct side *side, struct side *other, struct peer *peer,
                      struct ae_net_conn *conn)
{
        *side = (struct side){ .peer = peer, .conn = conn, .other = other };
        side->source = area_new((uint64_t)N_SLOTS * SLOT);
        side->plain = area_private((uint64_t)N_SLOTS * SLOT);
        side->target = area_new((uint64_t)N_SLOTS * SLOT);
        side->from = area_map(peer, &side->source);
        side->from_plain = area_map(peer, &side->plain);
        side->to = area_map(peer, &side->target);
        peer->muted = true;
        peer->on_event = on_side;
        peer->user = side;
        assert_int_equal(ae_net_grant(conn, side->to, 0, side->target.len, &other->key), 0);
}

static void side_close(struct side *side)
{
        bed_close(side->peer);
        area_free(&side->source);
        area_free(&side->plain);
        area_free(&side->target);
}

void puts_both_ways(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct ae_net_key key;
        struct side s[2];

        side_open(&s[0], &s[1], a, conn);
        key = s[1].key;
        side_open(&s[1], &s[0], b, far);
        s[1].key = key;
        while (s[0].n_checked < N_PUTS || s[1].n_checked < N_PUTS) {
                for (int i = 0; i < 2; i++)
                        while (s[i].n_posted < N_PUTS && post_one(&s[i]))
                                continue;
                bed_turn(*state);
        }
        bed_wait(a, AE_NET_EV_PUT_DONE, N_PUTS);
        bed_wait(b, AE_NET_EV_PUT_DONE, N_PUTS);
        bed_settle(*state);
        assert_int_equal(s[0].n_done, N_PUTS);
        assert_int_equal(s[1].n_done, N_PUTS);
        assert_int_equal(a->n[AE_NET_EV_NOTIFY], N_PUTS);
        assert_int_equal(b->n[AE_NET_EV_NOTIFY], N_PUTS);
        side_close(&s[0]);
        side_close(&s[1]);
}

void puts_back_pressure(void **state)
{
        struct ae_net_options options = { .max_in_flight = 4 << 20 };
        struct peer *a = bed_open_with(*state, 1, &options), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area area = area_new(1 << 20);
        struct ae_net_mem *to = area_map(b, &area), *from = area_map(a, &area);
        uint32_t n_full = 0, n = 0;
        struct ae_net_key key;

        assert_int_equal(ae_net_grant(far, to, 0, area.len, &key), 0);
        a->muted = b->muted = true;
        b->still = true;
        while (n_full < 5) {
                uint32_t n_writable = a->n[AE_NET_EV_WRITABLE];
                int r = ae_net_put(conn, &key, 0, from, 0, area.len, n, n);

                if (r == 0) {
                        n++;
                        assert_true(n < 1000);
                        continue;
                }
                assert_int_equal(r, AE_EAGAIN);
                n_full++;
                for (int i = 0; i < 100; i++)
                        bed_turn(*state);
                assert_true(n - a->n[AE_NET_EV_PUT_DONE] <= 4);
                b->still = false;
                bed_wait(a, AE_NET_EV_WRITABLE, n_writable + 1);
                b->still = true;
                assert_int_equal(ae_net_put(conn, &key, 0, from, 0, area.len, n, n), 0);
                n++;
        }
        b->still = false;
        bed_wait(b, AE_NET_EV_NOTIFY, n);
        bed_wait(a, AE_NET_EV_PUT_DONE, n);
        bed_settle(*state);
        assert_int_equal(b->n[AE_NET_EV_NOTIFY], n);
        assert_int_equal(a->n[AE_NET_EV_PUT_DONE], n);
        bed_close(a);
        bed_close(b);
        area_free(&area);
}

/* Sends msgs and puts until both are turned away, and again only after WRITABLE. */
struct filler {
        struct ae_net_conn *conn;
        struct ae_net_key key;
        struct ae_net_mem *from;
        char *msg;
        bool msg_full, put_full;
        uint32_t n_msgs, n_puts;
};

static void fill_up(struct filler *f)
{
        int r = 0;

        while (!f->put_full && f->n_puts < 300) {
                r = ae_net_put(f->conn, &f->key, 0, f->from, 0, 1 << 20, f->n_puts, f->n_puts);
                f->put_full = r == AE_EAGAIN;
                f->n_puts += r == 0;
                assert_true(r == 0 || r == AE_EAGAIN);
        }
        while (!f->msg_full && f->n_msgs < 100) {
                r = ae_net_msg(f->conn, f->msg, AE_NET_MSG_MAX);
                f->msg_full = r == AE_EAGAIN;
                f->n_msgs += r == 0;
                assert_true(r == 0 || r == AE_EAGAIN);
        }
}

static void on_writable(struct peer *peer, const struct ae_net_event *event)
{
        struct filler *f = peer->user;

        if (event->kind != AE_NET_EV_WRITABLE)
                return;
        f->msg_full = f->put_full = false;
        fill_up(f);
}

void msgs_and_puts_back_pressure(void **state)
{
        struct ae_net_options options = { .max_in_flight = 4 << 20 };
        struct peer *a = bed_open_with(*state, 1, &options), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area area = area_new(1 << 20);
        struct ae_net_mem *to = area_map(b, &area);
        struct filler f = { .conn = conn, .from = area_map(a, &area), .msg = area.base };

        assert_int_equal(ae_net_grant(far, to, 0, area.len, &f.key), 0);
        a->muted = b->muted = true;
        a->on_event = on_writable;
        a->user = &f;
        b->still = true;
        fill_up(&f);
        assert_true(f.msg_full && f.put_full);
        bed_settle(*state);
        b->still = false;
        bed_wait(b, AE_NET_EV_MSG, 100);
        bed_wait(b, AE_NET_EV_NOTIFY, 300);
        bed_wait(a, AE_NET_EV_PUT_DONE, 300);
        bed_close(a);
        bed_close(b);
        area_free(&area);
}

void any_number_of_streams(void **state)
{
        static const uint32_t counts[] = { 1, 3, 8 };
        struct peer *b = bed_open(*state, 9);
        struct area source = area_new(5 << 20), target = area_new(5 << 20);
        struct ae_net_mem *to = area_map(b, &target);

        area_fill(&source, 0, source.len, 3);
        for (uint32_t i = 0; i < AE_ARRAY_LEN(counts); i++) {
                struct ae_net_options options = { .streams = counts[i] };
                struct peer *a = bed_open_with(*state, i, &options);
                struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
                struct ae_net_mem *from = area_map(a, &source);
                struct ae_net_key key;

                memset(target.base, 0, target.len);
                assert_int_equal(ae_net_grant(far, to, 0, target.len, &key), 0);
                for (uint32_t j = 0; j < 4; j++)
                        bed_put(a, conn, &key, j << 20, from, j << 20, (2 << 20) - 1, j, j);
                bed_wait(b, AE_NET_EV_NOTIFY, 4 * (i + 1));
                bed_wait(a, AE_NET_EV_PUT_DONE, 4);
                assert_true(area_has(&target, 0, target.len - 1, 3, 0));
                assert_int_equal(target.base[target.len - 1], 0);
        }
        for (uint32_t i = 0; i < ((struct bed *)*state)->n_peers; i++)
                bed_close(&((struct bed *)*state)->peers[i]);
        area_free(&source);
        area_free(&target);
}

void put_larger_than_in_flight(void **state)
{
        struct ae_net_options options = { .max_in_flight = 4096 };
        struct peer *a = bed_open_with(*state, 1, &options), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area area = area_new(32 << 20);
        struct ae_net_mem *to = area_map(b, &area), *from = area_map(a, &area);
        struct ae_net_key key;

        assert_int_equal(ae_net_grant(far, to, 0, area.len, &key), 0);
        for (uint32_t i = 0; i < 3; i++)
                bed_put(a, conn, &key, 0, from, 0, area.len, i, i);
        bed_wait(b, AE_NET_EV_NOTIFY, 3);
        bed_wait(a, AE_NET_EV_PUT_DONE, 3);
        bed_close(a);
        bed_close(b);
        area_free(&area);
}

void put_source_checked(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area area = area_new(4096);
        struct ae_net_mem *to = area_map(b, &area), *from = area_map(a, &area), *mem;
        struct ae_net_key key;

        assert_int_equal(ae_net_grant(far, to, 0, 4096, &key), 0);
        assert_int_equal(ae_net_grant(far, to, 1, 4096, &key), AE_EINVAL);
        assert_int_equal(ae_net_grant(far, to, UINT64_MAX, 2, &key), AE_EINVAL);
        assert_int_equal(ae_net_put(conn, &key, 0, from, 1, 4096, 0, 0), AE_EINVAL);
        assert_int_equal(ae_net_put(conn, &key, 0, from, UINT64_MAX, 2, 0, 0), AE_EINVAL);
        assert_int_equal(ae_net_put(conn, &key, 0, NULL, 0, 1, 0, 0), AE_EINVAL);
        assert_int_equal(ae_net_put(conn, &key, 0, to, 0, 1, 0, 0), AE_EINVAL); /* not its own */
        assert_int_equal(ae_net_put(conn, &key, UINT64_MAX, from, 0, 1, 0, 0), AE_EINVAL);
        assert_int_equal(ae_net_put(conn, &key, 0, from, 0, AE_NET_PUT_MAX + 1, 0, 0), AE_EINVAL);
        assert_int_equal(ae_net_map(a->net, NULL, 10, -1, 0, &mem), AE_EINVAL);
        assert_int_equal(ae_net_map(a->net, area.base, 0, -1, 0, &mem), AE_EINVAL);
        if (bed_is("shm")) /* a file that could shrink would kill who reads it */
                assert_int_equal(ae_net_map(a->net, area.base, 4096, 0, 0, &mem), AE_EINVAL);
        bed_settle(*state);
        assert_int_equal(a->n[AE_NET_EV_PUT_DONE] + b->n[AE_NET_EV_DOWN], 0);
        bed_close(a);
        bed_close(b);
        area_free(&area);
}

void ranges_come_and_go(void **state)
{
        struct peer *a = bed_open(*state, 1), *b = bed_open(*state, 2);
        struct ae_net_conn *far, *conn = bed_connect(a, b, &far);
        struct area target = area_new(65536);
        struct ae_net_mem *to = area_map(b, &target);
        struct ae_net_key key;

        assert_int_equal(ae_net_grant(far, to, 0, target.len, &key), 0);
        for (uint32_t i = 0; i < 50; i++) {
                struct area source = area_new(65536);
                struct ae_net_mem *from = area_map(a, &source);

                area_fill(&source, 0, source.len, i);
                bed_put(a, conn, &key, 0, from, 0, source.len, i, i);
                bed_wait(a, AE_NET_EV_PUT_DONE, i + 1);
                ae_net_unmap(from);
                area_free(&source);
                bed_wait(b, AE_NET_EV_NOTIFY, i + 1);
                assert_true(area_has(&target, 0, target.len, i, 0));
        }
        assert_int_equal(ae_net_revoke(far, &key), 0);
        ae_net_unmap(to);
        bed_settle(*state);
        assert_int_equal(a->n[AE_NET_EV_DOWN] + b->n[AE_NET_EV_DOWN], 0);
        bed_close(a);
        bed_close(b);
        area_free(&target);
}
