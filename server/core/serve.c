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
#include <inttypes.h>
#include <string.h>

/* What an item wants of a slice, as bytes of the unit's image. */
struct stretch {
        uint64_t begin;    /* of the slice */
        uint64_t from, to; /* wanted; nothing: from >= to */
};

static struct stretch wanted(const struct ae_job *job, uint32_t slice,
                             const struct ae_wire_want_item *item)
{
        const struct ae_layout_slice *s = &job->layout->slices[slice];
        const struct ae_layout_segment *segment = &job->layout->segments[s->segment];
        uint64_t size = ae_dtype_size(segment->dtype);
        uint64_t begin = segment->unit_off + s->first * size;

        if (!segment->trainable && !segment->buffer && item->changed_only)
                return (struct stretch){ begin, begin, begin };
        return (struct stretch){ begin, AE_MAX(begin, (uint64_t)item->first),
                                 AE_MIN(begin + s->n * size, item->first + item->len) };
}

void ae_serve_each(struct ae_job *job, const struct ae_wire_want_item *item, ae_slice_fn fn,
                   void *user)
{
        const struct ae_layout *layout = job->layout;
        const struct ae_layout_unit *unit = &layout->units[item->unit];

        for (uint32_t s = unit->segment_first; s < unit->segment_first + unit->n_segments; s++) {
                const struct ae_layout_segment *segment = &layout->segments[s];

                for (uint32_t i = 0; i < segment->n_slices; i++) {
                        struct stretch stretch = wanted(job, segment->slice_first + i, item);

                        if (stretch.from < stretch.to)
                                fn(job, segment->slice_first + i, user);
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
        struct stretch stretch = wanted(job, owned->slice, item);
        uint64_t src_off = slice->weight_off + (stretch.from - stretch.begin);
        uint64_t dst_off = item->cache_off + (stretch.from - item->first);
        struct ae_task *task;

        owned->n_puts++;
        if (node != job->core->options.node) {
                uint64_t base = (uint64_t)(job->shard.weight - job->shard_region->base);

                ae_job_put(job, node, AE_COOKIE_SERVE, owned, &job->peers[node].cache, dst_off,
                           job->shard_region, base + src_off, stretch.to - stretch.from,
                           ae_note_gather(job->id, owned->content, owned->slice, item->token));
                return;
        }
        task = ae_job_task(job, AE_TASK_COPY, on_copied, owned);
        task->arg[0] = item->token;
        task->arg[1] = owned->content & 0xff;
        task->copy.to = job->params->base + job->page->cache_off + dst_off;
        task->copy.from = job->shard.weight + src_off;
        task->copy.len = stretch.to - stretch.from;
        ae_job_run(task);
}

/* A cache fetches a unit once at a time, and all caches of a job have as many fetches. */
void ae_serve_new(struct ae_job *job)
{
        uint32_t most = 0;

        for (uint32_t u = 0; u < job->layout->n_units; u++)
                most = AE_MAX(most, job->owned_of_unit[u + 1] - job->owned_of_unit[u]);
        job->serves_max = (uint64_t)most * job->n_fetches;
}

static void serve_slice(struct ae_owned *owned, uint32_t node,
                        const struct ae_wire_want_item *item, uint64_t version)
{
        struct ae_job *job = owned->job;
        struct ae_serve *serve;

        if (owned->ready && job->committed && job->version >= version) {
                post(owned, node, item);
                return;
        }
        serve = ae_pool_take(&job->core->serves);
        serve->owned = owned;
        serve->node = node;
        serve->item = *item;
        serve->version = version;
        job->peers[node].n_serves++;
        ae_list_push(&owned->waiting, &serve->link);
}

/* Our slices of the unit alone: every node asks, and the unit may have a slice on each. */
static void serve_item(struct ae_job *job, uint32_t node, const struct ae_wire_want_item *item,
                       uint64_t version)
{
        uint32_t end = job->owned_of_unit[item->unit + 1];

        for (uint32_t i = job->owned_of_unit[item->unit]; i < end; i++) {
                struct stretch stretch = wanted(job, job->owned[i].slice, item);

                if (stretch.from < stretch.to)
                        serve_slice(&job->owned[i], node, item, version);
        }
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
        if (want->head.round > job->version + 1) /* a commit that is still on its way to us */
                return ae_fail(AE_EPROTO, "node %u wants version %" PRIu64 ", job '%s' is at %"
                               PRIu64, node, want->head.round, job->name, job->version);
        for (uint32_t i = 0; i < want->n_items; i++) {
                struct ae_wire_want_item item = want->items[i];

                r = check_item(job, node, &item);
                if (r < 0)
                        return r;
                serve_item(job, node, &item, want->head.round);
                if (job->peers[node].n_serves > job->serves_max)
                        return ae_fail(AE_EPROTO,
                                       "node %u waits for %" PRIu64 " slices, its cache of job "
                                       "'%s' can fetch %" PRIu64 " at a time", node,
                                       job->peers[node].n_serves, job->name, job->serves_max);
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
                job->peers[serve->node].n_serves--;
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
