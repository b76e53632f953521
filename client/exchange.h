/* SPDX-License-Identifier: Apache-2.0 */
/* What of the exchange stands between calls of autoep_exchange(). One thread at a time. */
#pragma once

#include "client/handle.h"

/* @xin_map, @xout_map are mapped; either empty means that there are no peers. AE_EPROTO when what
 * the daemon wrote there is impossible. */
int ae_exchange_new(struct autoep *handle);
void ae_exchange_free(struct autoep *handle);
