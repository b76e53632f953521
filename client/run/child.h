/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One daemon or worker while it lives: its process, its pipes, its lines. All on the loop of the
 * launcher.
 *
 * A child has *exited* when its process is a zombie, and is *finished* when it is also reaped, its
 * output was read and its process group is gone. In between, for AE_RUN_LINGER_NS at most, what it
 * left running in its group (a tee, say) may end by itself. The zombie keeps the group's number
 * from being given to anybody else until the group is killed.
 */
#pragma once

#include "client/run/lines.h"
#include "client/run/place.h"
#include "client/run/spawn.h"

#include "proto/base/clock.h"

#include <stdint.h>
#include <uv.h>

#define AE_RUN_LINGER_NS AE_NS_PER_S

enum ae_run_role { AE_RUN_DAEMON, AE_RUN_WORKER };

struct ae_run_child {
        enum ae_run_role role;
        uint32_t index;       /* node or rank */
        uint64_t started_ns;
        pid_t pid;
        bool live;            /* from a start that succeeded to its finish */
        bool exited;
        bool ready;           /* a daemon that said so */
        bool port_taken;      /* a daemon that said so */
        bool blamed;          /* the first failure */
        uint64_t exited_ns;
        int code, signal;     /* how it ended; signal 0: it exited with code */
        struct ae_run_tail tail;
        char said[128];       /* a daemon's last STATUS= */

        /* Calls to the owner, from the loop, never from inside ae_run_child_start(). */
        void *owner;          /* borrowed */
        void (*on_ready)(struct ae_run_child *child);
        void (*on_finished)(struct ae_run_child *child);
        ae_run_line_fn *on_line[2]; /* of standard output and error; their arg is the child */

        struct ae_run_lines lines[2];
        uv_pipe_t pipes[2];
        uv_timer_t linger;
        uv_poll_t notify;
        unsigned n_open;      /* pipes */
        int notify_fd;        /* -1: none */
        int guard_fd;         /* borrowed */
};

struct ae_run_start {
        uv_loop_t *loop;
        char **argv, **vars;  /* borrowed for the call */
        int in;               /* becomes standard input; -1: /dev/null */
        int out;              /* becomes standard output; -1: a pipe to on_line[0] */
        const char *notify;   /* path of the readiness socket to open; NULL: none */
        int guard_fd;
};

/*
 * Starts it; role, index, owner and calls are set. As ae_run_spawn(); after a failure the child is
 * as before the call.
 */
int ae_run_child_start(struct ae_run_child *child, const struct ae_run_start *start);

/* Looks whether the process ended; true the first time that it did: code and signal are set. */
bool ae_run_child_check(struct ae_run_child *child);

/* To the whole group, also after the exit. */
void ae_run_child_kill(struct ae_run_child *child, int signal);

/* After its finish and a turn of the loop, or before its start. */
void ae_run_child_deinit(struct ae_run_child *child);

/*
 * A datagram socket at @path, as $NOTIFY_SOCKET names it, see sd_notify(3). AE_ESYS.
 */
int ae_run_notify_open(const char *path, int *ret_fd);
/* Reads all messages; the last STATUS= goes to @said. Whether one was READY=1. */
bool ae_run_notify_read(int fd, char *said, size_t said_size);
