/* Products with a packed matrix, which are as fast as it is read, and the functions between products. The terms are
 * explained in vectors.h. */

#include <omp.h>

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

ENTRY void product(const char *x, const char *w, char *y, long M, long N, long K, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (long p = 0; p < (N + BLOCK - 1) / BLOCK; p++)
        if (bf16) block_product(p, x, w, y, M, N, K, 1);
        else block_product(p, x, w, y, M, N, K, 0);
}

void product_float(const char *x, const char *w, char *y, long M, long N, long K, int threads) {
    product(x, w, y, M, N, K, 0, threads);
}

void product_bf16(const char *x, const char *w, char *y, long M, long N, long K, int threads) {
    product(x, w, y, M, N, K, 1, threads);
}

/* --- packing N rows of `steps` times 4 bytes each; rows past N are zeros ----------------------------------------------- */

void pack(const loose_word *source, uint32_t *target, long N, long steps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < (N + BLOCK - 1) / BLOCK; p++)
        pack_block(source + p * BLOCK * steps, target + p * BLOCK * steps, count_left(p * BLOCK, BLOCK, N), steps);
}

/* --- between the products: numbers are rounded to their dtype wherever the plain network rounds them ------------------- */

INLINE float round_to_dtype(float x, int bf16) { return bf16 ? widen(narrow(x)) : x; }

INLINE void norm_row(const char *x, const char *weight, char *y, long D, double eps, int bf16) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long d = 0; d < D; d++) squares += get(x, d, bf16) * get(x, d, bf16);
    const float scale = 1 / __builtin_sqrtf(squares / (float)D + (float)eps);
    for (long d = 0; d < D; d++) put(y, d, bf16, round_to_dtype(get(x, d, bf16) * scale, bf16) * get(weight, d, bf16));
}

ENTRY void rms_norm(const char *x, const char *weight, char *y, long M, long D, double eps, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) if (M > 8)
    for (long m = 0; m < M; m++)
        if (bf16) norm_row(x + m * D * 2, weight, y + m * D * 2, D, eps, 1);
        else norm_row(x + m * D * 4, weight, y + m * D * 4, D, eps, 0);
}

INLINE floats swiglu_vector(floats a, floats b, int bf16) {
    const floats e = exponential(max_of(a, -a) * -1.0f), one = (floats){0} + 1;
    const floats sigmoid = choose(a >= 0, one, e) / (one + e);
    return (bf16 ? widen_vector(narrow_vector(a * sigmoid)) : a * sigmoid) * b;
}

ENTRY void swiglu(const char *a, const char *b, char *y, long count, int bf16, int threads) {
    const long size = bf16 ? 2 : 4, whole = count / LANES;
#pragma omp parallel for num_threads(threads) if (count > 16384)
    for (long i = 0; i < whole; i++)
        if (bf16) store(y, i, swiglu_vector(load(a, i, 1), load(b, i, 1), 1), 1);
        else store(y, i, swiglu_vector(load(a, i, 0), load(b, i, 0), 0), 0);
    if (whole * LANES < count) {
        char rest[3][LANES * 4] = {{0}};
        const long from = whole * LANES * size, bytes = count * size - from;
        memcpy(rest[0], a + from, (size_t)bytes);
        memcpy(rest[1], b + from, (size_t)bytes);
        store(rest[2], 0, swiglu_vector(load(rest[0], 0, bf16), load(rest[1], 0, bf16), bf16), bf16);
        memcpy(y + from, rest[2], (size_t)bytes);
    }
}

#define BETWEEN(type, bf16) \
    void rms_norm_##type(const char *x, const char *weight, char *y, long M, long D, double eps, int threads) { \
        rms_norm(x, weight, y, M, D, eps, bf16, threads); \
    } \
    void swiglu_##type(const char *a, const char *b, char *y, long count, int threads) { \
        swiglu(a, b, y, count, bf16, threads); \
    }
BETWEEN(float, 0)
BETWEEN(bf16, 1)
