// The importance-weighted bound of log weights l [K, columns], contiguous, and its derivatives;
// docs/kernels/iwae_bound.md.
//
//   forward   bound = log(sum_k e^l / K)
//   backward  dl = dbound w       w = e^l / sum_k e^l, dbound one where null
//   jvp       bound' = sum_k w l'
//
// Columns whose weights are all zero have the bound -inf and w = 0. bound, dbound and bound' are [columns], float64 for
// float64 inputs and float32 otherwise. K is at least 1.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct IwaeShape {
  DType dtype;
  int64_t samples, columns;
};

struct IwaeForward {
  IwaeShape shape;
  const void* log_weights;
  void* bound;
};

struct IwaeBackward {
  IwaeShape shape;
  const void *dbound, *log_weights;
  void* dlog_weights;
};

struct IwaeJvp {
  IwaeShape shape;
  const void *tangent, *log_weights;
  void* bound_tangent;
};

namespace cpu {
void iwae_bound_forward(const IwaeForward& args, int threads);
void iwae_bound_backward(const IwaeBackward& args, int threads);
void iwae_bound_jvp(const IwaeJvp& args, int threads);
}  // namespace cpu

}  // namespace genfast
