/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Layout: from the registered tensors and the number of nodes to the table that says which node
 * owns which elements. One function computes it, everyone reads the table, nobody recomputes a
 * formula. Pure and deterministic; a built layout is immutable and may be read by any thread.
 *
 * Unit: tensors used together. Segment: the part of a unit of one dtype, trainable or frozen
 * (order inside a unit: trainable before frozen before buffers, then by dtype value); tensors stand
 * in registration order and start at multiples of AE_LAYOUT_TENSOR_ALIGN bytes; the gaps are zero
 * and belong to whoever owns the elements around them. A segment ends with its last tensor; one
 * that holds only tensors without elements has no slices. All element offsets are uint64_t; a
 * unit may exceed 2^32 bytes.
 *
 * Slice: what one node owns of a segment, contiguous, cut at multiples of AE_LAYOUT_CUT elements
 * (the last one ends with the segment), so that no cut goes through a block of the norm, whatever
 * the number of nodes. A segment with elements is cut over
 * S = min(nodes, ceil(bytes / AE_LAYOUT_SLICE_MIN)) owners into slices that differ by at most
 * AE_LAYOUT_CUT elements, the larger ones last. Slices and segments are stored with room for a
 * multiple of AE_LAYOUT_SLICE_ALIGN elements.
 *
 * Placement: the slices of a segment go to the S least loaded nodes, the larger ones to the less
 * loaded, otherwise in order of load. Trainable segments are placed first, in table order; the
 * load is then the node's elements of trainable state, then its weight bytes, then its id.
 * After them come frozen segments and buffers, in table order; the load is the weight bytes, then
 * the id. So a small segment begins where the one before it stopped. (Moving the first owner on by
 * S from segment to segment isn't enough: slices of different segments have different sizes, and
 * with an unlucky number of nodes the long ones meet on the same nodes.)
 *
 * What this promises: node_state_n of any two nodes differs by at most one slice of
 * AE_LAYOUT_SLICE_MIN bytes (131,072 elements of bf16), for any job: a segment too small for all
 * nodes has no larger slices and goes to the least loaded, and one large enough for all adds the
 * same to each, but for AE_LAYOUT_CUT elements. Weight bytes differ by at most AE_LAYOUT_SLICE_MIN
 * where all segments have one dtype. So where a node owns 20 times that, 5 MiB of bf16 weights,
 * its state is within 5 % of the mean, and so are the weights of one dtype. Below that the cut is
 * too coarse: over 1,000 nodes DeepSeek-V3 has enough, Qwen3-30B-A3B and Mixtral-8x7B (3 MiB a
 * node) haven't, and the fullest node has up to 7.4 % more than the mean. Slices of fp32 have the
 * elements of others and twice their bytes: with fp32 routers it is up to 19.3 % more in weights.
 * tests/unit/test-layout-balance.c holds the layout to these figures.
 */
#pragma once

#include "proto/base/dtype.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AE_LAYOUT_TENSOR_ALIGN 256            /* bytes */
#define AE_LAYOUT_CUT 4096                    /* elements */
#define AE_LAYOUT_SLICE_ALIGN 128             /* elements */
#define AE_LAYOUT_SLICE_MIN (256 * 1024)      /* bytes */
#define AE_LAYOUT_MAX_DIMS 8
#define AE_LAYOUT_MAX_TENSORS 65536
#define AE_LAYOUT_MAX_NODES 65536
#define AE_LAYOUT_MAX_SLICES (UINT32_C(1) << 24)
#define AE_LAYOUT_MAX_TENSOR_LEN (UINT64_C(1) << 48) /* bytes of one tensor */
/* Bytes of all stored tensors of a job; twenty times as much still fits 64 bits, so that readers
 * of the table may multiply its element counts by the bytes of state of an element. */
#define AE_LAYOUT_MAX_LEN (UINT64_C(1) << 56)
#define AE_LAYOUT_NAME_MAX 512                /* bytes, with the final NUL */
#define AE_LAYOUT_GROUPS_MAX 32               /* optimizer groups */
#define AE_LAYOUT_NONE UINT32_MAX

enum ae_tensor_class { AE_CLASS_DENSE = 1, AE_CLASS_EXPERT = 2, AE_CLASS_BUFFER = 3 };

/* What the user registers, one per tensor; strings are borrowed and copied by the layout. */
struct ae_tensor_spec {
        const char *name;      /* unique in the job */
        const char *unit;      /* name of its unit; units come in order of first mention */
        uint32_t dtype;        /* enum ae_dtype: of the weights that are gathered */
        uint32_t class;        /* enum ae_tensor_class; experts have no storage here */
        uint32_t group;        /* optimizer group, < AE_LAYOUT_GROUPS_MAX; ignored for buffers */
        uint32_t n_dims;       /* 0: a scalar */
        uint64_t dims[AE_LAYOUT_MAX_DIMS]; /* any may be 0 */
        bool frozen;
        const char *alias_of;  /* NULL, or the tensor whose storage this one shares (tied); it may
                                * be registered later and in any unit; group is then ignored */
};

struct ae_layout_tensor {
        char *name;         /* owned */
        uint32_t id;        /* its index */
        uint32_t unit;      /* the unit it was registered in */
        uint32_t home;      /* the tensor that has the storage: itself, or what it is an alias of */
        uint32_t segment;   /* of home's storage, maybe in another unit; experts: NONE */
        uint32_t dtype, class, group; /* group: an alias has its home's, a buffer 0 */
        bool frozen;
        uint32_t n_dims;
        uint64_t dims[AE_LAYOUT_MAX_DIMS];
        uint64_t n;         /* elements */
        uint64_t first;     /* its first element in the segment; 0 for experts */
};

struct ae_layout_slice {
        uint32_t node;
        uint32_t segment;
        uint64_t first;     /* element in the segment */
        uint64_t n;         /* elements, > 0 */
        uint64_t shard_first; /* its first element among this node's slices of the same kind of
                               * storage: trainable slices count in one sequence (for fp32 state),
                               * each at a multiple of AE_LAYOUT_SLICE_ALIGN; other slices 0 */
        uint64_t weight_off;  /* its first byte among this node's weight bytes (all slices), at a
                               * multiple of 256; it has room for n rounded up to
                               * AE_LAYOUT_SLICE_ALIGN elements */
};

struct ae_layout_segment {
        uint32_t unit;
        uint32_t dtype;
        bool trainable;     /* false: frozen or buffer */
        bool buffer;
        uint64_t n;         /* elements with the gaps between tensors */
        uint64_t unit_off;  /* its first byte in the unit's gathered image, multiple of 256 */
        uint64_t unit_grad_first; /* its first element in the unit's gradient image (trainable
                                   * segments only, others 0; multiple of AE_LAYOUT_SLICE_ALIGN) */
        uint32_t slice_first, n_slices; /* into slices, in element order */
        uint32_t tensor_first, n_tensors; /* into segment_tensors, in element order, homes only */
};

struct ae_layout_unit {
        char *name;         /* owned */
        uint32_t segment_first, n_segments;
        uint32_t tensor_first, n_tensors; /* into unit_tensors: all that were registered in it */
        uint64_t len;       /* bytes of the gathered image: its segments one after another, each
                             * rounded up to 256 */
        uint64_t n_grad;    /* elements of its gradient image: trainable segments, each rounded up
                             * to AE_LAYOUT_SLICE_ALIGN */
        uint64_t grad_first; /* first element of that image in the job's gradient image */
};

struct ae_layout {
        uint32_t n_nodes;
        struct ae_layout_tensor *tensors;   uint32_t n_tensors;
        struct ae_layout_unit *units;       uint32_t n_units;
        struct ae_layout_segment *segments; uint32_t n_segments;
        struct ae_layout_slice *slices;     uint32_t n_slices;
        uint32_t *segment_tensors;
        uint32_t *unit_tensors;    /* ids, unit after unit, in registration order */
        uint64_t n_grad;        /* elements of the job's gradient image */
        uint64_t *node_weight_len; /* per node: bytes of weights it owns, with their rounding */
        uint64_t *node_state_n;    /* per node: fp32 elements of its trainable slices, likewise */
};

/*
 * Checks the specs and builds the table; allocates, doesn't block. AE_EINVAL names the tensor and
 * what is wrong with it: duplicate or empty name, empty unit name, unknown dtype or class, int64
 * outside buffers, too many dims, shape product beyond 2^48 bytes, group out of range, alias of an
 * unknown tensor, of an alias, of another shape, dtype, class or frozen flag, or itself; also for
 * 0 nodes. AE_EOVERFLOW beyond the limits above, naming the tensor where there is one. AE_ENOMEM.
 * A job without tensors is legal. The caller frees the layout.
 */
int ae_layout_new(const struct ae_tensor_spec *specs, uint32_t n_specs, uint32_t n_nodes,
                  struct ae_layout **ret_layout);
struct ae_layout *ae_layout_free(struct ae_layout *layout); /* returns NULL */
uint64_t ae_layout_memory(const struct ae_layout *layout);  /* bytes of the table, without names */

/* Index or AE_LAYOUT_NONE; by hash, O(1). */
uint32_t ae_layout_find_tensor(const struct ae_layout *layout, const char *name);
uint32_t ae_layout_find_unit(const struct ae_layout *layout, const char *name);

/* The slice that holds element @index of the segment; @index is below the segment's n. */
uint32_t ae_layout_slice_of(const struct ae_layout *layout, uint32_t segment, uint64_t index);
/* The home tensor that holds element @index of the segment, AE_LAYOUT_NONE in a gap; @index is
 * below the segment's n. */
uint32_t ae_layout_tensor_at(const struct ae_layout *layout, uint32_t segment, uint64_t index);

/*
 * 128-bit digests that two ranks compare: of one unit's records (its name, and of each tensor its
 * place in the registration, name, dtype, class, flags, group, shape, alias), and of the whole job
 * with the node count and the version of the rules above. XXH3 over a canonical little-endian
 * encoding, the same on every host; computed by ae_layout_new().
 */
struct ae_digest {
        uint64_t lo, hi;
};
struct ae_digest ae_layout_unit_digest(const struct ae_layout *layout, uint32_t unit);
struct ae_digest ae_layout_digest(const struct ae_layout *layout);
