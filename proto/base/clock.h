/* SPDX-License-Identifier: Apache-2.0 */
/* Monotonic time in nanoseconds. State machines never call this: they are told the time. */
#pragma once

#include <stdint.h>
#include <time.h>

#define AE_NS_PER_MS UINT64_C(1000000)
#define AE_NS_PER_S UINT64_C(1000000000)

static inline uint64_t ae_now_ns(void)
{
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * AE_NS_PER_S + (uint64_t)now.tv_nsec;
}
