/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Get: the requester asks each owner, an owner puts its ranges into the requester's memory as soon
 * as no apply is at work on them, and says of which version they are. Owners hear of a commit at
 * different times; when their versions differ the requester asks again, so that what is got is the
 * state at one version. The core's thread.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/state.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* ---- get -------------------------------------------------------------------------------- */

static void count(struct ae_request *request, uint32_t node, uint32_t n, uint32_t stamp)
{
        assert(n <= request->due[node] && n <= request->n_left);
        request->due[node] -= n;
        request->n_left -= n;
        request->mixed |= request->stamped && stamp != request->stamp;
        request->stamped = true;
        request->stamp = stamp;
        if (request->n_left == 0 && request->mixed)
                ae_get_start(request);
        else if (request->n_left == 0)
                ae_state_finish(request, 0, "");
}

uint64_t ae_get_version(const struct ae_request *request)
{
        uint64_t version = request->job->version;

        /* owners may be one commit ahead of this node, or the pieces older than its last ones */
        return request->stamped ? version + (uint64_t)(int8_t)(request->stamp - (uint32_t)version)
                                : version;
}

void ae_get_arrived(struct ae_request *request, uint32_t node, uint32_t stamp)
{
        struct ae_job *job = request->job;

        if (request->due[node])
                count(request, node, 1, stamp);
        else
                ae_job_fail(job, AE_EPROTO,
                            "node %u sent more pieces of state than node %u asked it for", node,
                            job->core->options.node);
}

/* A fetch that this node serves, when its slices can be read. */
struct ae_state_fetch {
        struct ae_list link;
        uint32_t node;
        Autoep__Fetch *message; /* owned; NULL: the request is ours */
        size_t len;             /* counted: packed, and this */
        struct ae_request *request; /* borrowed: it forgets the fetch before it goes */
};

static bool readable(const struct ae_job *job, const struct ae_state_fetch *fetch)
{
        if (fetch->request) {
                for (uint32_t i = 0; i < fetch->request->n_stretches; i++) {
                        const struct ae_stretch *stretch = &fetch->request->stretches[i];
                        uint32_t index = job->owned_of_slice[stretch->slice];

                        if (index != AE_WIRE_NONE && job->owned[index].n_tasks)
                                return false;
                }
                return true;
        }
        if (fetch->message->round > job->round)
                return false; /* its sender has heard a Commit that is still on its way to us */
        for (size_t i = 0; i < fetch->message->n_items; i++) {
                const Autoep__StateItem *item = fetch->message->items[i];

                if (ae_state_owner(job, item->tensor, item->first)->n_tasks)
                        return false;
        }
        return true;
}

/* Our own stretches go by memcpy: between steps, on the core's thread, a worker waits for it. */
static void serve_own(struct ae_job *job, struct ae_request *request)
{
        uint32_t n_own = 0;

        for (uint32_t i = 0; i < request->n_stretches; i++) {
                const struct ae_stretch *stretch = &request->stretches[i];
                const struct ae_layout_tensor *home = &job->layout->tensors[stretch->tensor];
                struct ae_region *region;
                uint64_t off;

                if (job->owned_of_slice[stretch->slice] == AE_WIRE_NONE)
                        continue;
                region = ae_state_locate(job, stretch->tensor, stretch->what, stretch->first, &off);
                memcpy(request->region->base + stretch->off, region->base + off,
                       stretch->n * ae_state_item_size(home, stretch->what));
                n_own++;
        }
        count(request, job->core->options.node, n_own, job->version & 0xff);
}

static void serve_peer(struct ae_job *job, struct ae_state_fetch *fetch)
{
        struct ae_net_key key;

        memcpy(key.bytes, fetch->message->key->key.data, sizeof(key.bytes));
        for (size_t i = 0; i < fetch->message->n_items; i++) {
                const Autoep__StateItem *item = fetch->message->items[i];
                const struct ae_layout_tensor *home = &job->layout->tensors[item->tensor];
                struct ae_owned *owned = ae_state_owner(job, item->tensor, item->first);
                struct ae_region *region;
                uint64_t off;

                region = ae_state_locate(job, item->tensor, item->what, item->first, &off);
                owned->n_puts++;
                ae_job_put(job, fetch->node, AE_COOKIE_SERVE, owned, &key, fetch->message->offs[i],
                           region, off, item->n * ae_state_item_size(home, item->what),
                           ae_note_state(job->id, job->version, fetch->message->token));
        }
}

static void defer(struct ae_job *job, struct ae_state_fetch *fetch)
{
        ae_list_push(&job->deferred, &fetch->link);
        job->peers[fetch->node].deferred_len += fetch->len;
}

static void free_fetch(struct ae_job *job, struct ae_state_fetch *fetch)
{
        ae_list_unlink(&fetch->link);
        job->peers[fetch->node].deferred_len -= fetch->len;
        if (fetch->request)
                fetch->request->own = NULL;
        if (fetch->message)
                ae_control_free(&fetch->message->base);
        free(fetch);
}

void ae_get_forget(struct ae_request *request)
{
        if (request->own)
                free_fetch(request->job, request->own);
}

void ae_state_pump(struct ae_job *job)
{
        struct ae_state_fetch *fetch;

        ae_list_for_each_safe(fetch, &job->deferred, link) {
                struct ae_request *request = fetch->request;

                if (!readable(job, fetch))
                        continue;
                if (!request)
                        serve_peer(job, fetch);
                free_fetch(job, fetch);
                if (request)
                        serve_own(job, request); /* may be its end */
        }
}

static void ask_peer(struct ae_request *request, uint32_t node)
{
        AE_CLEANUP(ae_cleanup_free) uint64_t *offs =
                ae_core_alloc(request->n_stretches, sizeof(*offs));
        AE_CLEANUP(ae_cleanup_free) Autoep__StateItem *items = NULL;
        AE_CLEANUP(ae_cleanup_free) Autoep__StateItem **pointers = NULL;
        const struct ae_core_options *options = &request->job->core->options;
        Autoep__Fetch fetch = AUTOEP__FETCH__INIT;
        Autoep__Key key = AUTOEP__KEY__INIT;

        fetch.n_items = ae_state_items(request, node, &items, &pointers, offs);
        if (!fetch.n_items)
                return;
        if (!request->keyed[node] &&
            options->ops->grant(options->user, node, request->region, 0, request->region->len,
                                &request->keys[node]) < 0) {
                ae_job_fail(request->job, AE_ELOST, "%s", ae_error_text());
                return;
        }
        request->keyed[node] = true;
        key.key.data = request->keys[node].bytes;
        key.key.len = sizeof(request->keys[node].bytes);
        fetch.token = request->token;
        fetch.key = &key;
        fetch.items = pointers;
        fetch.offs = offs;
        fetch.n_offs = fetch.n_items;
        fetch.round = request->job->round;
        ae_job_control(request->job, node, AE_CONTROL_FETCH, &fetch.base);
}

void ae_get_start(struct ae_request *request)
{
        struct ae_job *job = request->job;
        uint32_t self = job->core->options.node;

        request->n_left = request->n_stretches;
        request->stamped = request->mixed = false;
        for (uint32_t i = 0; i < request->n_stretches; i++)
                request->due[job->layout->slices[request->stretches[i].slice].node]++;
        if (!request->n_left) {
                ae_state_finish(request, 0, "");
                return;
        }
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                if (node != self && job->state < AE_JOB_FAILED)
                        ask_peer(request, node);
        }
        if (!request->due[self])
                return;
        request->own = ae_core_alloc(1, sizeof(*request->own));
        request->own->request = request;
        request->own->node = self;
        defer(job, request->own);
        ae_state_pump(job);
}

/* An owner can't keep it. */
int ae_get_refused(struct ae_job *job, uint32_t node, const Autoep__FetchReply *reply)
{
        struct ae_request *request = ae_state_find(job, reply->token);

        if (request && (request->put || !request->due[node]))
                return ae_fail(AE_EPROTO, "node %u refuses what it was not asked for", node);
        if (request)
                ae_state_finish(request, reply->status, reply->text);
        return 0;
}

/* So much of that node's waits here already that this has no place; says so. */
static bool refuse(struct ae_job *job, uint32_t node, const Autoep__Fetch *message, size_t len)
{
        const struct ae_job_peer *peer = &job->peers[node];
        Autoep__FetchReply reply = AUTOEP__FETCH_REPLY__INIT;
        char text[AE_WIRE_TEXT];

        if (!peer->deferred_len || peer->deferred_len + len <= AE_DEFERRED_MAX)
                return false;
        (void)snprintf(text, sizeof(text), "cannot get state from node %u: gets of node %u that "
                       "wait there for round %" PRIu64 " are %" PRIu64 " bytes, this is %zu, "
                       "%" PRIu64 " may wait", job->core->options.node, node, job->round,
                       peer->deferred_len, len, AE_DEFERRED_MAX);
        reply.token = message->token;
        reply.status = AE_EBUDGET;
        reply.text = text;
        ae_job_control(job, node, AE_CONTROL_FETCH_REPLY, &reply.base);
        return true;
}

int ae_get_on_fetch(struct ae_job *job, uint32_t node, const Autoep__Fetch *message)
{
        struct ae_state_fetch *fetch;
        uint8_t *packed;
        size_t len;
        int r;

        if (!job->owned || !message->key || message->key->key.len != sizeof(struct ae_net_key) ||
            message->n_offs != message->n_items)
                return ae_fail(AE_EPROTO, "FETCH from node %u does not fit", node);
        r = ae_state_check_peer(job, message->items, message->n_items, false);
        if (r < 0)
                return r;
        len = ae_control_size(&message->base);
        if (refuse(job, node, message, len + sizeof(*fetch)))
                return 0;
        packed = ae_core_alloc(1, len);
        ae_control_pack(&message->base, packed);
        fetch = ae_core_alloc(1, sizeof(*fetch));
        fetch->node = node;
        fetch->len = len + sizeof(*fetch);
        fetch->message = autoep__fetch__unpack(NULL, len, packed);
        free(packed);
        if (!fetch->message)
                abort();
        defer(job, fetch);
        ae_state_pump(job);
        return 0;
}

void ae_get_free(struct ae_job *job)
{
        struct ae_state_fetch *fetch;

        ae_list_for_each_safe(fetch, &job->deferred, link)
                free_fetch(job, fetch);
}
