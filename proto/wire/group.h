/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Group maths for expert parallelism: which ranks hold which experts. Pure functions; daemons
 * decide with them and clients check. World W = ep_size * edp_size.
 *
 *   E+D (default): EP group g = {g*E .. g*E+E-1}; EDP group i = {i, i+E, i+2E, ...}
 *   D+E:           EDP group i = {i*D .. i*D+D-1}; EP group j = {j, j+D, j+2D, ...}
 *
 * Global expert e of n lives at EP position e / (n / ep_size), for every group.
 */
#pragma once

#include <stdint.h>

enum ae_group_order { AE_ORDER_ED = 0, AE_ORDER_DE = 1 };

struct ae_group_topology {
        uint32_t world;
        uint32_t ep_size;
        uint32_t edp_size; /* world / ep_size */
        uint32_t order;    /* enum ae_group_order */
};

/* AE_EINVAL when world is 0, order unknown, or ep_size is 0 or does not divide world; the text
 * lists the divisors. */
int ae_group_init(uint32_t world, uint32_t ep_size, uint32_t order,
                  struct ae_group_topology *ret_topology);
/* AE_EINVAL when n_experts is 0 or ep_size does not divide it; the text lists the legal ep sizes:
 * those that divide both world and n_experts. */
int ae_group_check_experts(const struct ae_group_topology *topology, uint32_t n_experts);

/*
 * From here on the topology comes from ae_group_init(), n_experts has passed
 * ae_group_check_experts(), and ranks, indices, positions and experts are in range: these are
 * asserted. Callers check what a peer sent.
 */

/* Position of @rank in its EP group, [0, ep_size), and in its EDP group, [0, edp_size). */
uint32_t ae_group_ep_rank(const struct ae_group_topology *topology, uint32_t rank);
uint32_t ae_group_edp_rank(const struct ae_group_topology *topology, uint32_t rank);
/* Which EP group ([0, edp_size)) and which EDP group ([0, ep_size)) @rank belongs to. */
uint32_t ae_group_ep_index(const struct ae_group_topology *topology, uint32_t rank);
uint32_t ae_group_edp_index(const struct ae_group_topology *topology, uint32_t rank);
/* The rank at @position of that group. */
uint32_t ae_group_ep_member(const struct ae_group_topology *topology, uint32_t index,
                            uint32_t position);
uint32_t ae_group_edp_member(const struct ae_group_topology *topology, uint32_t index,
                             uint32_t position);
/* EP position that holds global expert @expert, and the first expert of position @position. */
uint32_t ae_group_expert_home(const struct ae_group_topology *topology, uint32_t n_experts,
                              uint32_t expert);
uint32_t ae_group_expert_first(const struct ae_group_topology *topology, uint32_t n_experts,
                               uint32_t position);
