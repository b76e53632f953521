/* SPDX-License-Identifier: Apache-2.0 */
/*
 * First stage of a layout: checks what was registered, copies it, finds units and resolves
 * aliases. Specs come from a user or a peer, so that nothing in them is trusted; what is wrong is
 * reported with the tensor's name.
 */
#include "proto/base/num.h"
#include "proto/base/status.h"
#include "proto/wire/layout-private.h"

#include <stdlib.h>
#include <string.h>

#define UNITS_FIRST_CAP 8

static bool is_empty(const char *name)
{
        return !name || name[0] == '\0';
}

static bool is_too_long(const char *name)
{
        return strnlen(name, AE_LAYOUT_NAME_MAX) == AE_LAYOUT_NAME_MAX;
}

static int check_names(const struct ae_tensor_spec *spec, uint32_t id)
{
        if (is_empty(spec->name))
                return ae_fail(AE_EINVAL, "cannot lay out tensor %u: its name is empty", id);
        if (is_too_long(spec->name))
                return ae_fail(AE_EOVERFLOW, "cannot lay out tensor %u, \"%.64s...\": its name is "
                               "longer than %u bytes", id, spec->name, AE_LAYOUT_NAME_MAX - 1);
        if (is_empty(spec->unit))
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": the name of its unit is "
                               "empty", spec->name);
        if (is_too_long(spec->unit))
                return ae_fail(AE_EOVERFLOW, "cannot lay out tensor \"%s\": the name of its unit, "
                               "\"%.64s...\", is longer than %u bytes", spec->name, spec->unit,
                               AE_LAYOUT_NAME_MAX - 1);
        return 0;
}

static int check_kind(const struct ae_tensor_spec *spec)
{
        bool buffer = spec->class == AE_CLASS_BUFFER;

        if (ae_dtype_size(spec->dtype) == 0)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": unknown dtype %u",
                               spec->name, spec->dtype);
        if (spec->class != AE_CLASS_DENSE && spec->class != AE_CLASS_EXPERT && !buffer)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": unknown class %u",
                               spec->name, spec->class);
        if (spec->dtype == AE_DTYPE_I64 && !buffer)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": only buffers may be %s",
                               spec->name, ae_dtype_text(spec->dtype));
        if (!buffer && spec->group >= AE_LAYOUT_GROUPS_MAX)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": optimizer group %u is out "
                               "of range (groups are below %u)", spec->name, spec->group,
                               AE_LAYOUT_GROUPS_MAX);
        return 0;
}

static bool has_zero_dim(const struct ae_tensor_spec *spec)
{
        for (uint32_t i = 0; i < spec->n_dims; i++) {
                if (spec->dims[i] == 0)
                        return true;
        }
        return false;
}

static int check_shape(const struct ae_tensor_spec *spec, uint64_t *ret_n)
{
        uint64_t len = ae_dtype_size(spec->dtype);

        if (spec->n_dims > AE_LAYOUT_MAX_DIMS)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": %u dims, the limit is %u",
                               spec->name, spec->n_dims, AE_LAYOUT_MAX_DIMS);
        if (has_zero_dim(spec)) {
                *ret_n = 0;
                return 0;
        }
        for (uint32_t i = 0; i < spec->n_dims; i++) {
                if (ae_mul_overflows(len, spec->dims[i], &len) || len > AE_LAYOUT_MAX_TENSOR_LEN)
                        return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": its shape is "
                                       "beyond 2^48 bytes", spec->name);
        }
        *ret_n = len / ae_dtype_size(spec->dtype);
        return 0;
}

/* Adds the bytes of a tensor that has storage to those of the job. */
static int count_len(const struct ae_tensor_spec *spec, uint64_t n, uint64_t *total)
{
        uint64_t len = n * ae_dtype_size(spec->dtype);

        if (spec->alias_of || spec->class == AE_CLASS_EXPERT)
                return 0;
        /* Can't wrap: the total so far is at most 2^56, a tensor 2^48. */
        *total += ae_align_up(len, AE_LAYOUT_TENSOR_ALIGN);
        if (*total > AE_LAYOUT_MAX_LEN)
                return ae_fail(AE_EOVERFLOW, "cannot lay out tensor \"%s\": with it the job has "
                               "more than 2^56 bytes", spec->name);
        return 0;
}

static int grow_units(struct ae_layout_full *full)
{
        uint32_t cap = full->units_cap ? 2 * full->units_cap : UNITS_FIRST_CAP;
        struct ae_layout_unit *units;

        if (full->table.n_units < full->units_cap)
                return 0;
        units = realloc(full->table.units, cap * sizeof(*units));
        if (!units)
                return ae_layout_no_memory("units");
        full->table.units = units;
        full->units_cap = cap;
        return 0;
}

static int find_or_add_unit(struct ae_layout_full *full, const char *name, uint32_t *ret_unit)
{
        uint32_t id = ae_layout_names_find(&full->unit_names, name);
        struct ae_layout_unit *unit;
        int r;

        if (id != AE_LAYOUT_NONE) {
                *ret_unit = id;
                return 0;
        }
        r = grow_units(full);
        if (r < 0)
                return r;
        id = full->table.n_units;
        unit = &full->table.units[id];
        *unit = (struct ae_layout_unit){ .name = strdup(name) };
        if (!unit->name)
                return ae_layout_no_memory("the name of a unit");
        full->table.n_units++;
        ae_layout_names_add(&full->unit_names, unit->name, id);
        *ret_unit = id;
        return 0;
}

static int add_tensor(struct ae_layout_full *full, const struct ae_tensor_spec *spec, uint64_t n)
{
        uint32_t id = full->table.n_tensors;
        struct ae_layout_tensor *tensor = &full->table.tensors[id];
        int r;

        if (ae_layout_names_find(&full->tensor_names, spec->name) != AE_LAYOUT_NONE)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": the name is taken, by "
                               "tensor %u", spec->name,
                               ae_layout_names_find(&full->tensor_names, spec->name));
        *tensor = (struct ae_layout_tensor){
                .id = id,
                .home = id,
                .segment = AE_LAYOUT_NONE,
                .dtype = spec->dtype,
                .class = spec->class,
                .group = spec->class == AE_CLASS_BUFFER ? 0 : spec->group,
                .frozen = spec->frozen,
                .n_dims = spec->n_dims,
                .n = n,
        };
        memcpy(tensor->dims, spec->dims, spec->n_dims * sizeof(spec->dims[0]));
        r = find_or_add_unit(full, spec->unit, &tensor->unit);
        if (r < 0)
                return r;
        tensor->name = strdup(spec->name);
        if (!tensor->name)
                return ae_layout_no_memory("the name of a tensor");
        full->table.n_tensors++;
        ae_layout_names_add(&full->tensor_names, tensor->name, id);
        return 0;
}

static bool same_shape(const struct ae_layout_tensor *a, const struct ae_layout_tensor *b)
{
        return a->n_dims == b->n_dims &&
               memcmp(a->dims, b->dims, a->n_dims * sizeof(a->dims[0])) == 0;
}

/* What keeps @alias from sharing the storage of @home, NULL when nothing does. */
static const char *alias_fault(const struct ae_layout_tensor *alias,
                               const struct ae_layout_tensor *home)
{
        if (!same_shape(alias, home))
                return "another shape";
        if (alias->dtype != home->dtype)
                return "another dtype";
        if (alias->class != home->class)
                return "another class";
        if (alias->frozen != home->frozen)
                return "another frozen flag";
        return NULL;
}

static int resolve_alias(struct ae_layout_full *full, const struct ae_tensor_spec *specs,
                         uint32_t id)
{
        struct ae_layout_tensor *tensor = &full->table.tensors[id];
        const char *target = specs[id].alias_of;
        const char *fault;
        uint32_t home;

        if (!target)
                return 0;
        home = ae_layout_names_find(&full->tensor_names, target);
        if (home == AE_LAYOUT_NONE)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": it is an alias of "
                               "\"%.128s\", which isn't registered", tensor->name, target);
        if (home == id)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": it is an alias of itself",
                               tensor->name);
        if (specs[home].alias_of)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": \"%s\" is itself an alias "
                               "(of \"%.128s\")", tensor->name, target, specs[home].alias_of);
        fault = alias_fault(tensor, &full->table.tensors[home]);
        if (fault)
                return ae_fail(AE_EINVAL, "cannot lay out tensor \"%s\": it is an alias of \"%s\", "
                               "which has %s", tensor->name, target, fault);
        tensor->home = home;
        tensor->group = full->table.tensors[home].group;
        return 0;
}

static int register_one(struct ae_layout_full *full, const struct ae_tensor_spec *spec,
                        uint64_t *total_len)
{
        uint64_t n = 0;
        int r;

        r = check_names(spec, full->table.n_tensors);
        if (r < 0)
                return r;
        r = check_kind(spec);
        if (r < 0)
                return r;
        r = check_shape(spec, &n);
        if (r < 0)
                return r;
        r = count_len(spec, n, total_len);
        if (r < 0)
                return r;
        return add_tensor(full, spec, n);
}

int ae_layout_register(struct ae_layout_full *full, const struct ae_tensor_spec *specs,
                    uint32_t n_specs)
{
        uint64_t total_len = 0;
        int r;

        r = ae_layout_names_init(&full->tensor_names, n_specs);
        if (r < 0)
                return r;
        r = ae_layout_names_init(&full->unit_names, n_specs);
        if (r < 0)
                return r;
        full->table.tensors = calloc(n_specs + 1, sizeof(*full->table.tensors));
        if (!full->table.tensors)
                return ae_layout_no_memory("tensors");
        for (uint32_t i = 0; i < n_specs; i++) {
                r = register_one(full, &specs[i], &total_len);
                if (r < 0)
                        return r;
        }
        for (uint32_t i = 0; i < n_specs; i++) {
                r = resolve_alias(full, specs, i);
                if (r < 0)
                        return r;
        }
        return 0;
}
