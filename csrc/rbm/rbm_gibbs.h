// A whole Gibbs chain: docs/kernels/rbm_gibbs.md.
#pragma once

#include "rbm/rbm_parameters.h"

namespace genfast {

struct RbmGibbs {
  RbmParameters parameters;
  DType state_dtype;  // of v
  const void* v;      // [chains, visible], contiguous
  int64_t chains;
  const float* beta;     // [beta_count], or null
  int64_t beta_count;    // 1 or chains
  const uint8_t* clamp;  // [clamp_rows, visible], nonzero: keeps v's value; or null
  int64_t clamp_rows;    // 1 or chains
  uint64_t seed;
  int64_t k, chain_offset, step;
  void* visible;  // [chains, visible], in W's dtype
  void* hidden;   // [chains, hidden], in W's dtype, or null
};

namespace cpu {
// Returns whether an input was NaN or infinite, or a probability NaN.
bool rbm_gibbs(const RbmGibbs& args, int threads);
}  // namespace cpu

}  // namespace genfast
