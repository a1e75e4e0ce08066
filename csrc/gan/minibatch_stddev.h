// Standard deviations over groups of a batch, averaged and appended to x as maps; formulas in
// docs/kernels/minibatch_stddev.md.
//
// x is [batch, channels, spatial], contiguous. With M = batch / size groups, group m holds the samples m, m + M, ...;
// feature f the channels [f, f + 1) channels / features, P = channels / features * spatial elements.
//
//   sd_i = sqrt(var over the group of x_i + eps)      y[m, f] = sum over feature f of sd_i / P
//   out [batch, channels + features, spatial]: x, then y[n % M, f] at every position
//
// Backward, with T[m, f] the sum of the cotangents of y[m, f] over the group and positions:
//
//   dx = dout + T[m, f] (x - mean) / (size P sd)
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct MinibatchStddev {
  DType dtype;
  const void* x;
  const void* dout;  // of the backward
  void* out;         // of the backward dx
  int64_t batch, channels, spatial, size, features;
  double eps;

  int64_t groups() const { return batch / size; }
  int64_t feature_elements() const { return channels / features * spatial; }
};

namespace cpu {
void minibatch_stddev(const MinibatchStddev& args, int threads);
void minibatch_stddev_backward(const MinibatchStddev& args, int threads);
}  // namespace cpu

}  // namespace genfast
