/* Products of few and of many rows with row-major bfloat16 matrices, for x86-64 with AVX-512.
 *
 * Loaded by ctypes and called with the addresses of tensors (zoo.components.native); every function has a formula in
 * PyTorch that it is tested against. One binary serves every machine: what a processor can do is asked at run time, and
 * zoo_level says it. Threads are those of the OpenMP library that PyTorch has loaded already.
 *
 * Sizes and distances count elements, not bytes. x: (rows, inputs), w: (outputs, inputs) without gaps, y: (rows,
 * outputs). Sums are kept in float32, and a row's sum is added up in an order that depends neither on the other rows
 * nor on the number of threads.
 */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>

typedef uint16_t bf16;

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define EACH _Pragma("GCC unroll 24") for

enum { NONE = 0, MULTIPLY_ADD = 1, DOT = 2 };

/* How products are computed here: not at all, by fused multiply-adds of widened numbers, or by dot products of pairs.
 * Intel's processors take two to four times as long for the latter, AMD's half as long. */
int zoo_level(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq")))
        return NONE;
    unsigned a, b, c, d;
    int dots = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    return dots && __builtin_cpu_is("amd") ? DOT : MULTIPLY_ADD;
}

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

/* Few rows: R rows of x by N rows of w at a time, as many streams from memory. Lane l of a sum takes the elements l (of
 * dot products: 2 l and 2 l + 1) of every piece of inputs, so that it is the same for every R and N. */

typedef void (*few)(long inputs, const bf16 *x, long x_next, const bf16 *w, const bf16 *bias, bf16 *y, long y_next);

#define EVEN(v) _mm512_castsi512_ps(_mm512_slli_epi32(v, 16))
#define ODD(v) _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)))

#define DOT_STEP(R, N, LOAD)                                                                                             \
    __m512bh u[N];                                                                                                       \
    EACH(int n = 0; n < N; n++) u[n] = (__m512bh)LOAD(w + n * inputs + i);                                               \
    EACH(int r = 0; r < R; r++) {                                                                                        \
        __m512bh v = (__m512bh)LOAD(x + r * x_next + i);                                                                 \
        EACH(int n = 0; n < N; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], u[n], v);                                    \
    }

#define MULTIPLY_ADD_STEP(R, N, LOAD)                                                                                    \
    __m512 even[N], odd[N];                                                                                              \
    EACH(int n = 0; n < N; n++) {                                                                                        \
        __m512i u = LOAD(w + n * inputs + i);                                                                            \
        even[n] = EVEN(u), odd[n] = ODD(u);                                                                              \
    }                                                                                                                    \
    EACH(int r = 0; r < R; r++) {                                                                                        \
        __m512i v = LOAD(x + r * x_next + i);                                                                            \
        __m512 v_even = EVEN(v), v_odd = ODD(v);                                                                         \
        EACH(int n = 0; n < N; n++) sum[r][n] = _mm512_fmadd_ps(odd[n], v_odd, _mm512_fmadd_ps(even[n], v_even, sum[r][n])); \
    }

#define WHOLE(address) _mm512_loadu_si512(address)
#define PART(address) _mm512_maskz_loadu_epi16(part, address)

#define FEW(TARGET, STEP, NAME, R, N)                                                                                    \
    TARGET static void NAME(long inputs, const bf16 *x, long x_next, const bf16 *w, const bf16 *bias, bf16 *y, long y_next) { \
        __m512 sum[R][N];                                                                                                \
        EACH(int r = 0; r < R; r++) EACH(int n = 0; n < N; n++) sum[r][n] = _mm512_setzero_ps();                         \
        long i = 0;                                                                                                      \
        for (; i + 32 <= inputs; i += 32) { STEP(R, N, WHOLE) }                                                          \
        if (i < inputs) {                                                                                                \
            __mmask32 part = (1u << (inputs - i)) - 1;                                                                   \
            STEP(R, N, PART)                                                                                             \
        }                                                                                                                \
        EACH(int r = 0; r < R; r++) EACH(int n = 0; n < N; n++) {                                                        \
            float total = _mm512_reduce_add_ps(sum[r][n]);                                                               \
            y[r * y_next + n] = rounded(bias ? total + widened(bias[n]) : total);                                        \
        }                                                                                                                \
    }

#define FEWS(TARGET, STEP, NAME)                                                                                         \
    FEW(TARGET, STEP, NAME##_1_8, 1, 8) FEW(TARGET, STEP, NAME##_1_1, 1, 1) FEW(TARGET, STEP, NAME##_2_8, 2, 8)          \
    FEW(TARGET, STEP, NAME##_2_1, 2, 1) FEW(TARGET, STEP, NAME##_3_8, 3, 8) FEW(TARGET, STEP, NAME##_3_1, 3, 1)          \
    FEW(TARGET, STEP, NAME##_4_6, 4, 6) FEW(TARGET, STEP, NAME##_4_1, 4, 1) FEW(TARGET, STEP, NAME##_5_4, 5, 4)          \
    FEW(TARGET, STEP, NAME##_5_1, 5, 1) FEW(TARGET, STEP, NAME##_6_4, 6, 4) FEW(TARGET, STEP, NAME##_6_1, 6, 1)          \
    FEW(TARGET, STEP, NAME##_7_3, 7, 3) FEW(TARGET, STEP, NAME##_7_1, 7, 1) FEW(TARGET, STEP, NAME##_8_3, 8, 3)          \
    FEW(TARGET, STEP, NAME##_8_1, 8, 1)                                                                                  \
    static const few NAME##_wide[] = {NULL,       NAME##_1_8, NAME##_2_8, NAME##_3_8, NAME##_4_6,                        \
                                      NAME##_5_4, NAME##_6_4, NAME##_7_3, NAME##_8_3};                                   \
    static const few NAME##_single[] = {NULL,       NAME##_1_1, NAME##_2_1, NAME##_3_1, NAME##_4_1,                      \
                                        NAME##_5_1, NAME##_6_1, NAME##_7_1, NAME##_8_1};

FEWS(AVX512_BF16, DOT_STEP, dot)
FEWS(AVX512, MULTIPLY_ADD_STEP, fma)

enum { MOST = 8, PIECE = 24 };
static const int WIDTH[MOST + 1] = {1, 8, 8, 8, 6, 4, 4, 3, 3};

static void few_rows(long rows, long inputs, long outputs, const bf16 *x, long x_next, const bf16 *w, const bf16 *bias,
                     bf16 *y, long y_next, int dots) {
    few wide = (dots ? dot_wide : fma_wide)[rows], single = (dots ? dot_single : fma_single)[rows];
    long n = 0;
    for (; n + WIDTH[rows] <= outputs; n += WIDTH[rows])
        wide(inputs, x, x_next, w + n * inputs, bias ? bias + n : NULL, y + n, y_next);
    for (; n < outputs; n++) single(inputs, x, x_next, w + n * inputs, bias ? bias + n : NULL, y + n, y_next);
}

/* y = x w^T + bias: rows in groups of at most eight, for which a piece of w is read from memory once. */
void zoo_product(int level, long rows, long inputs, long outputs, const bf16 *x, long x_next, const bf16 *w, const bf16 *bias, bf16 *y,
                 long y_next, int threads) {
    long groups = (rows + MOST - 1) / MOST, pieces = (outputs + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long piece = 0; piece < pieces; piece++) {
        long n = piece * PIECE, width = outputs - n < PIECE ? outputs - n : PIECE;
        for (long group = 0; group < groups; group++) {
            long r = rows * group / groups, count = rows * (group + 1) / groups - r;
            few_rows(count, inputs, width, x + r * x_next, x_next, w + n * inputs, bias ? bias + n : NULL,
                     y + r * y_next + n, y_next, level == DOT);
        }
    }
}

/* Reads all bytes, by eight streams for each thread, and returns something that depends on them. */
AVX512 static int read_piece(const char *p, long bytes) {
    long each = bytes / 8 / 64 * 64;
    __m512i all[8];
    EACH(int s = 0; s < 8; s++) all[s] = _mm512_setzero_si512();
    for (long i = 0; i < each; i += 64)
        EACH(int s = 0; s < 8; s++) all[s] = _mm512_xor_si512(all[s], _mm512_loadu_si512(p + s * each + i));
    EACH(int s = 1; s < 8; s++) all[0] = _mm512_xor_si512(all[0], all[s]);
    return _mm512_reduce_or_epi32(all[0]);
}

int zoo_read(const char *p, long bytes, int threads) {
    long size = 1 << 16, pieces = bytes / size;
    int all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : all)
    for (long piece = 0; piece < pieces; piece++) all |= read_piece(p + piece * size, size);
    return all;
}

#else

/* Another processor or compiler: nothing to offer. */
int zoo_level(void) { return 0; }

#endif
