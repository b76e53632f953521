/* SPDX-License-Identifier: Apache-2.0 */
/* Element types. The values are part of the wire format and of autoep.h. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/*       name   value  bytes  text  */
#define AE_DTYPE_TABLE(X)                                                                         \
        X(F32,  1,     4,     "fp32")                                                             \
        X(BF16, 2,     2,     "bf16")                                                             \
        X(I64,  3,     8,     "int64")

enum ae_dtype {
#define AE_DTYPE_ENUM(name, value, size, text) AE_DTYPE_##name = value,
        AE_DTYPE_TABLE(AE_DTYPE_ENUM)
#undef AE_DTYPE_ENUM
};

/* 0 for an unknown type. */
static inline size_t ae_dtype_size(uint32_t dtype)
{
        switch (dtype) {
#define AE_DTYPE_SIZE(name, value, size, text)                                                    \
        case value:                                                                               \
                return size;
                AE_DTYPE_TABLE(AE_DTYPE_SIZE)
#undef AE_DTYPE_SIZE
        }
        return 0;
}

static inline const char *ae_dtype_text(uint32_t dtype)
{
        switch (dtype) {
#define AE_DTYPE_TEXT(name, value, size, text)                                                    \
        case value:                                                                               \
                return text;
                AE_DTYPE_TABLE(AE_DTYPE_TEXT)
#undef AE_DTYPE_TEXT
        }
        return "unknown";
}
