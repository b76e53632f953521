/* SPDX-License-Identifier: Apache-2.0 */
/* What every layout promises (proto/wire/layout.h), checked against what was registered. */
#pragma once

#include "proto/wire/layout.h"

/* Every byte has one owner, tables agree, nodes are balanced; fails the running test. */
void layout_check(const struct ae_layout *layout, const struct ae_tensor_spec *specs,
                  uint32_t n_specs);
