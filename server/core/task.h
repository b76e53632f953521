/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tasks: the work on tensors that the core hands out. A task is complete in itself, so that any
 * thread, or a simulator, can run it with ae_task_run(); it touches only the ranges it names.
 */
#pragma once

#include "kernels/ops.h"
#include "proto/base/list.h"

#include <stdbool.h>
#include <stdint.h>

struct ae_job;
struct ae_shard;

enum ae_task_kind {
        AE_TASK_SUM,     /* fold inputs into acc */
        AE_TASK_COPY,    /* bytes */
        AE_TASK_NARROW,  /* fp32 to bf16, for the wire */
        AE_TASK_ROUND,   /* fp32 in place to bf16 precision, where sums travel so */
        AE_TASK_APPLY,   /* optimizer over a range of the shard */
        AE_TASK_BALANCE, /* selection biases after a step */
        AE_TASK_STATE    /* write staged values into a slice */
};

struct ae_task_sum {
        struct ae_ops_sum sum;
        struct ae_ops_input inputs[AE_OPS_SUM_MAX];
        float *zero;     /* not NULL: these n_zero elements are zeroed first */
        uint64_t n_zero;
};

/* A run of one tensor inside an apply task. */
struct ae_apply_run {
        uint64_t first, n;   /* elements from the shard's first state element */
        uint64_t weight_off; /* byte in the shard's weights */
        uint32_t tensor;
        uint32_t dtype;
        uint32_t owned;      /* the slice, as the job numbers its own */
};

struct ae_task_apply {
        struct ae_shard *shard;
        const struct ae_apply_run *runs; /* borrowed from the job */
        uint32_t n_runs;
        const float *gradient;           /* of the shard's first state element */
        const struct ae_adamw *adamw;    /* per tensor id; borrowed from the job */
        const struct ae_sgd *sgd;
        uint32_t optimizer;              /* enum ae_optimizer */
        const bool *absent;              /* per tensor id: not in this step */
        uint64_t version;                /* that the blocks get */
};

struct ae_task_state {
        float *state;        /* not NULL: master or moment */
        void *weight;        /* not NULL: written too, rounded to weight_dtype */
        uint32_t weight_dtype;
        const void *from;    /* fp32, or the weight's own dtype when state is NULL */
        uint64_t n;
        struct ae_owned *owned; /* the core's */
};

struct ae_layout;
struct ae_layout_segment;
struct ae_layout_slice;

/* b += rate * sign(mean - count) over the buffer tensors of one slice; all borrowed. */
struct ae_task_balance {
        const struct ae_layout *layout;
        const struct ae_layout_segment *segment;
        const struct ae_layout_slice *slice;
        const uint64_t *counts; /* of all buffer tensors in registration order */
        double rate;
        void *weight;           /* of the slice's first element */
};

struct ae_task_copy {
        void *to;
        const void *from;
        uint64_t len; /* NARROW, ROUND: bytes of the source */
};

struct ae_task {
        struct ae_list link;   /* the core's or the executor's */
        enum ae_task_kind kind;
        struct ae_job *job;    /* borrowed */
        void (*done)(struct ae_task *task);
        void *owner;           /* the core's, for done() */
        uint64_t arg[3];       /* likewise */
        union {
                struct ae_task_sum sum;
                struct ae_task_copy copy;
                struct ae_task_apply apply;
                struct ae_task_state state;
                struct ae_task_balance balance;
        };
};

/* Runs it to the end. @thread: which undo record of the shard it may use. */
void ae_task_run(struct ae_task *task, uint32_t thread);
