/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The choice of a variant, and the scalars that optimizer kernels are given. Compiled for the
 * baseline processor; any thread.
 */
#include "kernels/ops-internal.h"

#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct ae_ops_variant *variant_find(const char *name)
{
        for (size_t i = 0; i < ae_ops_n_variants; i++) {
                const struct ae_ops_variant *variant = &ae_ops_variants[i];

                if (strcmp(variant->ops->name, name) == 0)
                        return variant->usable() ? variant : NULL;
        }
        return NULL;
}

static const struct ae_ops_variant *variant_best(void)
{
        for (size_t i = 0; i < ae_ops_n_variants; i++) {
                if (ae_ops_variants[i].usable())
                        return &ae_ops_variants[i];
        }
        assert(!"the C kernels are usable everywhere");
        abort();
}

static _Noreturn void variant_refuse(const char *name)
{
        fprintf(stderr, "cannot use the kernels named by AUTOEP_CPU=%s: %s (usable here:", name,
                "this processor or this build lacks them");
        for (size_t i = 0; i < ae_ops_n_variants; i++) {
                if (ae_ops_variants[i].usable())
                        fprintf(stderr, " %s", ae_ops_variants[i].ops->name);
        }
        fprintf(stderr, ")\n");
        exit(EXIT_FAILURE);
}

static const struct ae_ops_variant *variant_choose(void)
{
        const char *name = getenv("AUTOEP_CPU");
        const struct ae_ops_variant *variant;

        if (name == NULL || name[0] == '\0')
                return variant_best();
        variant = variant_find(name);
        if (variant == NULL)
                variant_refuse(name);
        return variant;
}

const struct ae_ops_variant *ae_ops_variant(void)
{
        /* Relaxed: what it points to is constant, and threads that race choose the same. */
        static _Atomic(const struct ae_ops_variant *) chosen;
        const struct ae_ops_variant *variant;

        variant = atomic_load_explicit(&chosen, memory_order_relaxed);
        if (variant == NULL) {
                variant = variant_choose();
                atomic_store_explicit(&chosen, variant, memory_order_relaxed);
        }
        return variant;
}

const struct ae_ops *ae_ops(void)
{
        return ae_ops_variant()->ops;
}

const struct ae_ops *ae_ops_find(const char *name)
{
        const struct ae_ops_variant *variant = variant_find(name);

        return variant != NULL ? variant->ops : NULL;
}

/* By squaring, for pow() may differ in its last bit from one C library to the next. */
static double power(double base, uint64_t exponent)
{
        double result = 1;

        for (; exponent != 0; exponent >>= 1) {
                if (exponent & 1)
                        result *= base;
                base *= base;
        }
        return result;
}

void ae_adamw_scalars(const struct ae_hyper *hyper, uint64_t step, double grad_scale,
                      struct ae_adamw *ret_scalars)
{
        double bc1 = 1 - power(hyper->beta1, step);
        double bc2 = 1 - power(hyper->beta2, step);

        assert(step >= 1);
        *ret_scalars = (struct ae_adamw){
                .grad_scale = (float)grad_scale,
                .decay = (float)(1 - hyper->lr * hyper->weight_decay),
                .beta1 = (float)hyper->beta1,
                .one_minus_beta1 = (float)(1 - hyper->beta1),
                .beta2 = (float)hyper->beta2,
                .one_minus_beta2 = (float)(1 - hyper->beta2),
                .step_size = (float)(hyper->lr / bc1),
                .bc2_sqrt = (float)sqrt(bc2),
                .eps = (float)hyper->eps,
        };
}

void ae_sgd_scalars(const struct ae_hyper *hyper, double grad_scale, struct ae_sgd *ret_scalars)
{
        *ret_scalars = (struct ae_sgd){
                .grad_scale = (float)grad_scale,
                .lr = (float)hyper->lr,
                .momentum = (float)hyper->beta1,
                .weight_decay = (float)hyper->weight_decay,
        };
}

double ae_clip_factor(double norm, double max_norm)
{
        double factor;

        if (max_norm == 0)
                return 1;
        factor = max_norm / (norm + 1e-6);
        return factor > 1 ? 1 : factor; /* a norm that is NaN gives NaN */
}
