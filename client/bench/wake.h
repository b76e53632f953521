/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Floors of a question that a sleeping process answers: there and back between two processes that
 * both sleep, with nothing done in between.
 */
#pragma once

#include <stdint.h>

enum ae_bench_wake { AE_BENCH_WAKE_EVENTFD, AE_BENCH_WAKE_FUTEX };

/*
 * @n times: sleeps @pause_us, then asks and waits for the answer; the nanoseconds of each go to
 * @ret_ns. The other process is a child of this one and ends with it. AE_ESYS.
 */
int ae_bench_wake_run(enum ae_bench_wake how, uint32_t n, uint32_t pause_us, uint64_t *ret_ns);
