/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A plain TCP program, the floor of what travels between two daemons: two processes on the loopback
 * with one thread each, a control connection and data streams with the system's own buffers, and
 * bytes that are read straight into place.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define AE_BENCH_TCP_STREAMS_MAX 8

struct ae_bench_tcp {
        uint64_t len;      /* bytes of one transfer, one way */
        uint64_t own_len;  /* bytes that who asks copies in its own memory meanwhile */
        uint32_t streams;  /* 1 to AE_BENCH_TCP_STREAMS_MAX */
        uint32_t n_from;   /* ranges that the sender goes through in turn */
        uint32_t n_to;     /* ranges that the receiver goes through in turn */
        bool both_ways;    /* both ask for their bytes at once */
        uint32_t repeats;
};

/*
 * Nanoseconds of the best transfer, from the question until the last byte is in place. Blocks; the
 * two processes are children of this one and end with it. AE_ESYS.
 */
int ae_bench_tcp_run(const struct ae_bench_tcp *tcp, uint64_t *ret_ns);
