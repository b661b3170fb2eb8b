/* What processors with AVX-512 (F, BW) do in a way of their own, on vectors of 64 bytes. Included by vectors.h. */

/* Vectors of columns whose sums stay in registers, of so many rows of x. */
INLINE int columns_together(int rows) { return (void)rows, VECTORS; }

/* How a function is compiled whose sums fill the registers: there are enough for what is done around it, too. */
#define APART inline

INLINE ints number_lanes(void) { return (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

/* The 4 bytes at x in each lane. */
INLINE words spread(const void *x) { return (words)_mm512_set1_epi32((int)*(const loose_word *)x); }

/* Intrinsics, since gcc would convert these vectors in two parts. */
INLINE words widen_halves(halves x) { return (words)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE halves narrow_words(words x) { return (halves)_mm512_cvtepi32_epi16((__m512i)x); }

/* Sums of two neighbours' products, of 16 bits each; and of 8, unsigned ones by signed ones. */
INLINE ints multiply_16(words x, words y) { return (ints)_mm512_madd_epi16((__m512i)x, (__m512i)y); }
INLINE words multiply_8(words x, words y) { return (words)_mm512_maddubs_epi16((__m512i)x, (__m512i)y); }
INLINE words sign_extend_low_bytes(words x) {  /* to 16 bits */
    return (words)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8);
}
INLINE words sign_extend_high_bytes(words x) { return (words)_mm512_srai_epi16((__m512i)x, 8); }
INLINE words add_16(words x, words y) { return (words)_mm512_add_epi16((__m512i)x, (__m512i)y); }

#ifdef __AVX512BF16__
enum { HAS_BF16 = 1 };
INLINE floats add_bf16_products(floats sum, words w, words x) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
#else
enum { HAS_BF16 = 0 };
INLINE floats add_bf16_products(floats sum, words w, words x) { return (void)w, (void)x, sum; }
#endif

#ifdef __AVX512VNNI__
enum { HAS_INT8 = 1 };
INLINE ints add_int8_products(ints sum, words w, words x) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
#else
enum { HAS_INT8 = 0 };
INLINE ints add_int8_products(ints sum, words w, words x) { return (void)w, (void)x, sum; }
#endif
