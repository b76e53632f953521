/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counter-based random numbers: each is a pure function of what it is for, so that any rank can
 * compute any of them in any order and get the same.
 */
#pragma once

#include <stdint.h>

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014): a good mix of all 64 bits. */
static inline uint64_t lm_mix(uint64_t x)
{
        x += UINT64_C(0x9e3779b97f4a7c15);
        x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
        return x ^ (x >> 31);
}

static inline uint64_t lm_random(uint64_t key, uint64_t index)
{
        return lm_mix(lm_mix(key) ^ lm_mix(~index));
}

/* In [0, 1), of 24 bits, exact in fp32. */
static inline double lm_random_unit(uint64_t key, uint64_t index)
{
        return (double)(lm_random(key, index) >> 40) * 0x1p-24;
}

/* A key from a seed and a name (FNV-1a). */
static inline uint64_t lm_random_key(uint64_t seed, const char *name)
{
        uint64_t hash = UINT64_C(0xcbf29ce484222325);

        for (; *name; name++)
                hash = (hash ^ (uint8_t)*name) * UINT64_C(0x100000001b3);
        return lm_mix(seed) ^ hash;
}
