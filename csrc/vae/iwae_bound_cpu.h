// The pieces of work that iwae_bound.cpp hands to threads: columns [begin, end).
#pragma once

#include "common/cpu_features.h"
#include "vae/iwae_bound.h"

namespace genfast {

GENFAST_DECLARE_PER_ISA(void, iwae_bound_forward_piece, (const IwaeForward&, int64_t begin, int64_t end))
GENFAST_DECLARE_PER_ISA(void, iwae_bound_backward_piece, (const IwaeBackward&, int64_t begin, int64_t end))
GENFAST_DECLARE_PER_ISA(void, iwae_bound_jvp_piece, (const IwaeJvp&, int64_t begin, int64_t end))

}  // namespace genfast
