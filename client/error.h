/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library's face of proto/base/status.h: every public function ends with ae_api(), which keeps
 * the failure's text for autoep_last_error(), with the name of the call in front.
 */
#pragma once

#include <stddef.h>

#include "proto/base/status.h"

/* Returns @status; when it is negative, notes "@call: text" as the thread's last failure. */
int ae_api(const char *call, int status);

/* AE_EINVAL unless @size, which the caller wrote into struct @what, is @known. */
int ae_check_size(const char *what, size_t size, size_t known);
