// One image, as diff_augment.cpp hands it to threads.
#pragma once

#include "common/cpu_features.h"
#include "gan/diff_augment.h"

namespace genfast {

// Element (c, h, w) of out is own x + shared (mean of x over channels) + base at (c, h + row_shift, w + column_shift)
// of x, where that is inside and outside the rectangle of out, which is rows [cut_row, cut_row_end) and likewise
// columns; elsewhere `outside`.
struct AugmentedImage {
  DType dtype;
  const void* x;
  void* out;
  int64_t channels, height, width;
  int64_t row_shift, column_shift, cut_row, cut_row_end, cut_column, cut_column_end;
  double own, shared, base, outside;
};

GENFAST_DECLARE_PER_ISA(void, augment_image, (const AugmentedImage&))
// The sum of the elements of x that out shows.
GENFAST_DECLARE_PER_ISA(double, shown_sum, (const AugmentedImage&))

}  // namespace genfast
