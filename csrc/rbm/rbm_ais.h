// Annealed importance sampling along a piece of a schedule: docs/kernels/rbm_ais.md.
#pragma once

#include "rbm/rbm_parameters.h"

namespace genfast {

// Bernoulli or softmax visible units, Bernoulli hidden units. Temperature t of the piece moves the chains at half-steps
// step + 2 t and step + 2 t + 1, t = 1 ... count - 1; betas[0] is where they are.
struct RbmAis {
  RbmParameters parameters;  // b is the target's
  const double* base_bias;   // [visible]
  const double* bias;        // [visible], b in double
  const double* betas;       // [count]
  int64_t count;
  int64_t chains;
  bool start;  // draw the first states from the base model, at half-step step + 1, instead of reading `state`
  uint64_t seed;
  int64_t chain_offset, step;
  float* state;         // [chains, visible], in and out
  double* log_weights;  // [chains], added to
};

namespace cpu {
// Returns whether an input was NaN or infinite, or a probability NaN.
bool rbm_ais(const RbmAis& args, int threads);
}  // namespace cpu

}  // namespace genfast
