/* What is done to weights once, while they are loaded. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ZOO_PLAIN)

#include <immintrin.h>
#include <omp.h>

#include "numbers.h"

enum { LANES = 16 };

/* The calling thread computes by itself from now on. */
void zoo_alone(void) { omp_set_num_threads(1); }

/* Words (outputs, words), whose rows are `next` apart, as (outputs / 16 rounded up, words, 16): with zeros for the outputs
 * that the last panel lacks. */
AVX512 void zoo_pack(long outputs, long words, const uint32_t *w, long next, uint32_t *panels, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long panel = 0; panel < (outputs + LANES - 1) / LANES; panel++) {
        const uint32_t *from = w + panel * LANES * next;
        long there = outputs - panel * LANES;
        uint32_t *to = panels + panel * LANES * words;
        for (long i = 0; i < words; i += 16) {
            long left = words - i < 16 ? words - i : 16;
            __mmask16 part = (__mmask16)((1u << left) - 1);
            __m512i r[16];
            for (int lane = 0; lane < LANES; lane++)
                r[lane] = lane < there ? _mm512_maskz_loadu_epi32(part, from + lane * next + i) : _mm512_setzero_si512();
            turn(r);
            for (long j = 0; j < left; j++) _mm512_storeu_si512(to + (i + j) * LANES, r[j]);
        }
    }
}

#else

/* Another processor or compiler: a thread's number stays, and nothing is packed. */
void zoo_alone(void) {}

#endif
