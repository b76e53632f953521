/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Floors for the memory-bound kernels: the same reads and writes in the same order, without the
 * arithmetic. Benches state a kernel's speed as a ratio to these; nothing else calls them. They use
 * the variant that ae_ops() uses, hence the same loads, stores and choice of streaming stores.
 * What they write is a mixture of what they read and means nothing. Any thread.
 */
#pragma once

#include "kernels/ops.h"

/* Reads the inputs (and acc, with keep) and writes acc; the results in @sum stay as they are. */
void ae_floor_sum(const struct ae_ops_sum *sum);
/* Reads and writes p, m and v, reads g, writes weight (may be NULL), n elements each. */
void ae_floor_adamw(float *p, float *m, float *v, const float *g, ae_bf16 *weight, size_t n);
