// Splits the columns over threads; float64 runs here, by the C library.
#include <cmath>

#include "common/parallel.h"
#include "vae/iwae_bound_cpu.h"

namespace genfast {
namespace cpu {
namespace {

// A cache line of float32: no two threads write the same one.
constexpr int64_t kColumns = 16;

// Runs run(begin, end) on groups of columns; a thread gets work for some microseconds at least.
template <typename Run>
void for_columns(const IwaeShape& shape, int threads, const Run& run) {
  const int64_t groups = (shape.columns + kColumns - 1) / kColumns;
  const int64_t useful = 1 + shape.samples * shape.columns / 4096;
  parallel_for(groups, threads < useful ? threads : static_cast<int>(useful), [&](int64_t first, int64_t last) {
    run(first * kColumns, last * kColumns < shape.columns ? last * kColumns : shape.columns);
  });
}

double shift_of(const double* column, const IwaeShape& shape) {
  double largest = -INFINITY;
  for (int64_t k = 0; k < shape.samples; ++k) largest = std::fmax(largest, column[k * shape.columns]);
  return std::isfinite(largest) ? largest : 0.0;
}

double sum_of(const double* column, const IwaeShape& shape, double shift) {
  double sum = 0.0;
  for (int64_t k = 0; k < shape.samples; ++k) sum += std::exp(column[k * shape.columns] - shift);
  return sum;
}

double inverse_of(double sum) { return sum < 0.5 ? 0.0 : 1.0 / sum; }

void forward_double(const IwaeForward& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const double* column = static_cast<const double*>(args.log_weights) + i;
    const double shift = shift_of(column, args.shape), sum = sum_of(column, args.shape, shift);
    static_cast<double*>(args.bound)[i] = shift + (std::log(sum) - std::log(static_cast<double>(args.shape.samples)));
  }
}

void backward_double(const IwaeBackward& args, int64_t begin, int64_t end) {
  const int64_t columns = args.shape.columns;
  for (int64_t i = begin; i < end; ++i) {
    const double* column = static_cast<const double*>(args.log_weights) + i;
    const double shift = shift_of(column, args.shape), inverse = inverse_of(sum_of(column, args.shape, shift));
    const double grad = args.dbound == nullptr ? 1.0 : static_cast<const double*>(args.dbound)[i];
    double* out = static_cast<double*>(args.dlog_weights) + i;
    for (int64_t k = 0; k < args.shape.samples; ++k) {
      out[k * columns] = std::exp(column[k * columns] - shift) * inverse * grad;
    }
  }
}

void jvp_double(const IwaeJvp& args, int64_t begin, int64_t end) {
  const int64_t columns = args.shape.columns;
  for (int64_t i = begin; i < end; ++i) {
    const double* column = static_cast<const double*>(args.log_weights) + i;
    const double* tangent = static_cast<const double*>(args.tangent) + i;
    const double shift = shift_of(column, args.shape), inverse = inverse_of(sum_of(column, args.shape, shift));
    double sum = 0.0;
    for (int64_t k = 0; k < args.shape.samples; ++k) {
      sum += std::exp(column[k * columns] - shift) * inverse * tangent[k * columns];
    }
    static_cast<double*>(args.bound_tangent)[i] = sum;
  }
}

}  // namespace

void iwae_bound_forward(const IwaeForward& args, int threads) {
  const auto piece = args.shape.dtype == DType::kFloat64 ? &forward_double : GENFAST_FOR_ISA(iwae_bound_forward_piece);
  for_columns(args.shape, threads, [&](int64_t begin, int64_t end) { piece(args, begin, end); });
}

void iwae_bound_backward(const IwaeBackward& args, int threads) {
  const auto piece =
      args.shape.dtype == DType::kFloat64 ? &backward_double : GENFAST_FOR_ISA(iwae_bound_backward_piece);
  for_columns(args.shape, threads, [&](int64_t begin, int64_t end) { piece(args, begin, end); });
}

void iwae_bound_jvp(const IwaeJvp& args, int threads) {
  const auto piece = args.shape.dtype == DType::kFloat64 ? &jvp_double : GENFAST_FOR_ISA(iwae_bound_jvp_piece);
  for_columns(args.shape, threads, [&](int64_t begin, int64_t end) { piece(args, begin, end); });
}

}  // namespace cpu
}  // namespace genfast
