/* SPDX-License-Identifier: Apache-2.0 */
/*
 * --trace: a run in every bit, for cmp. A line per step with its loss and norm in hexadecimal
 * (scanf's %lf reads them), then one per tensor with the XXH3 of its fp32 masters, or of its values
 * where it is a buffer. The training thread.
 */
#pragma once

#include "client/examples/moe-lm/train.h"

#include <stdio.h>

struct lm_trace {
        const struct lm_trainer *trainer; /* borrowed */
        const char *path;                 /* borrowed; NULL: no trace is asked for */
        FILE *out;                        /* owned; NULL where rank 0 isn't played */
        uint64_t n_steps;
};

/* @path may be empty: then the other functions do nothing. An error names the file. */
int lm_trace_open(struct lm_trace *trace, const struct lm_trainer *trainer, const char *path);
void lm_trace_deinit(struct lm_trace *trace); /* accepts a zeroed struct */

void lm_trace_step(struct lm_trace *trace, const struct lm_outcome *outcome);
/* A collective over the ranks. Every byte is in the file when it returns 0. */
int lm_trace_end(struct lm_trace *trace);
