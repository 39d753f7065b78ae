/* Products of few and of many rows with bfloat16 matrices, for x86-64 with AVX-512.
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

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

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

/* Panels: w stored as (outputs / 16, inputs / 2, 16, 2), so that a line of memory has two inputs of sixteen outputs. Tiles of
 * R rows of x by N panels; every output has a lane of its own, which adds up its inputs in their order whatever R and N are. */

/* Where results go: of `outputs` from y and bias on; rows are `next` apart. */
typedef struct {
    bf16 *y;
    const bf16 *bias;
    long next, outputs;
} results;

/* Goes on with `sums` unless these inputs are the `first`, and leaves them there, or after the last inputs as results. */
typedef void (*panel_tile)(long pairs, const bf16 *x, long x_next, const bf16 *w, long w_next, float *sums, long next, int first,
                           const results *last, const bf16 *ahead, long every);

/* A tile's rows lie x_next apart, or their pairs side by side. */
#define APART(R, r) (x + r * x_next + i * 2)
#define BESIDE(R, r) (x + (i * R + r) * 2)

/* After `every` pairs a line of each of N panels is fetched from `ahead` on: what the core will need next. */
#define FETCH(N) UNROLLED(int n = 0; n < N; n++) _mm_prefetch((const char *)(ahead + n * w_next + i / every * 32), _MM_HINT_T1);
#define LEAVE(N)

AVX512_BF16 INLINE void put(const results *to, long r, long n, __m512 sum) {
    __mmask16 part = part_of(to->outputs - n);
    if (to->bias) sum = _mm512_add_ps(sum, load16(to->bias + n, part));
    _mm256_mask_storeu_epi16(to->y + r * to->next + n, part, (__m256i)_mm512_cvtneps_pbh(sum));
}

#define PANEL_TILE(NAME, PLACE, FETCH, R, N)                                                                             \
    AVX512_BF16 static void NAME##_##R##_##N(long pairs, const bf16 *x, long x_next, const bf16 *w, long w_next, float *sums, \
                                             long next, int first, const results *last, const bf16 *ahead, long every) { \
        (void)x_next, (void)ahead; /* each is for one PLACE or FETCH */                                                  \
        __m512 sum[R][N];                                                                                                \
        UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++)                                                  \
            sum[r][n] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * next + n * 16);                         \
        for (long i = 0, end; i < pairs;) {                                                                              \
            FETCH(N)                                                                                                     \
            end = pairs - i < every ? pairs : i + every;                                                                 \
            for (; i < end; i++) {                                                                                       \
                __m512bh u[N];                                                                                           \
                UNROLLED(int n = 0; n < N; n++) u[n] = (__m512bh)_mm512_loadu_si512(w + n * w_next + i * 32);            \
                UNROLLED(int r = 0; r < R; r++) {                                                                        \
                    int pair;                                                                                            \
                    memcpy(&pair, PLACE(R, r), 4);                                                                       \
                    UNROLLED(int n = 0; n < N; n++)                                                                      \
                        sum[r][n] = _mm512_dpbf16_ps(sum[r][n], u[n], (__m512bh)_mm512_set1_epi32(pair));                \
                }                                                                                                        \
            }                                                                                                            \
        }                                                                                                                \
        if (last) {                                                                                                      \
            UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) put(last, r, n * 16, sum[r][n]);             \
        } else {                                                                                                         \
            UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) _mm512_storeu_ps(sums + r * next + n * 16, sum[r][n]); \
        }                                                                                                                \
    }

#define OF_FEW(R, N) PANEL_TILE(apart, APART, LEAVE, R, N)
OF_FEW(1, 1) OF_FEW(2, 1) OF_FEW(3, 1) OF_FEW(4, 1) OF_FEW(5, 1) OF_FEW(6, 1) OF_FEW(7, 1) OF_FEW(8, 1)
OF_FEW(1, 8) OF_FEW(2, 8) OF_FEW(3, 8) OF_FEW(4, 6) OF_FEW(5, 4) OF_FEW(6, 4) OF_FEW(7, 3) OF_FEW(8, 3)
static const panel_tile apart_tiles[2][MOST + 1] = {
    {NULL, apart_1_1, apart_2_1, apart_3_1, apart_4_1, apart_5_1, apart_6_1, apart_7_1, apart_8_1},
    {NULL, apart_1_8, apart_2_8, apart_3_8, apart_4_6, apart_5_4, apart_6_4, apart_7_3, apart_8_3}};

/* More rows than FEW_ROWS make groups of four at least. */
#define OF_MANY(R, N) PANEL_TILE(beside, BESIDE, FETCH, R, N)
OF_MANY(4, 1) OF_MANY(5, 1) OF_MANY(6, 1) OF_MANY(7, 1) OF_MANY(8, 1)
OF_MANY(4, 2) OF_MANY(5, 2) OF_MANY(6, 2) OF_MANY(7, 2) OF_MANY(8, 2)
OF_MANY(4, 3) OF_MANY(5, 3) OF_MANY(6, 3) OF_MANY(7, 3) OF_MANY(8, 3)
static const panel_tile beside_tiles[][MOST + 1] = {
    {NULL},
    {NULL, NULL, NULL, NULL, beside_4_1, beside_5_1, beside_6_1, beside_7_1, beside_8_1},
    {NULL, NULL, NULL, NULL, beside_4_2, beside_5_2, beside_6_2, beside_7_2, beside_8_2},
    {NULL, NULL, NULL, NULL, beside_4_3, beside_5_3, beside_6_3, beside_7_3, beside_8_3}};
/* Up to FEW_ROWS rows are read where they lie: laying them beside each other would take longer than it saves. */
enum { FEW_ROWS = 6, PANELS = 24, MANY_PANELS = 3, MANY_ROWS = 512, CHUNK = 1024 };

/* At most FEW_ROWS rows with at most PANELS panels. */
static void few_rows(long rows, long pairs, const bf16 *x, long x_next, const bf16 *w, results to) {
    long panels = (to.outputs + 15) / 16;
    for (long n = 0, step; n < panels; n += step) {
        int wide = n + WIDTH[rows] <= panels;
        step = wide ? WIDTH[rows] : 1;
        apart_tiles[wide][rows](pairs, x, x_next, w + n * pairs * 32, pairs * 32, NULL, 0, 1, &to, NULL, pairs);
        to = (results){to.y + step * 16, to.bias ? to.bias + step * 16 : NULL, to.next, to.outputs - step * 16};
    }
}

/* Where group g begins, of `groups` of at most MOST rows. */
static inline long row_of(long rows, long groups, long g) { return rows * g / groups; }

/* A group of at most MOST rows, its pairs side by side: eight pairs of all rows at a time, turned. */
AVX512 static void lay_beside(long rows, long pairs, const bf16 *x, long x_next, bf16 *to) {
    for (long i = 0; i < pairs; i += 8) {
        __m256i a[8], b[8], c[8];
        __mmask8 part = part_of(pairs - i) & 0xff;
        UNROLLED(int r = 0; r < 8; r++)
            a[r] = r < rows ? _mm256_maskz_loadu_epi32(part, x + r * x_next + i * 2) : _mm256_setzero_si256();
        UNROLLED(int r = 0; r < 8; r += 2) {
            b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
            b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
        }
        UNROLLED(int r = 0; r < 8; r += 4)
            UNROLLED(int j = 0; j < 2; j++) {
                c[r + 2 * j] = _mm256_unpacklo_epi64(b[r + j], b[r + j + 2]);
                c[r + 2 * j + 1] = _mm256_unpackhi_epi64(b[r + j], b[r + j + 2]);
            }
        UNROLLED(int j = 0; j < 8; j++) {
            __m256i pair = _mm256_permute2x128_si256(c[j % 4], c[4 + j % 4], j < 4 ? 0x20 : 0x31);
            if (i + j < pairs) _mm256_mask_storeu_epi32(to + (i + j) * rows * 2, (1u << rows) - 1, pair);
        }
    }
}

/* Groups g to `end` with at most MANY_PANELS panels. Inputs are taken in chunks, so that a piece of w stays in the second cache
 * for all rows; meanwhile the next piece is fetched. x: of each chunk all rows, the pairs of a group side by side. */
static void many_rows(long rows, long groups, long g, long end, long pairs, const bf16 *x, const bf16 *w, results to) {
    static _Thread_local float sums[MANY_ROWS * MANY_PANELS * 16];
    long panels = (to.outputs + 15) / 16, next = panels * 16, start = row_of(rows, groups, g), all = end - g;
    for (long i = 0; i < pairs; i += CHUNK) {
        long here = pairs - i < CHUNK ? pairs - i : CHUNK;
        const bf16 *then = w + (i + CHUNK < pairs ? i + CHUNK : panels * pairs) * 32;
        for (long h = g; h < end; h++) {
            long r = row_of(rows, groups, h), count = row_of(rows, groups, h + 1) - r;
            const bf16 *ahead = then + (h - g) * (here / all) * 32;
            results own = {to.y + r * to.next, to.bias, to.next, to.outputs};
            beside_tiles[panels][count](here, x + (i * rows + r * here) * 2, 0, w + i * 32, pairs * 32, sums + (r - start) * next,
                                        next, i == 0, i + here == pairs ? &own : NULL, ahead, all);
        }
    }
}

/* As zoo_product, of w in panels. inputs are even; x's rows may lie at any distance. room: for x once more. */
void zoo_panels(long rows, long inputs, long outputs, const bf16 *x, long x_next, const bf16 *w, const bf16 *bias, bf16 *y,
                long y_next, bf16 *room, int threads) {
    long panels = (outputs + 15) / 16, some = rows <= FEW_ROWS ? PANELS : MANY_PANELS, worth = rows * inputs * outputs / SERIAL + 1;
    long groups = (rows + MOST - 1) / MOST, most = MANY_ROWS / MOST, pairs = inputs / 2;
    bf16 *beside = rows <= FEW_ROWS ? NULL : room;
    if (!rows) return;
    threads = threads < worth ? threads : worth;
#pragma omp parallel num_threads(threads)
    {
        if (beside) {
#pragma omp for schedule(static)
            for (long g = 0; g < groups; g++) {
                long r = row_of(rows, groups, g);
                for (long i = 0; i < pairs; i += CHUNK) {
                    long here = pairs - i < CHUNK ? pairs - i : CHUNK;
                    bf16 *to = beside + (i * rows + r * here) * 2;
                    lay_beside(row_of(rows, groups, g + 1) - r, here, x + r * x_next + i * 2, x_next, to);
                }
            }
        }
#pragma omp for schedule(static)
        for (long t = 0; t < threads; t++) {
            long last = panels * (t + 1) / threads;
            for (long p = panels * t / threads; p < last; p += some) {
                long end = (p + some < last ? p + some : last) * 16;
                results to = {y + p * 16, bias ? bias + p * 16 : NULL, y_next, (end < outputs ? end : outputs) - p * 16};
                const bf16 *own = w + p * 16 * inputs;
                if (!beside) few_rows(rows, pairs, x, x_next, own, to);
                for (long g = 0; beside && g < groups; g += most)
                    many_rows(rows, groups, g, g + most < groups ? g + most : groups, pairs, beside, own, to);
            }
        }
    }
}

enum { WIDEST = 256 };

/* Attention of many rows, by the tiles of panels: scores are products with keys in panels of sixteen positions, and results
 * are products of the weights, rounded to bfloat16, with values in panels of sixteen lanes. */

AVX512_BF16 static void panels_of_cache(long width, long positions, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values) {
    long padded = (positions + 15) / 16 * 16;
    for (long s = 0; s < padded; s++)
        for (long i = 0; i < width; i += 2) {
            bf16 *word = keys + (s / 16 * width / 2 + i / 2) * 32 + s % 16 * 2;
            if (s < positions)
                memcpy(word, k + s * width + i, 4);
            else
                memset(word, 0, 4);
        }
    for (long s = 0; s < padded; s += 2)
        for (long i = 0; i < width; i += 16) {
            __m512i even = _mm512_castps_si512(load16(v + s * width + i, s < positions ? 0xffff : 0));
            __m512i odd = _mm512_castps_si512(load16(v + (s + 1) * width + i, s + 1 < positions ? 0xffff : 0));
            _mm512_storeu_si512(values + (i / 16 * padded / 2 + s / 2) * 32, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
        }
}

static inline unsigned between(long s, long first, long last) {
    unsigned before = s >= first ? 0 : first - s < 16 ? (1u << (first - s)) - 1 : 0xffff;
    return last <= s ? 0 : part_of(last - s) & ~before;
}

/* Turns scores into shares of one another, zero outside first .. last - 1, and returns one over their sum. */
AVX512 static float shares_of(float *scores, long start, long end, long first, long last, float scale, bf16 *shares) {
    __m512 most = _mm512_set1_ps(-__builtin_inff()), total = _mm512_setzero_ps();
    for (long s = start; s < end; s += 16) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + s - start), _mm512_set1_ps(scale));
        _mm512_storeu_ps(scores + s - start, scaled);
        most = _mm512_mask_max_ps(most, between(s, first, last), most, scaled);
    }
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long s = start; s < end; s += 16) {
        __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s - start), top));
        e = _mm512_maskz_mov_ps(between(s, first, last), e);
        total = _mm512_add_ps(total, e);
        store16(shares + s - start, 0xffff, e);
    }
    return 1 / _mm512_reduce_add_ps(total);
}

/* Causal attention of rows that are the last of `positions`: q (rows, heads, width) at any distances, k and v (groups,
 * positions, width), each group k_next further, width a multiple of sixteen; window: how many positions a row sees, 0 for
 * all; y without gaps. keys, values: room for the cache, its positions filled up to sixteens;
 * scores and shares: room for MOST rows of these for each thread. */
AVX512_BF16 void zoo_prompts(long rows, long heads, long groups, long width, long positions, long window, double scale,
                             const bf16 *q, long q_row, long q_head, const bf16 *k, long k_next, const bf16 *v, long v_next,
                             bf16 *keys, bf16 *values, float *scores, bf16 *shares, bf16 *y, int threads) {
    long padded = (positions + 15) / 16 * 16, count = heads / groups, blocks = (rows + MOST - 1) / MOST;
#pragma omp parallel num_threads(threads)
    {
        float *own = scores + omp_get_thread_num() * MOST * padded, found[MOST * WIDEST], over[MOST];
        bf16 *own_shares = shares + omp_get_thread_num() * MOST * padded;
#pragma omp for schedule(static)
        for (long g = 0; g < groups; g++)
            panels_of_cache(width, positions, k + g * k_next, v + g * v_next, keys + g * padded * width, values + g * padded * width);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < heads * blocks; task++) {
            long h = task / blocks, g = h / count, r = task % blocks * MOST, here = rows - r < MOST ? rows - r : MOST;
            long past = positions - rows + r, first = window && past + 1 > window ? past + 1 - window : 0;
            long start = first / 16 * 16, end = (past + here + 15) / 16 * 16, span = end - start;
            for (long p = start / 16, wide; p < end / 16; p += wide ? WIDTH[here] : 1) {
                wide = p + WIDTH[here] <= end / 16;
                apart_tiles[wide][here](width / 2, q + r * q_row + h * q_head, q_row, keys + (g * padded + p * 16) * width,
                                        width * 16, own + p * 16 - start, span, 1, NULL, NULL, width);
            }
            for (long j = 0; j < here; j++) {
                long seen = past + j + 1;
                over[j] = shares_of(own + j * span, start, end, window && seen > window ? seen - window : 0, seen, scale,
                                    own_shares + j * span);
            }
            for (long p = 0, wide; p < width / 16; p += wide ? WIDTH[here] : 1) {
                wide = p + WIDTH[here] <= width / 16;
                apart_tiles[wide][here](span / 2, own_shares, span, values + (g * width + p * 16) * padded + start * 16,
                                        padded * 16, found + p * 16, width, 1, NULL, NULL, span);
            }
            for (long j = 0; j < here; j++)
                for (long i = 0; i < width; i += 16)
                    store16(y + ((r + j) * heads + h) * width + i, 0xffff,
                            _mm512_mul_ps(_mm512_loadu_ps(found + j * width + i), _mm512_set1_ps(over[j])));
        }
    }
}

/* Reads all bytes, by eight streams for each thread, and returns something that depends on them. */
AVX512 static int read_piece(const char *p, long bytes) {
    long each = bytes / 8 / 64 * 64;
    __m512i all[8];
    UNROLLED(int s = 0; s < 8; s++) all[s] = _mm512_setzero_si512();
    for (long i = 0; i < each; i += 64)
        UNROLLED(int s = 0; s < 8; s++) all[s] = _mm512_xor_si512(all[s], _mm512_loadu_si512(p + s * each + i));
    UNROLLED(int s = 1; s < 8; s++) all[0] = _mm512_xor_si512(all[0], all[s]);
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

/* Another processor or compiler, or asked for by a test: nothing to offer. */
int zoo_level(void) { return 0; }

#endif
