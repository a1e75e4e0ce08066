// log p(x | parameters) of each row and its gradient by the parameters, in one pass; formulas, floor and tiling in
// docs/kernels/log_likelihood.md.
//
// params and to_params are contiguous [rows, planes, size]: `planes` parameters for each of `size` positions. x is
// contiguous [x_rows, targets, size], and row r has the target of row r % x_rows. value is [rows]; shared, one
// parameter more that rows have in common, is [shared_rows, size] with shared_rows 1 or x_rows, and to_shared [rows,
// size]: float64 for float64 params and float32 otherwise. Gradients are those of a row's own value, times `factor`.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

// In the order of LIKELIHOODS in genfast/ops/_log_likelihood_reference.py.
enum class Likelihood : int32_t {
  kBernoulli = 0,
  kContinuousBernoulli = 1,
  kGaussian = 2,  // mean [, logvar]
  kCategorical = 3,
  kDiscretizedLogistic = 4,         // mean, log scale
  kDiscretizedLogisticMixture = 5,  // M weights, then M means, M log scales and, for three channels, M couplings each
  kNegativeBinomial = 6,            // log mean [, log theta]
  kZeroInflatedNegativeBinomial = 7,
};

// Of a target: DType's codes, and int64 for classes.
constexpr int32_t kInt64 = 6;

struct LogLikelihood {
  Likelihood likelihood;
  DType dtype;
  int32_t x_dtype;
  const void *params, *shared, *x;      // shared may be null
  void *value, *to_params, *to_shared;  // the gradients may be null: not wanted
  int64_t rows, planes, size, targets, x_rows, shared_rows;
  double logvar;  // of a Gaussian whose variance is fixed
  double factor;
};

struct ScaleRows {
  DType dtype;
  void* values;           // [rows, event], holding `held` times a row's gradient
  const void* cotangent;  // [rows], float64 for float64 values and float32 otherwise
  int64_t rows, event;
  double held;
};

namespace cpu {
// False where a target is not one that the likelihood has.
bool log_likelihood(const LogLikelihood& args, int threads);
// values *= cotangent / held, row by row; rows whose cotangent is `held` are left alone, and zero makes zero.
void scale_rows(const ScaleRows& args, int threads);
}  // namespace cpu

}  // namespace genfast
