/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sending half of a shm connection: messages into our msg ring, puts into our put ring, and
 * what the peer's counters say about them. Our region is only written here; what we need to know
 * of it is kept in private counters. Nothing is allocated. Owner thread.
 */
#include <string.h>
#include <unistd.h>

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/shm.h"

#define PIECE ((uint64_t)1 << 20) /* bytes of a put in one piece of the stage */

/* --- bell and back-pressure --- */

void ae_shm_ring_bell(struct shm_conn *conn)
{
        uint64_t one = 1;

        if (!conn->ring || conn->common.state != AE_CONN_UP)
                return;
        conn->ring = false;
        /* Pairs with set_asleep(): our counters were published before this load. */
        if (atomic_load_explicit(&conn->theirs->head.asleep, memory_order_seq_cst))
                (void)!write(conn->peer_bell, &one, sizeof(one)); /* full means it is ringing */
}

static uint64_t msg_space(uint64_t len)
{
        return ae_align_up(sizeof(struct shm_msg_head) + len, 8);
}

static bool can_msg(const struct shm_conn *conn, uint64_t len)
{
        return conn->msg_tail - conn->peer_msg_head + msg_space(len) <= SHM_MSGS;
}

static bool has_place(const struct shm_conn *conn)
{
        return conn->puts_end - conn->puts_done < SHM_PUTS;
}

/* --- what the peer has got through --- */

static void put_done(struct shm_conn *conn, int status)
{
        ae_conn_post_done(&conn->common, &conn->puts[conn->puts_done++ % SHM_PUTS].post, status);
}

void ae_shm_fail_puts(struct shm_conn *conn)
{
        while (conn->puts_done < conn->puts_end)
                put_done(conn, AE_ELOST);
}

static int read_counters(struct shm_conn *conn)
{
        const struct shm_head *head = &conn->theirs->head;
        uint64_t msg_head = atomic_load_explicit(&head->msg_head, memory_order_acquire);
        uint64_t put_head = atomic_load_explicit(&head->put_head, memory_order_acquire);

        if (msg_head - conn->peer_msg_head > conn->msg_tail - conn->peer_msg_head ||
            put_head - conn->peer_put_head > conn->put_tail - conn->peer_put_head) {
                ae_conn_break(&conn->common, AE_EPROTO,
                              "it says that it has read what was never written");
                return AE_EPROTO;
        }
        conn->peer_msg_head = msg_head;
        for (; conn->peer_put_head != put_head; conn->peer_put_head++) {
                struct shm_sent *sent = &conn->sent[conn->peer_put_head % SHM_DESCS];

                conn->stage_head += sent->staged;
                if (sent->last)
                        put_done(conn, 0);
        }
        return 0;
}

/* --- messages --- */

/* Copies into our msg ring at @at, which may wrap. */
static void ring_write(struct shm_conn *conn, uint64_t at, const void *data, uint64_t len)
{
        uint64_t pos = at % SHM_MSGS, first = AE_MIN(len, SHM_MSGS - pos);

        if (!len)
                return;
        memcpy(conn->mine->msgs + pos, data, first);
        memcpy(conn->mine->msgs, (const char *)data + first, len - first);
}

int ae_shm_msg(struct ae_net_conn *base, const void *data, size_t len)
{
        struct shm_conn *conn = shm_conn_of(base);
        struct shm_msg_head head = { .len = (uint32_t)len };
        int r;

        r = ae_conn_take_msg(&conn->common, len, can_msg(conn, len));
        if (r < 0)
                return r; /* after AE_EAGAIN the next poll reads how far the peer has got */
        ring_write(conn, conn->msg_tail, &head, sizeof(head));
        ring_write(conn, conn->msg_tail + sizeof(head), data, len);
        conn->msg_tail += msg_space(len);
        /* Pairs with the acquire in receive_msgs(), and with set_asleep(). */
        atomic_store_explicit(&conn->mine->head.msg_tail, conn->msg_tail, memory_order_seq_cst);
        conn->ring = true;
        ae_shm_ring_bell(conn);
        return 0;
}

/* --- puts --- */

static void fill_slot(struct shm_conn *conn, struct shm_put *put, const struct shm_desc *where)
{
        struct shm_desc desc = *where;

        memcpy(desc.key, put->key.bytes, sizeof(desc.key));
        desc.off = put->off;
        desc.len = put->post.len;
        desc.note = put->note;
        desc.part_off = put->emitted;
        put->emitted += desc.part_len;
        conn->mine->puts[conn->put_tail % SHM_DESCS] = desc;
        conn->sent[conn->put_tail % SHM_DESCS] = (struct shm_sent){
                .last = put->emitted == put->post.len,
                .staged = desc.kind == SHM_STAGED ? (uint32_t)ae_align_up(desc.part_len, 64) : 0,
        };
        conn->put_tail++;
}

/* The next piece through the stage. 1: the stage is full. */
static int emit_staged(struct shm_conn *conn, struct shm_put *put)
{
        uint64_t pos = conn->stage_tail % SHM_STAGE;
        uint64_t free_len = SHM_STAGE - (conn->stage_tail - conn->stage_head);
        uint64_t room = AE_MIN(free_len, SHM_STAGE - pos);
        struct shm_desc desc = { .kind = SHM_STAGED, .src_off = pos };

        room = AE_MIN(room, PIECE);
        desc.part_len = AE_MIN(put->post.len - put->emitted, room);
        if (put->post.len && desc.part_len == 0)
                return 1;
        if (desc.part_len)
                memcpy(conn->mine->stage + pos, put->post.src->base + put->src_off + put->emitted,
                       desc.part_len);
        conn->stage_tail += ae_align_up(desc.part_len, 64);
        fill_slot(conn, put, &desc);
        return 0;
}

/* 0; 1: not now; negative: the connection broke. */
static int emit(struct shm_conn *conn, struct shm_put *put)
{
        struct shm_desc desc = { .kind = SHM_DIRECT, .part_len = put->post.len };
        int r = 2;

        if (conn->put_tail - conn->peer_put_head == SHM_DESCS)
                return 1;
        if (put->post.src && put->post.src->share_fd >= 0 && put->emitted == 0)
                r = ae_shm_show(conn, put->post.src);
        if (r == 2)
                return emit_staged(conn, put);
        if (r != 0)
                return r;
        desc.mem_id = put->post.src->id;
        desc.src_off = put->src_off;
        fill_slot(conn, put, &desc);
        return 0;
}

static int emit_all(struct shm_conn *conn)
{
        uint64_t before = conn->put_tail;
        int r = 0;

        while (r == 0 && conn->puts_emitted < conn->puts_end) {
                struct shm_put *put = &conn->puts[conn->puts_emitted % SHM_PUTS];

                r = emit(conn, put);
                if (r == 0 && put->emitted == put->post.len)
                        conn->puts_emitted++;
        }
        if (r < 0)
                return r;
        if (conn->put_tail == before)
                return 0;
        /* Pairs with the acquire in next_desc(), and with set_asleep(). */
        atomic_store_explicit(&conn->mine->head.put_tail, conn->put_tail, memory_order_seq_cst);
        conn->ring = true;
        return 0;
}

int ae_shm_put(struct ae_net_conn *base, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie)
{
        struct shm_conn *conn = shm_conn_of(base);
        struct shm_put *put = &conn->puts[conn->puts_end % SHM_PUTS];
        int r;

        r = ae_conn_take_put(&conn->common, src, len, cookie, has_place(conn) ? &put->post : NULL);
        if (r < 0)
                return r;
        put->key = *key;
        put->src_off = src_off;
        put->off = off;
        put->note = note;
        put->emitted = 0;
        conn->puts_end++;
        if (emit_all(conn) == 0) /* a broken connection has queued the PUT_DONE */
                ae_shm_ring_bell(conn);
        return 0;
}

int ae_shm_progress_send(struct shm_conn *conn)
{
        int r;

        r = read_counters(conn);
        if (r == 0)
                r = emit_all(conn);
        if (r == 0 && conn->n_hide)
                r = ae_shm_hide_flush(conn);
        if (r < 0)
                return r;
        ae_conn_tell_writable(&conn->common, can_msg(conn, conn->common.want_msg_len),
                              has_place(conn));
        return 0;
}
