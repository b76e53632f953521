/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gather at the owner: puts its slices of a wanted unit into the requester's cache as soon as they
 * have reached the version. A slice has one copy of its weights; what is posted from it is counted,
 * and an apply waits for that count.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "server/core/job.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

void ae_serve_each(struct ae_job *job, const struct ae_wire_want_item *item, ae_slice_fn fn,
                   void *user)
{
        const struct ae_layout *layout = job->layout;
        const struct ae_layout_unit *unit = &layout->units[item->unit];

        for (uint32_t s = unit->segment_first; s < unit->segment_first + unit->n_segments; s++) {
                const struct ae_layout_segment *segment = &layout->segments[s];
                uint64_t size = ae_dtype_size(segment->dtype);
                bool fixed = !segment->trainable && !segment->buffer;

                if (fixed && item->changed_only)
                        continue;
                for (uint32_t i = 0; i < segment->n_slices; i++) {
                        const struct ae_layout_slice *slice =
                                &layout->slices[segment->slice_first + i];
                        uint64_t begin = segment->unit_off + slice->first * size;
                        uint64_t from = AE_MAX(begin, (uint64_t)item->first);
                        uint64_t to = AE_MIN(begin + slice->n * size, item->first + item->len);

                        if (from < to)
                                fn(job, segment->slice_first + i, from, to - from, from - begin,
                                   user);
                }
        }
}

static void on_copied(struct ae_task *task)
{
        struct ae_owned *owned = task->owner;

        if (task->job->state < AE_JOB_FAILED)
                ae_cache_arrived(task->job, (uint32_t)task->arg[0], owned->slice,
                                 (uint32_t)task->arg[1]);
        ae_serve_put_done(owned);
}

/* The wanted part of one slice; its bytes are final now. */
static void post(struct ae_owned *owned, uint32_t node, const struct ae_wire_want_item *item)
{
        struct ae_job *job = owned->job;
        const struct ae_layout_slice *slice = &job->layout->slices[owned->slice];
        const struct ae_layout_segment *segment = &job->layout->segments[slice->segment];
        uint64_t size = ae_dtype_size(segment->dtype);
        uint64_t begin = segment->unit_off + slice->first * size;
        uint64_t from = AE_MAX(begin, (uint64_t)item->first);
        uint64_t to = AE_MIN(begin + slice->n * size, item->first + item->len);
        uint64_t src_off = slice->weight_off + (from - begin);
        uint64_t dst_off = item->cache_off + (from - item->first);
        struct ae_task *task;

        owned->n_puts++;
        if (node != job->core->options.node) {
                uint64_t base = (uint64_t)(job->shard.weight - job->shard_region->base);

                ae_job_put(job, node, AE_COOKIE_SERVE, owned, &job->peers[node].cache, dst_off,
                           job->shard_region, base + src_off, to - from,
                           ae_note_gather(job->id, owned->content, owned->slice, item->token));
                return;
        }
        task = ae_job_task(job, AE_TASK_COPY, on_copied, owned);
        task->arg[0] = item->token;
        task->arg[1] = owned->content & 0xff;
        task->copy.to = job->params->base + job->page->cache_off + dst_off;
        task->copy.from = job->shard.weight + src_off;
        task->copy.len = to - from;
        ae_job_run(task);
}

struct serve_request {
        const struct ae_wire_want_item *item;
        uint32_t node;
        uint64_t version;
};

static void serve_slice(struct ae_job *job, uint32_t slice, uint64_t image_off, uint64_t len,
                        uint64_t slice_off, void *user)
{
        const struct serve_request *request = user;
        uint32_t index = job->owned_of_slice[slice];
        struct ae_owned *owned;
        struct ae_serve *serve;

        (void)image_off;
        (void)len;
        (void)slice_off;
        if (index == AE_WIRE_NONE)
                return;
        owned = &job->owned[index];
        if (owned->ready && job->committed && job->version >= request->version) {
                post(owned, request->node, request->item);
                return;
        }
        serve = ae_pool_take(&job->core->serves);
        serve->owned = owned;
        serve->node = request->node;
        serve->item = *request->item;
        serve->version = request->version;
        ae_list_push(&owned->waiting, &serve->link);
}

void ae_serve_item(struct ae_job *job, uint32_t node, const struct ae_wire_want_item *item,
                   uint64_t version)
{
        struct serve_request request = { .item = item, .node = node, .version = version };

        ae_serve_each(job, item, serve_slice, &request);
}

static int check_item(const struct ae_job *job, uint32_t node, const struct ae_wire_want_item *item)
{
        if (item->unit >= job->layout->n_units)
                return ae_fail(AE_EPROTO, "node %u wants unit %u of %u", node, item->unit,
                               job->layout->n_units);
        if (!ae_range_ok(item->first, item->len, job->layout->units[item->unit].len) ||
            item->token >= 1u << 24)
                return ae_fail(AE_EPROTO, "node %u wants bytes beyond unit %u", node, item->unit);
        return 0;
}

int ae_serve_want(struct ae_job *job, uint32_t node, const struct ae_wire_want *want)
{
        int r;

        if (!job->owned)
                return ae_fail(AE_EPROTO, "node %u wants slices before job '%s' has memory", node,
                               job->name);
        for (uint32_t i = 0; i < want->n_items; i++) {
                struct ae_wire_want_item item = want->items[i];

                r = check_item(job, node, &item);
                if (r < 0)
                        return r;
                ae_serve_item(job, node, &item, want->head.round);
        }
        return 0;
}

void ae_serve_ready(struct ae_owned *owned)
{
        struct ae_job *job = owned->job;
        struct ae_serve *serve;

        ae_list_for_each_safe(serve, &owned->waiting, link) {
                if (job->version < serve->version)
                        continue;
                ae_list_unlink(&serve->link);
                post(owned, serve->node, &serve->item);
                ae_pool_give(&job->core->serves, serve);
        }
}

void ae_serve_put_done(struct ae_owned *owned)
{
        assert(owned->n_puts > 0);
        owned->n_puts--;
        if (owned->n_puts == 0 && owned->job->state < AE_JOB_FAILED)
                ae_apply_pump(owned->job);
}
