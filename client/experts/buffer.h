/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A reusable block of memory that only grows: after the largest batch was seen, nothing allocates.
 * Embedded in its owner; a zeroed struct is an empty buffer.
 */
#pragma once

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

#define AE_BUFFER_ALIGN 64 /* one cache line */

struct ae_buffer {
        void *data; /* owned */
        size_t len; /* bytes */
};

/* Makes room for @len bytes; what it held is lost when it grows. AE_ENOMEM leaves it as it was. */
static inline int ae_buffer_reserve(struct ae_buffer *buffer, size_t len)
{
        void *data = NULL;

        if (len <= buffer->len)
                return 0;
        if (len > SIZE_MAX - AE_BUFFER_ALIGN)
                return ae_fail(AE_EOVERFLOW, "cannot reserve %zu bytes: beyond the address space",
                               len);
        len = ae_align_up(len, AE_BUFFER_ALIGN);
        if (posix_memalign(&data, AE_BUFFER_ALIGN, len) != 0)
                return ae_fail_sys(ENOMEM, "cannot reserve %zu bytes for token exchange", len);
        free(buffer->data);
        *buffer = (struct ae_buffer){ .data = data, .len = len };
        return 0;
}

static inline void ae_buffer_deinit(struct ae_buffer *buffer)
{
        free(buffer->data);
        *buffer = (struct ae_buffer){ 0 };
}
