/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of kernels/ share: the variants that this build has, and the floors that go with
 * them. Which variants exist is chosen by meson (variants-x86.c or variants-none.c), which of them
 * is used by ops.c.
 */
#pragma once

#include "kernels/ops.h"

#include <math.h>

/* Bits that stand for every NaN that arithmetic makes; see ops.h. */
#define AE_OPS_NAN_BITS UINT32_C(0x7fc00000)

/* Adds the sum of a norm block; false, and nothing added, when it is not finite. */
static inline bool ae_ops_add_block(struct ae_longacc *sum, double block)
{
        if (!isfinite(block))
                return false;
        ae_longacc_add(sum, block);
        return true;
}

/* See floor.h, whose functions call these. */
struct ae_ops_floor {
        void (*sum)(const struct ae_ops_sum *sum);
        void (*adamw)(float *p, float *m, float *v, const float *g, ae_bf16 *weight, size_t n);
};

struct ae_ops_variant {
        const struct ae_ops *ops;
        const struct ae_ops_floor *floor;
        bool (*usable)(void); /* whether this processor can run it */
};

/* Best first; the last is "c", usable everywhere. */
extern const struct ae_ops_variant ae_ops_variants[];
extern const size_t ae_ops_n_variants;

extern const struct ae_ops ae_ops_c;
extern const struct ae_ops_floor ae_ops_floor_c;
extern const struct ae_ops ae_ops_avx2;
extern const struct ae_ops_floor ae_ops_floor_avx2;
extern const struct ae_ops ae_ops_avx512;
extern const struct ae_ops_floor ae_ops_floor_avx512;

/* The variant in use; ae_ops() is its table. */
const struct ae_ops_variant *ae_ops_variant(void);
