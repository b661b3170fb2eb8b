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

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined __AVX512BW__
#define LEVEL "avx512.h"
enum { VECTOR = 64 };  /* bytes */
#elif defined __AVX2__ && defined __FMA__
#define LEVEL "avx2.h"
enum { VECTOR = 32 };
#else
#error "vectors of 32 bytes are needed"
#endif

enum { BLOCK = 64, LANES = VECTOR / 4, VECTORS = BLOCK / LANES, FLOAT_ROWS = 6, LINE = 64, AHEAD = 2048, CACHED_STEPS = 32 };

/* An argument of a kernel: an address or a number. Which of them it takes stands at each kernel. */
typedef union { void *at; int64_t n; double x; } Argument;

/* Returns whether the call is complete: all are, but exchanges between ranks that haven't come. */
typedef int Kernel(const Argument *a);
#define KERNEL(name) int name(const Argument *a)

typedef float floats __attribute__((vector_size(VECTOR)));
typedef int32_t ints __attribute__((vector_size(VECTOR)));
typedef uint32_t words __attribute__((vector_size(VECTOR)));
typedef uint16_t halves __attribute__((vector_size(VECTOR / 2)));
typedef words loose_words __attribute__((aligned(4), may_alias));
typedef floats loose_floats __attribute__((aligned(4), may_alias));
typedef halves loose_halves __attribute__((aligned(2), may_alias));
typedef uint32_t loose_word __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#include LEVEL

/* Add products of pairs of bfloat16, and of four unsigned bytes w with signed ones x, where an instruction does that. */
#ifdef BF16_PRODUCTS
enum { HAS_BF16 = 1 };
INLINE floats add_bf16_products(floats sum, words w, words x) { return (floats)BF16_PRODUCTS(sum, w, x); }
#else
enum { HAS_BF16 = 0 };
INLINE floats add_bf16_products(floats sum, words w, words x) { return (void)w, (void)x, sum; }
#endif
#ifdef INT8_PRODUCTS
enum { HAS_INT8 = 1 };
INLINE ints add_int8_products(ints sum, words w, words x) {
    return (ints)INT8_PRODUCTS((any_words)sum, (any_words)w, (any_words)x);
}
#else
enum { HAS_INT8 = 0 };
INLINE ints add_int8_products(ints sum, words w, words x) { return (void)w, (void)x, sum; }
#endif

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

INLINE floats widen_vector(halves x) { return (floats)(widen_halves(x) << 16); }
INLINE halves narrow_vector(floats x) {  /* as `narrow` */
    const words bits = (words)x, ordered = (words)(x == x);
    const words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return narrow_words((nearest & ordered) | (0x7fc0 & ~ordered));
}
INLINE floats load(const char *x, long vector, int bf16) {
    if (bf16) return widen_vector(*(const loose_halves *)(x + VECTOR / 2 * vector));
    return *(const loose_floats *)(x + VECTOR * vector);
}
INLINE void store(char *x, long vector, floats value, int bf16) {
    if (bf16) *(loose_halves *)(x + VECTOR / 2 * vector) = narrow_vector(value);
    else *(loose_floats *)(x + VECTOR * vector) = value;
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

/* --- blocks: one step along K. w: 4 bytes of each of LANES rows; x: the 4 bytes that each of them is multiplied by ----- */

/* Parts of 4 bytes that are multiplied one after another: two numbers of bfloat16, where no instruction takes both. */
INLINE int count_parts(int bf16) { return bf16 && !HAS_BF16 ? 2 : 1; }
INLINE words take_part(words w, int part, int bf16) {
    return count_parts(bf16) == 1 ? w : part == 0 ? w << 16 : w & 0xffff0000u;
}
INLINE floats add_product(floats sum, words w, words x, int bf16) {
    return bf16 && HAS_BF16 ? add_bf16_products(sum, w, x) : sum + (floats)w * (floats)x;
}

/* Ask for `count` vectors of a matrix, from number `first` of a step on, that will be read in some steps: the processor
 * itself looks less far ahead, and stops at the end of a page. Past the end of the memory this does nothing. */
INLINE void prefetch_step(const char *w, int first, int count) {
    UNROLL for (int line = 0; line < count * VECTOR / LINE; line++)
        __builtin_prefetch(w + AHEAD + first * VECTOR + line * LINE, 0, 3);
}

/* The same while `count` of a step's vectors are read: the steps that come after these, in equal parts. */
INLINE void prefetch_part(const char *next, long k, int first, int count) {
    UNROLL for (int line = 0; line < count * VECTOR / LINE; line++)
        __builtin_prefetch(next + (first * CACHED_STEPS + k * count) * VECTOR + line * LINE, 0, 3);
}

/* Add to `sum` the product of `rows` rows of x, `stride` bytes apart, with `count` vectors of each step of W, from number
 * `first` on. x: 4 bytes for each part of a step. */
INLINE void multiply_columns(floats sum[][VECTORS], int rows, const char *x, long stride, const char *w, long steps,
                             const int first, const int count, int bf16) {
    floats own[FLOAT_ROWS][VECTORS];
    const char *next = w + CACHED_STEPS * 4 * BLOCK;
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < count; v++) own[m][v] = sum[m][first + v];
    for (long k = 0; k < steps; k++, w += 4 * BLOCK) {
        if (count == VECTORS) prefetch_step(w, 0, VECTORS);
        else prefetch_part(next, k, first, count);
        UNROLL for (int part = 0; part < count_parts(bf16); part++, x += 4) {
            words columns[VECTORS];
            UNROLL for (int v = 0; v < count; v++)
                columns[v] = take_part(*(const loose_words *)(w + VECTOR * (first + v)), part, bf16);
            UNROLL for (int m = 0; m < rows; m++) {
                const words factor = spread(x + m * stride);
                UNROLL for (int v = 0; v < count; v++) own[m][v] = add_product(own[m][v], columns[v], factor, bf16);
            }
        }
    }
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < count; v++) sum[m][first + v] = own[m][v];
}

/* Add to `sum` the product of `rows` rows of x with a block. Both have `steps` steps. Where the registers don't hold the sums
 * of all its columns, some are done after others, for as many steps as the first cache holds. */
INLINE void multiply(floats sum[][VECTORS], int rows, const char *x, const char *w, long steps, int bf16) {
    const int together = columns_together(rows), is_widened = count_parts(bf16) == 2;
    const long most = together == VECTORS && !is_widened ? steps : CACHED_STEPS;
    float widened[FLOAT_ROWS][2 * CACHED_STEPS];
    for (long from = 0; from < steps; from += most) {
        const long here = count_left(from, most, steps);
        if (is_widened)
            for (int m = 0; m < rows; m++)
                for (long i = 0; i < 2 * here; i++) widened[m][i] = get(x, (m * steps + from) * 2 + i, 1);
        const char *factors = is_widened ? (const char *)widened : x + from * 4;
        UNROLL for (int first = 0; first < VECTORS; first += together)
            multiply_columns(sum, rows, factors, is_widened ? (long)sizeof widened[0] : steps * 4, w + from * 4 * BLOCK, here,
                             first, together, bf16);
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

/* Transpose LANES vectors: number i of vector j becomes number j of vector i. */
INLINE void transpose(words *x) {
    const ints lane_numbers = number_lanes();
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
    for (long from = 0; from < steps; from += LANES)  /* a vector of each row at a time */
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
