/* SPDX-License-Identifier: Apache-2.0 */
/*
 * units, tensors and shards for autoep-ctl, read from the job's layout and from what this node
 * holds of it. A job without a layout yet has no rows. Loop thread.
 */
#include "proto/base/num.h"
#include "server/inspect-private.h"

#include <assert.h>

static uint32_t n_units(const struct ae_job *job)
{
        return job->layout ? job->layout->n_units : 0;
}

/* ---- units ------------------------------------------------------------------------------ */

/* The published copy; NULL when there is none. */
static const struct ae_cache_slot *copy_of(const struct ae_job *job, uint32_t unit)
{
        uint32_t slot;

        if (!job->units || job->units[unit].slot == AE_LOCAL_SLOT_NONE)
                return NULL;
        slot = job->units[unit].slot;
        assert(slot < job->n_slots);
        return job->slots[slot].state == AE_SLOT_PUBLISHED ? &job->slots[slot] : NULL;
}

static void put_unit(struct ae_json *json, const struct ae_job *job, uint32_t id)
{
        const struct ae_layout_unit *unit = &job->layout->units[id];
        const struct ae_cache_slot *copy = copy_of(job, id);

        ae_json_object_begin(json);
        ae_json_put_u64(json, "id", id);
        ae_json_put_string(json, "name", unit->name);
        if (copy) /* published: its bytes are those of the job's version, whenever they came */
                ae_inspect_put_u64(json, "version", job->version);
        else
                ae_inspect_put_null(json, "version");
        ae_json_put_bool(json, "cached", copy != NULL);
        ae_json_put_u64(json, "len", unit->len);
        ae_json_put_u64(json, "segments", unit->n_segments);
        ae_inspect_put_u64(json, "misses", job->units[id].n_misses);
        ae_json_object_end(json);
}

void ae_inspect_units(struct ae_inspect_query *query)
{
        const struct ae_job *job = query->job;
        struct ae_json *json = &query->json;

        ae_inspect_put_u64(json, "version", job->version);
        ae_json_key(json, "units");
        ae_json_array_begin(json);
        for (uint32_t u = 0; u < n_units(job) && !ae_inspect_full(query); u++) {
                if (query->unit == AE_LAYOUT_NONE || query->unit == u)
                        put_unit(json, job, u);
        }
        ae_json_array_end(json);
}

/* ---- tensors ---------------------------------------------------------------------------- */

static const char *class_text(uint32_t class)
{
        switch (class) {
        case AE_CLASS_EXPERT:
                return "expert";
        case AE_CLASS_BUFFER:
                return "buffer";
        }
        assert(class == AE_CLASS_DENSE);
        return "dense";
}

static void put_tensor(struct ae_json *json, const struct ae_layout *layout, uint32_t id)
{
        const struct ae_layout_tensor *tensor = &layout->tensors[id];

        ae_json_object_begin(json);
        ae_json_put_u64(json, "id", id);
        ae_json_put_string(json, "name", tensor->name);
        ae_json_put_string(json, "unit", layout->units[tensor->unit].name);
        ae_json_put_string(json, "dtype", ae_dtype_text(tensor->dtype));
        ae_json_put_string(json, "class", class_text(tensor->class));
        ae_json_key(json, "shape");
        ae_json_array_begin(json);
        for (uint32_t d = 0; d < tensor->n_dims; d++)
                ae_json_u64(json, AE_MIN(tensor->dims[d], (uint64_t)INT64_MAX));
        ae_json_array_end(json);
        ae_json_put_u64(json, "n", tensor->n);
        if (tensor->class == AE_CLASS_BUFFER)
                ae_inspect_put_null(json, "group");
        else
                ae_json_put_u64(json, "group", tensor->group);
        ae_json_key(json, "flags");
        ae_json_array_begin(json);
        if (tensor->frozen)
                ae_json_string(json, "frozen");
        ae_json_array_end(json);
        ae_json_put_string(json, "alias_of",
                           tensor->home != id ? layout->tensors[tensor->home].name : NULL);
        ae_json_object_end(json);
}

void ae_inspect_tensors(struct ae_inspect_query *query)
{
        const struct ae_layout *layout = query->job->layout;
        struct ae_json *json = &query->json;

        ae_json_key(json, "tensors");
        ae_json_array_begin(json);
        for (uint32_t t = 0; layout && t < layout->n_tensors && !ae_inspect_full(query); t++) {
                if ((query->tensor == AE_LAYOUT_NONE || query->tensor == t) &&
                    (query->unit == AE_LAYOUT_NONE || query->unit == layout->tensors[t].unit))
                        put_tensor(json, layout, t);
        }
        ae_json_array_end(json);
}

/* ---- shards ----------------------------------------------------------------------------- */

static const char *kind_text(const struct ae_layout_segment *segment)
{
        if (segment->buffer)
                return "buffer";
        return segment->trainable ? "trainable" : "frozen";
}

/* The place of element @index in a row-major tensor: one number per dimension. */
static void put_place(struct ae_json *json, const char *key, const struct ae_layout_tensor *tensor,
                      uint64_t index)
{
        uint64_t place[AE_LAYOUT_MAX_DIMS];

        assert(index < tensor->n);
        for (uint32_t d = tensor->n_dims; d-- > 0;) {
                place[d] = index % tensor->dims[d];
                index /= tensor->dims[d];
        }
        ae_json_key(json, key);
        ae_json_array_begin(json);
        for (uint32_t d = 0; d < tensor->n_dims; d++)
                ae_json_u64(json, place[d]);
        ae_json_array_end(json);
}

/* What a slice of ours has reached: while tasks still change it, the version before. */
static void put_version(struct ae_json *json, const struct ae_job *job, uint32_t slice)
{
        const struct ae_owned *owned;

        if (!job->committed || !job->owned_of_slice || job->owned_of_slice[slice] == AE_WIRE_NONE) {
                ae_inspect_put_null(json, "version");
                return;
        }
        owned = &job->owned[job->owned_of_slice[slice]];
        assert(owned->slice == slice);
        ae_inspect_put_u64(json, "version",
                           owned->ready || !job->version ? job->version : job->version - 1);
}

/* Bytes that the owner has for @n elements: the weights, and what autoep_get() reaches beside. */
static void put_lens(struct ae_json *json, const struct ae_job *job,
                     const struct ae_layout_segment *segment, uint64_t n)
{
        uint64_t state_len = segment->trainable ? n * sizeof(float) : 0;
        bool second = job->model->message->optimizer == AE_OPT_ADAMW;

        ae_json_put_u64(json, "weight_len", n * ae_dtype_size(segment->dtype));
        ae_json_put_u64(json, "master_len", state_len);
        ae_json_put_u64(json, "moment1_len", state_len);
        ae_json_put_u64(json, "moment2_len", second ? state_len : 0);
        ae_json_put_u64(json, "sum_len", state_len);
}

/* The part of a slice that @home covers; all of it for NULL. Nothing for an empty part. */
static void put_slice(struct ae_inspect_query *query, uint32_t id,
                      const struct ae_layout_tensor *home)
{
        const struct ae_layout *layout = query->job->layout;
        const struct ae_layout_slice *slice = &layout->slices[id];
        const struct ae_layout_segment *segment = &layout->segments[slice->segment];
        uint64_t begin = home ? AE_MAX(slice->first, home->first) : slice->first;
        uint64_t end = slice->first + slice->n;
        struct ae_json *json = &query->json;

        if (home)
                end = AE_MIN(end, home->first + home->n);
        if (begin >= end)
                return;
        ae_json_object_begin(json);
        ae_json_put_u64(json, "node", slice->node);
        ae_json_put_string(json, "unit", layout->units[segment->unit].name);
        ae_json_put_u64(json, "segment", slice->segment);
        ae_json_put_string(json, "dtype", ae_dtype_text(segment->dtype));
        ae_json_put_string(json, "kind", kind_text(segment));
        ae_json_put_u64(json, "first", home ? begin - home->first : begin);
        ae_json_put_u64(json, "n", end - begin);
        if (home) {
                put_place(json, "from", home, begin - home->first);
                put_place(json, "to", home, end - 1 - home->first);
        }
        put_version(json, query->job, id);
        put_lens(json, query->job, segment, end - begin);
        ae_json_object_end(json);
}

static void put_segment(struct ae_inspect_query *query, uint32_t id,
                        const struct ae_layout_tensor *home)
{
        const struct ae_layout_segment *segment = &query->job->layout->segments[id];

        for (uint32_t s = 0; s < segment->n_slices && !ae_inspect_full(query); s++)
                put_slice(query, segment->slice_first + s, home);
}

void ae_inspect_shards(struct ae_inspect_query *query)
{
        const struct ae_layout *layout = query->job->layout;
        const struct ae_layout_tensor *home = NULL;
        struct ae_json *json = &query->json;

        if (query->tensor != AE_LAYOUT_NONE) {
                home = &layout->tensors[layout->tensors[query->tensor].home];
                ae_json_put_string(json, "tensor", home->name);
        }
        ae_inspect_put_u64(json, "version", query->job->version);
        ae_json_key(json, "shards");
        ae_json_array_begin(json);
        for (uint32_t s = 0; !home && layout && s < layout->n_segments; s++) {
                if (query->unit == AE_LAYOUT_NONE || query->unit == layout->segments[s].unit)
                        put_segment(query, s, NULL);
        }
        if (home && home->segment != AE_LAYOUT_NONE) /* an expert's bytes are with the workers */
                put_segment(query, home->segment, home);
        ae_json_array_end(json);
}
