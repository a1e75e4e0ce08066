// The pieces of work that log_ratio.cpp hands to threads. Forward and jvp take whole rows of some samples, so that a
// piece writes every sum it makes; the backward takes flat elements [begin, end) of [rows, event] and adds all samples.
#pragma once

#include "common/cpu_features.h"
#include "vae/log_ratio.h"

namespace genfast {

struct RowPiece {
  int64_t row_begin, row_end, k_begin, k_end;
};

// The most samples of a piece.
constexpr int64_t kPieceSamples = 16;

using LogRatioForwardPiece = void(const LogRatioForward&, const RowPiece&);
using LogRatioBackwardPiece = void(const LogRatioBackward&, int64_t begin, int64_t end);
using LogRatioJvpPiece = void(const LogRatioJvp&, const RowPiece&);

GENFAST_DECLARE_PER_ISA(void, log_ratio_forward_piece, (const LogRatioForward&, const RowPiece&))
GENFAST_DECLARE_PER_ISA(void, log_ratio_backward_piece, (const LogRatioBackward&, int64_t begin, int64_t end))
GENFAST_DECLARE_PER_ISA(void, log_ratio_jvp_piece, (const LogRatioJvp&, const RowPiece&))

// float64, by the C library: the same on every instruction set.
void log_ratio_forward_double(const LogRatioForward&, const RowPiece&);
void log_ratio_backward_double(const LogRatioBackward&, int64_t begin, int64_t end);
void log_ratio_jvp_double(const LogRatioJvp&, const RowPiece&);

}  // namespace genfast
