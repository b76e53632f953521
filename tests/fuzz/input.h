/* SPDX-License-Identifier: Apache-2.0 */
/* The bytes of one fuzz input, read from front to back; behind their end everything is zero. */
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct input {
        const uint8_t *data; /* borrowed */
        size_t len;
};

static inline void input_get(struct input *input, void *to, size_t len)
{
        size_t n = len < input->len ? len : input->len;

        memset(to, 0, len);
        if (n == 0)
                return;
        memcpy(to, input->data, n);
        input->data += n;
        input->len -= n;
}

static inline uint8_t input_u8(struct input *input)
{
        uint8_t value;

        input_get(input, &value, sizeof(value));
        return value;
}

static inline uint16_t input_u16(struct input *input)
{
        uint16_t value;

        input_get(input, &value, sizeof(value));
        return value;
}

static inline uint32_t input_u32(struct input *input)
{
        uint32_t value;

        input_get(input, &value, sizeof(value));
        return value;
}

static inline uint64_t input_u64(struct input *input)
{
        uint64_t value;

        input_get(input, &value, sizeof(value));
        return value;
}

/* In [0, @end). */
static inline uint32_t input_below(struct input *input, uint32_t end)
{
        return input_u8(input) % end;
}

/* At most @len of the bytes that are left, in place; their number replaces @len. */
static inline const uint8_t *input_take(struct input *input, size_t *len)
{
        const uint8_t *data = input->data;

        if (*len > input->len)
                *len = input->len;
        input->data += *len;
        input->len -= *len;
        return data;
}

/* The next @len bytes, of those that are left, as a string; the caller frees it. */
static inline char *input_string(struct input *input, size_t len)
{
        const uint8_t *data = input_take(input, &len);
        char *string = malloc(len + 1);

        if (!string)
                abort();
        if (len > 0)
                memcpy(string, data, len);
        string[len] = '\0';
        return string;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);
