/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The two number types that the experts part works in: fp32 for training, double for the model
 * check. Values are sizes in bytes. Arrays of either are passed as void pointers beside the type.
 */
#pragma once

#include <stddef.h>

enum ae_real { AE_REAL_F32 = 4, AE_REAL_F64 = 8 };

static inline double ae_real_get(enum ae_real real, const void *data, size_t i)
{
        return real == AE_REAL_F32 ? (double)((const float *)data)[i] : ((const double *)data)[i];
}

/* Rounds to the array's type. */
static inline void ae_real_set(enum ae_real real, void *data, size_t i, double value)
{
        if (real == AE_REAL_F32)
                ((float *)data)[i] = (float)value;
        else
                ((double *)data)[i] = value;
}
