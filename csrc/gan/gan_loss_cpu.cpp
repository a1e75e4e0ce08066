// One side of a GAN's loss for one instruction set; formulas in gan_loss.h. Vectors of float32, whose sums go to
// float64 every kBlock elements.
#include "gan/gan_loss_cpu.h"

#include "common/vec_math.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kBlock = 64 * kWidth;

template <GanFunction kFunction>
GENFAST_INLINE void evaluate(VecF y, VecF* value, VecF* slope) {
  const VecF zero = broadcast(0.0f), one = broadcast(1.0f);
  if (kFunction == GanFunction::kSoftplus) {
    *value = softplus(y);
    *slope = sigmoid(y);
  } else if (kFunction == GanFunction::kHinge) {
    *value = max(zero, y);
    *slope = select(less(zero, y), one, select(is_nan(y), y, zero));
  } else if (kFunction == GanFunction::kSquare) {
    *value = y * y * broadcast(0.5f);
    *slope = y;
  } else {
    *value = y;
    *slope = one;
  }
}

template <GanFunction kFunction, typename T>
GENFAST_NOINLINE void term(GanTerm* t) {
  const T* const x = static_cast<const T*>(t->x);
  const T* const other = static_cast<const T*>(t->other);
  float* const gradient = static_cast<float*>(t->gradient);
  const VecF mean = broadcast(static_cast<float>(t->mean)), sign = broadcast(static_cast<float>(t->sign));
  const VecF shift = broadcast(static_cast<float>(t->shift)), factor = broadcast(static_cast<float>(t->factor));
  double values = 0.0, slopes = 0.0;
  for (int64_t block = 0; block < t->count; block += kBlock) {
    const int64_t end = t->count - block < kBlock ? t->count : block + kBlock;
    VecF value_sum = broadcast(0.0f), slope_sum = broadcast(0.0f);
    int64_t i = block;
    for (; i + kWidth <= end; i += kWidth) {
      VecF from = load(x + i) - mean, value, slope;
      if (other != nullptr) from = from - load(other + i);
      evaluate<kFunction>(fma(from, sign, shift), &value, &slope);
      value_sum = value_sum + value;
      slope_sum = slope_sum + slope;
      if (gradient != nullptr) store(gradient + i, slope * factor);
    }
    values += static_cast<double>(sum(value_sum));
    slopes += static_cast<double>(sum(slope_sum));
    if (i < end) {
      const int count = static_cast<int>(end - i);
      VecF from = load_part(x + i, count) - mean, value, slope;
      if (other != nullptr) from = from - load_part(other + i, count);
      evaluate<kFunction>(fma(from, sign, shift), &value, &slope);
      float lanes[kWidth], slope_lanes[kWidth];
      store(lanes, value);
      store(slope_lanes, slope);
      for (int lane = 0; lane < count; ++lane) {
        values += static_cast<double>(lanes[lane]);
        slopes += static_cast<double>(slope_lanes[lane]);
      }
      if (gradient != nullptr) store_part(gradient + i, slope * factor, count);
    }
  }
  t->value = values;
  t->slope = slopes;
}

template <typename T>
void of_function(GanTerm* t) {
  switch (t->function) {
    case GanFunction::kSoftplus:
      return term<GanFunction::kSoftplus, T>(t);
    case GanFunction::kHinge:
      return term<GanFunction::kHinge, T>(t);
    case GanFunction::kSquare:
      return term<GanFunction::kSquare, T>(t);
    default:
      return term<GanFunction::kLinear, T>(t);
  }
}

template <typename T>
GENFAST_NOINLINE double sum_of(const T* x, int64_t count) {
  double total = 0.0;
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t end = count - block < kBlock ? count : block + kBlock;
    VecF part = broadcast(0.0f);
    for (int64_t i = block; i < end; i += kWidth) part = part + load_upto(x + i, end - i);
    total += static_cast<double>(sum(part));
  }
  return total;
}

}  // namespace

void gan_term(GanTerm* t) {
  switch (t->dtype) {
    case DType::kBFloat16:
      return of_function<BFloat16>(t);
    case DType::kFloat16:
      return of_function<Float16>(t);
    default:
      return of_function<float>(t);
  }
}

double gan_sum(DType dtype, const void* x, int64_t count) {
  switch (dtype) {
    case DType::kBFloat16:
      return sum_of(static_cast<const BFloat16*>(x), count);
    case DType::kFloat16:
      return sum_of(static_cast<const Float16*>(x), count);
    default:
      return sum_of(static_cast<const float*>(x), count);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
