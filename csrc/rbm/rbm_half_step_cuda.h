// What the CUDA kernels of the RBM ops take: docs/kernels/rbm_half_step.md. Device pointers; null: not wanted.
#pragma once

#include "common/dtype.h"
#include "rbm/rbm_rows.h"

namespace genfast {

// A matrix as tensor cores read it: [parts][rows][stride] bfloat16, stride a multiple of 8, data 16-byte aligned.
// The sum of the parts is the matrix; columns from the matrix's own count on are never read as numbers.
struct RbmOperand {
  const void* data;
  int64_t part_stride, stride;
  int parts;
  const uint8_t* row_parts;  // [rows]: parts of a row beyond it are zero; or null: all parts count
};

// from [rows, columns], contiguous, times scale[row], into an operand's memory.
struct RbmPrepare {
  DType dtype;
  const void* from;
  int64_t rows, columns;
  const float* scale;  // [rows], or null: 1
  int parts;
  void* to;
  int64_t part_stride, stride;
  uint8_t* row_parts;  // written; or null
};

// What becomes of the products x of a row of units (csrc/rbm/rbm_rows.h).
struct RbmDraw {
  UnitKind kind;  // Bernoulli or Gaussian
  int64_t rows, units;
  const float* bias;  // [units], or null: 0
  const float* beta;  // [beta_count], or null: 1
  int64_t beta_count;
  const float* deviation;  // [units], or null: 1
  uint64_t seed;
  const int64_t* seed_pointer;  // or null: seed
  int64_t chain_offset, step;
  const uint8_t* clamp;  // [clamp_rows, units], nonzero: the state is the target's; or null
  int64_t clamp_rows;    // 1 or rows
  DType target_dtype;
  const void* target;  // [rows, units], contiguous
  DType state_dtype;
  void* state;    // [rows, units], contiguous
  void* operand;  // the state once more, bfloat16 with operand_stride
  int64_t operand_stride;
  uint8_t* bits;        // the state once more: bit unit % 8 of byte unit / 8
  int64_t bits_stride;  // bytes, a multiple of 4
  uint8_t* bits_nan;    // [rows]: set to 1 where a state is NaN, else left
  DType mean_dtype;
  void* mean;  // times mean_scale; [rows, units], contiguous
  float mean_scale;
  float*
      log_partition;  // [ceil(units / 32), rows]: sums over 32 units of the log of the sum over states of e^(-beta E)
  float* squared_error;  // [ceil(units / 32), rows]: sums of (target - mean)^2
};

struct RbmHalfStepCuda {
  RbmOperand weights, x;
  int64_t visible, hidden;
  bool up;
  RbmDraw draw;
};

enum class RbmGibbsForm : int32_t { kAuto = 0, kLaunches = 1, kResident = 2 };

struct RbmGibbsCuda {
  RbmOperand up_weights, down_weights, x;
  int64_t visible, hidden, chains;
  UnitKind visible_kind, hidden_kind;
  DType dtype;     // of W: that of the states
  bool rounded;    // operands of products, to bfloat16
  const float* b;  // [visible]
  const float* c;  // [hidden]
  const float* deviation;
  const float* beta;
  int64_t beta_count;
  const uint8_t* clamp;
  int64_t clamp_rows;
  DType target_dtype;
  const void* target;  // where clamped: the states to keep
  uint64_t seed;
  const int64_t* seed_pointer;
  int64_t k, chain_offset, step;  // k > 0
  void* visible_out;
  void* hidden_out;
  void* workspace;
  int64_t workspace_bytes;
  RbmGibbsForm form;
};

struct RbmFreeEnergyCuda {
  DType dtype;  // of v
  const void* v;
  int64_t rows, visible, hidden;
  const float* b;
  const float* inverse_variance;  // or null: 1
  bool gaussian;
  const float* log_partition;  // [ceil(hidden / 32), rows]
  float* out;                  // [rows]
};

// Mean reconstruction error, and the difference of the means of two sets of free energies.
struct RbmStatisticsCuda {
  const float* squared_error;  // [ceil(visible / 32), rows], or null: 0
  int64_t rows, visible;
  const float* data;   // [rows]
  const float* model;  // [chains]
  int64_t chains;
  float* out;  // [2]
};

namespace cuda {
void rbm_prepare(const RbmPrepare& args, void* stream);
void rbm_half_step(const RbmHalfStepCuda& args, void* stream);
int64_t rbm_gibbs_workspace(const RbmGibbsCuda& args);
void rbm_gibbs(const RbmGibbsCuda& args, void* stream);
void rbm_free_energy(const RbmFreeEnergyCuda& args, void* stream);
void rbm_statistics(const RbmStatisticsCuda& args, void* stream);
}  // namespace cuda

}  // namespace genfast
