// What the float64 kernels of Gaussian samples share: plain loops and the C library.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "vae/reparameterize.h"

namespace genfast {
namespace {

// e^(logvar/4), finite: sigma = root^2 may still be infinite. NaN stays NaN, as fmin would not let it.
inline double root_of(double logvar) { return std::exp(logvar * 0.25 > 709.0 ? 709.0 : logvar * 0.25); }

inline double normal(const ReparameterizeShape& shape, int64_t k, int64_t position) {
  const uint64_t index = static_cast<uint64_t>(shape.offset + position);
  const philox::Words words =
      philox::tensor_words(index >> 2, static_cast<uint32_t>(k), philox::kTensorNormal, shape.seed);
  const int pair = static_cast<int>(index & 2);
  const double radius = std::sqrt(-2.0 * std::log((words.w[pair] + 1.0) * 0x1p-32));
  const double angle = words.w[pair + 1] * (6.283185307179586476925286766559 * 0x1p-32);
  return radius * ((index & 1) ? std::sin(angle) : std::cos(angle));
}

inline const double* doubles(const void* p) { return static_cast<const double*>(p); }
inline double* doubles(void* p) { return static_cast<double*>(p); }

}  // namespace
}  // namespace genfast
