/* Included before the kernels where the processor has no vectors of 64 bytes: the compiler then makes them of shorter ones,
 * slowly, which is enough to look for bytes read or written out of place. */
#include <immintrin.h>
#include <stdint.h>
#ifndef __AVX512F__
#define __AVX512F__ 1
typedef int32_t wide_ints __attribute__((vector_size(64)));
typedef uint16_t wide_halves __attribute__((vector_size(32)));
static inline __m512i widen_halves(__m256i x) { return (__m512i)__builtin_convertvector((wide_halves)x, wide_ints); }
static inline __m256i narrow_ints(__m512i x) { return (__m256i)__builtin_convertvector((wide_ints)x, wide_halves); }
#define _mm512_cvtepu16_epi32 widen_halves
#define _mm512_cvtepi32_epi16 narrow_ints
#endif
