// Instance normalization of planes with a scale and a shift for each; formulas in docs/kernels/adain.md.
//
//   z = (x - mean) r,  r = 1 / sqrt(var + eps)      out = scale z + shift
//   dx = scale r (dout - mean(dout) - z mean(dout z))      dscale = sum dout z      dshift = sum dout
//
// x, out, dout and dx are [planes, size], contiguous. scale, shift and the other values of planes are wide: float64 for
// float64, float32 otherwise. Of the mean its difference to the plane's first element is kept, so that planes with a
// mean that is large beside their deviation lose no digits.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct InstanceNorm {
  DType dtype;
  const void* x;
  const void* dout;     // of the backward
  void* out;            // of the backward dx
  const void* scale;    // null: 1
  const void* shift;    // null: 0
  void *offset, *rstd;  // mean - x[0] and r of each plane: written forward, read backward
  void *dscale, *dshift;
  int64_t planes, size;
  double eps;
};

namespace cpu {
void instance_norm(const InstanceNorm& args, int threads);
void instance_norm_backward(const InstanceNorm& args, int threads);
}  // namespace cpu

}  // namespace genfast
