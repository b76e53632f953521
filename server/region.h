/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory for the core: memfds where it is shared, sealed and read-only to those who may only read;
 * anonymous memory otherwise. Never a name in /dev/shm. Owner thread of the node.
 */
#pragma once

#include "server/core/core.h"

/* Makes the memory, zeroed, and maps it; not yet known to a transport. AE_ENOMEM, AE_ESYS. */
int ae_region_new(const struct ae_region_spec *spec, struct ae_region **ret_region);
/* Unmaps and closes; NULL is fine. Returns NULL. */
struct ae_region *ae_region_free(struct ae_region *region);
