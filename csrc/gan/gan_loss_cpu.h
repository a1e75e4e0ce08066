// One side of the loss, as gan_loss.cpp asks for it.
#pragma once

#include "common/cpu_features.h"
#include "gan/gan_loss.h"

namespace genfast {

struct GanTerm {
  DType dtype;
  GanFunction function;
  const void* x;
  const void* other;  // may be null; else subtracted from x
  int64_t count;
  double mean;  // subtracted from x
  double sign, shift;
  double factor;   // of the gradient
  void* gradient;  // may be null; factor F'(y)
  double value;    // out: sum of F(y)
  double slope;    // out: sum of F'(y)
};

GENFAST_DECLARE_PER_ISA(void, gan_term, (GanTerm*))
GENFAST_DECLARE_PER_ISA(double, gan_sum, (DType, const void*, int64_t))

}  // namespace genfast
