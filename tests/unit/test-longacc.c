/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exact sums of squares against a slow number that has a byte for each bit: what is taken, added,
 * joined and rounded, with values at random, at the ends of fp32, many alike, and carries that run
 * through all limbs.
 */
#include "tests/lib/test.h"

#include "proto/base/longacc.h"
#include "proto/base/num.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* ---- the slow number --------------------------------------------------------------------- */

#define SLOW_LOW (-1080) /* below the least double */
#define SLOW_BITS 2200

/* The sum over i of bit[i] * 2^(i - 1080); each byte is 0 or 1. */
struct slow {
        uint8_t bit[SLOW_BITS];
};

static void slow_add(struct slow *slow, const struct slow *other)
{
        unsigned carry = 0;

        for (size_t i = 0; i < SLOW_BITS; i++) {
                carry += (unsigned)slow->bit[i] + other->bit[i];
                slow->bit[i] = carry & 1;
                carry >>= 1;
        }
        assert_int_equal(carry, 0);
}

static void slow_of(double x, struct slow *ret)
{
        int exponent;
        double m = frexp(x, &exponent);

        memset(ret, 0, sizeof(*ret));
        while (m != 0) { /* m is in [0, 1) and says what is below 2^exponent */
                m *= 2;
                exponent--;
                if (m >= 1) {
                        ret->bit[exponent - SLOW_LOW] = 1;
                        m -= 1;
                }
        }
}

static void slow_add_double(struct slow *slow, double x)
{
        struct slow other;

        slow_of(x, &other);
        slow_add(slow, &other);
}

/* To nearest even, by what the definition says of the bits behind the 53rd. */
static double slow_round(const struct slow *slow)
{
        int high = SLOW_BITS - 1, at;
        uint64_t m = 0;
        bool half, more = false;

        while (high >= 0 && !slow->bit[high])
                high--;
        if (high < 0)
                return 0;
        for (at = high; at > high - 53; at--)
                m = 2 * m + slow->bit[at];
        half = slow->bit[at];
        while (--at >= 0)
                more = more || slow->bit[at];
        if (half && (more || m % 2 == 1))
                m++;
        return ldexp((double)m, high - 52 + SLOW_LOW);
}

/* ---- comparing --------------------------------------------------------------------------- */

static void assert_holds(const struct ae_longacc *acc, const struct slow *slow)
{
        double got = ae_longacc_round(acc), want = slow_round(slow);

        for (size_t i = 0; i < SLOW_BITS; i++) {
                const int at = (int)i + SLOW_LOW - AE_LONGACC_LOW;
                const bool inside = at >= 0 && at < 64 * AE_LONGACC_LIMBS;
                const unsigned bit = inside ? acc->limb[at / 64] >> at % 64 & 1 : 0;

                if (bit != slow->bit[i])
                        fail_msg("bit 2^%d is %u, not %u", (int)i + SLOW_LOW, bit, slow->bit[i]);
        }
        if (memcmp(&got, &want, sizeof(got)) != 0)
                fail_msg("it rounds to %a, not to %a", got, want);
}

static uint64_t random_of(uint64_t *seed)
{
        *seed = *seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        return *seed >> 32 ^ *seed << 29;
}

/* Any finite fp32 value. */
static float random_float(uint64_t *seed)
{
        uint32_t word;
        float x;

        do {
                word = (uint32_t)random_of(seed);
                memcpy(&x, &word, sizeof(x));
        } while (!isfinite(x));
        return x;
}

static double square(float x)
{
        return (double)x * (double)x;
}

/* ---- tests ------------------------------------------------------------------------------- */

static void random_sums(void **state)
{
        (void)state;
        for (uint64_t seed = 1; seed <= 40; seed++) {
                struct ae_longacc acc = { { 0 } }, part = { { 0 } };
                struct slow slow = { { 0 } };
                uint64_t random = seed;

                for (int i = 0; i < 60; i++) {
                        const float a = random_float(&random), b = random_float(&random);
                        const double x = square(a) + square(b); /* rounded, as in a norm block */

                        assert_true(ae_longacc_takes(x));
                        ae_longacc_add(i % 2 ? &acc : &part, x);
                        slow_add_double(&slow, x);
                }
                ae_longacc_join(&acc, &part);
                assert_holds(&acc, &slow);
        }
}

/* The same values in two orders and groupings: not a bit differs. */
static void order_does_not_matter(void **state)
{
        struct ae_longacc forth = { { 0 } }, back = { { 0 } }, groups[7] = { { { 0 } } };
        double values[1000];
        uint64_t seed = 5;

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(values); i++) {
                values[i] = square(random_float(&seed));
                ae_longacc_add(&forth, values[i]);
                ae_longacc_add(&groups[random_of(&seed) % 7], values[i]);
        }
        for (size_t i = AE_ARRAY_LEN(values); i-- > 0;)
                ae_longacc_add(&back, values[i]);
        assert_memory_equal(&forth, &back, sizeof(forth));
        for (size_t i = 1; i < 7; i++)
                ae_longacc_join(&groups[0], &groups[i]);
        assert_memory_equal(&forth, &groups[0], sizeof(forth));
}

static void extremes(void **state)
{
        static const float least[] = { 0x1p-149f, 0x1p-148f, 0x1.8p-148f, FLT_MIN, FLT_MAX, 1, 0 };
        struct ae_longacc acc = { { 0 } };
        struct slow slow = { { 0 } };

        (void)state;
        assert_true(ae_longacc_round(&acc) == 0);
        for (size_t i = 0; i < AE_ARRAY_LEN(least); i++) {
                ae_longacc_add(&acc, square(least[i]));
                slow_add_double(&slow, square(least[i]));
                assert_holds(&acc, &slow);
        }
        acc = (struct ae_longacc){ { 0 } };
        ae_longacc_add(&acc, square(0x1p-149f));
        assert_int_equal(acc.limb[0], 1);
        assert_true(ae_longacc_round(&acc) == 0x1p-298);
}

/* 2^64 squares of the largest value, by doubling: the most that there can be. */
static void many_alike(void **state)
{
        struct ae_longacc acc = { { 0 } };
        struct slow slow = { { 0 } };

        (void)state;
        for (int i = 0; i < 1000; i++) {
                ae_longacc_add(&acc, square(0x1.234568p-100f));
                slow_add_double(&slow, square(0x1.234568p-100f));
        }
        assert_holds(&acc, &slow);
        acc = (struct ae_longacc){ { 0 } };
        memset(&slow, 0, sizeof(slow));
        ae_longacc_add(&acc, square(FLT_MAX));
        slow_add_double(&slow, square(FLT_MAX));
        for (int i = 0; i < 64; i++) {
                const struct ae_longacc same = acc;
                const struct slow same_slow = slow;

                ae_longacc_join(&acc, &same);
                slow_add(&slow, &same_slow);
        }
        assert_holds(&acc, &slow);
        assert_true(ae_longacc_below(&acc, 320));
        assert_false(ae_longacc_below(&acc, 319));
}

/* One more in the lowest place of a number that is all ones. */
static void carries_run_through(void **state)
{
        (void)state;
        for (int n_bits = 1; n_bits < 64 * AE_LONGACC_LIMBS; n_bits += n_bits < 130 ? 1 : 13) {
                struct ae_longacc acc = { { 0 } }, one = { { 1 } }, joined;
                struct slow slow = { { 0 } };

                for (int i = 0; i < n_bits; i++) {
                        acc.limb[i / 64] |= UINT64_C(1) << i % 64;
                        slow.bit[i + AE_LONGACC_LOW - SLOW_LOW] = 1;
                }
                assert_holds(&acc, &slow);
                joined = acc;
                ae_longacc_join(&joined, &one);
                ae_longacc_add(&acc, 0x1p-298);
                slow_add_double(&slow, 0x1p-298);
                assert_holds(&acc, &slow);
                assert_memory_equal(&acc, &joined, sizeof(acc));
                assert_true(ae_longacc_round(&acc) == ldexp(1, n_bits + AE_LONGACC_LOW));
        }
}

/* A double in every place, with all its bits. */
static void every_place(void **state)
{
        (void)state;
        for (int exponent = AE_LONGACC_LOW + 53; exponent <= 320; exponent++) {
                const double x = ldexp(0x1.fffffffffffffp-1, exponent);
                struct ae_longacc acc = { { 0 } };
                struct slow slow = { { 0 } };

                for (int i = 0; i < 3; i++) {
                        ae_longacc_add(&acc, x);
                        slow_add_double(&slow, x);
                        assert_holds(&acc, &slow);
                }
        }
}

/* A half is rounded to even, and the least bit below or above decides otherwise. */
static void halves(void **state)
{
        (void)state;
        for (int low = 1; low < 560; low += 7) {
                for (unsigned odd = 0; odd < 2; odd++) {
                        struct ae_longacc acc = { { 0 } };
                        const double base = ldexp(0x1p52 + odd, low + AE_LONGACC_LOW + 1);
                        const double up = ldexp(1, low + AE_LONGACC_LOW + 1);

                        ae_longacc_add(&acc, base);
                        ae_longacc_add(&acc, up / 2);
                        assert_true(ae_longacc_round(&acc) == (odd ? base + up : base));
                        ae_longacc_add(&acc, 0x1p-298);
                        assert_true(ae_longacc_round(&acc) == base + up);
                }
        }
}

static void what_is_taken(void **state)
{
        static const double taken[] = { 0, 0x1p-298, 0x1.8p-297, 0x1.fffffffffffffp319, 20,
                                        0x1.0000000000001p-246 };
        static const double refused[] = { -0x1p-298, -20, 0x1p320, 0x1p-299, 0x1.8p-298, 0x1p-1074,
                                          0x1.0000000000001p-247, INFINITY, -INFINITY, NAN };

        (void)state;
        for (size_t i = 0; i < AE_ARRAY_LEN(taken); i++) {
                if (!ae_longacc_takes(taken[i]))
                        fail_msg("%a is not taken", taken[i]);
        }
        for (size_t i = 0; i < AE_ARRAY_LEN(refused); i++) {
                if (ae_longacc_takes(refused[i]))
                        fail_msg("%a is taken", refused[i]);
        }
}

static void bounds(void **state)
{
        (void)state;
        for (int bit = 0; bit < 64 * AE_LONGACC_LIMBS; bit++) {
                struct ae_longacc acc = { { 0 } };

                acc.limb[bit / 64] = UINT64_C(1) << bit % 64;
                for (int end = 0; end <= 64 * AE_LONGACC_LIMBS; end++)
                        assert_int_equal(ae_longacc_below(&acc, end + AE_LONGACC_LOW), bit < end);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(random_sums),
                cmocka_unit_test(order_does_not_matter),
                cmocka_unit_test(extremes),
                cmocka_unit_test(many_alike),
                cmocka_unit_test(carries_run_through),
                cmocka_unit_test(every_place),
                cmocka_unit_test(halves),
                cmocka_unit_test(what_is_taken),
                cmocka_unit_test(bounds),
        };

        return cmocka_run_group_tests_name("longacc", tests, NULL, NULL);
}
