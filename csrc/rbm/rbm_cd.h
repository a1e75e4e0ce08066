// Contrastive divergence in one call: docs/kernels/rbm_cd.md.
#pragma once

#include "rbm/rbm_gradient.h"
#include "rbm/rbm_parameters.h"

namespace genfast {

struct RbmCd {
  RbmParameters parameters;
  DType v_dtype;
  const void* v;  // data [rows, visible], contiguous
  int64_t rows;
  DType chains_dtype;
  const void* chains;  // [chain_count, visible], contiguous; or null: the chains start at v
  int64_t chain_count;
  const float* visible_offset;  // [visible], or null: 0
  const float* hidden_offset;   // [hidden], or null: 0
  uint64_t seed;
  int64_t k, chain_offset, step;
  bool sample_hidden;  // the gradient takes the hidden units' samples, not their means
  float* dW;           // [visible, hidden], or null: not wanted
  float* db;           // [visible]; before the correction for hidden_offset
  float* dc;           // [hidden]; before the correction for visible_offset
  void* moved;         // chains after k steps, in W's dtype
  float* statistics;   // [2]: reconstruction error (0 with chains), free-energy gap
  float* hidden_mean;  // [hidden], over the data: of the means, or of the samples
  const RbmSgd* sgd;   // moves W once the chains are done, or null
};

namespace cpu {
// Returns whether an input was NaN or infinite, or a probability NaN.
bool rbm_cd(const RbmCd& args, int threads);
}  // namespace cpu

}  // namespace genfast
