/* What is done to weights once, while they are loaded. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ZOO_PLAIN)

#include <immintrin.h>
#include <omp.h>

#include "numbers.h"

enum { LANES = 16 };

/* The calling thread computes by itself from now on. */
void zoo_alone(void) { omp_set_num_threads(1); }

/* Sixteen rows of sixteen words become sixteen columns. */
AVX512 static inline void turn(__m512i r[16]) {
    __m512i s[16];
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
        }
    /* r[4 b + k] has, in its quarter q, of the rows 4 b to 4 b + 3 the word 4 q + k. */
    for (int k = 0; k < 4; k++) {
        __m512i a = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x44), b = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x44);
        __m512i c = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xee), d = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xee);
        s[k] = _mm512_shuffle_i32x4(a, b, 0x88), s[4 + k] = _mm512_shuffle_i32x4(a, b, 0xdd);
        s[8 + k] = _mm512_shuffle_i32x4(c, d, 0x88), s[12 + k] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = s[i];
}

/* Words (outputs, words), whose rows are `next` apart, as (outputs / 16, words, 16). */
AVX512 void zoo_pack(long outputs, long words, const uint32_t *w, long next, uint32_t *panels, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long panel = 0; panel < outputs / LANES; panel++) {
        const uint32_t *from = w + panel * LANES * next;
        uint32_t *to = panels + panel * LANES * words;
        for (long i = 0; i < words; i += 16) {
            long left = words - i < 16 ? words - i : 16;
            __mmask16 part = (__mmask16)((1u << left) - 1);
            __m512i r[16];
            for (int lane = 0; lane < LANES; lane++) r[lane] = _mm512_maskz_loadu_epi32(part, from + lane * next + i);
            turn(r);
            for (long j = 0; j < left; j++) _mm512_storeu_si512(to + (i + j) * LANES, r[j]);
        }
    }
}

#else

/* Another processor or compiler: a thread's number stays, and nothing is packed. */
void zoo_alone(void) {}

#endif
