/* Numbers as vectors, float or bfloat16, and blocks of matrices: what the kernels here are made of.
 *
 * Knows numbers in memory; knows no tensors and no model. cpu.py compiles the files of this directory for the processor
 * that it runs on, and documents the arguments of their functions. Vectors are GNU C's, of 64 bytes (16 lanes of 4 bytes).
 * For processors with shorter vectors nothing is compiled: compiling took half a minute, and torch's own products were 3 to
 * 15 times as fast. Two products use x86 instructions that were made for them, where the processor has these.
 *
 * A packed matrix W (N, K) is a sequence of blocks of 64 rows each. In a block, the numbers of the 64 rows at one step
 * along K are side by side, 4 bytes a row: one float, two bfloat16, four integers of 8 bits, or eight of 4 bits. So a block
 * is read from its first byte to its last, and each vector of it is multiplied by the same few numbers of x.
 *
 * A KERNEL is called by all threads of a team at once, as calls.c does, with the same arguments: they share its loops. No
 * thread waits for another at its end. Code that is to be compiled once for each dtype is INLINE, and is called with a
 * constant. `bf16` says whether numbers are bfloat16, else they are float.
 */

#ifndef __AVX512F__
#error "vectors of 64 bytes are needed"
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, LANES = 16, VECTORS = BLOCK / LANES, FLOAT_ROWS = 6, AHEAD = 2048 };

/* An argument of a kernel: an address or a number. Which of them it takes stands at each kernel. */
typedef union { void *at; int64_t n; double x; } Argument;

/* Returns whether the call is complete: all are, but exchanges between ranks that haven't come. */
typedef int Kernel(const Argument *a);
#define KERNEL(name) int name(const Argument *a)

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef words loose_words __attribute__((aligned(4), may_alias));
typedef floats loose_floats __attribute__((aligned(4), may_alias));
typedef halves loose_halves __attribute__((aligned(2), may_alias));
typedef uint32_t loose_word __attribute__((aligned(1), may_alias));

static const ints lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float widen(uint16_t x) { return as_float((uint32_t)x << 16); }
INLINE uint16_t narrow(float x) {  /* to the nearest bfloat16, ties to even; NaN stays NaN */
    uint32_t bits = as_bits(x);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE float get(const void *x, long i, int bf16) { return bf16 ? widen(((const uint16_t *)x)[i]) : ((const float *)x)[i]; }
INLINE void put(void *x, long i, int bf16, float value) {
    if (bf16) ((uint16_t *)x)[i] = narrow(value);
    else ((float *)x)[i] = value;
}

/* Intrinsics, since gcc would convert these vectors in two parts. */
INLINE floats widen_vector(halves x) { return (floats)((words)_mm512_cvtepu16_epi32((__m256i)x) << 16); }
INLINE halves narrow_vector(floats x) {  /* as `narrow` */
    const words bits = (words)x, ordered = (words)(x == x);
    const words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (halves)_mm512_cvtepi32_epi16((__m512i)((nearest & ordered) | (0x7fc0 & ~ordered)));
}
INLINE floats load(const char *x, long vector, int bf16) {
    if (bf16) return widen_vector(*(const loose_halves *)(x + 32 * vector));
    return *(const loose_floats *)(x + 64 * vector);
}
INLINE void store(char *x, long vector, floats value, int bf16) {
    if (bf16) *(loose_halves *)(x + 32 * vector) = narrow_vector(value);
    else *(loose_floats *)(x + 64 * vector) = value;
}
INLINE floats choose(ints mask, floats a, floats b) { return (floats)(((ints)a & mask) | ((ints)b & ~mask)); }
INLINE floats to_nearest(floats x) { return (x + 12582912.f) - 12582912.f; }  /* such floats are 1 apart; ties to even */
INLINE floats max_of(floats a, floats b) { return choose(a > b, a, b); }
/* How many there are from `from` on, up to `end`: at most `most`. */
INLINE long count_left(long from, long most, long end) { return from + most < end ? most : end - from; }

INLINE floats exponential(floats x) {  /* e^x of x <= 0, as 2^n e^r with |r| <= ln(2) / 2, by the series of e^r */
    x = max_of((floats){0} - 87, x);  /* with the arguments in this order, NaN stays NaN */
    const floats n = to_nearest(x * 1.44269504f);
    const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const floats e = 1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
    return (floats)((words)e + ((words)__builtin_convertvector(n, ints) << 23));
}

/* --- blocks: one step along K. w: 4 bytes of each of 16 rows; x: the 4 bytes that each of them is multiplied by -------- */

INLINE floats step_float(floats sum, words w, uint32_t x) { return sum + (floats)w * as_float(x); }

INLINE floats step_bf16(floats sum, words w, uint32_t x) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    sum += (floats)(w << 16) * as_float(x << 16);
    return sum + (floats)(w & 0xffff0000u) * as_float(x & 0xffff0000u);
#endif
}

/* Ask for the 256 bytes of a matrix that will be read in some steps: the processor itself looks less far ahead, and stops at
 * the end of a page. Past the end of the memory this does nothing. */
INLINE void prefetch_step(const char *w) {
    UNROLL for (int v = 0; v < VECTORS; v++) __builtin_prefetch(w + AHEAD + 64 * v, 0, 3);
}

/* Add to `sum` the product of `rows` rows of x with a block. Both have `steps` steps. */
INLINE void multiply(floats sum[][VECTORS], int rows, const char *x, const char *w, long steps, int bf16) {
    for (long k = 0; k < steps; k++, w += 4 * BLOCK) {
        prefetch_step(w);
        words columns[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) columns[v] = *(const loose_words *)(w + 64 * v);
        UNROLL for (int m = 0; m < rows; m++) {
            const uint32_t factor = *(const loose_word *)(x + (m * steps + k) * 4);
            UNROLL for (int v = 0; v < VECTORS; v++)
                sum[m][v] = bf16 ? step_bf16(sum[m][v], columns[v], factor) : step_float(sum[m][v], columns[v], factor);
        }
    }
}

/* Write the first `count` columns of `rows` rows of sums to y, whose rows are N numbers apart. */
__attribute__((noinline, unused)) static void write_rows(floats sum[][VECTORS], int rows, char *y, long N, long count, int bf16) {
    const float *sums = (const float *)sum;
    for (long m = 0; m < rows; m++, sums += BLOCK) {
        if (bf16) for (long n = 0; n < count; n++) ((uint16_t *)y)[m * N + n] = narrow(sums[n]);
        else memcpy(y + m * N * 4, sums, (size_t)count * 4);
    }
}

/* Transpose 16 vectors: number i of vector j becomes number j of vector i. */
INLINE void transpose(words *x) {
    UNROLL for (int width = 1; width < LANES; width *= 2) {
        const ints upper = (lane_numbers & width) != 0;
        const ints low = lane_numbers + (upper & (LANES - width)), high = lane_numbers + (width & ~upper) + (upper & LANES);
        UNROLL for (int i = 0; i < LANES; i++)
            if (!(i & width)) {
                const words a = x[i], b = x[i + width];
                x[i] = __builtin_shuffle(a, b, low);
                x[i + width] = __builtin_shuffle(a, b, high);
            }
    }
}

/* Pack `count` rows, 64 at most, of `steps` times 4 bytes each, in a block; missing rows are zeros. */
INLINE void pack_block(const loose_word *rows, uint32_t *block, long count, long steps) {
    for (long from = 0; from < steps; from += LANES)  /* a cache line of each row at a time */
        for (long n = 0; n < BLOCK; n += LANES) {
            const long wide = count_left(from, LANES, steps), here = count_left(n, LANES, count);
            words square[LANES] = {{0}};
            if (wide == LANES && here == LANES)
                UNROLL for (int i = 0; i < LANES; i++) square[i] = *(const loose_words *)(rows + (n + i) * steps + from);
            else
                for (long i = 0; i < here; i++) memcpy(square + i, rows + (n + i) * steps + from, (size_t)wide * 4);
            transpose(square);
            for (long k = 0; k < wide; k++) *(loose_words *)(block + (from + k) * BLOCK + n) = square[k];
        }
}
