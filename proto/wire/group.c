/* SPDX-License-Identifier: Apache-2.0 */
/* Group maths for expert parallelism; see group.h. Pure functions, any thread. */
#include "proto/wire/group.h"

#include "proto/base/num.h"
#include "proto/base/status.h"

#include <stddef.h>
#include <stdio.h>

/* Texts list this many divisors at most; an error text has 1,023 bytes. */
#define DIVISORS_SHOWN 64

struct divisors {
        char text[DIVISORS_SHOWN * 12 + 8];
        size_t len;
        unsigned n;
};

static void add_divisor(struct divisors *divisors, uint32_t value)
{
        int len;

        if (divisors->n > DIVISORS_SHOWN)
                return;
        if (divisors->n == DIVISORS_SHOWN)
                len = snprintf(divisors->text + divisors->len,
                               sizeof(divisors->text) - divisors->len, ", ...");
        else
                len = snprintf(divisors->text + divisors->len,
                               sizeof(divisors->text) - divisors->len, "%s%u",
                               divisors->n ? ", " : "", value);
        assert(len > 0 && (size_t)len < sizeof(divisors->text) - divisors->len);
        divisors->len += (size_t)len;
        divisors->n++;
}

/* Lists the divisors of @value > 0 in rising order. */
static void list_divisors(struct divisors *divisors, uint32_t value)
{
        uint32_t root = 1;

        for (uint32_t d = 1; (uint64_t)d * d <= value; d++) {
                root = d;
                if (value % d == 0)
                        add_divisor(divisors, d);
        }
        for (uint32_t d = root; d > 0; d--) {
                if (value % d == 0 && value / d != d)
                        add_divisor(divisors, value / d);
        }
}

static uint32_t greatest_common_divisor(uint32_t a, uint32_t b)
{
        while (b != 0) {
                uint32_t rest = a % b;

                a = b;
                b = rest;
        }
        return a;
}

int ae_group_init(uint32_t world, uint32_t ep_size, uint32_t order,
                  struct ae_group_topology *ret_topology)
{
        struct divisors divisors = { .text = "" };

        if (world == 0)
                return ae_fail(AE_EINVAL, "cannot form expert groups: the world has no ranks");
        if (order != AE_ORDER_ED && order != AE_ORDER_DE)
                return ae_fail(AE_EINVAL, "cannot form expert groups of %u ranks: unknown order %u",
                               world, order);
        if (ep_size == 0 || world % ep_size != 0) {
                list_divisors(&divisors, world);
                return ae_fail(AE_EINVAL, "cannot form expert groups of %u ranks: ep_size %u does "
                               "not divide it (legal: %s)", world, ep_size, divisors.text);
        }
        *ret_topology = (struct ae_group_topology){
                .world = world,
                .ep_size = ep_size,
                .edp_size = world / ep_size,
                .order = order,
        };
        return 0;
}

int ae_group_check_experts(const struct ae_group_topology *topology, uint32_t n_experts)
{
        struct divisors divisors = { .text = "" };

        if (n_experts == 0)
                return ae_fail(AE_EINVAL, "cannot place experts on groups of %u ranks: there are "
                               "no experts", topology->ep_size);
        if (n_experts % topology->ep_size == 0)
                return 0;
        list_divisors(&divisors, greatest_common_divisor(topology->world, n_experts));
        return ae_fail(AE_EINVAL, "cannot place %u experts: ep_size %u does not divide it (legal "
                       "for %u ranks: %s)", n_experts, topology->ep_size, topology->world,
                       divisors.text);
}

uint32_t ae_group_ep_rank(const struct ae_group_topology *topology, uint32_t rank)
{
        assert(rank < topology->world);
        return topology->order == AE_ORDER_ED ? rank % topology->ep_size :
                                                rank / topology->edp_size;
}

uint32_t ae_group_edp_rank(const struct ae_group_topology *topology, uint32_t rank)
{
        assert(rank < topology->world);
        return topology->order == AE_ORDER_ED ? rank / topology->ep_size :
                                                rank % topology->edp_size;
}

/* EP groups are numbered by the place that their ranks have in their EDP groups, and the other
 * way round. */
uint32_t ae_group_ep_index(const struct ae_group_topology *topology, uint32_t rank)
{
        return ae_group_edp_rank(topology, rank);
}

uint32_t ae_group_edp_index(const struct ae_group_topology *topology, uint32_t rank)
{
        return ae_group_ep_rank(topology, rank);
}

uint32_t ae_group_ep_member(const struct ae_group_topology *topology, uint32_t index,
                            uint32_t position)
{
        assert(index < topology->edp_size);
        assert(position < topology->ep_size);
        return topology->order == AE_ORDER_ED ? index * topology->ep_size + position :
                                                index + position * topology->edp_size;
}

uint32_t ae_group_edp_member(const struct ae_group_topology *topology, uint32_t index,
                             uint32_t position)
{
        return ae_group_ep_member(topology, position, index);
}

uint32_t ae_group_expert_home(const struct ae_group_topology *topology, uint32_t n_experts,
                              uint32_t expert)
{
        assert(n_experts > 0 && n_experts % topology->ep_size == 0);
        assert(expert < n_experts);
        return expert / (n_experts / topology->ep_size);
}

uint32_t ae_group_expert_first(const struct ae_group_topology *topology, uint32_t n_experts,
                               uint32_t position)
{
        assert(n_experts > 0 && n_experts % topology->ep_size == 0);
        assert(position < topology->ep_size);
        return position * (n_experts / topology->ep_size);
}
