/* Numbers of sixteen bits, and what the kernels' sources write alike. */

#ifndef ZOO_NUMBERS_H
#define ZOO_NUMBERS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 32") for

static inline float widened(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* Rounded to the nearest, ties to even; what is not a number stays so. */
static inline bf16 rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits & 0x7fffffff) > 0x7f800000 ? (bf16)(bits >> 16 | 0x40) : (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* e^x, to the last two bits; 0 far below, infinite far above. What is not a number stays so. */
AVX512 INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(89), _mm512_max_ps(_mm512_set1_ps(-104), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(p, n);
}

/* The sums of the lanes of sixteen vectors, in their order: of lanes that lie two apart, then neighbours, then quarters. */
AVX512 INLINE __m512 lane_sums(const __m512 *s) {
    __m512 pair[8], four[4], eight[2];
    UNROLLED(int i = 0; i < 8; i++)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
    UNROLLED(int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    UNROLLED(int i = 0; i < 2; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44),
                                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

AVX512 static inline __m512 load16(const bf16 *p, __mmask16 part) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p)), 16));
}

AVX512 static inline __m512 round16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 numbers = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi32(numbers, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)), near));
}

AVX512 static inline void store16(bf16 *p, __mmask16 part, __m512 value) {
    __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round16(value)), 16));
    if (part == 0xffff)
        _mm256_storeu_si256((__m256i *)p, high);
    else
        _mm256_mask_storeu_epi16(p, part, high);
}

/* Sixteen rows of sixteen words become sixteen columns. */
AVX512 INLINE void turn(__m512i *x) {
    __m512i a[16], b[16];
    UNROLLED(int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLLED(int i = 0; i < 16; i += 4)
        UNROLLED(int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    UNROLLED(int i = 0; i < 4; i++) {
        __m512i even = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), odd = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88), odd2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        x[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        x[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        x[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

static inline unsigned part_of(long left) { return left < 16 ? (1u << left) - 1 : 0xffff; }

#endif
