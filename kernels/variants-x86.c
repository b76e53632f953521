/* SPDX-License-Identifier: Apache-2.0 */
/* The variants of an x86-64 build. This file is compiled for the baseline processor. */
#include "kernels/ops-internal.h"

#include "proto/base/num.h"

static bool has_avx512(void)
{
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("fma");
}

static bool has_avx2(void)
{
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2");
}

static bool has_c(void)
{
        return true;
}

const struct ae_ops_variant ae_ops_variants[] = {
        { &ae_ops_avx512, &ae_ops_floor_avx512, has_avx512 },
        { &ae_ops_avx2, &ae_ops_floor_avx2, has_avx2 },
        { &ae_ops_c, &ae_ops_floor_c, has_c },
};
const size_t ae_ops_n_variants = AE_ARRAY_LEN(ae_ops_variants);
