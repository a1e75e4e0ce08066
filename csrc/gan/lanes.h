// Vectors of the arithmetic's type for any storage type: VecF for float32, bfloat16 and float16, four doubles for
// float64, so that a kernel is written once. Only kernel files of one instruction set include this.
#pragma once

#include "common/vec.h"

namespace genfast {
namespace GENFAST_ISA {

typedef double Doubles __attribute__((vector_size(32)));
struct VecD {
  static constexpr int kCount = 4;
  Doubles v;
};

// clang-format off: one operation a line
GENFAST_INLINE VecD broadcast(double x) { return {Doubles{x, x, x, x}}; }
GENFAST_INLINE VecD load(const double* p) { VecD r; memcpy(&r.v, p, sizeof r.v); return r; }
GENFAST_INLINE void store(double* p, VecD x) { memcpy(p, &x.v, sizeof x.v); }
GENFAST_INLINE VecD operator+(VecD a, VecD b) { return {a.v + b.v}; }
GENFAST_INLINE VecD operator-(VecD a, VecD b) { return {a.v - b.v}; }
GENFAST_INLINE VecD operator*(VecD a, VecD b) { return {a.v * b.v}; }
GENFAST_INLINE VecD div(VecD a, VecD b) { return {a.v / b.v}; }
GENFAST_INLINE VecD sqrt(VecD a) { return {Doubles{::sqrt(a.v[0]), ::sqrt(a.v[1]), ::sqrt(a.v[2]), ::sqrt(a.v[3])}}; }
GENFAST_INLINE VecD fma(VecD a, VecD b, VecD c) { return {a.v * b.v + c.v}; }
// The second operand where either is NaN.
GENFAST_INLINE VecD min(VecD a, VecD b) { return {a.v < b.v ? a.v : b.v}; }
GENFAST_INLINE VecD max(VecD a, VecD b) { return {a.v > b.v ? a.v : b.v}; }
GENFAST_INLINE double sum(VecD a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
// Elements 0, 2, ... and 1, 3, ... of two vectors of memory order, and back.
GENFAST_INLINE void unzip(VecD low, VecD high, VecD* even, VecD* odd) {
  *even = {Doubles{low.v[0], low.v[2], high.v[0], high.v[2]}};
  *odd = {Doubles{low.v[1], low.v[3], high.v[1], high.v[3]}};
}
GENFAST_INLINE void zip(VecD even, VecD odd, VecD* low, VecD* high) {
  *low = {Doubles{even.v[0], odd.v[0], even.v[1], odd.v[1]}};
  *high = {Doubles{even.v[2], odd.v[2], even.v[3], odd.v[3]}};
}
// clang-format on

// As of vec.h: at most a vector of elements; lanes beyond `count` read as zero and are not written.
GENFAST_INLINE VecD load_upto(const double* p, int64_t count) {
  if (count >= VecD::kCount) return load(p);
  VecD x = broadcast(0.0);
  memcpy(&x.v, p, sizeof(double) * static_cast<size_t>(count));
  return x;
}
GENFAST_INLINE void store_upto(double* p, VecD x, int64_t count) {
  memcpy(p, &x.v, sizeof(double) * static_cast<size_t>(count < VecD::kCount ? count : VecD::kCount));
}

// The arithmetic of storage type T: a vector V of kCount scalars S.
template <typename T>
struct Lanes {
  typedef VecF V;
  typedef float S;
  static constexpr int kCount = kWidth;
};
template <>
struct Lanes<double> {
  typedef VecD V;
  typedef double S;
  static constexpr int kCount = VecD::kCount;
};

}  // namespace GENFAST_ISA
}  // namespace genfast

// The body of a function for the storage type of `dtype`: GENFAST_BY_DTYPE(dtype, run<T>(...)).
#define GENFAST_BY_DTYPE(dtype, ...) \
  switch (dtype) {                   \
    case DType::kFloat64: {          \
      typedef double T;              \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    case DType::kBFloat16: {         \
      typedef BFloat16 T;            \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    case DType::kFloat16: {          \
      typedef Float16 T;             \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    default: {                       \
      typedef float T;               \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
  }
