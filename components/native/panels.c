/* Products of any number of rows with bfloat16 matrices in panels, by dot products of pairs, and attention of many rows.
 *
 * Loaded and tested as kernels.c is.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ZOO_PLAIN)

#include <immintrin.h>
#include <omp.h>

#include "numbers.h"
#include "packed.h"
#include "products.h"

enum { MOST = 8, WIDE = 12, SERIAL = 1 << 17 };

static const int WIDTH[MOST + 1] = {0, 8, 8, 8, 6, 4, 4, 3, 3};

/* Tiles of R rows of x by N panels; every output has a lane of its own, which adds up its inputs in their order whatever R and
 * N are. */

/* Where results go: of `outputs` from y and bias on; rows are `next` apart. */
typedef struct {
    bf16 *y;
    const bf16 *bias;
    long next, outputs;
} results;

/* What is fetched meanwhile, as the core will need it next: a line of each panel, `next` apart, before each `every` pairs. */
typedef struct {
    const bf16 *at;
    long next, every;
} fetch;

/* Goes on with `sums` unless these inputs are the `first`, and leaves them there, or after the last inputs as results. */
typedef void (*panel_tile)(long pairs, const bf16 *x, long x_next, panels w, float *sums, long next, int first,
                           const results *last, const fetch *ahead);

/* A tile's rows lie x_next apart, or their pairs side by side. */
#define APART(R, r, i) (x + r * x_next + (i) * 2)
#define BESIDE(R, r, i) (x + ((i) * R + r) * 2)

INLINE int pair_at(const bf16 *x) {
    int pair;
    memcpy(&pair, x, 4);
    return pair;
}

AVX512_BF16 INLINE void put(const results *to, long r, long n, __m512 sum) {
    __mmask16 part = part_of(to->outputs - n);
    if (to->bias) sum = _mm512_add_ps(sum, load16(to->bias + n, part));
    _mm256_mask_storeu_epi16(to->y + r * to->next + n, part, (__m256i)_mm512_cvtneps_pbh(sum));
}

#define BEGIN(R, N)                                                                                                      \
    __m512 sum[R][N];                                                                                                    \
    UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++)                                                      \
        sum[r][n] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * next + n * 16);

#define END(R, N)                                                                                                        \
    if (!last) {                                                                                                         \
        UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) _mm512_storeu_ps(sums + r * next + n * 16, sum[r][n]); \
        return;                                                                                                          \
    }                                                                                                                    \
    UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) put(last, r, n * 16 * w.apart, sum[r][n]);

#define TILE_OF(NAME, R, N)                                                                                              \
    AVX512_BF16 static void NAME##_##R##_##N(long pairs, const bf16 *x, long x_next, panels w, float *sums, long next,   \
                                             int first, const results *last, const fetch *ahead)

#define PANEL_TILE(NAME, PLACE, R, N)                                                                                    \
    TILE_OF(NAME, R, N) {                                                                                                \
        long every = ahead ? ahead->every : pairs, line = 0;                                                             \
        (void)x_next; /* for another PLACE */                                                                            \
        BEGIN(R, N)                                                                                                      \
        for (long i = 0, end; i < pairs; line += LINE) {                                                                 \
            if (ahead) UNROLLED(int n = 0; n < N; n++)                                                                   \
                _mm_prefetch((const char *)(ahead->at + n * ahead->next + line), _MM_HINT_T1);                           \
            end = pairs - i < every ? pairs : i + every;                                                                 \
            for (; i < end; i++) {                                                                                       \
                __m512bh u[N];                                                                                           \
                UNROLLED(int n = 0; n < N; n++) u[n] = (__m512bh)_mm512_loadu_si512(w.w + n * w.next + i * LINE);        \
                UNROLLED(int r = 0; r < R; r++) {                                                                        \
                    __m512bh v = (__m512bh)_mm512_set1_epi32(pair_at(PLACE(R, r, i)));                                   \
                    UNROLLED(int n = 0; n < N; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], u[n], v);                    \
                }                                                                                                        \
            }                                                                                                            \
        }                                                                                                                \
        END(R, N)                                                                                                        \
    }

/* Pairs beyond the last are zeros. */
#define PAIR_OF(PLACE, R, r, k, COUNT) _mm512_set1_epi32(k < COUNT ? pair_at(PLACE(R, r, i + k)) : 0)

#define UNPACKED(n, lines)                                                                                               \
    unpack(w.w + n * w.next + i * PACKED_LINE, table_of(w.heads + n * w.apart), lines);                                  \
    if (__builtin_expect(escapes[n].block == block, 0)) escaped(escapes + n, lines);

/* Of a few rows: a panel's lines are used where they were unpacked. */
#define AT_ONCE(PLACE, R, N, COUNT)                                                                                      \
    UNROLLED(int n = 0; n < N; n++) {                                                                                    \
        __m512i lines[BLOCK];                                                                                            \
        UNPACKED(n, lines)                                                                                               \
        UNROLLED(int k = 0; k < BLOCK; k++) UNROLLED(int r = 0; r < R; r++)                                              \
            sum[r][n] = _mm512_dpbf16_ps(sum[r][n], (__m512bh)lines[k], (__m512bh)PAIR_OF(PLACE, R, r, k, COUNT));       \
    }

/* Of more: all panels' lines go by memory, as there are no registers for them and all sums. */
#define IN_TURN(PLACE, R, N, COUNT)                                                                                      \
    {                                                                                                                    \
        __m512i lines[N][BLOCK];                                                                                         \
        UNROLLED(int n = 0; n < N; n++) { UNPACKED(n, lines[n]) }                                                        \
        __asm__("" : "+m"(lines));                                                                                       \
        UNROLLED(int k = 0; k < BLOCK; k++) UNROLLED(int r = 0; r < R; r++) {                                            \
            __m512bh v = (__m512bh)PAIR_OF(PLACE, R, r, k, COUNT);                                                       \
            UNROLLED(int n = 0; n < N; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], (__m512bh)lines[n][k], v);           \
        }                                                                                                                \
    }

#define PACKED_TILE(NAME, PLACE, STEP, R, N)                                                                             \
    TILE_OF(NAME, R, N) {                                                                                                \
        long i = 0;                                                                                                      \
        uint32_t block = w.pair / BLOCK;                                                                                 \
        coming escapes[N];                                                                                               \
        for (int n = 0; n < N; n++) escapes[n] = coming_of(w, n * w.apart);                                              \
        (void)x_next;                                                                                                    \
        BEGIN(R, N)                                                                                                      \
        for (; i + BLOCK <= pairs; i += BLOCK, block++) {                                                                \
            if (ahead) UNROLLED(int n = 0; n < 3 * N; n++)                                                               \
                _mm_prefetch((const char *)(ahead->at + n / 3 * ahead->next + i * PACKED_LINE + n % 3 * LINE), _MM_HINT_T1); \
            STEP(PLACE, R, N, BLOCK)                                                                                     \
        }                                                                                                                \
        if (i < pairs) { STEP(PLACE, R, N, pairs - i) }                                                                  \
        END(R, N)                                                                                                        \
    }

#define OF_FEW(R, N) PANEL_TILE(apart, APART, R, N) PACKED_TILE(packed_apart, APART, AT_ONCE, R, N)
OF_FEW(1, 1) OF_FEW(2, 1) OF_FEW(3, 1) OF_FEW(4, 1) OF_FEW(5, 1) OF_FEW(6, 1) OF_FEW(7, 1) OF_FEW(8, 1)
OF_FEW(1, 8) OF_FEW(2, 8) OF_FEW(3, 8) OF_FEW(4, 6) OF_FEW(5, 4) OF_FEW(6, 4) OF_FEW(7, 3) OF_FEW(8, 3)
#define TILES_OF_FEW(NAME)                                                                                               \
    {{NULL, NAME##_1_1, NAME##_2_1, NAME##_3_1, NAME##_4_1, NAME##_5_1, NAME##_6_1, NAME##_7_1, NAME##_8_1},             \
     {NULL, NAME##_1_8, NAME##_2_8, NAME##_3_8, NAME##_4_6, NAME##_5_4, NAME##_6_4, NAME##_7_3, NAME##_8_3}}
static const panel_tile apart_tiles[2][MOST + 1] = TILES_OF_FEW(apart), packed_apart_tiles[2][MOST + 1] = TILES_OF_FEW(packed_apart);

/* More rows than FEW_ROWS make groups of four to WIDE. */
#define OF_MANY(R, N) PANEL_TILE(beside, BESIDE, R, N) PACKED_TILE(packed_beside, BESIDE, IN_TURN, R, N)
OF_MANY(4, 1) OF_MANY(5, 1) OF_MANY(6, 1) OF_MANY(7, 1) OF_MANY(8, 1) OF_MANY(9, 1) OF_MANY(10, 1) OF_MANY(11, 1) OF_MANY(12, 1)
OF_MANY(4, 2) OF_MANY(5, 2) OF_MANY(6, 2) OF_MANY(7, 2) OF_MANY(8, 2) OF_MANY(9, 2) OF_MANY(10, 2) OF_MANY(11, 2) OF_MANY(12, 2)
#define TILES_OF_MANY(NAME, N)                                                                                           \
    {NULL, NULL, NULL, NULL, NAME##_4_##N, NAME##_5_##N, NAME##_6_##N, NAME##_7_##N, NAME##_8_##N, NAME##_9_##N,         \
     NAME##_10_##N, NAME##_11_##N, NAME##_12_##N}
static const panel_tile beside_tiles[][WIDE + 1] = {TILES_OF_MANY(beside, 1), TILES_OF_MANY(beside, 2)};
static const panel_tile packed_beside_tiles[][WIDE + 1] = {TILES_OF_MANY(packed_beside, 1), TILES_OF_MANY(packed_beside, 2)};

/* Up to FEW_ROWS rows are read where they lie: laying them beside each other would take longer than it saves. Packed panels
 * are unpacked once for all groups of rows where there are several, which costs a way through the cache. */
enum { FEW_ROWS = 6, MANY_PANELS = 2, MANY_ROWS = 43 * WIDE, CHUNK = 1024 };

/* At most FEW_ROWS rows. The panels of a tile lie as far apart as can be, so that each stream goes on where it was: memory
 * gives more to a few long streams than to many short ones. */
static void few_rows(long rows, long pairs, const bf16 *x, long x_next, panels w, results to) {
    long count = (to.outputs + 15) / 16, apart = count / WIDTH[rows], whole = apart * WIDTH[rows];
    for (long n = 0; n < count; n = n + 1 == apart ? whole : n + 1) {
        int wide = n < apart;
        panels own = from_panel(w, n);
        results last = {to.y + n * 16, to.bias ? to.bias + n * 16 : NULL, to.next, to.outputs - n * 16};
        if (wide) own.next *= apart, own.apart = apart;
        fetch ahead = {own.w + AHEAD / sizeof(bf16), own.next, 1};
        (w.heads ? packed_apart_tiles : apart_tiles)[wide][rows](pairs, x, x_next, own, NULL, 0, 1, &last, &ahead);
    }
}

/* Where group g begins, of `groups` of at most WIDE rows. */
static inline long row_of(long rows, long groups, long g) { return rows * g / groups; }

/* At most eight rows of a group of `of`, its pairs side by side: eight pairs of all rows at a time, turned. */
AVX512 static void lay_beside(long rows, long of, long pairs, const bf16 *x, long x_next, bf16 *to) {
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
            if (i + j < pairs) _mm256_mask_storeu_epi32(to + (i + j) * of * 2, (1u << rows) - 1, pair);
        }
    }
}

/* Groups g to `end` with at most MANY_PANELS panels. Inputs are taken in chunks, so that a piece of w stays in the second cache
 * for all rows; meanwhile the next piece is fetched. x: of each chunk all rows, the pairs of a group side by side. */
static void many_rows(long rows, long groups, long g, long end, long pairs, const bf16 *x, panels w, results to) {
    static _Thread_local float sums[MANY_ROWS * MANY_PANELS * 16];
    static _Thread_local bf16 lines[MANY_PANELS * CHUNK * LINE] __attribute__((aligned(64)));
    long count = (to.outputs + 15) / 16, next = count * 16, start = row_of(rows, groups, g), all = end - g;
    int once = w.heads && groups > 1;
    for (long i = 0; i < pairs; i += CHUNK) {
        long here = pairs - i < CHUNK ? pairs - i : CHUNK;
        const bf16 *then = i + CHUNK < pairs ? from_pair(w, i + CHUNK).w : w.w + count * w.next;
        panels own = from_pair(w, i);
        if (once) own = unpacked(own, count, here, lines, CHUNK * LINE);
        for (long h = g; h < end; h++) {
            long r = row_of(rows, groups, h), some = row_of(rows, groups, h + 1) - r;
            fetch ahead = {then + (h - g) * (here / all) * LINE, w.next, all};
            results last = to;
            last.y += r * to.next;
            (own.heads ? packed_beside_tiles : beside_tiles)[count - 1][some](here, x + (i * rows + r * here) * 2, 0, own,
                                                                              sums + (r - start) * next, next, i == 0,
                                                                              i + here == pairs ? &last : NULL, &ahead);
        }
    }
}

static void multiplied(long rows, long inputs, long outputs, const bf16 *x, long x_next, panels w, const bf16 *bias, bf16 *y,
                       long y_next, bf16 *room, int threads) {
    long count = (outputs + 15) / 16, some = rows <= FEW_ROWS ? count : MANY_PANELS, worth = rows * inputs * outputs / SERIAL + 1;
    long groups = (rows + WIDE - 1) / WIDE, most = MANY_ROWS / WIDE, pairs = inputs / 2;
    bf16 *beside = rows <= FEW_ROWS ? NULL : room;
    if (!rows) return;
    threads = threads < worth ? threads : worth;
#pragma omp parallel num_threads(threads)
    {
        if (beside) {
#pragma omp for schedule(static)
            for (long g = 0; g < groups; g++) {
                long r = row_of(rows, groups, g), some = row_of(rows, groups, g + 1) - r;
                for (long i = 0; i < pairs; i += CHUNK) {
                    long here = pairs - i < CHUNK ? pairs - i : CHUNK;
                    bf16 *to = beside + (i * rows + r * here) * 2;
                    for (long q = 0; q < some; q += 8)
                        lay_beside(some - q < 8 ? some - q : 8, some, here, x + (r + q) * x_next + i * 2, x_next, to + q * 2);
                }
            }
        }
#pragma omp for schedule(static)
        for (long t = 0; t < threads; t++) {
            long last = count * (t + 1) / threads;
            for (long p = count * t / threads; p < last; p += some) {
                long end = (p + some < last ? p + some : last) * 16;
                panels own = from_panel(w, p);
                results to = {y + p * 16, bias ? bias + p * 16 : NULL, y_next, (end < outputs ? end : outputs) - p * 16};
                if (!beside) few_rows(rows, pairs, x, x_next, own, to);
                for (long g = 0; beside && g < groups; g += most)
                    many_rows(rows, groups, g, g + most < groups ? g + most : groups, pairs, beside, own, to);
            }
        }
    }
}

/* As zoo_product, of w in panels. inputs are even; x's rows may lie at any distance. heads: NULL, or of packed panels, behind
 * them the escapes. room: for x once more. */
void zoo_panels_by_dots(long rows, long inputs, long outputs, const bf16 *x, long x_next, const void *heads, const void *w,
                        const bf16 *bias, bf16 *y, long y_next, bf16 *room, int threads) {
    multiplied(rows, inputs, outputs, x, x_next, panels_of(inputs, outputs, heads, w), bias, y, y_next, room, threads);
}

/* The upper bytes that come most often among a panel's rows, of wide ones in a quarter. */
static void choose(long rows, long inputs, const bf16 *w, long next, uint8_t *table) {
    uint32_t counts[2][256] = {{0}};
    long skip = inputs > 1024 ? 50 : 2;
    for (long lane = 0; lane < rows; lane++)
        for (long i = 0; i + 1 < inputs; i += i % 64 == 14 ? skip : 2)
            for (int h = 0; h < 2; h++) counts[h][w[lane * next + i + h] >> 8]++;
    for (int byte = 0; byte < 256; byte++) counts[0][byte] += counts[1][byte];
    table[0] = 0, counts[0][0] = 0; /* of escapes */
    for (int t = 1; t < TABLE; t++) {
        int most = 0;
        for (int byte = 1; byte < 256; byte++)
            if (counts[0][byte] > counts[0][most]) most = byte;
        table[t] = most, counts[0][most] = 0;
    }
}

/* Two lines' lower bytes, and the places of the upper ones in the table; returns which bytes have none. */
AVX512 INLINE __mmask64 coded(__m512i a, __m512i b, const uint8_t *table, __m512i *low, __m512i *places) {
    const __m512i byte = _mm512_set1_epi16(255);
    __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    __mmask64 found = 0;
    *places = _mm512_setzero_si512();
    UNROLLED(int t = 0; t < TABLE; t++) {
        __mmask64 same = _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8(table[t]));
        *places = _mm512_mask_mov_epi8(*places, same, _mm512_set1_epi8(t));
        found |= same;
    }
    *low = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    return ~found;
}

/* The escapes of two lines, the first of them number `line`, behind those before, as far as there is room for `most`. */
static void note(uint64_t missing, const bf16 *lines, long line, escape *to, uint32_t *count, long most) {
    for (; missing; missing &= missing - 1) {
        int bit = __builtin_ctzll(missing), below = bit / 8 % 2, lane = bit / 16 * 8 + bit % 8;
        if (*count < most)
            to[*count] = (escape){(line + below) * 16 + lane / 2, (uint32_t)lines[below * LINE + lane] << lane % 2 * 16};
        ++*count;
    }
}

AVX512 static void pack_panel(long rows, long pairs, const bf16 *w, long next, bf16 *to, head *of, escape *found, long most) {
    choose(rows, pairs * 2, w, next, of->table);
    of->count = 0;
    for (long i = 0; i < pairs; i += 16) {
        __m512i r[16];
        for (int lane = 0; lane < 16; lane++)
            r[lane] = lane < rows ? _mm512_maskz_loadu_epi32(part_of(pairs - i), w + lane * next + i * 2) : _mm512_setzero_si512();
        turn(r);
        for (long b = 0; b < 16 && i + b < pairs; b += BLOCK, to += BLOCK * PACKED_LINE) {
            __m512i low, places[2];
            for (int h = 0; h < 2; h++) {
                long line = b + 2 * h;
                uint64_t missing = coded(r[line], r[line + 1], of->table, &low, places + h);
                if (missing) note(missing, (const bf16 *)(r + line), i + line, found, &of->count, most);
                _mm512_storeu_si512(to + (h + 1) * LINE, low);
            }
            _mm512_storeu_si512(to, _mm512_or_si512(places[0], _mm512_slli_epi16(places[1], 4)));
        }
    }
}

/* Packs w (outputs, inputs), whose rows are `next` apart. found: room for `most` escapes of each panel, where all are
 * without gaps in the end. Returns their number, -1 if a panel has more. */
int zoo_pack_panels(long outputs, long inputs, const bf16 *w, long next, void *packed, void *heads, void *found, long most, int threads) {
    long count = (outputs + 15) / 16, pairs = inputs / 2, each = packed_pairs(pairs) * PACKED_LINE, total = 0;
    head *own = heads;
    escape *escapes = found;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < count; p++) {
        long rows = outputs - p * 16 < 16 ? outputs - p * 16 : 16;
        pack_panel(rows, pairs, w + p * 16 * next, next, (bf16 *)packed + p * each, own + p, escapes + p * most, most);
    }
    for (long p = 0; p < count; p++) {
        if (own[p].count > most) return -1;
        memmove(escapes + total, escapes + p * most, own[p].count * sizeof(escape));
        own[p].first = total, total += own[p].count;
    }
    return total;
}

/* The first rows of a panel, or all. */
AVX512 static void unpack_panel(long rows, long pairs, panels w, bf16 *y) {
    long inputs = 2 * pairs;
    for (long i = 0; i < pairs; i += 16) {
        __m512i r[16];
        for (long b = 0; b < 16; b += BLOCK) {
            if (i + b < pairs)
                unpack(w.w + (i + b) * PACKED_LINE, table_of(w.heads), r + b);
            else
                for (int k = 0; k < BLOCK; k++) r[b + k] = _mm512_setzero_si512();
        }
        turn(r);
        for (int lane = 0; lane < 16 && lane < rows; lane++)
            _mm512_mask_storeu_epi32(y + lane * inputs + i * 2, part_of(pairs - i), r[lane]);
    }
    const escape *e = w.escapes + w.heads->first;
    for (const escape *end = e + w.heads->count; e < end; e++) {
        int odd = e->pair > 0xffff;
        if (e->place % 16 < rows) y[e->place % 16 * inputs + e->place / 16 * 2 + odd] = e->pair >> odd * 16;
    }
}

/* The numbers of outputs `first`, a multiple of sixteen, to `last` of a matrix of so many: y (last - first, inputs). */
void zoo_unpack_panels(long first, long last, long outputs, long inputs, const void *packed, const void *heads, bf16 *y, int threads) {
    panels w = panels_of(inputs, outputs, heads, packed);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long output = first; output < last; output += 16)
        unpack_panel(last - output, inputs / 2, from_panel(w, output / 16), y + (output - first) * inputs);
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
                apart_tiles[wide][here](width / 2, q + r * q_row + h * q_head, q_row, (panels){keys + (g * padded + p * 16) * width, width * 16, 1, 0, NULL, NULL},
                                        own + p * 16 - start, span, 1, NULL, NULL);
            }
            for (long j = 0; j < here; j++) {
                long seen = past + j + 1;
                over[j] = shares_of(own + j * span, start, end, window && seen > window ? seen - window : 0, seen, scale,
                                    own_shares + j * span);
            }
            for (long p = 0, wide; p < width / 16; p += wide ? WIDTH[here] : 1) {
                wide = p + WIDTH[here] <= width / 16;
                apart_tiles[wide][here](span / 2, own_shares, span, (panels){values + (g * width + p * 16) * padded + start * 16, padded * 16, 1, 0, NULL, NULL},
                                        found + p * 16, width, 1, NULL, NULL);
            }
            for (long j = 0; j < here; j++)
                for (long i = 0; i < width; i += 16)
                    store16(y + ((r + j) * heads + h) * width + i, 0xffff,
                            _mm512_mul_ps(_mm512_loadu_ps(found + j * width + i), _mm512_set1_ps(over[j])));
        }
    }
}

#endif
