// The run of neighbours that bias_act.cpp hands to a kernel.
#pragma once

#include "common/cpu_features.h"
#include "gan/bias_act.h"

namespace genfast {

// Elements [at, at + count) of every tensor. Of one channel: *b and *v_b are its values (null: zero) and *sums is set
// to its sum. Of `columns`: b[i], v_b[i] and sums[i] belong to element at + i, and sums are added to. They are doubles
// for float64 and floats otherwise.
struct BiasActRun {
  int64_t at, count;
  const void *b, *v_b;
  void* sums;
  uint8_t* bits;  // of the first plane, at the run's first element
  int64_t plane;  // bytes between planes
  bool columns;
  bool stream;  // results go past the caches
};

using BiasActKernel = void (*)(const BiasAct&, const BiasActRun&);

// The kernel of a call's dtype, activation and order.
GENFAST_DECLARE_PER_ISA(BiasActKernel, bias_act_kernel, (const BiasAct&))
BiasActKernel bias_act_double_kernel(const BiasAct& args);

}  // namespace genfast
