/* Attention of single rows over slabs of keys and values, plain or coded, for x86-64 with AVX-512.
 *
 * A slab holds one sequence's rows of one layer: (2, groups, capacity, row), keys, then values. A row is `width` numbers
 * of bfloat16 or float32, or a bfloat16 scale and `width` codes of a byte (zoo.components.cache.code). Keys are taken in
 * splits of fixed length, which are added up in their order at the end: a result depends neither on the other sequences
 * nor on the number of threads (Dao et al., "Flash-Decoding", 2023). Sums are kept in float32.
 */

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

#define AHEAD 2048 /* bytes by which keys are fetched in advance */

enum { BF16, F32, INT8, FP8 };
enum { SPLIT = 256, TILE = 16, TOGETHER = 4 };

INLINE long row_bytes(int kind, long width) {
    return kind == BF16 ? 2 * width : kind == F32 ? 4 * width : 2 + width + width % 2;
}

/* Sixteen numbers of a row, from number i on, without the row's scale. */
AVX512 INLINE __m512 numbers(int kind, const char *row, long i) {
    if (kind == F32) return _mm512_loadu_ps((const float *)row + i);
    if (kind == BF16) {
        __m256i bits = _mm256_loadu_si256((const void *)(row + 2 * i));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    __m128i codes = _mm_loadu_si128((const void *)(row + 2 + i));
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    /* The bits of a float of sixteen bits that is 2^8 times as small, which row_scale makes good. */
    __m256i wide = _mm256_cvtepu8_epi16(codes);
    __m256i bits = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7),
                                   _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8));
    return _mm512_cvtph_ps(bits);
}

INLINE float row_scale(int kind, const char *row) {
    if (kind == BF16 || kind == F32) return 1;
    bf16 scale;
    memcpy(&scale, row, 2);
    return kind == FP8 ? 256 * widened(scale) : widened(scale);
}

/* cap tanh(x / cap) */
AVX512 INLINE __m512 capped(__m512 x, float cap) {
    __m512 half = _mm512_div_ps(x, _mm512_set1_ps(cap)), one = _mm512_set1_ps(1);
    __m512 small = exponential(_mm512_mul_ps(_mm512_abs_ps(half), _mm512_set1_ps(-2)));
    __m512 size = _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small)));
    return _mm512_mask_sub_ps(size, _mm512_movepi32_mask(_mm512_castps_si512(half)), _mm512_setzero_ps(), size);
}

/* Scores of `shared` queries with `count` keys into `scores`, SPLIT for each query; beyond the keys they are -inf. */
AVX512 INLINE void score(int kind, long shared, long width, const float *q, const char *k, long count, float softcap,
                         float *scores) {
    float tile[TILE * 256] __attribute__((aligned(64)));
    long row = row_bytes(kind, width), tiles = (count + TILE - 1) / TILE;
    memset(tile, 0, TILE * width * sizeof(float));
    for (long t = 0; t < tiles; t++) {
        long keys = count - t * TILE < TILE ? count - t * TILE : TILE;
        __mmask16 there = (__mmask16)((1u << keys) - 1);
        float scales[TILE] = {0};
        for (long key = 0; key < keys; key++) {
            const char *at = k + (t * TILE + key) * row;
            for (long ahead = 0; ahead < row; ahead += 64) _mm_prefetch(at + AHEAD + ahead, _MM_HINT_T0);
            scales[key] = row_scale(kind, at);
            for (long i = 0; i < width; i += 16) _mm512_store_ps(tile + i * TILE + key * 16, numbers(kind, at, i));
        }
        for (long n = 0; n < shared; n++) {
            __m512 sums[TILE];
            UNROLLED(int key = 0; key < TILE; key++) sums[key] = _mm512_setzero_ps();
            for (long i = 0; i < width; i += 16) {
                __m512 lanes = _mm512_loadu_ps(q + n * width + i);
                UNROLLED(int key = 0; key < TILE; key++)
                    sums[key] = _mm512_fmadd_ps(lanes, _mm512_load_ps(tile + i * TILE + key * 16), sums[key]);
            }
            __m512 found = _mm512_mul_ps(lane_sums(sums), _mm512_loadu_ps(scales));
            if (softcap > 0) found = capped(found, softcap);
            _mm512_storeu_ps(scores + n * SPLIT + t * TILE, _mm512_mask_blend_ps(there, _mm512_set1_ps(-INFINITY), found));
        }
    }
}

/* Scores as weights relative to the largest one, times the scales of the values; the largest score, and the sum of the
 * weights without these scales. */
AVX512 INLINE void weigh(long count, const float *scales, float *scores, float *peak, float *total) {
    long tiles = (count + TILE - 1) / TILE;
    __m512 high = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
    for (long t = 1; t < tiles; t++) high = _mm512_max_ps(high, _mm512_loadu_ps(scores + t * TILE));
    *peak = _mm512_reduce_max_ps(high);
    for (long t = 0; t < tiles; t++) {
        long keys = count - t * TILE < TILE ? count - t * TILE : TILE;
        __mmask16 there = (__mmask16)((1u << keys) - 1);
        __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + t * TILE), _mm512_set1_ps(*peak));
        __m512 weights = _mm512_maskz_mov_ps(there, exponential(x));
        sum = _mm512_add_ps(sum, weights);
        _mm512_storeu_ps(scores + t * TILE, _mm512_mul_ps(weights, _mm512_maskz_loadu_ps(there, scales + t * TILE)));
    }
    *total = _mm512_reduce_add_ps(sum);
}

/* Sums of `count` values by the weights of N queries, for 16 PARTS lanes. */
AVX512 INLINE void add_values(int kind, int queries, int parts, const char *v, long row, long i, long count,
                              const float *weights, float *o, long width) {
    __m512 sums[TOGETHER][4];
    UNROLLED(int n = 0; n < queries; n++) UNROLLED(int p = 0; p < parts; p++) sums[n][p] = _mm512_setzero_ps();
    for (long key = 0; key < count; key++) {
        __m512 lanes[4];
        UNROLLED(int p = 0; p < parts; p++) lanes[p] = numbers(kind, v + key * row, i + 16 * p);
        UNROLLED(int n = 0; n < queries; n++) {
            __m512 weight = _mm512_set1_ps(weights[n * SPLIT + key]);
            UNROLLED(int p = 0; p < parts; p++) sums[n][p] = _mm512_fmadd_ps(weight, lanes[p], sums[n][p]);
        }
    }
    UNROLLED(int n = 0; n < queries; n++) UNROLLED(int p = 0; p < parts; p++) _mm512_storeu_ps(o + n * width + i + 16 * p, sums[n][p]);
}

#define ADD_VALUES(QUERIES)                                                                                              \
    case QUERIES:                                                                                                        \
        for (; i + 64 <= width; i += 64) add_values(kind, QUERIES, 4, v, row, i, count, weights, o, width);              \
        for (; i < width; i += 16) add_values(kind, QUERIES, 1, v, row, i, count, weights, o, width);                    \
        break;

AVX512 INLINE void values(int kind, long queries, long width, const char *v, long count, const float *weights, float *o) {
    long row = row_bytes(kind, width), i = 0;
    switch (queries) {
        ADD_VALUES(1)
        ADD_VALUES(2)
        ADD_VALUES(3)
        ADD_VALUES(4)
    }
}

/* One split of one key head. part: for each query its sum of values, then its largest score and its sum of weights. */
#define SPLIT_OF(NAME, KIND)                                                                                             \
    AVX512 static void NAME(long shared, long width, const float *q, const char *k, const char *v, long count,           \
                            float softcap, float *scores, float *part) {                                                 \
        float scales[SPLIT], *peaks = part + shared * width, *totals = peaks + shared;                                   \
        score(KIND, shared, width, q, k, count, softcap, scores);                                                        \
        for (long key = 0; key < count; key++) scales[key] = row_scale(KIND, v + key * row_bytes(KIND, width));          \
        for (long n = 0; n < shared; n++) weigh(count, scales, scores + n * SPLIT, peaks + n, totals + n);               \
        for (long n = 0; n < shared; n += TOGETHER)                                                                      \
            values(KIND, shared - n < TOGETHER ? shared - n : TOGETHER, width, v, count, scores + n * SPLIT,             \
                   part + n * width);                                                                                    \
    }

typedef void (*split_of)(long, long, const float *, const char *, const char *, long, float, float *, float *);

SPLIT_OF(split_bf16, BF16)
SPLIT_OF(split_f32, F32)
SPLIT_OF(split_int8, INT8)
SPLIT_OF(split_fp8, FP8)

static const split_of SPLITS[] = {split_bf16, split_f32, split_int8, split_fp8};

INLINE float number(int wide, const void *x, long i) { return wide ? ((const float *)x)[i] : widened(((const bf16 *)x)[i]); }

/* A float as e4m3: rounded to the nearest, ties to even, below 2^-6 in steps of 2^-9. At most 448 by its caller. */
static uint8_t eighth(float value) {
    uint8_t sign = signbit(value) ? 0x80 : 0;
    float size = fabsf(value);
    if (!(size > 0)) return sign;
    int power;
    frexpf(size, &power);
    power = power - 1 < -6 ? -6 : power - 1;
    int steps = (int)nearbyintf(ldexpf(size, 3 - power));
    return sign | (uint8_t)(steps < 8 ? steps : (power + 7) * 8 + steps - 8);
}

/* A row of numbers as a slab keeps it. */
static void keep(int kind, int wide, long width, const void *x, long start, char *row) {
    if (kind == BF16 || kind == F32) {
        memcpy(row, (const char *)x + start * (wide ? 4 : 2), width * (wide ? 4 : 2));
        return;
    }
    float peak = 0, top = kind == INT8 ? 127 : 448;
    for (long i = 0; i < width; i++) {
        float size = fabsf(number(wide, x, start + i));
        peak = size > peak || isnan(size) ? size : peak;
        if (isnan(peak)) break;
    }
    bf16 scale = rounded(peak / top);
    memcpy(row, &scale, 2);
    float divisor = widened(scale) > 1.17549435e-38f ? widened(scale) : 1.17549435e-38f;
    for (long i = 0; i < width; i++) {
        float code = number(wide, x, start + i) / divisor;
        code = code > top ? top : code < -top ? -top : code;
        row[2 + i] = isnan(code) ? 0 : kind == INT8 ? (char)(int)nearbyintf(code) : (char)eighth(code);
    }
    if (width % 2) row[2 + width] = 0;
}

/* The splits of one query head, added up, with the share that a sink takes of them. */
AVX512 static void add_up(long splits, long each, long width, const float *parts, const float *peaks, long next, const float *sink,
                          int wide, void *o, long start) {
    float high = sink ? *sink : -INFINITY, total = 0, sums[256] = {0};
    for (long s = 0; s < splits; s++) high = peaks[s * each] > high || isnan(peaks[s * each]) ? peaks[s * each] : high;
    for (long s = 0; s < splits; s++) {
        float share = expf(peaks[s * each] - high);
        total += peaks[s * each + next] * share;
        for (long i = 0; i < width; i += 16)
            _mm512_storeu_ps(sums + i, _mm512_fmadd_ps(_mm512_set1_ps(share), _mm512_loadu_ps(parts + s * each + i), _mm512_loadu_ps(sums + i)));
    }
    if (sink) total += expf(*sink - high);
    for (long i = 0; i < width; i += 16) {
        __m512 value = _mm512_div_ps(_mm512_loadu_ps(sums + i), _mm512_set1_ps(total));
        if (wide)
            _mm512_storeu_ps((float *)o + start + i, value);
        else
            store16((bf16 *)o + start + i, 0xffff, value);
    }
}

/* Memory between calls, of the calling thread. */
static float *room_for(long count) {
    static __thread float *room;
    static __thread long size;
    if (count > size) {
        free(room);
        room = malloc((size = count) * sizeof(float));
    }
    return room;
}

/* Writes one new row of keys and values of each of `rows` sequences, then attends to what they hold.
 *
 * kind: of slabs. wide: whether q, k, v, sinks and o are float32, else bfloat16. q, o: (rows, groups * shared, width);
 * k, v: (rows, groups, width); q_next, k_next, v_next: from one row to the next. numbers: for each sequence the capacity
 * of its slab, the slot of the new row, and how many slots are filled with it. window: of the filled slots only the last
 * ones are seen; 0 for all. softcap: 0 for none. Returns 0, or 1 without memory.
 */
int zoo_attend(int kind, int wide, long rows, long groups, long shared, long width, const void *q, long q_next, const void *k,
               long k_next, const void *v, long v_next, char **slabs, const long *numbers, long window, float scale, float softcap,
               const void *sinks, void *o, int threads) {
    long heads = groups * shared, each = shared * (width + 2), row = row_bytes(kind, width), splits = 0, bytes = 0;
    for (long b = 0; b < rows; b++) {
        long filled = numbers[3 * b + 2], first = window && filled > window ? filled - window : 0;
        splits += (filled + SPLIT - 1) / SPLIT - first / SPLIT;
        bytes += 2 * groups * (filled - first) * row;
    }
    float *room = room_for(rows * heads * width + heads + splits * groups * each + threads * shared * SPLIT);
    long *tasks = malloc((3 * splits + rows + 1) * sizeof(long)), *starts = tasks + 3 * splits;
    if (!room || !tasks) {
        free(tasks);
        return 1;
    }
    float *queries = room, *sunk = queries + rows * heads * width, *parts = sunk + heads, *scores = parts + splits * groups * each;
    for (long h = 0; sinks && h < heads; h++) sunk[h] = number(wide, sinks, h);
    long count = 0;
    for (long b = 0; b < rows; b++) {
        long filled = numbers[3 * b + 2], first = window && filled > window ? filled - window : 0;
        starts[b] = count;
        for (long at = first / SPLIT * SPLIT; at < filled; at += SPLIT, count++) {
            tasks[3 * count] = b;
            tasks[3 * count + 1] = at > first ? at : first;
            tasks[3 * count + 2] = at + SPLIT < filled ? at + SPLIT : filled;
        }
    }
    starts[rows] = count;
    if (bytes < 1 << 16) threads = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long bg = 0; bg < rows * groups; bg++) {
            long b = bg / groups, g = bg % groups, capacity = numbers[3 * b], slot = numbers[3 * b + 1];
            keep(kind, wide, width, k, b * k_next + g * width, slabs[b] + (g * capacity + slot) * row);
            keep(kind, wide, width, v, b * v_next + g * width, slabs[b] + ((groups + g) * capacity + slot) * row);
            for (long i = 0; i < shared * width; i++)
                queries[bg * shared * width + i] = scale * number(wide, q, b * q_next + g * shared * width + i);
        }
#pragma omp for schedule(dynamic)
        for (long work = 0; work < splits * groups; work++) {
            long *task = tasks + work / groups * 3, b = task[0], g = work % groups, capacity = numbers[3 * b];
            const char *keys = slabs[b] + (g * capacity + task[1]) * row;
            SPLITS[kind](shared, width, queries + (b * groups + g) * shared * width, keys, keys + groups * capacity * row,
                         task[2] - task[1], softcap, scores + omp_get_thread_num() * shared * SPLIT, parts + work * each);
        }
#pragma omp for schedule(static)
        for (long bh = 0; bh < rows * heads; bh++) {
            long b = bh / heads, h = bh % heads, g = h / shared, n = h % shared;
            const float *first = parts + (starts[b] * groups + g) * each;
            add_up(starts[b + 1] - starts[b], groups * each, width, first + n * width, first + shared * width + n, shared,
                   sinks ? sunk + h : NULL, wide, o, bh * width);
        }
    }
    free(tasks);
    return 0;
}

#endif
