/* Products with bfloat16 matrices in panels (panels.c) on processors whose dot products of pairs are slow or missing: of
 * many rows by tiles, where the processor multiplies whole ones (AMX), and otherwise by multiply-adds of widened numbers.
 *
 * Loaded and tested as kernels.c is. Sixteen lines of a panel, 32 inputs of sixteen outputs, are what a tile operation
 * takes as its right side. For each of those it adds up the even and the odd inputs' products in their order, adds both
 * sums, and adds that to the output, all in float32 with numbers below the normal ones taken as zero (Intel, Software
 * Developer's Manual, TDPBF16PS). The multiply-adds follow that order, so that a row's numbers are the same whatever way
 * they come, and depend neither on the other rows nor on the number of threads.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>
#include <omp.h>

#include "numbers.h"
#include "packed.h"
#include "products.h"

/* Tests put tile operations in plain C in the place of the processor's. */
#if defined(ZOO_EMULATED)
#include ZOO_EMULATED
#define HAS_TILES 1
#define TILES AVX512
#elif defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define HAS_TILES 1
#define TILES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16,amx-int8")))
#endif

enum { BFLOAT16 = 1, INT8 = 2 };

#if defined(HAS_TILES) && !defined(ZOO_EMULATED)

#include <sys/syscall.h>
#include <unistd.h>

/* What the processor's tiles multiply: BFLOAT16, INT8, both or nothing. The system has to let them be used, for which Linux
 * wants to be asked once. */
int zoo_tiles(void) {
    enum { ASK = 0x1023, TILE_DATA = 18, STATES = 3 << 17, SAVES = 1 << 27 };
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & SAVES)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & STATES) != STATES || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) return 0;
    if (syscall(SYS_arch_prctl, ASK, TILE_DATA)) return 0;
    return (d >> 22 & 1 ? BFLOAT16 : 0) | (d >> 25 & 1 ? INT8 : 0);
}

#endif

/* Numbers below the normal ones are zero until `restored`, as tile operations have it. */
static unsigned flushed(void) {
    unsigned old = _mm_getcsr();
    _mm_setcsr(old | 0x8040);
    return old;
}

static void restored(unsigned old) { _mm_setcsr(old); }

/* Sums, `next` apart, to y with the bias. */
AVX512 static void finish(long rows, long outputs, const float *sums, long next, const bf16 *bias, bf16 *y, long y_next) {
    for (long n = 0; n < outputs; n += 16) {
        __mmask16 part = outputs - n < 16 ? (1u << (outputs - n)) - 1 : 0xffff;
        __m512 added = bias ? load16(bias + n, part) : _mm512_setzero_ps();
        for (long r = 0; r < rows; r++) store16(y + r * y_next + n, part, _mm512_add_ps(_mm512_loadu_ps(sums + r * next + n), added));
    }
}

/* Where a thread's panels begin: they are shared out by twos. */
static long first_of(long panels, long thread, long threads) {
    long first = (panels + 1) / 2 * thread / threads * 2;
    return first < panels ? first : panels;
}

static int worth(long rows, long inputs, long outputs, int threads) {
    long most = rows * inputs * outputs / (1 << 17) + 1;
    return threads < most ? threads : (int)most;
}

enum { STEP = 32, CHUNK = 512, MANY_ROWS = 256, MANY_PANELS = 16, FEW = 4, EACH = 16, FEW_INPUTS = 2048 };

/* Of a block of the product: at most MANY_ROWS rows and MANY_PANELS panels. */
static _Thread_local float sums[MANY_ROWS * MANY_PANELS * 16] __attribute__((aligned(64)));

/* Of a chunk of packed panels. */
static _Thread_local bf16 chunk_lines[MANY_PANELS * CHUNK * 16] __attribute__((aligned(64)));

/* Multiply-adds of R rows in float32, FEW_INPUTS apart, with N panels, of which lines so many bytes `ahead` are asked for.
 * Packed panels are unpacked by each group of up to EACH rows, and once for all groups of more, which costs a way through the
 * cache. */

typedef void (*fma)(long inputs, const float *x, panels w, float *sums, long next, int first, long ahead);

/* A line's even and odd inputs, from j on, times the rows'. */
#define ADDED(R, n, u, j)                                                                                                \
    {                                                                                                                    \
        __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16)), b = _mm512_castsi512_ps(_mm512_and_si512(u, high));    \
        UNROLLED(int r = 0; r < R; r++) {                                                                                \
            even[r][n] = _mm512_fmadd_ps(a, _mm512_set1_ps(x[r * FEW_INPUTS + (j)]), even[r][n]);                        \
            odd[r][n] = _mm512_fmadd_ps(b, _mm512_set1_ps(x[r * FEW_INPUTS + (j) + 1]), odd[r][n]);                      \
        }                                                                                                                \
    }

#define PLAIN_LINES(R, N)                                                                                                \
    for (long j = i; j < end; j += 2) UNROLLED(int n = 0; n < N; n++) {                                                  \
        const bf16 *at = w.w + n * w.next + j * 16;                                                                      \
        __m512i u = _mm512_loadu_si512(at);                                                                              \
        if (ahead) _mm_prefetch((const char *)at + ahead, _MM_HINT_T1);                                                  \
        ADDED(R, n, u, j)                                                                                                \
    }

#define PACKED_LINES(R, N)                                                                                               \
    for (long j = i; j < end; j += 2 * BLOCK, block++) UNROLLED(int n = 0; n < N; n++) {                                 \
        const bf16 *at = w.w + n * w.next + j / 2 * PACKED_LINE;                                                         \
        __m512i lines[BLOCK];                                                                                            \
        if (ahead) UNROLLED(int k = 0; k < 3; k++) _mm_prefetch((const char *)(at + k * LINE) + ahead, _MM_HINT_T1);     \
        unpack(at, table_of(w.heads + n * w.apart), lines);                                                              \
        if (__builtin_expect(escapes[n].block == block, 0)) escaped(escapes + n, lines);                                 \
        if (__builtin_expect(end - j >= 2 * BLOCK, 1))                                                                   \
            UNROLLED(int k = 0; k < BLOCK; k++) ADDED(R, n, lines[k], j + 2 * k)                                         \
        else                                                                                                             \
            UNROLLED(int k = 0; k < BLOCK; k++) if (j + 2 * k < end) ADDED(R, n, lines[k], j + 2 * k)                    \
    }

#define PLAIN_BEGIN(N)
#define PACKED_BEGIN(N)                                                                                                  \
    uint32_t block = w.pair / BLOCK;                                                                                     \
    coming escapes[N];                                                                                                   \
    for (int n = 0; n < N; n++) escapes[n] = coming_of(w, n * w.apart);

#define FMA(NAME, WAY, R, N)                                                                                             \
    AVX512 static void NAME##_##R##_##N(long inputs, const float *x, panels w, float *sums, long next, int first,        \
                                        long ahead) {                                                                    \
        const __m512i high = _mm512_set1_epi32(0xffff0000);                                                              \
        WAY##_BEGIN(N)                                                                                                   \
        for (long i = 0; i < inputs; i += STEP) {                                                                        \
            long end = inputs - i < STEP ? inputs : i + STEP;                                                            \
            __m512 even[R][N], odd[R][N];                                                                                \
            UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) even[r][n] = odd[r][n] = _mm512_setzero_ps();\
            WAY##_LINES(R, N)                                                                                            \
            UNROLLED(int r = 0; r < R; r++) UNROLLED(int n = 0; n < N; n++) {                                            \
                float *sum = sums + r * next + n * 16;                                                                   \
                __m512 old = first && i == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sum);                               \
                _mm512_storeu_ps(sum, _mm512_add_ps(old, _mm512_add_ps(even[r][n], odd[r][n])));                         \
            }                                                                                                            \
        }                                                                                                                \
    }

#define FMAS(NAME, WAY)                                                                                                  \
    FMA(NAME, WAY, 1, 8) FMA(NAME, WAY, 2, 6) FMA(NAME, WAY, 3, 4) FMA(NAME, WAY, 4, 3)                                  \
    FMA(NAME, WAY, 1, 1) FMA(NAME, WAY, 2, 1) FMA(NAME, WAY, 3, 1) FMA(NAME, WAY, 4, 1)                                  \
    static const fma NAME##s[2][FEW + 1] = {{NULL, NAME##_1_1, NAME##_2_1, NAME##_3_1, NAME##_4_1},                      \
                                            {NULL, NAME##_1_8, NAME##_2_6, NAME##_3_4, NAME##_4_3}};
FMAS(plain_fma, PLAIN)
FMAS(packed_fma, PACKED)
static const int WIDTH[FEW + 1] = {0, 8, 6, 4, 3};

AVX512 static void widen(long rows, long inputs, const bf16 *x, long x_next, float *wide) {
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < inputs; i += 16) _mm512_store_ps(wide + r * FEW_INPUTS + i, load16(x + r * x_next + i, part_of(inputs - i)));
}

static _Thread_local float wide[FEW * FEW_INPUTS] __attribute__((aligned(64)));

/* At most FEW rows by multiply-adds, by streams as those of panels.c. */
static void few_rows(long rows, long inputs, long outputs, const bf16 *x, long x_next, panels w, const bf16 *bias, bf16 *y,
                     long y_next) {
    long all = (outputs + 15) / 16, apart = all / WIDTH[rows], whole = apart * WIDTH[rows];
    for (long n = 0; n < all; n = n + 1 == apart ? whole : n + 1) {
        long count = n < apart ? WIDTH[rows] : 1;
        panels own = from_panel(w, n);
        if (n < apart) own.next *= apart, own.apart = apart;
        for (long i = 0, here; i < inputs; i += here) {
            here = inputs - i < FEW_INPUTS ? inputs - i : FEW_INPUTS;
            widen(rows, here, x + i, x_next, wide);
            (w.heads ? packed_fmas : plain_fmas)[n < apart][rows](here, wide, from_pair(own, i / 2), sums, count * 16, i == 0, AHEAD);
        }
        for (long k = 0; k < count; k++) {
            long output = (n + k * apart) * 16, left = outputs - output;
            finish(rows, left < 16 ? left : 16, sums + k * 16, count * 16, bias ? bias + output : NULL, y + output, y_next);
        }
    }
}

/* A block of more rows by multiply-adds: inputs are taken in chunks whose piece of w stays in the second cache for all. */
static void fma_block(long rows, long inputs, long outputs, const bf16 *x, long x_next, panels w, const bf16 *bias, bf16 *y,
                      long y_next) {
    long groups = (rows + FEW - 1) / FEW, all = (outputs + 15) / 16, next = all * 16;
    for (long i = 0, here; i < inputs; i += here) {
        panels own = from_pair(w, i / 2);
        here = inputs - i < CHUNK ? inputs - i : CHUNK;
        if (w.heads && rows > EACH) own = unpacked(own, all, here / 2, chunk_lines, CHUNK * 16);
        for (long g = 0; g < groups; g++) {
            long r = rows * g / groups, count = rows * (g + 1) / groups - r;
            widen(count, here, x + r * x_next + i, x_next, wide);
            for (long n = 0, step; n < all; n += step) {
                int whole = n + WIDTH[count] <= all;
                step = whole ? WIDTH[count] : 1;
                (own.heads ? packed_fmas : plain_fmas)[whole][count](here, wide, from_panel(own, n), sums + r * next + n * 16, next, i == 0, 0);
            }
        }
    }
    finish(rows, outputs, sums, next, bias, y, y_next);
}

/* The thread's panels from `first` to `last`. */
static void by_multiply_adds(long rows, long inputs, long outputs, const bf16 *x, long x_next, panels w, const bf16 *bias, bf16 *y,
                             long y_next, long first, long last) {
    long some = rows <= FEW ? last - first : MANY_PANELS;
    for (long p = first; p < last; p += some) {
        long end = (p + some < last ? p + some : last) * 16, width = (end < outputs ? end : outputs) - p * 16;
        const bf16 *own = bias ? bias + p * 16 : NULL;
        if (rows <= FEW) few_rows(rows, inputs, width, x, x_next, from_panel(w, p), own, y + p * 16, y_next);
        for (long r = 0; rows > FEW && r < rows; r += MANY_ROWS)
            fma_block(rows - r < MANY_ROWS ? rows - r : MANY_ROWS, inputs, width, x + r * x_next, x_next, from_panel(w, p), own,
                      y + r * y_next + p * 16, y_next);
    }
}

/* y = x w^T + bias by multiply-adds, as zoo_panels_by_dots. */
void zoo_panels_by_multiply_adds(long rows, long inputs, long outputs, const bf16 *x, long x_next, const void *heads, const void *w,
                                 const bf16 *bias, bf16 *y, long y_next, int threads) {
    long count = (outputs + 15) / 16;
    panels all = panels_of(inputs, outputs, heads, w);
    if (!rows) return;
    threads = worth(rows, inputs, outputs, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < threads; t++) {
        unsigned old = flushed();
        by_multiply_adds(rows, inputs, outputs, x, x_next, all, bias, y, y_next, first_of(count, t, threads), first_of(count, t + 1, threads));
        restored(old);
    }
}

#if defined(HAS_TILES)

/* Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 lines of w; `bytes` are those of a row of x in a tile. A thread that
 * calls this calls zoo_tiles_end. */
TILES void zoo_tiles_begin(int rows, int bytes) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } layout = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        layout.bytes[t] = t == 4 || t == 5 ? bytes : 64;
        layout.rows[t] = t < 6 ? rows : bytes / 4;
    }
    __asm__ volatile("" : : "r"(&layout) : "memory");
    _tile_loadconfig(&layout);
}

TILES void zoo_tiles_end(void) { _tile_release(); }

/* What comes next from memory, fetched a few lines at each step. */
typedef struct {
    const char *at[2];
    long lines;
} ahead;

/* R tiles of rows by N panels, `steps` tiles of inputs; R's sums are `below` apart, in rows that are `next` apart. */
TILES INLINE void multiplied(const int R, const int N, long steps, const bf16 *x, long x_next, const bf16 *w, long w_next,
                             float *c, long next, long below, int first, ahead *then) {
    if (first) {
        _tile_zero(0);
        if (N > 1) _tile_zero(1);
        if (R > 1) _tile_zero(2);
        if (R > 1 && N > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, c, next * 4);
        if (N > 1) _tile_loadd(1, c + 16, next * 4);
        if (R > 1) _tile_loadd(2, c + below, next * 4);
        if (R > 1 && N > 1) _tile_loadd(3, c + below + 16, next * 4);
    }
    for (long s = 0; s < steps; s++) {
        _tile_loadd(6, w + s * 512, 64);
        _tile_loadd(4, x + s * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, w + w_next + s * 512, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (R > 1) {
            _tile_loadd(5, x + x_next + s * 512, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
        for (long line = 0; line < then->lines; line++) {
            _mm_prefetch(then->at[0], _MM_HINT_T1), then->at[0] += 64;
            _mm_prefetch(then->at[1], _MM_HINT_T1), then->at[1] += 64;
        }
    }
    _tile_stored(0, c, next * 4);
    if (N > 1) _tile_stored(1, c + 16, next * 4);
    if (R > 1) _tile_stored(2, c + below, next * 4);
    if (R > 1 && N > 1) _tile_stored(3, c + below + 16, next * 4);
}

TILES static void some_tiles(int two_rows, int two_panels, long steps, const bf16 *x, long x_next, const bf16 *w, long w_next,
                             float *c, long next, long below, int first, ahead *then) {
    if (two_rows && two_panels)
        multiplied(2, 2, steps, x, x_next, w, w_next, c, next, below, first, then);
    else if (two_rows)
        multiplied(2, 1, steps, x, x_next, w, w_next, c, next, below, first, then);
    else if (two_panels)
        multiplied(1, 2, steps, x, x_next, w, w_next, c, next, below, first, then);
    else
        multiplied(1, 1, steps, x, x_next, w, w_next, c, next, below, first, then);
}

/* Rows of x in tiles (tiles, steps, 16, 32), of which `each` hold rows. Inputs are filled up with zeros. */
typedef struct {
    bf16 *tiles;
    long steps, each;
} packed;

AVX512 static void pack(packed to, long rows, long inputs, const bf16 *x, long x_next, long tile, long step) {
    long left = inputs - step * STEP;
    bf16 *own = to.tiles + (tile * to.steps + step) * 512;
    for (long r = 0; r < to.each; r++) {
        __mmask32 part = tile * to.each + r >= rows ? 0 : left < STEP ? (1u << left) - 1 : 0xffffffff;
        _mm512_storeu_si512(own + r * STEP, _mm512_maskz_loadu_epi16(part, x + (tile * to.each + r) * x_next + step * STEP));
    }
}

/* Two panels of the inputs from i on, or one, with all tiles of rows: lines beyond the inputs are zeros. fetched: how many
 * lines of each panel to fetch meanwhile. */
TILES static void panels_by_tiles(packed x, long tiles, long inputs, long i, int two, panels w, float *c, long next, ahead then,
                                  long fetched) {
    static _Thread_local bf16 last[2 * 512] __attribute__((aligned(64)));
    long here = inputs - i < CHUNK ? inputs - i : CHUNK, steps = here / STEP, rest = here % STEP, below = x.each * next;
    if (rest) {
        memset(last, 0, sizeof last);
        for (int n = 0; n <= two; n++) memcpy(last + n * 512, w.w + n * w.next + steps * 512, rest * 32);
        __asm__ volatile("" : : "r"(last) : "memory");
    }
    then.lines = steps ? (fetched + (tiles + 1) / 2 * steps - 1) / ((tiles + 1) / 2 * steps) : 0;
    for (long t = 0; t < tiles; t += 2) {
        const bf16 *own = x.tiles + (t * x.steps + i / STEP) * 512;
        float *to = c + t * below;
        if (steps) some_tiles(t + 1 < tiles, two, steps, own, x.steps * 512, w.w, w.next, to, next, below, i == 0, &then);
        if (rest) {
            ahead none = {.lines = 0};
            some_tiles(t + 1 < tiles, two, 1, own + steps * 512, x.steps * 512, last, 512, to, next, below, i == 0 && !steps, &none);
        }
    }
}

/* A block by tiles: inputs are taken in chunks whose pieces of x and w stay in the second cache. */
TILES static void tile_block(packed x, long tiles, long rows, long inputs, long outputs, panels w, const bf16 *bias, bf16 *y,
                             long y_next) {
    long count = (outputs + 15) / 16, next = count * 16;
    for (long i = 0; i < inputs; i += CHUNK)
        for (long n = 0; n < count; n += 2) {
            panels own = from_pair(from_panel(w, n), i / 2);
            const bf16 *then = own.w + 2 * w.next;
            long here = (inputs - i < CHUNK ? inputs - i : CHUNK) / 2, two = n + 1 < count;
            if (n + 2 >= count) then = i + CHUNK < inputs ? from_pair(w, (i + CHUNK) / 2).w : w.w + count * w.next;
            if (w.heads) {
                own = unpacked(own, 1 + two, here, chunk_lines, CHUNK * 16);
                __asm__ volatile("" : : "r"(chunk_lines) : "memory");
            }
            panels_by_tiles(x, tiles, inputs, i, two, own, sums + n * 16, next, (ahead){{(const char *)then, (const char *)(then + w.next)}, 0},
                            w.heads ? here * PACKED_LINE / LINE : here);
        }
    finish(rows, outputs, sums, next, bias, y, y_next);
}

/* y = x w^T + bias by tiles, as zoo_panels_by_dots. scratch: rows / 16 times inputs / 32, both rounded up, of 1024 bytes. */
TILES void zoo_panels_by_tiles(long rows, long inputs, long outputs, const bf16 *x, long x_next, const void *heads, const void *w,
                               const bf16 *bias, bf16 *y, long y_next, bf16 *scratch, int threads) {
    long tiles = (rows + 15) / 16, count = (outputs + 15) / 16, most = MANY_ROWS / 16;
    packed own = {scratch, (inputs + STEP - 1) / STEP, (rows + tiles - 1) / tiles};
    panels matrix = panels_of(inputs, outputs, heads, w);
#pragma omp parallel num_threads(worth(rows, inputs, outputs, threads))
    {
        unsigned old = flushed();
        long me = omp_get_thread_num(), all = omp_get_num_threads(), last = first_of(count, me + 1, all);
#pragma omp for schedule(static)
        for (long piece = 0; piece < tiles * own.steps; piece++)
            pack(own, rows, inputs, x, x_next, piece / own.steps, piece % own.steps);
        zoo_tiles_begin((int)own.each, 64);
        for (long p = first_of(count, me, all); p < last; p += MANY_PANELS) {
            long end = (p + MANY_PANELS < last ? p + MANY_PANELS : last) * 16, width = (end < outputs ? end : outputs) - p * 16;
            for (long t = 0; t < tiles; t += most) {
                packed these = {own.tiles + t * own.steps * 512, own.steps, own.each};
                long r = t * own.each, here = tiles - t < most ? tiles - t : most;
                tile_block(these, here, rows - r < here * own.each ? rows - r : here * own.each, inputs, width, from_panel(matrix, p),
                           bias ? bias + p * 16 : NULL, y + r * y_next + p * 16, y_next);
            }
        }
        zoo_tiles_end();
        restored(old);
    }
}

/* Matrices in eight and four bits (quantised.c). A group's 32 inputs are half of what a tile can take, as groups' sums have
 * scales of their own. */

enum { GROUPS = 64, BLOCKS = 4, GROUP = 512 };

/* The codes of `count` groups of a block as signed numbers of eight bits, eight lines each. */
AVX512 static void signed_codes(int bits, long count, const uint8_t *codes, int8_t *to) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), half = _mm512_set1_epi8(-128);
    for (long g = 0; g < count; g++, to += GROUP)
        for (int j = 0; j < bits; j++, codes += 64) {
            __m512i v = _mm512_loadu_si512(codes);
            if (bits == 8) {
                _mm512_storeu_si512(to + 64 * j, _mm512_xor_si512(v, half));
            } else {
                __m512i above = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
                _mm512_storeu_si512(to + 64 * j, _mm512_sub_epi8(_mm512_and_si512(v, low), eight));
                _mm512_storeu_si512(to + 64 * (j + 4), _mm512_sub_epi8(above, eight));
            }
        }
}

/* The whole sums of up to four groups, (4, 16, 16). */
TILES INLINE void four_groups(long count, const int8_t *x, const int8_t *codes, int32_t *to) {
    _tile_zero(0);
    _tile_loadd(4, x, 32);
    _tile_loadd(6, codes, 64);
    _tile_dpbssd(0, 4, 6);
    if (count > 1) {
        _tile_zero(1);
        _tile_loadd(5, x + GROUP, 32);
        _tile_loadd(7, codes + GROUP, 64);
        _tile_dpbssd(1, 5, 7);
    }
    if (count > 2) {
        _tile_zero(2);
        _tile_loadd(4, x + 2 * GROUP, 32);
        _tile_loadd(6, codes + 2 * GROUP, 64);
        _tile_dpbssd(2, 4, 6);
    }
    if (count > 3) {
        _tile_zero(3);
        _tile_loadd(5, x + 3 * GROUP, 32);
        _tile_loadd(7, codes + 3 * GROUP, 64);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, to, 64);
    if (count > 1) _tile_stored(1, to + 256, 64);
    if (count > 2) _tile_stored(2, to + 512, 64);
    if (count > 3) _tile_stored(3, to + 768, 64);
}

/* Adds the sums of up to four groups, times the rows' scales and the outputs', to the totals of sixteen rows. */
AVX512 INLINE void scaled(int bits, long count, const int32_t *found, const float *by, const bf16 *scales, __m512 *total) {
    for (long g = 0; g < count; g++) {
        __m512 own = bits == 4 ? load16(scales + g * 16, 0xffff) : _mm512_setzero_ps();
        UNROLLED(int r = 0; r < 16; r++) {
            __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(found + g * 256 + r * 16));
            total[r] = _mm512_fmadd_ps(bits == 4 ? _mm512_mul_ps(sum, own) : sum, _mm512_set1_ps(by[g * 16 + r]), total[r]);
        }
    }
}

/* `count` groups of sixteen outputs with a tile of rows, of which `each` are there. While four groups are multiplied, those
 * before them are scaled. */
TILES INLINE void tile_of_groups(const int bits, long count, const int8_t *x, const float *by, const int8_t *codes,
                                 const bf16 *scales, float *y, long y_next, long each, int first) {
    static _Thread_local int32_t found[2][4 * 256] __attribute__((aligned(64)));
    __m512 total[16];
    UNROLLED(int r = 0; r < 16; r++) total[r] = first || r >= each ? _mm512_setzero_ps() : _mm512_loadu_ps(y + r * y_next);
    for (long g = 0; g < count + 4; g += 4) {
        if (g < count) four_groups(count - g, x + g * GROUP, codes + g * GROUP, found[g / 4 % 2]);
        if (g) scaled(bits, g <= count ? 4 : count - g + 4, found[(g / 4 + 1) % 2], by + (g - 4) * 16, scales + (g - 4) * 16, total);
    }
    UNROLLED(int r = 0; r < 16; r++)
        if (r < each) _mm512_storeu_ps(y + r * y_next, total[r]);
}

/* Some blocks of sixteen outputs, up to BLOCKS, with tiles of rows in eight bits: x (tiles, groups, 16, 32), by (tiles,
 * groups, 16). Of a tile `each` rows are there, whose outputs are y_next apart. */
TILES void zoo_tiles_of_codes(int bits, long groups, long blocks, const uint8_t *codes, const void *scales, long tiles, long each,
                              const int8_t *x, const float *by, float *y, long y_next) {
    static _Thread_local int8_t own[BLOCKS * GROUPS * GROUP] __attribute__((aligned(64)));
    for (long g = 0, here; g < groups; g += here) {
        here = groups - g < GROUPS ? groups - g : GROUPS;
        for (long b = 0; b < blocks; b++) signed_codes(bits, here, codes + (b * groups + g) * bits * 64, own + b * GROUPS * GROUP);
        __asm__ volatile("" : : "r"(own) : "memory");
        for (long t = 0; t < tiles; t++)
            for (long b = 0; b < blocks; b++) {
                const int8_t *rows = x + (t * groups + g) * GROUP, *lines = own + b * GROUPS * GROUP;
                const float *times = by + (t * groups + g) * 16;
                float *to = y + t * each * y_next + b * 16;
                if (bits == 4)
                    tile_of_groups(4, here, rows, times, lines, (const bf16 *)scales + (b * groups + g) * 16, to, y_next, each, g == 0);
                else
                    tile_of_groups(8, here, rows, times, lines, NULL, to, y_next, each, g == 0);
            }
    }
    if (bits == 8)
        for (long b = 0; b < blocks; b++) {
            __m512 scale = _mm512_loadu_ps((const float *)scales + b * 16);
            for (long r = 0; r < tiles * each; r++)
                _mm512_storeu_ps(y + r * y_next + b * 16, _mm512_mul_ps(_mm512_loadu_ps(y + r * y_next + b * 16), scale));
        }
}

#else

/* The compiler knows no tiles: nobody calls these. */
int zoo_tiles(void) { return 0; }
void zoo_panels_by_tiles(long rows, long inputs, long outputs, const bf16 *x, long x_next, const void *heads, const void *w,
                         const bf16 *bias, bf16 *y, long y_next, bf16 *scratch, int threads) {
    (void)rows, (void)inputs, (void)outputs, (void)x, (void)x_next, (void)heads, (void)w, (void)bias, (void)y, (void)y_next, (void)scratch, (void)threads;
}
void zoo_tiles_begin(int rows, int bytes) { (void)rows, (void)bytes; }
void zoo_tiles_end(void) {}
void zoo_tiles_of_codes(int bits, long groups, long blocks, const uint8_t *codes, const void *scales, long tiles, long each,
                        const int8_t *x, const float *by, float *y, long y_next) {
    (void)bits, (void)groups, (void)blocks, (void)codes, (void)scales, (void)tiles, (void)each, (void)x, (void)by, (void)y, (void)y_next;
}

#endif

#else

/* Another processor or compiler: nothing to offer. */
int zoo_tiles(void) { return 0; }

#endif
