/* Products of a few rows with a large matrix, as fast as the matrix is read, and attention of one new token a row.
 *
 * Knows numbers in memory; knows no tensors and no model. kernels.py compiles it for the processor that it runs on, and
 * says what its arguments are. Vectors are GNU C's, of 64 bytes, and where a processor's are shorter nothing is compiled:
 * that took half a minute, and torch's own products were 3 to 15 times as fast. Two products are the x86 instructions
 * that were made for them where there are those.
 *
 * A packed matrix W (N, K) is a row of panels of 64 rows each. In a panel the 64 rows' numbers of one step along K stand
 * side by side, 4 bytes a row: one float, two bfloat16, or four integers. So one panel is read from its first byte to its
 * last, and each vector that is read is multiplied by one number, or one pair or four, of x.
 */

#ifndef __AVX512F__
#error "vectors of 64 bytes are needed"
#endif

#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

enum { PANEL = 64, LANES = 16, VECTORS = PANEL / LANES, FLOAT_ROWS = 6, INTEGER_ROWS = 4, QUERIES = 256 };
enum { GROUP8 = 64, GROUP4 = 32 };

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef words loose_words __attribute__((aligned(4), may_alias));
typedef floats loose_floats __attribute__((aligned(4), may_alias));
typedef halves loose_halves __attribute__((aligned(2), may_alias));
typedef uint32_t loose_word __attribute__((aligned(1), may_alias));

static const ints counting = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#define INLINE static inline __attribute__((always_inline))
#define ENTRY static __attribute__((noinline))
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

INLINE floats widened(halves x) { return (floats)(__builtin_convertvector(x, words) << 16); }
INLINE halves narrowed(floats x) {  /* as `narrow` */
    const words bits = (words)x, ordered = (words)(x == x);
    const words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((nearest & ordered) | (0x7fc0 & ~ordered), halves);
}
INLINE floats load(const char *x, long vector, int bf16) {
    if (bf16) return widened(*(const loose_halves *)(x + 32 * vector));
    return *(const loose_floats *)(x + 64 * vector);
}
INLINE void store(char *x, long vector, floats value, int bf16) {
    if (bf16) *(loose_halves *)(x + 32 * vector) = narrowed(value);
    else *(loose_floats *)(x + 64 * vector) = value;
}

/* --- one step along K: w has 4 bytes of 16 rows, x the 4 bytes that they are multiplied by ---------------------------- */

INLINE floats step_float(floats sum, words w, uint32_t x) { return sum + (floats)w * as_float(x); }

INLINE floats step_bf16(floats sum, words w, uint32_t x) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    sum += (floats)(w << 16) * as_float(x << 16);
    return sum + (floats)(w & 0xffff0000u) * as_float(x & 0xffff0000u);
#endif
}

INLINE ints step_int8(ints sum, words w, uint32_t x) {  /* w: four unsigned bytes, x: four signed ones */
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32((int)x));
#else
    for (int shift = 0; shift < 32; shift += 8) sum += (ints)(w >> shift & 255) * (int32_t)(int8_t)(x >> shift);
    return sum;
#endif
}

INLINE floats choose(ints mask, floats a, floats b) { return (floats)(((ints)a & mask) | ((ints)b & ~mask)); }
INLINE floats to_nearest(floats x) { return (x + 12582912.f) - 12582912.f; }  /* there, floats are 1 apart; ties to even */
INLINE floats larger(floats a, floats b) { return choose(a > b, a, b); }
INLINE long left(long from, long most, long end) { return from + most < end ? most : end - from; }

/* The first `count` columns of some rows of sums to y, whose rows are N numbers apart. */
static __attribute__((noinline)) void write_rows(floats sum[][VECTORS], int rows, char *y, long N, long count, int bf16) {
    const float *sums = (const float *)sum;
    for (long m = 0; m < rows; m++, sums += PANEL) {
        if (bf16) for (long n = 0; n < count; n++) ((uint16_t *)y)[m * N + n] = narrow(sums[n]);
        else memcpy(y + m * N * 4, sums, (size_t)count * 4);
    }
}

/* --- y = x W^T, x (M, K), y (M, N), both float or both bfloat16 -------------------------------------------------------- */

/* Add to sum the product of `rows` rows of x, and of a panel, of `steps` steps each. */
INLINE void multiply(floats sum[][VECTORS], int rows, const char *x, const char *w, long steps, int bf16) {
    for (long k = 0; k < steps; k++, w += 4 * PANEL) {
        words columns[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) columns[v] = *(const loose_words *)(w + 64 * v);
        UNROLL for (int m = 0; m < rows; m++) {
            const uint32_t own = *(const loose_word *)(x + (m * steps + k) * 4);
            UNROLL for (int v = 0; v < VECTORS; v++)
                sum[m][v] = bf16 ? step_bf16(sum[m][v], columns[v], own) : step_float(sum[m][v], columns[v], own);
        }
    }
}

INLINE void tile(int rows, const char *x, const char *w, char *y, long K, long N, long count, int bf16) {
    floats sum[FLOAT_ROWS][VECTORS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECTORS; v++) sum[m][v] = (floats){0};
    multiply(sum, rows, x, w, K * (bf16 ? 2 : 4) / 4, bf16);
    write_rows(sum, rows, y, N, count, bf16);
}

INLINE void panel_product(long p, const char *x, const char *w, char *y, long M, long N, long K, int bf16) {
    const long size = bf16 ? 2 : 4, count = left(p * PANEL, PANEL, N);
    const char *panel = w + p * PANEL * K * size;
    for (long m = 0; m < M; m += FLOAT_ROWS) {
        const char *rows = x + m * K * size;
        char *out = y + (m * N + p * PANEL) * size;
        switch (left(m, FLOAT_ROWS, M)) {  /* each number of rows is compiled by itself, its sums in registers */
            case 1: tile(1, rows, panel, out, K, N, count, bf16); break;
            case 2: tile(2, rows, panel, out, K, N, count, bf16); break;
            case 3: tile(3, rows, panel, out, K, N, count, bf16); break;
            case 4: tile(4, rows, panel, out, K, N, count, bf16); break;
            case 5: tile(5, rows, panel, out, K, N, count, bf16); break;
            default: tile(6, rows, panel, out, K, N, count, bf16);
        }
    }
}

/* Of what stands in a parallel loop the compiler takes no argument for a constant: here and below, a branch says it. */
ENTRY void product(const char *x, const char *w, char *y, long M, long N, long K, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (long p = 0; p < (N + PANEL - 1) / PANEL; p++)
        if (bf16) panel_product(p, x, w, y, M, N, K, 1);
        else panel_product(p, x, w, y, M, N, K, 0);
}

void product_float(const char *x, const char *w, char *y, long M, long N, long K, int threads) {
    product(x, w, y, M, N, K, 0, threads);
}

void product_bf16(const char *x, const char *w, char *y, long M, long N, long K, int threads) {
    product(x, w, y, M, N, K, 1, threads);
}

/* --- packing: steps of 4 bytes, of which a row has `steps`; rows past N are zeros --------------------------------------- */

/* 16 vectors, turned: number i of vector j becomes number j of vector i. */
INLINE void transpose(words *x) {
    UNROLL for (int width = 1; width < LANES; width *= 2) {
        const ints upper = (counting & width) != 0;
        const ints low = counting + (upper & (LANES - width)), high = counting + (width & ~upper) + (upper & LANES);
        UNROLL for (int i = 0; i < LANES; i++)
            if (!(i & width)) {
                const words a = x[i], b = x[i + width];
                x[i] = __builtin_shuffle(a, b, low);
                x[i + width] = __builtin_shuffle(a, b, high);
            }
    }
}

INLINE void pack_panel(const loose_word *rows, uint32_t *panel, long count, long steps) {
    for (long from = 0; from < steps; from += LANES)  /* a cache line of each row at a time */
        for (long n = 0; n < PANEL; n += LANES) {
            const long wide = left(from, LANES, steps), here = left(n, LANES, count);
            words square[LANES] = {{0}};
            if (wide == LANES && here == LANES)
                UNROLL for (int i = 0; i < LANES; i++) square[i] = *(const loose_words *)(rows + (n + i) * steps + from);
            else
                for (long i = 0; i < here; i++) memcpy(square + i, rows + (n + i) * steps + from, (size_t)wide * 4);
            transpose(square);
            for (long k = 0; k < wide; k++) *(loose_words *)(panel + (from + k) * PANEL + n) = square[k];
        }
}

void pack(const loose_word *source, uint32_t *target, long N, long steps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < (N + PANEL - 1) / PANEL; p++)
        pack_panel(source + p * PANEL * steps, target + p * PANEL * steps, left(p * PANEL, PANEL, N), steps);
}

/* --- y = x W^T where W is integers of 8 or 4 bits in groups along K, each with a bfloat16 scale -------------------------
 *
 * Of 4 bits a byte has two, that of the lower column in its low half. */

/* Each group of x to signed bytes, with its own scale and the sum of its bytes. What the last one lacks is zeros. Of 4
 * bits, the numbers that meet low halves of bytes come first, those that meet high halves after them. */
INLINE void round_to_bytes(int bits, const char *x, long K, int8_t *bytes, float *scales, int32_t *sums, int bf16) {
    const long group = bits == 8 ? GROUP8 : GROUP4;
    for (long g = 0; g * group < K; g++) {
        const long from = g * group, count = left(from, group, K);
        int8_t rounded[GROUP8] = {0};
        float most = 0;
        for (long k = 0; k < count; k++) {
            const float size = __builtin_fabsf(get(x, from + k, bf16));
            most = size > most || size != size ? size : most;  /* NaN stays, to be seen in the logits */
        }
        const float inverse = most > 0 ? 127 / most : 0;
        int32_t sum = 0;
        for (long k = 0; k < count; k++) {
            rounded[k] = (int8_t)__builtin_rintf(get(x, from + k, bf16) * inverse);
            sum += rounded[k];
        }
        if (bits == 8) memcpy(bytes + from, rounded, GROUP8);
        else for (long k = 0; k < GROUP4; k++) bytes[from + k] = rounded[k % (GROUP4 / 2) * 2 + k / (GROUP4 / 2)];
        scales[g] = most / 127;
        sums[g] = sum;
    }
}

INLINE void integer_tile(int rows, int bits, const int8_t *x, const float *x_scales, const int32_t *x_sums, const char *w,
                         const uint16_t *scales, char *y, long N, long groups, long count, int bf16) {
    const long group = bits == 8 ? GROUP8 : GROUP4, steps = group * bits / 32, length = group * groups;
    const int32_t zero = bits == 8 ? 128 : 8;  /* what stands for 0 */
    floats total[INTEGER_ROWS][VECTORS];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECTORS; v++) total[m][v] = (floats){0};
    for (long g = 0; g < groups; g++, scales += PANEL) {
        ints sum[INTEGER_ROWS][VECTORS];
        UNROLL for (int m = 0; m < rows; m++) UNROLL for (int v = 0; v < VECTORS; v++)
            sum[m][v] = (ints){0} - zero * x_sums[m * groups + g];
        for (long s = 0; s < steps; s++, w += 4 * PANEL) {
            const int8_t *own = x + g * group + s * 4;
            words columns[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) columns[v] = *(const loose_words *)(w + 64 * v);
            UNROLL for (int half = 0; half < 8 / bits; half++) UNROLL for (int m = 0; m < rows; m++) {
                const uint32_t four = *(const loose_word *)(own + m * length + half * group / 2);
                UNROLL for (int v = 0; v < VECTORS; v++)
                    sum[m][v] = step_int8(sum[m][v], bits == 8 ? columns[v] : columns[v] >> 4 * half & 0x0f0f0f0fu, four);
            }
        }
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const floats scale = load((const char *)scales, v, 1);
            UNROLL for (int m = 0; m < rows; m++)
                total[m][v] += __builtin_convertvector(sum[m][v], floats) * (scale * x_scales[m * groups + g]);
        }
    }
    write_rows(total, rows, y, N, count, bf16);
}

INLINE void integer_panel_product(int bits, long p, const int8_t *x, const float *x_scales, const int32_t *x_sums,
                                  const char *w, const uint16_t *scales, char *y, long M, long N, long groups, int bf16) {
    const long count = left(p * PANEL, PANEL, N), group = bits == 8 ? GROUP8 : GROUP4;
    const char *panel = w + p * groups * group * PANEL * bits / 8;
    for (long m = 0; m < M; m += INTEGER_ROWS) {
#define TILE(rows) integer_tile(rows, bits, x + m * groups * group, x_scales + m * groups, x_sums + m * groups, panel, \
        scales + p * groups * PANEL, y + (m * N + p * PANEL) * (bf16 ? 2 : 4), N, groups, count, bf16)
        switch (left(m, INTEGER_ROWS, M)) {
            case 1: TILE(1); break;
            case 2: TILE(2); break;
            case 3: TILE(3); break;
            default: TILE(4);
        }
    }
}

ENTRY void integer_product(int bits, const char *x, const char *w, const uint16_t *scales, char *y, long M, long N, long K,
                           char *room, int bf16, int threads) {
    const long group = bits == 8 ? GROUP8 : GROUP4, groups = (K + group - 1) / group;
    float *x_scales = (float *)room;  /* room: M x groups x (4 + 4 + group) bytes */
    int32_t *x_sums = (int32_t *)(x_scales + M * groups);
    int8_t *bytes = (int8_t *)(x_sums + M * groups);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long m = 0; m < M; m++) {
#define ROUND(bits, bf16) round_to_bytes(bits, x + m * K * (bf16 ? 2 : 4), K, bytes + m * groups * group, \
        x_scales + m * groups, x_sums + m * groups, bf16)
            if (bits == 8 && bf16) ROUND(8, 1);
            else if (bits == 8) ROUND(8, 0);
            else if (bf16) ROUND(4, 1);
            else ROUND(4, 0);
        }
#pragma omp for schedule(dynamic, 4)
        for (long p = 0; p < (N + PANEL - 1) / PANEL; p++)
            if (bits == 8) integer_panel_product(8, p, bytes, x_scales, x_sums, w, scales, y, M, N, groups, bf16);
            else integer_panel_product(4, p, bytes, x_scales, x_sums, w, scales, y, M, N, groups, bf16);
    }
}

#define INTEGER_PRODUCT(name, bits, bf16) \
    void name(const char *x, const char *w, const uint16_t *scales, char *y, long M, long N, long K, char *room, \
              int threads) { \
        integer_product(bits, x, w, scales, y, M, N, K, room, bf16, threads); \
    }
INTEGER_PRODUCT(product_int8_float, 8, 0)
INTEGER_PRODUCT(product_int8_bf16, 8, 1)
INTEGER_PRODUCT(product_int4_float, 4, 0)
INTEGER_PRODUCT(product_int4_bf16, 4, 1)

/* --- rounding W (N, K) to such integers -------------------------------------------------------------------------------- */

/* The integers, as floats, that x becomes by a scale. */
INLINE floats integers_of(int bits, floats x, floats scale) {
    const float half = bits == 8 ? 128 : 8;
    const floats least = (floats){0} - half, most = (floats){0} + (half - 1);
    const floats whole = larger(to_nearest(x / choose(scale != 0, scale, (floats){0} + 1)), least);
    return choose(whole > most, most, whole);
}

/* Halves are added until one is left. Not inlined: squares are rounded before they are added, as in torch. (Of integers
 * times scales that need not be said: they are exact.) */
static __attribute__((noinline)) floats sum_by_halves(floats *x, long count) {
    for (long half = count / 2; half > 0; half /= 2)
        for (long k = 0; k < half; k++) x[k] += x[k + half];
    return x[0];
}

/* A group of 16 rows, whose columns are vectors `VECTORS` apart, to words and a scale for each row: of those that make its
 * largest number one of the targets, as panels.py has them, that of the least squared error; NaN where none is finite. */
INLINE void round_rows(int bits, const floats *x, char *target, char *scales) {
    static const float targets[2][4] = {{-127}, {-8, -7.5f, -7, 7.5f}};
    const long group = bits == 8 ? GROUP8 : GROUP4, together = 32 / bits;
    floats most = x[0], scale = {0}, best = (floats){0} + __builtin_inff();
    for (long k = 1; k < group; k++) {
        const floats next = x[k * VECTORS];
        most = choose(larger(next, -next) > larger(most, -most), next, most);
    }
    for (int t = 0; t < (bits == 8 ? 1 : 4); t++) {
        const floats tried = widened(narrowed(most / targets[bits == 4][t]));
        floats squares[GROUP8];
        for (long k = 0; k < group; k++) {
            const floats apart = integers_of(bits, x[k * VECTORS], tried) * tried - x[k * VECTORS];
            squares[k] = apart * apart;
        }
        const floats error = sum_by_halves(squares, group);
        scale = choose(error < best, tried, scale);
        best = choose(error < best, error, best);
    }
    const ints found = best < __builtin_inff();
    for (long word = 0; word < group / together; word++) {
        words whole_word = {0};
        for (long i = 0; i < together; i++) {
            const floats number = choose(found, integers_of(bits, x[(word * together + i) * VECTORS], scale), (floats){0});
            whole_word |= (words)(__builtin_convertvector(number, ints) + (1 << (bits - 1))) << bits * i;
        }
        *(loose_words *)(target + word * PANEL * 4) = whole_word;
    }
    store(scales, 0, choose(found, scale, (floats){0} + __builtin_nanf("")), 1);
}

/* A group of a panel's rows, from the first of them on; zeros stand for the numbers that it lacks. */
INLINE void round_group(int bits, const char *w, long rows, long columns, long K, char *target, char *scales, int bf16) {
    floats numbers[GROUP8][VECTORS] = {0};
    for (long n = 0; n < rows; n++)
        for (long k = 0; k < columns; k++) ((float(*)[PANEL])numbers)[k][n] = get(w, n * K + k, bf16);
    for (long v = 0; v < VECTORS; v++) round_rows(bits, &numbers[0][v], target + v * 64, scales + v * 32);
}

#define ROUND_PANELS(name, bits, group, bf16) \
    void name(const char *w, char *integers, char *scales, long N, long K, int threads) { \
        const long panels = (N + PANEL - 1) / PANEL, groups = (K + group - 1) / group; \
        _Pragma("omp parallel for collapse(2) num_threads(threads)") \
        for (long p = 0; p < panels; p++) \
            for (long g = 0; g < groups; g++) \
                round_group(bits, w + (p * PANEL * K + g * group) * (bf16 ? 2 : 4), left(p * PANEL, PANEL, N), \
                            left(g * group, group, K), K, integers + (p * groups + g) * group * PANEL * bits / 8, \
                            scales + (p * groups + g) * PANEL * 2, bf16); \
    }
ROUND_PANELS(round_int8_float, 8, GROUP8, 0)
ROUND_PANELS(round_int8_bf16, 8, GROUP8, 1)
ROUND_PANELS(round_int4_float, 4, GROUP4, 0)
ROUND_PANELS(round_int4_bf16, 4, GROUP4, 1)

/* --- between the products: each number is rounded where the plain network rounds it -------------------------------------- */

INLINE floats exponential(floats x) {  /* of x <= 0: 2^n e^r with |r| <= ln(2) / 2, by the series of e^r */
    x = larger((floats){0} - 87, x);  /* in this order NaN stays */
    const floats n = to_nearest(x * 1.44269504f);
    const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const floats e = 1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
    return (floats)((words)e + ((words)__builtin_convertvector(n, ints) << 23));
}

INLINE float rounded(float x, int bf16) { return bf16 ? widen(narrow(x)) : x; }

INLINE void norm_row(const char *x, const char *weight, char *y, long D, double eps, int bf16) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long d = 0; d < D; d++) squares += get(x, d, bf16) * get(x, d, bf16);
    const float scale = 1 / __builtin_sqrtf(squares / (float)D + (float)eps);
    for (long d = 0; d < D; d++) put(y, d, bf16, rounded(get(x, d, bf16) * scale, bf16) * get(weight, d, bf16));
}

ENTRY void rms_norm(const char *x, const char *weight, char *y, long M, long D, double eps, int bf16, int threads) {
#pragma omp parallel for num_threads(threads) if (M > 8)
    for (long m = 0; m < M; m++)
        if (bf16) norm_row(x + m * D * 2, weight, y + m * D * 2, D, eps, 1);
        else norm_row(x + m * D * 4, weight, y + m * D * 4, D, eps, 0);
}

INLINE floats swiglu_of(floats a, floats b, int bf16) {
    const floats e = exponential(larger(a, -a) * -1.0f), one = (floats){0} + 1;
    const floats sigmoid = choose(a >= 0, one, e) / (one + e);
    return (bf16 ? widened(narrowed(a * sigmoid)) : a * sigmoid) * b;
}

ENTRY void swiglu(const char *a, const char *b, char *y, long count, int bf16, int threads) {
    const long size = bf16 ? 2 : 4, whole = count / LANES;
#pragma omp parallel for num_threads(threads) if (count > 16384)
    for (long i = 0; i < whole; i++)
        if (bf16) store(y, i, swiglu_of(load(a, i, 1), load(b, i, 1), 1), 1);
        else store(y, i, swiglu_of(load(a, i, 0), load(b, i, 0), 0), 0);
    if (whole * LANES < count) {
        char rest[3][LANES * 4] = {{0}};
        const long from = whole * LANES * size, bytes = count * size - from;
        memcpy(rest[0], a + from, (size_t)bytes);
        memcpy(rest[1], b + from, (size_t)bytes);
        store(rest[2], 0, swiglu_of(load(rest[0], 0, bf16), load(rest[1], 0, bf16), bf16), bf16);
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

/* --- attention of one new token a row: one pass over what is cached ----------------------------------------------------- */

/* The sum of each of 16 vectors: pairs are folded together until one vector is left. */
INLINE floats sums_of(floats *x) {
    static const ints low[] = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}};
    static const ints high[] = {{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}};
    UNROLL for (int count = LANES / 2; count >= 1; count /= 2) UNROLL for (int i = 0; i < count; i++)
        x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], low[0]) + __builtin_shuffle(x[2 * i], x[2 * i + 1], high[0]);
    return x[0];
}

/* The largest number of a vector, in all its places. */
INLINE floats largest(floats x) {
    static const ints turns[] = {{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
                                 {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
                                 {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
                                 {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}};
    UNROLL for (int i = 0; i < 4; i++) x = larger(x, __builtin_shuffle(x, turns[i]));
    return x;
}

/* Turn each pair of neighbours of x (D) by its angle, a complex number. */
INLINE void rotate(const char *x, const float *angles, char *out, long D, int bf16) {
    static const ints first = {0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14};
    static const ints other = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    static const floats sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    for (long v = 0; v < D / LANES; v++) {
        const floats own = load(x, v, bf16), angle = load((const char *)angles, v, 0);
        const floats cosine = __builtin_shuffle(angle, first), sine = __builtin_shuffle(angle, first + 1);
        store(out, v, own * cosine + __builtin_shuffle(own, other) * sine * sign, bf16);
    }
}

/* Rows of V vectors as floats, zeros after the first `count`. */
INLINE void load_rows(floats *rows, const char *x, long count, const long V, int bf16) {
    for (long i = 0; i < count * V; i++) rows[i] = load(x, i, bf16);
    for (long i = count * V; i < LANES * V; i++) rows[i] = (floats){0};
}

/* The queries of one key/value head of one row, (group, D), over positions from..to of its cached keys and values (S, D).
 * V = D / 16 vectors. The sums are kept relative to the largest score so far (arXiv:1805.02867). */
INLINE void attend_head(const floats *q, const char *keys, const char *values, floats *out, long group, const long V,
                        long from, long to, int bf16) {
    const long size = V * LANES * (bf16 ? 2 : 4);
    floats most[group], mass[group];
    for (long g = 0; g < group; g++) most[g] = (floats){0} - 1e30f, mass[g] = (floats){0};
    for (long i = 0; i < group * V; i++) out[i] = (floats){0};
    for (long start = from; start < to; start += LANES) {
        const long count = left(start, LANES, to);
        floats rows[LANES][V], score[group];
        load_rows(rows[0], keys + start * size, count, V, bf16);
        for (long g = 0; g < group; g++) {
            floats parts[LANES];
            for (long t = 0; t < LANES; t++) {
                parts[t] = q[g * V] * rows[t][0];
                for (long v = 1; v < V; v++) parts[t] += q[g * V + v] * rows[t][v];
            }
            for (long t = count; t < LANES; t++) parts[t] = (floats){0} - 1e30f;
            score[g] = sums_of(parts);
            const floats highest = larger(most[g], largest(score[g])), shrink = exponential(most[g] - highest);
            score[g] = exponential(score[g] - highest);
            most[g] = highest;
            mass[g] = mass[g] * shrink + score[g];
            for (long v = 0; v < V; v++) out[g * V + v] *= shrink;
        }
        load_rows(rows[0], values + start * size, count, V, bf16);
        for (long g = 0; g < group; g++) {
            floats sum[V];
            for (long v = 0; v < V; v++) sum[v] = out[g * V + v];
            for (long t = 0; t < LANES; t++)
                for (long v = 0; v < V; v++) sum[v] += score[g][t] * rows[t][v];
            for (long v = 0; v < V; v++) out[g * V + v] = sum[v];
        }
    }
    for (long g = 0; g < group; g++) {
        float sum = 0;
        for (long t = 0; t < LANES; t++) sum += mass[g][t];
        for (long v = 0; v < V; v++) out[g * V + v] /= sum;
    }
}

/* One key/value head of one row: its new key and value to the caches, (S, D), and its queries over what stands there. */
INLINE void attention_head(const char *q, const char *k, const char *v, char *keys, char *values, const float *angles,
                           char *out, long group, long D, long end, long window, int bf16) {
    const long size = bf16 ? 2 : 4, from = end > window ? end - window : 0;
    const floats scale = (floats){0} + 1 / __builtin_sqrtf((float)D);
    floats turned[group][D / LANES], sums[group][D / LANES];
    char rounded[D * size];
    rotate(k, angles, keys + (end - 1) * D * size, D, bf16);
    memcpy(values + (end - 1) * D * size, v, (size_t)(D * size));
    for (long g = 0; g < group; g++) {
        rotate(q + g * D * size, angles, rounded, D, bf16);
        for (long i = 0; i < D / LANES; i++) turned[g][i] = load(rounded, i, bf16) * scale;
    }
    switch (D) {  /* the usual sizes are compiled by themselves */
        case 64: attend_head(turned[0], keys, values, sums[0], group, 4, from, end, bf16); break;
        case 128: attend_head(turned[0], keys, values, sums[0], group, 8, from, end, bf16); break;
        default: attend_head(turned[0], keys, values, sums[0], group, D / LANES, from, end, bf16);
    }
    for (long i = 0; i < group * D / LANES; i++) store(out, i, sums[0][i], bf16);
}

/* `attention` of one token a row; rows that start below 0 are left out. */
ENTRY void attend_once(const char *q, const char *k, const char *v, char *cache_k, char *cache_v, const float *angles,
                       const int64_t *starts, char *out, long B, long H, long KV, long D, long S, long window, long turn,
                       int bf16, int threads) {
    const long group = H / KV, head = D * (bf16 ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long task = 0; task < B * KV; task++) {
        if (starts[task / KV] < 0) continue;
#define HEAD(bf16) attention_head(q + task * group * head, k + task * head, v + task * head, cache_k + task * S * head, \
        cache_v + task * S * head, angles + task / KV * turn, out + task * group * head, group, D, starts[task / KV] + 1, \
        window, bf16)
        if (bf16) HEAD(1);
        else HEAD(0);
    }
}

/* --- attention of many new tokens a row: products with panels of 64 keys, or of their values ---------------------------- */

/* 64 values (count, D) as panels along the keys, of which there are D / 64, rounded up; zeros for what isn't there. */
INLINE void pack_values(const char *values, words *panels, long count, long D, int bf16) {
    const long together = bf16 ? 2 : 1, steps = PANEL / together;
    for (long v = 0; v < (D + PANEL - 1) / PANEL * VECTORS; v++)
        for (long k = 0; k < steps; k++) {
            words numbers = {0};
            for (long i = 0; i < together; i++) {
                const long key = k * together + i;
                if (key < count && v * LANES < D) {
                    const words one = (words)load(values + key * D * (bf16 ? 2 : 4), v, bf16);
                    numbers |= bf16 && i == 0 ? one >> 16 : one;
                }
            }
            panels[(v / VECTORS * steps + k) * VECTORS + v % VECTORS] = numbers;
        }
}

/* A few queries, of tokens at `places`, and their sums and masses, which are relative to the largest score so far. */
typedef struct { floats mass[FLOAT_ROWS]; float most[FLOAT_ROWS]; long places[FLOAT_ROWS]; } Rows;

/* What a few queries see of 64 keys from `first` on. keys, values: panels; q (rows, D); sums (rows, D rounded up). */
INLINE void attend_tile(Rows *rows, const char *q, const char *keys, const char *values, floats *sums, long D, long first,
                        long window, int bf16) {
    const long size = bf16 ? 2 : 4, steps = PANEL * size / 4, chunks = (D + PANEL - 1) / PANEL;
    const float scale = 1 / __builtin_sqrtf((float)D);
    floats score[FLOAT_ROWS][VECTORS], shrink[FLOAT_ROWS];
    char chances[FLOAT_ROWS * PANEL * 4];
    UNROLL for (int m = 0; m < FLOAT_ROWS; m++) UNROLL for (int v = 0; v < VECTORS; v++) score[m][v] = (floats){0};
    multiply(score, FLOAT_ROWS, q, keys, D * size / 4, bf16);
    for (int m = 0; m < FLOAT_ROWS; m++) {
        const long last = rows->places[m] - first, before = last - window;
        const floats low = (floats){0} - 1e30f;
        for (int v = 0; v < VECTORS; v++) {
            score[m][v] *= scale;
            if (last < PANEL - 1 || before >= 0) {
                const ints place = counting + v * LANES;
                const ints seen = (place <= (int32_t)last) & (place > (int32_t)before);
                score[m][v] = (floats)(((ints)score[m][v] & seen) | ((ints)low & ~seen));
            }
        }
        const floats among = larger(larger(score[m][0], score[m][1]), larger(score[m][2], score[m][3]));
        const floats old = low * 0 + rows->most[m], most = larger(old, largest(among));
        shrink[m] = exponential(old - most);
        rows->most[m] = most[0];
        rows->mass[m] *= shrink[m];
        for (int v = 0; v < VECTORS; v++) {
            const floats chance = exponential(score[m][v] - most);
            rows->mass[m] += chance;
            store(chances, m * VECTORS + v, chance, bf16);
        }
    }
    for (long c = 0; c < chunks; c++) {
        floats sum[FLOAT_ROWS][VECTORS];
        UNROLL for (int m = 0; m < FLOAT_ROWS; m++) UNROLL for (int v = 0; v < VECTORS; v++)
            sum[m][v] = sums[(m * chunks + c) * VECTORS + v] * shrink[m];
        multiply(sum, FLOAT_ROWS, chances, values + c * PANEL * PANEL * size, steps, bf16);
        UNROLL for (int m = 0; m < FLOAT_ROWS; m++) UNROLL for (int v = 0; v < VECTORS; v++)
            sums[(m * chunks + c) * VECTORS + v] = sum[m][v];
    }
}

/* The queries of one key/value head at from..to of a row's T new tokens, over the cached keys and values, (S, D), of all
 * before and of their own. q, out: (T, H, D) of this row, from the head's first query on; start: of the T tokens. */
INLINE void attend_block(const char *q, const char *keys, const char *values, const float *angles, char *out, long from,
                         long to, long start, long H, long group, long D, long window, int bf16) {
    const long size = bf16 ? 2 : 4, chunks = (D + PANEL - 1) / PANEL, head = D * size, end = start + to;
    const long count = (to - from) * group, few = (count + FLOAT_ROWS - 1) / FLOAT_ROWS, lowest = start + from + 1 - window;
    words key_panel[head / 4 * VECTORS], value_panels[chunks * PANEL * size / 4 * VECTORS];
    floats sums[few * FLOAT_ROWS * chunks * VECTORS];
    char turned[few * FLOAT_ROWS * head];
    Rows rows[few];
    memset(sums, 0, sizeof sums);
    memset(turned, 0, sizeof turned);
    for (long r = 0; r < few * FLOAT_ROWS; r++) {
        const long t = from + (r < count ? r : count - 1) / group;
        rows[r / FLOAT_ROWS].places[r % FLOAT_ROWS] = start + t;
        rows[r / FLOAT_ROWS].most[r % FLOAT_ROWS] = -1e30f;
        rows[r / FLOAT_ROWS].mass[r % FLOAT_ROWS] = (floats){0};
        if (r < count) rotate(q + (t * H + r % group) * head, angles + t * D, turned + r * head, D, bf16);
    }
    for (long first = lowest > 0 ? lowest : 0; first < end; first += PANEL) {
        pack_panel((const loose_word *)(keys + first * head), (uint32_t *)key_panel, left(first, PANEL, end), head / 4);
        pack_values(values + first * head, value_panels, left(first, PANEL, end), D, bf16);
        for (long i = 0; i < few; i++)
            if (first <= rows[i].places[FLOAT_ROWS - 1] && first + PANEL > rows[i].places[0] + 1 - window)
                attend_tile(rows + i, turned + i * FLOAT_ROWS * head, (const char *)key_panel, (const char *)value_panels,
                            sums + i * FLOAT_ROWS * chunks * VECTORS, D, first, window, bf16);
    }
    for (long r = 0; r < count; r++) {
        const floats mass = rows[r / FLOAT_ROWS].mass[r % FLOAT_ROWS];
        float sum = 0;
        for (long i = 0; i < LANES; i++) sum += mass[i];
        for (long v = 0; v < D / LANES; v++)
            store(out + ((from + r / group) * H + r % group) * head, v, sums[r * chunks * VECTORS + v] / sum, bf16);
    }
}

/* `attention` of T tokens a row. */
ENTRY void attend_long(const char *q, const char *k, const char *v, char *cache_k, char *cache_v, const float *angles,
                       const int64_t *starts, char *out, long B, long T, long H, long KV, long D, long S, long window,
                       long turn, int bf16, int threads) {
    const long group = H / KV, head = D * (bf16 ? 2 : 4), own = (QUERIES + group - 1) / group, blocks = (T + own - 1) / own;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long i = 0; i < B * T * KV; i++) {
            const long b = i / KV / T, t = i / KV % T, place = ((b * KV + i % KV) * S + starts[b] + t) * head;
            if (bf16) rotate(k + i * head, angles + b * turn + t * D, cache_k + place, D, 1);
            else rotate(k + i * head, angles + b * turn + t * D, cache_k + place, D, 0);
            memcpy(cache_v + place, v + i * head, (size_t)head);
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = B * KV * blocks - 1; task >= 0; task--) {  /* the longest first */
            const long b = task % (B * KV) / KV, n = task % KV, from = task / (B * KV) * own;
            const long place = (b * T * H + n * group) * head, cached = (b * KV + n) * S * head;
#define BLOCK(bf16) attend_block(q + place, cache_k + cached, cache_v + cached, angles + b * turn, out + place, from, \
        from + left(from, own, T), starts[b], H, group, D, window < S ? window : S, bf16)
            if (bf16) BLOCK(1);
            else BLOCK(0);
        }
    }
}

/* q, out (B, T, H, D), k and v (B, T, KV, D) of the T tokens that stand from `starts` (B) on in each row; angles: complex
 * numbers (T, D / 2) of each row, which are `turn` floats apart. Writes the rotated keys, and the values, into the caches
 * (rows, KV, S, D), and each query attends to the last `window` of what stands there up to its own. */
#define ATTENTION(name, bf16) \
    void name(const char *q, const char *k, const char *v, char *cache_k, char *cache_v, const float *angles, \
              const int64_t *starts, char *out, long B, long T, long H, long KV, long D, long S, long window, long turn, \
              int threads) { \
        if (T == 1) attend_once(q, k, v, cache_k, cache_v, angles, starts, out, B, H, KV, D, S, window, turn, bf16, threads); \
        else attend_long(q, k, v, cache_k, cache_v, angles, starts, out, B, T, H, KV, D, S, window, turn, bf16, threads); \
    }
ATTENTION(attention_float, 0)
ATTENTION(attention_bf16, 1)
