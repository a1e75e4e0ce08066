// Rotary position encoding: pairs of elements of a row turn by the angles of the row's position; formulas in
// docs/kernels/rotary.md.
//
//   out_a = x_a cos_i - x_b sin_i      out_b = x_b cos_i + x_a sin_i      i = 0 ... half - 1
//
// (a, b) = (2 i, 2 i + 1) if interleaved, else (i, i + half); elements from 2 half on are copied. `inverse` turns the
// other way, which is the derivative's transpose.
//
// x and out are [batch, heads, rows, dim] of any strides but that of dim, 1. cos and sin are [batch, positions, half]
// of any strides but the last, 1 (0 for the batch: one table for all), float64 for float64 and float32 otherwise. Row r
// of batch b has position offset + r, + index[b] where `starts`, or index[b, r] in place of r otherwise.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct Rotary {
  DType dtype;
  const void* x;
  void* out;
  const void *cos, *sin;
  const int64_t* index;  // may be null: zero starts
  int64_t batch, heads, rows, dim, half, positions;
  int64_t x_batch, x_head, x_row;  // strides, in elements, as all below
  int64_t out_batch, out_head, out_row;
  int64_t cos_batch, cos_row, sin_batch, sin_row;
  int64_t index_batch, index_row;
  int64_t offset;
  bool starts, interleaved, inverse;

  int64_t position(int64_t b, int64_t r) const {
    if (index == nullptr) return offset + r;
    return starts ? offset + index[b * index_batch] + r : offset + index[b * index_batch + r * index_row];
  }
};

namespace cpu {
// False where a row's position is outside [0, positions): nothing is written then.
bool rotary(const Rotary& args, int threads);
}  // namespace cpu

}  // namespace genfast
