/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Control messages as a stranger might send them: of any type, well formed, their fields drawn from
 * values that mean something in the job of tests/unit/test-core-bed.h and from those at the edges.
 */
#pragma once

#include "proto/net/net.h"
#include "proto/wire/control.h"

struct invent {
        uint32_t (*draw)(void *user); /* any number */
        void *user;
        const struct ae_net_key *keys; /* borrowed; granted ones, which some keys then are */
        uint32_t n_keys;
};

/* The caller frees it with ae_control_free(). */
ProtobufCMessage *invent_control(struct invent *invent, uint32_t *ret_type);
