// One vector type per instruction set, with the few operations the kernels need. Floats, 32-bit integers and masks of
// kWidth lanes: 16 with AVX-512, 8 with AVX2, 4 elsewhere (vec_plain.h). See cpu_features.h for why nothing here is
// shared between instruction sets.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(GENFAST_VEC_AVX512)
#include "common/vec_avx512.h"
#elif defined(GENFAST_VEC_AVX2)
#include "common/vec_avx2.h"
#else
#include "common/vec_plain.h"
#endif

#define GENFAST_INLINE static inline __attribute__((always_inline))
#define GENFAST_NOINLINE static __attribute__((noinline))  // large, and called once a tile: compiles faster

namespace genfast {
namespace GENFAST_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GENFAST_INLINE float scalar_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

GENFAST_INLINE void store_bits16(uint16_t* out, VecU x) { store_low16(out, x); }

// Loads and stores of kWidth elements of any storage type, as float32.
GENFAST_INLINE VecF load(const float* p) { return load_float(p); }
GENFAST_INLINE VecF load(const BFloat16* p) { return as_float(shift_left<16>(load_u16(&p->bits))); }
GENFAST_INLINE VecF load(const Float16* p) { return load_half(&p->bits); }

GENFAST_INLINE void store(float* p, VecF x) { store_float(p, x); }
GENFAST_INLINE void store(Float16* p, VecF x) { store_half(&p->bits, x); }
GENFAST_INLINE void store(BFloat16* p, VecF x) {
  // Round to nearest even; a NaN keeps its upper bits and stays quiet.
  const VecU bits = as_uint(x);
  const VecU odd = bit_and(shift_right<16>(bits), broadcast(uint32_t{1}));
  const VecU rounded = shift_right<16>(add(bits, add(odd, broadcast(uint32_t{0x7FFF}))));
  const VecU nan = bit_or(shift_right<16>(bits), broadcast(uint32_t{0x40}));
  store_bits16(&p->bits, select(is_nan(x), nan, rounded));
}
GENFAST_INLINE void store(uint8_t* p, VecF x) {
  // The caller's values are 0, 1 or 255.
  float lanes[kWidth];
  store_float(lanes, x);
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
}

// The same with only `count` < kWidth elements in memory; the other lanes read as zero.
template <typename T>
GENFAST_INLINE VecF load_part(const T* p, int count) {
  T lanes[kWidth];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, sizeof(T) * static_cast<size_t>(count));
  return load(lanes);
}
template <typename T>
GENFAST_INLINE void store_part(T* p, VecF x, int count) {
  T lanes[kWidth];
  store(lanes, x);
  memcpy(p, lanes, sizeof(T) * static_cast<size_t>(count));
}
template <typename T>
GENFAST_INLINE VecF load_upto(const T* p, int64_t count) {
  return count >= kWidth ? load(p) : load_part(p, static_cast<int>(count));
}
template <typename T>
GENFAST_INLINE void store_upto(T* p, VecF x, int64_t count) {
  if (count >= kWidth) {
    store(p, x);
  } else {
    store_part(p, x, static_cast<int>(count));
  }
}

GENFAST_INLINE VecF operator+(VecF a, VecF b) { return add(a, b); }
GENFAST_INLINE VecF operator-(VecF a, VecF b) { return sub(a, b); }
GENFAST_INLINE VecF operator*(VecF a, VecF b) { return mul(a, b); }
GENFAST_INLINE VecU operator+(VecU a, VecU b) { return add(a, b); }

template <int N>
GENFAST_INLINE VecF horner(VecF x, const float (&coefficients)[N]) {
  VecF total = broadcast(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) total = fma(total, x, broadcast(coefficients[i]));
  return total;
}

}  // namespace GENFAST_ISA
}  // namespace genfast
