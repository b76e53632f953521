/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels for AVX2: the vector operations that ops-body.h asks for. A vector is two registers;
 * what is shorter goes through a small buffer, for AVX2 masks no halfwords.
 */
#include "kernels/ops-internal.h"

#include "proto/base/num.h"

#include <assert.h>
#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define TILE_PAIRS 2 /* half of the registers hold the fold */

struct vec {
        __m256 lo, hi;
};

/* 32 elements, in order or as even and odd ones. */
struct pair {
        struct vec even, odd;
};

/* Sums of squares in double, lanes 0..15. */
struct lanes {
        __m256d q0, q1, q2, q3;
};

/* Whether anything was not finite: all ones in an element. */
struct bad {
        __m256i bits;
};

INLINE struct vec vec_zero(void)
{
        return (struct vec){ _mm256_setzero_ps(), _mm256_setzero_ps() };
}

INLINE struct vec vec_all(float x)
{
        return (struct vec){ _mm256_set1_ps(x), _mm256_set1_ps(x) };
}

INLINE struct vec vec_load(const float *from)
{
        return (struct vec){ _mm256_loadu_ps(from), _mm256_loadu_ps(from + 8) };
}

INLINE struct vec vec_load_part(const float *from, size_t n)
{
        float whole[16] = { 0 };

        memcpy(whole, from, n * sizeof(*from));
        return vec_load(whole);
}

INLINE __m256 widen(const ae_bf16 *from)
{
        __m128i narrow = _mm_loadu_si128((const __m128i *)(const void *)from);

        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

INLINE struct vec vec_load_bf16(const ae_bf16 *from)
{
        return (struct vec){ widen(from), widen(from + 8) };
}

INLINE struct vec vec_load_bf16_part(const ae_bf16 *from, size_t n)
{
        ae_bf16 whole[16] = { 0 };

        memcpy(whole, from, n * sizeof(*from));
        return vec_load_bf16(whole);
}

INLINE __m256 widen_even(__m256i words)
{
        return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

INLINE __m256 widen_odd(__m256i words)
{
        return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
}

/* Even and odd elements: an element's upper half is its bf16, whichever half of a word it is in. */
INLINE struct pair pair_load_bf16(const ae_bf16 *from)
{
        __m256i lo = _mm256_loadu_si256((const __m256i *)(const void *)from);
        __m256i hi = _mm256_loadu_si256((const __m256i *)(const void *)(from + 16));

        return (struct pair){
                { widen_even(lo), widen_even(hi) },
                { widen_odd(lo), widen_odd(hi) },
        };
}

/* Shuffling works within 128 bits; the permutation puts its quarters in order. */
INLINE __m256 quarters(__m256 a)
{
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
}

/* From elements in order to even and odd ones. */
INLINE struct pair pair_split(struct pair a)
{
        struct vec x = a.even, y = a.odd;

        return (struct pair){
                { quarters(_mm256_shuffle_ps(x.lo, x.hi, 0x88)),
                  quarters(_mm256_shuffle_ps(y.lo, y.hi, 0x88)) },
                { quarters(_mm256_shuffle_ps(x.lo, x.hi, 0xdd)),
                  quarters(_mm256_shuffle_ps(y.lo, y.hi, 0xdd)) },
        };
}

INLINE struct vec interleave(__m256 even, __m256 odd)
{
        __m256 lo = _mm256_unpacklo_ps(even, odd), hi = _mm256_unpackhi_ps(even, odd);

        return (struct vec){ _mm256_permute2f128_ps(lo, hi, 0x20),
                             _mm256_permute2f128_ps(lo, hi, 0x31) };
}

/* And back. */
INLINE struct pair pair_join(struct pair a)
{
        return (struct pair){ interleave(a.even.lo, a.odd.lo), interleave(a.even.hi, a.odd.hi) };
}

INLINE void vec_store(float *to, struct vec a)
{
        _mm256_storeu_ps(to, a.lo);
        _mm256_storeu_ps(to + 8, a.hi);
}

INLINE void vec_store_part(float *to, struct vec a, size_t n)
{
        float whole[16];

        vec_store(whole, a);
        memcpy(to, whole, n * sizeof(*to));
}

/* @to is aligned to 64 bytes; stream_end() comes last. */
INLINE void vec_stream(float *to, struct vec a)
{
        _mm256_stream_ps(to, a.lo);
        _mm256_stream_ps(to + 8, a.hi);
}

/* Rounded to nearest even, the result in the upper halves; a NaN becomes quiet. */
INLINE __m256i round_upper(__m256 a)
{
        __m256i bits = _mm256_castps_si256(a);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));

        return _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan);
}

/* Packing works within 128 bits; the permutation puts its quarters in order. */
INLINE __m256i upper_halves(__m256i a, __m256i b)
{
        __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));

        return _mm256_permute4x64_epi64(packed, 0xd8);
}

INLINE __m256i round_vec(struct vec a)
{
        return upper_halves(round_upper(a.lo), round_upper(a.hi));
}

/* Two vectors in one full line. */
INLINE void vec_store_bf16(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm256_storeu_si256((__m256i *)(void *)to, round_vec(a));
        _mm256_storeu_si256((__m256i *)(void *)(to + 16), round_vec(b));
}

INLINE void vec_stream_bf16(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm256_stream_si256((__m256i *)(void *)to, round_vec(a));
        _mm256_stream_si256((__m256i *)(void *)(to + 16), round_vec(b));
}

INLINE void vec_store_bf16_part(ae_bf16 *to, struct vec a, size_t n)
{
        ae_bf16 whole[16];

        _mm256_storeu_si256((__m256i *)(void *)whole, round_vec(a));
        memcpy(to, whole, n * sizeof(*to));
}

INLINE __m256i halves_vec(struct vec a)
{
        return upper_halves(_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi));
}

/* The upper halves as they are, for the floors. */
INLINE void vec_store_halves(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm256_storeu_si256((__m256i *)(void *)to, halves_vec(a));
        _mm256_storeu_si256((__m256i *)(void *)(to + 16), halves_vec(b));
}

INLINE void vec_stream_halves(ae_bf16 *to, struct vec a, struct vec b)
{
        _mm256_stream_si256((__m256i *)(void *)to, halves_vec(a));
        _mm256_stream_si256((__m256i *)(void *)(to + 16), halves_vec(b));
}

INLINE struct vec vec_add(struct vec a, struct vec b)
{
        return (struct vec){ _mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi) };
}

INLINE struct vec vec_sub(struct vec a, struct vec b)
{
        return (struct vec){ _mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi) };
}

INLINE struct vec vec_mul(struct vec a, struct vec b)
{
        return (struct vec){ _mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi) };
}

INLINE struct vec vec_div(struct vec a, struct vec b)
{
        return (struct vec){ _mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi) };
}

INLINE struct vec vec_div_all(struct vec a, struct vec c, struct vec inverse)
{
        (void)inverse; /* of use with fused operations, which AVX2 alone doesn't have */
        return vec_div(a, c);
}

INLINE struct vec vec_sqrt(struct vec a)
{
        return (struct vec){ _mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi) };
}

INLINE struct vec vec_xor(struct vec a, struct vec b)
{
        return (struct vec){ _mm256_xor_ps(a.lo, b.lo), _mm256_xor_ps(a.hi, b.hi) };
}

INLINE __m256 canonical(__m256 a)
{
        __m256 one = _mm256_castsi256_ps(_mm256_set1_epi32((int)AE_OPS_NAN_BITS));

        return _mm256_blendv_ps(a, one, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

INLINE struct vec vec_canonical(struct vec a)
{
        return (struct vec){ canonical(a.lo), canonical(a.hi) };
}

INLINE struct bad bad_zero(void)
{
        return (struct bad){ _mm256_setzero_si256() };
}

INLINE __m256i nonfinite(__m256 a)
{
        __m256i exponent = _mm256_set1_epi32(0x7f800000);

        return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(a), exponent), exponent);
}

INLINE struct bad bad_add(struct bad bad, struct vec a)
{
        __m256i here = _mm256_or_si256(nonfinite(a.lo), nonfinite(a.hi));

        return (struct bad){ _mm256_or_si256(bad.bits, here) };
}

INLINE bool bad_any(struct bad bad)
{
        return !_mm256_testz_si256(bad.bits, bad.bits);
}

INLINE struct lanes lanes_zero(void)
{
        __m256d zero = _mm256_setzero_pd();

        return (struct lanes){ zero, zero, zero, zero };
}

INLINE __m256d square_add(__m256d sum, __m128 a)
{
        __m256d wide = _mm256_cvtps_pd(a);

        return _mm256_add_pd(sum, _mm256_mul_pd(wide, wide));
}

INLINE struct lanes lanes_add(struct lanes lanes, struct vec a)
{
        return (struct lanes){
                square_add(lanes.q0, _mm256_castps256_ps128(a.lo)),
                square_add(lanes.q1, _mm256_extractf128_ps(a.lo, 1)),
                square_add(lanes.q2, _mm256_castps256_ps128(a.hi)),
                square_add(lanes.q3, _mm256_extractf128_ps(a.hi, 1)),
        };
}

INLINE void lanes_store(double to[static AE_OPS_NORM_LANES], struct lanes lanes)
{
        _mm256_storeu_pd(to, lanes.q0);
        _mm256_storeu_pd(to + 4, lanes.q1);
        _mm256_storeu_pd(to + 8, lanes.q2);
        _mm256_storeu_pd(to + 12, lanes.q3);
}

#define OPS_NAME "avx2"
#define OPS_TABLE ae_ops_avx2
#define OPS_FLOOR_TABLE ae_ops_floor_avx2
#include "kernels/ops-body.h"
