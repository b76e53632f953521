/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Row arithmetic of dispatch.c for one number type: included there once per type, with REAL the
 * type and NAME(x) giving the function names. (No #pragma once: it is meant to be included twice.)
 */

/*
 * to = weight[0] * rows[slots[0]] + weight[1] * rows[slots[1]] + ..., in that order; without
 * @weight the rows themselves. @n is at least 1.
 */
static void NAME(fold)(REAL *to, const REAL *rows, const uint32_t *slots, const REAL *weight,
                       const struct row_shape *shape)
{
        const size_t width = shape->width;

        for (uint32_t k = 0; k < shape->top_k; k++) {
                const REAL *row = rows + slots[k] * width;

                if (k == 0) {
                        for (size_t h = 0; h < width; h++)
                                to[h] = weight ? weight[k] * row[h] : row[h];
                        continue;
                }
                for (size_t h = 0; h < width; h++)
                        to[h] += weight ? weight[k] * row[h] : row[h];
        }
}

/* The same for @n tokens. */
static void NAME(fold_all)(void *to, const void *rows, const uint32_t *slots, const void *weight,
                           const struct row_shape *shape)
{
        for (size_t t = 0; t < shape->n_tokens; t++) {
                const size_t pair = t * shape->top_k;

                NAME(fold)((REAL *)to + t * shape->width, rows, slots + pair,
                           weight ? (const REAL *)weight + pair : NULL, shape);
        }
}

static double NAME(dot)(const REAL *a, const REAL *b, size_t width)
{
        double sum = 0;

        for (size_t h = 0; h < width; h++)
                sum += (double)a[h] * (double)b[h];
        return sum;
}

/* rows[slots[i]] = weight[i] * dout[t] and dweight[i] = <dout[t], kept[slots[i]]> for all pairs. */
static void NAME(spread)(void *rows, const struct ae_combine_grads *grads, const uint32_t *slots,
                         const struct row_shape *shape)
{
        const size_t width = shape->width;

        for (size_t i = 0; i < shape->n_tokens * shape->top_k; i++) {
                const REAL *dout = (const REAL *)grads->dout + i / shape->top_k * width;
                const REAL *kept = (const REAL *)grads->kept + slots[i] * width;
                const REAL weight = ((const REAL *)grads->weight)[i];
                REAL *row = (REAL *)rows + slots[i] * width;

                for (size_t h = 0; h < width; h++)
                        row[h] = weight * dout[h];
                ((REAL *)grads->dweight)[i] = (REAL)NAME(dot)(dout, kept, width);
        }
}
