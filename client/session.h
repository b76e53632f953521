/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The unix socket to the daemon: frames of protobuf messages with descriptors, and requests that
 * are answered by Done or Error of the same id, or by HelloOk and Registered. Requests come from
 * one thread at a time; whichever thread leads the waiting receives.
 */
#pragma once

#include "client/pump.h"
#include "proto/wire/control.h"

/* A request that waits for its answer. */
struct ae_session_reply {
        uint64_t id;      /* 0: hello and register */
        uint32_t want;    /* the type that means success */
        bool done;
        uint32_t type;    /* what came: .want or AE_CONTROL_ERROR */
        ProtobufCMessage *message; /* owned */
        int fds[AE_CONTROL_FDS_MAX]; /* owned */
        uint32_t n_fds;
        struct ae_list link;
};

/*
 * Connects .socket before the deadline. AE_ENOENT when no daemon listens there, AE_EAUTH, AE_EINVAL
 * for a path that is too long.
 */
int ae_session_connect(struct autoep *handle, const char *path, const struct ae_deadline *deadline);

struct ae_session_call {
        uint32_t type;
        const ProtobufCMessage *message; /* borrowed */
        int fd;                          /* borrowed; passed along unless -1 */
        uint64_t id;                     /* as in the message */
        uint32_t want;
};

/*
 * Sends a request and waits for its answer, which the caller releases with
 * ae_session_reply_deinit() also after a failure. An Error is returned with its own status and
 * text.
 */
int ae_session_call(struct autoep *handle, const struct ae_session_call *call,
                    const struct ae_deadline *deadline, struct ae_session_reply *ret_reply);
void ae_session_reply_deinit(struct ae_session_reply *reply);

/* The next request's id, never 0. */
uint64_t ae_session_next_id(struct autoep *handle);

/* Takes in all that has come; lock held. AE_ELOST when the daemon has hung up, AE_EPROTO. */
int ae_session_receive(struct autoep *handle);
void ae_session_in_deinit(struct ae_session_in *in);
