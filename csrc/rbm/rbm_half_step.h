// One half of a Gibbs step: docs/kernels/rbm_half_step.md.
#pragma once

#include "rbm/rbm_parameters.h"

namespace genfast {

struct RbmHalfStep {
  RbmParameters parameters;
  bool up;
  DType state_dtype;  // of x
  const void* x;      // [rows, units of the given side], contiguous
  int64_t rows;
  const float* beta;   // [beta_count], or null
  int64_t beta_count;  // 1 or rows
  uint64_t seed;
  int64_t chain_offset, step;
  DType sample_dtype;
  void* sample;                                  // [rows, units of the drawn side], or null
  void* mean;                                    // in W's dtype, or null
  bool x_packed = false, sample_packed = false;  // 0/1 states as bits, rows of whole bytes: see rbm_load_bits
};

// Free energies of the rows: F = E_v - log sum over h.
struct RbmFreeEnergy {
  RbmParameters parameters;
  DType state_dtype;
  const void* v;  // [rows, visible], contiguous
  int64_t rows;
  float* out;  // [rows]
};

namespace cpu {
// Returns whether an input was NaN or infinite, or a probability NaN.
bool rbm_half_step(const RbmHalfStep& args, int threads);
void rbm_free_energy(const RbmFreeEnergy& args, int threads);
}  // namespace cpu

}  // namespace genfast
