// Packs a matrix W[rows, columns] into the panels that product.h reads as B: panel p holds columns p * kTileColumns ...
// of B as [depth][kTileColumns], with zeros beyond the last column. B is W, or W transposed.
#pragma once

#include "common/gemm/product.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

GENFAST_INLINE VecF round_to_bfloat16(VecF x) {
  const VecU bits = as_uint(x), odd = bit_and(shift_right<16>(bits), broadcast(uint32_t{1}));
  const VecU rounded = add(bits, add(odd, broadcast(uint32_t{0x7FFF})));
  return select(is_nan(x), x, as_float(bit_and(rounded, broadcast(uint32_t{0xFFFF0000}))));
}

template <typename T>
GENFAST_INLINE VecF load_rounded(const T* p, int64_t count, bool rounded) {
  const VecF x = load_upto(p, count);
  return rounded ? round_to_bfloat16(x) : x;
}

// kWidth x kWidth elements of W at `from`, transposed to `to`; rows and columns beyond the counts read as zero.
template <typename T>
GENFAST_INLINE void transpose_square(const T* from, int64_t stride, int64_t rows, int64_t columns, bool rounded,
                                     float* to, int64_t to_stride) {
  VecF square[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    square[i] = i < rows ? load_rounded(from + i * stride, columns, rounded) : broadcast(0.0f);
  }
  transpose(square);
  const int64_t count = columns < kWidth ? columns : kWidth;
  for (int64_t j = 0; j < count; ++j) store_float(to + j * to_stride, square[j]);
}

// Panel `panel` of B = W (transposed: W'), whose rows are scaled where row_scale is not null (not for W').
template <typename T>
static void pack_panel(const T* w, int64_t rows, int64_t columns, bool transposed, bool rounded, const float* row_scale,
                       int64_t panel, float* out) {
  const int64_t first = panel * kTileColumns;
  if (!transposed) {
    for (int64_t k = 0; k < rows; ++k) {
      const VecF scale = broadcast(row_scale == nullptr ? 1.0f : row_scale[k]);
      for (int half = 0; half < 2; ++half) {
        const int64_t column = first + half * kWidth;
        VecF x = broadcast(0.0f);
        if (column < columns) x = load_upto(w + k * columns + column, columns - column) * scale;
        store_float(out + k * kTileColumns + half * kWidth, rounded ? round_to_bfloat16(x) : x);
      }
    }
    return;
  }
  for (int64_t k = 0; k < columns; k += kWidth) {
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + half * kWidth;
      transpose_square(w + (row < rows ? row : 0) * columns + k, columns, rows - row, columns - k, rounded,
                       out + k * kTileColumns + half * kWidth, kTileColumns);
    }
  }
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
