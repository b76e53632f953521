/* SPDX-License-Identifier: Apache-2.0 */
/* Exact sums of squares; see longacc.h. Any thread; each accumulator has one owner. */
#include "proto/base/longacc.h"

#include <assert.h>
#include <stddef.h>
#include <string.h>

#define MANTISSA_BITS 52
#define MANTISSA ((UINT64_C(1) << MANTISSA_BITS) - 1)
#define EXPONENT_BIAS 1023

#define TAKES_END 320 /* 2^this is more than any sum of squares that a double can hold here */

static_assert(TAKES_END < AE_LONGACC_END, "what is taken fits");

/* @x is bits * 2^(low - 298), bits below 2^53. */
struct parts {
        uint64_t bits;
        int low;
};

static struct parts parts_of(double x)
{
        uint64_t word;
        int exponent;

        memcpy(&word, &x, sizeof(word));
        exponent = (int)(word >> MANTISSA_BITS); /* with the sign, which is 0 here */
        return (struct parts){
                .bits = exponent ? (word & MANTISSA) | (MANTISSA + 1) : word & MANTISSA,
                .low = (exponent ? exponent : 1) - EXPONENT_BIAS - MANTISSA_BITS - AE_LONGACC_LOW,
        };
}

bool ae_longacc_takes(double x)
{
        struct parts parts;

        if (!(x >= 0 && x < 0x1p320)) /* NaN too */
                return false;
        if (x == 0)
                return true;
        parts = parts_of(x);
        return parts.low >= 0 || (parts.low > -64 && parts.bits % (UINT64_C(1) << -parts.low) == 0);
}

void ae_longacc_add(struct ae_longacc *acc, double x)
{
        struct parts parts;
        uint64_t low, high;
        bool carry;
        size_t i;

        assert(ae_longacc_takes(x));
        if (x == 0)
                return;
        parts = parts_of(x);
        if (parts.low < 0) {
                parts.bits >>= -parts.low;
                parts.low = 0;
        }
        i = (size_t)parts.low / 64;
        low = parts.bits << parts.low % 64;
        high = parts.low % 64 ? parts.bits >> (64 - parts.low % 64) : 0;
        carry = __builtin_add_overflow(acc->limb[i], low, &acc->limb[i]);
        high += carry; /* at most 2^53 */
        for (i++; high != 0; i++) {
                assert(i < AE_LONGACC_LIMBS);
                high = __builtin_add_overflow(acc->limb[i], high, &acc->limb[i]);
        }
}

void ae_longacc_join(struct ae_longacc *acc, const struct ae_longacc *other)
{
        uint64_t carry = 0;

        for (size_t i = 0; i < AE_LONGACC_LIMBS; i++) {
                uint64_t sum;
                bool over = __builtin_add_overflow(acc->limb[i], other->limb[i], &sum);

                over |= __builtin_add_overflow(sum, carry, &acc->limb[i]);
                carry = over;
        }
        assert(carry == 0);
}

bool ae_longacc_below(const struct ae_longacc *acc, int exponent)
{
        size_t n_bits = (size_t)(exponent - AE_LONGACC_LOW);

        assert(exponent >= AE_LONGACC_LOW && exponent <= AE_LONGACC_END);
        for (size_t i = n_bits / 64; i < AE_LONGACC_LIMBS; i++) {
                if (acc->limb[i] >> (i == n_bits / 64 ? n_bits % 64 : 0) != 0)
                        return false;
        }
        return true;
}

double ae_longacc_round(const struct ae_longacc *acc)
{
        size_t i = AE_LONGACC_LIMBS - 1;
        uint64_t top, word;
        bool rest = false;
        int shift, exponent;
        double x;

        while (i > 0 && acc->limb[i] == 0)
                i--;
        if (acc->limb[i] == 0)
                return 0;
        /* The 64 highest bits in @top, the first of them set; @rest: whether a lower one is. */
        shift = __builtin_clzll(acc->limb[i]);
        exponent = 64 * (int)i + 63 - shift + AE_LONGACC_LOW;
        top = acc->limb[i] << shift;
        if (i > 0 && shift > 0)
                top |= acc->limb[i - 1] >> (64 - shift);
        if (i > 0)
                rest = acc->limb[i - 1] << shift != 0;
        for (size_t j = 0; j + 1 < i; j++)
                rest |= acc->limb[j] != 0;
        /* To 53 bits; a carry out of them goes on into the exponent, as it should. */
        word = ((uint64_t)(exponent + EXPONENT_BIAS) << MANTISSA_BITS) + (top >> 11 & MANTISSA);
        top &= (1 << 11) - 1;
        word += top > 1 << 10 || (top == 1 << 10 && (rest || word % 2 != 0));
        memcpy(&x, &word, sizeof(x));
        return x;
}
