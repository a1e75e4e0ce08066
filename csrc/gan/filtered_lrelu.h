// Bias, upsampling, leaky ReLU and downsampling of planes in one pass; formulas in docs/kernels/filtered_lrelu.md.
//
//   kForward:    out = D act(U (v + v_bias))
//   kTangent:    out = D (act'(U (gate + gate_bias)) U (v + v_bias))
//   kTranspose:  out = U^T (act'(U (gate + gate_bias)) D^T v)
//
// U is the upsampling with filter `up_filter`, gain up_y up_x and the padding; D the downsampling with `down_filter`,
// without padding; act(a) = clamp(gain (a > 0 ? a : slope a), -limit, limit). Filters are separable and at most
// kMostTaps long, float64 for float64, else float32, as are the biases [channels], which may be null. v, gate and out
// are contiguous [batch, channels, height, width].
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct FilteredLrelu {
  static constexpr int64_t kMostTaps = 32;
  enum Mode : int32_t { kForward = 0, kTangent = 1, kTranspose = 2 };

  DType dtype;
  Mode mode;
  const void *v, *gate;
  void* out;
  const void *v_bias, *gate_bias;
  const void *up_filter, *down_filter;
  int64_t up_taps, down_taps;
  bool correlate;
  int64_t batch, channels;
  int64_t in_height, in_width;    // what U takes
  int64_t mid_height, mid_width;  // what act takes
  int64_t out_height, out_width;  // what D gives
  int64_t up_y, up_x, down_y, down_x, pad_y, pad_x;
  double gain, slope, limit;
};

namespace cpu {
// False where sizes are not supported: nothing is written then.
bool filtered_lrelu(const FilteredLrelu& args, int threads);
}  // namespace cpu

}  // namespace genfast
