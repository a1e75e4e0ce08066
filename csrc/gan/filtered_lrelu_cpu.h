// What filtered_lrelu.cpp hands to threads: items [first, last) of (plane, band of output rows).
#pragma once

#include "common/cpu_features.h"
#include "gan/filtered_lrelu.h"
#include "gan/fir_axis.h"

namespace genfast {

template <typename A>
struct FilteredLreluPlan {
  FirAxis<A> in_y, in_x;      // v to the middle
  FirAxis<A> gate_y, gate_x;  // gate to the middle
  FirAxis<A> out_y, out_x;    // the middle to out
  int64_t band, bands;        // output rows of an item, items of a plane
  int64_t middle, row;        // elements of a buffer for a row of the middle and of the ring
  int64_t buffer;             // elements of a thread
};

struct FilteredLreluPiece {
  int64_t first, last;
  void* buffer;  // of the thread
};

GENFAST_DECLARE_PER_ISA(void, filtered_lrelu_piece,
                        (const FilteredLrelu&, const FilteredLreluPlan<float>&, const FilteredLreluPiece&))
GENFAST_DECLARE_PER_ISA(void, filtered_lrelu_piece_double,
                        (const FilteredLrelu&, const FilteredLreluPlan<double>&, const FilteredLreluPiece&))

}  // namespace genfast
