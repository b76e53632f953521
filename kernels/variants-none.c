/* SPDX-License-Identifier: Apache-2.0 */
/* The variants of a build for a processor without kernels of its own: the reference. */
#include "kernels/ops-internal.h"

#include "proto/base/num.h"

static bool has_c(void)
{
        return true;
}

const struct ae_ops_variant ae_ops_variants[] = {
        { &ae_ops_c, &ae_ops_floor_c, has_c },
};
const size_t ae_ops_n_variants = AE_ARRAY_LEN(ae_ops_variants);
