/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The number type of the model. Its sources (blocks.c, attention.c, moe.c, model.c) are compiled
 * twice: with LM_REAL_BYTES 4 for training and 8 for --check; LM_NAME() keeps the two apart.
 */
#pragma once

#include "client/experts/real.h"

#if LM_REAL_BYTES == 8
typedef double real;
#define LM_NAME(name) name##_f64
#define LM_REAL AE_REAL_F64
#elif LM_REAL_BYTES == 4
typedef float real;
#define LM_NAME(name) name##_f32
#define LM_REAL AE_REAL_F32
#else
#error "LM_REAL_BYTES must be 4 or 8"
#endif
