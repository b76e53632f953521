/* SPDX-License-Identifier: Apache-2.0 */
/* Checked arithmetic, alignment and small numeric helpers. All pure. */
#pragma once

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AE_KIB ((uint64_t)1 << 10)
#define AE_MIB ((uint64_t)1 << 20)
#define AE_GIB ((uint64_t)1 << 30)

#define AE_ARRAY_LEN(array) (sizeof(array) / sizeof((array)[0]))

#define AE_MIN(a, b)                                                                              \
        ({                                                                                        \
                typeof(a) min_a_ = (a);                                                           \
                typeof(b) min_b_ = (b);                                                           \
                min_a_ < min_b_ ? min_a_ : min_b_;                                                \
        })
#define AE_MAX(a, b)                                                                              \
        ({                                                                                        \
                typeof(a) max_a_ = (a);                                                           \
                typeof(b) max_b_ = (b);                                                           \
                max_a_ > max_b_ ? max_a_ : max_b_;                                                \
        })

/* True when the result does not fit; *ret is then meaningless. */
#define ae_add_overflows(a, b, ret) __builtin_add_overflow((a), (b), (ret))
#define ae_mul_overflows(a, b, ret) __builtin_mul_overflow((a), (b), (ret))

/* Whether [off, off + len) lies inside [0, size). */
static inline bool ae_range_ok(uint64_t off, uint64_t len, uint64_t size)
{
        return off <= size && len <= size - off;
}

static inline uint64_t ae_div_up(uint64_t value, uint64_t by)
{
        return value / by + (value % by != 0);
}

/* @align is a power of two. */
static inline uint64_t ae_align_up(uint64_t value, uint64_t align)
{
        return (value + align - 1) & ~(align - 1);
}

/* For values that our own maths keeps in range; never for what a peer sent. */
static inline uint32_t ae_u32(uint64_t value)
{
        assert(value <= UINT32_MAX);
        return (uint32_t)value;
}
