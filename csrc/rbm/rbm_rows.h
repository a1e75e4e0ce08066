// Half of a Gibbs step for a block of chains, on one thread: product, then the conditional of each unit while its
// inputs are in cache. What the ops rbm_half_step, rbm_gibbs, rbm_cd, rbm_free_energy and rbm_ais are made of.
#pragma once

#include "common/cpu_features.h"
#include "common/dtype.h"

namespace genfast {

enum class UnitKind : int32_t { kBernoulli = 0, kGaussian = 1, kSoftmax = 2, kRelu = 3 };

// How the units of one side are drawn, given the other side.
struct RbmSide {
  UnitKind kind;
  int64_t categories;      // K of softmax units, else 1
  int64_t units, depth;    // N units here, K units on the other side
  bool rounded;            // states of the other side, to bfloat16 (the panels are already)
  int parts;               // of the panels: Pack::parts()
  bool pairs;              // of the panels: Pack::pairs
  DType state_dtype;       // real states are rounded to this type
  const float* panels;     // weights [depth, units], packed (common/gemm/pack.h)
  const float* bias;       // [units], padded with zeros to whole tiles
  const float* deviation;  // sigma [units], padded likewise, or null: 1
};

// Row r is chain `chain + r`. All pointers to rows of units are padded to whole tiles. Null: not wanted.
struct RbmRows {
  const RbmSide* side;
  int64_t rows;
  const float* x;  // states of the other side
  int64_t x_stride;
  const float* beta;  // inverse temperature of row r at beta[r * beta_stride], or null: 1
  int64_t beta_stride;
  float input_scale = 1.0f;     // inputs are input_scale * x W + bias
  const float* bias = nullptr;  // takes the place of the side's, padded likewise
  uint64_t seed;
  uint32_t chain, step;
  float* state;
  int64_t state_stride;
  float* mean;  // mean given x, times mean_scale: a tile's columns of a row lie together, as product.h's Right has them
  int64_t mean_stride, mean_panel_stride;
  float mean_scale;
  bool state_as_mean;     // the states, times mean_scale, take the place of the means
  double* log_partition;  // [rows], sum over units of the log of the sum over states of e^(-beta E)
  // Bernoulli: [rows], log_partition minus what it would be at the inverse temperature last_beta.
  double* log_partition_change;
  float last_beta;
  const float* target;  // squared_error[row] = |target - mean|^2
  int64_t target_stride;
  double* squared_error;
};

// Floats of scratch that `rows` rows of a side need; the side's pointers are not looked at.
GENFAST_DECLARE_WITH_PRODUCT(int64_t, rbm_rows_scratch, (const RbmSide&, int64_t rows))

// Returns whether any unit's input was NaN.
GENFAST_DECLARE_WITH_PRODUCT(bool, rbm_rows, (const RbmRows&, float* scratch))

// Rows between float32 buffers and tensors of any type, [rows, columns] with strides in elements.
// The first returns whether a value was NaN or infinite.
GENFAST_DECLARE_WITH_PRODUCT(bool, rbm_load_rows,
                             (DType dtype, const void* from, int64_t from_stride, float* to, int64_t to_stride,
                              int64_t rows, int64_t columns))
GENFAST_DECLARE_WITH_PRODUCT(void, rbm_store_rows,
                             (DType dtype, const float* from, int64_t from_stride, void* to, int64_t to_stride,
                              int64_t rows, int64_t columns))

// Likewise between float32 buffers and 0/1 states as bits, rows of (columns + 7) / 8 bytes: column 8 i + j is bit j of
// byte i, and unused bits are stored as zeros.
GENFAST_DECLARE_WITH_PRODUCT(void, rbm_load_bits,
                             (const uint8_t* from, float* to, int64_t to_stride, int64_t rows, int64_t columns))
GENFAST_DECLARE_WITH_PRODUCT(void, rbm_store_bits,
                             (const float* from, int64_t from_stride, uint8_t* to, int64_t rows, int64_t columns))

}  // namespace genfast
