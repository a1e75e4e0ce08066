// Arrays through the vector functions of csrc/common, once per instruction set (probe.cpp). Counts are any size.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"

namespace genfast {

struct Probe {
  int width;
  // out: 4 words of each of `groups` consecutive counters, in index order; groups is a multiple of the width.
  void (*philox)(uint32_t* out, uint64_t group, int64_t groups, uint32_t c1, bool group_is_64_bit, uint32_t c2,
                 uint32_t c3, uint64_t seed);
  // out has room for count rounded up to 4 * width.
  void (*normals)(float* out, uint64_t group, int64_t count, uint32_t step, uint64_t seed);
  void (*uniforms)(float* out, uint32_t group, int64_t count, uint32_t chain, uint32_t step, uint64_t seed);
  void (*rbm_normals)(float* out, uint32_t group, int64_t count, uint32_t chain, uint32_t step, uint64_t seed);
  void (*exp)(const float* x, float* out, int64_t count);
  void (*log)(const float* x, float* out, int64_t count);
  void (*sigmoid)(const float* x, float* out, int64_t count);
  void (*softplus)(const float* x, float* out, int64_t count);
  void (*tanh)(const float* x, float* out, int64_t count);
  void (*normal_cdf)(const float* x, float* out, int64_t count);
  void (*normal_density)(const float* x, float* out, int64_t count);
  // Masks to bits and back: out[i] = x < 0 ? 1 : 2, by bits; count is a multiple of the width.
  void (*bits)(const float* x, float* out, int64_t count);
  void (*half_expm1_minus)(const float* x, float* out, int64_t count);
  void (*half_expm1)(const float* x, float* out, int64_t count);
  void (*truncated_mean)(const float* s, float* out, int64_t count);
  void (*truncated_log_partition)(const float* s, float* out, int64_t count);
  void (*truncated_sample)(const float* s, const float* u, float* out, int64_t count);
  void (*radius)(const uint32_t* words, float* out, int64_t count);
  void (*cos_sin)(const uint32_t* words, float* cosine, float* sine, int64_t count);
  void (*to_half)(const float* x, uint16_t* out, int64_t count);
  void (*from_half)(const uint16_t* x, float* out, int64_t count);
  void (*to_bfloat16)(const float* x, uint16_t* out, int64_t count);
  void (*from_bfloat16)(const uint16_t* x, float* out, int64_t count);
  // sums[i] is the sum of the vector x[i * width ...]; count is a multiple of the width.
  void (*sums)(const float* x, float* sums, int64_t count);
  // The same of as many vectors as one has lanes, together.
  void (*sums_of)(const float* x, float* sums);
  // Lanes of comparisons and selections: out[i] = a < b ? a : b, NaN lanes set to 7.
  void (*compare)(const float* a, const float* b, float* out, int64_t count);
};

GENFAST_DECLARE_WITH_PRODUCT(const Probe*, probe, ())

}  // namespace genfast
