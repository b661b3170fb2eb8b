/* Products with a packed matrix, which are as fast as it is read, and the functions between products. The terms are
 * explained in vectors.h. */

#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

/* --- y = x W^T, x (M, K), y (M, N), both float or both bfloat16 -------------------------------------------------------- */

INLINE void multiply_tile(int rows, const char *x, const char *w, char *y, long K, long N, long count, int bf16) {
    floats sum[FLOAT_ROWS][VECTORS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECTORS; v++) sum[m][v] = (floats){0};
    multiply(sum, rows, x, w, K * (bf16 ? 2 : 4) / 4, bf16);
    write_rows(sum, rows, y, N, count, bf16);
}

INLINE void block_product(long p, const char *x, const char *w, char *y, long M, long N, long K, int bf16) {
    const long size = bf16 ? 2 : 4, count = count_left(p * BLOCK, BLOCK, N);
    const char *block = w + p * BLOCK * K * size;
    for (long m = 0; m < M; m += FLOAT_ROWS) {
        const char *rows = x + m * K * size;
        char *out = y + (m * N + p * BLOCK) * size;
        switch (count_left(m, FLOAT_ROWS, M)) {  /* each number of rows has code of its own, with its sums in registers */
            case 1: multiply_tile(1, rows, block, out, K, N, count, bf16); break;
            case 2: multiply_tile(2, rows, block, out, K, N, count, bf16); break;
            case 3: multiply_tile(3, rows, block, out, K, N, count, bf16); break;
            case 4: multiply_tile(4, rows, block, out, K, N, count, bf16); break;
            case 5: multiply_tile(5, rows, block, out, K, N, count, bf16); break;
            default: multiply_tile(6, rows, block, out, K, N, count, bf16);
        }
    }
}

#ifdef __AMX_BF16__
/* --- the same by a matrix unit, which multiplies tiles of 16 x 32 by 32 x 16 numbers -------------------------------------
 *
 * A block of W is made of such tiles as it is: 16 steps are 16 rows of 64 bytes, 256 bytes apart. */

enum { TILE = 16, PERMISSION = 0x1023, TILE_DATA = 18 };

/* Whether Linux lets this process use the unit's registers. */
static int has_matrix_unit(void) {
    static int known;  /* 0: not asked yet; threads that ask at the same time get the same answer */
    int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!answer) {
        answer = syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) == 0 ? 1 : -1;
        __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
    }
    return answer > 0;
}

/* Give the tiles their rows, for so many rows of x, 32 at most. Up to 16: tiles 0 to 3 are sums, 4 is x's, 5 is W's. More:
 * 0 and 1 are sums of the first 16, 2 and 3 those of the others, 4 and 5 are x's, 6 and 7 W's. */
static void shape_tiles(long rows) {
    struct { uint8_t palette, start, zeros[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (long t = 0; t < 8; t++) {
        const int is_other = rows > TILE && (t == 2 || t == 3 || t == 5), is_weight = t > (rows > TILE ? 5 : 4);
        shape.bytes[t] = 64;
        shape.rows[t] = (uint8_t)(is_weight ? TILE : is_other ? rows - TILE : count_left(0, TILE, rows));
    }
    __asm__ volatile("" : : "r"(&shape) : "memory");  /* older compilers think that only the first 8 bytes are read */
    _tile_loadconfig(&shape);
}

/* Ask for the 16 steps of W that come some kilobytes later. */
INLINE void prefetch_tiles(const char *w) {
    UNROLL for (int k = 0; k < TILE; k++) prefetch_step(w + k * BLOCK * 4, 0, VECTORS);
}

INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums (up to 16, 64) of rows of x and a block of W. Both have `steps` steps. */
INLINE void multiply_few(const char *x, const char *w, float *sums, long steps) {
    const long stride = steps * 4, next = BLOCK * 4;
    zero_sums();
#define COLUMNS(v) do { _tile_loadd(5, w + 64 * v, next); _tile_dpbf16ps(v, 4, 5); } while (0)
    for (long k = 0; k < steps; k += TILE, x += TILE * 4, w += TILE * next) {
        prefetch_tiles(w);
        _tile_loadd(4, x, stride);
        COLUMNS(0);
        COLUMNS(1);
        COLUMNS(2);
        COLUMNS(3);
    }
    _tile_stored(0, sums, BLOCK * 4);
    _tile_stored(1, sums + LANES, BLOCK * 4);
    _tile_stored(2, sums + 2 * LANES, BLOCK * 4);
    _tile_stored(3, sums + 3 * LANES, BLOCK * 4);
}

/* Sums (17 to 32, 32) of rows of x and half a block of W, to a part of `sums` (32, 64). */
INLINE void multiply_many(const char *x, const char *w, float *sums, long steps) {
    const long stride = steps * 4, next = BLOCK * 4;
    zero_sums();
    for (long k = 0; k < steps; k += TILE, x += TILE * 4, w += TILE * next) {
        _tile_loadd(4, x, stride);
        _tile_loadd(5, x + TILE * stride, stride);
        _tile_loadd(6, w, next);
        _tile_loadd(7, w + 64, next);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, BLOCK * 4);
    _tile_stored(1, sums + LANES, BLOCK * 4);
    _tile_stored(2, sums + TILE * BLOCK, BLOCK * 4);
    _tile_stored(3, sums + TILE * BLOCK + LANES, BLOCK * 4);
}

static int product_by_tiles(const char *x, const char *w, char *y, long M, long N, long K) {
    floats sums[2 * TILE][VECTORS];
    long shaped = 0;
#pragma omp for schedule(dynamic, 1) nowait
    for (long p = 0; p < (N + BLOCK - 1) / BLOCK; p++) {
        const char *block = w + p * BLOCK * K * 2;
        for (long m = 0; m < M; m += 2 * TILE) {
            const long rows = count_left(m, 2 * TILE, M);
            if (rows != shaped) shape_tiles(shaped = rows);
            if (rows <= TILE) multiply_few(x + m * K * 2, block, (float *)sums, K / 2);
            else for (int half = 0; half < 2; half++)
                multiply_many(x + m * K * 2, block + half * 128, (float *)sums + half * BLOCK / 2, K / 2);
            write_rows(sums, (int)rows, y + (m * N + p * BLOCK) * 2, N, count_left(p * BLOCK, BLOCK, N), 1);
        }
    }
    if (shaped) _tile_release();
    return 1;
}
#endif

INLINE int product(const char *x, const char *w, char *y, long M, long N, long K, int bf16) {
#ifdef __AMX_BF16__
    if (bf16 && K % (2 * TILE) == 0 && has_matrix_unit()) return product_by_tiles(x, w, y, M, N, K);
#endif
#pragma omp for schedule(dynamic, 1) nowait
    for (long p = 0; p < (N + BLOCK - 1) / BLOCK; p++) block_product(p, x, w, y, M, N, K, bf16);
    return 1;
}

/* x, w, y, M, N, K */
#define PRODUCT(name, bf16) KERNEL(name) { return product(a[0].at, a[1].at, a[2].at, a[3].n, a[4].n, a[5].n, bf16); }
PRODUCT(product_float, 0)
PRODUCT(product_bf16, 1)

/* --- packing N rows of `steps` times 4 bytes each; rows past N are zeros ----------------------------------------------- */

/* source, target, N, steps */
KERNEL(pack) {
    const loose_word *source = a[0].at;
    uint32_t *target = a[1].at;
    const long N = a[2].n, steps = a[3].n;
#pragma omp for nowait
    for (long p = 0; p < (N + BLOCK - 1) / BLOCK; p++)
        pack_block(source + p * BLOCK * steps, target + p * BLOCK * steps, count_left(p * BLOCK, BLOCK, N), steps);
    return 1;
}

/* --- rows of the embedding --------------------------------------------------------------------------------------------- */

/* Row n of a packed matrix, to y (K). */
INLINE void unpack_row(const char *w, long n, char *y, long K, int bf16) {
    const long size = bf16 ? 2 : 4, together = 4 / size;
    const char *block = w + n / BLOCK * BLOCK * K * size;
    for (long k = 0; k < K / together; k++) memcpy(y + k * 4, block + (k * BLOCK + n % BLOCK) * 4, 4);
}

/* y (M, K): the rows of W (N, K), packed or plain, that tokens (M) stand for, of which the first is token `first`; zeros
 * for those that W doesn't have. */
INLINE int embed(const int64_t *tokens, const char *w, char *y, long M, long N, long K, long first, long packed, int bf16) {
    const long size = bf16 ? 2 : 4;
#pragma omp for nowait
    for (long m = 0; m < M; m++) {
        const long n = tokens[m] - first;
        if (n < 0 || n >= N) memset(y + m * K * size, 0, (size_t)(K * size));
        else if (packed) unpack_row(w, n, y + m * K * size, K, bf16);
        else memcpy(y + m * K * size, w + n * K * size, (size_t)(K * size));
    }
    return 1;
}

/* tokens, w, y, M, N, K, first, packed */
#define EMBED(name, bf16) \
    KERNEL(name) { return embed(a[0].at, a[1].at, a[2].at, a[3].n, a[4].n, a[5].n, a[6].n, a[7].n, bf16); }
EMBED(embed_float, 0)
EMBED(embed_bf16, 1)

/* --- between the products: numbers are rounded to their dtype wherever the plain network rounds them ------------------- */

INLINE float round_to_dtype(float x, int bf16) { return bf16 ? widen(narrow(x)) : x; }

INLINE int rms_norm(const char *x, const char *weight, char *y, long M, long D, double eps, int bf16) {
    const long size = bf16 ? 2 : 4;
#pragma omp for nowait
    for (long m = 0; m < M; m++) {
        const char *in = x + m * D * size;
        char *out = y + m * D * size;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long d = 0; d < D; d++) squares += get(in, d, bf16) * get(in, d, bf16);
        const float scale = 1 / __builtin_sqrtf(squares / (float)D + (float)eps);
        for (long d = 0; d < D; d++)
            put(out, d, bf16, round_to_dtype(get(in, d, bf16) * scale, bf16) * get(weight, d, bf16));
    }
    return 1;
}

INLINE floats swiglu_vector(floats gate, floats up, int bf16) {
    const floats e = exponential(max_of(gate, -gate) * -1.0f), one = (floats){0} + 1;
    const floats silu = gate * (choose(gate >= 0, one, e) / (one + e));
    return (bf16 ? widen_vector(narrow_vector(silu)) : silu) * up;
}

INLINE floats add_vectors(floats x, floats y, int bf16) { (void)bf16; return x + y; }

/* What a function makes of two vectors, of `count` numbers of x and z, to y. The last vector may be a part of one. */
#define BY_VECTORS(function, x, z, y, count, bf16) do { \
    const long size = bf16 ? 2 : 4, whole = (count) / LANES; \
    _Pragma("omp for nowait") \
    for (long i = 0; i < (whole * LANES < (count) ? whole + 1 : whole); i++) { \
        if (i < whole) store(y, i, function(load(x, i, bf16), load(z, i, bf16), bf16), bf16); \
        else { \
            char rest[3][LANES * 4] = {{0}}; \
            const size_t from = (size_t)(whole * LANES * size), bytes = (size_t)((count) * size) - from; \
            memcpy(rest[0], (x) + from, bytes); \
            memcpy(rest[1], (z) + from, bytes); \
            store(rest[2], 0, function(load(rest[0], 0, bf16), load(rest[1], 0, bf16), bf16), bf16); \
            memcpy((y) + from, rest[2], bytes); \
        } \
    } } while (0)

INLINE int swiglu(const char *gate, const char *up, char *y, long count, int bf16) {
    BY_VECTORS(swiglu_vector, gate, up, y, count, bf16);
    return 1;
}

/* x (M, N) + z, which has as many numbers, or N that are added to each row of x. */
INLINE int add(const char *x, const char *z, char *y, long M, long N, long is_row, int bf16) {
    if (!is_row) BY_VECTORS(add_vectors, x, z, y, M * N, bf16);
    else {
        const long size_of_row = N * (bf16 ? 2 : 4);
        for (long m = 0; m < M; m++) BY_VECTORS(add_vectors, x + m * size_of_row, z, y + m * size_of_row, N, bf16);
    }
    return 1;
}

/* rms_norm: x, weight, y, M, D, eps. swiglu: gate, up, y, count. add: x, z, y, M, N, is_row */
#define BETWEEN(type, bf16) \
    KERNEL(rms_norm_##type) { return rms_norm(a[0].at, a[1].at, a[2].at, a[3].n, a[4].n, a[5].x, bf16); } \
    KERNEL(swiglu_##type) { return swiglu(a[0].at, a[1].at, a[2].at, a[3].n, bf16); } \
    KERNEL(add_##type) { return add(a[0].at, a[1].at, a[2].at, a[3].n, a[4].n, a[5].n, bf16); }
BETWEEN(float, 0)
BETWEEN(bf16, 1)
