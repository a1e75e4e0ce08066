// Bias, activation, gain and clamp in one pass, their gradient and the gradient of that; formulas, floor and tiling in
// docs/kernels/bias_act.md.
//
//   z = x + b,  f(z) = gain act(z),  m(z) = 1 where |f(z)| <= clamp, else 0
//   order 0:  out = f(z) limited to [-clamp, clamp]
//   order 1:  out = dy m f'(z),  sums = the sum of out over a channel
//   order 2:  w = v + v_b,  out = w m f'(z),  to_x = dy w m f''(z),  sums = the sum of to_x over a channel
//
// All tensors are dense, [outer, channels, inner] in memory order; b, v_b and sums are [channels], float64 for float64
// and float32 otherwise.
//
// Bits of a piecewise linear activation, for the gradient: one plane, 1 where the slope is gain, or two (lrelu with a
// clamp), the first 1 where z > 0 and the second 1 inside the clamp. Lines of `inner` elements each begin at a multiple
// of two bytes; where inner < kShortest (after channels = 1 made all one line) the tensor is one line. Bit i % 8 of
// byte i / 8.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

// In the order of ACTIVATIONS in genfast/ops/_bias_act_reference.py; selu is elu with another gain and alpha.
enum class Activation : int32_t {
  kLinear = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kTanh = 3,
  kSigmoid = 4,
  kElu = 5,
  kSoftplus = 6,
  kSwish = 7,
  kGelu = 8,
};

struct BiasAct {
  static constexpr int64_t kShortest = 32;

  DType dtype;
  Activation act;
  int32_t order;
  const void *x, *b;         // b may be null; x too, for order 1 with bits
  const void *dy, *v, *v_b;  // dy of orders 1 and 2; v and v_b of order 2, where one may be null
  void *out, *to_x, *sums;   // null: not wanted
  uint8_t* bits;             // written by order 0, read by order 1; may be null
  int32_t planes;            // of bits
  int64_t outer, channels, inner;
  double alpha, gain, clamp;  // clamp: infinity for none
};

namespace cpu {
void bias_act(const BiasAct& args, int threads);
}  // namespace cpu

}  // namespace genfast
