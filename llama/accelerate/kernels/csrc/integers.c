/* Products with a quantized matrix, and the quantization. The terms are explained in vectors.h. */

#include "vectors.h"

enum { INTEGER_ROWS = 4, GROUP8 = 64, GROUP4 = 32 };

/* --- y = x W^T where W is integers of 8 or 4 bits in groups along K, each with a bfloat16 scale -------------------------
 *
 * A byte holds two integers of 4 bits, that of the lower column in its low half. */

/* Quantize each group of a row x (K) to signed bytes, with a scale and the sum of the bytes. The last group is filled up
 * with zeros. With a W of 4 bits, the bytes that are multiplied by low halves of W's bytes come first, those for high halves
 * after them. */
INLINE void quantize_row(int bits, const char *x, long K, int8_t *bytes, float *scales, int32_t *sums, int bf16) {
    const long group = bits == 8 ? GROUP8 : GROUP4;
    for (long g = 0; g * group < K; g++) {
        const long from = g * group, count = count_left(from, group, K);
        int8_t integers[GROUP8] = {0};
        float most = 0;
        for (long k = 0; k < count; k++) {
            const float size = __builtin_fabsf(get(x, from + k, bf16));
            most = size > most || size != size ? size : most;  /* NaN stays, and so reaches the logits */
        }
        const float inverse = most > 0 ? 127 / most : 0;
        int32_t sum = 0;
        for (long k = 0; k < count; k++) {
            integers[k] = (int8_t)__builtin_rintf(get(x, from + k, bf16) * inverse);
            sum += integers[k];
        }
        if (bits == 8) memcpy(bytes + from, integers, GROUP8);
        else for (long k = 0; k < GROUP4; k++) bytes[from + k] = integers[k % (GROUP4 / 2) * 2 + k / (GROUP4 / 2)];
        scales[g] = most / 127;
        sums[g] = sum;
    }
}

/* Sums of two neighbours' products, of 16 bits each; and of 8, unsigned ones by signed ones. */
INLINE ints multiply_16(words x, words y) { return (ints)INTRINSIC(madd_epi16)((any_words)x, (any_words)y); }
INLINE words multiply_8(words x, words y) { return (words)INTRINSIC(maddubs_epi16)((any_words)x, (any_words)y); }
INLINE words add_16(words x, words y) { return (words)INTRINSIC(add_epi16)((any_words)x, (any_words)y); }
INLINE words sign_extend_high_bytes(words x) { return (words)INTRINSIC(srai_epi16)((any_words)x, 8); }  /* to 16 bits */
INLINE words sign_extend_low_bytes(words x) { return sign_extend_high_bytes(x << 8); }  /* x << 8: to the upper bytes */

/* Sums of products of unsigned bytes w with signed ones x, four in each lane. `wide` are sums; `narrow`, which begin as
 * zeros, are two sums of 16 bits in each lane, which the 8 steps of a group of integers of 4 bits can't overflow. */
INLINE void add_bytes(int bits, ints *wide, words *narrow, words w, words x) {
    if (HAS_INT8) *wide = add_int8_products(*wide, w, x);
    else if (bits == 4) *narrow = add_16(*narrow, multiply_8(w, x));
    else {
        const words low = w & 0x00ff00ffu, high = w >> 8 & 0x00ff00ffu;
        const words x_low = sign_extend_low_bytes(x), x_high = sign_extend_high_bytes(x);
        *wide += multiply_16(low, x_low) + multiply_16(high, x_high);
    }
}

/* Sums of products of one group of x and W: of `rows` rows, `length` bytes apart, and `count` vectors of each step of W, from
 * number `first` on. */
INLINE void multiply_group(ints sum[][VECTORS], int rows, int bits, const int8_t *x, long length, const char *w,
                           const int first, const int count) {
    const long group = bits == 8 ? GROUP8 : GROUP4, steps = group * bits / 32;
    words narrow[INTEGER_ROWS][VECTORS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < count; v++) sum[m][v] = (ints){0}, narrow[m][v] = (words){0};
    for (long s = 0; s < steps; s++, w += 4 * BLOCK) {
        words columns[VECTORS];
        prefetch_step(w, first, count);
        UNROLL for (int v = 0; v < count; v++) columns[v] = *(const loose_words *)(w + VECTOR * (first + v));
        UNROLL for (int half = 0; half < 8 / bits; half++) UNROLL for (int m = 0; m < rows; m++) {
            const words four = spread(x + m * length + s * 4 + half * group / 2);
            UNROLL for (int v = 0; v < count; v++)
                add_bytes(bits, &sum[m][v], &narrow[m][v], bits == 8 ? columns[v] : columns[v] >> 4 * half & 0x0f0f0f0fu, four);
        }
    }
    if (bits == 4 && !HAS_INT8)
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < count; v++)
            sum[m][v] = multiply_16(narrow[m][v], (words){0} + 0x00010001u);
}

INLINE void integer_tile(int rows, int bits, const int8_t *x, const float *x_scales, const int32_t *x_sums, const char *w,
                         const uint16_t *scales, char *y, long N, long groups, long count, int bf16) {
    const long group = bits == 8 ? GROUP8 : GROUP4, length = group * groups;
    const int32_t zero = bits == 8 ? 128 : 8;  /* the integer that stands for 0 */
    const int together = columns_together(rows);
    floats total[INTEGER_ROWS][VECTORS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECTORS; v++) total[m][v] = (floats){0};
    for (long g = 0; g < groups; g++, scales += BLOCK, w += group * BLOCK * bits / 8)
        UNROLL for (int first = 0; first < VECTORS; first += together) {
            ints sum[INTEGER_ROWS][VECTORS];
            multiply_group(sum, rows, bits, x + g * group, length, w, first, together);
            UNROLL for (int v = 0; v < together; v++) {
                const floats scale = load((const char *)scales, first + v, 1);
                UNROLL for (int m = 0; m < rows; m++) {
                    const ints whole = sum[m][v] - zero * x_sums[m * groups + g];
                    total[m][first + v] += __builtin_convertvector(whole, floats) * (scale * x_scales[m * groups + g]);
                }
            }
        }
    write_rows(total, rows, y, N, count, bf16);
}

INLINE void integer_block_product(int bits, long p, const int8_t *x, const float *x_scales, const int32_t *x_sums,
                                  const char *w, const uint16_t *scales, char *y, long M, long N, long groups, int bf16) {
    const long count = count_left(p * BLOCK, BLOCK, N), group = bits == 8 ? GROUP8 : GROUP4;
    const char *block = w + p * groups * group * BLOCK * bits / 8;
    for (long m = 0; m < M; m += INTEGER_ROWS) {
#define TILE(rows) integer_tile(rows, bits, x + m * groups * group, x_scales + m * groups, x_sums + m * groups, block, \
        scales + p * groups * BLOCK, y + (m * N + p * BLOCK) * (bf16 ? 2 : 4), N, groups, count, bf16)
        switch (count_left(m, INTEGER_ROWS, M)) {
            case 1: TILE(1); break;
            case 2: TILE(2); break;
            case 3: TILE(3); break;
            default: TILE(4);
        }
    }
}

INLINE int integer_product(int bits, const char *x, const char *w, const uint16_t *scales, char *y, long M, long N, long K,
                           char *scratch, int bf16) {
    const long group = bits == 8 ? GROUP8 : GROUP4, groups = (K + group - 1) / group, size = bf16 ? 2 : 4;
    float *x_scales = (float *)scratch;  /* scratch: M x groups x (4 + 4 + group) bytes */
    int32_t *x_sums = (int32_t *)(x_scales + M * groups);
    int8_t *bytes = (int8_t *)(x_sums + M * groups);
#pragma omp for
    for (long m = 0; m < M; m++)
        quantize_row(bits, x + m * K * size, K, bytes + m * groups * group, x_scales + m * groups, x_sums + m * groups, bf16);
#pragma omp for schedule(dynamic, 1) nowait
    for (long p = 0; p < (N + BLOCK - 1) / BLOCK; p++)
        integer_block_product(bits, p, bytes, x_scales, x_sums, w, scales, y, M, N, groups, bf16);
    return 1;
}

/* x, integers, scales, y, M, N, K, scratch */
#define INTEGER_PRODUCT(name, bits, bf16) \
    KERNEL(name) { \
        return integer_product(bits, a[0].at, a[1].at, a[2].at, a[3].at, a[4].n, a[5].n, a[6].n, a[7].at, bf16); \
    }
INTEGER_PRODUCT(product_int8_float, 8, 0)
INTEGER_PRODUCT(product_int8_bf16, 8, 1)
INTEGER_PRODUCT(product_int4_float, 4, 0)
INTEGER_PRODUCT(product_int4_bf16, 4, 1)

/* --- quantizing W (N, K) to such integers ------------------------------------------------------------------------------ */

/* The integers, as floats, to which this scale quantizes x. */
INLINE floats round_to_integers(int bits, floats x, floats scale) {
    const float half = bits == 8 ? 128 : 8;
    const floats least = (floats){0} - half, most = (floats){0} + (half - 1);
    const floats whole = max_of(to_nearest(x / choose(scale != 0, scale, (floats){0} + 1)), least);
    return choose(whole > most, most, whole);
}

/* The sum of `count` vectors: the upper half is added to the lower one until one vector is left. Not inlined, so that
 * squares are rounded before they are added, as in torch. (Products of integers and scales are exact anyway.) */
static __attribute__((noinline)) floats sum_by_halves(floats *x, long count) {
    for (long half = count / 2; half > 0; half /= 2)
        for (long k = 0; k < half; k++) x[k] += x[k + half];
    return x[0];
}

/* Quantize a group of LANES rows, whose columns are vectors `VECTORS` apart, to words and a scale for each row. The candidates
 * for the scale are those that map the row's largest number to one of the targets, as in quantization.py; the one with the
 * least squared error is taken, or NaN where no error is finite. */
INLINE void quantize_rows(int bits, const floats *x, char *target, char *scales) {
    static const float targets[2][4] = {{-127}, {-8, -7.5f, -7, 7.5f}};
    const long group = bits == 8 ? GROUP8 : GROUP4, together = 32 / bits;
    floats most = x[0], scale = {0}, best = (floats){0} + __builtin_inff();
    for (long k = 1; k < group; k++) {
        const floats next = x[k * VECTORS];
        most = choose(max_of(next, -next) > max_of(most, -most), next, most);
    }
    for (int t = 0; t < (bits == 8 ? 1 : 4); t++) {
        const floats candidate = widen_vector(narrow_vector(most / targets[bits == 4][t]));
        floats squares[GROUP8];
        for (long k = 0; k < group; k++) {
            const floats difference = round_to_integers(bits, x[k * VECTORS], candidate) * candidate - x[k * VECTORS];
            squares[k] = difference * difference;
        }
        const floats error = sum_by_halves(squares, group);
        scale = choose(error < best, candidate, scale);
        best = choose(error < best, error, best);
    }
    const ints is_finite = best < __builtin_inff();
    for (long word = 0; word < group / together; word++) {
        words whole_word = {0};
        for (long i = 0; i < together; i++) {
            const floats whole = round_to_integers(bits, x[(word * together + i) * VECTORS], scale);
            const floats number = choose(is_finite, whole, (floats){0});
            whole_word |= (words)(__builtin_convertvector(number, ints) + (1 << (bits - 1))) << bits * i;
        }
        *(loose_words *)(target + word * BLOCK * 4) = whole_word;
    }
    store(scales, 0, choose(is_finite, scale, (floats){0} + __builtin_nanf("")), 1);
}

/* Quantize a group of a block's rows, w: its first number. Missing rows and columns are zeros. */
INLINE void quantize_group(int bits, const char *w, long rows, long columns, long K, char *target, char *scales, int bf16) {
    floats numbers[GROUP8][VECTORS] = {0};
    for (long n = 0; n < rows; n++)
        for (long k = 0; k < columns; k++) ((float(*)[BLOCK])numbers)[k][n] = get(w, n * K + k, bf16);
    for (long v = 0; v < VECTORS; v++) quantize_rows(bits, &numbers[0][v], target + v * VECTOR, scales + v * VECTOR / 2);
}

/* w, integers, scales, N, K */
#define QUANTIZE(name, bits, group, bf16) \
    KERNEL(name) { \
        const long N = a[3].n, K = a[4].n, blocks = (N + BLOCK - 1) / BLOCK, groups = (K + group - 1) / group; \
        _Pragma("omp for collapse(2) nowait") \
        for (long p = 0; p < blocks; p++) \
            for (long g = 0; g < groups; g++) \
                quantize_group(bits, (char *)a[0].at + (p * BLOCK * K + g * group) * (bf16 ? 2 : 4), \
                               count_left(p * BLOCK, BLOCK, N), count_left(g * group, group, K), K, \
                               (char *)a[1].at + (p * groups + g) * group * BLOCK * bits / 8, \
                               (char *)a[2].at + (p * groups + g) * BLOCK * 2, bf16); \
        return 1; \
    }
QUANTIZE(quantize_int8_float, 8, GROUP8, 0)
QUANTIZE(quantize_int8_bf16, 8, GROUP8, 1)
QUANTIZE(quantize_int4_float, 4, GROUP4, 0)
QUANTIZE(quantize_int4_bf16, 4, GROUP4, 1)
