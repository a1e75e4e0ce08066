// The pieces of work that minibatch_stddev.cpp hands to threads.
#pragma once

#include "common/cpu_features.h"
#include "gan/minibatch_stddev.h"

namespace genfast {

// Elements [begin, end) of feature `feature` of the samples of group `group`.
struct StddevPiece {
  int64_t group, feature, begin, end;
};

// Copies x to out and returns the sum of the standard deviations.
GENFAST_DECLARE_PER_ISA(double, minibatch_stddev_piece, (const MinibatchStddev&, const StddevPiece&))
// Writes y to the maps of one sample.
GENFAST_DECLARE_PER_ISA(void, minibatch_stddev_map, (const MinibatchStddev&, int64_t sample, int64_t feature, double y))
// The sum of the cotangents of one sample's map.
GENFAST_DECLARE_PER_ISA(double, minibatch_stddev_map_sum, (const MinibatchStddev&, int64_t sample, int64_t feature))
// dx of a piece; `factor` is T[m, f] / (size P).
GENFAST_DECLARE_PER_ISA(void, minibatch_stddev_backward_piece,
                        (const MinibatchStddev&, const StddevPiece&, double factor))

}  // namespace genfast
