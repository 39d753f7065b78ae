/* Mixtures of experts: what routers choose by, rows put in the order of the experts that were chosen for them, their products with each expert's
 * matrix, and weighted sums.
 *
 * Which experts these are is read from memory, so that a recorded step follows whatever a router chooses. Products are
 * those of panels.c, tiles.c and quantised.c: each chosen expert's matrix is read once for all of its rows.
 */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ZOO_PLAIN)

#include <immintrin.h>
#include <omp.h>

#include "numbers.h"
#include "products.h"

enum { DOT = 2, TILES = 3, BFLOAT16 = 1, PIECE = 512, SERIAL = 1 << 17 };

/* R rows with 16 / R experts; of those beyond the last of either, the last once more. */
AVX512 INLINE void some_logits(const int R, long rows, long experts, long inputs, const bf16 *x, long x_next, const bf16 *w, float *y,
                               long y_next) {
    __m512 sum[16];
    UNROLLED(int s = 0; s < 16; s++) sum[s] = _mm512_setzero_ps();
    for (long i = 0; i < inputs; i += 16) {
        __mmask16 part = part_of(inputs - i);
        __m512 v[4];
        UNROLLED(int r = 0; r < R; r++) v[r] = load16(x + (r < rows ? r : rows - 1) * x_next + i, part);
        UNROLLED(int e = 0; e < 16 / R; e++) {
            __m512 u = load16(w + (e < experts ? e : experts - 1) * inputs + i, part);
            UNROLLED(int r = 0; r < R; r++) sum[r * (16 / R) + e] = _mm512_fmadd_ps(u, v[r], sum[r * (16 / R) + e]);
        }
    }
    float found[16];
    _mm512_storeu_ps(found, lane_sums(sum));
    for (int r = 0; r < R && r < rows; r++)
        for (int e = 0; e < 16 / R && e < experts; e++) y[r * y_next + e] = found[r * (16 / R) + e];
}

/* y (rows, experts) = x w^T in float32. A row's sums are added up in an order that does not depend on the others. */
AVX512 void zoo_logits(long rows, long inputs, long experts, const bf16 *x, long x_next, const bf16 *w, float *y, int threads) {
    long tall = rows > 1 ? 4 : 1, wide = 16 / tall, lower = (rows + tall - 1) / tall, across = (experts + wide - 1) / wide;
    long worth = rows * inputs * experts / SERIAL + 1;
#pragma omp parallel for schedule(static) num_threads(worth < threads ? worth : threads)
    for (long piece = 0; piece < lower * across; piece++) {
        long r = piece % lower * tall, e = piece / lower * wide;
        const bf16 *own = x + r * x_next, *some = w + e * inputs;
        if (tall == 1)
            some_logits(1, 1, experts - e, inputs, own, x_next, some, y + r * experts + e, experts);
        else
            some_logits(4, rows - r, experts - e, inputs, own, x_next, some, y + r * experts + e, experts);
    }
}

/* Sorts `rows` times `chosen` choices by expert, those of one expert by row. Of each choice its place; of each place its row;
 * of each expert the place behind its last. Choices of none of the `experts` come last; ends has room for them. */
void zoo_order(long rows, long chosen, long experts, const int64_t *choices, int32_t *places, int32_t *from, int32_t *ends) {
    memset(ends, 0, (experts + 1) * sizeof(int32_t));
    for (int again = 0; again < 2; again++) {
        for (long n = 0; n < rows * chosen; n++) {
            long e = choices[n] >= 0 && choices[n] < experts ? choices[n] : experts;
            if (!again) {
                ends[e]++;
            } else {
                places[n] = ends[e]++;
                from[places[n]] = n / chosen;
            }
        }
        for (long e = 0, before = 0; !again && e <= experts; e++) {
            long count = ends[e];
            ends[e] = before, before += count;
        }
    }
}

/* Of bits 16 a matrix's panels, of bits 12 packed ones and their heads, else its codes and scales. */
typedef struct {
    void *values, *scales;
} matrix;

/* level: how whole products are computed (zoo_level), of which TILES takes more than `single` rows. */
static void product(int level, long single, int bits, long rows, long inputs, long outputs, const bf16 *x, long x_next,
                    const matrix *w, const bf16 *bias, bf16 *y, bf16 *room, int threads) {
    int tiled = level == TILES && rows > single;
    const void *heads = bits == 12 ? w->scales : NULL;
    if (bits < 12)
        zoo_quantised_product(tiled, bits, rows, inputs, outputs, x, x_next, w->values, w->scales, bias, y, BFLOAT16, room, threads);
    else if (tiled)
        zoo_panels_by_tiles(rows, inputs, outputs, x, x_next, heads, w->values, bias, y, outputs, room, threads);
    else if (level == DOT)
        zoo_panels_by_dots(rows, inputs, outputs, x, x_next, heads, w->values, bias, y, outputs, room, threads);
    else
        zoo_panels_by_multiply_adds(rows, inputs, outputs, x, x_next, heads, w->values, bias, y, outputs, threads);
}

/* y (places, outputs): each place's row times the matrix of its expert. from: the rows of x that places have, NULL for x in
 * their order. bias: (experts, outputs), or NULL. beside: room for the rows of one expert, room: for what a product needs. */
void zoo_experts(int level, long single, int bits, long experts, long inputs, long outputs, const bf16 *x, long x_next,
                 const int32_t *from, const int32_t *ends, const matrix *w, const bf16 *bias, bf16 *y, bf16 *beside, bf16 *room,
                 int threads) {
    for (long e = 0, place = 0; e < experts; place = ends[e++]) {
        long rows = ends[e] - place, next = x_next;
        const bf16 *own = x + (from && rows ? from[place] : place) * x_next;
        if (!rows) continue;
        if (from && rows > 1) {
            own = beside, next = inputs;
#pragma omp parallel for num_threads(rows * inputs / SERIAL + 1 < threads ? rows * inputs / SERIAL + 1 : threads)
            for (long r = 0; r < rows; r++) memcpy(beside + r * inputs, x + from[place + r] * x_next, inputs * sizeof(bf16));
        }
        product(level, single, bits, rows, inputs, outputs, own, next, w + e, bias ? bias + e * outputs : NULL, y + place * outputs,
                room, threads);
    }
}

/* Of each row the sum of what its chosen experts gave, times its weights, in the order of the choices; y stands as places
 * are. Choices of none of the `experts` are left out. */
AVX512 void zoo_weighted(long rows, long chosen, long width, long experts, const int32_t *places, const int32_t *ends,
                         const float *weights, const bf16 *y, bf16 *sums, int threads) {
    long end = ends[experts - 1];
    long pieces = (width + PIECE - 1) / PIECE, worth = rows * chosen * width / SERIAL + 1;
#pragma omp parallel for schedule(static) num_threads(worth < threads ? worth : threads)
    for (long piece = 0; piece < rows * pieces; piece++) {
        long r = piece / pieces, first = piece % pieces * PIECE, last = first + PIECE < width ? first + PIECE : width;
        for (long i = first; i < last; i += 16) {
            __mmask16 part = part_of(last - i);
            __m512 sum = _mm512_setzero_ps();
            for (long k = r * chosen; k < (r + 1) * chosen; k++)
                if (places[k] < end)
                    sum = _mm512_fmadd_ps(load16(y + places[k] * width + i, part), _mm512_set1_ps(weights[k]), sum);
            store16(sums + r * width + i, part, sum);
        }
    }
}

#endif
