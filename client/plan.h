/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a scatter of each unit consists of, worked out once after registration: which gradients the
 * caller must bring, and the lanes (local.h) that they go to, the aliases' first and the unit's own
 * last. With it stands how far the unit has come in this round.
 */
#pragma once

#include "client/handle.h"

/* One tensor's place in a lane: elements [first, first + n) of the image of the lane's unit. */
struct ae_plan_part {
        uint64_t first, n;
        uint32_t tensor; /* index into the plan's tensors */
};

struct ae_plan_lane {
        uint32_t unit;   /* whose gradient image; an alias's is that of its home */
        uint16_t use;
        uint64_t first, n; /* the elements that are sent, with gaps */
        uint32_t part_first, n_parts; /* into parts, in the order of the image */
};

struct ae_plan {
        uint32_t *tensors;             /* owned; trainable ones of the unit in registration order */
        uint32_t n_tensors;
        struct ae_plan_part *parts;    /* owned; n_tensors of them */
        struct ae_plan_lane *lanes;    /* owned */
        uint32_t n_lanes;
        const struct autoep_gradient **given; /* owned; by index in tensors; under the ticket */

        /* in this round; under the ticket */
        uint32_t next_micro;           /* 1 + the micro-batch it was last scattered in; 0: none */
        bool last;                     /* AUTOEP_LAST was said */
        bool cut;                      /* a scatter ended at its deadline with a part posted; the
                                        * next one goes on from here, with the same flags: */
        uint32_t flags;
        uint32_t lane;
        uint64_t done_n;               /* elements of that lane already posted */
};

/* Fills handle->plans, one per unit, from its layout. */
int ae_plan_new(struct autoep *handle);
void ae_plan_free(struct autoep *handle);
/* A new round: nothing is scattered. */
void ae_plan_clear(struct autoep *handle);
/* A unit whose scatter was cut short, or AUTOEP_NONE. */
uint32_t ae_plan_find_cut(const struct autoep *handle);
