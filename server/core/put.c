/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Put: every owner stages its ranges, then the decider makes the put a verdict of its own, and the
 * staged bytes take effect with its Commit, on all nodes or on none. The core's thread.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/state.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WRITE_N (1u << 18) /* elements of a task */

/* ---- put: the requester ----------------------------------------------------------------- */

static void all_staged(struct ae_request *request)
{
        Autoep__Decide decide = AUTOEP__DECIDE__INIT;

        decide.put_id = request->put_id;
        decide.version = request->version;
        decide.initial = request->initial;
        ae_job_control(request->job, 0, AE_CONTROL_DECIDE, &decide.base);
}

void ae_put_start(struct ae_request *request)
{
        struct ae_job *job = request->job;

        request->n_left = job->core->options.n_nodes;
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++)
                request->due[node] = 1;
        for (uint32_t node = 0; node < job->core->options.n_nodes; node++) {
                AE_CLEANUP(ae_cleanup_free) Autoep__StateItem *items = NULL;
                AE_CLEANUP(ae_cleanup_free) Autoep__StateItem **pointers = NULL;
                Autoep__Stage stage = AUTOEP__STAGE__INIT;

                stage.token = request->token;
                stage.put_id = request->put_id;
                stage.n_items = ae_state_items(request, node, &items, &pointers, NULL);
                stage.items = pointers;
                request->keyed[node] = !stage.n_items || node == job->core->options.node;
                ae_job_control(job, node, AE_CONTROL_STAGE, &stage.base);
        }
}

/* The owner has room: its bytes go there, one put, packed in the order of its items. */
static void send_stage(struct ae_request *request, uint32_t node, const struct ae_net_key *key)
{
        struct ae_job *job = request->job;
        uint64_t off = 0;

        for (uint32_t i = 0; i < request->n_stretches; i++) {
                const struct ae_stretch *stretch = &request->stretches[i];
                uint64_t len =
                        stretch->n *
                        ae_state_item_size(&job->layout->tensors[stretch->tensor], stretch->what);

                if (job->layout->slices[stretch->slice].node != node)
                        continue;
                request->n_puts++;
                ae_job_put(job, node, AE_COOKIE_STATE, request, key, off, request->region,
                           stretch->off, len,
                           ae_note_state(job->id, request->version, request->token));
                off += len;
        }
}

static struct ae_stage *find_stage(const struct ae_job *job, uint32_t node, uint64_t put_id)
{
        struct ae_stage *stage;

        ae_list_for_each(stage, &job->stages, link) {
                if (stage->node == node && stage->put_id == put_id && !stage->committed)
                        return stage;
        }
        return NULL;
}

static void copy_stage(struct ae_request *request, struct ae_stage *stage)
{
        struct ae_job *job = request->job;
        uint64_t off = 0;

        for (uint32_t i = 0; i < request->n_stretches; i++) {
                const struct ae_stretch *stretch = &request->stretches[i];
                uint64_t len =
                        stretch->n *
                        ae_state_item_size(&job->layout->tensors[stretch->tensor], stretch->what);

                if (job->layout->slices[stretch->slice].node != job->core->options.node)
                        continue;
                memcpy(stage->region->base + off, request->region->base + stretch->off, len);
                off += len;
        }
        stage->n_left = 0;
}

/* Each owner says once where the bytes go, if there are any, and once that all are there. */
static bool reply_fits(const struct ae_request *request, uint32_t node,
                       const Autoep__StageReply *reply)
{
        if (!request->put || !request->due[node])
                return false;
        if (reply->key)
                return !request->keyed[node] &&
                       reply->key->key.len == sizeof(struct ae_net_key);
        return reply->status < 0 || request->keyed[node];
}

int ae_put_on_stage_reply(struct ae_job *job, uint32_t node, const Autoep__StageReply *reply)
{
        struct ae_request *request = ae_state_find(job, reply->token);
        struct ae_net_key key;

        if (!request)
                return 0;
        if (!reply_fits(request, node, reply))
                return ae_fail(AE_EPROTO, "STAGE_REPLY from node %u does not fit", node);
        if (reply->status < 0) {
                ae_state_put_off(job, request->put_id, reply->status, reply->text);
                return 0;
        }
        if (node == job->core->options.node) {
                struct ae_stage *stage = find_stage(job, node, request->put_id);

                copy_stage(request, stage);
        } else if (reply->key) {
                memcpy(key.bytes, reply->key->key.data, sizeof(key.bytes));
                request->keyed[node] = true;
                send_stage(request, node, &key);
                return 0; /* the owner says when the bytes are there */
        }
        request->due[node] = 0;
        if (--request->n_left == 0)
                all_staged(request);
        return 0;
}

/* ---- put: the owner --------------------------------------------------------------------- */

static void free_stage(struct ae_job *job, struct ae_stage *stage)
{
        const struct ae_core_options *options = &job->core->options;

        ae_list_unlink(&stage->link);
        if (stage->granted)
                options->ops->revoke(options->user, stage->node, &stage->key);
        if (stage->region)
                ae_memory_transferred(job, stage->region);
        if (stage->message)
                ae_control_free(&stage->message->base);
        free(stage);
}

static void reply_stage(struct ae_job *job, const struct ae_stage *stage, int status,
                        const char *text, const struct ae_net_key *key)
{
        Autoep__StageReply reply = AUTOEP__STAGE_REPLY__INIT;
        Autoep__Key wire = AUTOEP__KEY__INIT;

        reply.token = stage->message->token;
        reply.status = status;
        reply.text = (char *)(uintptr_t)text;
        if (key) {
                wire.key.data = (uint8_t *)(uintptr_t)key->bytes;
                wire.key.len = sizeof(key->bytes);
                reply.key = &wire;
        }
        ae_job_control(job, stage->node, AE_CONTROL_STAGE_REPLY, &reply.base);
}

static int make_stage(struct ae_job *job, struct ae_stage *stage)
{
        const struct ae_core_options *options = &job->core->options;
        uint64_t len = 0;
        int r;

        for (size_t i = 0; i < stage->message->n_items; i++) {
                const Autoep__StateItem *item = stage->message->items[i];

                if (ae_add_overflows(len, item->n * ae_state_item_size(
                                                  &job->layout->tensors[item->tensor], item->what),
                                     &len))
                        return ae_fail(AE_EOVERFLOW, "the items have more than 2^64 bytes");
        }
        r = ae_memory_transfer(job, "autoep-stage", len, &stage->region);
        if (r < 0)
                return r;
        stage->n_left = stage->message->n_items;
        if (stage->node == options->node || stage->n_left == 0)
                return 0;
        r = options->ops->grant(options->user, stage->node, stage->region, 0, stage->region->len,
                                &stage->key);
        stage->granted = r == 0;
        return r;
}

int ae_put_on_stage(struct ae_job *job, uint32_t node, const Autoep__Stage *message)
{
        struct ae_stage *stage;
        uint8_t *packed;
        size_t len;
        int r;

        if (!job->owned)
                return ae_fail(AE_EPROTO, "STAGE from node %u before job '%s' has memory", node,
                               job->name);
        r = ae_state_check_peer(job, message->items, message->n_items, true);
        if (r < 0)
                return r;
        len = ae_control_size(&message->base);
        packed = ae_core_alloc(1, len);
        ae_control_pack(&message->base, packed);
        stage = ae_core_alloc(1, sizeof(*stage));
        stage->put_id = message->put_id;
        stage->node = node;
        stage->message = autoep__stage__unpack(NULL, len, packed);
        free(packed);
        if (!stage->message)
                abort();
        ae_list_push(&job->stages, &stage->link);
        r = make_stage(job, stage);
        if (r < 0)
                reply_stage(job, stage, r, ae_error_text(), NULL);
        else
                reply_stage(job, stage, 0, "", stage->granted ? &stage->key : NULL);
        if (r < 0)
                free_stage(job, stage);
        return 0;
}

/* A put of state arrived: of a get of ours, or of somebody's staging. */
void ae_state_arrived(struct ae_job *job, uint32_t node, struct ae_net_mem *mem, uint64_t note)
{
        struct ae_stage *stage;
        struct ae_request *request = ae_state_find(job, (uint32_t)note);

        ae_list_for_each(stage, &job->stages, link) {
                if (stage->region->mem != mem || stage->node != node || stage->n_left == 0)
                        continue;
                if (--stage->n_left == 0)
                        reply_stage(job, stage, 0, "", NULL);
                return;
        }
        if (request && !request->put && request->region->mem == mem)
                ae_get_arrived(request, node, ae_note_stamp(note));
}

/* ---- put: taking effect ----------------------------------------------------------------- */

static void write_next(struct ae_job *job, struct ae_stage *stage);

static void on_written(struct ae_task *task)
{
        struct ae_stage *stage = task->owner;
        const Autoep__StateItem *item = stage->message->items[stage->item];

        stage->item_n += task->state.n;
        if (stage->item_n == item->n) {
                stage->item++;
                stage->item_n = 0;
                ae_apply_finished(ae_state_owner(task->job, item->tensor, item->first));
        }
        if (task->job->state < AE_JOB_FAILED)
                write_next(task->job, stage);
}

/* One task after another, in the order of the items: they may overlap. */
static void write_next(struct ae_job *job, struct ae_stage *stage)
{
        const Autoep__StateItem *item;
        const struct ae_layout_tensor *home;
        struct ae_task *task;
        uint64_t off;

        if (stage->item == stage->message->n_items) {
                free_stage(job, stage);
                ae_apply_one_done(job);
                return;
        }
        item = stage->message->items[stage->item];
        home = &job->layout->tensors[item->tensor];
        task = ae_job_task(job, AE_TASK_STATE, on_written, stage);
        task->state.owned = ae_state_owner(job, item->tensor, item->first);
        task->state.n = AE_MIN(item->n - stage->item_n, (uint64_t)WRITE_N);
        task->state.from = stage->region->base + stage->off;
        task->state.weight_dtype = home->dtype;
        if (item->what == WEIGHT || item->what == MASTER) {
                (void)ae_state_locate(job, item->tensor, WEIGHT, item->first + stage->item_n, &off);
                task->state.weight = job->shard_region->base + off;
        }
        if (item->what != WEIGHT) {
                (void)ae_state_locate(job, item->tensor, item->what, item->first + stage->item_n,
                                      &off);
                task->state.state = (float *)(void *)(job->shard_region->base + off);
        }
        stage->off += task->state.n * ae_state_item_size(home, item->what);
        ae_apply_add(task);
}

/*
 * The last step's apply is through, for only then does a node prepare a put. Each write waits for
 * what is still being sent from its slice at the old version, as an apply does, and nobody reads
 * the slice until it is done.
 */
void ae_state_commit(struct ae_job *job)
{
        struct ae_stage *stage = find_stage(job, job->verdict.put_node, job->verdict.put_id);
        struct ae_request *request;

        assert(job->n_applying == 0);
        /* what changed is known to all nodes alike only as "everything": puts are rare */
        for (uint32_t u = 0; u < job->layout->n_units; u++)
                job->updated[u] = true;
        for (uint32_t i = 0; i < job->n_owned; i++) {
                job->owned[i].content = job->version;
                job->owned[i].ready = true;
        }
        for (size_t i = 0; stage && i < stage->message->n_items; i++) {
                const Autoep__StateItem *item = stage->message->items[i];
                struct ae_owned *owned = ae_state_owner(job, item->tensor, item->first);

                owned->ready = false;
                owned->n_tasks++;
        }
        if (stage && stage->message->n_items) {
                stage->committed = true;
                job->n_applying++;
                write_next(job, stage);
        } else if (stage) {
                free_stage(job, stage);
        }
        ae_list_for_each(request, &job->requests, link) {
                if (request->initial && request->put_id == job->verdict.put_id) {
                        ae_state_finish(request, 0, "");
                        break;
                }
        }
}

void ae_put_shown(struct ae_job *job)
{
        Autoep__DecideReply reply = AUTOEP__DECIDE_REPLY__INIT;

        reply.put_id = job->verdict.put_id;
        reply.text = (char *)(uintptr_t)"";
        ae_job_control(job, job->verdict.put_node, AE_CONTROL_DECIDE_REPLY, &reply.base);
}

/* A put ends when no gather anywhere gives the old version any more. */
void ae_put_seen(struct ae_job *job, uint64_t put_id)
{
        struct ae_request *request;

        ae_list_for_each(request, &job->requests, link) {
                if (!request->put || request->initial || request->put_id != put_id)
                        continue;
                if (++request->n_seen == job->core->options.n_nodes)
                        ae_state_finish(request, 0, "");
                return;
        }
}

void ae_state_put_off(struct ae_job *job, uint64_t put_id, int status, const char *text)
{
        struct ae_request *request;
        struct ae_stage *stage;

        ae_list_for_each_safe(stage, &job->stages, link) {
                if (stage->put_id == put_id && !stage->committed)
                        free_stage(job, stage);
        }
        ae_list_for_each_safe(request, &job->requests, link) {
                if (request->put && request->put_id == put_id)
                        ae_state_finish(request, status, text);
        }
}

void ae_put_free(struct ae_job *job)
{
        struct ae_stage *stage;

        ae_list_for_each_safe(stage, &job->stages, link)
                free_stage(job, stage);
}
