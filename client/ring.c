/* SPDX-License-Identifier: Apache-2.0 */
/* Positions in a byte ring, see ring.h. */
#include "client/ring.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#define RING_ALIGN 64 /* a cache line, so that kernels read aligned */

uint64_t ae_ring_place(const struct ae_ring *ring, uint64_t head, uint64_t len)
{
        uint64_t pos = ae_align_up(head, RING_ALIGN);
        uint64_t off = pos % ring->len;

        assert(len <= ring->len / 2);
        return off + len <= ring->len ? pos : pos + (ring->len - off);
}

int ae_ring_fits(const struct ae_ring *ring, uint64_t end)
{
        uint64_t tail = atomic_load(ring->tail);

        if (tail > ring->head || ring->head - tail > ring->len)
                return ae_fail(AE_EPROTO, "the daemon says that it has read up to byte %llu of a "
                               "ring of %llu bytes that is written up to %llu",
                               (unsigned long long)tail,
                               (unsigned long long)ring->len, (unsigned long long)ring->head);
        return end - tail <= ring->len;
}
