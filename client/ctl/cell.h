/* SPDX-License-Identifier: Apache-2.0 */
/* One value of a reply as text for people. Pure but for allocation. */
#pragma once

#include "client/ctl/commands.h"
#include "client/ctl/table.h"

#include <jansson.h>

/* The value at @key ("a.b" goes into objects); NULL when it isn't there. Borrowed from @row. */
json_t *ae_ctl_cell_find(const json_t *row, const char *key);

/* Neither null, nor an empty text or array. */
bool ae_ctl_cell_has_value(const json_t *value);

/*
 * What @column shows of @row; "-" where there is no value. Control characters, which a name may
 * hold, become '?'. The caller frees; NULL without memory.
 */
char *ae_ctl_cell_text(const json_t *row, const struct ae_ctl_column *column);

/* How a state looks: bad ones are those that make the exit code AE_CTL_EXIT_DEGRADED. */
enum ae_ctl_paint ae_ctl_cell_paint(const json_t *row, const struct ae_ctl_column *column);
bool ae_ctl_state_is_bad(const char *state);

/* Numbers stand at the right. */
bool ae_ctl_cell_right(const struct ae_ctl_column *column);
