// Elementary functions, uniforms and normals over vec.h's vectors. Errors are those of poly.h plus a rounding or two.
#pragma once

#include "common/philox.h"
#include "common/poly.h"
#include "common/vec.h"

namespace genfast {
namespace GENFAST_ISA {

// e^x = 2^n p, without the factor 2^n.
GENFAST_INLINE VecF exp_mantissa(VecF x, VecU* n) {
  *n = int_from_float(x * broadcast(poly::kLog2E));
  const VecF nf = float_from_int(*n);
  VecF r = fma(nf, broadcast(-poly::kLn2High), x);
  r = fma(nf, broadcast(-poly::kLn2Low), r);
  return fma(r * r, horner(r, poly::kExp), r) + broadcast(1.0f);
}

GENFAST_INLINE VecF power_of_two(VecU n) { return as_float(shift_left<23>(add(n, broadcast(uint32_t{127})))); }

// e^x: infinite from 88.73, zero below -103.97, subnormal results kept; NaN stays.
GENFAST_INLINE VecF exp(VecF x) {
  VecU n;
  const VecF p = exp_mantissa(max(broadcast(-104.0f), min(broadcast(89.0f), x)), &n);
  const VecU half = int_from_float(float_from_int(n) * broadcast(0.5f));
  return p * power_of_two(half) * power_of_two(sub(n, half));
}

// e^x of x bounded to [-87, 88]: always a normal number. NaN stays.
GENFAST_INLINE VecF exp_bounded(VecF x) {
  VecU n;
  const VecF p = exp_mantissa(max(broadcast(-87.0f), min(broadcast(88.0f), x)), &n);
  return p * power_of_two(n);
}

GENFAST_INLINE VecF abs(VecF x) { return as_float(bit_and(as_uint(x), broadcast(uint32_t{0x7FFFFFFF}))); }

// e^x - 1 - x, with full relative accuracy near zero, given e^x.
GENFAST_INLINE VecF expm1_minus(VecF x, VecF exp_x) {
  const VecF near = x * x * horner(x, poly::kExpm1MinusX);
  return select(less(abs(x), broadcast(1.0f)), near, (exp_x - broadcast(1.0f)) - x);
}

// e^x - 1, likewise.
GENFAST_INLINE VecF expm1(VecF x, VecF exp_x) {
  const VecF near = fma(x * x, horner(x, poly::kExpm1MinusX), x);
  return select(less(abs(x), broadcast(1.0f)), near, exp_x - broadcast(1.0f));
}

// 1 / (1 + e^-x); exactly zero below -87, NaN stays.
GENFAST_INLINE VecF sigmoid(VecF x) {
  const VecF one = broadcast(1.0f);
  const VecF p = div(one, one + exp_bounded(broadcast(0.0f) - x));
  return select(less(x, broadcast(-87.0f)), broadcast(0.0f), p);
}

// sqrt(-2 ln((a + 1) 2^-32)). The signed integer a + 1 is a + 1 itself below 2^31 and minus the distance to 2^32 above, so
// that one conversion serves both ends: near 1 the logarithm is taken of 1 + s with s rounded once.
GENFAST_INLINE VecF radius(VecU a) {
  const VecF near = float_from_int(add(a, broadcast(uint32_t{1})));
  const VecF value = select(sign_bit(a), near + broadcast(4294967296.0f), abs(near));
  const VecU bits = as_uint(value);
  const VecU k = shift_right<23>(sub(bits, broadcast(uint32_t{0x3F3504F3})));  // exponent, mantissa in [sqrt(1/2), sqrt(2))
  const VecF mantissa = as_float(sub(bits, shift_left<23>(k)));
  const VecF s = select(equal(k, broadcast(uint32_t{32})), near * broadcast(2.3283064365386963e-10f),
                        mantissa - broadcast(1.0f));
  const VecF e = float_from_int(sub(k, broadcast(uint32_t{32})));
  VecF log = s * s * fma(s, horner(s, poly::kLog1p), broadcast(-0.5f));
  log = fma(e, broadcast(poly::kLn2Low), log) + s;
  log = fma(e, broadcast(poly::kLn2High), log);
  return sqrt(log * broadcast(-2.0f));
}

// Cosine and sine of b 2^-32 turns: the quadrant is exact in integers.
GENFAST_INLINE void cos_sin(VecU b, VecF* cosine, VecF* sine) {
  const VecU quadrant = shift_right<30>(add(b, broadcast(uint32_t{0x20000000})));
  const VecF t = float_from_int(sub(b, shift_left<30>(quadrant))) * broadcast(2.3283064365386963e-10f);
  const VecF square = t * t;
  const VecF s = t * horner(square, poly::kSin);
  const VecF c = fma(square, horner(square, poly::kCos), broadcast(1.0f));
  const VecU one = broadcast(uint32_t{1}), two = broadcast(uint32_t{2});
  const Mask swap = equal(bit_and(quadrant, one), one);
  const VecU cosine_sign = shift_left<30>(bit_and(add(quadrant, one), two));
  const VecU sine_sign = shift_left<30>(bit_and(quadrant, two));
  *cosine = as_float(bit_xor(as_uint(select(swap, s, c)), cosine_sign));
  *sine = as_float(bit_xor(as_uint(select(swap, c, s)), sine_sign));
}

// Elements that one call of philox_lanes makes.
constexpr int kBatch = 4 * kWidth;

// Normals of tensor indices 4 group ... 4 group + count - 1 into out, which has room for count rounded up to kBatch.
static void fill_normals(float* out, uint64_t group, int64_t count, uint32_t step, uint64_t seed) {
  RoundKeys keys;
  make_round_keys(seed, &keys);
  for (int64_t done = 0; done < count; done += kBatch, group += kWidth) {
    VecU words[4];
    philox_lanes(group, 0, true, step, philox::kTensorNormal, keys, words);
    VecF normals[4];
    for (int pair = 0; pair < 4; pair += 2) {
      VecF cosine, sine;
      cos_sin(words[pair + 1], &cosine, &sine);
      const VecF r = radius(words[pair]);
      normals[pair] = r * cosine;
      normals[pair + 1] = r * sine;
    }
    interleave4(normals, out + done);
  }
}

// Uniforms of units 4 group ... 4 group + count - 1 of one chain, likewise.
static void fill_rbm_uniforms(float* out, uint32_t group, int64_t count, uint32_t chain, uint32_t step, uint64_t seed) {
  RoundKeys keys;
  make_round_keys(seed, &keys);
  for (int64_t done = 0; done < count; done += kBatch, group += kWidth) {
    VecU words[4];
    philox_lanes(group, chain, false, step, philox::kRbmUnit, keys, words);
    VecF uniforms[4];
    for (int w = 0; w < 4; ++w) uniforms[w] = float_from_int(shift_right<8>(words[w])) * broadcast(5.9604644775390625e-8f);
    interleave4(uniforms, out + done);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
