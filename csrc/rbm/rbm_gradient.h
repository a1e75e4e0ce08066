// The gradient of contrastive divergence from both phases' states, and other sums over rows.
#pragma once

#include "common/cpu_features.h"

namespace genfast {

// velocity = momentum * velocity + dW + weight_decay * W, W -= rate * velocity, as torch.optim.SGD has it.
struct RbmSgd {
  float rate, momentum, weight_decay;
  float* W;         // [visible, hidden]
  float* velocity;  // likewise, or null: dW + weight_decay * W
};

// dW = scale (x[0]' h[0] + x[1]' h[1]) - visible_offset dc' - db hidden_offset', where h holds each phase's sign and
// 1 / rows. Rows of x are padded to whole tiles; h is in panels of a tile's columns, [panel][row][tile columns].
struct RbmGradient {
  const float* x[2];  // [rows, visible]
  const float* h[2];
  int64_t rows[2];
  int64_t x_stride;
  int64_t visible, hidden;
  const float* scale;           // [visible], or null: 1
  const float* visible_offset;  // [visible], or null: 0
  const float* hidden_offset;   // [hidden], or null: 0
  const float* db;              // [visible]
  const float* dc;              // [hidden]
  float* dW;                    // [visible, hidden], or null: not wanted
  const RbmSgd* sgd;            // or null
};

// Floats of scratch for `rows` rows of dW, with `depth` rows of x in all.
GENFAST_DECLARE_WITH_PRODUCT(int64_t, rbm_gradient_scratch, (int64_t rows, int64_t hidden, int64_t depth))

// Rows [begin, end) of dW.
GENFAST_DECLARE_WITH_PRODUCT(void, rbm_gradient_rows, (const RbmGradient&, int64_t begin, int64_t end, float* scratch))

// out[column] = scale * the sum over rows of x[row, column], for columns [begin, end), begin a multiple of 16;
// added to out where `add`.
GENFAST_DECLARE_WITH_PRODUCT(void, rbm_column_sums,
                             (const float* x, int64_t stride, int64_t rows, int64_t begin, int64_t end, float scale,
                              bool add, float* out))

// E_v of each row: -x'b, or, where inverse_variance is not null, (x - b)'(x - b) / (2 sigma^2).
GENFAST_DECLARE_WITH_PRODUCT(void, rbm_visible_energy,
                             (const float* x, int64_t stride, int64_t rows, int64_t visible, const float* b,
                              const float* inverse_variance, double* out))

}  // namespace genfast
