/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the layout module share: the table with its name indices and digests, and the
 * stages of ae_layout_new() in the order in which they run. Only proto/wire/layout*.c see this. */
#pragma once

#include "proto/wire/layout.h"

#include <assert.h>

/* Stands in every job digest: two hosts that place by different rules must not agree. Raise it
 * when a rule on layout.h or the encoding in layout-digest.c changes. */
#define AE_LAYOUT_RULES 2

struct ae_layout_name {
        const char *name; /* borrowed from the tensor or unit; NULL: free */
        uint32_t id;
};

/* Open addressing with linear probing, at most half full. */
struct ae_layout_names {
        struct ae_layout_name *slots; /* owned */
        uint32_t mask;
};

struct ae_layout_full {
        struct ae_layout table;
        uint32_t units_cap;
        struct ae_layout_names tensor_names;
        struct ae_layout_names unit_names;
        struct ae_digest *unit_digests; /* owned */
        struct ae_digest digest;
};

static inline const struct ae_layout_full *ae_layout_full(const struct ae_layout *layout)
{
        static_assert(offsetof(struct ae_layout_full, table) == 0, "the table stands first");
        return (const struct ae_layout_full *)layout;
}

/* layout-names.c */
int ae_layout_names_init(struct ae_layout_names *names, uint32_t n_max);
void ae_layout_names_deinit(struct ae_layout_names *names);
void ae_layout_names_add(struct ae_layout_names *names, const char *name, uint32_t id);
uint32_t ae_layout_names_find(const struct ae_layout_names *names, const char *name);

/* Checks the specs; fills tensors, except segment and first, and the names of units. */
int ae_layout_register(struct ae_layout_full *full, const struct ae_tensor_spec *specs,
                    uint32_t n_specs);
/* Groups tensors by unit; fills segments, except slices, and the sizes of images. */
int ae_layout_cut(struct ae_layout *layout);
/* Fills slices and the sizes of shards. */
int ae_layout_place(struct ae_layout *layout);
/* Fills both kinds of digest. */
int ae_layout_digests(struct ae_layout_full *full);

/* Reports that the layout of a job found no memory for @what. */
int ae_layout_no_memory(const char *what);
