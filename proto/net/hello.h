/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The first frame on every socket of tcp and shm, 64 bytes, little-endian. Magic and version stand
 * where they stand for ever, so that any two versions can name each other's.
 *
 *      0       4    5    6    7    8        12       16              24              32
 *      +-------+----+----+----+----+--------+--------+---------------+---------------+
 *      | magic |kind|strm| n  | 0  |version | node   | incarnation   | cluster       |
 *      +-------+----+----+----+----+--------+--------+---------------+---------------+
 *      | token             | zero (24 bytes)                                         |
 *      +-------------------+---------------------------------------------------------+
 *      32                  40                                                        64
 *
 * strm: index of a data stream; n: how many the connector asks for. token: 0 from a connector's
 * first hello; chosen by the acceptor; repeated by each data stream to say where it belongs.
 */
#pragma once

#include <stdint.h>

#include "proto/net/net.h"

#define AE_HELLO_SIZE 64

enum ae_hello_kind {
        AE_HELLO_TCP = 1,    /* first on the control stream, both ways */
        AE_HELLO_STREAM = 2, /* first on a data stream, from the connector */
        AE_HELLO_SHM = 3,    /* first on the unix socket, both ways */
};

struct ae_hello {
        uint8_t kind;
        uint8_t stream;
        uint8_t n_streams;
        struct ae_net_hello who;
        uint64_t token;
};

void ae_hello_encode(const struct ae_hello *hello, uint8_t ret_frame[AE_HELLO_SIZE]);
/* AE_EPROTO when it isn't a hello of kind @kind_a or @kind_b. The version is not compared. */
int ae_hello_decode(const uint8_t frame[AE_HELLO_SIZE], uint8_t kind_a, uint8_t kind_b,
                    struct ae_hello *ret_hello);
/* AE_EVERSION or AE_EMISMATCH with both values in the thread's error text. */
int ae_hello_compare(const struct ae_net_hello *self, const struct ae_net_hello *peer);
/* AE_EMISMATCH when node @expected was asked and another answered. */
int ae_hello_expect(uint32_t expected, const struct ae_net_hello *peer);
