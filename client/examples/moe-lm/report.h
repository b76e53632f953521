/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What rank 0 prints: a first line with what is in use, progress, and a summary. On a terminal
 * progress is one line that is drawn anew; elsewhere a plain line every 10 s.
 */
#pragma once

#include "client/examples/moe-lm/train.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct lm_report {
        FILE *out;                   /* borrowed; NULL: this process prints nothing */
        const struct lm_trainer *trainer; /* borrowed */
        bool live;                   /* a terminal */
        bool unicode;
        double *losses;              /* owned; [steps] */
        size_t n;                    /* steps so far */
        uint64_t start_ns, line_ns, step_ns; /* of the begin, last line, last step */
        struct lm_times line_times, step_times; /* as they stood then */
        double line_tokens, tokens;  /* since the last line; in all */
        uint64_t skipped;            /* steps that were not applied */
};

/* The end of a run. */
struct lm_ending {
        double held_out;             /* loss */
        const uint64_t *counts;      /* [layers][experts], of all ranks */
        const char *moved;           /* what the backend says about bytes */
        const char *prompt, *sample; /* sample NULL: none */
        size_t n_sample;
};

/* AE_ENOMEM. */
int lm_report_init(struct lm_report *report, FILE *out, const struct lm_trainer *trainer);
void lm_report_deinit(struct lm_report *report); /* accepts a zeroed struct */

void lm_report_begin(struct lm_report *report);
void lm_report_step(struct lm_report *report, const struct lm_outcome *outcome);
void lm_report_end(struct lm_report *report, const struct lm_ending *ending);
