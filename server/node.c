/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core over a transport. Owner thread of the endpoint. The higher node id connects.
 *
 * What the transport does not take at once waits for it in order, messages in blocks of one pool:
 * a backlog no larger than one before allocates nothing. A peer for which too much waits is given
 * up.
 */
#include "server/node.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/pool.h"
#include "proto/base/status.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#define RETRY_NS (100 * UINT64_C(1000000))
#define EVENTS 64
#define BLOCK_LEN 4096u

/* A stretch of a msg that waits. */
struct block {
        struct ae_list link;
        char data[BLOCK_LEN - sizeof(struct ae_list)];
};

/* A msg or put that the transport could not take yet, or a put to a peer that is gone. */
struct pending {
        struct ae_list link;
        bool put;
        struct ae_net_key key;
        struct ae_net_mem *src;
        uint64_t off, src_off, len, note, cookie;
        struct ae_list blocks;  /* struct block; msg */
        struct ae_list waiting; /* in the peer's, a WAITING of @job */
        uint32_t job;
};

struct peer {
        struct ae_node *node;
        char *address;             /* owned */
        struct ae_net_conn *conn;  /* NULL: none */
        bool up;
        uint64_t incarnation;
        uint64_t retry_ns;
        uint64_t sent_len, received_len; /* of puts, over all its connections */
        struct ae_list pending;
        struct ae_list waitings;   /* struct pending: the WAITINGs among them, one per job */
        uint64_t pending_len, n_msgs, n_puts; /* memory that they take; how many */
        bool given_up;             /* too much: to be dropped */
        char why[AE_WIRE_TEXT];
};

struct ae_node {
        struct ae_node_options options;
        struct ae_core *core;
        struct ae_net *net;        /* NULL with one node */
        struct peer *peers;        /* owned */
        struct ae_pool pendings, blocks;
        char *join;                /* owned; where a msg of several blocks is put together */
        bool gives_up;             /* some peer */
        struct ae_list lost;       /* struct pending: puts that end with AE_ELOST */
        char address[AE_NET_ADDR_MAX];
};

/* ---- actions of the core ---------------------------------------------------------------- */

static size_t n_blocks(size_t len)
{
        return ae_div_up(len, sizeof(((struct block *)NULL)->data));
}

static size_t weight(const struct pending *pending)
{
        return sizeof(*pending) + (pending->put ? 0 : n_blocks(pending->len) * BLOCK_LEN);
}

/* A peer for which too much waits is dropped by the next poll: the core, which called, must not
 * hear of it here. */
static void charge(struct peer *peer, const struct pending *pending)
{
        peer->pending_len += weight(pending);
        peer->n_msgs += !pending->put;
        peer->n_puts += pending->put;
        if (peer->pending_len > AE_NODE_BACKLOG_MAX)
                peer->given_up = peer->node->gives_up = true;
}

/* Takes it out of its peer's queue; a put is still to be ended. */
static void unqueue(struct peer *peer, struct pending *pending)
{
        assert(peer->pending_len >= weight(pending));
        peer->pending_len -= weight(pending);
        peer->n_msgs -= !pending->put;
        peer->n_puts -= pending->put;
        ae_list_unlink(&pending->link);
}

static void free_pending(struct ae_node *node, struct pending *pending)
{
        struct ae_list *block;

        while (!pending->put && (block = ae_list_pop(&pending->blocks)))
                ae_pool_give(&node->blocks, block);
        if (!pending->put)
                ae_list_unlink(&pending->waiting);
        ae_pool_give(&node->pendings, pending);
}

static void copy_in(struct ae_node *node, struct pending *pending, const char *data)
{
        for (size_t off = 0; off < pending->len; off += sizeof(((struct block *)NULL)->data)) {
                struct block *block = ae_pool_take(&node->blocks);

                memcpy(block->data, data + off, AE_MIN(sizeof(block->data), pending->len - off));
                ae_list_push(&pending->blocks, &block->link);
        }
}

/* The bytes of a msg in one piece, until the next call. */
static const char *copy_out(struct ae_node *node, const struct pending *pending)
{
        struct block *block;
        size_t off = 0;

        if (n_blocks(pending->len) == 1)
                return ae_list_entry(pending->blocks.next, struct block, link)->data;
        ae_list_for_each(block, &pending->blocks, link) {
                memcpy(node->join + off, block->data,
                       AE_MIN(sizeof(block->data), pending->len - off));
                off += sizeof(block->data);
        }
        return node->join;
}

/* Of what a job waits for only the last word counts: an earlier one need not be sent any more. */
static void supersede(struct peer *peer, struct pending *pending, const struct ae_wire_head *head)
{
        struct pending *old;

        pending->job = head->job;
        ae_list_for_each(old, &peer->waitings, waiting) {
                if (old->job != head->job)
                        continue;
                unqueue(peer, old);
                free_pending(peer->node, old);
                break;
        }
        ae_list_push(&peer->waitings, &pending->waiting);
}

static void do_msg(void *user, uint32_t to, const void *data, size_t len)
{
        struct ae_node *node = user;
        struct peer *peer = &node->peers[to];
        struct ae_wire_head head;
        struct pending *pending;
        int r = AE_EAGAIN;

        assert(len >= sizeof(head) && len <= AE_NET_MSG_MAX);
        if (!peer->up || peer->given_up)
                return; /* the core hears of the loss; what it said no longer matters */
        if (ae_list_empty(&peer->pending))
                r = ae_net_msg(peer->conn, data, len);
        assert(r == 0 || r == AE_EAGAIN || r == AE_ELOST);
        if (r != AE_EAGAIN)
                return;
        memcpy(&head, data, sizeof(head));
        pending = ae_pool_take(&node->pendings);
        pending->len = len;
        ae_list_init(&pending->blocks);
        ae_list_init(&pending->waiting);
        if (head.op == AE_WIRE_WAITING)
                supersede(peer, pending, &head);
        copy_in(node, pending, data);
        ae_list_push(&peer->pending, &pending->link);
        charge(peer, pending);
}

static void do_put(void *user, uint32_t to, const struct ae_net_key *key, uint64_t off,
                   struct ae_region *src, uint64_t src_off, uint64_t len, uint64_t note,
                   uint64_t cookie)
{
        struct ae_node *node = user;
        struct peer *peer = &node->peers[to];
        struct pending *pending;
        int r = AE_EAGAIN;

        if (peer->up && ae_list_empty(&peer->pending))
                r = ae_net_put(peer->conn, key, off, src->mem, src_off, len, note, cookie);
        if (r == 0) {
                peer->sent_len += len;
                return;
        }
        pending = ae_pool_take(&node->pendings);
        pending->put = true;
        pending->key = *key;
        pending->src = src->mem;
        pending->off = off;
        pending->src_off = src_off;
        pending->len = len;
        pending->note = note;
        pending->cookie = cookie;
        if (!peer->up || r != AE_EAGAIN) { /* the connection broke; its DOWN is on the way */
                ae_list_push(&node->lost, &pending->link);
                return;
        }
        ae_list_push(&peer->pending, &pending->link);
        charge(peer, pending);
}

static int do_grant(void *user, uint32_t to, struct ae_region *region, uint64_t off, uint64_t len,
                    struct ae_net_key *ret_key)
{
        struct ae_node *node = user;
        struct peer *peer = &node->peers[to];

        if (!peer->up)
                return ae_fail(AE_ELOST, "node %u is not connected", to);
        return ae_net_grant(peer->conn, region->mem, off, len, ret_key);
}

static void do_revoke(void *user, uint32_t to, const struct ae_net_key *key)
{
        struct ae_node *node = user;
        struct peer *peer = &node->peers[to];

        /* a key of an earlier connection died with it */
        if (peer->up)
                (void)ae_net_revoke(peer->conn, key);
}

static void do_task(void *user, struct ae_task *task)
{
        struct ae_node *node = user;

        node->options.task(node->options.user, task);
}

static int do_region_new(void *user, const struct ae_region_spec *spec, struct ae_region **ret)
{
        struct ae_node *node = user;
        struct ae_region *region = NULL;
        int r;

        r = node->options.region_new(node->options.user, spec, &region);
        if (r == 0 && spec->net && node->net)
                r = ae_net_map(node->net, region->base, region->len, region->fd, 0, &region->mem);
        if (r < 0) {
                if (region)
                        node->options.region_free(node->options.user, region);
                return r;
        }
        *ret = region;
        return 0;
}

static void do_region_free(void *user, struct ae_region *region)
{
        struct ae_node *node = user;

        if (region->mem)
                ae_net_unmap(region->mem);
        node->options.region_free(node->options.user, region);
}

static void do_worker_send(void *user, struct ae_worker *worker, uint32_t type,
                           const ProtobufCMessage *message, const int *fds, size_t n_fds)
{
        struct ae_node *node = user;

        node->options.worker_send(node->options.user, worker, type, message, fds, n_fds);
}

static void do_worker_wake(void *user, struct ae_worker *worker)
{
        struct ae_node *node = user;

        node->options.worker_wake(node->options.user, worker);
}

static void do_log(void *user, int level, const char *text)
{
        struct ae_node *node = user;

        node->options.log(node->options.user, level, text);
}

static const struct ae_core_ops core_ops = {
        .msg = do_msg, .put = do_put, .grant = do_grant, .revoke = do_revoke, .task = do_task,
        .region_new = do_region_new, .region_free = do_region_free,
        .worker_send = do_worker_send, .worker_wake = do_worker_wake, .log = do_log,
};

/* ---- life ------------------------------------------------------------------------------- */

static void node_log(struct ae_node *node, int level, const char *format, ...)
        __attribute__((format(printf, 3, 4)));
static void node_log(struct ae_node *node, int level, const char *format, ...)
{
        char text[512];
        va_list args;

        va_start(args, format);
        (void)vsnprintf(text, sizeof(text), format, args);
        va_end(args);
        node->options.log(node->options.user, level, text);
}

/* Daemons with different peer lists refuse each other by this. */
static uint64_t cluster_digest(const struct ae_node_options *options)
{
        uint64_t digest = options->n_nodes;

        for (uint32_t i = 0; i < options->n_nodes; i++)
                digest = XXH3_64bits_withSeed(options->peers[i], strlen(options->peers[i]) + 1,
                                              digest);
        return digest;
}

static void on_wake(void *user)
{
        struct ae_node *node = user;

        node->options.wake(node->options.user);
}

static int open_net(struct ae_node *node)
{
        const struct ae_node_options *options = &node->options;
        struct ae_net_options net = {
                .self = { .version = AE_WIRE_VERSION, .node = options->node,
                          .incarnation = options->incarnation, .cluster = cluster_digest(options) },
                .loop = options->loop, .listen = options->peers[options->node], .wake = on_wake,
                .user = node,
        };
        int r;

        if (options->n_nodes == 1)
                return 0;
        node->join = malloc(AE_NET_MSG_MAX);
        if (!node->join)
                return ae_fail(AE_ENOMEM, "no memory for a message");
        ae_pool_grow(&node->pendings);
        ae_pool_grow(&node->blocks);
        r = ae_net_open(options->transport, &net, &node->net);
        return r < 0 ? r : ae_net_address(node->net, node->address);
}

AE_DEFINE_CLEANUP(struct ae_node *, ae_node_free)

int ae_node_new(const struct ae_node_options *options, struct ae_node **ret_node)
{
        AE_CLEANUP(ae_node_free_p) struct ae_node *node = calloc(1, sizeof(*node));
        struct ae_core_options core = {
                .node = options->node, .n_nodes = options->n_nodes,
                .incarnation = options->incarnation, .memory_len = options->memory_len,
                .n_undo = options->n_threads, .transport = options->transport, .ops = &core_ops,
                .user = node,
        };
        int r;

        if (!node)
                return ae_fail(AE_ENOMEM, "no memory for a node");
        node->options = *options;
        ae_pool_init(&node->pendings, sizeof(struct pending));
        ae_pool_init(&node->blocks, sizeof(struct block));
        ae_list_init(&node->lost);
        node->peers = calloc(options->n_nodes, sizeof(*node->peers));
        if (!node->peers)
                return ae_fail(AE_ENOMEM, "no memory for %u peers", options->n_nodes);
        for (uint32_t i = 0; i < options->n_nodes; i++) {
                node->peers[i].node = node;
                ae_list_init(&node->peers[i].pending);
                ae_list_init(&node->peers[i].waitings);
                node->peers[i].address = strdup(options->peers[i]);
                if (!node->peers[i].address)
                        return ae_fail(AE_ENOMEM, "no memory for an address");
        }
        r = ae_core_new(&core, &node->core);
        if (r < 0)
                return r;
        r = open_net(node);
        if (r < 0)
                return r;
        node->options.peers = NULL; /* was borrowed */
        *ret_node = ae_steal(node);
        return 0;
}

/* Puts that nothing comes of any more. */
static void fail_lost(struct ae_node *node)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(&node->lost))) {
                struct pending *pending = ae_list_entry(entry, struct pending, link);
                uint64_t cookie = pending->cookie;

                free_pending(node, pending);
                ae_core_put_done(node->core, cookie, AE_ELOST);
        }
}

static void fail_pending(struct peer *peer)
{
        struct ae_node *node = peer->node;

        while (!ae_list_empty(&peer->pending)) {
                struct pending *pending =
                        ae_list_entry(peer->pending.next, struct pending, link);

                unqueue(peer, pending);
                if (pending->put)
                        ae_list_push(&node->lost, &pending->link);
                else
                        free_pending(node, pending);
        }
        assert(peer->pending_len == 0);
        peer->given_up = false;
        fail_lost(node);
}

struct ae_node *ae_node_free(struct ae_node *node)
{
        struct ae_net_event events[EVENTS];
        int n;

        if (!node)
                return NULL;
        for (uint32_t i = 0; node->peers && i < node->options.n_nodes; i++) {
                if (node->peers[i].conn)
                        ae_net_conn_close(node->peers[i].conn);
                node->peers[i].up = false;
                if (node->core)
                        fail_pending(&node->peers[i]);
                free(node->peers[i].address);
        }
        while (node->net && (n = ae_net_poll(node->net, events, EVENTS)) > 0) {
                for (int i = 0; i < n; i++) {
                        if (events[i].kind == AE_NET_EV_PUT_DONE)
                                ae_core_put_done(node->core, events[i].cookie, events[i].status);
                }
        }
        if (node->core)
                fail_lost(node);
        ae_core_free(node->core);
        ae_net_close(node->net);
        ae_pool_deinit(&node->pendings);
        ae_pool_deinit(&node->blocks);
        free(node->join);
        free(node->peers);
        free(node);
        return NULL;
}

struct ae_core *ae_node_core(struct ae_node *node)
{
        return node->core;
}

const char *ae_node_address(const struct ae_node *node)
{
        return node->address;
}

void ae_node_peer_info(const struct ae_node *node, uint32_t i, struct ae_node_peer_info *ret)
{
        const struct peer *peer = &node->peers[i];
        bool self = i == node->options.node;

        *ret = (struct ae_node_peer_info){
                .self = self, .up = self || peer->up, .address = peer->address, .why = peer->why,
                .incarnation = self ? node->options.incarnation : peer->incarnation,
                .sent_len = peer->sent_len, .received_len = peer->received_len,
        };
}

void ae_node_net_stats(const struct ae_node *node, struct ae_net_stats *ret_stats)
{
        *ret_stats = (struct ae_net_stats){ 0 };
        if (node->net)
                ae_net_stats(node->net, ret_stats);
}

struct ae_net *ae_node_net(struct ae_node *node)
{
        return node->net;
}

/* ---- connections ------------------------------------------------------------------------ */

static void set_why(struct ae_node *node, uint32_t id, const char *text)
{
        struct peer *peer = &node->peers[id];

        if (strcmp(peer->why, text) != 0)
                node_log(node, 2, "node %u is not connected: %s", id, text);
        (void)snprintf(peer->why, sizeof(peer->why), "%s", text);
        ae_core_peer_note(node->core, id, text);
}

/* Closed by us: its DOWN may be among the events that are being worked off, and means nothing. */
static void close_conn(struct ae_net_conn *conn)
{
        conn->user = NULL;
        ae_net_conn_close(conn);
}

static void try_connect(struct ae_node *node, uint32_t id, uint64_t now_ns)
{
        struct peer *peer = &node->peers[id];

        if (peer->conn || now_ns < peer->retry_ns)
                return;
        peer->retry_ns = now_ns + RETRY_NS;
        if (ae_net_connect(node->net, peer->address, id, &peer->conn) < 0) {
                peer->conn = NULL;
                set_why(node, id, ae_error_text());
                return;
        }
        peer->conn->user = peer;
}

static void on_up(struct ae_node *node, const struct ae_net_event *event)
{
        uint32_t id = event->hello.node;
        struct peer *peer;

        if (id >= node->options.n_nodes || id == node->options.node ||
            (node->peers[id].conn && node->peers[id].conn != event->conn && node->peers[id].up)) {
                node_log(node, 1, "refused a second connection of node %u", id);
                close_conn(event->conn);
                return;
        }
        peer = &node->peers[id];
        peer->conn = event->conn;
        peer->conn->user = peer;
        peer->up = true;
        peer->incarnation = event->hello.incarnation;
        peer->why[0] = '\0';
        node_log(node, 2, "node %u is connected transport=%s", id, node->options.transport);
        ae_core_peer_up(node->core, id, peer->incarnation);
}

/* Who waits for a node that is refused hears why. */
static void on_refused(struct ae_node *node, const struct ae_net_event *event)
{
        uint32_t id = event->hello.node;

        node_log(node, 1, "refused a peer: %s", event->text);
        if ((event->status == AE_EMISMATCH || event->status == AE_EVERSION) &&
            id < node->options.n_nodes && id != node->options.node && !node->peers[id].up)
                set_why(node, id, event->text);
}

static void on_down(struct ae_node *node, const struct ae_net_event *event)
{
        uint32_t id = event->conn->node;
        struct peer *peer = id < node->options.n_nodes ? &node->peers[id] : NULL;
        bool was_up;
        char text[AE_WIRE_TEXT];

        if (!event->conn->user)
                return; /* closed already */
        (void)snprintf(text, sizeof(text), "%s",
                       event->text ? event->text : "the connection broke");
        if (!peer || peer->conn != event->conn) {
                ae_net_conn_close(event->conn);
                return;
        }
        was_up = peer->up;
        peer->up = false;
        peer->conn = NULL;
        ae_net_conn_close(event->conn);
        set_why(node, id, text);
        fail_pending(peer);
        if (was_up)
                ae_core_peer_down(node->core, id, text);
}

/* The core hears of it as of any loss. */
static void drop(struct ae_node *node, uint32_t id, const char *text)
{
        struct peer *peer = &node->peers[id];
        char copy[AE_WIRE_TEXT];

        (void)snprintf(copy, sizeof(copy), "%s", text);
        close_conn(peer->conn);
        peer->conn = NULL;
        peer->up = false;
        fail_pending(peer);
        ae_core_peer_down(node->core, id, copy);
}

/* Those for which more waits than may. */
static void give_up(struct ae_node *node)
{
        char text[AE_WIRE_TEXT];

        if (!node->gives_up)
                return;
        node->gives_up = false;
        for (uint32_t id = 0; id < node->options.n_nodes; id++) {
                const struct peer *peer = &node->peers[id];

                if (!peer->given_up)
                        continue;
                (void)snprintf(text, sizeof(text),
                               "it takes too little: %" PRIu64 " messages and %" PRIu64
                               " puts wait for it, more than the %u MiB that may",
                               peer->n_msgs, peer->n_puts,
                               (unsigned)(AE_NODE_BACKLOG_MAX / AE_MIB));
                set_why(node, id, text);
                drop(node, id, text);
        }
}

static void flush(struct ae_node *node, struct peer *peer)
{
        struct pending *pending;
        int r;

        while (peer->up && !peer->given_up && !ae_list_empty(&peer->pending)) {
                pending = ae_list_entry(peer->pending.next, struct pending, link);
                if (pending->put)
                        r = ae_net_put(peer->conn, &pending->key, pending->off, pending->src,
                                       pending->src_off, pending->len, pending->note,
                                       pending->cookie);
                else
                        r = ae_net_msg(peer->conn, copy_out(node, pending), pending->len);
                if (r == AE_EAGAIN)
                        return;
                unqueue(peer, pending);
                if (r == 0 && pending->put)
                        peer->sent_len += pending->len;
                if (r < 0 && pending->put)
                        ae_list_push(&node->lost, &pending->link);
                else
                        free_pending(node, pending);
        }
}

static void broke_protocol(struct ae_node *node, uint32_t id, const char *text)
{
        node_log(node, 0, "node %u broke the protocol: %s", id, text);
        drop(node, id, text);
}

static void on_event(struct ae_node *node, const struct ae_net_event *event)
{
        struct peer *peer = event->conn ? event->conn->user : NULL;

        switch (event->kind) {
        case AE_NET_EV_UP:
                on_up(node, event);
                break;
        case AE_NET_EV_DOWN:
                on_down(node, event);
                break;
        case AE_NET_EV_MSG:
                if (peer && peer->conn == event->conn &&
                    ae_core_msg(node->core, event->conn->node, event->data, event->len) < 0)
                        broke_protocol(node, event->conn->node, ae_error_text());
                break;
        case AE_NET_EV_NOTIFY:
                if (!peer || peer->conn != event->conn)
                        break;
                peer->received_len += event->len;
                ae_core_notify(node->core, event->conn->node, event->mem, event->off, event->len,
                               event->note);
                break;
        case AE_NET_EV_PUT_DONE:
                ae_core_put_done(node->core, event->cookie, event->status);
                break;
        case AE_NET_EV_WRITABLE:
                if (peer && peer->conn == event->conn)
                        flush(node, peer);
                break;
        case AE_NET_EV_REFUSED:
                on_refused(node, event);
                break;
        }
}

bool ae_node_poll(struct ae_node *node)
{
        struct ae_net_event events[EVENTS];
        int n;

        fail_lost(node);
        if (!node->net)
                return false;
        give_up(node);
        n = ae_net_poll(node->net, events, EVENTS);
        for (int i = 0; i < n; i++)
                on_event(node, &events[i]);
        return n > 0 || node->gives_up || !ae_list_empty(&node->lost) || ae_net_arm(node->net) != 0;
}

void ae_node_task_done(struct ae_node *node, struct ae_task *task)
{
        ae_core_task_done(node->core, task);
}

void ae_node_tick(struct ae_node *node, uint64_t now_ns)
{
        for (uint32_t id = 0; id < node->options.node; id++)
                try_connect(node, id, now_ns);
        ae_core_tick(node->core, now_ns);
}
