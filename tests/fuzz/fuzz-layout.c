/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a registration to a layout. A byte of nodes, then for each tensor its unit, kind, group,
 * dimensions and, for some, whose alias it is. What is not refused holds all that a layout
 * promises.
 */
#include "tests/fuzz/input.h"
#include "tests/lib/layout-check.h"
#include "tests/lib/test.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <stdio.h>

#define TENSORS_MAX 48
#define NAME_LEN 16

struct job {
        struct ae_tensor_spec specs[TENSORS_MAX];
        char names[TENSORS_MAX][NAME_LEN], units[TENSORS_MAX][NAME_LEN];
        uint32_t n_specs;
};

/* A byte of exponent and two of mantissa reach every order of magnitude. */
static uint64_t size_of(struct input *input)
{
        uint32_t shift = input_below(input, 64);

        return (uint64_t)input_u16(input) << shift;
}

static void make_tensor(struct job *job, struct input *input)
{
        uint32_t id = job->n_specs++, kind = input_u8(input);
        struct ae_tensor_spec *spec = &job->specs[id];

        (void)snprintf(job->names[id], NAME_LEN, "t%u", kind & 0x80 ? input_u8(input) : id + 300);
        (void)snprintf(job->units[id], NAME_LEN, "u%u", input_below(input, 8));
        *spec = (struct ae_tensor_spec){
                .name = job->names[id], .unit = job->units[id], .dtype = 1 + (kind & 3),
                .class = 1 + (kind >> 2 & 3), .frozen = kind & 0x10,
        };
        spec->group = input_u8(input);
        spec->n_dims = input_below(input, AE_LAYOUT_MAX_DIMS + 2);
        for (uint32_t i = 0; i < AE_MIN(spec->n_dims, (uint32_t)AE_LAYOUT_MAX_DIMS); i++)
                spec->dims[i] = size_of(input);
        if (kind & 0x20 && id > 0)
                spec->alias_of = job->names[input_below(input, id)];
        if (kind & 0x40 && spec->alias_of) { /* an alias that says the same as its home */
                const struct ae_tensor_spec *home = &job->specs[id - 1];

                *spec = *home;
                spec->name = job->names[id];
                spec->unit = job->units[id];
                spec->alias_of = home->alias_of ? home->alias_of : home->name;
        }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
        struct input input = { data, len };
        uint32_t n_nodes = input_u8(&input);
        struct ae_layout *layout = NULL;
        struct job job = { .n_specs = 0 };

        while (input.len > 0 && job.n_specs < TENSORS_MAX)
                make_tensor(&job, &input);
        if (ae_layout_new(job.specs, job.n_specs, n_nodes, &layout) == 0)
                layout_check(layout, job.specs, job.n_specs);
        else
                assert_true(strlen(ae_error_text()) > 0);
        ae_layout_free(layout);
        return 0;
}
