/* SPDX-License-Identifier: Apache-2.0 */
/* Plans of scatters, see plan.h. Built by the registering thread. */
#include "client/plan.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <stdlib.h>

static bool is_trainable(const struct ae_layout *layout, const struct ae_layout_tensor *t)
{
        return t->segment != AE_LAYOUT_NONE && layout->segments[t->segment].trainable;
}

static int allocate(struct ae_plan *plan, uint32_t n)
{
        /* One more than needed, for calloc(0) may be NULL; at most a lane per alias and the own
         * one. */
        plan->tensors = calloc(n + 1, sizeof(*plan->tensors));
        plan->parts = calloc(n + 1, sizeof(*plan->parts));
        plan->lanes = calloc(n + 1, sizeof(*plan->lanes));
        plan->given = calloc(n + 1, sizeof(*plan->given));
        if (!plan->tensors || !plan->parts || !plan->lanes || !plan->given)
                return ae_fail(AE_ENOMEM, "no memory for the plan of a unit of %u tensors", n);
        return 0;
}

static int add_alias(const struct ae_layout *layout, struct ae_plan *plan, uint32_t index,
                     uint32_t *n_parts)
{
        const struct ae_layout_tensor *t = &layout->tensors[plan->tensors[index]];
        struct ae_plan_lane *lane = &plan->lanes[plan->n_lanes++];
        struct ae_plan_part *part = &plan->parts[*n_parts];
        uint32_t use = ae_layout_use_of(layout, t->id);

        if (use > UINT16_MAX)
                return ae_fail(AE_EOVERFLOW, "tensor '%s' is use number %u of its unit, the limit "
                               "is %u", t->name, use, UINT16_MAX);
        *part = (struct ae_plan_part){ .first = ae_layout_grad_first(layout, t->id), .n = t->n,
                                       .tensor = index };
        *lane = (struct ae_plan_lane){ .unit = layout->segments[t->segment].unit,
                                       .use = (uint16_t)use, .first = part->first, .n = part->n,
                                       .part_first = (*n_parts)++, .n_parts = 1 };
        return 0;
}

static uint32_t index_of(const struct ae_plan *plan, uint32_t tensor)
{
        for (uint32_t i = 0; i < plan->n_tensors; i++) {
                if (plan->tensors[i] == tensor)
                        return i;
        }
        assert(!"a home tensor is one of its unit's");
        return AUTOEP_NONE;
}

static void add_own(const struct ae_layout *layout, struct ae_plan *plan, uint32_t unit,
                    uint32_t *n_parts)
{
        const struct ae_layout_unit *u = &layout->units[unit];
        struct ae_plan_lane lane = { .unit = unit, .n = u->n_grad, .part_first = *n_parts };
        bool any = false;

        for (uint32_t i = 0; i < u->n_segments; i++) {
                const struct ae_layout_segment *segment = &layout->segments[u->segment_first + i];

                if (!segment->trainable)
                        continue;
                any = true;
                for (uint32_t k = 0; k < segment->n_tensors; k++) {
                        uint32_t id = layout->segment_tensors[segment->tensor_first + k];

                        plan->parts[(*n_parts)++] = (struct ae_plan_part){
                                .first = ae_layout_grad_first(layout, id),
                                .n = layout->tensors[id].n,
                                .tensor = index_of(plan, id),
                        };
                }
        }
        lane.n_parts = *n_parts - lane.part_first;
        if (any)
                plan->lanes[plan->n_lanes++] = lane;
}

static int plan_unit(const struct ae_layout *layout, uint32_t unit, struct ae_plan *plan)
{
        const struct ae_layout_unit *u = &layout->units[unit];
        uint32_t n_parts = 0;
        int r;

        r = allocate(plan, u->n_tensors);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < u->n_tensors; i++) {
                uint32_t id = layout->unit_tensors[u->tensor_first + i];

                if (is_trainable(layout, &layout->tensors[id]))
                        plan->tensors[plan->n_tensors++] = id;
        }
        for (uint32_t i = 0; i < plan->n_tensors && r == 0; i++) {
                if (layout->tensors[plan->tensors[i]].home != plan->tensors[i])
                        r = add_alias(layout, plan, i, &n_parts);
        }
        if (r < 0)
                return r;
        add_own(layout, plan, unit, &n_parts);
        assert(n_parts == plan->n_tensors);
        return 0;
}

int ae_plan_new(struct autoep *h)
{
        assert(!h->plans);
        h->plans = calloc(h->layout->n_units + 1, sizeof(*h->plans));
        if (!h->plans)
                return ae_fail(AE_ENOMEM, "no memory for the plans of %u units",
                               h->layout->n_units);
        for (uint32_t i = 0; i < h->layout->n_units; i++) {
                int r = plan_unit(h->layout, i, &h->plans[i]);

                if (r < 0)
                        return r;
        }
        return 0;
}

void ae_plan_free(struct autoep *h)
{
        for (uint32_t i = 0; h->plans && i < h->layout->n_units; i++) {
                free(h->plans[i].tensors);
                free(h->plans[i].parts);
                free(h->plans[i].lanes);
                free(h->plans[i].given);
        }
        free(h->plans);
        h->plans = NULL;
}

void ae_plan_clear(struct autoep *h)
{
        for (uint32_t i = 0; i < h->layout->n_units; i++) {
                struct ae_plan *plan = &h->plans[i];

                plan->next_micro = 0;
                plan->last = plan->cut = false;
                plan->lane = 0;
                plan->done_n = 0;
        }
}

uint32_t ae_plan_find_cut(const struct autoep *h)
{
        for (uint32_t i = 0; i < h->layout->n_units; i++) {
                if (h->plans[i].cut)
                        return i;
        }
        return AUTOEP_NONE;
}
