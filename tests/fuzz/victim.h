/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An endpoint that listens, and one attacker's connection to it. A victim lives as long as the
 * process, its connection as long as an input. The page that the attacker was granted lies between
 * two that must stay as they are.
 */
#pragma once

#include "tests/fuzz/input.h"

#include "proto/net/hello.h"
#include "proto/net/net.h"

#include <stdbool.h>

#define VICTIM_PAGE 4096u

struct victim {
        struct ae_net *net;
        char address[AE_NET_ADDR_MAX];
        char *memory; /* three pages */
        struct ae_net_mem *mem;
        struct ae_net_conn *conn; /* the attacker's, once up */
        struct ae_net_key keys[2]; /* of the middle page: live, revoked */
        uint32_t n_refused;
        bool down;
};

/* The one of transport @name, opened at the first call. */
struct victim *victim_get(const char *name);
/* Hands out events until there are none. */
void victim_turn(struct victim *victim);
/* The same until @flag holds; what has been sent may still be under way inside the kernel. */
void victim_until(struct victim *victim, bool (*flag)(const struct victim *victim));
bool victim_is_up(const struct victim *victim);
bool victim_is_rid(const struct victim *victim); /* of the attacker: refused or down */
/* A hello that fits it. */
void victim_hello(uint8_t kind, uint64_t token, uint8_t ret_frame[AE_HELLO_SIZE]);
/* Receives exactly @len bytes from the victim on @fd; false when it has hung up. */
bool victim_answer(struct victim *victim, int fd, void *data, size_t len);
/* The attacker has closed: ends the connection and checks the pages. */
void victim_end(struct victim *victim);
