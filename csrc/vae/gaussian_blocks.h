// What the CPU kernels of Gaussian samples share, for each instruction set: sigma, noise and rows of a block.
//
// sigma = root^2 with root = e^(logvar/4) <= e^88: x * root * root is never inf * 0, and overflows only where the exact
// product does (|x root| lies between |x| and |x sigma|). Noise enters gradients as eps / 16, so that dz eps cannot
// overflow.
#pragma once

#include "common/vec_math.h"
#include "vae/reparameterize.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kNoiseRoom = kBlock + 4 + kBatch;

GENFAST_INLINE VecF root_of(VecF logvar) { return exp_bounded(logvar * broadcast(0.25f)); }

GENFAST_INLINE float segment_sum(const float* values, int64_t count) {
  VecF total = broadcast(0.0f);
  for (int64_t i = 0; i < count; i += kWidth) total = total + load_upto(values + i, count - i);
  return sum(total);
}

// Noise of elements [position, position + count) of sample k; returns where in `room` it begins.
GENFAST_INLINE const float* noise(const ReparameterizeShape& shape, int64_t k, int64_t position, int64_t count,
                                  float* room) {
  const uint64_t index = static_cast<uint64_t>(shape.offset + position);
  const int64_t skipped = static_cast<int64_t>(index & 3);
  fill_normals(room, index >> 2, skipped + count, static_cast<uint32_t>(k), shape.seed);
  return room + skipped;
}

// Spreads one value a row over the elements of a block.
GENFAST_INLINE void spread_rows(const float* rows, int64_t event, int64_t position, int64_t count, float* out) {
  int64_t row = position / event, row_end = (row + 1) * event;
  for (int64_t i = 0; i < count;) {
    const int64_t stop = row_end - position < count ? row_end - position : count;
    for (; i < stop; ++i) out[i] = rows[row];
    ++row;
    row_end += event;
  }
}

}  // namespace
}  // namespace GENFAST_ISA
}  // namespace genfast
