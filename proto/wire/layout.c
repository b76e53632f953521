/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The layout as a whole: building it stage by stage, freeing it, and looking things up in it. The
 * stages are layout-register.c (tensors), layout-cut.c (segments), layout-place.c (slices) and
 * layout-digest.c. No thread of its own; whoever called ae_layout_new() owns the result.
 */
#include "proto/base/cleanup.h"
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout-private.h"

AE_DEFINE_CLEANUP(struct ae_layout *, ae_layout_free)

static int check_counts(uint32_t n_specs, uint32_t n_nodes)
{
        if (n_nodes == 0)
                return ae_fail(AE_EINVAL, "cannot lay out %u tensors: there are no nodes", n_specs);
        if (n_nodes > AE_LAYOUT_MAX_NODES)
                return ae_fail(AE_EOVERFLOW, "cannot lay out %u tensors over %u nodes: the limit "
                               "is %u nodes", n_specs, n_nodes, AE_LAYOUT_MAX_NODES);
        if (n_specs > AE_LAYOUT_MAX_TENSORS)
                return ae_fail(AE_EOVERFLOW, "cannot lay out %u tensors: the limit is %u tensors",
                               n_specs, AE_LAYOUT_MAX_TENSORS);
        return 0;
}

int ae_layout_new(const struct ae_tensor_spec *specs, uint32_t n_specs, uint32_t n_nodes,
                  struct ae_layout **ret_layout)
{
        AE_CLEANUP(ae_layout_free_p) struct ae_layout *layout = NULL;
        struct ae_layout_full *full;
        int r;

        assert(specs || n_specs == 0);
        assert(ret_layout);
        r = check_counts(n_specs, n_nodes);
        if (r < 0)
                return r;
        full = calloc(1, sizeof(*full));
        if (!full)
                return ae_layout_no_memory("the table");
        layout = &full->table;
        layout->n_nodes = n_nodes;
        r = ae_layout_register(full, specs, n_specs);
        if (r < 0)
                return r;
        r = ae_layout_cut(layout);
        if (r < 0)
                return r;
        r = ae_layout_place(layout);
        if (r < 0)
                return r;
        r = ae_layout_digests(full);
        if (r < 0)
                return r;
        *ret_layout = ae_steal(layout);
        return 0;
}

struct ae_layout *ae_layout_free(struct ae_layout *layout)
{
        struct ae_layout_full *full = (struct ae_layout_full *)layout;

        if (!layout)
                return NULL;
        for (uint32_t i = 0; i < layout->n_tensors; i++)
                free(layout->tensors[i].name);
        for (uint32_t i = 0; i < layout->n_units; i++)
                free(layout->units[i].name);
        ae_layout_names_deinit(&full->tensor_names);
        ae_layout_names_deinit(&full->unit_names);
        free(layout->tensors);
        free(layout->units);
        free(layout->segments);
        free(layout->slices);
        free(layout->segment_tensors);
        free(layout->unit_tensors);
        free(layout->node_weight_len);
        free(layout->node_state_n);
        free(full->unit_digests);
        free(full);
        return NULL;
}

uint64_t ae_layout_memory(const struct ae_layout *layout)
{
        const struct ae_layout_full *full = ae_layout_full(layout);

        return sizeof(*full) + layout->n_tensors * (uint64_t)sizeof(*layout->tensors) +
               layout->n_units * (sizeof(*layout->units) + sizeof(*full->unit_digests)) +
               layout->n_segments * (uint64_t)sizeof(*layout->segments) +
               layout->n_slices * (uint64_t)sizeof(*layout->slices) +
               layout->n_tensors * 2 * (uint64_t)sizeof(uint32_t) +
               layout->n_nodes * 2 * (uint64_t)sizeof(uint64_t) +
               (full->tensor_names.mask + 1 + (uint64_t)full->unit_names.mask + 1) *
                       sizeof(struct ae_layout_name);
}

uint32_t ae_layout_find_tensor(const struct ae_layout *layout, const char *name)
{
        return ae_layout_names_find(&ae_layout_full(layout)->tensor_names, name);
}

uint32_t ae_layout_find_unit(const struct ae_layout *layout, const char *name)
{
        return ae_layout_names_find(&ae_layout_full(layout)->unit_names, name);
}

uint32_t ae_layout_slice_of(const struct ae_layout *layout, uint32_t segment, uint64_t index)
{
        const struct ae_layout_segment *seg = &layout->segments[segment];
        uint32_t low = seg->slice_first;
        uint32_t high = seg->slice_first + seg->n_slices; /* beyond the last candidate */

        assert(segment < layout->n_segments);
        assert(index < seg->n);
        while (high - low > 1) {
                uint32_t middle = low + (high - low) / 2;

                if (layout->slices[middle].first <= index)
                        low = middle;
                else
                        high = middle;
        }
        assert(index - layout->slices[low].first < layout->slices[low].n);
        return low;
}

uint32_t ae_layout_tensor_at(const struct ae_layout *layout, uint32_t segment, uint64_t index)
{
        const struct ae_layout_segment *seg = &layout->segments[segment];
        uint32_t low = seg->tensor_first;
        uint32_t high = seg->tensor_first + seg->n_tensors;
        const struct ae_layout_tensor *tensor;

        assert(segment < layout->n_segments);
        assert(index < seg->n);
        /* The last tensor that begins at or before @index; of those without elements that share a
         * beginning with one that has some, the latter stands last. */
        while (high - low > 1) {
                uint32_t middle = low + (high - low) / 2;

                if (layout->tensors[layout->segment_tensors[middle]].first <= index)
                        low = middle;
                else
                        high = middle;
        }
        tensor = &layout->tensors[layout->segment_tensors[low]];
        assert(index >= tensor->first);
        return index - tensor->first < tensor->n ? tensor->id : AE_LAYOUT_NONE;
}

int ae_layout_no_memory(const char *what)
{
        return ae_fail(AE_ENOMEM, "cannot lay out the job: no memory for %s", what);
}
