/* State-space mixers, for x86-64 with AVX-512: the convolution over time, both scans and the gated norm.
 *
 * A step has rows of several sequences, one or more of each. `places` says of each sequence where its state lies (an
 * address), which of the step's rows is its first, how many it has, and whether nothing came before them, when what
 * lies there is not read. `offset` bytes are added to every address. States move on where they lie: one row reads and
 * writes a state once, many rows keep a piece of it in the nearest cache.
 *
 * wide: whether rows and what they are multiplied with are float32, else bfloat16; a `next` is the distance of two rows.
 * States of scans, decays and sums are float32. Every row is computed as if it were alone, so that chunks of a
 * sequence give, bit by bit, what single rows give, whatever runs beside them and on however many threads.
 */

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"

enum { LANES = 16, CHANNELS = 128, TAPS = 8, SIZE = 256, STEPS = 16, WIDE = 64, SERIAL = 1 << 15 };

typedef struct {
    long address, first, rows, begins;
} place;

INLINE float number(int wide, const void *x, long i) { return wide ? ((const float *)x)[i] : widened(((const bf16 *)x)[i]); }

AVX512 INLINE __m512 numbers(int wide, const void *x, long i, __mmask16 part) {
    return wide ? _mm512_maskz_loadu_ps(part, (const float *)x + i) : load16((const bf16 *)x + i, part);
}

AVX512 INLINE void keep(int wide, void *x, long i, __mmask16 part, __m512 value) {
    if (!wide)
        store16((bf16 *)x + i, part, value);
    else
        _mm512_mask_storeu_ps((float *)x + i, part, value);
}

AVX512 INLINE __m512 silu(__m512 x) {
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* log(1 + e^x) = max(x, 0) + log(1 + z) with z = e^-|x|, and log(1 + z) = 2 artanh(z / (2 + z)), whose series has
 * powers of at most 1/9. */
AVX512 INLINE __m512 softplus(__m512 x) {
    __m512 z = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    __m512 s = _mm512_div_ps(z, _mm512_add_ps(_mm512_set1_ps(2), z)), square = _mm512_mul_ps(s, s);
    __m512 sum = _mm512_set1_ps(2.f / 15);
    const float factors[] = {2.f / 13, 2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3, 2};
    UNROLLED(int i = 0; i < 7; i++) sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(factors[i]));
    return _mm512_fmadd_ps(sum, s, _mm512_max_ps(_mm512_setzero_ps(), x));
}

INLINE int threads_for(long work, int threads) {
    long worth = work / SERIAL + 1;
    return threads < worth ? threads : (int)worth;
}

static long rows_of(long sequences, const place *places) {
    long rows = 0;
    for (long s = 0; s < sequences; s++) rows += places[s].rows;
    return rows;
}

/* At most CHANNELS channels of one sequence. The inputs that a row sees stand in a ring, the one of row t at t + taps - 1.
 * kept: (taps - 1, channels), the inputs before the first row, the oldest first. */
AVX512 INLINE void convolve(int wide, long taps, long channels, long count, const place *at, void *kept, const char *x,
                            long x_next, const char *weight, const char *bias, char *y) {
    float ring[TAPS][CHANNELS], factors[TAPS][CHANNELS], added[CHANNELS];
    long each = wide ? 4 : 2;
    for (long i = 0; i < count; i++) {
        for (long k = 0; k < taps; k++) factors[k][i] = number(wide, weight, i * taps + k);
        for (long k = 0; k + 1 < taps; k++) ring[k][i] = at->begins ? 0 : number(wide, kept, k * channels + i);
        added[i] = bias ? number(wide, bias, i) : 0;
    }
    for (long t = 0; t < at->rows; t++) {
        const float *seen[TAPS];
        float *newest = ring[(t + taps - 1) % taps];
        const char *from = x + (at->first + t) * x_next * each;
        char *to = y + (at->first + t) * channels * each;
        for (long k = 0; k < taps; k++) seen[k] = ring[(t + k) % taps];
        for (long i = 0; i < count; i += LANES) {
            __mmask16 part = part_of(count - i);
            _mm512_storeu_ps(newest + i, numbers(wide, from, i, part));
            __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(seen[0] + i), _mm512_loadu_ps(factors[0] + i));
            for (long k = 1; k < taps; k++)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(seen[k] + i), _mm512_loadu_ps(factors[k] + i), sum);
            keep(wide, to, i, part, silu(_mm512_add_ps(sum, _mm512_loadu_ps(added + i))));
        }
    }
    for (long k = 0; k + 1 < taps; k++)
        for (long i = 0; i < count; i += LANES)
            keep(wide, kept, k * channels + i, part_of(count - i), _mm512_loadu_ps(ring[(at->rows + k) % taps] + i));
}

/* silu(convolution) of (rows, channels); the states are the last taps - 1 inputs. weight: (channels, taps). */
AVX512 void zoo_convolution(int wide, long sequences, const place *places, long offset, long channels, long taps, const char *x,
                            long x_next, const char *weight, const char *bias, char *y, int threads) {
    long each = wide ? 4 : 2, blocks = (channels + CHANNELS - 1) / CHANNELS;
    threads = threads_for(rows_of(sequences, places) * channels * 4, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long work = 0; work < sequences * blocks; work++) {
        const place *at = places + work / blocks;
        long i = work % blocks * CHANNELS, count = channels - i < CHANNELS ? channels - i : CHANNELS;
        void *kept = (char *)at->address + offset + i * each;
        const char *added = bias ? bias + i * each : NULL, *from = x + i * each, *by = weight + i * taps * each;
        if (wide)
            convolve(1, taps, channels, count, at, kept, from, x_next, by, added, y + i * each);
        else if (taps == 4)
            convolve(0, 4, channels, count, at, kept, from, x_next, by, added, y + i * each);
        else
            convolve(0, taps, channels, count, at, kept, from, x_next, by, added, y + i * each);
    }
}

/* What a row writes with and reads with, as float32. */
AVX512 INLINE void widen(int wide, long size, const void *x, float *y) {
    for (long i = 0; i < size; i += LANES) _mm512_storeu_ps(y + i, numbers(wide, x, i, part_of(size - i)));
}

/* Some rows of one head: what they write and read with, how much of the state each keeps, and the inputs of its channels;
 * then the products of what each reads with and of the state, lane by lane, for LANES channels. */
typedef struct {
    float write[STEPS * SIZE], read[STEPS * SIZE], decays[STEPS], inputs[STEPS][LANES];
    __m512 sums[STEPS][LANES];
} head_rows;

/* state = decay state + input write, and the products with read, of `count` channels whose states of `vectors` LANES stay
 * in registers over all rows. */
AVX512 INLINE void pass(int count, int vectors, long rows, head_rows *o, float *state, long r) {
    __m512 kept[8][16];
    UNROLLED(int n = 0; n < count; n++)
        UNROLLED(int v = 0; v < vectors; v++) kept[n][v] = _mm512_loadu_ps(state + (n * vectors + v) * LANES);
    for (long t = 0; t < rows; t++) {
        const float *write = o->write + t * vectors * LANES, *read = o->read + t * vectors * LANES;
        __m512 decay = _mm512_set1_ps(o->decays[t]), in[8], sums[8];
        UNROLLED(int n = 0; n < count; n++) in[n] = _mm512_set1_ps(o->inputs[t][r + n]), sums[n] = _mm512_setzero_ps();
        UNROLLED(int v = 0; v < vectors; v++) {
            __m512 b = _mm512_loadu_ps(write + v * LANES), c = _mm512_loadu_ps(read + v * LANES);
            UNROLLED(int n = 0; n < count; n++) {
                kept[n][v] = _mm512_fmadd_ps(kept[n][v], decay, _mm512_mul_ps(in[n], b));
                sums[n] = _mm512_fmadd_ps(kept[n][v], c, sums[n]);
            }
        }
        UNROLLED(int n = 0; n < count; n++) o->sums[t][r + n] = sums[n];
    }
    UNROLLED(int n = 0; n < count; n++)
        UNROLLED(int v = 0; v < vectors; v++) _mm512_storeu_ps(state + (n * vectors + v) * LANES, kept[n][v]);
}

/* The same of one channel with a state of any size. */
AVX512 static void pass_any(long size, long rows, head_rows *o, float *state, long r) {
    long vectors = (size + LANES - 1) / LANES;
    for (long t = 0; t < rows; t++) {
        __m512 decay = _mm512_set1_ps(o->decays[t]), in = _mm512_set1_ps(o->inputs[t][r]), sum = _mm512_setzero_ps();
        for (long v = 0, at = t * vectors * LANES; v < vectors; v++, at += LANES) {
            __mmask16 part = part_of(size - v * LANES);
            __m512 added = _mm512_mul_ps(in, _mm512_loadu_ps(o->write + at));
            __m512 kept = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(part, state + v * LANES), decay, added);
            _mm512_mask_storeu_ps(state + v * LANES, part, kept);
            sum = _mm512_fmadd_ps(kept, _mm512_loadu_ps(o->read + at), sum);
        }
        o->sums[t][r] = sum;
    }
}

#define PASSES(COUNT, VECTORS)                                                                                           \
    AVX512 static long pass_##VECTORS(long count, long rows, head_rows *o, float *state) {                               \
        long r = 0;                                                                                                      \
        for (; r + COUNT <= count; r += COUNT) pass(COUNT, VECTORS, rows, o, state + r * VECTORS * LANES, r);            \
        return r;                                                                                                        \
    }

PASSES(8, 1)
PASSES(4, 4)
PASSES(2, 8)
PASSES(1, 16)

/* The same of `count` channels, at most LANES. */
AVX512 static void passes(long count, long size, long rows, head_rows *o, float *state) {
    long r = size == 128  ? pass_8(count, rows, o, state)
             : size == 64 ? pass_4(count, rows, o, state)
             : size == 256 ? pass_16(count, rows, o, state)
             : size == 16  ? pass_1(count, rows, o, state)
                           : 0;
    for (; r < count; r++) pass_any(size, rows, o, state + r * size, r);
}

typedef struct {
    long heads, groups, width, size;
    const char *x, *dt, *b, *c;
    long x_next, dt_next, b_next, c_next;
    const float *a_log, *d, *dt_bias;
    float *y;
} ssd_rows;

/* At most WIDE channels, from i on, of one head of one sequence. */
AVX512 INLINE void ssd(int wide, const ssd_rows *o, const place *at, float *state, long h, long i) {
    long end = o->width - i < WIDE ? o->width : i + WIDE, each = wide ? 4 : 2, g = h / (o->heads / o->groups);
    long apart = (o->size + LANES - 1) / LANES * LANES;
    __m512 a = _mm512_sub_ps(_mm512_setzero_ps(), exponential(_mm512_set1_ps(o->a_log[h])));
    float raw[STEPS] = {0}, steps[STEPS];
    head_rows rows __attribute__((aligned(64)));
    if (at->begins) memset(state, 0, (end - i) * o->size * sizeof(float));
    for (long t = 0, count; t < at->rows; t += count) {
        count = at->rows - t < STEPS ? at->rows - t : STEPS;
        long first = at->first + t;
        for (long n = 0; n < count; n++) {
            raw[n] = number(wide, o->dt, (first + n) * o->dt_next + h);
            widen(wide, o->size, o->b + ((first + n) * o->b_next + g * o->size) * each, rows.write + n * apart);
            widen(wide, o->size, o->c + ((first + n) * o->c_next + g * o->size) * each, rows.read + n * apart);
        }
        __m512 dt = softplus(_mm512_add_ps(_mm512_loadu_ps(raw), _mm512_set1_ps(o->dt_bias[h])));
        _mm512_storeu_ps(steps, dt);
        _mm512_storeu_ps(rows.decays, exponential(_mm512_mul_ps(dt, a)));
        for (long j = i; j < end; j += LANES) {
            long lanes = end - j < LANES ? end - j : LANES, from = h * o->width + j;
            __mmask16 part = part_of(lanes);
            for (long n = 0; n < count; n++) {
                __m512 x = numbers(wide, o->x, (first + n) * o->x_next + from, part);
                _mm512_storeu_ps(rows.inputs[n], _mm512_mul_ps(x, _mm512_set1_ps(steps[n])));
                if (lanes < LANES) memset(rows.sums[n], 0, sizeof rows.sums[n]);
            }
            passes(lanes, o->size, count, &rows, state + (j - i) * o->size);
            for (long n = 0; n < count; n++) {
                __m512 x = numbers(wide, o->x, (first + n) * o->x_next + from, part);
                _mm512_mask_storeu_ps(o->y + (first + n) * o->heads * o->width + from, part,
                                      _mm512_fmadd_ps(x, _mm512_set1_ps(o->d[h]), lane_sums(rows.sums[n])));
            }
        }
    }
}

/* The scan with one decay for each head: y = c . state + d x in float32, with steps softplus(dt + dt_bias) and decays
 * exp(-exp(a_log) step). x: (rows, heads, width), dt: (rows, heads), b and c: (rows, groups, size), states: (heads,
 * width, size). */
AVX512 void zoo_ssd(int wide, long sequences, const place *places, long offset, long heads, long groups, long width, long size,
                    const char *x, long x_next, const char *dt, long dt_next, const char *b, long b_next, const char *c,
                    long c_next, const float *a_log, const float *d, const float *dt_bias, float *y, int threads) {
    const ssd_rows o = {heads, groups, width, size, x, dt, b, c, x_next, dt_next, b_next, c_next, a_log, d, dt_bias, y};
    long blocks = (width + WIDE - 1) / WIDE;
    threads = threads_for(rows_of(sequences, places) * heads * width * size, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long work = 0; work < sequences * heads * blocks; work++) {
        const place *at = places + work / (heads * blocks);
        long h = work / blocks % heads, i = work % blocks * WIDE;
        float *state = (float *)(at->address + offset) + (h * width + i) * size;
        if (wide)
            ssd(1, &o, at, state, h, i);
        else
            ssd(0, &o, at, state, h, i);
    }
}

typedef struct {
    long channels, size;
    const char *x, *dt, *b, *c, *z;
    long x_next, dt_next, b_next, c_next, z_next;
    const float *a_log, *d, *dt_bias;
    char *y;
} selective_rows;

/* One channel: as `move`, with a decay for each element of the state. */
AVX512 INLINE __m512 decay_and_move(long size, float *state, const float *a, __m512 step, __m512 in, const float *b, const float *c) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < size; i += LANES) {
        __m512 decay = exponential(_mm512_mul_ps(step, _mm512_loadu_ps(a + i)));
        __m512 added = _mm512_mul_ps(in, _mm512_loadu_ps(b + i));
        __m512 kept = _mm512_fmadd_ps(_mm512_loadu_ps(state + i), decay, added);
        _mm512_storeu_ps(state + i, kept);
        sum = _mm512_fmadd_ps(kept, _mm512_loadu_ps(c + i), sum);
    }
    return sum;
}

/* At most LANES channels, from i on, of one sequence. Their states stay here between the first row and the last. */
AVX512 INLINE void selective(int wide, const selective_rows *o, const place *at, float *state, long i) {
    long count = o->channels - i < LANES ? o->channels - i : LANES, each = wide ? 4 : 2, apart = (o->size + 15) / LANES * LANES;
    __mmask16 there = part_of(count);
    float a[LANES * SIZE], here[LANES * SIZE], write[SIZE], read[SIZE], steps[LANES], inputs[LANES];
    __m512 sums[LANES], zero = _mm512_setzero_ps();
    UNROLLED(int r = 0; r < LANES; r++) sums[r] = zero;
    for (long r = 0; r < count; r++)
        for (long n = 0; n < o->size; n += LANES) {
            __mmask16 part = part_of(o->size - n);
            __m512 logs = _mm512_maskz_loadu_ps(part, o->a_log + (i + r) * o->size + n);
            _mm512_storeu_ps(a + r * apart + n, _mm512_sub_ps(zero, exponential(logs)));
            __m512 kept = at->begins ? zero : _mm512_maskz_loadu_ps(part, state + r * o->size + n);
            _mm512_storeu_ps(here + r * apart + n, kept);
        }
    for (long t = 0; t < at->rows; t++) {
        long row = at->first + t;
        __m512 dt = _mm512_add_ps(numbers(wide, o->dt, row * o->dt_next + i, there), _mm512_maskz_loadu_ps(there, o->dt_bias + i));
        __m512 x = numbers(wide, o->x, row * o->x_next + i, there), z = numbers(wide, o->z, row * o->z_next + i, there);
        dt = softplus(dt);
        _mm512_storeu_ps(steps, dt);
        _mm512_storeu_ps(inputs, _mm512_mul_ps(dt, x));
        widen(wide, o->size, o->b + row * o->b_next * each, write);
        widen(wide, o->size, o->c + row * o->c_next * each, read);
        for (long r = 0; r < count; r++)
            sums[r] = decay_and_move(o->size, here + r * apart, a + r * apart, _mm512_set1_ps(steps[r]),
                                     _mm512_set1_ps(inputs[r]), write, read);
        __m512 y = _mm512_fmadd_ps(x, _mm512_maskz_loadu_ps(there, o->d + i), lane_sums(sums));
        keep(wide, o->y, row * o->channels + i, there, _mm512_mul_ps(y, silu(z)));
    }
    for (long r = 0; r < count; r++)
        for (long n = 0; n < o->size; n += LANES)
            _mm512_mask_storeu_ps(state + r * o->size + n, part_of(o->size - n), _mm512_loadu_ps(here + r * apart + n));
}

/* The scan with decays for each element of each channel's state, and its gate: (c . state + d x) silu(z), with steps
 * softplus(dt + dt_bias) and decays exp(-exp(a_log) step). x, dt, z: (rows, channels), b and c: (rows, size), a_log and
 * states: (channels, size). */
AVX512 void zoo_selective(int wide, long sequences, const place *places, long offset, long channels, long size, const char *x,
                          long x_next, const char *dt, long dt_next, const char *b, long b_next, const char *c, long c_next,
                          const char *z, long z_next, const float *a_log, const float *d, const float *dt_bias, char *y,
                          int threads) {
    const selective_rows o = {channels, size, x, dt, b, c, z, x_next, dt_next, b_next, c_next, z_next, a_log, d, dt_bias, y};
    long blocks = (channels + LANES - 1) / LANES;
    threads = threads_for(rows_of(sequences, places) * channels * size * 4, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long work = 0; work < sequences * blocks; work++) {
        const place *at = places + work / blocks;
        long i = work % blocks * LANES;
        float *state = (float *)(at->address + offset) + i * size;
        if (wide)
            selective(1, &o, at, state, i);
        else
            selective(0, &o, at, state, i);
    }
}

AVX512 INLINE void gate_and_norm(int wide, long width, float *y, const void *z, const void *weight, float eps, void *to) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < width; i += LANES) {
        __mmask16 part = part_of(width - i);
        __m512 gated = _mm512_mul_ps(_mm512_maskz_loadu_ps(part, y + i), silu(numbers(wide, z, i, part)));
        _mm512_mask_storeu_ps(y + i, part, gated);
        squares = _mm512_fmadd_ps(gated, gated, squares);
    }
    __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
    for (long i = 0; i < width; i += LANES) {
        __mmask16 part = part_of(width - i);
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(part, y + i), scale);
        keep(wide, to, i, part, _mm512_mul_ps(scaled, numbers(wide, weight, i, part)));
    }
}

/* y silu(z) / sqrt(mean of its squares + eps) weight, of groups of `width` channels. y: float32 without gaps, which is
 * used up; z at any distances. */
AVX512 void zoo_gated_norm(int wide, long rows, long groups, long width, float *y, const char *z, long z_next, const char *weight,
                           float eps, char *to, int threads) {
    long each = wide ? 4 : 2;
    threads = threads_for(rows * groups * width * 4, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long work = 0; work < rows * groups; work++) {
        long row = work / groups, i = work % groups * width, at = row * groups * width + i;
        if (wide)
            gate_and_norm(1, width, y + at, z + (row * z_next + i) * each, weight + i * each, eps, to + at * each);
        else
            gate_and_norm(0, width, y + at, z + (row * z_next + i) * each, weight + i * each, eps, to + at * each);
    }
}

#endif
