// The piece of work that rotary.cpp hands to threads: heads [head, head_end) and rows [row, row_end) of one batch
// entry.
#pragma once

#include "common/cpu_features.h"
#include "transformer/rotary.h"

namespace genfast {

struct RotaryPiece {
  int64_t batch, head, head_end, row, row_end;
};

GENFAST_DECLARE_PER_ISA(void, rotary_piece, (const Rotary&, const RotaryPiece&))

}  // namespace genfast
