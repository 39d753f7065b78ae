/* Products of a few rows with bfloat16 matrices as they come, and the small operations, for x86-64 with AVX-512.
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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ZOO_PLAIN)

#include <cpuid.h>
#include <immintrin.h>
#include <omp.h>

#include "numbers.h"
#include "products.h"

enum { NONE = 0, MULTIPLY_ADD = 1, DOT = 2, TILES = 3 };

int zoo_tiles(void); /* tiles.c */

/* How products are computed here: not at all, by fused multiply-adds of widened numbers, by dot products of pairs, or by
 * tiles. Intel's processors take two to four times as long for dot products as for multiply-adds, AMD's half as long. */
int zoo_level(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq")))
        return NONE;
    unsigned a, b, c, d;
    int dots = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    return dots && __builtin_cpu_is("amd") ? DOT : zoo_tiles() & 1 ? TILES : MULTIPLY_ADD;
}

enum { MOST = 8, ROWS = 64, OUTPUTS = 48, FEW_OUTPUTS = 24, FEW = 16, SERIAL = 1 << 17 };

/* Tiles of R rows of x by N rows of w. Lane l of a sum takes the inputs l (of dot products: 2 l and 2 l + 1) of every 32,
 * and lanes are added up in one order, so that a result is the same whatever R and N are. */

typedef void (*tile)(long inputs, const bf16 *x, long x_next, const bf16 *w, long w_next, __m512 *sums, int first, float *y);

#define EVEN(v) _mm512_castsi512_ps(_mm512_slli_epi32(v, 16))
#define ODD(v) _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)))
#define WHOLE(address) _mm512_loadu_si512(address)
#define PART(address) _mm512_maskz_loadu_epi16(part, address)

#define DOT_STEP(R, N, LOAD)                                                                                             \
    __m512bh u[N];                                                                                                       \
    UNROLLED(int n = 0; n < N; n++) u[n] = (__m512bh)LOAD(w + n * w_next + i);                                           \
    UNROLLED(int r = 0; r < R; r++) {                                                                                    \
        __m512bh v = (__m512bh)LOAD(x + r * x_next + i);                                                                 \
        UNROLLED(int n = 0; n < N; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], u[n], v);                                \
    }

#define MULTIPLY_ADD_STEP(R, N, LOAD)                                                                                    \
    __m512 even[N], odd[N];                                                                                              \
    UNROLLED(int n = 0; n < N; n++) {                                                                                    \
        __m512i u = LOAD(w + n * w_next + i);                                                                            \
        even[n] = EVEN(u), odd[n] = ODD(u);                                                                              \
    }                                                                                                                    \
    UNROLLED(int r = 0; r < R; r++) {                                                                                    \
        __m512i v = LOAD(x + r * x_next + i);                                                                            \
        __m512 v_even = EVEN(v), v_odd = ODD(v);                                                                         \
        UNROLLED(int n = 0; n < N; n++) sum[r][n] = _mm512_fmadd_ps(even[n], v_even, sum[r][n]);                         \
        UNROLLED(int n = 0; n < N; n++) sum[r][n] = _mm512_fmadd_ps(odd[n], v_odd, sum[r][n]);                           \
    }

/* Goes on with `sums` unless these inputs are the `first`, and leaves them there, or after the last inputs the totals in y. */
#define TILE(TARGET, STEP, NAME, R, N)                                                                                   \
    TARGET static void NAME##_##R##_##N(long inputs, const bf16 *x, long x_next, const bf16 *w, long w_next, __m512 *sums, \
                                        int first, float *y) {                                                           \
        __m512 sum[R][N];                                                                                                \
        UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) sum[r][n] = first ? _mm512_setzero_ps() : sums[r * N + n]; \
        long i = 0;                                                                                                      \
        for (; i + 32 <= inputs; i += 32) { STEP(R, N, WHOLE) }                                                          \
        if (i < inputs) {                                                                                                \
            __mmask32 part = (1u << (inputs - i)) - 1;                                                                   \
            STEP(R, N, PART)                                                                                             \
        }                                                                                                                \
        if (!y) {                                                                                                        \
            UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) sums[r * N + n] = sum[r][n];                 \
            return;                                                                                                      \
        }                                                                                                                \
        __m512 all[2][16];                                                                                               \
        float found[32];                                                                                                 \
        UNROLLED(int s = 0; s < 32; s++) all[s / 16][s % 16] = s < R * N ? sum[s / N % R][s % N] : _mm512_setzero_ps();  \
        UNROLLED(int s = 0; s < R * N; s += 16) _mm512_storeu_ps(found + s, lane_sums(all[s / 16]));                     \
        UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) y[r * OUTPUTS + n] = found[r * N + n];           \
    }

#define TILES(TARGET, STEP, NAME)                                                                                        \
    TILE(TARGET, STEP, NAME, 1, 8) TILE(TARGET, STEP, NAME, 2, 8) TILE(TARGET, STEP, NAME, 3, 8)                         \
    TILE(TARGET, STEP, NAME, 4, 6) TILE(TARGET, STEP, NAME, 5, 4) TILE(TARGET, STEP, NAME, 6, 4)                         \
    TILE(TARGET, STEP, NAME, 7, 3) TILE(TARGET, STEP, NAME, 8, 3)                                                        \
    TILE(TARGET, STEP, NAME, 1, 1) TILE(TARGET, STEP, NAME, 2, 1) TILE(TARGET, STEP, NAME, 3, 1)                         \
    TILE(TARGET, STEP, NAME, 4, 1) TILE(TARGET, STEP, NAME, 5, 1) TILE(TARGET, STEP, NAME, 6, 1)                         \
    TILE(TARGET, STEP, NAME, 7, 1) TILE(TARGET, STEP, NAME, 8, 1)                                                        \
    static const tile NAME##_tiles[2][MOST + 1] = {                                                                      \
        {NULL, NAME##_1_1, NAME##_2_1, NAME##_3_1, NAME##_4_1, NAME##_5_1, NAME##_6_1, NAME##_7_1, NAME##_8_1},          \
        {NULL, NAME##_1_8, NAME##_2_8, NAME##_3_8, NAME##_4_6, NAME##_5_4, NAME##_6_4, NAME##_7_3, NAME##_8_3}};

static const int WIDTH[MOST + 1] = {0, 8, 8, 8, 6, 4, 4, 3, 3};

TILES(AVX512_BF16, DOT_STEP, dot)
TILES(AVX512, MULTIPLY_ADD_STEP, fma)

/* A block of the product: `rows` of x with `outputs` rows of w, at most ROWS and OUTPUTS. Inputs are taken in chunks that
 * let the rows of x stay in the nearest cache while w is read past them. */
AVX512 static void block(const tile tiles[2][MOST + 1], long rows, long inputs, long outputs, const bf16 *x, long x_next,
                         const bf16 *w, const bf16 *bias, bf16 *y, long y_next) {
    static _Thread_local __m512 sums[ROWS * OUTPUTS];
    static _Thread_local float found[ROWS * OUTPUTS];
    long groups = (rows + MOST - 1) / MOST, chunk = 16384 / (rows < 16 ? rows : 16) / 32 * 32;
    for (long i = 0; i < inputs; i += chunk) {
        long here = inputs - i < chunk ? inputs - i : chunk;
        __m512 *next = sums;
        for (long g = 0; g < groups; g++) {
            long r = rows * g / groups, count = rows * (g + 1) / groups - r;
            for (long n = 0, wide; n < outputs; n += wide ? WIDTH[count] : 1) {
                wide = n + WIDTH[count] <= outputs;
                tiles[wide][count](here, x + r * x_next + i, x_next, w + n * inputs + i, inputs, next, i == 0,
                                   i + here == inputs ? found + r * OUTPUTS + n : NULL);
                next += count * (wide ? WIDTH[count] : 1);
            }
        }
    }
    for (long r = 0; r < rows; r++)
        for (long n = 0; n < outputs; n++)
            y[r * y_next + n] = rounded(bias ? found[r * OUTPUTS + n] + widened(bias[n]) : found[r * OUTPUTS + n]);
}

/* y = x w^T + bias. Rows of w are read from memory once. */
void zoo_product(int level, long rows, long inputs, long outputs, const bf16 *x, long x_next, const bf16 *w, const bf16 *bias,
                 bf16 *y, long y_next, int threads) {
    long some = rows <= FEW ? FEW_OUTPUTS : OUTPUTS, lower = (rows + ROWS - 1) / ROWS, across = (outputs + some - 1) / some;
    long worth = rows * inputs * outputs / SERIAL + 1;
#pragma omp parallel for schedule(static) num_threads(threads < worth ? threads : worth)
    for (long piece = 0; piece < lower * across; piece++) {
        long n = piece / lower * some, r = piece % lower * rows / lower, last = (piece % lower + 1) * rows / lower;
        block(level == DOT ? dot_tiles : fma_tiles, last - r, inputs, outputs - n < some ? outputs - n : some, x + r * x_next,
              x_next, w + n * inputs, bias ? bias + n : NULL, y + r * y_next + n, y_next);
    }
}

/* Small operations. Each rounds to bfloat16 where the formula beside its component does. */

static inline int threads_for(long work, int threads) {
    long worth = work / SERIAL + 1;
    return threads < worth ? threads : (int)worth;
}

/* x / sqrt(mean(x^2) + eps), rounded, times the weight; or, not rounded, times one more than the weight. */
AVX512 INLINE void rms_row(int plus_one, long width, const bf16 *x, const bf16 *weight, double eps, bf16 *y) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        __m512 v = load16(x + i, part_of(width - i));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 scale = _mm512_set1_ps(1 / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + (float)eps));
    for (long i = 0; i < width; i += 16) {
        __mmask16 part = part_of(width - i);
        __m512 v = _mm512_mul_ps(load16(x + i, part), scale), w = load16(weight + i, part);
        if (plus_one) {
            store16(y + i, part, _mm512_mul_ps(v, _mm512_add_ps(w, _mm512_set1_ps(1))));
        } else {
            v = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(round16(v)), _mm512_set1_epi32(0xffff0000)));
            store16(y + i, part, _mm512_mul_ps(v, w));
        }
    }
}

AVX512 void zoo_rms_plus_one(long rows, long width, const bf16 *x, long x_next, const bf16 *weight, double eps, bf16 *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (long r = 0; r < rows; r++) rms_row(1, width, x + r * x_next, weight, eps, y + r * width);
}

AVX512 void zoo_rms(long rows, long width, const bf16 *x, long x_next, const bf16 *weight, double eps, bf16 *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (long r = 0; r < rows; r++) rms_row(0, width, x + r * x_next, weight, eps, y + r * width);
}

/* x + y, rounded, and that as zoo_rms makes it; weight NULL: only the former. */
AVX512 void zoo_add(long rows, long width, const bf16 *x, long x_next, const bf16 *y, long y_next, const bf16 *weight, double eps,
                    bf16 *sum, bf16 *normed, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (long r = 0; r < rows; r++) {
        for (long i = 0; i < width; i += 16) {
            __mmask16 part = part_of(width - i);
            store16(sum + r * width + i, part, _mm512_add_ps(load16(x + r * x_next + i, part), load16(y + r * y_next + i, part)));
        }
        if (weight) rms_row(0, width, sum + r * width, weight, eps, normed + r * width);
    }
}

/* silu(first half), rounded, times the second half of each row of x. */
AVX512 void zoo_gate(long rows, long width, const bf16 *x, long x_next, bf16 *y, int threads) {
    long pieces = (width + 511) / 512;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width * 4, threads))
    for (long piece = 0; piece < rows * pieces; piece++) {
        long r = piece / pieces, first = piece % pieces * 512, end = first + 512 < width ? first + 512 : width;
        for (long i = first; i < end; i += 16) {
            __mmask16 part = part_of(end - i);
            __m512 g = load16(x + r * x_next + i, part), one = _mm512_set1_ps(1);
            __m512 v = round16(_mm512_div_ps(g, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), g)))));
            v = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0xffff0000)));
            store16(y + r * width + i, part, _mm512_mul_ps(v, load16(x + r * x_next + width + i, part)));
        }
    }
}

/* (a, b) -> (a cos - b sin, b cos + a sin) for the halves a and b of the first `lanes` of each head; sin is negative in the
 * first half. x: (rows, heads, width) at any distances, y without gaps, cos and sin: (rows, lanes). */
AVX512 void zoo_rotate(long rows, long heads, long width, long lanes, const bf16 *x, long row_next, long head_next,
                       const float *cos, const float *sin, bf16 *y, int threads) {
    long half = lanes / 2;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * heads * width, threads))
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const bf16 *from = x + r * row_next + h * head_next;
            bf16 *to = y + (r * heads + h) * width;
            const float *c = cos + r * lanes, *s = sin + r * lanes;
            for (long i = 0; i < half; i += 16) {
                __mmask16 part = part_of(half - i);
                __m512 a = load16(from + i, part), b = load16(from + half + i, part);
                __m512 first = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(part, c + i));
                __m512 second = _mm512_mul_ps(b, _mm512_maskz_loadu_ps(part, c + half + i));
                store16(to + i, part, _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(part, s + i), first));
                store16(to + half + i, part, _mm512_fmadd_ps(a, _mm512_maskz_loadu_ps(part, s + half + i), second));
            }
            if (lanes < width) memcpy(to + lanes, from + lanes, (width - lanes) * sizeof(bf16));
        }
}

/* Reads all bytes but a few, by eight streams for each thread that are fetched ahead, and returns something that depends on
 * them. */
AVX512 static int read_piece(const char *p, long bytes) {
    enum { STREAMS = 8, AHEAD = 3072 };
    long each = bytes / STREAMS / 64 * 64;
    __m512i all[STREAMS];
    UNROLLED(int s = 0; s < STREAMS; s++) all[s] = _mm512_setzero_si512();
    for (long i = 0; i < each; i += 64)
        UNROLLED(int s = 0; s < STREAMS; s++) {
            _mm_prefetch(p + s * each + i + AHEAD, _MM_HINT_T1);
            all[s] = _mm512_xor_si512(all[s], _mm512_loadu_si512(p + s * each + i));
        }
    UNROLLED(int s = 1; s < STREAMS; s++) all[0] = _mm512_xor_si512(all[0], all[s]);
    return _mm512_reduce_or_epi32(all[0]);
}

int zoo_read(const char *p, long bytes, int threads) {
    long each = bytes / threads;
    int all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : all)
    for (long t = 0; t < threads; t++) all |= read_piece(p + t * each, each);
    return all;
}

#else

/* Another processor or compiler, or asked for by a test: nothing to offer. */
int zoo_level(void) { return 0; }

#endif
