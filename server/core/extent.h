/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Free ranges of a region: first fit, neighbours joined. The core's thread. Sizes are rounded up
 * to AE_EXTENT_ALIGN; both calls are linear in the number of free ranges, which stays small.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define AE_EXTENT_ALIGN 256u

struct ae_extent {
        uint64_t off, len;
};

struct ae_extents {
        struct ae_extent *free; /* owned; by offset */
        uint32_t n, cap;
        uint64_t n_free;        /* bytes */
};

/* One free range [0, len). Aborts without memory. */
void ae_extents_init(struct ae_extents *extents, uint64_t len);
void ae_extents_deinit(struct ae_extents *extents);
bool ae_extents_take(struct ae_extents *extents, uint64_t len, uint64_t *ret_off);
void ae_extents_give(struct ae_extents *extents, uint64_t off, uint64_t len);
