/* SPDX-License-Identifier: Apache-2.0 */
/* Conformance: grants that are revoked, and puts that could never have been legal. */
#include <string.h>

#include "tests/net/conformance.h"

#define LEN ((uint64_t)64 << 20)

/* Two peers, a range at each end, and a grant of b's to a. */
struct pair {
        struct peer *a, *b;
        struct ae_net_conn *conn, *far;
        struct area source, target;
        struct ae_net_mem *from, *to;
        struct ae_net_key key;
};

static void pair_open(struct pair *p, struct bed *bed, struct area source, uint64_t len)
{
        *p = (struct pair){ .a = bed_open(bed, 1), .b = bed_open(bed, 2), .source = source };
        p->conn = bed_connect(p->a, p->b, &p->far);
        p->target = area_new(len);
        p->from = area_map(p->a, &p->source);
        p->to = area_map(p->b, &p->target);
        assert_int_equal(ae_net_grant(p->far, p->to, 0, len, &p->key), 0);
}

static void pair_close(struct pair *p)
{
        bed_close(p->a);
        bed_close(p->b);
        area_free(&p->source);
        area_free(&p->target);
}

/* The connection still carries a put, a small one. */
static void check_alive(struct pair *p)
{
        uint32_t n = p->b->n[AE_NET_EV_NOTIFY], n_done = p->a->n[AE_NET_EV_PUT_DONE];
        struct ae_net_key key;

        assert_int_equal(ae_net_grant(p->far, p->to, 100, 100, &key), 0);
        area_fill(&p->source, 0, 100, 5);
        bed_put(p->a, p->conn, &key, 0, p->from, 0, 100, 99, 99);
        bed_wait(p->b, AE_NET_EV_NOTIFY, n + 1);
        bed_wait(p->a, AE_NET_EV_PUT_DONE, n_done + 1);
        assert_int_equal(bed_record(p->b, AE_NET_EV_NOTIFY, n)->event.note, 99);
        assert_true(area_has(&p->target, 100, 100, 5, 0));
        assert_int_equal(p->a->n[AE_NET_EV_DOWN] + p->b->n[AE_NET_EV_DOWN], 0);
}

void revoked_before_put(void **state)
{
        struct pair p;

        pair_open(&p, *state, area_new(4096), 4096);
        assert_int_equal(ae_net_revoke(p.far, &p.key), 0);
        assert_int_equal(ae_net_revoke(p.far, &p.key), 0); /* twice is fine */
        area_fill(&p.source, 0, 4096, 1);
        for (uint32_t i = 0; i < 10; i++)
                bed_put(p.a, p.conn, &p.key, 0, p.from, 0, i ? 4096 : 0, i, i);
        bed_wait(p.a, AE_NET_EV_PUT_DONE, 10);
        check_alive(&p);
        bed_settle(*state);
        assert_int_equal(p.b->n[AE_NET_EV_NOTIFY], 1);
        assert_int_equal(bed_stats(p.b).late_puts, 10);
        assert_int_equal(bed_stats(p.b).late_put_bytes, 9 * 4096);
        for (size_t i = 0; i < 100; i++)
                assert_int_equal(p.target.base[i], 0);
        pair_close(&p);
}

static void revoke_midway(struct bed *bed, struct area source)
{
        struct ae_net_stats stats;
        struct area copy = area_private(LEN);
        struct pair p;

        pair_open(&p, bed, source, LEN);
        memset(p.source.base, 0x77, LEN);
        bed->n_steps = 1; /* piece by piece */
        assert_int_equal(ae_net_put(p.conn, &p.key, 0, p.from, 0, LEN, 1, 1), 0);
        while (bed_stats(p.b).put_bytes_received == 0)
                bed_turn(bed);
        stats = bed_stats(p.b);
        assert_true(stats.put_bytes_received < LEN);
        assert_int_equal(p.b->n[AE_NET_EV_NOTIFY], 0);
        assert_int_equal(ae_net_revoke(p.far, &p.key), 0);
        memcpy(copy.base, p.target.base, LEN);
        bed_wait(p.a, AE_NET_EV_PUT_DONE, 1);
        while (bed_stats(p.b).late_puts == 0)
                bed_turn(bed);
        assert_memory_equal(copy.base, p.target.base, LEN);
        assert_int_equal(bed_stats(p.b).put_bytes_received, stats.put_bytes_received);
        assert_int_equal(bed_stats(p.b).late_put_bytes, LEN - stats.put_bytes_received);
        assert_int_equal(bed_record(p.a, AE_NET_EV_PUT_DONE, 0)->event.status, 0);
        check_alive(&p);
        assert_int_equal(bed_stats(p.b).late_puts, 1);
        assert_int_equal(p.b->n[AE_NET_EV_NOTIFY], 1);
        pair_close(&p);
        area_free(&copy);
}

void revoked_during_put(void **state)
{
        revoke_midway(*state, area_new(LEN));
}

void revoked_during_private_put(void **state)
{
        revoke_midway(*state, area_private(LEN));
}

void revoked_before_notify_is_handed_out(void **state)
{
        struct ae_net_event event;
        struct pair p;

        pair_open(&p, *state, area_new(4096), 4096);
        for (uint32_t i = 0; i < 20; i++)
                bed_put(p.a, p.conn, &p.key, 0, p.from, 0, 64, i, i);
        p.b->still = true;
        bed_wait(p.a, AE_NET_EV_PUT_DONE, bed_is("shm") ? 0 : 20);
        while (ae_net_poll(p.b->net, &event, 1) == 0)
                bed_turn(*state);
        assert_int_equal(event.kind, AE_NET_EV_NOTIFY);
        assert_int_equal(ae_net_revoke(p.far, &p.key), 0);
        ae_net_unmap(p.to); /* nothing refers to it any more */
        p.b->still = false;
        while (bed_stats(p.b).late_puts < 19)
                bed_turn(*state);
        bed_wait(p.a, AE_NET_EV_PUT_DONE, 20);
        bed_settle(*state);
        assert_int_equal(p.b->n[AE_NET_EV_NOTIFY], 0);
        assert_int_equal(bed_stats(p.b).late_puts, 19);
        assert_int_equal(bed_stats(p.b).puts_received, 1);
        pair_close(&p);
}

void slots_are_used_again(void **state)
{
        struct ae_net_key keys[300], old;
        struct pair p;

        pair_open(&p, *state, area_new(4096), 4096);
        old = p.key;
        for (uint32_t round = 0; round < 20; round++) {
                for (uint32_t i = 0; i < 300; i++)
                        assert_int_equal(ae_net_grant(p.far, p.to, i, 1, &keys[i]), 0);
                for (uint32_t i = 0; i < 300; i++)
                        assert_memory_not_equal(&keys[i], &keys[(i + 1) % 300], sizeof(old));
                for (uint32_t i = 0; i < 300; i++)
                        assert_int_equal(ae_net_revoke(p.far, &keys[i]), 0);
        }
        assert_int_equal(ae_net_revoke(p.far, &old), 0);
        assert_int_equal(ae_net_grant(p.far, p.to, 0, 4096, &p.key), 0);
        bed_put(p.a, p.conn, &old, 0, p.from, 0, 10, 1, 1); /* an old key of a slot in use */
        bed_put(p.a, p.conn, &keys[7], 0, p.from, 0, 1, 2, 2);
        check_alive(&p);
        while (bed_stats(p.b).late_puts < 2)
                bed_turn(*state);
        pair_close(&p);
}

/* The last put broke the connection: DOWN at both ends, and a third peer notices nothing. */
static void check_broken(struct pair *p, const char *text)
{
        struct peer *third = bed_open(p->a->bed, 3);
        uint32_t n_down = p->b->n[AE_NET_EV_DOWN];
        struct ae_net_conn *conn;

        bed_wait(p->b, AE_NET_EV_DOWN, n_down ? n_down : 1);
        bed_wait(p->a, AE_NET_EV_DOWN, 1);
        bed_settle(p->a->bed);
        assert_int_equal(p->b->n[AE_NET_EV_NOTIFY], 0);
        assert_int_equal(p->a->n[AE_NET_EV_PUT_DONE], 1);
        assert_int_equal(bed_record(p->b, AE_NET_EV_DOWN, 0)->event.status, AE_EPROTO);
        assert_non_null(strstr(bed_record(p->b, AE_NET_EV_DOWN, 0)->text, text));
        for (size_t i = 0; i < p->target.len; i++)
                assert_int_equal(p->target.base[i], 0);
        conn = bed_connect(third, p->b, NULL);
        assert_int_equal(ae_net_msg(conn, "still here", 10), 0);
        bed_wait(p->b, AE_NET_EV_MSG, 1);
        pair_close(p);
}

void key_never_granted(void **state)
{
        struct pair p;

        pair_open(&p, *state, area_new(4096), 4096);
        memset(p.source.base, 1, 4096);
        p.key.bytes[14] ^= 0x40; /* a generation that has not been */
        bed_put(p.a, p.conn, &p.key, 0, p.from, 0, 4096, 1, 1);
        check_broken(&p, "never granted");
}

void put_outside_its_grant(void **state)
{
        struct pair p;

        pair_open(&p, *state, area_new(8192), 8192);
        assert_int_equal(ae_net_revoke(p.far, &p.key), 0);
        assert_int_equal(ae_net_grant(p.far, p.to, 4096, 100, &p.key), 0);
        memset(p.source.base, 1, 8192);
        bed_put(p.a, p.conn, &p.key, 1, p.from, 0, 100, 1, 1);
        check_broken(&p, "outside its grant");
}

void put_overflows_its_grant(void **state)
{
        struct pair p;

        pair_open(&p, *state, area_new(1 << 20), 4096);
        memset(p.source.base, 1, 1 << 20);
        bed_put(p.a, p.conn, &p.key, AE_NET_PUT_MAX, p.from, 0, 1 << 20, 1, 1);
        check_broken(&p, "outside its grant");
}

void key_of_another_connection(void **state)
{
        struct ae_net_conn *second;
        struct pair p;

        pair_open(&p, *state, area_new(4096), 4096);
        second = bed_connect(p.a, p.b, NULL);
        memset(p.source.base, 1, 4096);
        bed_put(p.a, second, &p.key, 0, p.from, 0, 4096, 1, 1);
        bed_wait(p.b, AE_NET_EV_DOWN, 1);
        bed_wait(p.a, AE_NET_EV_DOWN, 1);
        assert_ptr_equal(bed_record(p.a, AE_NET_EV_DOWN, 0)->event.conn, second);
        assert_int_equal(ae_net_msg(p.conn, "x", 1), 0); /* the first lives */
        bed_wait(p.b, AE_NET_EV_MSG, 1);
        check_broken(&p, "never granted");
}

void revoke_of_unknown_key(void **state)
{
        struct ae_net_key key;
        struct pair p;

        pair_open(&p, *state, area_new(4096), 4096);
        memset(&key, 0xff, sizeof(key));
        assert_int_equal(ae_net_revoke(p.far, &key), AE_ENOENT);
        assert_int_equal(ae_net_revoke(p.conn, &p.key), AE_ENOENT); /* the grantor's end only */
        check_alive(&p);
        pair_close(&p);
}
