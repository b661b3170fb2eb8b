/* What processors with AVX-512 (F, BW) do in a way of their own, on vectors of 64 bytes. Included by vectors.h. */

#define INTRINSIC(name) _mm512_##name
typedef __m512i any_words;

/* How a function is compiled whose sums fill the registers: there are enough for what is done around it, too. */
#define APART inline

/* Vectors of columns whose sums stay in registers, of so many rows of x. */
INLINE int columns_together(int rows) { return (void)rows, VECTORS; }

INLINE ints number_lanes(void) { return (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

/* The 4 bytes at x in each lane. */
INLINE words spread(const void *x) { return (words)_mm512_set1_epi32((int)*(const loose_word *)x); }

/* Intrinsics, since gcc would convert these vectors in two parts. */
INLINE words widen_halves(halves x) { return (words)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE halves narrow_words(words x) { return (halves)_mm512_cvtepi32_epi16((__m512i)x); }

#ifdef __AVX512BF16__
#define BF16_PRODUCTS(sum, w, x) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(w), (__m512bh)(x))
#endif
#ifdef __AVX512VNNI__
#define INT8_PRODUCTS _mm512_dpbusd_epi32
#endif
