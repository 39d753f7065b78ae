/* Numbers of sixteen bits, and what the kernels' sources write alike. */

#ifndef ZOO_NUMBERS_H
#define ZOO_NUMBERS_H

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

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

#endif
