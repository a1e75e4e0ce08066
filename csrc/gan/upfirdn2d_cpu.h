// What upfirdn2d.cpp hands to threads: items [first, last) of (plane, band of output rows) of planar tensors, or of
// (batch entry, block of channels, band) channels last.
#pragma once

#include "common/cpu_features.h"
#include "gan/fir_axis.h"
#include "gan/upfirdn2d.h"

namespace genfast {

template <typename A>
struct Upfirdn2dPlan {
  FirAxis<A> y;           // not separable: its weights number the rows of the filter
  const FirAxis<A>* x;    // one, or one for each row of the filter
  int64_t band, bands;    // output rows of an item, items of a plane
  int64_t block, blocks;  // channels of an item, channels last
};

struct Upfirdn2dPiece {
  int64_t first, last;
  void* buffer;  // of the thread
};

GENFAST_DECLARE_PER_ISA(void, upfirdn2d_piece, (const Upfirdn2d&, const Upfirdn2dPlan<float>&, const Upfirdn2dPiece&))
GENFAST_DECLARE_PER_ISA(void, upfirdn2d_piece_double,
                        (const Upfirdn2d&, const Upfirdn2dPlan<double>&, const Upfirdn2dPiece&))

}  // namespace genfast
