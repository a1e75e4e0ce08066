// The loss of a batch of discriminator logits and its gradient in one call; formulas in docs/kernels/gan_loss.md.
//
//   y = sign * (x - other) + shift      loss = scale * (mean F(y of real) + mean F(y of fake))
//
// `other` is zero (apart), the logit of the other side with the same index (paired: one term, of the real side), or the
// other side's mean (average). F is softplus, max(y, 0), y^2 / 2 or y.
//
// real and fake are contiguous; loss is one number, the gradients have the logits' sizes; loss and gradients are
// float64 for float64 and float32 otherwise. A side may be absent (null, apart only), and so may the gradients.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

enum class GanFunction : int32_t { kSoftplus = 0, kHinge = 1, kSquare = 2, kLinear = 3 };
enum class GanPairing : int32_t { kApart = 0, kPaired = 1, kAverage = 2 };

struct GanLoss {
  DType dtype;
  GanFunction function;
  GanPairing pairing;
  const void *real, *fake;
  void *loss, *to_real, *to_fake;
  int64_t reals, fakes;
  double real_sign, real_shift, fake_sign, fake_shift, scale;
};

namespace cpu {
void gan_loss(const GanLoss& args);
}  // namespace cpu

}  // namespace genfast
