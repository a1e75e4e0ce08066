// An RBM's parameters as the ops get them, and both sides prepared for rbm_rows.
#pragma once

#include "common/dtype.h"
#include "common/memory.h"
#include "rbm/rbm_rows.h"

namespace genfast {

struct RbmParameters {
  DType dtype;    // of W
  const void* W;  // [visible, hidden], contiguous
  int64_t visible, hidden;
  const float* b;                 // [visible], or null: 0
  const float* c;                 // [hidden], or null: 0
  const float* inverse_variance;  // Gaussian visible units: 1 / sigma^2 [visible]; else null
  const float* deviation;         // likewise sigma
  UnitKind visible_kind, hidden_kind;
  int64_t visible_categories, hidden_categories;
  bool rounded;  // operands of products, to bfloat16
};

// A side without its pointers.
RbmSide rbm_side(const RbmParameters& parameters, bool up);

// Floats of workspace that rbm_prepare() takes.
int64_t rbm_side_floats(const RbmParameters& parameters, bool up);

// The hidden side (up) or the visible one, with packed weights.
RbmSide rbm_prepare(const RbmParameters& parameters, bool up, Workspace& workspace, int threads);

}  // namespace genfast
