/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Third stage of a layout: cuts segments into slices and gives them to nodes by the rule on
 * layout.h. Nodes stand in a binary heap, the least loaded on top. The S owners of a segment are
 * popped to the heap's end, as in a heapsort, given their slices, and sifted back, so that a
 * segment costs S log(nodes). The order of loads is total (the id comes last), so that the
 * outcome depends on nothing but the segments.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout-private.h"

#include <stdlib.h>
#include <string.h>

struct placer {
        struct ae_layout *layout; /* borrowed; node_state_n and node_weight_len are the loads */
        uint32_t *heap;           /* owned; the nodes */
        bool by_state;            /* trainable state counts before weight bytes */
};

static bool lighter(const struct placer *placer, uint32_t a, uint32_t b)
{
        const uint64_t *state_n = placer->layout->node_state_n;
        const uint64_t *weight_len = placer->layout->node_weight_len;

        if (placer->by_state && state_n[a] != state_n[b])
                return state_n[a] < state_n[b];
        if (weight_len[a] != weight_len[b])
                return weight_len[a] < weight_len[b];
        return a < b;
}

static void swap(uint32_t *a, uint32_t *b)
{
        uint32_t held = *a;

        *a = *b;
        *b = held;
}

static void sift_up(struct placer *placer, uint32_t at)
{
        uint32_t *heap = placer->heap;

        while (at > 0 && lighter(placer, heap[at], heap[(at - 1) / 2])) {
                swap(&heap[at], &heap[(at - 1) / 2]);
                at = (at - 1) / 2;
        }
}

static void sift_down(struct placer *placer, uint32_t n)
{
        uint32_t *heap = placer->heap;
        uint32_t at = 0;

        for (;;) {
                uint32_t child = 2 * at + 1;

                if (child + 1 < n && lighter(placer, heap[child + 1], heap[child]))
                        child++;
                if (child >= n || !lighter(placer, heap[child], heap[at]))
                        return;
                swap(&heap[child], &heap[at]);
                at = child;
        }
}

static uint64_t padded_n(const struct ae_layout_slice *slice)
{
        return ae_align_up(slice->n, AE_LAYOUT_SLICE_ALIGN);
}

static void add_load(struct ae_layout *layout, const struct ae_layout_slice *slice)
{
        const struct ae_layout_segment *segment = &layout->segments[slice->segment];

        if (segment->trainable)
                layout->node_state_n[slice->node] += padded_n(slice);
        layout->node_weight_len[slice->node] += padded_n(slice) * ae_dtype_size(segment->dtype);
}

static void place_segment(struct placer *placer, const struct ae_layout_segment *segment)
{
        struct ae_layout *layout = placer->layout;
        uint32_t n_nodes = layout->n_nodes;
        uint32_t n_slices = segment->n_slices;
        uint32_t n_larger;

        if (n_slices == 0)
                return;
        n_larger = (uint32_t)(ae_div_up(segment->n, AE_LAYOUT_CUT) % n_slices);
        for (uint32_t i = 0; i < n_slices; i++) {
                swap(&placer->heap[0], &placer->heap[n_nodes - 1 - i]);
                sift_down(placer, n_nodes - 1 - i);
        }
        /* The k-th lightest node stands at heap[n_nodes - 1 - k]. The larger slices are the last
         * n_larger ones, so a rotation gives them to the lightest. */
        for (uint32_t i = 0; i < n_slices; i++) {
                struct ae_layout_slice *slice = &layout->slices[segment->slice_first + i];
                uint32_t k = (uint32_t)(((uint64_t)i + n_larger) % n_slices);

                slice->node = placer->heap[n_nodes - 1 - k];
                add_load(layout, slice);
        }
        for (uint32_t i = n_nodes - n_slices; i < n_nodes; i++)
                sift_up(placer, i);
}

/* Places all segments that are trainable, or all that are not. */
static void place_segments(struct placer *placer, bool trainable)
{
        const struct ae_layout *layout = placer->layout;

        placer->by_state = trainable;
        for (uint32_t i = 0; i < layout->n_nodes; i++) {
                placer->heap[i] = i;
                sift_up(placer, i);
        }
        for (uint32_t i = 0; i < layout->n_segments; i++) {
                if (layout->segments[i].trainable == trainable)
                        place_segment(placer, &layout->segments[i]);
        }
}

/* Numbers the slices of each node in table order, so that a unit's slices lie together. */
static void number_slices(struct ae_layout *layout)
{
        memset(layout->node_state_n, 0, layout->n_nodes * sizeof(*layout->node_state_n));
        memset(layout->node_weight_len, 0, layout->n_nodes * sizeof(*layout->node_weight_len));
        for (uint32_t i = 0; i < layout->n_slices; i++) {
                struct ae_layout_slice *slice = &layout->slices[i];

                if (layout->segments[slice->segment].trainable)
                        slice->shard_first = layout->node_state_n[slice->node];
                slice->weight_off = layout->node_weight_len[slice->node];
                add_load(layout, slice);
        }
}

static uint32_t count_slices(const struct ae_layout *layout,
                             const struct ae_layout_segment *segment)
{
        uint64_t len = segment->n * ae_dtype_size(segment->dtype);

        return (uint32_t)AE_MIN((uint64_t)layout->n_nodes, ae_div_up(len, AE_LAYOUT_SLICE_MIN));
}

static void cut_segment(struct ae_layout *layout, uint32_t id, uint32_t slice_first)
{
        struct ae_layout_segment *segment = &layout->segments[id];
        uint32_t n_slices = count_slices(layout, segment);
        uint64_t n_blocks = ae_div_up(segment->n, AE_LAYOUT_CUT);
        uint64_t first = 0;

        segment->slice_first = slice_first;
        segment->n_slices = n_slices;
        assert(n_slices <= n_blocks); /* AE_LAYOUT_SLICE_MIN bytes are more than one */
        for (uint32_t i = 0; i < n_slices; i++) {
                bool larger = i >= n_slices - n_blocks % n_slices;
                uint64_t n = (n_blocks / n_slices + larger) * AE_LAYOUT_CUT;

                layout->slices[slice_first + i] = (struct ae_layout_slice){
                        .segment = id,
                        .first = first,
                        .n = AE_MIN(n, segment->n - first),
                };
                first += n;
        }
        assert(first >= segment->n);
}

static int cut_segments(struct ae_layout *layout)
{
        uint64_t n_slices = 0;

        for (uint32_t i = 0; i < layout->n_segments; i++)
                n_slices += count_slices(layout, &layout->segments[i]);
        if (n_slices > AE_LAYOUT_MAX_SLICES)
                return ae_fail(AE_EOVERFLOW, "cannot lay out %u tensors over %u nodes: that would "
                               "be %llu slices, the limit is %u", layout->n_tensors,
                               layout->n_nodes, (unsigned long long)n_slices,
                               AE_LAYOUT_MAX_SLICES);
        layout->slices = calloc(n_slices + 1, sizeof(*layout->slices));
        if (!layout->slices)
                return ae_layout_no_memory("slices");
        for (uint32_t i = 0; i < layout->n_segments; i++) {
                cut_segment(layout, i, layout->n_slices);
                layout->n_slices += layout->segments[i].n_slices;
        }
        assert(layout->n_slices == n_slices);
        return 0;
}

int ae_layout_place(struct ae_layout *layout)
{
        struct placer placer = { .layout = layout };
        int r;

        r = cut_segments(layout);
        if (r < 0)
                return r;
        layout->node_weight_len = calloc(layout->n_nodes, sizeof(*layout->node_weight_len));
        layout->node_state_n = calloc(layout->n_nodes, sizeof(*layout->node_state_n));
        placer.heap = calloc(layout->n_nodes, sizeof(*placer.heap));
        if (!layout->node_weight_len || !layout->node_state_n || !placer.heap) {
                free(placer.heap);
                return ae_layout_no_memory("the loads of nodes");
        }
        place_segments(&placer, true);
        place_segments(&placer, false);
        number_slices(layout);
        free(placer.heap);
        return 0;
}
