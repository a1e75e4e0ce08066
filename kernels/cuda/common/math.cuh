// Elementary functions and Box-Muller normals in float32, on the polynomials of csrc/common/poly.h. Triton's twin is
// kernels/triton/noise.py. Accuracy: exp 2e-7 relative (the hardware's 2^f on a reduced argument, as in CUDA's own
// expf), normals 1e-6 absolute against float64. NaN goes through every function.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/poly.h"

namespace genfast {
namespace cuda {

// 1.5 * 2^23 + 127: adding it rounds to an integer n and leaves n + 127, the exponent field of 2^n, in the low bits.
constexpr float kRound = 12583039.0f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x limited to [low, high]; NaN stays NaN.
__device__ __forceinline__ float clamp(float x, float low, float high) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  return x;
}

template <int N>
__device__ __forceinline__ float horner(float x, const float (&c)[N]) {
  float total = c[N - 1];
#pragma unroll
  for (int i = N - 2; i >= 0; --i) total = fmaf(total, x, c[i]);
  return total;
}

__device__ __forceinline__ float power_of_two(float t) { return __uint_as_float(__float_as_uint(t) << 23); }

// e^x for -87 <= x <= 88.
__device__ __forceinline__ float exp(float x) {
  const float t = fmaf(x, poly::kLog2E, kRound);
  const float n = t - kRound;
  const float r = fmaf(n, -poly::kLn2Low, fmaf(n, -poly::kLn2High, x));
  return exp2_fast(r * poly::kLog2E) * power_of_two(t);
}

struct QuarterExp {
  float s;     // e^(x/4), limited to e^88 and hence finite
  float half;  // e^x / 2, infinite only on overflow
};

__device__ __forceinline__ QuarterExp exp_quarter(float x) {
  x = clamp(x, -344.0f, 352.0f);
  const float t = fmaf(x, 0.25f * poly::kLog2E, kRound);
  const float n = t - kRound;
  const float r = fmaf(n, -4.0f * poly::kLn2Low, fmaf(n, -4.0f * poly::kLn2High, x));
  const float scale = power_of_two(t);
  const float square = scale * scale;
  return {exp2_fast(r * (0.25f * poly::kLog2E)) * scale, (exp2_fast(r * poly::kLog2E) * (0.5f * square)) * square};
}

// inside where |x| <= 1, else outside; in assembly, because the compiler prefers a divergent branch.
__device__ __forceinline__ float select_near_zero(float x, float inside, float outside) {
  float y;
  asm("{.reg .pred p;\n setp.le.f32 p, %1, 0f3F800000;\n selp.f32 %0, %2, %3, p;}"
      : "=f"(y)
      : "f"(fabsf(x)), "f"(inside), "f"(outside));
  return y;
}

// (e^x - 1 - x) / x^2 for |x| <= 1.
__device__ __forceinline__ float expm1_minus_x_ratio(float x) {
  constexpr float c[] = {poly::kExpm1MinusX[0], poly::kExpm1MinusX[1], poly::kExpm1MinusX[2],
                         poly::kExpm1MinusX[3], poly::kExpm1MinusX[4], poly::kExpm1MinusX[5],
                         poly::kExpm1MinusX[6], poly::kExpm1MinusX[7], poly::kExpm1MinusX[8]};
  static_assert(sizeof(c) == sizeof(poly::kExpm1MinusX));
  return horner(x, c);
}

// (e^x - 1 - x) / 2 and (e^x - 1) / 2 without cancellation, given e^x / 2.
__device__ __forceinline__ float half_expm1_minus_x(float x, float half_exp) {
  const float half = 0.5f * x;
  return select_near_zero(x, (half * x) * expm1_minus_x_ratio(x), half_exp - 0.5f - half);
}

__device__ __forceinline__ float half_expm1(float x, float half_exp) {
  const float half = 0.5f * x;
  return select_near_zero(x, fmaf(half * x, expm1_minus_x_ratio(x), half), half_exp - 0.5f);
}

// Two independent normals from two words; the radius is accurate at both ends of (0, 1].
__device__ __forceinline__ void box_muller(uint32_t a, uint32_t b, float& even, float& odd) {
  constexpr float kLog1p[] = {poly::kLog1p[0], poly::kLog1p[1], poly::kLog1p[2], poly::kLog1p[3], poly::kLog1p[4],
                              poly::kLog1p[5], poly::kLog1p[6], poly::kLog1p[7], poly::kLog1p[8]};
  constexpr float kSin[] = {poly::kSin[0], poly::kSin[1], poly::kSin[2], poly::kSin[3]};
  constexpr float kCos[] = {poly::kCos[0], poly::kCos[1], poly::kCos[2], poly::kCos[3]};
  // ln u, u = (a + 1) 2^-32. From sqrt(1/2) up, s = u - 1 comes exactly from the complement.
  const bool near_one = a >= 0xB504F334u;
  const float x = static_cast<float>(near_one ? ~a : a + 1u);
  const int32_t bits = __float_as_int(x);
  const int32_t exponent = (bits - 0x3F3504F3) & static_cast<int32_t>(0xFF800000u);
  const float s = near_one ? x * -0x1p-32f : __int_as_float(bits - exponent) - 1.0f;
  const float e = near_one ? 0.0f : fmaf(static_cast<float>(exponent), 0x1p-23f, -32.0f);
  const float log_u = fmaf(e, 0.693147181f, fmaf(s * s, fmaf(s, horner(s, kLog1p), -0.5f), s));
  const float radius = sqrt_fast(-2.0f * log_u);
  // Angle in turns: the nearest quarter, and the rest in [-1/8, 1/8].
  const float t = static_cast<float>(static_cast<int32_t>(b << 2)) * 0x1p-34f;
  const float t2 = t * t;
  const float sine = t * horner(t2, kSin);
  const float cosine = fmaf(t2, horner(t2, kCos), 1.0f);
  const uint32_t quarter = b + 0x20000000u;
  const bool swap = quarter & 0x40000000u;
  const uint32_t sine_bits = __float_as_uint(swap ? cosine : sine) ^ (quarter & 0x80000000u);
  const uint32_t cosine_bits = __float_as_uint(swap ? sine : cosine) ^ ((quarter + 0x40000000u) & 0x80000000u);
  even = radius * __uint_as_float(cosine_bits);
  odd = radius * __uint_as_float(sine_bits);
}

// The four standard normals of a group of the tensor layout.
__device__ __forceinline__ void tensor_normals(uint64_t group, uint32_t step, uint64_t seed, float (&eps)[4]) {
  const philox::Words w = philox::tensor_words(group, step, philox::kTensorNormal, seed);
  box_muller(w.w[0], w.w[1], eps[0], eps[1]);
  box_muller(w.w[2], w.w[3], eps[2], eps[3]);
}

}  // namespace cuda
}  // namespace genfast
