/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CPU kernels behind one dispatch table.
 *
 * ae_ops() is chosen once, from the processor and AUTOEP_CPU=c|avx2|avx512; every variant gives the
 * same bits as the plain C one (ops-c.c, the reference) for every length and alignment. Kernels are
 * pure: no allocation, no locks, any thread. No fused multiply-add, IEEE division and square root,
 * subnormals kept (callers never set FTZ or DAZ), rounding to nearest even. Lengths are in elements
 * unless named len (bytes); pointers need only element alignment; ranges must not overlap unless
 * said; n may be 0. Where arithmetic gives a NaN, its bits are 0x7fc00000, for processors and
 * compilers differ in whose payload and sign they keep; what is only copied or converted keeps its
 * own.
 */
#pragma once

#include "proto/base/dtype.h"
#include "proto/base/longacc.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint16_t ae_bf16; /* the upper half of an IEEE binary32 */

#define AE_OPS_SUM_MAX 16       /* inputs of one sum call */
#define AE_OPS_NORM_BLOCK 4096  /* elements per norm block */
#define AE_OPS_NORM_LANES 16    /* double lanes in a norm block */

/* One input of a sum. */
struct ae_ops_input {
        const void *data; /* borrowed; n elements */
        uint32_t dtype;   /* AE_DTYPE_F32 or AE_DTYPE_BF16 */
};

/*
 * acc[i] = ((base[i] + in[0][i]) + in[1][i]) + ..., in fp32, left to right; without @keep the fold
 * starts from in[0] itself (its bits are stored, so a lone -0 or NaN survives), or is +0 where
 * there is no input. One read of each input, one write of acc; only the few elements around a fold
 * that is not finite are looked at again, in the first cache. acc may not overlap an input.
 *
 * Large results that are not kept from before, with acc aligned to 64 bytes, are written past the
 * caches.
 */
struct ae_ops_sum {
        float *acc;
        size_t n;
        const struct ae_ops_input *inputs;
        size_t n_inputs; /* 0..AE_OPS_SUM_MAX; 0 with keep: only norm and check of acc,
                          * which is not written; its bit in nonfinite is then bit 0 */
        bool keep;       /* start from what acc holds */
        bool check;      /* whether nonfinite is wanted: of the inputs, not of base or the fold */
        bool norm;       /* whether norm2 and infinite are wanted: of the finished acc */
        /* results */
        uint32_t nonfinite; /* bit k: input k holds a NaN or Inf; 0 without check */
        bool infinite;      /* acc holds a NaN or Inf; norm2 then lacks the blocks that do */
        struct ae_longacc norm2; /* what norm2() adds of the finished acc; 0 without norm */
};

/* Scalars of an AdamW step, each rounded once from double by ae_adamw_scalars(). */
struct ae_adamw {
        float grad_scale;   /* s times the clip factor; multiplies the gradient first */
        float decay;        /* 1 - lr * weight_decay */
        float beta1, one_minus_beta1;
        float beta2, one_minus_beta2;
        float step_size;    /* lr / (1 - beta1^t) */
        float bc2_sqrt;     /* sqrt(1 - beta2^t) */
        float eps;
};

/* Scalars of SGD with momentum: g' = g*grad_scale + wd*p; m = momentum*m + g'; p -= lr*m. */
struct ae_sgd {
        float grad_scale;
        float lr;
        float momentum;     /* 0: m is neither read nor written and may be NULL */
        float weight_decay; /* torch's coupled decay; 0: the product is not added */
};

struct ae_ops {
        const char *name; /* "c", "avx2", "avx512" */

        /* fp32 -> bf16, nearest even; a NaN stays a NaN (quiet, upper payload bits kept). */
        void (*f32_to_bf16)(ae_bf16 *to, const float *from, size_t n);
        void (*bf16_to_f32)(float *to, const ae_bf16 *from, size_t n);
        void (*sum)(struct ae_ops_sum *sum);
        /*
         * Adds the sum of squares to @sum: 4,096-element blocks from the start of the range; in a
         * block, in double, lane i%16 adds (double)x*(double)x in index order; then lanes 0..15 in
         * order; blocks are added exactly, so that a range may be cut between them. False when a
         * block holds a NaN or Inf; such blocks are left out.
         */
        bool (*norm2)(const float *x, size_t n, struct ae_longacc *sum);
        /* Whether all are finite; ret_index (may be NULL) is the first that is not, if any. */
        bool (*finite_f32)(const float *x, size_t n, size_t *ret_index);
        bool (*finite_bf16)(const ae_bf16 *x, size_t n, size_t *ret_index);
        /*
         * One AdamW step as the numerics contract pins it: g' = g*grad_scale; p = p*decay;
         * m = beta1*m + one_minus_beta1*g'; v = beta2*v + (one_minus_beta2*g')*g';
         * p = p - (step_size*m) / (sqrt(v)/bc2_sqrt + eps). In place. weight (may be NULL): the new
         * p rounded to bf16 or, with dtype AE_DTYPE_F32, copied.
         */
        void (*adamw)(const struct ae_adamw *scalars, float *p, float *m, float *v, const float *g,
                      void *weight, uint32_t weight_dtype, size_t n);
        void (*sgd)(const struct ae_sgd *scalars, float *p, float *m, const float *g, void *weight,
                    uint32_t weight_dtype, size_t n);
};

/* The table in use; the first call chooses. Exits with a message when AUTOEP_CPU names no variant
 * that this processor has, for a forced variant must not be another one in silence. */
const struct ae_ops *ae_ops(void);
/* A variant by name, for tests and benches; NULL when this processor or build lacks it. */
const struct ae_ops *ae_ops_find(const char *name);

/* Hyper-parameters as the user gives them, for one optimizer group. */
struct ae_hyper {
        double lr;
        double beta1, beta2; /* SGD: beta1 is the momentum */
        double eps;
        double weight_decay;
};

/*
 * @step: this tensor's step count with this step in it, >= 1. Computed in double with nothing but
 * IEEE operations (no pow()), rounded once, so that all machines get the same scalars.
 */
void ae_adamw_scalars(const struct ae_hyper *hyper, uint64_t step, double grad_scale,
                      struct ae_adamw *ret_scalars);
void ae_sgd_scalars(const struct ae_hyper *hyper, double grad_scale, struct ae_sgd *ret_scalars);
/* min(1, max_norm / (norm + 1e-6)); 1 when max_norm is 0; NaN when norm is. */
double ae_clip_factor(double norm, double max_norm);
