/* What processors with AVX2 and FMA do in a way of their own, on vectors of 32 bytes. Included by vectors.h. */

#define INTRINSIC(name) _mm256_##name
typedef __m256i any_words;

/* How a function is compiled whose sums fill the registers, so that they stay there whatever is done around it. */
#define APART __attribute__((noinline))

/* Vectors of columns whose sums stay in the 16 registers, of so many rows of x. */
INLINE int columns_together(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

INLINE ints number_lanes(void) { return (ints){0, 1, 2, 3, 4, 5, 6, 7}; }

/* The 4 bytes at x in each lane. */
INLINE words spread(const void *x) { return (words)_mm256_broadcast_ss(x); }

/* Intrinsics, since gcc would convert these vectors in two parts. */
INLINE words widen_halves(halves x) { return (words)_mm256_cvtepu16_epi32((__m128i)x); }
INLINE halves narrow_words(words x) {
    const __m256i all = (__m256i)x;
    return (halves)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

#ifdef __AVXVNNI__
#define INT8_PRODUCTS _mm256_dpbusd_avx_epi32
#endif
