/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rule of the norm once more, for references: squares in double, in 16 lanes per block of 4,096
 * elements of a segment or an expert tensor, the sums of blocks added exactly. Nothing of the
 * product is used: the exact sum is an expansion of doubles that don't overlap (J. R. Shewchuk,
 * Adaptive Precision Floating-Point Arithmetic, 1997; as in Python's math.fsum).
 */
#pragma once

#include <stdint.h>

#define NORMREF_PARTS 64

/* Zeroed it is an empty sum. */
struct normref {
        double parts[NORMREF_PARTS]; /* by size, none overlapping; their sum is exact */
        uint32_t n_parts;
        double lanes[16];            /* of the block that is open */
        uint64_t block;
};

/* Element @at, counted from the beginning of what is being added; in ascending order, elements that
 * are 0 may be left out. */
void normref_element(struct normref *ref, uint64_t at, float x);
/* What somebody else has added up. */
void normref_add(struct normref *ref, double x);
/* The segment or tensor is over; the next one begins with element 0. */
void normref_end(struct normref *ref);
/* The sum so far, rounded once; nothing is open. */
double normref_sum(const struct normref *ref);
