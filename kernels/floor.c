/* SPDX-License-Identifier: Apache-2.0 */
/* The floors in plain C, which stay simple enough for compilers to vectorise, and the dispatch. */
#include "kernels/floor.h"

#include "kernels/ops-internal.h"
#include "proto/base/num.h"

#include <assert.h>
#include <string.h>

#define TILE ((size_t)64)

static void mix_input(const struct ae_ops_input *input, size_t at, size_t n, uint32_t *x)
{
        uint32_t y[TILE];
        ae_bf16 narrow[TILE];

        if (input->dtype == AE_DTYPE_BF16) {
                memcpy(narrow, (const ae_bf16 *)input->data + at, n * sizeof(narrow[0]));
                for (size_t i = 0; i < n; i++)
                        y[i] = (uint32_t)narrow[i] << 16;
        } else {
                memcpy(y, (const float *)input->data + at, n * sizeof(y[0]));
        }
        for (size_t i = 0; i < n; i++)
                x[i] ^= y[i];
}

static void c_floor_sum(const struct ae_ops_sum *sum)
{
        for (size_t at = 0; at < sum->n; at += TILE) {
                size_t n = AE_MIN(sum->n - at, TILE);
                uint32_t x[TILE] = { 0 };

                if (sum->keep)
                        memcpy(x, sum->acc + at, n * sizeof(x[0]));
                for (size_t k = 0; k < sum->n_inputs; k++)
                        mix_input(&sum->inputs[k], at, n, x);
                memcpy(sum->acc + at, x, n * sizeof(x[0]));
        }
}

/* to ^= with; returns nothing that a compiler could drop. */
static void mix_state(float *restrict to, const uint32_t with[static TILE], size_t n)
{
        uint32_t x[TILE];

        memcpy(x, to, n * sizeof(x[0]));
        for (size_t i = 0; i < n; i++)
                x[i] ^= with[i];
        memcpy(to, x, n * sizeof(x[0]));
}

static void c_floor_adamw(float *p, float *m, float *v, const float *g, ae_bf16 *weight, size_t n)
{
        for (size_t at = 0; at < n; at += TILE) {
                size_t count = AE_MIN(n - at, TILE);
                uint32_t x[TILE] = { 0 };

                memcpy(x, g + at, count * sizeof(x[0]));
                mix_state(p + at, x, count);
                mix_state(m + at, x, count);
                mix_state(v + at, x, count);
                for (size_t i = 0; weight != NULL && i < count; i++)
                        weight[at + i] = (ae_bf16)(x[i] >> 16);
        }
}

const struct ae_ops_floor ae_ops_floor_c = {
        .sum = c_floor_sum,
        .adamw = c_floor_adamw,
};

void ae_floor_sum(const struct ae_ops_sum *sum)
{
        assert(sum->n_inputs <= AE_OPS_SUM_MAX);
        ae_ops_variant()->floor->sum(sum);
}

void ae_floor_adamw(float *p, float *m, float *v, const float *g, ae_bf16 *weight, size_t n)
{
        ae_ops_variant()->floor->adamw(p, m, v, g, weight, n);
}
