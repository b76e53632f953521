/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Waiting without a thread of our own. Of the threads that wait on a handle one leads: it sleeps in
 * ppoll on the socket, the bell and an eventfd by which the others kick it, for all, and takes in
 * what comes. The others sleep on a condition variable. When the leader's own condition is met it
 * leaves, and another leads.
 *
 * No wake-up is lost: before it sleeps the leader sets page.worker_waits (seq_cst) and then looks
 * at the conditions of all who wait (seq_cst loads); who comes later looks while the flag is set.
 * The daemon changes a word and then looks at the flag. What threads of this process change for
 * each other is announced by ae_pump_kick().
 */
#pragma once

#include "client/handle.h"

/* The end of a wait; grows while the job is paused. */
struct ae_deadline {
        uint64_t start_ns, timeout_ns; /* timeout 0: don't wait */
        uint64_t pause_ns;             /* params.pause_ns at the start */
        uint64_t paused_ns;            /* what was left then of a pause announced before */
};

/* AE_EINVAL for a timeout below AUTOEP_DEFAULT_TIMEOUT. */
int ae_deadline_check(int timeout_ms);
void ae_deadline_init(const struct autoep *handle, int timeout_ms,
                      struct ae_deadline *ret_deadline);
uint64_t ae_deadline_left_ns(const struct autoep *handle, const struct ae_deadline *deadline);

/* Which of the daemon's texts says why a wait didn't end. */
enum ae_reason { AE_REASON_WHY /* page.why */, AE_REASON_ROUND /* params.waiting */ };

struct ae_wait {
        /* Whether the wait is over. Called with the lock held, by any thread, any number of times;
         * changes nothing; reads shared words with seq_cst. */
        bool (*done)(struct autoep *handle, const struct ae_wait *wait);
        void *arg;                         /* borrowed; the condition's */
        const struct ae_deadline *deadline; /* borrowed */
        enum ae_reason reason;
        _Atomic uint64_t *waited_ns;       /* borrowed; NULL, or what counts the time spent */
        struct ae_list link;               /* the pump's */
};

/*
 * Waits until wait->done(), with the lock not held. 0; AE_ETIMEDOUT at the deadline; AE_ELOST or
 * what the daemon failed the job with; AE_EPROTO. The text says why; the caller puts in front what
 * it was doing.
 */
int ae_pump_wait(struct autoep *handle, struct ae_wait *wait);

/* Negative once the daemon has failed the job, with its reason. */
int ae_pump_check_job(struct autoep *handle);

/* Something that a wait's condition looks at was changed (seq_cst) by this process. */
void ae_pump_kick(struct autoep *handle);

/* Declares the daemon lost or mad, with the text of the last ae_fail(): every wait and every later
 * call ends with @status. The first one counts. With the lock held, or not. Returns @status. */
int ae_pump_break_locked(struct autoep *handle, int status);
int ae_pump_break(struct autoep *handle, int status);

/* Puts "@format: " in front of the thread's error text; returns @status. */
int ae_pump_prefix(int status, const char *format, ...) __attribute__((format(printf, 2, 3), cold));
