/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's unix socket: accepts workers and autoep-ctl, reads and writes control frames with
 * their descriptors, and knows by SO_PEERCRED who is there. Loop thread.
 */
#pragma once

#include "server/core/core.h"

#include <uv.h>

struct ae_sessions;

struct ae_sessions_options {
        uv_loop_t *loop;
        const char *path;   /* of the socket; a stale one is removed, anything else refused */
        struct ae_core *core;
        uint32_t node;      /* whose this is, for texts */
        /* Answers autoep-ctl; the JSON text is the caller's to free. */
        int (*inspect)(void *user, const Autoep__CtlRequest *request, char **ret_text);
        void *user;
};

int ae_sessions_new(const struct ae_sessions_options *options, struct ae_sessions **ret_sessions);
/* Ends every session; the loop must run once more. NULL is fine. Returns NULL. */
struct ae_sessions *ae_sessions_free(struct ae_sessions *sessions);

/* The core's worker_send and worker_wake. */
void ae_sessions_send(struct ae_worker *worker, uint32_t type, const ProtobufCMessage *message,
                      const int *fds, size_t n_fds);
void ae_sessions_wake(struct ae_worker *worker);

/* Drains every worker's ring. */
void ae_sessions_drain(struct ae_sessions *sessions);
/* Before the loop sleeps: false when a ring is not empty. Then rings ring the doorbell. */
bool ae_sessions_sleep(struct ae_sessions *sessions);
void ae_sessions_awake(struct ae_sessions *sessions);
void ae_sessions_tick(struct ae_sessions *sessions, uint64_t now_ns);
