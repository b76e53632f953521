/* SPDX-License-Identifier: Apache-2.0 */
/* A small trainer of the example over the reference, on a text that can be learnt. */
#pragma once

#include "client/examples/moe-lm/train.h"

extern struct lm_text bench_text; /* empty before bench_make_text(), a group's setup */
int bench_make_text(void **state);

/* Parses words of a command line. @options borrow from a buffer that the next call writes anew. */
int bench_parse(struct lm_options *options, const char *line);

#define SMALL "--layers 2 --dim 16 --heads 2 --experts 4 --expert-dim 12 --seq 16 --warmup 5 "

struct bench {
        struct lm_options options;
        struct lm_spec spec;
        struct lm_backend *backend;
        struct lm_trainer trainer; /* points into the bench, which stays where it is */
};

/* What fails here fails the test. */
void bench_open(struct bench *bench, const char *line, enum ae_real real);
void bench_close(struct bench *bench);
struct lm_outcome bench_step(struct bench *bench, uint64_t step);
/* All of a kind of state but buffers, tensor after tensor; freed by the caller. */
float *bench_state(struct bench *bench, enum lm_what what);
