/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiving half of a shm connection: messages out of the peer's msg ring, and puts, whose
 * bytes this side copies into place. The peer's counters, heads and slots are copied and then
 * checked; nothing of them is read twice. Owner thread.
 */
#include <string.h>
#include <sys/epoll.h>

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/shm.h"

#define COPY_BUDGET ((uint64_t)8 << 20) /* bytes of one connection in one round */
#define SLOT_BUDGET 256                 /* slots of one connection in one round */

bool ae_shm_pending(const struct shm_conn *conn)
{
        const struct shm_head *head = &conn->theirs->head;

        /* Pairs with the publishing stores: `asleep` was stored before these loads. */
        return atomic_load_explicit(&head->msg_tail, memory_order_seq_cst) != conn->msg_head ||
               atomic_load_explicit(&head->put_tail, memory_order_seq_cst) != conn->put_head ||
               atomic_load_explicit(&head->msg_head, memory_order_seq_cst) !=
                       conn->peer_msg_head ||
               atomic_load_explicit(&head->put_head, memory_order_seq_cst) != conn->peer_put_head;
}

/* --- messages --- */

/* Copies out of the peer's msg ring at @at, which may wrap. */
static void ring_read(const struct shm_conn *conn, uint64_t at, void *data, uint64_t len)
{
        uint64_t pos = at % SHM_MSGS, first = AE_MIN(len, SHM_MSGS - pos);

        memcpy(data, conn->theirs->msgs + pos, first);
        memcpy((char *)data + first, conn->theirs->msgs, len - first);
        /* What was copied is what gets checked: no second read of the peer's memory. */
        __asm__ volatile("" ::: "memory");
}

/* One message. 1: no room for it in this round; negative: malformed. */
static int receive_msg(struct shm_conn *conn, uint64_t avail)
{
        struct shm_net *net = shm_net_of(conn);
        struct shm_msg_head head;
        uint64_t size;

        if (!ae_evq_room(&net->end.events))
                return 1;
        if (avail < sizeof(head))
                return ae_fail(AE_EPROTO, "a cut message head");
        ring_read(conn, conn->msg_head, &head, sizeof(head));
        size = ae_align_up(sizeof(head) + (uint64_t)head.len, 8);
        if (head.zero || head.len > AE_NET_MSG_MAX || size > avail)
                return ae_fail(AE_EPROTO, "a malformed message (%u bytes)", head.len);
        if (conn->rx_used + head.len > SHM_RX_CAP)
                return 1;
        ring_read(conn, conn->msg_head + sizeof(head), conn->rx + conn->rx_used, head.len);
        conn->msg_head += size;
        ae_conn_msg_arrived(&conn->common, conn->rx + conn->rx_used, head.len);
        conn->rx_used += (uint32_t)ae_align_up(head.len, 8);
        return 0;
}

static int receive_msgs(struct shm_conn *conn)
{
        uint64_t before = conn->msg_head;
        uint64_t tail = atomic_load_explicit(&conn->theirs->head.msg_tail, memory_order_acquire);
        int r = 0;

        if (conn->hung_up)
                tail = conn->hung_up_tail;
        if (tail - conn->msg_head > SHM_MSGS)
                r = ae_fail(AE_EPROTO, "its msg ring holds %llu bytes of %llu",
                            (unsigned long long)(tail - conn->msg_head),
                            (unsigned long long)SHM_MSGS);
        conn->rx_used = 0; /* the messages of earlier rounds are handed out */
        while (r == 0 && conn->msg_head != tail)
                r = receive_msg(conn, tail - conn->msg_head);
        if (r < 0) {
                ae_conn_break(&conn->common, r, "%s", ae_error_text());
                return r;
        }
        if (conn->msg_head == before)
                return 0;
        /* Pairs with the acquire in read_counters(), and with set_asleep(). */
        atomic_store_explicit(&conn->mine->head.msg_head, conn->msg_head, memory_order_seq_cst);
        conn->ring = true;
        return 0;
}

/* --- puts --- */

static bool same_put(const struct shm_desc *a, const struct shm_desc *b)
{
        return memcmp(a->key, b->key, sizeof(a->key)) == 0 && a->off == b->off &&
               a->len == b->len && a->note == b->note;
}

static int find_source(struct shm_conn *conn, const struct shm_desc *desc, const char **ret_src)
{
        const struct shm_seen *seen;

        if (desc->part_len == 0)
                return 0;
        if (desc->kind == SHM_STAGED) {
                if (!ae_range_ok(desc->src_off, desc->part_len, SHM_STAGE))
                        return ae_fail(AE_EPROTO, "a put out of nowhere in its stage");
                *ret_src = (const char *)conn->theirs->stage + desc->src_off;
                return 0;
        }
        seen = ae_shm_find_seen(conn, desc->mem_id);
        if (!seen || !ae_range_ok(desc->src_off, desc->part_len, seen->len))
                return ae_fail(AE_EPROTO, "a put out of range %u, which it has not shown",
                               desc->mem_id);
        *ret_src = seen->base + seen->skip + desc->src_off;
        return 0;
}

static int check_desc(struct shm_conn *conn, const struct shm_desc *desc)
{
        const struct shm_arrival *in = &conn->in;
        uint64_t done = in->open ? in->done : 0;

        if ((desc->kind == SHM_DIRECT || desc->kind == SHM_STAGED) &&
            desc->len <= AE_NET_PUT_MAX && desc->off <= AE_NET_PUT_MAX && desc->part_off == done &&
            desc->part_len <= desc->len - done && (desc->part_len > 0 || desc->len == 0) &&
            (!in->open || same_put(desc, &in->first)))
                return 0;
        return ae_fail(AE_EPROTO, "a malformed slot (kind %u, %llu bytes at %llu of %llu)",
                       desc->kind, (unsigned long long)desc->part_len,
                       (unsigned long long)desc->part_off, (unsigned long long)desc->len);
}

/* Makes a checked @desc the one that is being copied. */
static int begin_desc(struct shm_conn *conn, const struct shm_desc *desc)
{
        struct shm_arrival *in = &conn->in;
        struct ae_net_grant *grant = NULL;
        uint64_t tag = 0;
        int r;

        r = ae_conn_find_target(&conn->common, desc->key, desc->off, desc->len, &grant, &tag);
        if (r < 0)
                return r;
        r = find_source(conn, desc, &in->src);
        if (r < 0)
                return r;
        if (!in->open) {
                in->open = true;
                in->late = false;
                in->first = *desc;
                in->tag = tag;
                in->done = 0;
        }
        in->late |= !grant;
        in->busy = true;
        in->desc = *desc;
        in->copied = 0;
        if (grant) {
                in->mem = grant->mem;
                in->mem_off = grant->off + desc->off;
                in->dst = grant->mem->base + in->mem_off + desc->part_off;
        }
        return 0;
}

/* 0; 1: there is none; negative: malformed. */
static int next_desc(struct shm_conn *conn)
{
        uint64_t tail = atomic_load_explicit(&conn->theirs->head.put_tail, memory_order_acquire);
        struct shm_desc desc;
        int r;

        if (tail == conn->put_head)
                return 1;
        if (tail - conn->put_head > SHM_DESCS)
                return ae_fail(AE_EPROTO, "its put ring holds %llu slots of %d",
                               (unsigned long long)(tail - conn->put_head), SHM_DESCS);
        memcpy(&desc, &conn->theirs->puts[conn->put_head % SHM_DESCS], sizeof(desc));
        /* What was copied is what gets checked: no second read of the peer's memory. */
        __asm__ volatile("" ::: "memory");
        /* A range is shown before the slot that names it: whatever is on the socket comes first. */
        if (desc.kind == SHM_DIRECT && !ae_shm_find_seen(conn, desc.mem_id)) {
                conn->sock.ready |= EPOLLIN;
                r = ae_shm_ctl_receive(conn);
                if (r < 0)
                        return r;
                if (conn->hung_up)
                        return 1;
        }
        r = check_desc(conn, &desc);
        if (r == 0)
                r = begin_desc(conn, &desc);
        return r;
}

static void desc_done(struct shm_conn *conn)
{
        struct shm_net *net = shm_net_of(conn);
        struct shm_arrival *in = &conn->in;

        in->busy = false;
        in->done += in->desc.part_len;
        conn->put_head++;
        /* Pairs with the acquire in read_counters(), and with set_asleep(). */
        atomic_store_explicit(&conn->mine->head.put_head, conn->put_head, memory_order_seq_cst);
        conn->ring = true;
        if (in->done < in->first.len)
                return;
        in->open = false;
        if (in->late) {
                net->end.stats.late_puts++;
                return;
        }
        ae_conn_put_arrived(&conn->common, in->mem, in->mem_off, in->first.len, in->first.note,
                            in->tag);
}

/* Copies on, within the budget; the rest of a revoked one is skipped. */
static void copy_some(struct shm_conn *conn, uint64_t *budget)
{
        struct ae_net_stats *stats = &shm_net_of(conn)->end.stats;
        struct shm_arrival *in = &conn->in;
        uint64_t left = in->desc.part_len - in->copied, n = AE_MIN(left, *budget);

        if (in->late) {
                stats->late_put_bytes += left;
                in->copied += left;
                return;
        }
        if (n)
                memcpy(in->dst + in->copied, in->src + in->copied, n);
        in->copied += n;
        *budget -= n;
        stats->put_bytes_received += n;
}

static int receive_puts(struct shm_conn *conn)
{
        struct shm_net *net = shm_net_of(conn);
        uint64_t budget = COPY_BUDGET;
        uint32_t n_slots = 0;
        int r = 0;

        while (budget && n_slots < SLOT_BUDGET && ae_evq_room(&net->end.events)) {
                if (!conn->in.busy)
                        r = next_desc(conn);
                if (r != 0)
                        break;
                copy_some(conn, &budget);
                if (conn->in.copied < conn->in.desc.part_len)
                        break;
                desc_done(conn);
                n_slots++;
        }
        if (r < 0)
                ae_conn_break(&conn->common, r, "%s", ae_error_text());
        return r < 0 ? r : 0;
}

int ae_shm_progress_receive(struct shm_conn *conn)
{
        int r;

        r = receive_msgs(conn);
        if (r < 0)
                return r;
        if (!conn->hung_up)
                r = receive_puts(conn);
        if (r < 0)
                return r;
        /* Its last messages come out before DOWN does, in as many rounds as they need. */
        if (conn->hung_up && conn->msg_head == conn->hung_up_tail) {
                ae_conn_break(&conn->common, AE_ELOST, "the peer closed it");
                return AE_ELOST;
        }
        return 0;
}

void ae_shm_revoked(struct ae_conn *common, uint64_t tag)
{
        struct shm_conn *conn = ae_container_of(common, struct shm_conn, common);

        if (conn->in.open && conn->in.tag == tag)
                conn->in.late = true;
}
