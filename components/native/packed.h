/* Matrices in panels, and how packed ones are read. */

#ifndef ZOO_PACKED_H
#define ZOO_PACKED_H

#include <stddef.h>

#include "numbers.h"

/* Panels: w stored as (outputs / 16 rounded up, inputs / 2, 16, 2), so that a line of memory has two inputs of sixteen
 * outputs; those that the last panel lacks are zeros.
 *
 * Packed panels hold the same numbers in three quarters of the memory. The upper bytes of weights, their signs and most of
 * their exponents, are few different ones: of four lines there are the places of the upper bytes, of four bits each, in a
 * table of those that the panel has most often, and then the lower bytes. A weight whose upper byte is not in the table, an
 * escape, stands with an upper byte of zero, and is put in its place when its line is unpacked, so that results are those of plain panels. */

enum { BLOCK = 4, LINE = 32, PACKED_LINE = 24, TABLE = 16 };

/* Of panels that come from memory for a few rows, the bytes that are asked for while those before are used: it gives most to a
 * few long streams that it hears of early. */
enum { AHEAD = 3072 };

/* place: the pair of inputs times 16, plus the output; pair: the weight, the other one of the pair zero. */
typedef struct {
    uint32_t place, pair;
} escape;

/* Of a packed panel. first: the number of its first escape. */
typedef struct {
    uint8_t table[TABLE];
    uint32_t first, count;
} head;

/* Panels from a pair of inputs on, each `apart` panels after the one before, which is `next` numbers; of packed ones the
 * heads, and all escapes. */
typedef struct {
    const bf16 *w;
    long next, apart, pair;
    const head *heads;
    const escape *escapes;
} panels;

/* Pairs are packed by fours. */
static inline long packed_pairs(long pairs) { return (pairs + BLOCK - 1) / BLOCK * BLOCK; }

/* A matrix's; heads: NULL unless they are packed. */
static inline panels panels_of(long inputs, long outputs, const void *heads, const void *w) {
    const head *own = heads;
    if (!heads) return (panels){w, inputs / 2 * LINE, 1, 0, NULL, NULL};
    return (panels){w, packed_pairs(inputs / 2) * PACKED_LINE, 1, 0, own, (const escape *)(own + (outputs + 15) / 16)};
}

static inline panels from_panel(panels w, long first) {
    return (panels){w.w + first * w.next, w.next, w.apart, w.pair, w.heads ? w.heads + first : NULL, w.escapes};
}

/* From a pair on, of packed ones a multiple of BLOCK. */
static inline panels from_pair(panels w, long first) {
    return (panels){w.w + first * (w.heads ? PACKED_LINE : LINE), w.next, w.apart, w.pair + first, w.heads, w.escapes};
}

/* Four lines of a packed panel. */
AVX512 INLINE void unpack(const bf16 *w, __m512i table, __m512i *lines) {
    const __m512i four = _mm512_set1_epi8(15);
    __m512i places = _mm512_loadu_si512(w), low[2] = {_mm512_loadu_si512(w + LINE), _mm512_loadu_si512(w + 2 * LINE)};
    __m512i high[2] = {_mm512_shuffle_epi8(table, _mm512_and_si512(places, four)),
                       _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(places, 4), four))};
    UNROLLED(int h = 0; h < 2; h++) {
        lines[2 * h] = _mm512_unpacklo_epi8(low[h], high[h]);
        lines[2 * h + 1] = _mm512_unpackhi_epi8(low[h], high[h]);
    }
}

AVX512 INLINE __m512i table_of(const head *of) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)of->table)); }

/* Escapes that are still to come, and the block of the next one. */
typedef struct {
    const escape *next, *end;
    uint32_t block;
} coming;

INLINE void gone_on(coming *c) { c->block = c->next < c->end ? c->next->place / (16 * BLOCK) : UINT32_MAX; }

/* Those of a panel from a pair on. */
static inline coming coming_of(panels w, long n) {
    const escape *first = w.escapes + w.heads[n].first;
    coming c = {first, first + w.heads[n].count, 0};
    while (c.next < c.end && c.next->place / 16 < w.pair) c.next++;
    gone_on(&c);
    return c;
}

/* Puts the escapes of a block in their places. */
AVX512 static inline void escaped(coming *c, __m512i *lines) {
    for (uint32_t block = c->block; c->block == block; c->next++, gone_on(c)) {
        int line = c->next->place / 16 % BLOCK;
        __m512i pair = _mm512_maskz_set1_epi32(1 << c->next->place % 16, c->next->pair);
        UNROLLED(int k = 0; k < BLOCK; k++) lines[k] = k == line ? _mm512_or_si512(lines[k], pair) : lines[k];
    }
}

/* The first lines of packed panels as plain ones, `next` apart. lines: room for these, of `pairs` filled up to BLOCK. */
AVX512 static inline panels unpacked(panels w, long count, long pairs, bf16 *lines, long next) {
    for (long n = 0; n < count; n++) {
        __m512i table = table_of(w.heads + n), *to = (__m512i *)(lines + n * next);
        coming escapes = coming_of(w, n);
        for (long k = 0; k < pairs; k += BLOCK) {
            unpack(w.w + n * w.next + k * PACKED_LINE, table, to + k);
            if (escapes.block == (w.pair + k) / BLOCK) escaped(&escapes, to + k);
        }
    }
    return (panels){lines, next, 1, w.pair, NULL, NULL};
}

#endif
