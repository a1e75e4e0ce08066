// Vectors of the arithmetic's type for any storage type: VecF for float32, bfloat16 and float16, four doubles for
// float64, so that a kernel is written once. Only kernel files of one instruction set include this.
#pragma once

#include "common/vec.h"

namespace genfast {
namespace GENFAST_ISA {

struct VecD {
  static constexpr int kCount = 4;
  double v[kCount];
};

#define GENFAST_DOUBLES for (int i = 0; i < VecD::kCount; ++i)
// clang-format off: one operation a line
GENFAST_INLINE VecD operator+(VecD a, VecD b) { GENFAST_DOUBLES a.v[i] += b.v[i]; return a; }
GENFAST_INLINE VecD operator-(VecD a, VecD b) { GENFAST_DOUBLES a.v[i] -= b.v[i]; return a; }
GENFAST_INLINE VecD operator*(VecD a, VecD b) { GENFAST_DOUBLES a.v[i] *= b.v[i]; return a; }
GENFAST_INLINE VecD div(VecD a, VecD b) { GENFAST_DOUBLES a.v[i] /= b.v[i]; return a; }
GENFAST_INLINE VecD sqrt(VecD a) { GENFAST_DOUBLES a.v[i] = ::sqrt(a.v[i]); return a; }
GENFAST_INLINE VecD fma(VecD a, VecD b, VecD c) { GENFAST_DOUBLES a.v[i] = a.v[i] * b.v[i] + c.v[i]; return a; }
GENFAST_INLINE double sum(VecD a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
// clang-format on
#undef GENFAST_DOUBLES

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

GENFAST_INLINE VecF spread(float x) { return broadcast(x); }
GENFAST_INLINE VecD spread(double x) { return {{x, x, x, x}}; }

// The next elements, at most a vector of them; lanes beyond `count` read as zero and are not written.
template <typename T>
GENFAST_INLINE VecF take(const T* p, int64_t count) {
  return load_upto(p, count);
}
GENFAST_INLINE VecD take(const double* p, int64_t count) {
  VecD x = {{0.0, 0.0, 0.0, 0.0}};
  const int lanes = count < VecD::kCount ? static_cast<int>(count) : VecD::kCount;
  for (int i = 0; i < lanes; ++i) x.v[i] = p[i];
  return x;
}
template <typename T>
GENFAST_INLINE void put(T* p, VecF x, int64_t count) {
  store_upto(p, x, count);
}
GENFAST_INLINE void put(double* p, VecD x, int64_t count) {
  const int lanes = count < VecD::kCount ? static_cast<int>(count) : VecD::kCount;
  for (int i = 0; i < lanes; ++i) p[i] = x.v[i];
}

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
