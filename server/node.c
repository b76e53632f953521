/* SPDX-License-Identifier: Apache-2.0 */
/* The core over a transport. Owner thread of the endpoint. The higher node id connects. */
#include "server/node.h"

#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/pool.h"
#include "proto/base/status.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#define RETRY_NS (100 * UINT64_C(1000000))
#define EVENTS 64

/* A msg or put that the transport could not take yet, or a put to a peer that is gone. */
struct pending {
        struct ae_list link;
        bool put;
        struct ae_net_key key;
        struct ae_net_mem *src;
        uint64_t off, src_off, len, note, cookie;
        void *data; /* owned; msg */
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
        char why[AE_WIRE_TEXT];
};

struct ae_node {
        struct ae_node_options options;
        struct ae_core *core;
        struct ae_net *net;        /* NULL with one node */
        struct peer *peers;        /* owned */
        struct ae_pool pendings;
        struct ae_list lost;       /* struct pending: puts that end with AE_ELOST */
        char address[AE_NET_ADDR_MAX];
};

/* ---- actions of the core ---------------------------------------------------------------- */

static struct pending *defer(struct peer *peer)
{
        struct pending *pending = ae_pool_take(&peer->node->pendings);

        ae_list_push(peer->up ? &peer->pending : &peer->node->lost, &pending->link);
        return pending;
}

static void do_msg(void *user, uint32_t to, const void *data, size_t len)
{
        struct ae_node *node = user;
        struct peer *peer = &node->peers[to];
        struct pending *pending;
        int r = AE_EAGAIN;

        if (!peer->up)
                return; /* the core hears of the loss; what it said no longer matters */
        if (ae_list_empty(&peer->pending))
                r = ae_net_msg(peer->conn, data, len);
        assert(r == 0 || r == AE_EAGAIN || r == AE_ELOST);
        if (r != AE_EAGAIN)
                return;
        pending = defer(peer);
        pending->data = malloc(len);
        if (!pending->data)
                abort();
        memcpy(pending->data, data, len);
        pending->len = len;
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
        pending = defer(peer);
        pending->put = true;
        pending->key = *key;
        pending->src = src->mem;
        pending->off = off;
        pending->src_off = src_off;
        pending->len = len;
        pending->note = note;
        pending->cookie = cookie;
        if (r != AE_EAGAIN) { /* the connection broke; its DOWN is on the way */
                ae_list_unlink(&pending->link);
                ae_list_push(&node->lost, &pending->link);
        }
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
        ae_list_init(&node->lost);
        node->peers = calloc(options->n_nodes, sizeof(*node->peers));
        if (!node->peers)
                return ae_fail(AE_ENOMEM, "no memory for %u peers", options->n_nodes);
        for (uint32_t i = 0; i < options->n_nodes; i++) {
                node->peers[i].node = node;
                ae_list_init(&node->peers[i].pending);
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

static void fail_pending(struct ae_node *node, struct ae_list *list)
{
        struct ae_list *entry;

        while ((entry = ae_list_pop(list))) {
                struct pending *pending = ae_list_entry(entry, struct pending, link);
                bool put = pending->put;
                uint64_t cookie = pending->cookie;

                free(pending->data);
                ae_pool_give(&node->pendings, pending);
                if (put)
                        ae_core_put_done(node->core, cookie, AE_ELOST);
        }
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
                        fail_pending(node, &node->peers[i].pending);
                free(node->peers[i].address);
        }
        while (node->net && (n = ae_net_poll(node->net, events, EVENTS)) > 0) {
                for (int i = 0; i < n; i++) {
                        if (events[i].kind == AE_NET_EV_PUT_DONE)
                                ae_core_put_done(node->core, events[i].cookie, events[i].status);
                }
        }
        if (node->core)
                fail_pending(node, &node->lost);
        ae_core_free(node->core);
        ae_net_close(node->net);
        ae_pool_deinit(&node->pendings);
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

static void try_connect(struct ae_node *node, uint32_t id, uint64_t now_ns)
{
        struct peer *peer = &node->peers[id];

        if (peer->conn || now_ns < peer->retry_ns)
                return;
        peer->retry_ns = now_ns + RETRY_NS;
        if (ae_net_connect(node->net, peer->address, id, &peer->conn) < 0) {
                peer->conn = NULL;
                set_why(node, id, ae_error_text());
        }
}

static void on_up(struct ae_node *node, const struct ae_net_event *event)
{
        uint32_t id = event->hello.node;
        struct peer *peer;

        if (id >= node->options.n_nodes || id == node->options.node ||
            (node->peers[id].conn && node->peers[id].conn != event->conn && node->peers[id].up)) {
                node_log(node, 1, "refused a second connection of node %u", id);
                ae_net_conn_close(event->conn);
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

static void on_down(struct ae_node *node, const struct ae_net_event *event)
{
        uint32_t id = event->conn->node;
        struct peer *peer = id < node->options.n_nodes ? &node->peers[id] : NULL;
        bool was_up;
        char text[AE_WIRE_TEXT];

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
        fail_pending(node, &peer->pending);
        if (was_up)
                ae_core_peer_down(node->core, id, text);
}

/* Closes what broke the protocol; the core hears of it as of any loss. */
static void drop(struct ae_node *node, uint32_t id, const char *text)
{
        struct peer *peer = &node->peers[id];
        char copy[AE_WIRE_TEXT];

        (void)snprintf(copy, sizeof(copy), "%s", text);
        node_log(node, 0, "node %u broke the protocol: %s", id, copy);
        ae_net_conn_close(peer->conn);
        peer->conn = NULL;
        peer->up = false;
        fail_pending(node, &peer->pending);
        ae_core_peer_down(node->core, id, copy);
}

static void flush(struct ae_node *node, struct peer *peer)
{
        struct pending *pending;
        int r;

        while (peer->up && !ae_list_empty(&peer->pending)) {
                pending = ae_list_entry(peer->pending.next, struct pending, link);
                if (pending->put)
                        r = ae_net_put(peer->conn, &pending->key, pending->off, pending->src,
                                       pending->src_off, pending->len, pending->note,
                                       pending->cookie);
                else
                        r = ae_net_msg(peer->conn, pending->data, pending->len);
                if (r == AE_EAGAIN)
                        return;
                ae_list_unlink(&pending->link);
                if (r == 0 && pending->put)
                        peer->sent_len += pending->len;
                if (r < 0 && pending->put) {
                        ae_list_push(&node->lost, &pending->link);
                        continue;
                }
                free(pending->data);
                ae_pool_give(&node->pendings, pending);
        }
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
                        drop(node, event->conn->node, ae_error_text());
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
                node_log(node, 1, "refused a peer: %s", event->text);
                break;
        }
}

bool ae_node_poll(struct ae_node *node)
{
        struct ae_net_event events[EVENTS];
        int n;

        fail_pending(node, &node->lost);
        if (!node->net)
                return false;
        n = ae_net_poll(node->net, events, EVENTS);
        for (int i = 0; i < n; i++)
                on_event(node, &events[i]);
        return n > 0 || !ae_list_empty(&node->lost) || ae_net_arm(node->net) != 0;
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
