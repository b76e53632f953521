/* SPDX-License-Identifier: Apache-2.0 */
/* Tensors of real models, by their public configurations: names, shapes and units as a worker
 * would register them, for tests and benchmarks that need real sizes. */
#pragma once

#include "proto/wire/layout.h"

enum shapes_model {
        SHAPES_QWEN3_30B_A3B,
        SHAPES_MIXTRAL_8X7B,
        SHAPES_DEEPSEEK_V3, /* without the multi-token prediction layer */
        SHAPES_N_MODELS,
};

struct shapes {
        const char *model;            /* static */
        struct ae_tensor_spec *specs; /* owned, with their names */
        uint32_t n_specs;
        uint32_t cap;
};

/*
 * All tensors of @model in bf16 (routers in @router_dtype, selection biases in fp32), one unit a
 * layer, one for the embedding, one for the last norm and the output matrix; with the experts or
 * without. Aborts without memory. The caller frees it.
 */
struct shapes *shapes_new(enum shapes_model model, uint32_t router_dtype, bool experts);
struct shapes *shapes_free(struct shapes *shapes); /* returns NULL */
