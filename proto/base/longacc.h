/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exact sums of squares: a long accumulator after Kulisch (U. Kulisch, Computer Arithmetic and
 * Validity, 2nd ed., de Gruyter 2013, chapter 8), a fixed-point number wide enough for every sum
 * there can be. Adding to it is integer addition, so that the sum depends on what is added and on
 * nothing else: not on order, grouping, threads or nodes. It is rounded once, when it is read.
 *
 * Squares of fp32 values are multiples of 2^-298 and below 2^256; 2^64 of them are below 2^320, and
 * doubles in which some of them were added up keep to the same bounds. Ten limbs reach to 2^342.
 * All functions are pure; a zeroed accumulator is the empty sum.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define AE_LONGACC_LIMBS 10
#define AE_LONGACC_LOW (-298)                                /* of the lowest bit */
#define AE_LONGACC_END (AE_LONGACC_LOW + 64 * AE_LONGACC_LIMBS) /* the value stays below 2^this */

/* Its value is the sum over i of limb[i] * 2^(64 i - 298). */
struct ae_longacc {
        uint64_t limb[AE_LONGACC_LIMBS];
};

/* Whether @x can be added: not negative, finite, a multiple of 2^-298, below 2^320. */
bool ae_longacc_takes(double x);
/* Adds @x, which it must take. */
void ae_longacc_add(struct ae_longacc *acc, double x);
/* Adds what @other holds. The sum must stay below 2^342; see ae_longacc_below(). */
void ae_longacc_join(struct ae_longacc *acc, const struct ae_longacc *other);
/* Whether the value is below 2^@exponent, from AE_LONGACC_LOW to AE_LONGACC_END: what another
 * process sent is held to a bound before it is joined. */
bool ae_longacc_below(const struct ae_longacc *acc, int exponent);
/* The value to nearest even. */
double ae_longacc_round(const struct ae_longacc *acc);
