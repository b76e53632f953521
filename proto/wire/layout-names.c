/* SPDX-License-Identifier: Apache-2.0 */
/* Names of tensors and units to ids, by hash. Filled while a layout is built, then only read. */
#include "proto/base/num.h"
#include "proto/wire/layout-private.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

int ae_layout_names_init(struct ae_layout_names *names, uint32_t n_max)
{
        uint32_t n_slots = 2;

        assert(n_max <= AE_LAYOUT_MAX_TENSORS);
        while (n_slots < 2 * n_max)
                n_slots *= 2;
        names->slots = calloc(n_slots, sizeof(*names->slots));
        if (!names->slots)
                return ae_layout_no_memory("the index of names");
        names->mask = n_slots - 1;
        return 0;
}

void ae_layout_names_deinit(struct ae_layout_names *names)
{
        free(names->slots);
        names->slots = NULL;
}

/* The slot that holds @name, or the free one where it belongs. */
static struct ae_layout_name *slot_of(const struct ae_layout_names *names, const char *name)
{
        uint32_t at = (uint32_t)XXH3_64bits(name, strlen(name)) & names->mask;

        while (names->slots[at].name && strcmp(names->slots[at].name, name) != 0)
                at = (at + 1) & names->mask;
        return &names->slots[at];
}

void ae_layout_names_add(struct ae_layout_names *names, const char *name, uint32_t id)
{
        struct ae_layout_name *slot = slot_of(names, name);

        assert(!slot->name);
        slot->name = name;
        slot->id = id;
}

uint32_t ae_layout_names_find(const struct ae_layout_names *names, const char *name)
{
        const struct ae_layout_name *slot = slot_of(names, name);

        return slot->name ? slot->id : AE_LAYOUT_NONE;
}
