// diff_augment for one instruction set; formulas in diff_augment_cpu.h. A row of all channels at a time, in pieces of
// kPiece columns whose channel means stay in the first cache: x is read twice from there, out written once.
#include "gan/diff_augment_cpu.h"

#include "common/vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kPiece = 512;

GENFAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
GENFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

GENFAST_INLINE void store_value(double* p, double x) { *p = x; }
template <typename T>
GENFAST_INLINE void store_value(T* p, double x) {
  store_part(p, broadcast(static_cast<float>(x)), 1);
}

template <typename T>
GENFAST_INLINE void fill(T* out, int64_t count, double value) {
  if (count <= 0) return;
  store_value(out, value);
  for (int64_t i = 1; i < count; ++i) out[i] = out[0];
}

GENFAST_INLINE void add_to(double* sums, const double* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] += x[i];
}
template <typename T>
GENFAST_INLINE void add_to(float* sums, const T* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_upto(sums + i, load_upto(sums + i, count - i) + load_upto(x + i, count - i), count - i);
  }
}

// out = own x + factor sums + base
GENFAST_INLINE void combine(double* out, const double* x, const double* sums, int64_t count, double own, double factor,
                            double base) {
  for (int64_t i = 0; i < count; ++i) out[i] = own * x[i] + (factor * sums[i] + base);
}
template <typename T>
GENFAST_INLINE void combine(T* out, const T* x, const float* sums, int64_t count, double own, double factor,
                            double base) {
  const VecF a = broadcast(static_cast<float>(own)), f = broadcast(static_cast<float>(factor));
  const VecF b = broadcast(static_cast<float>(base));
  for (int64_t i = 0; i < count; i += kWidth) {
    const VecF rest = fma(load_upto(sums + i, count - i), f, b);
    store_upto(out + i, fma(load_upto(x + i, count - i), a, rest), count - i);
  }
}

GENFAST_INLINE double sum_of(const double* x, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += x[i];
  return total;
}
template <typename T>
GENFAST_INLINE double sum_of(const T* x, int64_t count) {
  VecF total = broadcast(0.0f);
  for (int64_t i = 0; i < count; i += kWidth) total = total + load_upto(x + i, count - i);
  return static_cast<double>(sum(total));
}

template <typename T, typename Wide>
GENFAST_NOINLINE void image(const AugmentedImage& args) {
  const T* const x = static_cast<const T*>(args.x);
  T* const out = static_cast<T*>(args.out);
  const int64_t plane = args.height * args.width, width = args.width;
  const int64_t low = larger(0, -args.column_shift), high = smaller(width, width - args.column_shift);
  const double factor = args.shared / static_cast<double>(args.channels);
  Wide sums[kPiece];
  for (int64_t h = 0; h < args.height; ++h) {
    const int64_t from = h + args.row_shift;
    T* const row = out + h * width;
    if (from < 0 || from >= args.height || low >= high) {
      for (int64_t c = 0; c < args.channels; ++c) fill(row + c * plane, width, args.outside);
      continue;
    }
    for (int64_t first = low; first < high; first += kPiece) {
      const int64_t count = smaller(kPiece, high - first);
      const T* const piece = x + from * width + first + args.column_shift;
      for (int64_t i = 0; i < count; ++i) sums[i] = 0;
      if (factor != 0.0) {
        for (int64_t c = 0; c < args.channels; ++c) add_to(sums, piece + c * plane, count);
      }
      for (int64_t c = 0; c < args.channels; ++c) {
        combine(row + c * plane + first, piece + c * plane, sums, count, args.own, factor, args.base);
      }
    }
    const bool cut = h >= args.cut_row && h < args.cut_row_end;
    for (int64_t c = 0; c < args.channels; ++c) {
      T* const line = row + c * plane;
      fill(line, low, args.outside);
      fill(line + high, width - high, args.outside);
      if (cut) fill(line + args.cut_column, args.cut_column_end - args.cut_column, args.outside);
    }
  }
}

template <typename T>
GENFAST_NOINLINE double shown(const AugmentedImage& args) {
  const T* const x = static_cast<const T*>(args.x);
  const int64_t width = args.width;
  const int64_t low = larger(0, -args.column_shift), high = smaller(width, width - args.column_shift);
  double total = 0.0;
  for (int64_t c = 0; c < args.channels; ++c) {
    for (int64_t h = 0; h < args.height; ++h) {
      const int64_t from = h + args.row_shift;
      if (from < 0 || from >= args.height || low >= high) continue;
      const T* const line = x + (c * args.height + from) * width + args.column_shift;
      if (h >= args.cut_row && h < args.cut_row_end && args.cut_column < args.cut_column_end) {
        const int64_t end = smaller(high, args.cut_column), begin = larger(low, args.cut_column_end);
        if (end > low) total += sum_of(line + low, end - low);
        if (high > begin) total += sum_of(line + begin, high - begin);
      } else {
        total += sum_of(line + low, high - low);
      }
    }
  }
  return total;
}

}  // namespace

void augment_image(const AugmentedImage& args) {
  switch (args.dtype) {
    case DType::kFloat64:
      return image<double, double>(args);
    case DType::kBFloat16:
      return image<BFloat16, float>(args);
    case DType::kFloat16:
      return image<Float16, float>(args);
    default:
      return image<float, float>(args);
  }
}

double shown_sum(const AugmentedImage& args) {
  switch (args.dtype) {
    case DType::kFloat64:
      return shown<double>(args);
    case DType::kBFloat16:
      return shown<BFloat16>(args);
    case DType::kFloat16:
      return shown<Float16>(args);
    default:
      return shown<float>(args);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
