/* What processors with AVX2 and FMA do in a way of their own, on vectors of 32 bytes. Included by vectors.h. */

enum { HAS_BF16 = 0 };

/* Vectors of columns whose sums stay in the 16 registers, of so many rows of x. */
INLINE int columns_together(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

/* How a function is compiled whose sums fill the registers, so that they stay there whatever is done around it. */
#define APART __attribute__((noinline))

INLINE ints number_lanes(void) { return (ints){0, 1, 2, 3, 4, 5, 6, 7}; }

/* The 4 bytes at x in each lane. */
INLINE words spread(const void *x) { return (words)_mm256_broadcast_ss(x); }

/* Intrinsics, since gcc would convert these vectors in two parts. */
INLINE words widen_halves(halves x) { return (words)_mm256_cvtepu16_epi32((__m128i)x); }
INLINE halves narrow_words(words x) {
    const __m256i all = (__m256i)x;
    return (halves)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

/* Sums of two neighbours' products, of 16 bits each; and of 8, unsigned ones by signed ones. */
INLINE ints multiply_16(words x, words y) { return (ints)_mm256_madd_epi16((__m256i)x, (__m256i)y); }
INLINE words multiply_8(words x, words y) { return (words)_mm256_maddubs_epi16((__m256i)x, (__m256i)y); }
INLINE words sign_extend_low_bytes(words x) {  /* to 16 bits */
    return (words)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8);
}
INLINE words sign_extend_high_bytes(words x) { return (words)_mm256_srai_epi16((__m256i)x, 8); }
INLINE words add_16(words x, words y) { return (words)_mm256_add_epi16((__m256i)x, (__m256i)y); }

INLINE floats add_bf16_products(floats sum, words w, words x) { return (void)w, (void)x, sum; }

#ifdef __AVXVNNI__
enum { HAS_INT8 = 1 };
INLINE ints add_int8_products(ints sum, words w, words x) {
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
#else
enum { HAS_INT8 = 0 };
INLINE ints add_int8_products(ints sum, words w, words x) { return (void)w, (void)x, sum; }
#endif
