/* SPDX-License-Identifier: Apache-2.0 */
/* A small model, and handles that have registered it with a fake daemon. */
#pragma once

#include "client/autoep.h"
#include "tests/lib/fake-daemon.h"

/* More than the smallest ring in fp32, less in bf16; in so many pieces. */
#define JOB_BIG_PIECES 5u
#define JOB_BIG_N ((JOB_BIG_PIECES - 1) * (uint64_t)AE_LOCAL_PIECE_N + 100)

/* Tensors and units by number. */
enum {
        JOB_EMBED,      /* unit 0: bf16 [300, 4] */
        JOB_W,          /* unit 1: bf16 [1000] */
        JOB_NORM,       /*         fp32 [5] */
        JOB_FROZEN,     /*         bf16 [7], frozen */
        JOB_BIAS,       /*         fp32 [4], a buffer */
        JOB_EXPERT,     /*         bf16 [16], an expert's */
        JOB_TIED,       /*         alias of JOB_EMBED: its use 1 */
        JOB_W2,         /*         bf16 [3] */
        JOB_BIG,        /* unit 2: bf16 [JOB_BIG_N] */
        JOB_HEAD,       /* unit 3: alias of JOB_EMBED: its use 2; nothing else */
        JOB_BIG_TIED,   /* unit 4: alias of JOB_BIG: its use 1 */
        JOB_N_TENSORS
};
enum { JOB_UNIT_EMBED, JOB_UNIT_LAYER, JOB_UNIT_BIG, JOB_UNIT_HEAD, JOB_UNIT_BIG_TIED,
       JOB_N_UNITS };

struct job_model {
        struct autoep_tensor tensors[JOB_N_TENSORS];
        struct autoep_model model;
};
/* Without initial values. */
void job_model_fill(struct job_model *model);

/* Options that lead to @daemon, with a timeout of 10 s. */
struct autoep_options job_options(const struct fake_daemon *daemon, int rank);
/* An open handle; a reader for rank -1. Asserts. */
autoep *job_open(const struct fake_daemon *daemon, int rank);
/* Opens and registers; for a world of 1. */
autoep *job_join(const struct fake_daemon *daemon);
/* A step request with one hyper-parameter group. */
struct autoep_step job_step(void);

/* Whether the view has the bytes of its unit at its version, from byte @first of the unit on. */
bool job_view_is_right(const struct autoep_view *view, uint64_t first);
/* Milliseconds since some time. */
uint64_t job_now_ms(void);
/* Asserts that a wait of @timeout_ms ended because of it: not before, and within 2 s after. */
void job_assert_took(uint64_t took_ms, uint64_t timeout_ms);
/* Asserts that autoep_last_error() names @what. */
void job_assert_error_names(const char *what);
