/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compute threads. The core's thread hands tasks out and takes them back; between them are rings
 * with one writer and one reader each, so no locks. A thread without work sleeps on a futex. Copies
 * are run before all other tasks that wait.
 */
#pragma once

#include "server/core/task.h"

struct ae_pool_threads;

/* @wake: called on a compute thread when finished tasks wait and the owner has not been told yet;
 * it must be safe there (uv_async_send, an eventfd). AE_ENOMEM, AE_ESYS. */
int ae_threads_new(uint32_t n, void (*wake)(void *user), void *user,
                   struct ae_pool_threads **ret_threads);
/* All tasks have been taken back. Joins. NULL is fine. Returns NULL. */
struct ae_pool_threads *ae_threads_free(struct ae_pool_threads *threads);
void ae_threads_run(struct ae_pool_threads *threads, struct ae_task *task);
/* A finished task, NULL when there is none now. */
struct ae_task *ae_threads_take(struct ae_pool_threads *threads);
uint32_t ae_threads_running(const struct ae_pool_threads *threads); /* not taken back */
