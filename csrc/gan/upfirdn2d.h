// Upsampling, finite impulse response filtering and downsampling of planes; formulas in docs/kernels/upfirdn2d.md.
//
//   out[i, j] = gain sum_{k, l} g[k, l] z[i down_y + k - pad_y, j down_x + l - pad_x]
//   z[up_y p, up_x q] = x[p, q], and zero elsewhere, beyond x's edges too
//
// g is the filter, turned by 180 degrees unless `correlate`; separable: g[k, l] = h[k] h[l]. out may have any size:
// what it reads beyond x is zero. The backward is the same operation with up and down swapped, the other orientation of
// the filter and pad' = taps - 1 - pad.
//
// x has any strides where that of the width is 1 (planar), or that of the channels (channels last: `channels_last`).
// out is contiguous, [n, c, h, w] or [n, h, w, c]. The filter is float64 for float64, else float32, contiguous.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct Upfirdn2d {
  DType dtype;
  const void* x;
  void* out;
  const void* filter;
  bool separable, correlate, channels_last;
  int64_t batch, channels, height, width, out_height, out_width;
  int64_t x_batch, x_channel, x_row, x_column;  // strides, in elements
  int64_t taps_y, taps_x;                       // equal where separable
  int64_t up_y, up_x, down_y, down_x, pad_y, pad_x;
  double gain;
};

namespace cpu {
// False where sizes would overflow 64-bit indices: nothing is written then.
bool upfirdn2d(const Upfirdn2d& args, int threads);
}  // namespace cpu

}  // namespace genfast
