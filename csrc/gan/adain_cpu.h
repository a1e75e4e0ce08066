// The pieces of work that adain.cpp hands to threads: planes [begin, end).
#pragma once

#include "common/cpu_features.h"
#include "gan/adain.h"

namespace genfast {

GENFAST_DECLARE_PER_ISA(void, instance_norm_planes, (const InstanceNorm&, int64_t begin, int64_t end))
GENFAST_DECLARE_PER_ISA(void, instance_norm_backward_planes, (const InstanceNorm&, int64_t begin, int64_t end))

}  // namespace genfast
