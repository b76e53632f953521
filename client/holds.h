/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which cache slots this handle holds, how often, and how many bytes that is. The daemon sees
 * page.holds; the table here is private, so that a release can be checked and the allowance counts
 * each slot once. Any thread; no locks: the first and the last hold of a slot pass through a state
 * in which others spin for a few instructions.
 */
#pragma once

#include "client/handle.h"

/* For handle->n_slots slots. */
int ae_holds_new(struct autoep *handle);
void ae_holds_free(struct autoep *handle);

#define AE_HOLDS_OVER 1 /* past the allowance */

/*
 * Counts a hold of @slot, for which page.holds is already up by one; the first one of a slot takes
 * its @len bytes of @unit from the allowance. @range: the slot has a range alone. AE_HOLDS_OVER:
 * nothing was counted, page.holds is as before this call.
 */
int ae_holds_take(struct autoep *handle, uint32_t slot, uint32_t unit, uint64_t len, bool range);
/* Ends a hold, in page.holds too. AE_EINVAL when the slot isn't held. */
int ae_holds_drop(struct autoep *handle, uint32_t slot);

/* Bytes held; whether @len more are past the allowance, and that as an error with the figures. */
uint64_t ae_holds_len(const struct autoep *handle);
bool ae_holds_over(const struct autoep *handle, uint64_t len);
int ae_holds_fail_over(const struct autoep *handle, uint32_t unit, uint64_t len);
/* Whether a slot with @unit is held. */
bool ae_holds_has(const struct autoep *handle, uint32_t unit);
/* AE_EBUDGET when as many slots with a range alone are held as may be. */
int ae_holds_check_ranges(const struct autoep *handle);
/* 0, or AE_EHELD naming the units held. */
int ae_holds_check_none(const struct autoep *handle);
