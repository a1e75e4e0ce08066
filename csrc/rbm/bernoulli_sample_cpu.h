// The piece of work that bernoulli_sample.cpp hands to threads: columns [begin, end) of one row. Returns whether it met
// NaN.
#pragma once

#include "common/cpu_features.h"
#include "rbm/bernoulli_sample.h"

namespace genfast {

using BernoulliPiece = bool(const BernoulliSample&, int64_t row, int64_t begin, int64_t end);

GENFAST_DECLARE_PER_ISA(bool, bernoulli_sample_piece, (const BernoulliSample&, int64_t row, int64_t begin, int64_t end))

bool bernoulli_sample_double(const BernoulliSample&, int64_t row, int64_t begin, int64_t end);

}  // namespace genfast
