/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The aux-loss-free balancing rule, the one place where it stands: workers count tokens per
 * (layer, expert), daemons add the counts and, when a step is applied, move each selection bias by
 * one fixed step towards the mean load. Pure; any thread.
 */
#pragma once

#include <stdint.h>

/* Which way the bias of an expert with @count tokens moves, among @n experts with @total: +1 up, -1
 * down, 0 at the mean. In integers, so that it is exact. */
static inline int ae_balance_sign(uint64_t count, unsigned __int128 total, uint64_t n)
{
        const unsigned __int128 scaled = (unsigned __int128)count * n;

        return scaled < total ? 1 : scaled > total ? -1 : 0;
}

/* bias[e] += rate * sign(mean - counts[e]) for the @n experts of one layer; @rate is rounded to
 * fp32 once. n may be 0. */
static inline void ae_balance_step(float *bias, const uint64_t *counts, uint32_t n, double rate)
{
        const float step = (float)rate;
        unsigned __int128 total = 0;

        for (uint32_t e = 0; e < n; e++)
                total += counts[e];
        for (uint32_t e = 0; e < n; e++)
                bias[e] += step * (float)ae_balance_sign(counts[e], total, n);
}
