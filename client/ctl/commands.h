/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tables of autoep-ctl: its options, its commands, their columns, its exit codes. Help, usage
 * checks, completion, rendering, and the tests of the manual page and of SCHEMA.md all read these.
 * Static and immutable.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

/*          name         value  words  */
#define AE_CTL_EXIT_TABLE(X)                                                                      \
        X(OK,          0, "fine")                                                                 \
        X(FAILED,      1, "the request failed")                                                   \
        X(USAGE,       2, "the command line is wrong")                                            \
        X(DEGRADED,    3, "answered, but a job failed or a node is lost")                         \
        X(UNREACHABLE, 5, "no daemon answered in time")                                           \
        X(DENIED,      6, "the daemon or the socket's mode doesn't allow it")

enum ae_ctl_exit {
#define AE_CTL_EXIT_ENUM(name, value, words) AE_CTL_EXIT_##name = value,
        AE_CTL_EXIT_TABLE(AE_CTL_EXIT_ENUM)
#undef AE_CTL_EXIT_ENUM
};

/*        name        short word           argument      help  */
#define AE_CTL_OPTION_TABLE(X)                                                                    \
        X(SOCKET,     's', "socket",     "PATH",                                                  \
          "the daemon's socket; default $AUTOEP_SOCKET, then /run/autoep/autoepd.sock")           \
        X(JOB,        'j', "job",        "NAME",                                                  \
          "only this job; needed where there are several")                                        \
        X(TENSOR,     't', "tensor",     "NAME",       "only this tensor")                        \
        X(UNIT,       'u', "unit",       "NAME",       "only this unit")                          \
        X(OUTPUT,     'o', "output",     "table|json", "how to print; json is stable for scripts") \
        X(NO_HEADERS, 'n', "no-headers", NULL,         "leave the line of column titles out")     \
        X(TIMEOUT,    'T', "timeout",    "SECONDS",                                               \
          "how long to wait for the answer; default 10")                                          \
        X(HELP,       'h', "help",       NULL,         "print this")                              \
        X(VERSION,    'V', "version",    NULL,         "print the version")

enum ae_ctl_option_id {
#define AE_CTL_OPTION_ENUM(name, letter, word, argument, help) AE_CTL_OPTION_##name,
        AE_CTL_OPTION_TABLE(AE_CTL_OPTION_ENUM)
#undef AE_CTL_OPTION_ENUM
        AE_CTL_N_OPTIONS
};

struct ae_ctl_option {
        char letter;
        const char *word;
        const char *argument; /* NULL: takes none */
        const char *help;
};

enum ae_ctl_kind {
        AE_CTL_TEXT,
        AE_CTL_STATE,    /* a word with a colour of its own */
        AE_CTL_NUMBER,
        AE_CTL_SIZE,     /* bytes, shown as 1.5 GiB */
        AE_CTL_DURATION, /* seconds, shown as 2 h 5 min */
        AE_CTL_BOOL,     /* yes, no */
        AE_CTL_SHAPE,    /* [4096,1024] */
        AE_CTL_RANKS,    /* 0-3,8 */
        AE_CTL_WORDS,    /* array of strings */
        AE_CTL_VALUE,    /* number in the row's "unit" */
};

struct ae_ctl_column {
        const char *title;
        const char *key; /* of the row; "a.b" is key b of object a */
        enum ae_ctl_kind kind;
        bool optional;   /* left out when no row has a value for it */
};

struct ae_ctl_command {
        const char *name;
        const char *help;
        const char *argument;  /* of a local command, for help; else NULL */
        bool local;            /* answered without a daemon */
        unsigned options;      /* bits 1 << AE_CTL_OPTION_JOB, _TENSOR, _UNIT that it takes */
        const char *schema;    /* "autoep.NAME/1", NULL for local ones */
        const struct ae_ctl_column *fields; /* shown as lines in front of the table */
        size_t n_fields;
        const char *rows;      /* key of the array of rows */
        const struct ae_ctl_column *columns;
        size_t n_columns;
};

extern const struct ae_ctl_option ae_ctl_options[AE_CTL_N_OPTIONS];
extern const struct ae_ctl_command ae_ctl_commands[];
extern const size_t ae_ctl_n_commands;

/* NULL for an unknown name. */
const struct ae_ctl_command *ae_ctl_command_find(const char *name);
