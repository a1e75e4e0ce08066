// The pieces of work that log_likelihood.cpp hands to threads: positions [begin, end) of [rows, size].
#pragma once

#include "common/cpu_features.h"
#include "vae/log_likelihood.h"
#include "vae/reparameterize_cpu.h"

namespace genfast {

// Positions whose planes the kernels of classes and mixtures keep side by side in `scratch`, [planes, block] floats.
inline int64_t block_of_planes(int64_t planes) {
  const int64_t fitting = 32768 / (planes > 0 ? planes : 1) / 16 * 16;
  return fitting < 16 ? 16 : fitting > 64 ? 64 : fitting;
}

using LogLikelihoodPiece = bool(const LogLikelihood&, int64_t begin, int64_t end, float* scratch, KlPartials*);
using ScaleRowsPiece = void(const ScaleRows&, int64_t begin, int64_t end);

GENFAST_DECLARE_PER_ISA(bool, log_likelihood_piece,
                        (const LogLikelihood&, int64_t begin, int64_t end, float* scratch, KlPartials*))
GENFAST_DECLARE_PER_ISA(bool, log_likelihood_planes_piece,
                        (const LogLikelihood&, int64_t begin, int64_t end, float* scratch, KlPartials*))
GENFAST_DECLARE_PER_ISA(void, scale_rows_piece, (const ScaleRows&, int64_t begin, int64_t end))

// float64, by the C library: the same on every instruction set.
bool log_likelihood_double(const LogLikelihood&, int64_t begin, int64_t end, float* scratch, KlPartials*);

// A count's log-likelihood and its gradient by log mean, log theta and the logit of its zeros; in float64, because its
// terms are far larger than their sum.
struct CountTerms {
  double value, to_log_mean, to_log_theta, to_logit;
};
CountTerms negative_binomial_terms(double log_mean, double log_theta, double x);
CountTerms zero_inflated_terms(double log_mean, double log_theta, double logit, double x);

}  // namespace genfast
