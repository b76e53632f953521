/* SPDX-License-Identifier: Apache-2.0 */
/* The command line of autoep-run. Pure; everything is borrowed from argv. */
#pragma once

#include "proto/base/log.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define AE_RUN_NODES_MAX 64
/* With two pipes for each and the daemons' sockets this stays under 1024 descriptors. */
#define AE_RUN_WORKERS_MAX 256

/*        name           word             argument        help  */
#define AE_RUN_OPTION_TABLE(X)                                                                    \
        X(NODES,         "nodes",         "N",            "daemons to start; default 1")          \
        X(WORKERS,       "workers",       "M[,M...]",                                             \
          "workers of each daemon, or of each in turn; default 1")                                \
        X(JOB,           "job",           "NAME",                                                 \
          "the job's name; default the program's")                                                \
        X(TRANSPORT,     "transport",     "shm|tcp",      "between the daemons; default shm")     \
        X(MEMORY,        "memory",        "BYTES",                                                \
          "budget of each daemon; K, M, G and T multiply")                                        \
        X(LOG_LEVEL,     "log-level",     "LEVEL",                                                \
          "show daemon lines up to error, warn, info or debug; default warn")                     \
        X(KEEP_GOING,    "keep-going",    "yes|no",                                               \
          "let the others run on when a worker fails; default no")                                \
        X(READY_TIMEOUT, "ready-timeout", "SECONDS",                                              \
          "how long daemons may take to start; default 10")                                       \
        X(HELP,          "help",          NULL,           "print this")                           \
        X(VERSION,       "version",       NULL,           "print the version")

enum ae_run_option {
#define AE_RUN_OPTION_ENUM(name, word, argument, help) AE_RUN_OPTION_##name,
        AE_RUN_OPTION_TABLE(AE_RUN_OPTION_ENUM)
#undef AE_RUN_OPTION_ENUM
        AE_RUN_N_OPTIONS
};

struct ae_run_option_row {
        const char *word;
        const char *argument; /* NULL: takes none */
        const char *help;
};

extern const struct ae_run_option_row ae_run_option_rows[AE_RUN_N_OPTIONS];

struct ae_run_options {
        uint32_t n_nodes;
        uint32_t workers[AE_RUN_NODES_MAX]; /* per node; some may be 0, not all */
        uint32_t world;
        const char *job;
        const char *transport;
        uint64_t memory_len;     /* 0: the daemon's own default */
        enum ae_log_level level; /* of daemon lines that are shown */
        bool keep_going;
        uint64_t ready_ns;
        bool help, version;      /* then nothing else counts */
        char **program;          /* NULL-terminated */
};

/* AE_EINVAL names the option and what is wrong with it. Options end at the first other word. */
int ae_run_options_parse(int argc, char **argv, struct ae_run_options *ret_options);

void ae_run_options_help(FILE *out);
