// product.h with vector multiply-adds.
//
// B is read a panel of kTileColumns columns at a time, kDepthBlock rows of it (16 KiB, which the first cache keeps)
// against all rows of A; a block of panels is finished for all rows before the epilogue sees it. A is gathered, a
// tile's rows together, so that the inner loop reads one stream of it: all at once, or, where it is transposed (Left),
// kDepthBlock rows of it once a block of panels. B is packed (pack.h) or read where it lies (Right). Of one term whose
// B is packed in pairs of bfloat16, A is rounded to pairs as it is gathered (product_pairs.h). The caller splits rows
// over threads: a row's sums run over terms and depth in order, so its bits do not depend on the split.
#pragma once

#include "common/gemm/product_pairs.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr bool kConvertsLeft = false;
constexpr int64_t kMostRows = 96;           // each float of B is then used 96 times: 2 to 3 GB/s of it feed a core
constexpr int kTransposedBlockPanels = 16;  // of a product with a transposed A: one gathering serves more columns

// Panels that a product with so many columns should finish at a time.
constexpr int64_t block_panels(int64_t columns, bool a_transposed) {
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t most = a_transposed ? kTransposedBlockPanels : kBlockPanels;
  return panels < most ? panels : most;
}

GENFAST_INLINE Right packed_right(const float* panels, int64_t depth, int) {
  return {panels, depth * kTileColumns, kTileColumns};
}

// Floats of `room`: for gather() of a piece, or gather_rows() of all.
constexpr int64_t room_floats(int64_t rows, int64_t depth, bool a_transposed) {
  return (rows + kMaxRows - 1) / kMaxRows * kMaxRows * (a_transposed ? kDepthBlock : depth) + 2 * kWidth;
}

template <typename Epilogue>
void product(const Term* terms, int term_count, int64_t rows, int64_t columns, int64_t block_panels, float* block,
             Epilogue& epilogue, float* room) {
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t stride = block_panels * kTileColumns;
  const int64_t padded_rows = (rows + kMaxRows - 1) / kMaxRows * kMaxRows;
  const bool gathered = term_count == 1 && terms[0].a.step == 1, pairs = gathered && terms[0].b.pairs;
  const auto steps = [pairs](const Term& term) { return pairs ? pair_steps(term.depth) : term.depth; };
  if (gathered) {
    const Term& term = terms[0];
    for (int64_t k = 0; k < steps(term); k += kDepthBlock) {
      const int64_t count = steps(term) - k < kDepthBlock ? steps(term) - k : kDepthBlock;
      if (pairs) {
        gather_row_pairs(term.a.data + 2 * k, term.a.row_stride, rows, term.depth - 2 * k, count,
                         room + k * padded_rows);
      } else {
        gather_rows(term.a.data + k, term.a.row_stride, rows, count, room + k * padded_rows);
      }
    }
  }
  for (int64_t first = 0; first < panels; first += block_panels) {
    const int64_t last = first + block_panels < panels ? first + block_panels : panels;
    bool fresh = true;
    for (int t = 0; t < term_count; ++t) {
      const Term& term = terms[t];
      for (int64_t k = 0; k < steps(term); k += kDepthBlock) {
        const int64_t count = steps(term) - k < kDepthBlock ? steps(term) - k : kDepthBlock;
        Left a = {term.a.data + k * term.a.step, term.a.row_stride, term.a.step};
        int64_t group_stride = kMaxRows * a.row_stride;
        if (gathered) {
          a = {room + k * padded_rows, 1, kMaxRows};
          group_stride = kMaxRows * count;
        } else if (a.step != 1) {
          gather(a, rows, count, room);
          a = {room, 1, kMaxRows};
          group_stride = kMaxRows * count;
        }
        for (int64_t panel = first; panel < last; ++panel) {
          const float* b = term.b.data + panel * term.b.panel_stride + k * term.b.row_stride;
          float* const to = block + (panel - first) * kTileColumns;
          if (pairs) {
            pair_tile_rows(rows, to, stride, fresh, a, group_stride, b, term.b.row_stride, count, 1.0f);
          } else {
            tile_rows(rows, to, stride, fresh, a, group_stride, b, term.b.row_stride, count);
          }
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
