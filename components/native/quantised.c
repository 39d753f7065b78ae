/* Products with matrices in eight and in four bits, and making them, for x86-64 with AVX-512 and its VNNI.
 *
 * Loaded and tested as kernels.c is; the layout and the formulas are those of zoo.components.quantised. Of a block of 16
 * outputs, 64 bytes hold four inputs' codes of each output: the lanes of one vpdpbusd, which multiplies them with four
 * codes of a row. Weights' codes have an offset that makes them unsigned; it is taken off again by starting a group's
 * sum at minus the offset times the sum of the row's codes. Whole numbers are exact, and the groups' sums are added up
 * in one order: a row's result depends neither on the other rows nor on the number of threads.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <omp.h>

#include "numbers.h"
#include "products.h"

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

enum { GROUP = 32, LANES = 16, SPAN = 4, MOST = 6, TILES = 16 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* codes: (blocks, groups, bits, 64). scales: float32 (blocks, 16) of eight bits, bfloat16 (blocks, groups, 16) of four. */
typedef struct {
    int bits;
    long outputs, inputs, blocks, groups;
    uint8_t *codes;
    void *scales;
} matrix;

/* Rows in eight bits: codes (rows, groups, 32), scales (rows, groups), and what their groups' sums start at. */
typedef struct {
    int8_t *codes;
    float *scales;
    int32_t *starts;
} rows8;

int zoo_quantised_level(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

static matrix matrix_of(int bits, long outputs, long inputs, void *codes, void *scales) {
    return (matrix){bits, outputs, inputs, (outputs + LANES - 1) / LANES, (inputs + GROUP - 1) / GROUP, codes, scales};
}

static inline __mmask16 lanes(long left) { return left > 0 ? part_of(left) : 0; }

VNNI INLINE __m512 loaded(const void *from, int type, long at, __mmask16 mask) {
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
    return load16((const bf16 *)from + at, mask);
}

/* Groups `first` to `last` of one row, whose codes are `step` apart and scales `next`. A group with what is not a finite
 * number gets a scale that is none. */
VNNI static void quantise_row(const void *x, int type, long inputs, long first, long last, int offset, int8_t *codes, long step,
                              float *scales, int32_t *starts, long next) {
    for (long g = first; g < last; g++) {
        __m512 a = loaded(x, type, g * GROUP, lanes(inputs - g * GROUP));
        __m512 b = loaded(x, type, g * GROUP + 16, lanes(inputs - g * GROUP - 16));
        float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        __m512 by = _mm512_set1_ps(127.0f / (most > 1e-30f ? most : 1e-30f));
        __m512i p = _mm512_cvtps_epi32(_mm512_mul_ps(a, by)), q = _mm512_cvtps_epi32(_mm512_mul_ps(b, by));
        _mm_storeu_si128((__m128i *)(codes + g * step), _mm512_cvtepi32_epi8(p));
        _mm_storeu_si128((__m128i *)(codes + g * step + 16), _mm512_cvtepi32_epi8(q));
        int none = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q);
        scales[g * next] = none ? __builtin_nanf("") : most / 127.0f;
        starts[g * next] = -offset * _mm512_reduce_add_epi32(_mm512_add_epi32(p, q));
    }
}

VNNI INLINE __m512i four(const int8_t *codes) {
    int32_t value;
    memcpy(&value, codes, 4);
    return _mm512_set1_epi32(value);
}

/* Bytes of codes that are asked for ahead: memory has most to give where each stream runs through it without a jump, and is
 * asked early. */
#define AHEAD(R) (R > 2 ? 3072 : 1024)

/* R rows with N blocks at a time, `apart` blocks from one to the next: as many streams from memory. */
#define TILE(BITS, R, N)                                                                                                 \
    VNNI static void tile_##BITS##_##R##_##N(const matrix *w, long block, long apart, rows8 x, float *y, long y_next) {  \
        const long groups = w->groups, line = BITS * 64;                                                                 \
        const uint8_t *codes = w->codes + block * groups * line;                                                         \
        const bf16 *halves = (const bf16 *)w->scales + block * groups * LANES;                                           \
        const __m512i low = _mm512_set1_epi8(15);                                                                        \
        __m512 total[R][N];                                                                                              \
        UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) total[r][n] = _mm512_setzero_ps();               \
        for (long g = 0; g < groups; g++) {                                                                              \
            __m512i sum[R][N];                                                                                           \
            UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) sum[r][n] = _mm512_set1_epi32(x.starts[r * groups + g]); \
            UNROLLED(int j = 0; j < BITS; j++) {                                                                         \
                __m512i v[N];                                                                                            \
                UNROLLED(int n = 0; n < N; n++) {                                                                        \
                    const uint8_t *at = codes + (n * apart * groups + g) * line + 64 * j;                                \
                    v[n] = _mm512_loadu_si512(at);                                                                       \
                    _mm_prefetch((const char *)at + AHEAD(R), _MM_HINT_T1);                                              \
                }                                                                                                        \
                UNROLLED(int r = 0; r < R; r++) {                                                                        \
                    __m512i c = four(x.codes + (r * groups + g) * GROUP + 4 * j);                                        \
                    UNROLLED(int n = 0; n < N; n++)                                                                      \
                        sum[r][n] = _mm512_dpbusd_epi32(sum[r][n], BITS == 8 ? v[n] : _mm512_and_si512(v[n], low), c);   \
                }                                                                                                        \
                if (BITS == 4) UNROLLED(int r = 0; r < R; r++) {                                                         \
                    __m512i c = four(x.codes + (r * groups + g) * GROUP + 16 + 4 * j);                                   \
                    UNROLLED(int n = 0; n < N; n++)                                                                      \
                        sum[r][n] = _mm512_dpbusd_epi32(sum[r][n], _mm512_and_si512(_mm512_srli_epi16(v[n], 4), low), c); \
                }                                                                                                        \
            }                                                                                                            \
            __m512 scale[N];                                                                                             \
            if (BITS == 4) UNROLLED(int n = 0; n < N; n++) {                                                             \
                const bf16 *at = halves + (n * apart * groups + g) * LANES;                                              \
                scale[n] = load16(at, 0xffff);                                                                           \
                _mm_prefetch((const char *)at + AHEAD(R) / 8, _MM_HINT_T1);                                              \
            }                                                                                                            \
            UNROLLED(int r = 0; r < R; r++) {                                                                            \
                __m512 by = _mm512_set1_ps(x.scales[r * groups + g]);                                                    \
                UNROLLED(int n = 0; n < N; n++) {                                                                        \
                    __m512 f = _mm512_cvtepi32_ps(sum[r][n]);                                                            \
                    total[r][n] = _mm512_fmadd_ps(BITS == 4 ? _mm512_mul_ps(f, scale[n]) : f, by, total[r][n]);          \
                }                                                                                                        \
            }                                                                                                            \
        }                                                                                                                \
        UNROLLED(int n = 0; n < N; n++) {                                                                                \
            const float *own = (const float *)w->scales + (block + n * apart) * LANES;                                   \
            UNROLLED(int r = 0; r < R; r++)                                                                              \
                _mm512_storeu_ps(y + r * y_next + n * LANES,                                                             \
                                 BITS == 8 ? _mm512_mul_ps(total[r][n], _mm512_loadu_ps(own)) : total[r][n]);            \
        }                                                                                                                \
    }

#define TILES(BITS) TILE(BITS, 6, 2) TILE(BITS, 6, 1) TILE(BITS, 4, 2) TILE(BITS, 4, 1) TILE(BITS, 2, 4) TILE(BITS, 2, 1) TILE(BITS, 1, 4) TILE(BITS, 1, 1)
TILES(8)
TILES(4)

typedef void (*tile)(const matrix *, long, long, rows8, float *, long);

/* By rows, falling, and blocks, falling. */
static const struct {
    long rows, blocks;
    tile eight, four;
} WAYS[] = {
    {6, 2, tile_8_6_2, tile_4_6_2}, {6, 1, tile_8_6_1, tile_4_6_1}, {4, 2, tile_8_4_2, tile_4_4_2},
    {4, 1, tile_8_4_1, tile_4_4_1},    {2, 4, tile_8_2_4, tile_4_2_4}, {2, 1, tile_8_2_1, tile_4_2_1},
    {1, 4, tile_8_1_4, tile_4_1_4},    {1, 1, tile_8_1_1, tile_4_1_1},
};

/* One row's outputs of some blocks, `apart` from one to the next, to where they belong, with the bias, in the row's type. */
VNNI static void finish(const float *from, const void *bias, void *y, int type, long at, long output, long apart, long count,
                        long outputs) {
    for (long n = 0; n < count; n++, output += apart * LANES) {
        __mmask16 mask = lanes(outputs - output);
        __m512 value = _mm512_loadu_ps(from + n * LANES);
        if (bias) value = _mm512_add_ps(value, loaded(bias, type, output, mask));
        if (type == FLOAT32)
            _mm512_mask_storeu_ps((float *)y + at + output, mask, value);
        else
            store16((bf16 *)y + at + output, mask, value);
    }
}

/* All rows with a few blocks, `apart` from one to the next, which stay in the core's cache. */
static void span(const matrix *w, long block, long apart, long count, long rows, rows8 x, const void *bias, void *y, int type) {
    float out[MOST * SPAN * LANES];
    for (long row = 0, taken; row < rows; row += taken) {
        rows8 own = {x.codes + row * w->groups * GROUP, x.scales + row * w->groups, x.starts + row * w->groups};
        int first = 0;
        while (WAYS[first].rows > rows - row) first++;
        taken = WAYS[first].rows;
        for (long n = 0, way; n < count; n += WAYS[way].blocks) {
            for (way = first; WAYS[way].blocks > count - n;) way++;
            (w->bits == 4 ? WAYS[way].four : WAYS[way].eight)(w, block + n * apart, apart, own, out + n * LANES, SPAN * LANES);
        }
        for (long r = 0; r < taken; r++)
            finish(out + r * SPAN * LANES, bias, y, type, (row + r) * w->outputs, block * LANES, apart, count, w->outputs);
    }
}

/* All rows with the blocks from `first` to `last`: those of a span lie as far apart as can be, so that each stream goes on
 * where it was. */
static void streams(const matrix *w, long first, long last, long rows, rows8 x, const void *bias, void *y, int type) {
    long apart = (last - first) / SPAN, whole = first + apart * SPAN;
    for (long b = first; b < first + apart; b++) span(w, b, apart, SPAN, rows, x, bias, y, type);
    if (whole < last) span(w, whole, 1, last - whole, rows, x, bias, y, type);
}

/* tiles.c */
void zoo_tiles_begin(int rows, int bytes);
void zoo_tiles_end(void);
void zoo_tiles_of_codes(int bits, long groups, long blocks, const uint8_t *codes, const void *scales, long tiles, long each,
                        const int8_t *x, const float *by, float *y, long y_next);

/* Of rows in tiles of sixteen: how many there are, and how many rows each has. 0 where rows lie one after the other. */
typedef struct {
    long count, each;
} tiling;

/* All rows with a few blocks by tiles. */
static void tiled_span(const matrix *w, long block, long count, long rows, rows8 x, tiling of, const void *bias, void *y, int type) {
    static _Thread_local float out[TILES * 16 * SPAN * LANES];
    long step = w->groups * LANES;
    const uint8_t *codes = w->codes + block * w->groups * w->bits * 64;
    const char *scales = (const char *)w->scales + (w->bits == 4 ? block * w->groups * LANES * 2 : block * LANES * 4);
    for (long t = 0; t < of.count; t += TILES) {
        long here = of.count - t < TILES ? of.count - t : TILES, row = t * of.each;
        zoo_tiles_of_codes(w->bits, w->groups, count, codes, scales, here, of.each, x.codes + t * step * GROUP, x.scales + t * step, out,
                           SPAN * LANES);
        for (long r = row; r < rows && r < row + here * of.each; r++)
            finish(out + (r - row) * SPAN * LANES, bias, y, type, r * w->outputs, block * LANES, 1, count, w->outputs);
    }
}

/* Some groups of some rows in eight bits, of all that there are from `first` to `end`. */
static void quantise_rows(const void *x, int type, long x_next, const matrix *w, long first, long end, rows8 own, tiling of) {
    long size = type == FLOAT32 ? 4 : 2, groups = w->groups;
    for (long i = first, next; i < end; i = next) {
        long row = i / groups, g = i % groups, last = groups < end - row * groups ? groups : end - row * groups;
        long tile = of.count ? row / of.each * groups * 16 + row % of.each : row * groups;
        quantise_row((const char *)x + row * x_next * size, type, w->inputs, g, last, 1 << (w->bits - 1), own.codes + tile * GROUP,
                     of.count ? 16 * GROUP : GROUP, own.scales + tile, own.starts + tile, of.count ? 16 : 1);
        next = row * groups + last;
    }
}

/* y (rows, outputs) = x w^T + bias, all three of `type`; rows of x are x_next apart. tiled: by tiles, which give the same.
 * scratch: rows * groups * 40 bytes, for tiles of rows filled up to sixteens. */
void zoo_quantised_product(int tiled, int bits, long rows, long inputs, long outputs, const void *x, long x_next, void *codes,
                           void *scales, const void *bias, void *y, int type, void *scratch, int threads) {
    matrix w = matrix_of(bits, outputs, inputs, codes, scales);
    tiling of = {tiled ? (rows + 15) / 16 : 0, tiled && rows ? (rows + (rows + 15) / 16 - 1) / ((rows + 15) / 16) : 0};
    long spans = (w.blocks + SPAN - 1) / SPAN, total = rows * w.groups, room = tiled ? of.count * 16 * w.groups : total;
    rows8 own = {scratch, (float *)((char *)scratch + room * GROUP), (int32_t *)scratch + room * (GROUP / 4 + 1)};
#pragma omp parallel num_threads(threads)
    {
        long all = omp_get_num_threads(), me = omp_get_thread_num();
        quantise_rows(x, type, x_next, &w, total * me / all, total * (me + 1) / all, own, of);
#pragma omp barrier
        if (!tiled) {
            streams(&w, w.blocks * me / all, w.blocks * (me + 1) / all, rows, own, bias, y, type);
        } else {
            zoo_tiles_begin((int)of.each, GROUP);
            for (long s = spans * me / all; s < spans * (me + 1) / all; s++) {
                long count = w.blocks - s * SPAN < SPAN ? w.blocks - s * SPAN : SPAN;
                tiled_span(&w, s * SPAN, count, rows, own, of, bias, y, type);
            }
            zoo_tiles_end();
        }
    }
}

VNNI INLINE float total_of(__m512 a, __m512 b) { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }

/* a and b to the nearest whole numbers from `least` to `most`. */
VNNI INLINE __m512 whole(__m512 value, float least, float most) {
    value = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(least)), _mm512_set1_ps(most));
}

/* Two groups' halves and their scale to codes, and the squares of the error and of the weights. */
VNNI INLINE void keep(__m512 a, __m512 b, __m512 p, __m512 q, float scale, int offset, uint8_t *codes, double *sums) {
    __m512 s = _mm512_set1_ps(scale), c = _mm512_fmsub_ps(p, s, a), d = _mm512_fmsub_ps(q, s, b);
    sums[0] += total_of(_mm512_mul_ps(c, c), _mm512_mul_ps(d, d));
    sums[1] += total_of(_mm512_mul_ps(a, a), _mm512_mul_ps(b, b));
    __m512i up = _mm512_set1_epi32(offset);
    _mm_storeu_si128((__m128i *)codes, _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(p), up)));
    _mm_storeu_si128((__m128i *)(codes + 16), _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(q), up)));
}

/* One output in eight bits, a scale for all. */
VNNI static void quantise_output(const void *w, int type, long inputs, long groups, uint8_t *codes, float *scale, double *sums) {
    __m512 most = _mm512_setzero_ps();
    for (long i = 0; i < inputs; i += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(loaded(w, type, i, lanes(inputs - i))));
    *scale = _mm512_reduce_max_ps(most) / 127.0f;
    __m512 by = _mm512_set1_ps(*scale > 1e-30f ? *scale : 1e-30f);
    for (long g = 0; g < groups; g++) {
        __m512 a = loaded(w, type, g * GROUP, lanes(inputs - g * GROUP));
        __m512 b = loaded(w, type, g * GROUP + 16, lanes(inputs - g * GROUP - 16));
        keep(a, b, whole(_mm512_div_ps(a, by), -127, 127), whole(_mm512_div_ps(b, by), -127, 127), *scale, 128,
             codes + g * GROUP, sums);
    }
}

/* The sum of 32 inputs of each lane, given as those of 0 and 16, 1 and 17 and so on: halves, quarters, eighths together. */
VNNI INLINE __m512 lane_totals(const __m512 *each) {
    __m512 s[8];
    UNROLLED(int j = 0; j < 8; j++) s[j] = _mm512_add_ps(each[j], each[j + 8]);
    for (int n = 4; n; n /= 2)
        for (int j = 0; j < n; j++) s[j] = _mm512_add_ps(s[j], s[j + n]);
    return s[0];
}

/* A group of sixteen outputs in four bits, an output in each lane of its 32 inputs: of the codes tried for the largest
 * weight of an output, the one that leaves the least. */
VNNI static void quantise_group(const __m512 *v, const float *tried, int count, uint8_t *codes, bf16 *scales, double *sums) {
    __m512 size = _mm512_setzero_ps(), least = size, zero = size, one = _mm512_set1_ps(1), c[GROUP], each[16];
    for (int j = 0; j < GROUP; j++) size = _mm512_max_ps(v[j], size), least = _mm512_min_ps(v[j], least);
    /* The largest is negative where no positive one is as large. */
    __m512 most = _mm512_mask_mov_ps(size, _mm512_cmp_ps_mask(_mm512_sub_ps(zero, least), size, _CMP_GT_OQ), least);
    __mmask16 some = _mm512_cmp_ps_mask(_mm512_abs_ps(most), _mm512_set1_ps(1e-30f), _CMP_NLT_UQ);
    __m512 by = _mm512_maskz_div_ps(some, one, most), best = _mm512_set1_ps(-1), found = zero, chosen = zero;
    for (int j = 0; j < GROUP; j++) c[j] = _mm512_mul_ps(v[j], by);
    for (int i = 0; i < count; i++) {
        __m512 code = _mm512_set1_ps(tried[i]), square = zero;
        for (int j = 0; j < 16; j++) {
            __m512 u = whole(_mm512_mul_ps(c[j], code), -8, 7), t = whole(_mm512_mul_ps(c[j + 16], code), -8, 7);
            each[j] = _mm512_add_ps(_mm512_mul_ps(c[j], u), _mm512_mul_ps(c[j + 16], t));
            square = _mm512_fmadd_ps(u, u, _mm512_fmadd_ps(t, t, square)); /* whole numbers, in any order */
        }
        __m512 dot = lane_totals(each);
        square = _mm512_max_ps(square, one);
        __m512 good = _mm512_div_ps(_mm512_mul_ps(dot, dot), square);
        __mmask16 better = _mm512_cmp_ps_mask(good, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, better, good);
        found = _mm512_mask_div_ps(found, better, dot, square);
        chosen = _mm512_mask_mov_ps(chosen, better, code);
    }
    store16(scales, 0xffff, _mm512_mul_ps(found, most));
    __m512 scale = load16(scales, 0xffff), lost = zero, all = zero;
    __m512i up = _mm512_set1_epi32(8), four[GROUP / 4];
    for (int f = 0; f < GROUP / 4; f++) {
        four[f] = _mm512_setzero_si512();
        for (int j = 0; j < 4; j++) {
            __m512 x = v[4 * f + j], u = whole(_mm512_mul_ps(c[4 * f + j], chosen), -8, 7), d = _mm512_fmsub_ps(u, scale, x);
            lost = _mm512_fmadd_ps(d, d, lost), all = _mm512_fmadd_ps(x, x, all);
            __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(u), up);
            four[f] = _mm512_or_si512(four[f], _mm512_sllv_epi32(code, _mm512_set1_epi32(8 * j)));
        }
    }
    for (int f = 0; f < 4; f++)
        _mm512_storeu_si512(codes + 64 * f, _mm512_or_si512(four[f], _mm512_slli_epi32(four[f + 4], 4)));
    sums[0] += _mm512_reduce_add_ps(lost), sums[1] += _mm512_reduce_add_ps(all);
}

/* Sixteen outputs in four bits, `rows` of which there are; their bytes are `next` apart. */
VNNI static void quantise_outputs(const char *w, long next, int type, long rows, long inputs, long groups, const float *tried,
                                  int count, uint8_t *codes, bf16 *scales, double *sums) {
    for (long g = 0; g < groups; g++) {
        __m512 v[GROUP];
        for (long at = 0; at < GROUP; at += 16) {
            __m512i r[16];
            for (long lane = 0; lane < LANES; lane++)
                r[lane] = _mm512_castps_si512(
                    loaded(w + lane * next, type, g * GROUP + at, lanes(lane < rows ? inputs - g * GROUP - at : 0)));
            turn(r);
            for (long j = 0; j < 16; j++) v[at + j] = _mm512_castsi512_ps(r[j]);
        }
        quantise_group(v, tried, count, codes + g * 256, scales + g * LANES, sums);
    }
}

/* Makes a matrix of w, float32 or bfloat16; rows of w are w_next apart. tried: float32, from which four-bit codes are chosen.
 * sums: the squared norms of the error and of w. scratch: threads * groups * 512 bytes. */
VNNI void zoo_quantise(int bits, long outputs, long inputs, const void *w, long w_next, int type, void *codes, void *scales,
                       const float *tried, int count, double *sums, void *scratch, int threads) {
    matrix to = matrix_of(bits, outputs, inputs, codes, scales);
    long width = to.groups * GROUP, size = type == FLOAT32 ? 4 : 2;
    double lost = 0, all = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : lost, all)
    for (long block = 0; block < to.blocks; block++) {
        uint8_t *own = (uint8_t *)scratch + omp_get_thread_num() * width * LANES;
        uint8_t *line = to.codes + block * to.groups * bits * 64;
        double both[2] = {0, 0};
        if (bits == 4)
            quantise_outputs((const char *)w + block * LANES * w_next * size, w_next * size, type, outputs - block * LANES,
                             inputs, to.groups, tried, count, line, (bf16 *)scales + block * to.groups * LANES, both);
        for (long lane = 0; bits == 8 && lane < LANES; lane++) {
            const char *row = (const char *)w + (block * LANES + lane) * w_next * size;
            long there = block * LANES + lane < outputs ? inputs : 0;
            quantise_output(row, type, there, to.groups, own + lane * width, (float *)scales + block * LANES + lane, both);
        }
        for (long g = 0; bits == 8 && g < to.groups; g++)
            for (long j = 0; j < bits; j++, line += 64)
                for (long lane = 0; lane < LANES; lane++) memcpy(line + 4 * lane, own + lane * width + g * GROUP + 4 * j, 4);
        lost += both[0], all += both[1];
    }
    sums[0] = lost, sums[1] = all;
}

#else

/* Another processor or compiler: nothing to offer. */
int zoo_quantised_level(void) { return 0; }

#endif
