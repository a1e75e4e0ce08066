// iwae_bound for float32, bfloat16 and float16: compiled once per instruction set. A vector holds columns, and each
// lane goes down its column twice: for the largest log weight, then for the sums.
#include "vae/iwae_bound_cpu.h"

#include "common/vec_math.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// A sum with the rounding error of a few terms, however many there are (Kahan).
struct LongSum {
  VecF total, lost;
  inline __attribute__((always_inline)) void add(VecF x) {
    const VecF y = x - lost, next = total + y;
    lost = (next - total) - y;
    total = next;
  }
};

LongSum no_sum() { return {broadcast(0.0f), broadcast(0.0f)}; }

// The largest log weight of each column, or NaN where there is one.
template <typename T>
VecF largest_of(const T* log_weights, const IwaeShape& shape, int64_t column, int64_t count) {
  VecF largest = broadcast(-kInfinity);
  for (int64_t k = 0; k < shape.samples; ++k) {
    const VecF x = load_upto(log_weights + k * shape.columns + column, count);
    largest = select(either(is_nan(largest), is_nan(x)), largest + x, max(x, largest));
  }
  return largest;
}

// What is subtracted before the exponential: the largest, zero where it is infinite.
VecF shift_of(VecF largest) { return select(less(abs(largest), broadcast(kInfinity)), largest, broadcast(0.0f)); }

template <typename T>
VecF weight(const T* log_weights, VecF shift, int64_t count) {
  return exp(load_upto(log_weights, count) - shift);
}

template <typename T>
VecF sum_of(const T* log_weights, const IwaeShape& shape, VecF shift, int64_t column, int64_t count) {
  LongSum sum = no_sum();
  for (int64_t k = 0; k < shape.samples; ++k) {
    sum.add(weight(log_weights + k * shape.columns + column, shift, count));
  }
  return sum.total;
}

// 1 / sum; zero where all weights are zero. Any other sum is at least one.
VecF inverse_of(VecF sum) { return select(less(sum, broadcast(0.5f)), broadcast(0.0f), div(broadcast(1.0f), sum)); }

template <typename T>
void forward(const IwaeForward& args, int64_t begin, int64_t end) {
  const T* log_weights = static_cast<const T*>(args.log_weights);
  float* bound = static_cast<float*>(args.bound);
  const VecF log_samples = log(broadcast(static_cast<float>(args.shape.samples)));
  for (int64_t column = begin; column < end; column += kWidth) {
    const int64_t count = end - column;
    const VecF largest = largest_of(log_weights, args.shape, column, count), shift = shift_of(largest);
    const VecF sum = sum_of(log_weights, args.shape, shift, column, count);
    // Infinite log weights and NaN are the bound themselves; any other column has a sum of at least one.
    const VecF value = shift + (log(sum) - log_samples);
    store_upto(bound + column, select(less(abs(largest), broadcast(kInfinity)), value, largest), count);
  }
}

template <typename T>
void backward(const IwaeBackward& args, int64_t begin, int64_t end) {
  const T* log_weights = static_cast<const T*>(args.log_weights);
  const float* dbound = static_cast<const float*>(args.dbound);
  T* out = static_cast<T*>(args.dlog_weights);
  const int64_t columns = args.shape.columns;
  for (int64_t column = begin; column < end; column += kWidth) {
    const int64_t count = end - column;
    const VecF shift = shift_of(largest_of(log_weights, args.shape, column, count));
    const VecF inverse = inverse_of(sum_of(log_weights, args.shape, shift, column, count));
    const VecF grad = dbound == nullptr ? broadcast(1.0f) : load_upto(dbound + column, count);
    for (int64_t k = 0; k < args.shape.samples; ++k) {
      const int64_t at = k * columns + column;
      store_upto(out + at, weight(log_weights + at, shift, count) * inverse * grad, count);
    }
  }
}

template <typename T>
void jvp(const IwaeJvp& args, int64_t begin, int64_t end) {
  const T* log_weights = static_cast<const T*>(args.log_weights);
  const T* tangent = static_cast<const T*>(args.tangent);
  float* out = static_cast<float*>(args.bound_tangent);
  const int64_t columns = args.shape.columns;
  for (int64_t column = begin; column < end; column += kWidth) {
    const int64_t count = end - column;
    const VecF shift = shift_of(largest_of(log_weights, args.shape, column, count));
    const VecF inverse = inverse_of(sum_of(log_weights, args.shape, shift, column, count));
    LongSum sum = no_sum();
    for (int64_t k = 0; k < args.shape.samples; ++k) {
      const int64_t at = k * columns + column;
      sum.add(weight(log_weights + at, shift, count) * inverse * load_upto(tangent + at, count));
    }
    store_upto(out + column, sum.total, count);
  }
}

}  // namespace

void iwae_bound_forward_piece(const IwaeForward& args, int64_t begin, int64_t end) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return forward<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return forward<Float16>(args, begin, end);
    default:
      return forward<float>(args, begin, end);
  }
}

void iwae_bound_backward_piece(const IwaeBackward& args, int64_t begin, int64_t end) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return backward<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return backward<Float16>(args, begin, end);
    default:
      return backward<float>(args, begin, end);
  }
}

void iwae_bound_jvp_piece(const IwaeJvp& args, int64_t begin, int64_t end) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return jvp<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return jvp<Float16>(args, begin, end);
    default:
      return jvp<float>(args, begin, end);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
