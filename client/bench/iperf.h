/* SPDX-License-Identifier: Apache-2.0 */
/* iperf3 on the loopback, where it is installed: a second opinion on the plain TCP program. */
#pragma once

#include "client/bench/suites.h"

/*
 * Adds a row of iperf3 with @streams streams beside the plain TCP program with as many; without
 * iperf3 no row and 0. Blocks for a little more than @seconds. AE_ESYS, AE_ENOMEM.
 */
int ae_bench_iperf(struct ae_bench *bench, uint32_t streams, uint32_t seconds);
/* Bytes per second that the JSON of an iperf3 client reports as received; 0 when it has none. */
double ae_bench_iperf_received(const char *json);
