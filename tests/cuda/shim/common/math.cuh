// kernels/cuda/common/math.cuh for a CPU: the same functions by the standard library.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "common/poly.h"

namespace genfast {
namespace cuda {

using std::isnan;

inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float exp(float x) { return std::exp(x); }
inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

template <int N>
float horner(float x, const float (&c)[N]) {
  float total = c[N - 1];
  for (int i = N - 2; i >= 0; --i) total = std::fma(total, x, c[i]);
  return total;
}

inline void box_muller(uint32_t a, uint32_t b, float& even, float& odd) {
  const double radius = std::sqrt(-2.0 * std::log((a + 1.0) * 0x1p-32)), angle = 2.0 * M_PI * (b * 0x1p-32);
  even = static_cast<float>(radius * std::cos(angle));
  odd = static_cast<float>(radius * std::sin(angle));
}

}  // namespace cuda
}  // namespace genfast
