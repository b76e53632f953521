/* SPDX-License-Identifier: Apache-2.0 */
/* What the two halves of the fake daemon share. */
#pragma once

#include "tests/lib/fake-daemon.h"

/* Aborts with errno's words unless @fine. */
void fake_must(bool fine, const char *what);
/* Makes the thread look at everything again. */
void fake_poke(struct fake_daemon *daemon);
/* Wakes a worker if it sleeps. */
void fake_wake(struct fake_worker *worker);
void fake_wake_all(struct fake_daemon *daemon);
/* Fills a free slot with bytes [first, first + len) of the unit. With the lock held. */
uint32_t fake_fill_slot(struct fake_daemon *daemon, uint32_t unit, uint64_t version, uint64_t first,
                        uint64_t len);
void *fake_serve(void *daemon);
