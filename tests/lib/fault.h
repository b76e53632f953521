/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes an allocation fail: the Nth call of malloc, calloc, realloc, reallocarray, strdup, strndup,
 * posix_memalign or aligned_alloc that the calling thread makes from the program's own objects and
 * static libraries. Allocations inside shared libraries aren't seen. And makes accept4() fail, with
 * errors that a test can't bring about. A test gets this with the meson dependency `fault`, which
 * wraps those symbols at link time.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* The @nth allocation from now fails, once; the first is 1. Only this thread's count. */
void fault_alloc_arm(uint64_t nth);
/* No allocation fails any more; returns whether one did since fault_alloc_arm(). */
bool fault_alloc_disarm(void);
/* Allocations of this thread since fault_alloc_arm(), with the one that failed. */
uint64_t fault_alloc_count(void);

/*
 * Runs @attempt with the 1st, 2nd, ... allocation failing until it makes fewer than that. Every run
 * in which one failed must return @expected, the last one 0; cmocka assertions say so. @attempt
 * frees what it made; a leak shows under the address sanitizer. Returns how many runs failed.
 */
uint64_t fault_alloc_sweep(int (*attempt)(void *arg), void *arg, int expected);

/* The next @n calls of accept4() by this thread fail with @error and take nothing; 0: none. */
void fault_accept_arm(int error, uint64_t n);
/* Calls of accept4() since then, with those that did not fail. */
uint64_t fault_accept_count(void);
