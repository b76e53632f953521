/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Second stage of a layout: which tensors make up which segment, where each stands in it, and
 * where segments stand in the gathered and the gradient image of their unit. Sizes were checked in
 * the first stage (the job has at most AE_LAYOUT_MAX_LEN bytes), so that sums here can't wrap.
 */
#include "proto/base/num.h"
#include "proto/wire/layout-private.h"

#include <stdlib.h>

/* Kinds of segment in the order in which they stand in a unit: by storage, then by dtype value. */
enum storage { STORAGE_TRAINABLE, STORAGE_FROZEN, STORAGE_BUFFER, N_STORAGES };
#define DTYPES_END 4 /* beyond the largest dtype value */
#define N_KINDS (N_STORAGES * DTYPES_END)

static bool has_storage(const struct ae_layout_tensor *tensor)
{
        return tensor->home == tensor->id && tensor->class != AE_CLASS_EXPERT;
}

static uint32_t kind_of(const struct ae_layout_tensor *tensor)
{
        enum storage storage = tensor->class == AE_CLASS_BUFFER ? STORAGE_BUFFER :
                               tensor->frozen ? STORAGE_FROZEN : STORAGE_TRAINABLE;

        assert(tensor->dtype < DTYPES_END);
        return storage * DTYPES_END + tensor->dtype;
}

static const struct ae_layout_tensor *unit_tensor(const struct ae_layout *layout,
                                                  const struct ae_layout_unit *unit, uint32_t i)
{
        return &layout->tensors[layout->unit_tensors[unit->tensor_first + i]];
}

/* Sorts tensors by unit, stably. */
static void group_by_unit(struct ae_layout *layout)
{
        uint32_t first = 0;

        for (uint32_t i = 0; i < layout->n_tensors; i++)
                layout->units[layout->tensors[i].unit].n_tensors++;
        for (uint32_t i = 0; i < layout->n_units; i++) {
                layout->units[i].tensor_first = first;
                first += layout->units[i].n_tensors;
                layout->units[i].n_tensors = 0; /* counts again while it is filled */
        }
        assert(first == layout->n_tensors);
        for (uint32_t i = 0; i < layout->n_tensors; i++) {
                struct ae_layout_unit *unit = &layout->units[layout->tensors[i].unit];

                layout->unit_tensors[unit->tensor_first + unit->n_tensors++] = i;
        }
}

/* One bit for each kind of segment that the unit has. */
static uint32_t kinds_of_unit(const struct ae_layout *layout, const struct ae_layout_unit *unit)
{
        uint32_t kinds = 0;

        for (uint32_t i = 0; i < unit->n_tensors; i++) {
                const struct ae_layout_tensor *tensor = unit_tensor(layout, unit, i);

                if (has_storage(tensor))
                        kinds |= UINT32_C(1) << kind_of(tensor);
        }
        return kinds;
}

/* Puts the unit's tensors of one kind one after another. */
static void fill_segment(struct ae_layout *layout, struct ae_layout_segment *segment,
                         uint32_t kind, uint32_t *n_placed)
{
        const struct ae_layout_unit *unit = &layout->units[segment->unit];
        uint64_t align = AE_LAYOUT_TENSOR_ALIGN / ae_dtype_size(segment->dtype);

        segment->tensor_first = *n_placed;
        for (uint32_t i = 0; i < unit->n_tensors; i++) {
                uint32_t id = layout->unit_tensors[unit->tensor_first + i];
                struct ae_layout_tensor *tensor = &layout->tensors[id];

                if (!has_storage(tensor) || kind_of(tensor) != kind)
                        continue;
                tensor->segment = ae_u32((uint64_t)(segment - layout->segments));
                tensor->first = ae_align_up(segment->n, align);
                segment->n = tensor->first + tensor->n;
                layout->segment_tensors[(*n_placed)++] = id;
        }
        segment->n_tensors = *n_placed - segment->tensor_first;
        assert(segment->n_tensors > 0);
}

static void place_in_images(struct ae_layout_unit *unit, struct ae_layout_segment *segment)
{
        uint64_t len = segment->n * ae_dtype_size(segment->dtype);

        segment->unit_off = unit->len;
        unit->len += ae_align_up(len, AE_LAYOUT_TENSOR_ALIGN);
        if (!segment->trainable)
                return;
        segment->unit_grad_first = unit->n_grad;
        unit->n_grad += ae_align_up(segment->n, AE_LAYOUT_SLICE_ALIGN);
}

static void cut_unit(struct ae_layout *layout, uint32_t id, uint32_t *n_placed)
{
        struct ae_layout_unit *unit = &layout->units[id];
        uint32_t kinds = kinds_of_unit(layout, unit);

        unit->segment_first = layout->n_segments;
        for (uint32_t kind = 0; kind < N_KINDS; kind++) {
                struct ae_layout_segment *segment = &layout->segments[layout->n_segments];

                if (!(kinds & UINT32_C(1) << kind))
                        continue;
                *segment = (struct ae_layout_segment){
                        .unit = id,
                        .dtype = kind % DTYPES_END,
                        .trainable = kind / DTYPES_END == STORAGE_TRAINABLE,
                        .buffer = kind / DTYPES_END == STORAGE_BUFFER,
                };
                fill_segment(layout, segment, kind, n_placed);
                place_in_images(unit, segment);
                layout->n_segments++;
        }
        unit->n_segments = layout->n_segments - unit->segment_first;
        unit->grad_first = layout->n_grad;
        layout->n_grad += unit->n_grad;
}

static void join_aliases(struct ae_layout *layout)
{
        for (uint32_t i = 0; i < layout->n_tensors; i++) {
                struct ae_layout_tensor *tensor = &layout->tensors[i];

                tensor->segment = layout->tensors[tensor->home].segment;
                tensor->first = layout->tensors[tensor->home].first;
        }
}

int ae_layout_cut(struct ae_layout *layout)
{
        uint32_t n_segments = 0;
        uint32_t n_placed = 0;

        layout->unit_tensors = calloc(layout->n_tensors + 1, sizeof(*layout->unit_tensors));
        layout->segment_tensors = calloc(layout->n_tensors + 1, sizeof(*layout->segment_tensors));
        if (!layout->unit_tensors || !layout->segment_tensors)
                return ae_layout_no_memory("the order of tensors");
        group_by_unit(layout);
        for (uint32_t i = 0; i < layout->n_units; i++) {
                const struct ae_layout_unit *unit = &layout->units[i];

                n_segments += (uint32_t)__builtin_popcount(kinds_of_unit(layout, unit));
        }
        layout->segments = calloc(n_segments + 1, sizeof(*layout->segments));
        if (!layout->segments)
                return ae_layout_no_memory("segments");
        for (uint32_t i = 0; i < layout->n_units; i++)
                cut_unit(layout, i, &n_placed);
        assert(layout->n_segments == n_segments);
        join_aliases(layout);
        return 0;
}
