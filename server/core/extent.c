/* SPDX-License-Identifier: Apache-2.0 */
/* First-fit allocation of ranges. The core's thread. */
#include "server/core/extent.h"

#include "proto/base/num.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

void ae_extents_init(struct ae_extents *extents, uint64_t len)
{
        extents->cap = 64;
        extents->free = malloc(extents->cap * sizeof(*extents->free));
        if (!extents->free)
                abort();
        extents->n = len >= AE_EXTENT_ALIGN ? 1 : 0;
        extents->n_free = len / AE_EXTENT_ALIGN * AE_EXTENT_ALIGN;
        extents->free[0] = (struct ae_extent){ 0, extents->n_free };
}

void ae_extents_deinit(struct ae_extents *extents)
{
        free(extents->free);
        *extents = (struct ae_extents){ 0 };
}

static void remove_at(struct ae_extents *extents, uint32_t i)
{
        memmove(&extents->free[i], &extents->free[i + 1],
                (extents->n - i - 1) * sizeof(*extents->free));
        extents->n--;
}

static void insert_at(struct ae_extents *extents, uint32_t i, struct ae_extent extent)
{
        if (extents->n == extents->cap) {
                extents->cap *= 2;
                extents->free = realloc(extents->free, extents->cap * sizeof(*extents->free));
                if (!extents->free)
                        abort();
        }
        memmove(&extents->free[i + 1], &extents->free[i],
                (extents->n - i) * sizeof(*extents->free));
        extents->free[i] = extent;
        extents->n++;
}

bool ae_extents_take(struct ae_extents *extents, uint64_t len, uint64_t *ret_off)
{
        if (len > extents->n_free)
                return false; /* before rounding up, which might wrap */
        len = ae_align_up(AE_MAX(len, (uint64_t)1), AE_EXTENT_ALIGN);
        for (uint32_t i = 0; i < extents->n; i++) {
                struct ae_extent *extent = &extents->free[i];

                if (extent->len < len)
                        continue;
                *ret_off = extent->off;
                extent->off += len;
                extent->len -= len;
                extents->n_free -= len;
                if (extent->len == 0)
                        remove_at(extents, i);
                return true;
        }
        return false;
}

void ae_extents_give(struct ae_extents *extents, uint64_t off, uint64_t len)
{
        uint32_t i = 0;

        len = ae_align_up(AE_MAX(len, (uint64_t)1), AE_EXTENT_ALIGN);
        while (i < extents->n && extents->free[i].off < off)
                i++;
        assert(i == extents->n || off + len <= extents->free[i].off);
        assert(i == 0 || extents->free[i - 1].off + extents->free[i - 1].len <= off);
        extents->n_free += len;
        if (i > 0 && extents->free[i - 1].off + extents->free[i - 1].len == off) {
                extents->free[i - 1].len += len;
                i--;
        } else {
                insert_at(extents, i, (struct ae_extent){ off, len });
        }
        if (i + 1 < extents->n &&
            extents->free[i].off + extents->free[i].len == extents->free[i + 1].off) {
                extents->free[i].len += extents->free[i + 1].len;
                remove_at(extents, i + 1);
        }
}
