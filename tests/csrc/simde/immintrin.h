// Stands for the compiler's <immintrin.h> when the AVX-512 kernels are compiled for a CPU without it: SIMDe runs each
// 512-bit intrinsic as two AVX2 ones. Below are those that SIMDe 0.7.4 lacks.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define GENFAST_HALF(a, i) simde_mm512_extracti64x4_epi64((a), (i))
#define GENFAST_JOIN(low, high) simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), (high), 1)
#define GENFAST_AVX512 static inline __attribute__((always_inline))

GENFAST_AVX512 simde__m512 genfast_cvtepi32_ps(simde__m512i a) {
  return simde_mm512_castsi512_ps(GENFAST_JOIN(_mm256_castps_si256(_mm256_cvtepi32_ps(GENFAST_HALF(a, 0))),
                                               _mm256_castps_si256(_mm256_cvtepi32_ps(GENFAST_HALF(a, 1)))));
}

GENFAST_AVX512 simde__m512i genfast_cvtps_epi32(simde__m512 a) {
  const simde__m512i bits = simde_mm512_castps_si512(a);
  return GENFAST_JOIN(_mm256_cvtps_epi32(_mm256_castsi256_ps(GENFAST_HALF(bits, 0))),
                      _mm256_cvtps_epi32(_mm256_castsi256_ps(GENFAST_HALF(bits, 1))));
}

GENFAST_AVX512 simde__m512i genfast_cvtepu16_epi32(__m256i a) {
  return GENFAST_JOIN(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                      _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}

GENFAST_AVX512 __m256i genfast_cvtepi32_epi16(simde__m512i a) {
  uint32_t wide[16];
  uint16_t narrow[16];
  simde_mm512_storeu_si512(wide, a);
  for (int i = 0; i < 16; ++i) narrow[i] = static_cast<uint16_t>(wide[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(narrow));
}

GENFAST_AVX512 simde__m512 genfast_cvtph_ps(__m256i a) {
  return simde_mm512_castsi512_ps(GENFAST_JOIN(_mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(a))),
                                               _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)))));
}

GENFAST_AVX512 __m256i genfast_cvtps_ph(simde__m512 a) {
  const simde__m512i bits = simde_mm512_castps_si512(a);
  const __m128i low = _mm256_cvtps_ph(_mm256_castsi256_ps(GENFAST_HALF(bits, 0)), _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(_mm256_castsi256_ps(GENFAST_HALF(bits, 1)), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// Newer versions of SIMDe name some of these; the last one exists there without its alias.
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_shuffle_f32x4
#define _mm512_cvtepi32_ps(a) genfast_cvtepi32_ps(a)
#define _mm512_cvtps_epi32(a) genfast_cvtps_epi32(a)
#define _mm512_cvtepu16_epi32(a) genfast_cvtepu16_epi32(a)
#define _mm512_cvtepi32_epi16(a) genfast_cvtepi32_epi16(a)
#define _mm512_cvtph_ps(a) genfast_cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) genfast_cvtps_ph(a)
#define _mm512_shuffle_f32x4(a, b, imm) simde_mm512_shuffle_f32x4((a), (b), (imm))

#if defined(GENFAST_AMX)
#include "amx.h"
#endif
