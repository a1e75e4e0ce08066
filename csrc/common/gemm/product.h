// The project's CPU matrix product: sums of terms A B, with an epilogue on each finished piece while it is in cache.
//
//   out[rows, columns] = sum over terms of A[rows, depth] B[depth, columns]
//
// B is read a panel of kTileColumns columns at a time, kDepthBlock rows of it (16 KiB, which the first cache keeps)
// against all rows of A; a block of kBlockPanels panels is finished for all rows before the epilogue sees it. A may be
// transposed (Left), B packed (pack.h) or read where it lies (Right). The caller splits rows over threads: a row's sums
// run over terms and depth in order, so its bits do not depend on the split.
#pragma once

#include "common/gemm/micro_kernel.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr int kBlockPanels = 4;
constexpr int kBlockColumns = kBlockPanels * kTileColumns;
constexpr int64_t kDepthBlock = 16384 / static_cast<int64_t>(sizeof(float)) / kTileColumns;

// Where B is: row k of panel p at p * panel_stride + k * row_stride, kTileColumns readable elements.
struct Right {
  const float* data;
  int64_t panel_stride, row_stride;
};

struct Term {
  Left a;
  Right b;
  int64_t depth;
};

template <int kRows>
GENFAST_INLINE void tile_step(float* out, int64_t stride, bool fresh, Left a, const float* b, int64_t b_stride,
                              int64_t count) {
  Tile<kRows> tile;
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      tile.sums[r][half] = fresh ? broadcast(0.0f) : load_float(out + r * stride + half * kWidth);
    }
  }
  accumulate(tile, a, b, b_stride, count);
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) store_float(out + r * stride + half * kWidth, tile.sums[r][half]);
  }
}

// The last rows, fewer than kMaxRows.
template <int kRows>
static void tile_rest(int64_t rows, float* out, int64_t stride, bool fresh, Left a, const float* b, int64_t b_stride,
                      int64_t count) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      tile_step<kRows>(out, stride, fresh, a, b, b_stride, count);
    } else {
      tile_rest<kRows - 1>(rows, out, stride, fresh, a, b, b_stride, count);
    }
  }
}

static void tile_rows(int64_t rows, float* out, int64_t stride, bool fresh, Left a, const float* b, int64_t b_stride,
                      int64_t count) {
  int64_t row = 0;
  for (; row + kMaxRows <= rows; row += kMaxRows) {
    tile_step<kMaxRows>(out + row * stride, stride, fresh, a, b, b_stride, count);
    a.data += kMaxRows * a.row_stride;
  }
  tile_rest<kMaxRows - 1>(rows - row, out + row * stride, stride, fresh, a, b, b_stride, count);
}

// Calls epilogue(row, column, count, values) for every row of every finished block; `values` may be overwritten up to
// the block's padded width. `block` has room for rows * block_panels * kTileColumns floats.
template <typename Epilogue>
void product(const Term* terms, int term_count, int64_t rows, int64_t columns, int64_t block_panels, float* block,
             Epilogue& epilogue) {
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t stride = block_panels * kTileColumns;
  for (int64_t first = 0; first < panels; first += block_panels) {
    const int64_t last = first + block_panels < panels ? first + block_panels : panels;
    bool fresh = true;
    for (int t = 0; t < term_count; ++t) {
      const Term& term = terms[t];
      for (int64_t k = 0; k < term.depth; k += kDepthBlock) {
        const int64_t count = term.depth - k < kDepthBlock ? term.depth - k : kDepthBlock;
        const Left a = {term.a.data + k * term.a.step, term.a.row_stride, term.a.step};
        for (int64_t panel = first; panel < last; ++panel) {
          const float* b = term.b.data + panel * term.b.panel_stride + k * term.b.row_stride;
          tile_rows(rows, block + (panel - first) * kTileColumns, stride, fresh, a, b, term.b.row_stride, count);
        }
        fresh = false;
      }
    }
    const int64_t column = first * kTileColumns;
    const int64_t width = (last - first) * kTileColumns;
    if (fresh) {
      for (int64_t i = 0; i < rows; ++i) memset(block + i * stride, 0, static_cast<size_t>(width) * sizeof(float));
    }
    const int64_t count = columns - column < width ? columns - column : width;
    for (int64_t row = 0; row < rows; ++row) epilogue(row, column, count, block + row * stride);
  }
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
