// What the float32 kernels of the likelihoods share: blocks of any storage type as floats, and functions of vectors.
#pragma once

#include "common/vec_math.h"
#include "vae/log_likelihood_cpu.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr float kHalfBin = 1.0f / 255.0f;
constexpr float kLogBin = -4.8481163f;  // log(2 / 255)
constexpr float kLeastLogScale = -7.0f;

template <typename T>
void widen_all(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(to + i, load_upto(from + i, count - i), count - i);
}

// Elements [at, at + count) as floats: copied to `room`, unless they are floats already and `copy` is not asked for.
GENFAST_NOINLINE const float* floats_of(const void* base, int32_t dtype, int64_t at, int64_t count, float* room,
                                        bool copy) {
  switch (dtype) {
    case static_cast<int32_t>(DType::kBFloat16):
      widen_all(static_cast<const BFloat16*>(base) + at, count, room);
      return room;
    case static_cast<int32_t>(DType::kFloat16):
      widen_all(static_cast<const Float16*>(base) + at, count, room);
      return room;
    case static_cast<int32_t>(DType::kFloat32):
      if (!copy) return static_cast<const float*>(base) + at;
      memcpy(room, static_cast<const float*>(base) + at, sizeof(float) * static_cast<size_t>(count));
      return room;
    default: {
      const uint8_t* bytes = static_cast<const uint8_t*>(base) + at;
      for (int64_t i = 0; i < count; ++i) room[i] = static_cast<float>(bytes[i]);
      return room;
    }
  }
}

// Where floats of elements from `at` on may be written: in place, or to `room` for store_floats.
float* place_for(void* base, DType dtype, int64_t at, float* room) {
  return dtype == DType::kFloat32 ? static_cast<float*>(base) + at : room;
}

template <typename T>
void narrow_all(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(to + i, load_upto(from + i, count - i), count - i);
}

GENFAST_NOINLINE void store_floats(const float* from, int64_t count, void* base, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kBFloat16:
      return narrow_all(from, count, static_cast<BFloat16*>(base) + at);
    case DType::kFloat16:
      return narrow_all(from, count, static_cast<Float16*>(base) + at);
    default:
      if (from != static_cast<float*>(base) + at) narrow_all(from, count, static_cast<float*>(base) + at);
  }
}

float segment_sum(const float* values, int64_t count) {
  VecF total = broadcast(0.0f);
  for (int64_t i = 0; i < count; i += kWidth) total = total + load_upto(values + i, count - i);
  return sum(total);
}

GENFAST_INLINE VecF negative(VecF x) { return broadcast(0.0f) - x; }

// The polynomial of nine coefficients as a tree: half as deep as Horner's rule, with two products more.
GENFAST_INLINE VecF estrin(VecF x, const float (&c)[9]) {
  const VecF x2 = x * x, x4 = x2 * x2;
  const VecF low = fma(fma(broadcast(c[3]), x, broadcast(c[2])), x2, fma(broadcast(c[1]), x, broadcast(c[0])));
  const VecF high = fma(fma(broadcast(c[7]), x, broadcast(c[6])), x2, fma(broadcast(c[5]), x, broadcast(c[4])));
  return fma(fma(broadcast(c[8]), x4, high), x4, low);
}

// log(1 + y) for y in [0, 1].
GENFAST_INLINE VecF log1p_unit(VecF y) {
  // 1 + y in [1, 2]: halved above sqrt(2), without rounding.
  const Mask low = less(y, broadcast(0.41421354f));
  const VecF s = select(low, y, (y - broadcast(1.0f)) * broadcast(0.5f));
  const VecF log = fma(s * s, fma(s, estrin(s, poly::kLog1p), broadcast(-0.5f)), s);
  return log + select(low, broadcast(0.0f), broadcast(poly::kLn2));
}

// (1 - e^-d) / d for d >= 0, 1 at 0; y is e^-d.
GENFAST_INLINE VecF decay(VecF d, VecF y) {
  const VecF one = broadcast(1.0f), back = negative(d);
  const VecF near = fma(back, horner(back, poly::kExpm1MinusX), one);
  return select(less(d, one), near, div(one - y, d));
}

// A logistic's log mass on the bin of a level and its derivatives by mean and log scale; outer bins are open. `bottom`
// and `top` tell levels 0 and 255.
GENFAST_INLINE VecF logistic_bin(VecF centre, Mask bottom, Mask top, VecF mean, VecF log_scale, VecF* to_mean,
                                 VecF* to_scale) {
  const VecF zero = broadcast(0.0f), one = broadcast(1.0f);
  const Mask outer = either(bottom, top);
  const VecF clamped = max(broadcast(kLeastLogScale), log_scale);
  const VecF inverse = exp_bounded(negative(clamped));
  const VecF from_mean = centre - min(broadcast(1e30f), max(broadcast(-1e30f), mean));
  const VecF plus = inverse * (from_mean + broadcast(kHalfBin)), minus = inverse * (from_mean - broadcast(kHalfBin));
  const VecF y_plus = exp_bounded(negative(abs(plus))), y_minus = exp_bounded(negative(abs(minus)));
  const VecF r_plus = div(one, one + y_plus), r_minus = div(one, one + y_minus);
  const VecF width = inverse * broadcast(2.0f * kHalfBin);
  const VecF y = exp_bounded(negative(width)), f = decay(width, y);
  // sigmoid(-plus) and sigmoid(minus)
  const VecF left = select(top, zero, select(less(zero, plus), y_plus * r_plus, r_plus));
  const VecF right = select(bottom, zero, select(less(zero, minus), r_minus, y_minus * r_minus));
  *to_mean = inverse * (right - left);
  const VecF slope = fma(minus, right, negative(plus * left)) - select(outer, zero, div(y, f));
  *to_scale = select(less(log_scale, broadcast(kLeastLogScale)), zero, slope);
  const VecF product = select(top, one, r_plus) * select(bottom, one, r_minus) * select(outer, one, f);
  const VecF below = select(top, zero, max(zero, negative(plus)));
  const VecF above = select(bottom, zero, max(zero, minus));
  return (log(product) + select(outer, zero, broadcast(kLogBin) - clamped)) - (below + above);
}

// 8-bit levels, from [0, 1] where `unit`; lanes that are no level join `*bad`.
GENFAST_INLINE VecF levels_of(VecF x, bool unit, Mask* bad) {
  const VecF scaled = unit ? x * broadcast(255.0f) : x;
  const VecF level = float_from_int(int_from_float(min(broadcast(300.0f), max(broadcast(-9.0f), scaled))));
  const Mask outside = either(less(level, broadcast(-0.5f)), less(broadcast(255.5f), level));
  *bad = either(*bad, either(outside, less(broadcast(0.125f), abs(scaled - level))));
  return level;
}

}  // namespace
}  // namespace GENFAST_ISA
}  // namespace genfast
