/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A byte ring in shared memory that this process writes: gradients, exchanged messages. Positions
 * are absolute, bytes since the ring was made; what is written at one position lies in one piece,
 * so that the end of the ring may be skipped. One writing thread at a time; the daemon reads in
 * order and moves the tail.
 */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

struct ae_ring {
        uint8_t *base;          /* borrowed mapping */
        uint64_t len;
        uint64_t head;          /* first position not yet written */
        _Atomic uint64_t *tail; /* daemon, release: bytes before it are free */
};

/* Where the next @len bytes (at most half the ring) would stand if it is full up to @head. */
uint64_t ae_ring_place(const struct ae_ring *ring, uint64_t head, uint64_t len);
/* 1 when all before @end may be written, 0 when not yet; AE_EPROTO when the tail is impossible.
 * Reads the tail with seq_cst, so it may stand in a wait's condition (pump.h). */
int ae_ring_fits(const struct ae_ring *ring, uint64_t end);
static inline uint8_t *ae_ring_at(const struct ae_ring *ring, uint64_t pos)
{
        return ring->base + pos % ring->len;
}
