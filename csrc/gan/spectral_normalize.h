// Spectral normalization of many weights in one call; formulas in docs/kernels/spectral_normalize.md.
//
// A weight is a matrix of `rows` x (outer inner) columns that lies in memory as [outer, rows, inner]: outer = 1 where
// the rows come first, as in linear layers and convolutions. u [rows] and v [columns] are wide: float64 for float64,
// float32 otherwise.
//
//   n times:  u = unit(W v), v = unit(W^T u)      sigma = u^T W v      out = W / sigma
//
// with unit(x) = x / max(|x|, eps). Backward, with u and v constant:
//
//   dW = (dout - (<dout, W> / sigma - dsigma sigma) u v^T) / sigma
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct SpectralLayer {
  const void* weight;
  void* out;  // of the forward; dW of the backward
  const void *u, *v;
  void *new_u, *new_v;  // of the forward; unused with no iteration
  const void* dout;     // of the backward
  int64_t rows, outer, inner;

  int64_t columns() const { return outer * inner; }
  int64_t elements() const { return rows * outer * inner; }
};

struct SpectralNormalize {
  DType dtype;
  const SpectralLayer* layers;
  int64_t count;
  void* sigma;         // [count], wide
  const void* dsigma;  // of the backward, [count], wide; may be null
  int64_t iterations;
  double eps;
};

namespace cpu {
void spectral_normalize(const SpectralNormalize& args, int threads);
void spectral_normalize_backward(const SpectralNormalize& args, int threads);
}  // namespace cpu

}  // namespace genfast
