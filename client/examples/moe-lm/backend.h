/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the model and the training loop need from whoever keeps the parameters. There are two:
 * `autoep` (one rank; daemons own the dense parameters) and `reference` (one process that plays all
 * ranks in turn; the oracle). Model, data and step code are the same over both.
 *
 * A step: for each micro-batch, for each rank played here: turn(); any gathers, releases and
 * scatters; turn_end(). Then step(). One thread.
 */
#pragma once

#include "client/examples/moe-lm/spec.h"
#include "client/experts/comm.h"
#include "client/experts/real.h"
#include "kernels/ops.h"
#include "proto/base/clock.h"
#include "proto/wire/group.h"

#include <stdbool.h>
#include <stdint.h>

struct lm_backend;

/* The weights of a unit, by place in the unit, each in its tensor's dtype. */
struct lm_view {
        const void *data[LM_UNIT_TENSORS]; /* valid until the unit is released */
};

/* One local expert. */
struct lm_expert {
        const void *weight[LM_EXPERT_TENSORS]; /* in the dtype of the shape */
        void *grad[LM_EXPERT_TENSORS];         /* of the backend's real type: add to it */
};

struct lm_step {
        struct ae_hyper hyper[LM_N_GROUPS];
        double max_norm;
        bool use_tokens;
        uint64_t tokens;        /* of the ranks played here */
        double balance_rate;
        const uint64_t *counts; /* [layers][experts], of the ranks played here */
};

struct lm_verdict {
        bool applied;
        bool redo;              /* a rank could not finish: the step must be run again */
        double scale, norm, clip;
        uint64_t tokens;        /* of all ranks; counted with use_tokens only */
        char why[256];          /* when not applied */
};

enum lm_what { LM_MASTER, LM_GRADIENT }; /* fp32; gradient: the last round's sum, unscaled */

struct lm_backend_ops {
        const char *name;
        /* The micro-batch of @rank begins; @last: it is the step's last one of that rank. */
        int (*turn)(struct lm_backend *backend, uint32_t rank, bool last);
        int (*gather)(struct lm_backend *backend, uint32_t unit, struct lm_view *ret_view);
        int (*release)(struct lm_backend *backend, uint32_t unit);
        /* @grads: the trainable tensors of @unit, of the real type; sums over the rank's tokens. */
        int (*scatter)(struct lm_backend *backend, uint32_t unit, const void *const *grads);
        void (*expert)(struct lm_backend *backend, uint32_t layer, uint32_t local,
                       struct lm_expert *ret_expert);
        int (*turn_end)(struct lm_backend *backend);
        int (*step)(struct lm_backend *backend, const struct lm_step *step,
                    struct lm_verdict *ret_verdict);
        /* Between steps; every rank calls it, the rank played first gets @data (fp32). */
        int (*get)(struct lm_backend *backend, uint32_t tensor, enum lm_what what, float *data);
        /* Bytes moved so far, in words, one line each; NULL where nothing moves. */
        void (*describe)(struct lm_backend *backend, char *text, size_t len);
        void (*free)(struct lm_backend *backend);
};

/* Where time goes; the rest of a step is computation. */
struct lm_times {
        uint64_t gather_ns, dispatch_ns, scatter_ns, step_ns;
        uint64_t gather_len, scatter_len; /* bytes */
};

/* Embedded at the start of each backend. */
struct lm_backend {
        const struct lm_backend_ops *ops;
        const struct lm_spec *spec;   /* borrowed */
        enum ae_real real;            /* what the model computes in */
        uint32_t grad_dtype;          /* what dense gradients are scattered in */
        uint32_t world;
        uint32_t first_rank, n_ranks; /* the ranks that are played in this process */
        uint32_t rank;                /* whose turn it is */
        struct ae_group_topology place; /* of experts, as they lie here */
        struct ae_comm *ep;           /* the group that tokens are exchanged in; owned by backend */
        struct ae_comm *all;          /* one member for each process */
        uint64_t timeout_ns;          /* of any one wait */
        struct lm_times times;
};

static inline uint64_t lm_deadline(const struct lm_backend *backend)
{
        return ae_now_ns() + backend->timeout_ns;
}

/* Bytes of a unit's weights; and, with the dtype of gradients, of its gradient. */
static inline uint64_t lm_unit_len(const struct lm_spec *spec, uint32_t unit, uint32_t grad_dtype)
{
        const struct lm_unit *u = &spec->units[unit];
        uint64_t len = 0;

        for (uint32_t i = 0; i < (grad_dtype ? u->n_trainable : u->n); i++) {
                const struct lm_tensor *tensor = &spec->tensors[u->first + i];

                len += tensor->n * ae_dtype_size(grad_dtype ? grad_dtype : tensor->dtype);
        }
        return len;
}

/* The calls below are the operations with their time noted. */
static inline int lm_gather(struct lm_backend *backend, uint32_t unit, struct lm_view *ret_view)
{
        const uint64_t start = ae_now_ns();
        int r = backend->ops->gather(backend, unit, ret_view);

        backend->times.gather_ns += ae_now_ns() - start;
        backend->times.gather_len += lm_unit_len(backend->spec, unit, 0);
        return r;
}

static inline int lm_scatter(struct lm_backend *backend, uint32_t unit, const void *const *grads)
{
        const uint64_t start = ae_now_ns();
        int r = backend->ops->scatter(backend, unit, grads);

        backend->times.scatter_ns += ae_now_ns() - start;
        backend->times.scatter_len += lm_unit_len(backend->spec, unit, backend->grad_dtype);
        return r;
}

static inline struct lm_backend *lm_backend_free(struct lm_backend *backend)
{
        if (backend)
                backend->ops->free(backend);
        return NULL;
}

/* Adds up @values over all processes, in place, in their order. Every one calls it. */
int lm_total(struct lm_backend *backend, double *values, size_t n);
