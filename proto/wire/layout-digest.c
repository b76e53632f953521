/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Last stage of a layout: digests of what was registered. A record is encoded twice by one
 * function, first to learn its length, then into a buffer that is hashed at once. Integers are
 * little-endian, strings have a length in front, so that no two registrations encode alike.
 */
#include "proto/base/num.h"
#include "proto/wire/layout-private.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define UNIT_MAGIC "autoep unit"
#define JOB_MAGIC "autoep job"

struct encoder {
        uint8_t *data; /* borrowed; NULL: only count */
        size_t len;
};

static void put_bytes(struct encoder *encoder, const void *bytes, size_t len)
{
        if (encoder->data)
                memcpy(encoder->data + encoder->len, bytes, len);
        encoder->len += len;
}

static void put_u64(struct encoder *encoder, uint64_t value)
{
        uint8_t bytes[8];

        for (unsigned i = 0; i < sizeof(bytes); i++)
                bytes[i] = (uint8_t)(value >> 8 * i);
        put_bytes(encoder, bytes, sizeof(bytes));
}

static void put_string(struct encoder *encoder, const char *string)
{
        put_u64(encoder, strlen(string));
        put_bytes(encoder, string, strlen(string));
}

static void put_tensor(struct encoder *encoder, const struct ae_layout *layout,
                       const struct ae_layout_tensor *tensor)
{
        bool alias = tensor->home != tensor->id;

        put_u64(encoder, tensor->id);
        put_string(encoder, tensor->name);
        put_u64(encoder, tensor->dtype);
        put_u64(encoder, tensor->class);
        put_u64(encoder, tensor->group);
        put_u64(encoder, tensor->frozen);
        put_u64(encoder, tensor->n_dims);
        for (uint32_t i = 0; i < tensor->n_dims; i++)
                put_u64(encoder, tensor->dims[i]);
        put_string(encoder, alias ? layout->tensors[tensor->home].name : "");
}

static void put_unit(struct encoder *encoder, const struct ae_layout *layout,
                     const struct ae_layout_unit *unit)
{
        put_string(encoder, UNIT_MAGIC);
        put_string(encoder, unit->name);
        put_u64(encoder, unit->n_tensors);
        for (uint32_t i = 0; i < unit->n_tensors; i++) {
                uint32_t id = layout->unit_tensors[unit->tensor_first + i];

                put_tensor(encoder, layout, &layout->tensors[id]);
        }
}

static void put_job(struct encoder *encoder, const struct ae_layout_full *full)
{
        put_string(encoder, JOB_MAGIC);
        put_u64(encoder, AE_LAYOUT_RULES);
        put_u64(encoder, full->table.n_nodes);
        put_u64(encoder, full->table.n_units);
        for (uint32_t i = 0; i < full->table.n_units; i++) {
                put_u64(encoder, full->unit_digests[i].lo);
                put_u64(encoder, full->unit_digests[i].hi);
        }
}

static struct ae_digest hash(const struct encoder *encoder)
{
        XXH128_hash_t value = XXH3_128bits(encoder->data, encoder->len);

        return (struct ae_digest){ .lo = value.low64, .hi = value.high64 };
}

/* Bytes of the longest record; counting doesn't read the digests. */
static size_t longest_record(const struct ae_layout_full *full)
{
        struct encoder job = { 0 };
        size_t longest;

        put_job(&job, full);
        longest = job.len;
        for (uint32_t i = 0; i < full->table.n_units; i++) {
                struct encoder unit = { 0 };

                put_unit(&unit, &full->table, &full->table.units[i]);
                longest = AE_MAX(longest, unit.len);
        }
        return longest;
}

int ae_layout_digests(struct ae_layout_full *full)
{
        struct encoder encoder = { 0 };
        uint8_t *data;

        full->unit_digests = calloc(full->table.n_units + 1, sizeof(*full->unit_digests));
        if (!full->unit_digests)
                return ae_layout_no_memory("digests");
        data = malloc(longest_record(full));
        if (!data)
                return ae_layout_no_memory("the encoding of a unit");
        for (uint32_t i = 0; i < full->table.n_units; i++) {
                encoder = (struct encoder){ .data = data };
                put_unit(&encoder, &full->table, &full->table.units[i]);
                full->unit_digests[i] = hash(&encoder);
        }
        encoder = (struct encoder){ .data = data };
        put_job(&encoder, full);
        full->digest = hash(&encoder);
        free(data);
        return 0;
}

struct ae_digest ae_layout_unit_digest(const struct ae_layout *layout, uint32_t unit)
{
        assert(unit < layout->n_units);
        return ae_layout_full(layout)->unit_digests[unit];
}

struct ae_digest ae_layout_digest(const struct ae_layout *layout)
{
        return ae_layout_full(layout)->digest;
}
