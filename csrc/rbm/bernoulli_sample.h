// Bernoulli sample from logits in one pass: p = sigmoid(beta (logits + bias)), sample = u < p with u the uniform of the
// RBM layout of common/philox.h at (chain row_offset + row, unit col_offset + column, half-step `step`). NaN logits
// give NaN samples (255 in uint8) and NaN probabilities.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct BernoulliSample {
  DType dtype;         // of logits and prob
  DType sample_dtype;  // of sample
  const void* logits;  // [rows, columns], contiguous
  const void* bias;    // [columns], float32 (float64 for float64 logits), or null
  void* sample;        // [rows, columns]
  void* prob;          // [rows, columns], or null: not wanted
  int64_t rows, columns;
  double beta;
  uint64_t seed;
  const int64_t* seed_pointer;  // CUDA: where not null, the seed is read from there on the device.
  int64_t row_offset, col_offset;
  int64_t step;
};

namespace cpu {
// Returns whether any logit plus bias was NaN.
bool bernoulli_sample(const BernoulliSample& args, int threads);
}  // namespace cpu

namespace cuda {
void bernoulli_sample(const BernoulliSample& args, void* stream);
}  // namespace cuda

}  // namespace genfast
