/* SPDX-License-Identifier: Apache-2.0 */
/* The model on its way to the daemon: the caller's structs as a message, and its initial values. */
#pragma once

#include "client/handle.h"

/* Makes a checked record of @model. AE_EINVAL naming the tensor, AE_EUNSUPPORTED, AE_EOVERFLOW. */
int ae_record_model(const struct autoep *handle, const struct autoep_model *model,
                      struct ae_model **ret_model);

struct ae_record_init {
        int fd;       /* owned; -1: no initial values go with the registration */
        uint64_t len;
};

/* Writes initial values to a memfd where this rank sends them, and with AUTOEP_INIT_ALL_EQUAL their
 * digests into @record. AE_EINVAL naming a tensor that lacks them. */
int ae_record_init(const struct autoep *handle, const struct autoep_model *model,
                     struct ae_model *record, struct ae_record_init *ret_init);
