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

// (e^x - 1 - x) / 2, with full relative accuracy near zero, given e^x / 2.
GENFAST_INLINE VecF half_expm1_minus(VecF x, VecF half_exp) {
  const VecF half = broadcast(0.5f), half_x = half * x;
  const VecF near = half_x * x * horner(x, poly::kExpm1MinusX);
  return select(less(abs(x), broadcast(1.0f)), near, (half_exp - half) - half_x);
}

// (e^x - 1) / 2, likewise.
GENFAST_INLINE VecF half_expm1(VecF x, VecF half_exp) {
  const VecF half = broadcast(0.5f), half_x = half * x;
  const VecF near = fma(half_x * x, horner(x, poly::kExpm1MinusX), half_x);
  return select(less(abs(x), broadcast(1.0f)), near, half_exp - half);
}

// The natural logarithm of a positive normal number; NaN and infinity give NaN.
GENFAST_INLINE VecF log(VecF x) {
  // Exponent in place, mantissa in [sqrt(1/2), sqrt(2)).
  const VecU bits = as_uint(x), field = broadcast(uint32_t{0xFF800000});
  const VecU exponent = bit_and(sub(bits, broadcast(uint32_t{0x3F3504F3})), field);
  const VecF s = as_float(sub(bits, exponent)) - broadcast(1.0f);
  const VecF e = fma(float_from_int(exponent), broadcast(1.1920928955078125e-7f), x - x);
  return fma(e, broadcast(poly::kLn2), fma(s * s, fma(s, horner(s, poly::kLog1p), broadcast(-0.5f)), s));
}

// 1 / (1 + e^-x); exactly zero below -87.33, where p turns subnormal; NaN stays.
GENFAST_INLINE VecF sigmoid(VecF x) {
  const VecF one = broadcast(1.0f);
  const VecF p = div(one, one + exp_bounded(broadcast(0.0f) - x));
  return select(less(x, broadcast(-87.33f)), broadcast(0.0f), p);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); NaN stays.
GENFAST_INLINE VecF softplus(VecF x) {
  const VecF one = broadcast(1.0f), zero = broadcast(0.0f);
  const VecF y = exp_bounded(zero - abs(x));  // in (0, 1]; below e^-87 it does not count
  // 1 + y in [1, 2]: halved above sqrt(2), without rounding.
  const Mask low = less(y, broadcast(0.41421354f));
  const VecF s = select(low, y, (y - one) * broadcast(0.5f));
  const VecF log = fma(s * s, fma(s, horner(s, poly::kLog1p), broadcast(-0.5f)), s);
  return max(zero, x) + (log + select(low, zero, broadcast(poly::kLn2)));
}

// tanh(x) = (e^2x - 1) / (e^2x + 1), with full relative accuracy near zero; NaN stays.
GENFAST_INLINE VecF tanh(VecF x) {
  const VecF y = x + x;
  const VecF half = half_expm1(y, broadcast(0.5f) * exp_bounded(y));
  return div(half, half + broadcast(1.0f));
}

// The standard normal's distribution function, with full relative accuracy in the lower tail (zero below -13), and its
// density; NaN stays. a^2 / 2 is kept in two parts where the instruction set has a fused multiply-add: relative error
// 6e-7 then, and a^2 / 2 * 6e-8 more without.
GENFAST_INLINE VecF normal_cdf(VecF x, VecF* density) {
  const VecF zero = broadcast(0.0f), one = broadcast(1.0f), half = broadcast(0.5f);
  const VecF a = min(broadcast(14.0f), abs(x)), square = a * a, rest = fma(a, a, zero - square);
  VecF pdf = exp_bounded(square * broadcast(-0.5f)) * broadcast(0.398942280f);
  pdf = fma(pdf, rest * broadcast(-0.5f), pdf);
  pdf = select(less(broadcast(13.0f), a), zero, pdf);
  const VecF w = div(broadcast(4.0f), a + broadcast(4.0f));
  const VecF tail = pdf * w * horner(w - half, poly::kMills);
  *density = pdf;
  return select(less(x, zero), tail, one - tail);
}

// sqrt(-2 ln((a + 1) 2^-32)). The signed integer a + 1 is a + 1 itself below 2^31 and minus the distance to 2^32 above,
// so that one conversion serves both ends: near 1 the logarithm is taken of 1 + s with s rounded once.
GENFAST_INLINE VecF radius(VecU a) {
  const VecF near = float_from_int(add(a, broadcast(uint32_t{1})));
  const VecF value = select(sign_bit(a), near + broadcast(4294967296.0f), abs(near));
  // Exponent in place, mantissa in [sqrt(1/2), sqrt(2)).
  const VecU bits = as_uint(value), field = broadcast(uint32_t{0xFF800000});
  const VecU exponent = bit_and(sub(bits, broadcast(uint32_t{0x3F3504F3})), field);
  const VecF mantissa = as_float(sub(bits, exponent));
  const VecF s = select(equal(exponent, broadcast(uint32_t{32} << 23)), near * broadcast(2.3283064365386963e-10f),
                        mantissa - broadcast(1.0f));
  const VecF e = fma(float_from_int(exponent), broadcast(1.1920928955078125e-7f), broadcast(-32.0f));
  const VecF log = fma(s * s, fma(s, horner(s, poly::kLog1p), broadcast(-0.5f)), s);
  return sqrt(fma(e, broadcast(poly::kLn2), log) * broadcast(-2.0f));
}

// Cosine and sine of b 2^-32 turns: the nearest quarter is exact in integers, and b << 2 is the rest, signed, in units
// of 2^-34 turns.
GENFAST_INLINE void cos_sin(VecU b, VecF* cosine, VecF* sine) {
  const VecF t = float_from_int(shift_left<2>(b)) * broadcast(5.820766091346741e-11f);
  const VecF square = t * t;
  const VecF s = t * horner(square, poly::kSin);
  const VecF c = fma(square, horner(square, poly::kCos), broadcast(1.0f));
  const VecU quarter = add(b, broadcast(uint32_t{0x20000000})), top = broadcast(uint32_t{0x80000000});
  const Mask swap = sign_bit(shift_left<1>(quarter));
  const VecU cosine_sign = bit_and(add(quarter, broadcast(uint32_t{0x40000000})), top);
  const VecU sine_sign = bit_and(quarter, top);
  *cosine = as_float(bit_xor(as_uint(select(swap, s, c)), cosine_sign));
  *sine = as_float(bit_xor(as_uint(select(swap, c, s)), sine_sign));
}

// Elements that one call of philox_lanes makes.
constexpr int kBatch = 4 * kWidth;

// Words of a run of counter groups: batch i of kBatch words starts at group i * kWidth.
struct TensorLayout {
  uint64_t group;
  uint32_t step;
  inline __attribute__((always_inline)) void words(int64_t batch, const RoundKeys& keys, VecU out[4]) const {
    philox_lanes(group + static_cast<uint64_t>(batch * kWidth), 0, true, step, philox::kTensorNormal, keys, out);
  }
};
struct RbmLayout {
  uint32_t group, chain, step, stream;
  inline __attribute__((always_inline)) void words(int64_t batch, const RoundKeys& keys, VecU out[4]) const {
    philox_lanes(group + static_cast<uint32_t>(batch * kWidth), chain, false, step, stream, keys, out);
  }
};

// The first `count` normals of a layout into out, which has room for count rounded up to kBatch.
// All words come first: the integer rounds of one batch then overlap with those of the next.
template <typename Layout>
GENFAST_INLINE void fill_normals_of(const Layout& layout, float* out, int64_t count, const RoundKeys& keys) {
  constexpr int64_t kBatches = 10;
  VecU words[kBatches][4];
  const int64_t all = (count + kBatch - 1) / kBatch;
  for (int64_t done = 0; done < all; done += kBatches) {
    const int64_t batches = all - done < kBatches ? all - done : kBatches;
    for (int64_t i = 0; i < batches; ++i) layout.words(done + i, keys, words[i]);
    for (int64_t i = 0; i < batches; ++i, out += kBatch) {
      VecF normals[4];
      for (int pair = 0; pair < 4; pair += 2) {
        VecF cosine, sine;
        cos_sin(words[i][pair + 1], &cosine, &sine);
        const VecF r = radius(words[i][pair]);
        normals[pair] = r * cosine;
        normals[pair + 1] = r * sine;
      }
      interleave4(normals, out);
    }
  }
}

// Normals of tensor indices 4 group ... 4 group + count - 1.
static void fill_normals(float* out, uint64_t group, int64_t count, uint32_t step, uint64_t seed) {
  RoundKeys keys;
  make_round_keys(seed, &keys);
  fill_normals_of(TensorLayout{group, step}, out, count, keys);
}

// Normals of units 4 group ... 4 group + count - 1 of one chain.
static void fill_rbm_normals(float* out, uint32_t group, int64_t count, uint32_t chain, uint32_t step,
                             const RoundKeys& keys) {
  fill_normals_of(RbmLayout{group, chain, step, philox::kRbmNormal}, out, count, keys);
}

// Uniforms of units 4 group ... 4 group + count - 1 of one chain, likewise.
static void fill_rbm_uniforms(float* out, uint32_t group, int64_t count, uint32_t chain, uint32_t step,
                              const RoundKeys& keys) {
  const RbmLayout layout = {group, chain, step, philox::kRbmUnit};
  for (int64_t done = 0; done < count; done += kBatch) {
    VecU words[4];
    layout.words(done / kBatch, keys, words);
    VecF uniforms[4];
    for (int w = 0; w < 4; ++w)
      uniforms[w] = float_from_int(shift_right<8>(words[w])) * broadcast(5.9604644775390625e-8f);
    interleave4(uniforms, out + done);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
