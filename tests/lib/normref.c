/* SPDX-License-Identifier: Apache-2.0 */
/* The norm of the references; see normref.h. */
#include "tests/lib/normref.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/* Each step splits a sum of two into its rounded value and the exact rest. */
void normref_add(struct normref *ref, double x)
{
        uint32_t n = 0;

        for (uint32_t i = 0; i < ref->n_parts; i++) {
                const double y = ref->parts[i];
                const double large = fabs(x) < fabs(y) ? y : x, small = fabs(x) < fabs(y) ? x : y;
                const double rest = small - ((large + small) - large);

                if (rest != 0)
                        ref->parts[n++] = rest;
                x = large + small;
        }
        assert(n < NORMREF_PARTS);
        ref->parts[n++] = x;
        ref->n_parts = n;
}

static void end_block(struct normref *ref)
{
        double sum = ref->lanes[0];

        for (uint32_t lane = 1; lane < 16; lane++)
                sum += ref->lanes[lane];
        normref_add(ref, sum);
        memset(ref->lanes, 0, sizeof(ref->lanes));
}

void normref_element(struct normref *ref, uint64_t at, float x)
{
        if (at / 4096 != ref->block)
                end_block(ref);
        ref->block = at / 4096;
        ref->lanes[at % 16] += (double)x * (double)x;
}

void normref_end(struct normref *ref)
{
        end_block(ref);
        ref->block = 0;
}

double normref_sum(const struct normref *ref)
{
        uint32_t n = ref->n_parts;
        double sum, rest = 0;

        if (n == 0)
                return 0;
        sum = ref->parts[--n];
        while (n > 0 && rest == 0) {
                const double before = sum, part = ref->parts[--n];

                sum = before + part;
                rest = part - (sum - before);
        }
        /* Half way between two doubles: the parts below say which of them is nearer. */
        if (n > 0 && ((rest < 0 && ref->parts[n - 1] < 0) || (rest > 0 && ref->parts[n - 1] > 0))) {
                const double other = sum + 2 * rest;

                if (other - sum == 2 * rest)
                        sum = other;
        }
        return sum;
}
