/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The submission and completion queues of the worker's page. Entries may be posted by any thread,
 * under a spin lock that is held for one copy; completions are taken in under the handle's lock by
 * whoever waits, and found again by their token.
 */
#pragma once

#include "client/pump.h"

#define AE_QUEUE_FULL 1 /* no free entry now */

/* Posts a copy of @sqe, wakes the daemon if @wake and it sleeps. 0, AE_QUEUE_FULL, or AE_EPROTO
 * when the daemon's index is impossible. Never waits. */
int ae_queue_post(struct autoep *handle, const struct ae_local_sqe *sqe, bool wake);
/* The same, waits for a free entry until the deadline. */
int ae_queue_post_wait(struct autoep *handle, const struct ae_local_sqe *sqe,
                       const struct ae_deadline *deadline);
/* Wakes the daemon, if it sleeps, for what it will find in the page. */
void ae_queue_wake(const struct autoep *handle);
/* Whether @n entries are free, 0 or 1, AE_EPROTO; seq_cst, for a wait's condition. */
int ae_queue_fits(struct autoep *handle, uint32_t n);
/* Whether the daemon has taken all that was posted; with the lock or without. */
bool ae_queue_is_read(struct autoep *handle);

int ae_queue_new(struct autoep *handle);
void ae_queue_free(struct autoep *handle);

/*
 * Posts @sqe (its token is set here) and waits for its completion. A negative status of the
 * completion is returned with the daemon's text. After 0 the slot ret_cqe->slot is pinned until
 * ae_queue_unpin(handle, ret_request). After a failure nothing is left to do: a late answer is
 * unpinned when it comes.
 */
int ae_queue_request(struct autoep *handle, struct ae_local_sqe *sqe,
                     const struct ae_deadline *deadline, struct ae_local_cqe *ret_cqe,
                     uint32_t *ret_request);
void ae_queue_unpin(struct autoep *handle, uint32_t request);

/* Takes in completions; with the lock held. Nothing before the page is there. */
void ae_queue_drain(struct autoep *handle);
