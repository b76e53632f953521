/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The registry of transports and the calls of net.h: arguments are checked here, once for all
 * transports, and then handed to the endpoint's row. Any thread may look a transport up; an
 * endpoint's calls belong to its owner.
 */
#include "proto/net/net.h"

#include <assert.h>
#include <string.h>

#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/net/priv.h"

static const struct ae_net_ops *const transports[] = { &ae_net_tcp, &ae_net_shm, &ae_net_sim };

const struct ae_net_ops *ae_net_find(const char *name)
{
        for (size_t i = 0; i < AE_ARRAY_LEN(transports); i++)
                if (strcmp(transports[i]->name, name) == 0)
                        return transports[i];
        return NULL;
}

const char *ae_net_names(void)
{
        return "tcp shm sim";
}

int ae_net_open(const char *name, const struct ae_net_options *options, struct ae_net **ret_net)
{
        const struct ae_net_ops *ops = ae_net_find(name);
        int r;

        if (!ops && strcmp(name, "verbs") == 0)
                return ae_fail(AE_EUNSUPPORTED,
                               "cannot open transport verbs: this build has no verbs transport");
        if (!ops)
                return ae_fail(AE_EINVAL, "cannot open transport %s: there are %s", name,
                               ae_net_names());
        if (options->loop && !options->wake)
                return ae_fail(AE_EINVAL, "cannot open transport %s: a loop needs a wake()", name);
        if (options->streams > AE_NET_STREAMS_MAX)
                return ae_fail(AE_EINVAL, "cannot open transport %s: %u streams, at most %d", name,
                               options->streams, AE_NET_STREAMS_MAX);
        if (options->listen && strlen(options->listen) >= AE_NET_ADDR_MAX)
                return ae_fail(AE_EINVAL, "cannot listen on %s: the address is too long",
                               options->listen);
        r = ops->open(options, ret_net);
        assert(r <= 0);
        return r;
}

struct ae_net *ae_net_close(struct ae_net *net)
{
        if (net)
                net->ops->close(net);
        return NULL;
}

int ae_net_address(struct ae_net *net, char ret_address[AE_NET_ADDR_MAX])
{
        return net->ops->address(net, ret_address);
}

int ae_net_connect(struct ae_net *net, const char *address, uint32_t node,
                   struct ae_net_conn **ret_conn)
{
        if (strlen(address) >= AE_NET_ADDR_MAX)
                return ae_fail(AE_EINVAL, "cannot connect to %s: the address is too long", address);
        return net->ops->connect(net, address, node, ret_conn);
}

void ae_net_conn_close(struct ae_net_conn *conn)
{
        if (conn)
                conn->net->ops->conn_close(conn);
}

int ae_net_map(struct ae_net *net, void *address, uint64_t len, int fd, uint64_t fd_off,
               struct ae_net_mem **ret_mem)
{
        uint64_t end;

        if (!address || len == 0 || ae_add_overflows((uint64_t)(uintptr_t)address, len, &end) ||
            ae_add_overflows(fd_off, len, &end))
                return ae_fail(AE_EINVAL, "cannot map %llu bytes at %p", (unsigned long long)len,
                               address);
        return net->ops->map(net, address, len, fd, fd_off, ret_mem);
}

void ae_net_unmap(struct ae_net_mem *mem)
{
        if (!mem)
                return;
        assert(mem->n_grants == 0);
        assert(mem->n_puts == 0);
        mem->net->ops->unmap(mem);
}

int ae_net_grant(struct ae_net_conn *conn, struct ae_net_mem *mem, uint64_t off, uint64_t len,
                 struct ae_net_key *ret_key)
{
        assert(mem->net == conn->net);
        if (!ae_range_ok(off, len, mem->len))
                return ae_fail(AE_EINVAL, "cannot grant %llu bytes at %llu of a range of %llu",
                               (unsigned long long)len, (unsigned long long)off,
                               (unsigned long long)mem->len);
        return conn->net->ops->grant(conn, mem, off, len, ret_key);
}

int ae_net_revoke(struct ae_net_conn *conn, const struct ae_net_key *key)
{
        return conn->net->ops->revoke(conn, key);
}

int ae_net_msg(struct ae_net_conn *conn, const void *data, size_t len)
{
        if (len > AE_NET_MSG_MAX)
                return ae_fail(AE_EOVERFLOW, "cannot send a message of %zu bytes: at most %zu", len,
                               AE_NET_MSG_MAX);
        return conn->net->ops->msg(conn, data, len);
}

int ae_net_put(struct ae_net_conn *conn, const struct ae_net_key *key, uint64_t off,
               struct ae_net_mem *src, uint64_t src_off, uint64_t len, uint64_t note,
               uint64_t cookie)
{
        if (len > AE_NET_PUT_MAX || off > AE_NET_PUT_MAX)
                return ae_fail(AE_EINVAL, "cannot put %llu bytes at %llu: at most %llu",
                               (unsigned long long)len, (unsigned long long)off,
                               (unsigned long long)AE_NET_PUT_MAX);
        if (len > 0 && (!src || src->net != conn->net || !ae_range_ok(src_off, len, src->len)))
                return ae_fail(AE_EINVAL, "cannot put %llu bytes from %llu of a range of %llu",
                               (unsigned long long)len, (unsigned long long)src_off,
                               (unsigned long long)(src ? src->len : 0));
        return conn->net->ops->put(conn, key, off, src, src_off, len, note, cookie);
}

int ae_net_poll(struct ae_net *net, struct ae_net_event *events, int n_max)
{
        int n;

        assert(n_max > 0);
        n = net->ops->poll(net, events, n_max);
        assert(n >= 0 && n <= n_max);
        return n;
}

int ae_net_arm(struct ae_net *net)
{
        return net->ops->arm(net);
}

void ae_net_stats(const struct ae_net *net, struct ae_net_stats *ret_stats)
{
        net->ops->stats(net, ret_stats);
}
