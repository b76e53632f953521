/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels for AVX-512 (F, BW, VL, DQ): the vector operations that ops-body.h asks for. A vector
 * is one register; what is shorter is masked. VCVTNEPS2BF16 is not used, for it flushes subnormals.
 */
#include "kernels/ops-internal.h"

#include "proto/base/num.h"

#include <assert.h>
#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define TILE_PAIRS 4 /* a quarter of the registers holds the fold */

struct vec {
        __m512 x;
};

/* 32 elements, in order or as even and odd ones. */
struct pair {
        struct vec even, odd;
};

/* Sums of squares in double, lanes 0..15. */
struct lanes {
        __m512d lo, hi;
};

/* Whether anything was not finite: one bit an element. */
struct bad {
        __mmask16 bits;
};

INLINE __mmask16 part_mask(size_t n)
{
        return (__mmask16)((1u << n) - 1);
}

INLINE struct vec vec_zero(void)
{
        return (struct vec){ _mm512_setzero_ps() };
}

INLINE struct vec vec_all(float x)
{
        return (struct vec){ _mm512_set1_ps(x) };
}

INLINE struct vec vec_load(const float *from)
{
        return (struct vec){ _mm512_loadu_ps(from) };
}

INLINE struct vec vec_load_part(const float *from, size_t n)
{
        return (struct vec){ _mm512_maskz_loadu_ps(part_mask(n), from) };
}

INLINE struct vec widen(__m256i narrow)
{
        __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);

        return (struct vec){ _mm512_castsi512_ps(wide) };
}

INLINE struct vec vec_load_bf16(const ae_bf16 *from)
{
        return widen(_mm256_loadu_si256((const __m256i *)(const void *)from));
}

INLINE struct vec vec_load_bf16_part(const ae_bf16 *from, size_t n)
{
        return widen(_mm256_maskz_loadu_epi16(part_mask(n), from));
}

/* Even and odd elements: an element's upper half is its bf16, whichever half of a word it is in. */
INLINE struct pair pair_load_bf16(const ae_bf16 *from)
{
        __m512i words = _mm512_loadu_si512(from);
        __m512i odd = _mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000));

        return (struct pair){
                { _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)) },
                { _mm512_castsi512_ps(odd) },
        };
}

/* From elements in order to even and odd ones. */
INLINE struct pair pair_split(struct pair a)
{
        __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));

        return (struct pair){
                { _mm512_permutex2var_ps(a.even.x, even, a.odd.x) },
                { _mm512_permutex2var_ps(a.even.x, odd, a.odd.x) },
        };
}

/* And back. */
INLINE struct pair pair_join(struct pair a)
{
        __m512i lo = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        __m512i hi = _mm512_or_si512(lo, _mm512_set1_epi32(8));

        return (struct pair){
                { _mm512_permutex2var_ps(a.even.x, lo, a.odd.x) },
                { _mm512_permutex2var_ps(a.even.x, hi, a.odd.x) },
        };
}

INLINE void vec_store(float *to, struct vec a)
{
        _mm512_storeu_ps(to, a.x);
}

INLINE void vec_store_part(float *to, struct vec a, size_t n)
{
        _mm512_mask_storeu_ps(to, part_mask(n), a.x);
}

/* @to is aligned to 64 bytes; stream_end() comes last. */
INLINE void vec_stream(float *to, struct vec a)
{
        _mm512_stream_ps(to, a.x);
}

/* Rounded to nearest even, the result in the upper halves; a NaN becomes quiet. */
INLINE __m512i round_upper(struct vec a)
{
        __m512i bits = _mm512_castps_si512(a.x);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);

        return _mm512_mask_or_epi32(_mm512_add_epi32(bits, half), nan, bits,
                                    _mm512_set1_epi32(0x00400000));
}

INLINE __m512i upper_halves(__m512i a, __m512i b)
{
        __m512i pick = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35,
                                        33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3,
                                        1);

        return _mm512_permutex2var_epi16(a, pick, b);
}

/* Two vectors in one full line. */
INLINE void vec_store_bf16(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm512_storeu_si512(to, upper_halves(round_upper(a), round_upper(b)));
}

INLINE void vec_stream_bf16(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm512_stream_si512((__m512i *)(void *)to, upper_halves(round_upper(a), round_upper(b)));
}

INLINE void vec_store_bf16_part(ae_bf16 *to, struct vec a, size_t n)
{
        __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_upper(a), 16));

        _mm256_mask_storeu_epi16(to, part_mask(n), narrow);
}

/* The upper halves as they are, for the floors. */
INLINE void vec_store_halves(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm512_storeu_si512(to, upper_halves(_mm512_castps_si512(a.x), _mm512_castps_si512(b.x)));
}

INLINE void vec_stream_halves(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm512_stream_si512((__m512i *)(void *)to, upper_halves(_mm512_castps_si512(a.x),
                                                                _mm512_castps_si512(b.x)));
}

INLINE struct vec vec_add(struct vec a, struct vec b)
{
        return (struct vec){ _mm512_add_ps(a.x, b.x) };
}

INLINE struct vec vec_sub(struct vec a, struct vec b)
{
        return (struct vec){ _mm512_sub_ps(a.x, b.x) };
}

INLINE struct vec vec_mul(struct vec a, struct vec b)
{
        return (struct vec){ _mm512_mul_ps(a.x, b.x) };
}

INLINE struct vec vec_div(struct vec a, struct vec b)
{
        return (struct vec){ _mm512_div_ps(a.x, b.x) };
}

/*
 * The very bits of a / c without the divider, which AdamW's other division and its root keep busy;
 * @inverse is 1 / c, rounded to nearest. A first quotient is corrected to within one unit in its
 * last place; then the remainder is exact and the second correction rounds as a division does
 * (Markstein, "Computation of elementary functions on the IBM RISC System/6000", 1990). Within
 * DIVISOR_MIN and 1 nothing over- or underflows for an @a that is a root; an infinite one
 * or a NaN has no remainder and is the quotient.
 */
INLINE struct vec vec_div_all(struct vec a, struct vec c, struct vec inverse)
{
        __m512 first = _mm512_mul_ps(a.x, inverse.x);
        __m512 left = _mm512_fnmadd_ps(first, c.x, a.x);
        __mmask16 finite = _mm512_cmp_ps_mask(left, left, _CMP_ORD_Q);
        __m512 near = _mm512_fmadd_ps(left, inverse.x, first);
        __m512 rest = _mm512_fnmadd_ps(near, c.x, a.x);

        return (struct vec){ _mm512_mask_mov_ps(first, finite,
                                                _mm512_fmadd_ps(rest, inverse.x, near)) };
}

INLINE struct vec vec_sqrt(struct vec a)
{
        return (struct vec){ _mm512_sqrt_ps(a.x) };
}

INLINE struct vec vec_xor(struct vec a, struct vec b)
{
        return (struct vec){ _mm512_xor_ps(a.x, b.x) };
}

INLINE struct vec vec_canonical(struct vec a)
{
        __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
        __m512 one = _mm512_castsi512_ps(_mm512_set1_epi32((int)AE_OPS_NAN_BITS));

        return (struct vec){ _mm512_mask_mov_ps(a.x, nan, one) };
}

INLINE struct bad bad_zero(void)
{
        return (struct bad){ 0 };
}

/* 0x99: quiet NaN, positive and negative infinity, signalling NaN. */
INLINE struct bad bad_add(struct bad bad, struct vec a)
{
        __mmask16 here = _mm512_fpclass_ps_mask(a.x, 0x99);

        return (struct bad){ _kor_mask16(bad.bits, here) };
}

INLINE bool bad_any(struct bad bad)
{
        return bad.bits != 0;
}

INLINE struct lanes lanes_zero(void)
{
        return (struct lanes){ _mm512_setzero_pd(), _mm512_setzero_pd() };
}

/* A product of two floats is exact in double, so that a fused add rounds as a separate one. */
INLINE struct lanes lanes_add(struct lanes lanes, struct vec a)
{
        __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a.x));
        __m512d hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.x, 1));

        return (struct lanes){ _mm512_fmadd_pd(lo, lo, lanes.lo),
                               _mm512_fmadd_pd(hi, hi, lanes.hi) };
}

INLINE void lanes_store(double to[static AE_OPS_NORM_LANES], struct lanes lanes)
{
        _mm512_storeu_pd(to, lanes.lo);
        _mm512_storeu_pd(to + 8, lanes.hi);
}

#define OPS_NAME "avx512"
#define OPS_TABLE ae_ops_avx512
#define OPS_FLOOR_TABLE ae_ops_floor_avx512
#include "kernels/ops-body.h"
