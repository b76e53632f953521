/* SPDX-License-Identifier: Apache-2.0 */
/* What every layout promises; see layout-check.h. */
#include "tests/lib/layout-check.h"

#include "proto/base/num.h"

#include "tests/lib/test.h"

#include <stdlib.h>

static uint64_t padded(const struct ae_layout_slice *slice)
{
        return ae_align_up(slice->n, AE_LAYOUT_SLICE_ALIGN);
}

/* Slices tile the segment, so every element has one owner; they are even and aligned. */
static void check_slices(const struct ae_layout *layout, uint32_t id)
{
        const struct ae_layout_segment *segment = &layout->segments[id];
        uint64_t len = segment->n * ae_dtype_size(segment->dtype);
        uint64_t next_first = 0, most = 0, least = UINT64_MAX;
        bool *owns = calloc(layout->n_nodes, sizeof(*owns));

        assert_non_null(owns);
        assert_int_equal(segment->n_slices, AE_MIN((uint64_t)layout->n_nodes,
                                                   ae_div_up(len, AE_LAYOUT_SLICE_MIN)));
        for (uint32_t i = 0; i < segment->n_slices; i++) {
                const struct ae_layout_slice *slice = &layout->slices[segment->slice_first + i];

                assert_int_equal(slice->segment, id);
                assert_int_equal(slice->first, next_first);
                assert_int_equal(slice->first % AE_LAYOUT_CUT, 0);
                assert_true(slice->n > 0);
                assert_true(slice->node < layout->n_nodes);
                next_first += slice->n;
                most = AE_MAX(most, slice->n);
                least = AE_MIN(least, slice->n);
                assert_false(owns[slice->node]); /* at most one slice of a segment */
                owns[slice->node] = true;
        }
        free(owns);
        assert_int_equal(next_first, segment->n);
        if (segment->n_slices > 0)
                assert_true(most - least <= AE_LAYOUT_CUT);
}

/* slice_of() and tensor_at() agree with the table at every edge and in the middle. */
static void check_lookups(const struct ae_layout *layout, uint32_t id)
{
        const struct ae_layout_segment *segment = &layout->segments[id];

        for (uint32_t i = 0; i < segment->n_slices; i++) {
                uint32_t at = segment->slice_first + i;
                const struct ae_layout_slice *slice = &layout->slices[at];
                uint64_t inside = slice->first + slice->n / 2;

                assert_int_equal(ae_layout_slice_of(layout, id, slice->first), at);
                assert_int_equal(ae_layout_slice_of(layout, id, inside), at);
                assert_int_equal(ae_layout_slice_of(layout, id, slice->first + slice->n - 1), at);
        }
        for (uint32_t i = 0; i < segment->n_tensors; i++) {
                uint32_t at = layout->segment_tensors[segment->tensor_first + i];
                const struct ae_layout_tensor *tensor = &layout->tensors[at];
                uint64_t end = tensor->first + tensor->n;

                if (tensor->n > 0) {
                        assert_int_equal(ae_layout_tensor_at(layout, id, tensor->first), at);
                        assert_int_equal(ae_layout_tensor_at(layout, id, end - 1), at);
                        assert_int_equal(ae_layout_tensor_at(layout, id,
                                                             tensor->first + tensor->n / 2), at);
                }
                if (end % (AE_LAYOUT_TENSOR_ALIGN / ae_dtype_size(segment->dtype)) != 0 &&
                    end < segment->n)
                        assert_int_equal(ae_layout_tensor_at(layout, id, end), AE_LAYOUT_NONE);
        }
}

/* Tensors of a segment in registration order, aligned, apart, of its kind. */
static void check_tensors(const struct ae_layout *layout, uint32_t id)
{
        const struct ae_layout_segment *segment = &layout->segments[id];
        uint64_t end = 0;
        uint32_t last_id = 0;

        assert_true(segment->n_tensors > 0);
        for (uint32_t i = 0; i < segment->n_tensors; i++) {
                uint32_t at = layout->segment_tensors[segment->tensor_first + i];
                const struct ae_layout_tensor *tensor = &layout->tensors[at];

                assert_true(i == 0 || at > last_id);
                assert_int_equal(tensor->segment, id);
                assert_int_equal(tensor->home, at);
                assert_int_equal(tensor->unit, segment->unit);
                assert_int_equal(tensor->dtype, segment->dtype);
                assert_int_equal(tensor->class == AE_CLASS_BUFFER, segment->buffer);
                assert_int_equal(tensor->class == AE_CLASS_DENSE && !tensor->frozen,
                                 segment->trainable);
                assert_true(tensor->first >= end);
                assert_true(tensor->first * ae_dtype_size(tensor->dtype) <
                            end * ae_dtype_size(tensor->dtype) + AE_LAYOUT_TENSOR_ALIGN);
                assert_int_equal(tensor->first * ae_dtype_size(tensor->dtype) %
                                 AE_LAYOUT_TENSOR_ALIGN, 0);
                end = tensor->first + tensor->n;
                last_id = at;
        }
        assert_int_equal(segment->n, end);
}

/* Images: segments of a unit follow each other without overlap, units likewise. */
static void check_images(const struct ae_layout *layout)
{
        uint64_t job_grad = 0;
        uint32_t next_segment = 0;

        for (uint32_t i = 0; i < layout->n_units; i++) {
                const struct ae_layout_unit *unit = &layout->units[i];
                uint64_t off = 0, grad = 0;

                assert_int_equal(unit->segment_first, next_segment);
                assert_int_equal(unit->grad_first, job_grad);
                for (uint32_t j = 0; j < unit->n_segments; j++) {
                        const struct ae_layout_segment *segment =
                                &layout->segments[unit->segment_first + j];

                        assert_int_equal(segment->unit, i);
                        assert_int_equal(segment->unit_off, off);
                        assert_int_equal(segment->unit_off % 256, 0);
                        assert_int_equal(segment->unit_grad_first, segment->trainable ? grad : 0);
                        off += ae_align_up(segment->n * ae_dtype_size(segment->dtype), 256);
                        if (segment->trainable)
                                grad += ae_align_up(segment->n, AE_LAYOUT_SLICE_ALIGN);
                }
                assert_int_equal(unit->len, off);
                assert_int_equal(unit->n_grad, grad);
                job_grad += grad;
                next_segment += unit->n_segments;
        }
        assert_int_equal(layout->n_grad, job_grad);
        assert_int_equal(layout->n_segments, next_segment);
}

struct node {
        uint64_t state_n, weight_len;
};

/* In table order each slice begins where the node's last one ended, so that ranges of a node are
 * disjoint and, as the ends are the node's sizes, inside. */
static void check_shards(const struct ae_layout *layout)
{
        struct node *nodes = calloc(layout->n_nodes, sizeof(*nodes));
        uint64_t most = 0, least = UINT64_MAX, largest = 0;

        assert_non_null(nodes);
        for (uint32_t i = 0; i < layout->n_slices; i++) {
                const struct ae_layout_slice *slice = &layout->slices[i];
                const struct ae_layout_segment *segment = &layout->segments[slice->segment];
                struct node *node = &nodes[slice->node];

                assert_int_equal(slice->weight_off, node->weight_len);
                assert_int_equal(slice->weight_off % 256, 0);
                node->weight_len += padded(slice) * ae_dtype_size(segment->dtype);
                assert_int_equal(slice->shard_first, segment->trainable ? node->state_n : 0);
                if (!segment->trainable)
                        continue;
                node->state_n += padded(slice);
                largest = AE_MAX(largest, padded(slice));
        }
        for (uint32_t i = 0; i < layout->n_nodes; i++) {
                assert_int_equal(layout->node_state_n[i], nodes[i].state_n);
                assert_int_equal(layout->node_weight_len[i], nodes[i].weight_len);
                most = AE_MAX(most, nodes[i].state_n);
                least = AE_MIN(least, nodes[i].state_n);
        }
        /* The promise of balance. */
        assert_true(most - least <= AE_MIN(largest, (uint64_t)AE_LAYOUT_SLICE_MIN / 2));
        free(nodes);
}

static void check_records(const struct ae_layout *layout, const struct ae_tensor_spec *specs,
                          uint32_t n_specs)
{
        uint32_t n_homes = 0;

        assert_int_equal(layout->n_tensors, n_specs);
        for (uint32_t i = 0; i < n_specs; i++) {
                const struct ae_tensor_spec *spec = &specs[i];
                const struct ae_layout_tensor *tensor = &layout->tensors[i];
                const struct ae_layout_tensor *home = &layout->tensors[tensor->home];

                assert_string_equal(layout->units[tensor->unit].name, spec->unit);
                assert_int_equal(ae_layout_find_tensor(layout, spec->name), i);
                assert_string_equal(home->name, spec->alias_of ? spec->alias_of : spec->name);
                assert_int_equal(tensor->segment, home->segment);
                assert_int_equal(tensor->first, home->first);
                assert_int_equal(tensor->segment == AE_LAYOUT_NONE,
                                 spec->class == AE_CLASS_EXPERT);
                n_homes += tensor->home == i && spec->class != AE_CLASS_EXPERT;
        }
        for (uint32_t i = 0; i < layout->n_segments; i++)
                n_homes -= layout->segments[i].n_tensors;
        assert_int_equal(n_homes, 0); /* each stands in one segment */
}

void layout_check(const struct ae_layout *layout, const struct ae_tensor_spec *specs,
                  uint32_t n_specs)
{
        check_records(layout, specs, n_specs);
        check_images(layout);
        check_shards(layout);
        for (uint32_t i = 0; i < layout->n_segments; i++) {
                check_tensors(layout, i);
                check_slices(layout, i);
                check_lookups(layout, i);
        }
}
