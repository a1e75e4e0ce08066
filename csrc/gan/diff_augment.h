// Differentiable augmentation of images [batch, channels, height, width]; formulas in docs/kernels/diff_augment.md.
//
//   out = M T (k s x + k (1 - s) (mean of x over channels) + (1 - k) (mean of x) + b)
//
// b, s, k: brightness, saturation, contrast of an image; T shifts by whole pixels, zeros enter; M is zero in a
// rectangle. They come from eight uniforms of the tensor stream, at indices 8 (offset + image) ... + 7: b, s, k, rows
// and columns of the shift, rows and columns of the rectangle, and one that is left. A policy that lacks a part has its
// neutral values.
//
// mode: 0 the formula; 1 its linear part (b = 0); 2 the transpose of that: colors after the transposes of M and T.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

enum DiffAugmentPolicy : int32_t { kAugmentColor = 1, kAugmentTranslation = 2, kAugmentCutout = 4 };

struct DiffAugment {
  DType dtype;
  const void* x;  // contiguous, as out
  void* out;
  int64_t batch, channels, height, width;
  int64_t offset;
  uint64_t seed;
  int32_t policy, mode;
};

namespace cpu {
void diff_augment(const DiffAugment& args, int threads);
}  // namespace cpu

}  // namespace genfast
