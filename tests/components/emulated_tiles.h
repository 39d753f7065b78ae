/* The tile operations of Intel's processors in plain C, for tests of tiles.c on any processor with AVX-512.
 *
 * Written from the operation sections of the Software Developer's Manual. What a processor would answer with a fault, such
 * as tiles of shapes that do not fit or without a configuration, is counted. */

#include <string.h>

static _Thread_local struct {
    int configured, bytes[8], rows[8];
    unsigned char data[8][16][64];
} tile_state;

static int tile_faults, tile_threads, tile_products;

int zoo_emulated(int which) {
    int *count[] = {&tile_faults, &tile_threads, &tile_products};
    return __atomic_load_n(count[which], __ATOMIC_SEQ_CST);
}

static void tile_counted(int *what, int more) { __atomic_fetch_add(what, more, __ATOMIC_SEQ_CST); }
static void tile_needed(int fine) { tile_counted(&tile_faults, !fine); }

int zoo_tiles(void) { return 3; }

static void tile_loadconfig(const void *from) {
    const unsigned char *bytes = from;
    tile_needed(bytes[0] == 1);
    for (int i = 1; i < 16; i++) tile_needed(bytes[i] == 0);
    for (int i = 32; i < 48; i++) tile_needed(bytes[i] == 0);
    for (int i = 56; i < 64; i++) tile_needed(bytes[i] == 0);
    for (int t = 0; t < 8; t++) {
        tile_state.bytes[t] = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
        tile_state.rows[t] = bytes[48 + t];
        tile_needed(tile_state.bytes[t] > 0 && tile_state.bytes[t] <= 64 && tile_state.rows[t] > 0 && tile_state.rows[t] <= 16);
    }
    memset(tile_state.data, 0, sizeof tile_state.data);
    tile_counted(&tile_threads, !tile_state.configured);
    tile_state.configured = 1;
}

static void tile_release(void) {
    tile_needed(tile_state.configured);
    tile_counted(&tile_threads, -tile_state.configured);
    tile_state.configured = 0;
}

static void tile_zero(int t) {
    tile_needed(tile_state.configured);
    memset(tile_state.data[t], 0, sizeof tile_state.data[t]);
}

static void tile_loadd(int t, const void *from, long stride) {
    tile_zero(t);
    for (int r = 0; r < tile_state.rows[t]; r++)
        memcpy(tile_state.data[t][r], (const char *)from + r * stride, tile_state.bytes[t]);
}

static void tile_stored(int t, void *to, long stride) {
    tile_needed(tile_state.configured);
    for (int r = 0; r < tile_state.rows[t]; r++) memcpy((char *)to + r * stride, tile_state.data[t][r], tile_state.bytes[t]);
}

static void tile_fits(int c, int a, int b) {
    tile_needed(tile_state.configured && a != b && a != c && b != c);
    tile_needed(tile_state.rows[c] == tile_state.rows[a] && tile_state.bytes[c] == tile_state.bytes[b]);
    tile_needed(tile_state.bytes[a] / 4 == tile_state.rows[b]);
    tile_counted(&tile_products, 1);
}

static float tile_number(int t, int row, int place) {
    unsigned short half;
    unsigned wide;
    float number;
    memcpy(&half, tile_state.data[t][row] + 2 * place, 2);
    wide = (unsigned)half << 16;
    memcpy(&number, &wide, 4);
    return number;
}

__attribute__((noinline, target("fma"))) static float tile_fma(float a, float b, float c) {
    return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
}

__attribute__((noinline)) static float tile_sum(float a, float b) { return _mm_cvtss_f32(_mm_add_ss(_mm_set_ss(a), _mm_set_ss(b))); }

static void tile_dpbf16ps(int c, int a, int b) {
    unsigned old = _mm_getcsr();
    tile_fits(c, a, b);
    _mm_setcsr(0x9fc0); /* nearest, numbers below the normal ones are zero before and after, no exceptions */
    for (int m = 0; m < tile_state.rows[c]; m++)
        for (int n = 0; n < tile_state.bytes[c] / 4; n++) {
            float pairs[2] = {0, 0}, sum;
            for (int k = 0; k < tile_state.bytes[a] / 4; k++)
                for (int i = 0; i < 2; i++)
                    pairs[i] = tile_fma(tile_number(a, m, 2 * k + i), tile_number(b, k, 2 * n + i), pairs[i]);
            memcpy(&sum, tile_state.data[c][m] + 4 * n, 4);
            sum = tile_sum(sum, tile_sum(pairs[0], pairs[1]));
            memcpy(tile_state.data[c][m] + 4 * n, &sum, 4);
        }
    _mm_setcsr(old);
}

static void tile_dpbssd(int c, int a, int b) {
    tile_fits(c, a, b);
    for (int m = 0; m < tile_state.rows[c]; m++)
        for (int n = 0; n < tile_state.bytes[c] / 4; n++) {
            int sum;
            memcpy(&sum, tile_state.data[c][m] + 4 * n, 4);
            for (int k = 0; k < tile_state.bytes[a] / 4; k++)
                for (int i = 0; i < 4; i++)
                    sum += (signed char)tile_state.data[a][m][4 * k + i] * (signed char)tile_state.data[b][k][4 * n + i];
            memcpy(tile_state.data[c][m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(from) tile_loadconfig(from)
#define _tile_release() tile_release()
#define _tile_zero(t) tile_zero(t)
#define _tile_loadd(t, from, stride) tile_loadd(t, from, stride)
#define _tile_stored(t, to, stride) tile_stored(t, to, stride)
#define _tile_dpbf16ps(c, a, b) tile_dpbf16ps(c, a, b)
#define _tile_dpbssd(c, a, b) tile_dpbssd(c, a, b)
