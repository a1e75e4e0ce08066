// pack.h for product_fma.h: a panel is [depth][kTileColumns] of float32, or [half the depth][kTileColumns] of pairs.
#pragma once

#include "common/gemm/bfloat16.h"
#include "common/gemm/gemm.h"
#include "common/gemm/operands.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

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

constexpr int64_t panel_floats(int64_t depth, int) { return depth * kTileColumns; }

template <typename T>
static void pack_panel_pairs(const T* w, const Pack& args, int64_t panel, float* out) {
  const int64_t rows = args.rows, columns = args.columns;
  for (int half = 0; half < 2; ++half) {
    const int64_t first = panel * kTileColumns + half * kWidth;
    float* const to = out + half * kWidth;
    if (args.transposed) {
      for (int64_t k = 0; k < columns; k += 2 * kWidth) {
        VecF square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          square[i] = first + i < rows ? pairs_within(w + (first + i) * columns + k, columns - k) : broadcast(0.0f);
        }
        transpose(square);
        for (int j = 0; j < kWidth && k + 2 * j < columns; ++j) store_float(to + (k / 2 + j) * kTileColumns, square[j]);
      }
      continue;
    }
    const auto row = [&](int64_t k) {
      if (k >= rows || first >= columns) return broadcast(0.0f);
      const VecF scale = broadcast(args.row_scale == nullptr ? 1.0f : args.row_scale[k]);
      return load_upto(w + k * columns + first, columns - first) * scale;
    };
    for (int64_t k = 0; k < rows; k += 2) store_float(to + k / 2 * kTileColumns, pair_of(row(k), row(k + 1)));
  }
}

template <typename T>
static void pack_panel(const T* w, const Pack& args, int64_t panel, float* out) {
  const int64_t rows = args.rows, columns = args.columns, first = panel * kTileColumns;
  const bool rounded = args.rounded;
  if (args.pairs) return pack_panel_pairs(w, args, panel, out);
  if (!args.transposed) {
    for (int64_t k = 0; k < rows; ++k) {
      const VecF scale = broadcast(args.row_scale == nullptr ? 1.0f : args.row_scale[k]);
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
