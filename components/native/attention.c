/* Attention of a few rows over slabs of keys and values, plain or coded, for x86-64 with AVX-512.
 *
 * A slab holds one sequence's rows of one layer: (2, groups, capacity, row), keys, then values. A row is `width` numbers
 * of bfloat16 or float32, or a bfloat16 scale and `width` codes of a byte (zoo.components.cache.code). Of latents there is
 * one plane, (capacity, row), whose rows are the keys of all heads, and with their first numbers the values. All new rows of a
 * sequence, and all query heads of a key head, read it together, in splits of fixed length at fixed places, whose sums
 * are added up in their order at the end (Dao et al., "Flash-Decoding", 2023). Within a split, too, the order of a row's
 * sums does not depend on the others, and what it does not see never meets it: a result is the same whatever the other
 * rows, sequences and threads.
 *
 * Keys are turned so that sixteen of them lie side by side. Bfloat16 and codes are multiplied in pairs of sixteen bits:
 * by dot products, with weights rounded to bfloat16, or by two multiply-adds. Sums are kept in float32.
 */

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

/* Of AVX512-BF16 only what functions use that are asked for dot products. */
#define DOTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

/* Where to values are fetched while keys are worked on, and the next keys meanwhile: evenly, as memory waits otherwise. */
#define AHEAD _MM_HINT_T1

enum { BF16, F32, INT8, FP8 };
enum { SPLIT = 256, TILE = 32, TOGETHER = 4, WIDEST = 1024, LINE = 64 };

/* Floats of sums that sequences are worked on together for, and query heads that a block of latents' heads has at least
 * half of, and that a split of latents is to have room for. */
enum { MOST_SUMS = 9 << 19, BLOCK = 32, MANY = 512 };

INLINE int is_coded(int kind) { return kind == INT8 || kind == FP8; }

INLINE void fetch(const char *from, long bytes) {
    for (long i = 0; i < bytes; i += LINE) _mm_prefetch(from + i, AHEAD);
}

/* Words of 32 bits that a turned key has: numbers, neighbouring pairs of them, or, of codes, pairs that lie sixteen apart. */
INLINE long words_of(int kind, long width) { return kind == F32 ? width : kind == BF16 ? width / 2 : (width + 31) / 32 * 16; }

/* Sixteen codes as numbers, without the row's scale. */
AVX512 INLINE __m512 decoded(int kind, const char *codes) {
    __m128i bytes = _mm_loadu_si128((const void *)codes);
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    /* The bits of a float of sixteen bits that is 2^8 times as small, which row_scale makes good. */
    __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(bits, _mm256_set1_epi16((short)0xbfff)));
}

/* The upper halves of two vectors of floats, as pairs. */
AVX512 INLINE __m512i paired(__m512 low, __m512 high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
}

AVX512 INLINE __m512 low_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

AVX512 INLINE __m512 high_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE float row_scale(int kind, const char *row) {
    if (!is_coded(kind)) return 1;
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

/* Sixteen words of a key, from word w on. */
AVX512 INLINE __m512i words(int kind, const char *row, long w, long width) {
    if (!is_coded(kind)) return _mm512_maskz_loadu_epi32(part_of(words_of(kind, width) - w), row + 4 * w);
    __m512 high = 2 * w + 16 < width ? decoded(kind, row + 2 * w + 16) : _mm512_setzero_ps();
    return paired(decoded(kind, row + 2 * w), high);
}

/* `count` keys of a tile, turned: of each word 32 lanes, zero beyond the keys. Fetches `bytes` of what is ahead meanwhile. */
AVX512 INLINE void turn_keys(int kind, long width, const char *k, long row, long count, const char *ahead, long bytes,
                             __m512i *tile) {
    long each = 8 * bytes / words_of(kind, width);
    for (long half = 0; half < 2; half++, k += 16 * row, count -= 16)
        for (long w = 0; w < words_of(kind, width); w += 16, ahead += each) {
            __m512i x[16];
            fetch(ahead, each);
            if (count >= 16)
                UNROLLED(int key = 0; key < 16; key++) x[key] = words(kind, k + key * row, w, width);
            else
                UNROLLED(int key = 0; key < 16; key++)
                    x[key] = key < count ? words(kind, k + key * row, w, width) : _mm512_setzero_si512();
            turn(x);
            UNROLLED(int i = 0; i < 16; i++) tile[2 * (w + i) + half] = x[i];
        }
}

/* Scores of N queries with some words of a tile of keys, added to what other words gave. q: words of each query, or of pairs
 * that are multiplied one by one twice as many; next: bytes from one to the next. */
DOTS INLINE void score(int kind, int dot, int queries, long words, const char *q, long next, const __m512i *tile,
                       const float *scales, int added, float softcap, float *scores) {
    __m512 sums[8][2];
    UNROLLED(int n = 0; n < queries; n++) sums[n][0] = sums[n][1] = _mm512_setzero_ps();
    for (long w = 0; w < words; w++) {
        UNROLLED(int half = 0; half < 2; half++) {
            __m512i keys = tile[2 * w + half];
            UNROLLED(int n = 0; n < queries; n++) {
                const float *own = (const float *)(q + n * next);
                __m512 *sum = &sums[n][half];
                if (dot) {
                    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)keys, (__m512bh)_mm512_set1_epi32(((const int *)own)[w]));
                } else if (kind == F32) {
                    *sum = _mm512_fmadd_ps(_mm512_castsi512_ps(keys), _mm512_set1_ps(own[w]), *sum);
                } else {
                    *sum = _mm512_fmadd_ps(low_of(keys), _mm512_set1_ps(own[2 * w]), *sum);
                    *sum = _mm512_fmadd_ps(high_of(keys), _mm512_set1_ps(own[2 * w + 1]), *sum);
                }
            }
        }
    }
    UNROLLED(int n = 0; n < queries; n++) UNROLLED(int half = 0; half < 2; half++) {
        __m512 found = _mm512_mul_ps(sums[n][half], _mm512_loadu_ps(scales + 16 * half));
        if (added) found = _mm512_add_ps(found, _mm512_loadu_ps(scores + n * SPLIT + 16 * half));
        if (softcap > 0) found = capped(found, softcap);
        _mm512_storeu_ps(scores + n * SPLIT + 16 * half, found);
    }
}

/* The lanes of first .. last - 1 among the sixteen from `at` on. */
INLINE __mmask16 lanes(long at, long first, long last) {
    unsigned upto = last <= at ? 0 : part_of(last - at), before = first <= at ? 0 : part_of(first - at);
    return (__mmask16)(upto & ~before);
}

/* Scores of the keys first .. last - 1, which are all of a split where `whole`, as weights relative to the largest one so
 * far, times the scales of the values, zero for other keys of their tiles; the largest score, and the sum of the weights
 * without these scales. Returns what earlier sums are to be multiplied with. */
DOTS INLINE float weigh_seen(int dot, int whole, long first, long last, const float *scales, float *scores, float *peak,
                             float *total) {
    float before = *peak;
    __m512 high = _mm512_set1_ps(before), sum = _mm512_setzero_ps();
    for (long at = first / 16 * 16; at < last; at += 16)
        high = _mm512_mask_max_ps(high, whole ? 0xffff : lanes(at, first, last), high, _mm512_loadu_ps(scores + at));
    *peak = _mm512_reduce_max_ps(high);
    for (long at = first / 16 * 16; at < last; at += 16) {
        __mmask16 seen = whole ? 0xffff : lanes(at, first, last);
        __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(*peak));
        __m512 weights = _mm512_maskz_mov_ps(seen, exponential(x));
        sum = _mm512_add_ps(sum, weights);
        weights = _mm512_maskz_mul_ps(seen, weights, _mm512_loadu_ps(scales + at));
        /* Pairs of bfloat16 take half the room: they lie where scores have been read already. */
        if (dot)
            _mm256_storeu_si256((void *)(scores + at / 2), (__m256i)_mm512_cvtneps_pbh(weights));
        else
            _mm512_storeu_ps(scores + at, weights);
    }
    float share = before == *peak || before == -INFINITY ? 1 : expf(before - *peak);
    *total = *total * share + _mm512_reduce_add_ps(sum);
    return share;
}

DOTS INLINE float weigh(int dot, long first, long last, const float *scales, float *scores, float *peak, float *total) {
    if (first == 0 && last == SPLIT) return weigh_seen(dot, 1, 0, SPLIT, scales, scores, peak, total);
    return weigh_seen(dot, 0, first, last, scales, scores, peak, total);
}

/* 32 lanes of two neighbouring values, in pairs; of bfloat16 in an order of its own. part: which of them there are. */
AVX512 INLINE void pairs_of(int kind, const char *even, const char *odd, long i, __mmask32 part, __m512i *x) {
    if (kind == BF16) {
        __m512i low = _mm512_maskz_loadu_epi16(part, even + 2 * i), high = _mm512_maskz_loadu_epi16(part, odd + 2 * i);
        x[0] = _mm512_unpacklo_epi16(low, high);
        x[1] = _mm512_unpackhi_epi16(low, high);
    } else {
        x[0] = x[1] = _mm512_setzero_si512();
        if (part) x[0] = paired(decoded(kind, even + i), decoded(kind, odd + i));
        if (part >> 16) x[1] = paired(decoded(kind, even + i + 16), decoded(kind, odd + i + 16));
    }
}

/* The lanes of two vectors in another order: `low` names those of the first, those of the second are `step` further. */
AVX512 INLINE void reordered(__m512 *x, __m512i low, int step) {
    __m512 first = _mm512_permutex2var_ps(x[0], low, x[1]);
    x[1] = _mm512_permutex2var_ps(x[0], _mm512_add_epi32(low, _mm512_set1_epi32(step)), x[1]);
    x[0] = first;
}

/* 32 sums, brought from their natural order into that of pairs_of, and back. */
AVX512 INLINE void in_pairs(int kind, __m512 *x) {
    if (kind == BF16) reordered(x, _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), 4);
}

AVX512 INLINE void in_order(int kind, __m512 *x) {
    if (kind == BF16) reordered(x, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), 8);
}

static const char NOTHING[4 * WIDEST];

/* Adds the values first .. last - 1, by the weights of N queries, to those lanes i .. i + 32 CHUNKS of sums that there are.
 * packed: the values of these lanes as pairs, where they are at hand. next: what is fetched meanwhile, as many rows, or half
 * of them where many queries take long. */
DOTS INLINE void add_values(int kind, int dot, int queries, int chunks, const char *v, const __m512i *packed, long row, long i,
                            uint64_t part, long first, long last, const char *next, const float *weights, float *o,
                            long width) {
    const int each = queries < TOGETHER ? 2 : 1;
    __m512 sums[TOGETHER][4];
    UNROLLED(int n = 0; n < queries; n++) UNROLLED(int c = 0; c < chunks; c++) {
        const float *from = o + n * width + i + 32 * c;
        sums[n][2 * c] = _mm512_maskz_loadu_ps((__mmask16)(part >> 32 * c), from);
        sums[n][2 * c + 1] = _mm512_maskz_loadu_ps((__mmask16)(part >> (32 * c + 16)), from + 16);
        if (kind != F32) in_pairs(kind, sums[n] + 2 * c);
    }
    if (kind == F32) {
        for (long key = first; key < last; key++) {
            const float *at = (const float *)(v + key * row) + i;
            UNROLLED(int c = 0; c < chunks; c++) {
                for (long line = each * key; next && line < each * key + each; line++)
                    _mm_prefetch(next + line / 2 * row + 4 * (i + 32 * c) + line % 2 * LINE, AHEAD);
                __m512 x = _mm512_maskz_loadu_ps((__mmask16)(part >> 32 * c), at + 32 * c);
                __m512 y = _mm512_maskz_loadu_ps((__mmask16)(part >> (32 * c + 16)), at + 32 * c + 16);
                UNROLLED(int n = 0; n < queries; n++) {
                    __m512 weight = _mm512_set1_ps(weights[n * SPLIT + key]);
                    sums[n][2 * c] = _mm512_fmadd_ps(weight, x, sums[n][2 * c]);
                    sums[n][2 * c + 1] = _mm512_fmadd_ps(weight, y, sums[n][2 * c + 1]);
                }
            }
        }
    } else {
        for (long pair = first / 2; 2 * pair < last; pair++) {
            const char *even = 2 * pair < first ? NOTHING : v + 2 * pair * row;
            const char *odd = 2 * pair + 1 < last ? v + (2 * pair + 1) * row : NOTHING;
            UNROLLED(int c = 0; c < chunks; c++) {
                __m512i x[2];
                for (long line = each * pair; next && line < each * pair + each; line++)
                    _mm_prefetch(next + line * row + (kind == BF16 ? 2 : 1) * (i + 32 * c), AHEAD);
                if (packed)
                    x[0] = packed[4 * pair + 2 * c], x[1] = packed[4 * pair + 2 * c + 1];
                else
                    pairs_of(kind, even, odd, i + 32 * c, (__mmask32)(part >> 32 * c), x);
                UNROLLED(int n = 0; n < queries; n++) UNROLLED(int half = 0; half < 2; half++) {
                    const float *own = weights + n * SPLIT;
                    __m512 *sum = &sums[n][2 * c + half];
                    if (dot) {
                        __m512bh both = (__m512bh)_mm512_set1_ps(own[pair]);
                        *sum = _mm512_dpbf16_ps(*sum, (__m512bh)x[half], both);
                    } else {
                        *sum = _mm512_fmadd_ps(low_of(x[half]), _mm512_set1_ps(own[2 * pair]), *sum);
                        *sum = _mm512_fmadd_ps(high_of(x[half]), _mm512_set1_ps(own[2 * pair + 1]), *sum);
                    }
                }
            }
        }
    }
    UNROLLED(int n = 0; n < queries; n++) UNROLLED(int c = 0; c < chunks; c++) {
        float *to = o + n * width + i + 32 * c;
        if (kind != F32) in_order(kind, sums[n] + 2 * c);
        _mm512_mask_storeu_ps(to, (__mmask16)(part >> 32 * c), sums[n][2 * c]);
        _mm512_mask_storeu_ps(to + 16, (__mmask16)(part >> (32 * c + 16)), sums[n][2 * c + 1]);
    }
}

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

/* Numbers as a slab keeps them: as they are, or as codes with a scale. */
static void keep(int kind, int wide, long width, const void *x, long start, char *scale_at, char *to) {
    if (!is_coded(kind)) {
        memcpy(to, (const char *)x + start * (wide ? 4 : 2), width * (wide ? 4 : 2));
        return;
    }
    float peak = 0, top = kind == INT8 ? 127 : 448;
    for (long i = 0; i < width; i++) {
        float size = fabsf(number(wide, x, start + i));
        peak = size > peak || isnan(size) ? size : peak;
        if (isnan(peak)) break;
    }
    bf16 scale = rounded(peak / top);
    memcpy(scale_at, &scale, 2);
    float divisor = widened(scale) > 1.17549435e-38f ? widened(scale) : 1.17549435e-38f;
    for (long i = 0; i < width; i++) {
        float code = number(wide, x, start + i) / divisor;
        code = code > top ? top : code < -top ? -top : code;
        to[i] = isnan(code) ? 0 : kind == INT8 ? (char)(int)nearbyintf(code) : (char)eighth(code);
    }
}

/* What the items of a call share. width, values: numbers of a key, and of a value. row, start: bytes of a row, and of its
 * scales. one: whether all heads share one plane, which holds what is new already. length: slots of an item, whole splits. */
typedef struct {
    int wide, one;
    long groups, shared, width, values, row, start, length, window;
    const void *q, *k, *v;
    long q_next, k_next, v_next;
    char **slabs;
    const long *numbers;
    float scale, softcap;
} call;

/* The new rows of one sequence, and the items in which they see or take slots. turns: whether a row takes a slot that one
 * before it sees. */
typedef struct {
    long *rows, count, first, splits;
    int turns;
} sequence;

/* One key head of a sequence, or a block of the heads of latents. items: how many come before its own. parts: where its
 * sums begin. */
typedef struct {
    const sequence *s;
    long g, items, parts;
} unit;

typedef struct {
    long first, last;
} span;

/* The first slot that a row sees; the last one is the last that is filled with it. */
INLINE long first_seen(const call *c, long b) {
    long filled = c->numbers[4 * b + 2];
    return c->window && filled > c->window ? filled - c->window : 0;
}

/* The slots that a row sees in the split from slot `from` on, counted from there. */
INLINE span seen_by(const call *c, long b, long from) {
    long first = first_seen(c, b) - from, last = c->numbers[4 * b + 2] - from;
    return (span){first < 0 ? 0 : first, last > SPLIT ? SPLIT : last};
}

INLINE int is_empty(span x) { return x.first >= x.last; }

/* Of 32 numbers, those that lie sixteen apart as pairs. */
AVX512 INLINE __m512i apart(__m512i x) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_epi16(_mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16)), x);
}

/* A row's queries of one key head as words, for multiply-adds of pairs as floats in their order. */
AVX512 INLINE void as_words(const call *c, int kind, int dot, long b, long g, char *to) {
    long words = words_of(kind, c->width), width = c->width, start = b * c->q_next + g * c->shared * width;
    if (kind == F32 || (kind == BF16 && dot)) {
        memcpy(to, (const char *)c->q + start * (kind == F32 ? 4 : 2), 4 * words * c->shared);
        return;
    }
    for (long n = 0; n < c->shared; n++, start += width)
        for (long w = 0; w < words; w += dot ? 16 : 1) {
            long i = kind == BF16 ? 2 * w : w / 16 * 32 + w % 16, beside = i + (kind == BF16 ? 1 : 16);
            if (dot) {
                __m512i x = _mm512_maskz_loadu_epi16(width - i < 32 ? 0xffff : ~0u, (const bf16 *)c->q + start + i);
                _mm512_storeu_si512(to + 4 * (n * words + w), apart(x));
            } else {
                ((float *)to)[2 * (n * words + w)] = number(c->wide, c->q, start + i);
                ((float *)to)[2 * (n * words + w) + 1] = beside < width ? number(c->wide, c->q, start + beside) : 0;
            }
        }
}

#define ADD(QUERIES, CHUNKS, PART)                                                                                       \
    add_values(kind, dot, QUERIES, CHUNKS, v, NULL, row, i, PART, first, last, next, weights, o, width)

#define ADD_ALL(QUERIES)                                                                                                 \
    case QUERIES:                                                                                                        \
        for (; i + 64 <= width; i += 64) ADD(QUERIES, 2, ~0ull);                                                         \
        for (; i < width; i += 32) ADD(QUERIES, 1, i + 16 < width ? ~0u : 0xffff);                                       \
        break;

/* Adds the values first .. last - 1, by the weights of some queries, to their sums. */
DOTS INLINE void add_all(int kind, int dot, long queries, long width, const char *v, long row, long first, long last,
                         const char *next, const float *weights, float *o) {
    for (; first < last && queries > 0; queries -= TOGETHER, weights += TOGETHER * SPLIT, o += TOGETHER * width, next = NULL) {
        long i = 0;
        switch (queries < TOGETHER ? queries : TOGETHER) {
            ADD_ALL(1)
            ADD_ALL(2)
            ADD_ALL(3)
            ADD_ALL(4)
        }
    }
}

#define ADD_PACKED(QUERIES)                                                                                              \
    case QUERIES:                                                                                                        \
        add_values(kind, dot, QUERIES, 2, NULL, packed, 0, i, part, first, last, NULL, weights + n * SPLIT, o + n * width,  \
                   width);                                                                                               \
        break;

/* The same for many queries: pairs of values are made once for all. each: how many rows of `next` are fetched beside a pair. */
DOTS INLINE void add_to_many(int kind, int dot, long queries, long width, const char *v, long row, long first, long last,
                             const char *next, int each, const float *weights, float *o) {
    __m512i packed[2 * SPLIT];
    for (long i = 0; first < last && i < width; i += 64) {
        uint64_t part = width - i < 64 ? (1ull << (width - i)) - 1 : ~0ull;
        for (long pair = first / 2; 2 * pair < last; pair++) {
            const char *even = 2 * pair < first ? NOTHING : v + 2 * pair * row;
            const char *odd = 2 * pair + 1 < last ? v + (2 * pair + 1) * row : NOTHING;
            UNROLLED(int c = 0; c < 2; c++) {
                for (long line = each * pair; line < each * pair + each; line++)
                    _mm_prefetch(next + line * row + (kind == BF16 ? 2 : 1) * (i + 32 * c), AHEAD);
                pairs_of(kind, even, odd, i + 32 * c, (__mmask32)(part >> 32 * c), packed + 4 * pair + 2 * c);
            }
        }
        for (long n = 0; n < queries; n += TOGETHER) switch (queries - n < TOGETHER ? queries - n : TOGETHER) {
                ADD_PACKED(1)
                ADD_PACKED(2)
                ADD_PACKED(3)
                ADD_PACKED(4)
            }
    }
}

#define SCORE(QUERIES)                                                                                                   \
    for (; n + QUERIES <= queries; n += QUERIES)                                                                         \
        score(kind, dot, QUERIES, upto - w, room + n * size + w * (size / words), size, tile + 2 * w, scales, w > 0,      \
              c->softcap, scores + n * SPLIT + at);

/* Scores of some rows' queries, which lie in `room`, with the keys first .. last - 1 of a split. ahead: what is fetched
 * meanwhile, row by row. Of codes, words have the scale of the values as far as these reach, then one of their own. */
DOTS INLINE void score_all(const call *c, int kind, int dot, long queries, const char *room, const char *k, const char *ahead,
                           span all, float *scores) {
    long row = c->row, words = words_of(kind, c->width), size = words * (kind != F32 && !dot ? 8 : 4);
    long border = is_coded(kind) ? words_of(kind, c->values) : words;
    /* Keys of latents are long: while they are turned, there is time for all. */
    long early = TILE * row / (c->one ? 1 : 2);
    __m512i tile[2 * WIDEST];
    for (long at = all.first / TILE * TILE; at < all.last; at += TILE) {
        long keys = all.last - at < TILE ? all.last - at : TILE;
        turn_keys(kind, c->width, k + c->start + at * row, row, keys, ahead + at * row, early, tile);
        fetch(ahead + at * row + early, TILE * row - early);
        for (long w = 0, upto = border; w < words; w = upto, upto = words) {
            float scales[TILE] = {0};
            long n = 0;
            for (long key = 0; key < keys; key++) scales[key] = c->scale * row_scale(kind, k + (at + key) * row + (w ? 2 : 0));
            SCORE(8)
            SCORE(4)
            SCORE(2)
            SCORE(1)
        }
    }
}

/* Where a sequence's keys of one head begin. */
INLINE const char *keys_at(const call *c, long b, long g) {
    return c->slabs[b] + (c->one ? 0 : g * c->numbers[4 * b] * c->row);
}

/* Some rows of a sequence in one split of one key head. next: the keys of the next item. room: for words of queries, then
 * for scores. part, peaks, totals: for each query its sum of values, the largest score, the sum of its weights, so far. */
DOTS INLINE void attend(const call *c, int kind, int dot, const long *rows, long count, long g, long from, const char *next,
                        char *room, float *part, float *peaks, float *totals) {
    long width = c->values, shared = c->shared, row = c->row;
    long size = words_of(kind, c->width) * (kind != F32 && !dot ? 8 : 4);
    span all = {SPLIT, 0}, common = {0, SPLIT};
    for (long r = 0; r < count; r++) {
        span own = seen_by(c, rows[r], from);
        as_words(c, kind, dot, rows[r], g, room + r * shared * size);
        all = (span){own.first < all.first ? own.first : all.first, own.last > all.last ? own.last : all.last};
        common = (span){own.first > common.first ? own.first : common.first, own.last < common.last ? own.last : common.last};
    }
    const char *k = keys_at(c, rows[0], g) + from * row, *v = c->one ? k : k + c->groups * c->numbers[4 * rows[0]] * row;
    float *scores = (float *)(room + count * shared * size), scales[SPLIT];
    score_all(c, kind, dot, count * shared, room, k, c->one ? k + TILE * row : v, all, scores);
    for (long key = all.first / 16 * 16; key < all.last; key++) scales[key] = row_scale(kind, v + key * row);
    /* Of few queries weights are soon there: all of what comes next is fetched beside the values. */
    long queries = count * shared, some = c->one || queries < TOGETHER ? 0 : SPLIT / 2 * row / queries;
    for (long r = 0; r < count; r++) {
        span own = seen_by(c, rows[r], from);
        for (long n = r * shared; n < (r + 1) * shared; n++) {
            fetch(next + n * some, some);
            float share = weigh(dot, own.first, own.last, scales, scores + n * SPLIT, peaks + n, totals + n);
            for (long i = 0; share != 1 && i < width; i++) part[n * width + i] *= share;
        }
    }
    /* What all rows see, in whole pairs, is added for all together; before and after it, row by row, what some do not see. */
    if (count > 1) common = (span){common.first + common.first % 2, common.last - common.last % 2};
    if (common.first >= common.last) common = (span){SPLIT, SPLIT};
    v += c->start, next += queries * some;
    for (long r = 0; r < count; r++) {
        span own = seen_by(c, rows[r], from);
        add_all(kind, dot, shared, width, v, row, own.first, own.last < common.first ? own.last : common.first, NULL,
                scores + r * shared * SPLIT, part + r * shared * width);
    }
    if (kind != F32 && count * shared > 2 * TOGETHER)
        add_to_many(kind, dot, count * shared, width, v, row, common.first, common.last, next, some ? 1 : 2, scores, part);
    else
        add_all(kind, dot, count * shared, width, v, row, common.first, common.last, next, scores, part);
    for (long r = 0; r < count; r++) {
        span own = seen_by(c, rows[r], from);
        add_all(kind, dot, shared, width, v, row, own.first > common.last ? own.first : common.last, own.last, NULL,
                scores + r * shared * SPLIT, part + r * shared * width);
    }
}

typedef void (*attending)(const call *, const long *, long, long, long, const char *, char *, float *, float *, float *);

#define ATTENDING(NAME, TARGET, KIND, DOT)                                                                               \
    TARGET static void NAME(const call *c, const long *rows, long count, long g, long from, const char *next, char *room, \
                            float *part, float *peaks, float *totals) {                                                  \
        attend(c, KIND, DOT, rows, count, g, from, next, room, part, peaks, totals);                                     \
    }

ATTENDING(bf16_by_dots, DOTS, BF16, 1)
ATTENDING(int8_by_dots, DOTS, INT8, 1)
ATTENDING(fp8_by_dots, DOTS, FP8, 1)
ATTENDING(bf16_by_multiply_adds, DOTS, BF16, 0)
ATTENDING(f32_by_multiply_adds, DOTS, F32, 0)
ATTENDING(int8_by_multiply_adds, DOTS, INT8, 0)
ATTENDING(fp8_by_multiply_adds, DOTS, FP8, 0)

static const attending WAYS[2][4] = {{bf16_by_multiply_adds, f32_by_multiply_adds, int8_by_multiply_adds, fp8_by_multiply_adds},
                                     {bf16_by_dots, f32_by_multiply_adds, int8_by_dots, fp8_by_dots}};

/* The splits of one query head, added up, with the share that a sink takes of them. */
AVX512 static void add_up(long splits, long each, long width, const float *parts, const float *peaks, long next, const float *sink,
                          int wide, void *o, long start) {
    float high = sink ? *sink : -INFINITY, total = 0, sums[WIDEST];
    memset(sums, 0, width * sizeof(float));
    for (long s = 0; s < splits; s++) high = peaks[s * each] > high || isnan(peaks[s * each]) ? peaks[s * each] : high;
    for (long s = 0; s < splits; s++) {
        float share = expf(peaks[s * each] - high);
        total += peaks[s * each + next] * share;
        for (long i = 0; i < width; i += 16)
            _mm512_storeu_ps(sums + i, _mm512_fmadd_ps(_mm512_set1_ps(share), _mm512_loadu_ps(parts + s * each + i),
                                                       _mm512_loadu_ps(sums + i)));
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
        room = malloc(count * sizeof(float));
        size = room ? count : 0;
    }
    return room;
}

/* Puts the rows of each sequence together, and returns how many sequences there are. order: rows by sequence. places: of
 * each row its sequence, and which of its rows it is. */
static long gathered(const call *c, long rows, long *order, long *places, sequence *all) {
    long count = 0, before = 0;
    for (long b = 0; b < rows; b++) {
        long leader = c->numbers[4 * b + 3];
        if (leader == b) all[count] = (sequence){.first = LONG_MAX};
        places[2 * b] = leader == b ? count++ : places[2 * leader];
        places[2 * b + 1] = all[places[2 * b]].count++;
    }
    for (long s = 0; s < count; before += all[s++].count) all[s].rows = order + before;
    for (long b = 0; b < rows; b++) {
        sequence *own = all + places[2 * b];
        long slot = c->numbers[4 * b + 1], filled = c->numbers[4 * b + 2], first = first_seen(c, b);
        long end = own->first + own->splits;
        order[own->rows - order + places[2 * b + 1]] = b;
        for (long r = 0; r < places[2 * b + 1]; r++) own->turns |= slot < c->numbers[4 * own->rows[r] + 2];
        first = (slot < first ? slot : first) / c->length, filled = (slot < filled ? filled : slot + 1) + c->length - 1;
        end = own->splits && end > filled / c->length ? end : filled / c->length;
        own->first = first < own->first ? first : own->first;
        own->splits = end - own->first;
    }
    return count;
}

/* An item, some splits of one key head of a sequence: new rows are written, then attend. */
static void attend_splits(const call *c, int kind, attending way, const sequence *s, long g, long from, const char *next,
                          char *room, float *part) {
    long queries = s->count * c->shared, step = s->count;
    float *peaks = part + queries * c->values, *totals = peaks + queries;
    memset(part, 0, queries * (c->values + 2) * sizeof(float));
    for (long n = 0; n < queries; n++) peaks[n] = -INFINITY;
    for (long r = 0; s->turns && r < s->count; r++)
        if (c->numbers[4 * s->rows[r] + 1] / c->length == from / c->length) step = 1;
    for (long r = 0; r < s->count; r += step) {
        for (long n = r; !c->one && n < r + step; n++) {
            long b = s->rows[n], capacity = c->numbers[4 * b], slot = c->numbers[4 * b + 1];
            if (slot / c->length != from / c->length) continue;
            char *key = (char *)keys_at(c, b, g) + slot * c->row, *value = key + c->groups * capacity * c->row;
            keep(kind, c->wide, c->width, c->k, b * c->k_next + g * c->width, key, key + c->start);
            keep(kind, c->wide, c->width, c->v, b * c->v_next + g * c->width, value, value + c->start);
        }
        for (long at = from; at < from + c->length; at += SPLIT) {
            long first = r, last = r + step, filled = at + SPLIT < from + c->length;
            while (first < last && is_empty(seen_by(c, s->rows[first], at))) first++;
            while (first < last && is_empty(seen_by(c, s->rows[last - 1], at))) last--;
            if (first < last)
                way(c, s->rows + first, last - first, g, at, filled ? keys_at(c, s->rows[0], g) + (at + SPLIT) * c->row : next,
                    room, part + first * c->shared * c->values, peaks + first * c->shared, totals + first * c->shared);
        }
    }
}

/* What an item reads first. */
INLINE const char *read_first(const call *c, const unit *u, long item) {
    return keys_at(c, u->s->rows[0], u->g) + (u->s->first + item - u->items) * c->length * c->row;
}

/* Blocks of heads of latents, which share what they read: enough items for all threads, and not more queries in one than
 * are well kept at hand. */
static void share_out(call *c, const sequence *all, long count, int threads) {
    long items = 0, most = 0;
    for (long s = 0; s < count; s++) items += all[s].splits, most = all[s].count > most ? all[s].count : most;
    while (c->shared % 2 == 0 && c->shared > BLOCK && (items * c->groups < 4 * threads || most * c->shared > MANY))
        c->groups *= 2, c->shared /= 2;
}

/* Attends to what sequences hold, after one new row of keys and values is written for each of `rows` rows.
 *
 * kind: of slabs. wide: whether q, k, v, sinks and o are float32, else bfloat16. dot: whether bfloat16 is multiplied by
 * dot products. row, start: bytes of a slab's row, and of the scales before its numbers. q: (rows, groups * shared, width);
 * o: (rows, groups * shared, values); k, v: (rows, groups, width), or NULL where slabs have one plane for all heads, written
 * already; q_next, k_next, v_next: from one row to the next. slabs: of each row. numbers: for each row the capacity of its
 * slab, the slot that it takes, how many slots are filled with it, and the first row of the same sequence; those of a
 * sequence come in their order. window: of the filled slots only the last ones are seen; 0 for all. softcap: 0 for none.
 * Returns 0, or 1 without memory.
 */
int zoo_attend(int kind, int wide, int dot, long rows, long groups, long shared, long width, long values, long row, long start,
               const void *q, long q_next, const void *k, long k_next, const void *v, long v_next, char **slabs,
               const long *numbers, long window, float scale, float softcap, const void *sinks, void *o, int threads) {
    long heads = groups * shared, wide_items = heads / BLOCK < 1 ? 1 : heads / BLOCK < 8 ? heads / BLOCK : 8;
    call c = {wide, !k, groups, shared, width, values, row, start, SPLIT * (k ? 1 : wide_items), window, q, k, v,
              q_next, k_next, v_next, slabs, numbers, scale, softcap};
    sequence *all = malloc(rows * (sizeof(sequence) + 3 * sizeof(long)));
    if (!all) return 1;
    long *order = (long *)(all + rows), *places = order + rows, count = gathered(&c, rows, order, places, all);
    if (c.one) share_out(&c, all, count, threads);
    long units = count * c.groups, items = 0, sums = 0, most = 0, largest = 0, keys = 0;
    for (long s = 0; s < count; s++) {
        long own = all[s].splits * all[s].count * c.shared * (values + 2);
        items += all[s].splits * c.groups, sums += own * c.groups, largest = own > largest ? own : largest;
        most = all[s].count > most ? all[s].count : most, keys += all[s].splits * all[s].count;
    }
    if (sums > MOST_SUMS) sums = largest > MOST_SUMS ? largest : MOST_SUMS;
    long each = most * c.shared * (words_of(kind, width) * 2 + SPLIT);
    float *room = room_for(heads + sums + threads * each);
    unit *unit_of = malloc(units * sizeof(unit) + items * sizeof(int));
    if (!room || !unit_of) {
        free(all), free(unit_of);
        return 1;
    }
    int *owners = (int *)(unit_of + units);
    float *sunk = room, *parts = sunk + heads, *own_room = parts + sums;
    for (long h = 0; sinks && h < heads; h++) sunk[h] = number(wide, sinks, h);
    if (keys * groups * row < 128) threads = 1;
    attending way = WAYS[dot && !wide][kind];
    for (long done = 0, end; done < units; done = end) {
        long taken = 0;
        items = 0;
        for (end = done; end < units; end++) {
            const sequence *s = all + end / c.groups;
            long own = s->splits * s->count * c.shared * (values + 2);
            if (end > done && taken + own > sums) break;
            unit_of[end] = (unit){s, end % c.groups, items, taken};
            for (long i = 0; i < s->splits; i++) owners[items++] = (int)end;
            taken += own;
        }
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long work = 0; work < items; work++) {
                const unit *u = unit_of + owners[work], *then = unit_of + owners[work + 1 < items ? work + 1 : work];
                long item = work - u->items, size = u->s->count * c.shared * (values + 2);
                attend_splits(&c, kind, way, u->s, u->g, (u->s->first + item) * c.length,
                              read_first(&c, then, work + 1 < items ? work + 1 : work),
                              (char *)(own_room + omp_get_thread_num() * each), parts + u->parts + item * size);
            }
#pragma omp for schedule(static, 1)
            for (long bh = 0; bh < rows * heads; bh++) {
                long b = bh / heads, h = bh % heads, first = first_seen(&c, b) / c.length;
                long at = places[2 * b] * c.groups + h / c.shared;
                if (at < done || at >= end) continue;
                const unit *u = unit_of + at;
                long queries = u->s->count * c.shared, size = queries * (values + 2);
                long own = places[2 * b + 1] * c.shared + h % c.shared;
                const float *from = parts + u->parts + (first - u->s->first) * size;
                add_up((numbers[4 * b + 2] + c.length - 1) / c.length - first, size, values, from + own * values,
                       from + queries * values + own, queries, sinks ? sunk + h : NULL, wide, o, bh * values);
            }
        }
    }
    free(all), free(unit_of);
    return 0;
}

/* Writes new rows of latents. lanes: how many neighbouring numbers share a scale, of three groups, none for one that is
 * not there. slabs, numbers: as of `zoo_attend`. */
void zoo_keep(int kind, int wide, long rows, long first, long second, long third, const void *x, long x_next, char **slabs,
              const long *numbers) {
    long lanes[3] = {first, second, third}, scales = 2 * (1 + (second > 0) + (third > 0));
    long count = first + second + third, start = is_coded(kind) ? scales : 0;
    long row = is_coded(kind) ? start + count + count % 2 : count * (wide ? 4 : 2);
    for (long b = 0; b < rows; b++) {
        char *to = slabs[b] + numbers[4 * b + 1] * row;
        for (long part = 0, done = 0; part < 3 && lanes[part]; done += lanes[part++])
            keep(kind, wide, lanes[part], x, b * x_next + done, to + 2 * part, to + start + done * (is_coded(kind) ? 1 : wide ? 4 : 2));
        if (is_coded(kind) && count % 2) to[start + count] = 0;
    }
}

enum { AT_ONCE = 16 };

/* One head of `zoo_lower`. next: from one head's matrix to the next one's, in numbers. */
DOTS INLINE void lower(int wide, int dot, long h, long rows, long heads, long plain, long turned, long latent, const char *q,
                       long q_next, const char *weight, long next, char *o) {
    int kind = wide ? F32 : BF16;
    long size = wide ? 4 : 2, width = latent + turned;
    const char *own = weight + h * next * size, *then = weight + (h + 1 < heads ? h + 1 : h) * next * size;
    float weights[AT_ONCE * SPLIT], sums[AT_ONCE * WIDEST];
    for (long b = 0; b < rows; b += AT_ONCE) {
        long count = rows - b < AT_ONCE ? rows - b : AT_ONCE;
        memset(sums, 0, count * latent * sizeof(float));
        for (long n = 0; n < count; n++) {
            const char *from = q + ((b + n) * q_next + h * (plain + turned)) * size;
            if (dot) weights[n * SPLIT + plain / 2] = 0;
            if (wide || dot)
                memcpy(weights + n * SPLIT, from, plain * size);
            else
                for (long i = 0; i < plain + plain % 2; i++) weights[n * SPLIT + i] = i < plain ? number(0, from, i) : 0;
        }
        add_all(kind, dot, count, latent, own, latent * size, 0, plain, then, weights, sums);
        for (long n = 0; n < count; n++) {
            char *to = o + ((b + n) * heads + h) * width * size;
            for (long i = 0; i < latent; i += 16)
                if (wide)
                    _mm512_storeu_ps((float *)to + i, _mm512_loadu_ps(sums + n * latent + i));
                else
                    store16((bf16 *)to + i, 0xffff, _mm512_loadu_ps(sums + n * latent + i));
            memcpy(to + latent * size, q + ((b + n) * q_next + h * (plain + turned) + plain) * size, turned * size);
        }
    }
}

/* One head of `zoo_lift`. */
DOTS INLINE void lift(int wide, int dot, long h, long rows, long heads, long latent, long values, const char *o,
                      const char *weight, long next, char *to) {
    int kind = wide ? F32 : BF16;
    long size = wide ? 4 : 2, bytes = words_of(kind, latent) * (wide || dot ? 4 : 8);
    call c = {.wide = wide, .shared = 1, .width = latent, .values = latent, .row = latent * size, .scale = 1, .q = o,
              .q_next = heads * latent};
    const char *own = weight + h * next * size;
    char room[AT_ONCE * WIDEST * 4];
    float scores[AT_ONCE * SPLIT];
    for (long b = 0; b < rows; b += AT_ONCE) {
        long count = rows - b < AT_ONCE ? rows - b : AT_ONCE;
        for (long n = 0; n < count; n++) as_words(&c, kind, dot, b + n, h, room + n * bytes);
        score_all(&c, kind, dot, count, room, own, own + TILE * c.row, (span){0, values}, scores);
        for (long n = 0; n < count; n++)
            for (long i = 0, at = ((b + n) * heads + h) * values; i < values; i += 16) {
                __mmask16 part = part_of(values - i);
                __m512 found = _mm512_loadu_ps(scores + n * SPLIT + i);
                if (wide)
                    _mm512_mask_storeu_ps((float *)to + at + i, part, found);
                else
                    store16((bf16 *)to + at + i, part, found);
            }
    }
}

#define BY_KIND(CALL)                                                                                                    \
    if (wide)                                                                                                            \
        CALL(1, 0);                                                                                                      \
    else if (dot)                                                                                                        \
        CALL(0, 1);                                                                                                      \
    else                                                                                                                 \
        CALL(0, 0);

#define LOWER(WIDE, DOT) lower(WIDE, DOT, h, rows, heads, plain, turned, latent, q, q_next, weight, next, o)
#define LIFT(WIDE, DOT) lift(WIDE, DOT, h, rows, heads, latent, values, o, weight, next, to)

/* Queries brought into the space of latents, by the first rows of each head's matrix: their first `plain` numbers are
 * multiplied, then `turned` ones follow as they are.
 *
 * q: (rows, heads, plain + turned), q_next from one row to the next; weight: matrices of (.., latent), `next` numbers from
 * one head's to the next; o: (rows, heads, latent + turned). At most SPLIT plain numbers.
 */
DOTS void zoo_lower(int wide, int dot, long rows, long heads, long plain, long turned, long latent, const void *q, long q_next,
                    const void *weight, long next, void *o, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long h = 0; h < heads; h++) BY_KIND(LOWER)
}

/* Sums of latents as the heads' values, by the last rows of each head's matrix.
 *
 * o: (rows, heads, latent); weight: the first head's matrix of values, (values, latent), `next` numbers from one to the
 * next; to: (rows, heads, values). At most SPLIT values.
 */
DOTS void zoo_lift(int wide, int dot, long rows, long heads, long latent, long values, const void *o, const void *weight, long next,
                   void *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long h = 0; h < heads; h++) BY_KIND(LIFT)
}

#endif
