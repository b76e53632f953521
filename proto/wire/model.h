/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A registered model: the tensor specs and the job's settings, as plain structs. Converts to and
 * from the protobuf message, checks what can be checked without the nodes, and finds the first
 * difference between two ranks' models. Pure but for allocation.
 */
#pragma once

#include "proto/wire/control.h"
#include "proto/wire/layout.h"

enum ae_optimizer { AE_OPT_ADAMW = 1, AE_OPT_SGD = 2, AE_OPT_EXTERNAL = 3 };

#define AE_MODEL_SLOTS_DEFAULT 4u
#define AE_MODEL_SLOTS_MAX 64u
#define AE_MODEL_SLOT_LEN_MAX (UINT64_C(1) << 30)
#define AE_MODEL_EXCHANGE_DEFAULT (UINT64_C(1) << 20)
#define AE_MODEL_EXCHANGE_MAX (UINT64_C(1) << 33) /* a message, a quarter of it, has 32 bit */
#define AE_MODEL_MEMORY_MAX AE_LAYOUT_MAX_LEN     /* cache_len, overflow_len */

struct ae_model {
        Autoep__Model *message;       /* owned; specs point into it */
        struct ae_tensor_spec *specs; /* owned array */
        uint32_t n_specs;
};

/* Takes @message over, also when it fails. AE_EUNSUPPORTED for tp, pp, sp other than 1 and
 * grad_wire fp16, AE_EINVAL for settings out of range; fills in defaults. */
int ae_model_new(Autoep__Model *message, struct ae_model **ret_model);
struct ae_model *ae_model_free(struct ae_model *model); /* returns NULL */
static inline void ae_model_free_p(struct ae_model **model)
{
        ae_model_free(*model);
}

/* A copy through the packed form. */
int ae_model_copy(const struct ae_model *model, struct ae_model **ret_copy);
int ae_model_layout(const struct ae_model *model, uint32_t n_nodes, struct ae_layout **ret_layout);

/*
 * 0 when both say the same, else AE_EMISMATCH with a text that names the first difference: @who_a
 * and @who_b are how the two are called in it ("rank 0", "rank 3").
 */
int ae_model_compare(const struct ae_model *a, const char *who_a, const struct ae_model *b,
                     const char *who_b);

/*
 * Alias uses. @tensor is an alias: its use number among all aliases of tensors of its home's unit,
 * 1, 2, … in registration order (local.h, "Lanes"). ae_layout_count_uses: per unit 1 + how many
 * there are.
 */
uint32_t ae_layout_use_of(const struct ae_layout *layout, uint32_t tensor);
void ae_layout_count_uses(const struct ae_layout *layout, uint32_t *ret_n_uses);
/* The alias that is use @use (>= 1) of @unit; AE_LAYOUT_NONE when there is none. */
uint32_t ae_layout_use_tensor(const struct ae_layout *layout, uint32_t unit, uint32_t use);
/* First element of home tensor @tensor in its unit's gradient image. Trainable only. */
uint64_t ae_layout_grad_first(const struct ae_layout *layout, uint32_t tensor);
