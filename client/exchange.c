/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All-to-all for CPU workers. A block goes out as messages through the xout ring and comes in
 * through the slots of its source's flow. Sending and receiving are interleaved, so that two ranks
 * that send to each other can't block each other. One thread at a time.
 *
 * A call that fails leaves messages in the flows whose fate is unknown, so it is the last one.
 */
#include "client/exchange.h"

#include "client/error.h"
#include "client/queue.h"
#include "proto/base/cleanup.h"
#include "proto/base/num.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXCHANGE_HEAD sizeof(struct ae_local_xhead)
#define EXCHANGE_ACK_EVERY 2 /* half a flow's slots, so that its sender seldom stands still */
#define EXCHANGE_NAMED 8     /* ranks in a text */

/* A rank as seen from this one. The block of the running call, and the flow that outlives it. */
struct peer {
        uint64_t consumed, acked; /* messages of its flow */
        const uint8_t *send;      /* borrowed */
        uint64_t send_len, sent;
        uint8_t *recv;            /* borrowed */
        uint64_t recv_len, received;
        bool sent_all, received_all;
};

static_assert((int)AUTOEP_EXCHANGE == AE_COLLECTIVE_EXCHANGE &&
              (int)AUTOEP_ALL_REDUCE == AE_COLLECTIVE_ALL_REDUCE &&
              (int)AUTOEP_ALL_GATHER == AE_COLLECTIVE_ALL_GATHER &&
              (int)AUTOEP_DISPATCH == AE_COLLECTIVE_DISPATCH &&
              (int)AUTOEP_COMBINE == AE_COLLECTIVE_COMBINE, "shared values");

struct ae_flows {
        struct ae_ring out;
        struct ae_local_xin *xin; /* borrowed, read-only memory */
        uint64_t slot_len;
        uint64_t slots_off;
        /* The running or next call of each group: seq, and what was announced. */
        struct ae_local_xhead calls[AE_LOCAL_XGROUPS];
        bool broken;
        /* the running call */
        enum autoep_group group;
        uint32_t *ranks;          /* owned; of the group by position */
        uint32_t n, me;           /* positions */
        struct peer *peers;       /* owned; by rank, world of them */
};

/* ---- the flows -------------------------------------------------------------------------- */

/* The header of the running call's messages, but for what differs from message to message. */
static struct ae_local_xhead *running(const struct ae_flows *flows)
{
        return (struct ae_local_xhead *)&flows->calls[flows->group];
}

static int check_xin(const struct autoep *h, const struct ae_local_xin *xin)
{
        uint64_t flows_len = (uint64_t)h->world * sizeof(xin->flows[0]);
        uint64_t slots_len;
        uint64_t slot_len;
        uint64_t slots_off;

        if (h->xin_map.len < sizeof(*xin) || h->xin_map.len - sizeof(*xin) < flows_len ||
            xin->magic != AE_LOCAL_MAGIC)
                return ae_fail(AE_EPROTO, "the exchange inbox of %zu bytes is not one",
                               h->xin_map.len);
        slot_len = xin->slot_len;
        slots_off = xin->slots_off;
        if (slot_len % 64 || slot_len <= EXCHANGE_HEAD || slot_len > UINT32_MAX || slots_off % 64 ||
            slots_off < sizeof(*xin) + flows_len ||
            ae_mul_overflows(slot_len, (uint64_t)h->world * AE_LOCAL_XSLOTS, &slots_len) ||
            !ae_range_ok(slots_off, slots_len, h->xin_map.len))
                return ae_fail(AE_EPROTO, "the exchange inbox of %zu bytes cannot have slots of "
                               "%llu bytes from byte %llu on", h->xin_map.len,
                               (unsigned long long)slot_len, (unsigned long long)slots_off);
        if (h->xout_map.len < 2 * slot_len)
                return ae_fail(AE_EPROTO, "the exchange ring of %zu bytes has no room for two "
                               "messages of %llu", h->xout_map.len, (unsigned long long)slot_len);
        h->flows->xin = h->xin_map.base;
        h->flows->slot_len = slot_len;
        h->flows->slots_off = slots_off;
        return 0;
}

int ae_exchange_new(struct autoep *h)
{
        struct ae_flows *flows = calloc(1, sizeof(*flows));

        assert(!h->flows && h->world > 0);
        h->flows = flows;
        if (flows) {
                flows->ranks = calloc(h->world, sizeof(*flows->ranks));
                flows->peers = calloc(h->world, sizeof(*flows->peers));
        }
        if (!flows || !flows->ranks || !flows->peers)
                return ae_fail(AE_ENOMEM, "no memory for the flows of %u ranks", h->world);
        flows->out = (struct ae_ring){ .base = h->xout_map.base, .len = h->xout_map.len,
                                       .tail = &h->page->xout_tail };
        return h->xin_map.base ? check_xin(h, h->xin_map.base) : 0;
}

void ae_exchange_free(struct autoep *h)
{
        if (!h->flows)
                return;
        free(h->flows->ranks);
        free(h->flows->peers);
        free(h->flows);
        h->flows = NULL;
}

/* Whether the next message of @rank's flow is there: 1, 0, AE_EPROTO. seq_cst, for conditions. */
static int is_ready(const struct ae_flows *flows, uint32_t rank)
{
        uint64_t number = flows->peers[rank].consumed;
        uint64_t ready = atomic_load(&flows->xin->flows[rank].ready[number % AE_LOCAL_XSLOTS]);

        if (ready > number + 1)
                return ae_fail(AE_EPROTO, "the daemon shows message %llu of rank %u where %llu is "
                               "next",
                               (unsigned long long)ready - 1, rank, (unsigned long long)number);
        return ready == number + 1;
}

/* ---- sending ---------------------------------------------------------------------------- */

static uint64_t message_len(const struct ae_flows *flows, const struct peer *peer)
{
        return AE_MIN(peer->send_len - peer->sent, flows->slot_len - EXCHANGE_HEAD);
}

/* Whether @rank's next message has room: 1, 0 or negative. */
static int can_send(struct autoep *h, const struct peer *peer)
{
        const struct ae_ring *out = &h->flows->out;
        uint64_t len = EXCHANGE_HEAD + message_len(h->flows, peer);
        int r = ae_ring_fits(out, ae_ring_place(out, out->head, len) + len);

        return r <= 0 ? r : ae_queue_fits(h, 1);
}

/* 1 when a message went out, 0 when there is no room or nothing to send. */
static int send_one(struct autoep *h, uint32_t rank)
{
        struct ae_flows *flows = h->flows;
        struct peer *peer = &flows->peers[rank];
        uint64_t len = message_len(flows, peer);
        struct ae_local_xhead head = *running(flows);
        struct ae_local_sqe sqe = { .op = AE_SQ_XSEND, .rank = rank,
                                    .len = (uint32_t)(EXCHANGE_HEAD + len) };
        int r;

        head.dst = (uint16_t)rank;
        head.len = (uint32_t)len;
        head.off = peer->sent;
        head.block_len = peer->send_len;
        if (peer->sent_all)
                return 0;
        r = can_send(h, peer);
        if (r <= 0)
                return r;
        sqe.pos = ae_ring_place(&flows->out, flows->out.head, sqe.len);
        memcpy(ae_ring_at(&flows->out, sqe.pos), &head, sizeof(head));
        if (len > 0)
                memcpy(ae_ring_at(&flows->out, sqe.pos) + sizeof(head), peer->send + peer->sent,
                       len);
        r = ae_queue_post(h, &sqe, true);
        if (r != 0)
                return r < 0 ? r : 0; /* another thread took the entry; the bytes come again */
        flows->out.head = sqe.pos + sqe.len;
        peer->sent += len;
        peer->sent_all = peer->sent == peer->send_len;
        return 1;
}

/* ---- receiving -------------------------------------------------------------------------- */

static int check_head(const struct autoep *h, uint32_t rank, const struct ae_local_xhead *head)
{
        const struct ae_flows *flows = h->flows;
        const struct peer *peer = &flows->peers[rank];
        char theirs[AE_LOCAL_XTEXT], ours[AE_LOCAL_XTEXT];

        if (head->magic != AE_LOCAL_MAGIC || head->src != rank || head->dst != h->rank ||
            head->len > flows->slot_len - EXCHANGE_HEAD)
                return ae_fail(AE_EPROTO, "a message in the flow of rank %u says that it is %u "
                               "bytes from rank %u to rank %u", rank, head->len, head->src,
                               head->dst);
        if (!ae_local_same_collective(head, running(flows)))
                return ae_fail(AE_EMISMATCH, "rank %u calls %s, rank %u %s: all must call in the "
                               "same order", rank, ae_local_print_collective(head, theirs),
                               h->rank, ae_local_print_collective(running(flows), ours));
        if (head->block_len != peer->recv_len)
                return ae_fail(AE_EMISMATCH, "rank %u sends a block of %llu bytes where rank %u "
                               "expects %llu", rank, (unsigned long long)head->block_len, h->rank,
                               (unsigned long long)peer->recv_len);
        if (head->off != peer->received || !ae_range_ok(head->off, head->len, head->block_len) ||
            (head->len == 0 && head->block_len > 0))
                return ae_fail(AE_EPROTO, "rank %u sends %u bytes at byte %llu of a block of %llu "
                               "where byte %llu is next", rank, head->len,
                               (unsigned long long)head->off, (unsigned long long)head->block_len,
                               (unsigned long long)peer->received);
        return 0;
}

static int receive_one(struct autoep *h, uint32_t rank)
{
        struct ae_flows *flows = h->flows;
        struct peer *peer = &flows->peers[rank];
        uint64_t slot = (uint64_t)rank * AE_LOCAL_XSLOTS + peer->consumed % AE_LOCAL_XSLOTS;
        const uint8_t *message = (const uint8_t *)flows->xin + flows->slots_off +
                                 slot * flows->slot_len;
        struct ae_local_xhead head;
        int r;

        if (peer->received_all)
                return 0;
        r = is_ready(flows, rank);
        if (r <= 0)
                return r;
        memcpy(&head, message, sizeof(head));
        r = check_head(h, rank, &head);
        if (r < 0)
                return r;
        if (head.len > 0)
                memcpy(peer->recv + head.off, message + sizeof(head), head.len);
        peer->received += head.len;
        peer->received_all = peer->received == peer->recv_len;
        peer->consumed++;
        return 1;
}

static bool owes_ack(const struct peer *peer)
{
        uint64_t n = peer->consumed - peer->acked;

        return n >= EXCHANGE_ACK_EVERY || (n > 0 && peer->received_all);
}

static int ack(struct autoep *h, uint32_t rank)
{
        struct peer *peer = &h->flows->peers[rank];
        struct ae_local_sqe sqe = { .op = AE_SQ_XACK, .rank = rank, .n = peer->consumed };
        int r;

        if (!owes_ack(peer))
                return 0;
        r = ae_queue_post(h, &sqe, true);
        if (r != 0)
                return r < 0 ? r : 0;
        peer->acked = peer->consumed;
        return 1;
}

/* ---- the call --------------------------------------------------------------------------- */

static bool is_settled(const struct peer *peer)
{
        return peer->sent_all && peer->received_all && !owes_ack(peer);
}

/* Whether anything could be done for @rank: 1, 0, negative. */
static int can_move(struct autoep *h, uint32_t rank)
{
        const struct peer *peer = &h->flows->peers[rank];
        int r = 0;

        if (!peer->received_all)
                r = is_ready(h->flows, rank);
        if (r == 0 && !peer->sent_all)
                r = can_send(h, peer);
        if (r == 0 && owes_ack(peer))
                r = ae_queue_fits(h, 1);
        return r;
}

static bool can_go_on(struct autoep *h, const struct ae_wait *wait)
{
        const struct ae_flows *flows = h->flows;

        (void)wait;
        for (uint32_t i = 0; i < flows->n; i++) {
                if (i != flows->me && can_move(h, flows->ranks[i]) != 0)
                        return true;
        }
        return false;
}

/* One message each way for every peer, beginning behind this rank so that not all send to the
 * first. 1 when something moved or all is done, then with *ret_done. */
static int pass(struct autoep *h, bool *ret_done)
{
        struct ae_flows *flows = h->flows;
        bool moved = false;
        bool done = true;

        for (uint32_t i = 1; i < flows->n; i++) {
                uint32_t rank = flows->ranks[(flows->me + i) % flows->n];
                int (*const moves[])(struct autoep *, uint32_t) = { send_one, receive_one, ack };

                for (size_t m = 0; m < AE_ARRAY_LEN(moves); m++) {
                        int r = moves[m](h, rank);

                        if (r < 0)
                                return r;
                        moved |= r > 0;
                }
                done &= is_settled(&flows->peers[rank]);
        }
        *ret_done = done;
        return moved || done;
}

/* Puts the ranks whose blocks are missing in front of the error text. */
static int name_missing(struct autoep *h, int status)
{
        const struct ae_flows *flows = h->flows;
        char call[AE_LOCAL_XTEXT];
        char names[256] = "";
        size_t used = 0;
        uint32_t n = 0;

        for (uint32_t i = 0; i < flows->n; i++) {
                uint32_t rank = flows->ranks[i];

                if (i == flows->me || flows->peers[rank].received_all || n++ >= EXCHANGE_NAMED)
                        continue;
                used += (size_t)snprintf(names + used, sizeof(names) - used, "%s%u (node %u)",
                                         n > 1 ? ", " : "", rank, h->rank_node[rank]);
                assert(used < sizeof(names));
        }
        (void)ae_local_print_collective(running(flows), call);
        if (n == 0)
                return ae_pump_prefix(status, "%s in round %llu is not all sent", call,
                                      (unsigned long long)running(flows)->round);
        return ae_pump_prefix(status, "%s in round %llu lacks the blocks of rank%s %s%s", call,
                              (unsigned long long)running(flows)->round, n > 1 ? "s" : "", names,
                              n > EXCHANGE_NAMED ? ", …" : "");
}

static int run(struct autoep *h, const struct ae_deadline *deadline)
{
        bool done = false;

        while (!done) {
                struct ae_wait wait = { .done = can_go_on, .deadline = deadline,
                                        .reason = AE_REASON_ROUND,
                                        .waited_ns = &h->counters.exchange_wait_ns };
                int r = pass(h, &done);

                if (r < 0)
                        return r;
                if (r > 0)
                        continue;
                r = ae_pump_wait(h, &wait);
                if (r < 0)
                        return name_missing(h, r);
        }
        return 0;
}

static void find_group(struct autoep *h, enum autoep_group group)
{
        const struct ae_group_topology *t = &h->topology;
        struct ae_flows *flows = h->flows;

        flows->group = group;
        flows->n = group == AUTOEP_GROUP_EP ? t->ep_size :
                   group == AUTOEP_GROUP_EDP ? t->edp_size : t->world;
        flows->me = group == AUTOEP_GROUP_EP ? ae_group_ep_rank(t, h->rank) :
                    group == AUTOEP_GROUP_EDP ? ae_group_edp_rank(t, h->rank) : h->rank;
        for (uint32_t i = 0; i < flows->n; i++) {
                flows->ranks[i] = group == AUTOEP_GROUP_EP ?
                                  ae_group_ep_member(t, ae_group_ep_index(t, h->rank), i) :
                                  group == AUTOEP_GROUP_EDP ?
                                  ae_group_edp_member(t, ae_group_edp_index(t, h->rank), i) : i;
        }
        assert(flows->ranks[flows->me] == h->rank);
}

struct blocks {
        const uint8_t *send; /* all borrowed */
        const uint64_t *send_len;
        uint8_t *recv;
        const uint64_t *recv_len;
};

/* Gives each peer its blocks. */
static int set_blocks(struct autoep *h, const struct blocks *b)
{
        struct ae_flows *flows = h->flows;
        uint64_t sent = 0;
        uint64_t received = 0;

        if (!b->send_len || !b->recv_len)
                return ae_fail(AE_EINVAL, "send_len and recv_len have one length per position");
        for (uint32_t i = 0; i < flows->n; i++) {
                struct peer *peer = &flows->peers[flows->ranks[i]];

                if ((b->send_len[i] > 0 && !b->send) || (b->recv_len[i] > 0 && !b->recv))
                        return ae_fail(AE_EINVAL, "the blocks of position %u are at address NULL",
                                       i);
                peer->send = b->send ? b->send + sent : NULL;
                peer->recv = b->recv ? b->recv + received : NULL;
                peer->send_len = b->send_len[i];
                peer->recv_len = b->recv_len[i];
                peer->sent = peer->received = 0;
                peer->sent_all = peer->received_all = false;
                if (ae_add_overflows(sent, b->send_len[i], &sent) || sent > SIZE_MAX / 2 ||
                    ae_add_overflows(received, b->recv_len[i], &received) ||
                    received > SIZE_MAX / 2)
                        return ae_fail(AE_EOVERFLOW, "the blocks do not fit into memory");
        }
        if (b->send_len[flows->me] != b->recv_len[flows->me])
                return ae_fail(AE_EINVAL, "this rank's block for itself has %llu bytes to send and "
                               "%llu to receive", (unsigned long long)b->send_len[flows->me],
                               (unsigned long long)b->recv_len[flows->me]);
        if (flows->n > 1 && !flows->xin)
                return ae_fail(AE_EUNSUPPORTED, "this daemon carries no exchange for this rank");
        return 0;
}

static int exchange(struct autoep *h, enum autoep_group group, const struct blocks *b,
                    int timeout_ms)
{
        struct ae_flows *flows;
        struct ae_deadline deadline;
        struct peer *own;
        int r;

        r = ae_handle_enter_rank(h, "exchange");
        if (r < 0)
                return r;
        r = ae_deadline_check(timeout_ms);
        if (r < 0)
                return r;
        flows = h->flows;
        if ((uint32_t)group >= AE_LOCAL_XGROUPS)
                return ae_fail(AE_EINVAL, "there is no group %d", (int)group);
        if (flows->broken)
                return ae_fail(AE_ESTATE, "an exchange failed before, and what is still under way "
                               "is not known: close the handle and join again");
        find_group(h, group);
        r = set_blocks(h, b);
        if (r < 0)
                return r;
        ae_deadline_init(h, timeout_ms, &deadline);
        own = &flows->peers[h->rank];
        if (own->send_len > 0)
                memcpy(own->recv, own->send, own->send_len);
        own->sent_all = own->received_all = true;
        running(flows)->magic = AE_LOCAL_MAGIC;
        running(flows)->group = (uint8_t)group;
        running(flows)->src = (uint16_t)h->rank;
        running(flows)->round = ae_handle_round(h);
        r = run(h, &deadline);
        running(flows)->seq++;
        flows->broken = r < 0;
        if (r < 0)
                return r;
        ae_count(&h->counters.exchanges, 1);
        for (uint32_t i = 0; i < flows->n; i++)
                ae_count(&h->counters.exchange_len, b->send_len[i]);
        return 0;
}

static int announce(struct autoep *h, enum autoep_group group, enum autoep_collective kind,
                    uint32_t id, uint64_t len)
{
        int r = ae_handle_enter_rank(h, "announce");

        if (r < 0)
                return r;
        if ((uint32_t)group >= AE_LOCAL_XGROUPS)
                return ae_fail(AE_EINVAL, "there is no group %d", (int)group);
        if ((uint32_t)kind > AUTOEP_COMBINE)
                return ae_fail(AE_EINVAL, "there is no collective %d", (int)kind);
        h->flows->calls[group].kind = (uint8_t)kind;
        h->flows->calls[group].id = id;
        h->flows->calls[group].total = len;
        return 0;
}

int autoep_announce(autoep *h, enum autoep_group group, enum autoep_collective kind, uint32_t id,
                    uint64_t len)
{
        return ae_api("autoep_announce", announce(h, group, kind, id, len));
}

int autoep_exchange(autoep *h, enum autoep_group group, const void *send, const uint64_t *send_len,
                    void *recv, const uint64_t *recv_len, int timeout_ms)
{
        const struct blocks blocks = { send, send_len, recv, recv_len };

        return ae_api("autoep_exchange", exchange(h, group, &blocks, timeout_ms));
}
