// product.h with vector multiply-adds.
//
// B is read a panel of kTileColumns columns at a time, kDepthBlock rows of it (16 KiB, which the first cache keeps)
// against all rows of A; a block of panels is finished for all rows before the epilogue sees it. A is gathered, a
// tile's rows together, so that the inner loop reads one stream of it: all at once, or, where it is transposed (Left),
// kDepthBlock rows of it once a block of panels. B is packed (pack.h) or read where it lies (Right). The caller splits
// rows over threads: a row's sums run over terms and depth in order, so its bits do not depend on the split.
#pragma once

#include "common/gemm/micro_kernel.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr bool kConvertsLeft = false;
constexpr int64_t kMostRows = 96;           // each float of B is then used 96 times: 2 to 3 GB/s of it feed a core
constexpr int kTransposedBlockPanels = 16;  // of a product with a transposed A: one gathering serves more columns
constexpr int64_t kDepthBlock = 16384 / static_cast<int64_t>(sizeof(float)) / kTileColumns;

// Panels that a product with so many columns should finish at a time.
constexpr int64_t block_panels(int64_t columns, bool a_transposed) {
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t most = a_transposed ? kTransposedBlockPanels : kBlockPanels;
  return panels < most ? panels : most;
}

GENFAST_INLINE Right packed_right(const float* panels, int64_t depth, int) {
  return {panels, depth * kTileColumns, kTileColumns};
}

template <int kRows>
GENFAST_INLINE void tile_step(float* out, int64_t stride, bool fresh, Left a, const float* b, int64_t b_stride,
                              int64_t count) {
  Tile<kRows> tile;
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) tile.sums[r][half] = broadcast(0.0f);
  }
  accumulate(tile, a, b, b_stride, count);
  for (int r = 0; r < kRows; ++r) {  // sums of kDepthBlock products, then sums of those: they round less than one sum
    for (int half = 0; half < 2; ++half) {
      float* const at = out + r * stride + half * kWidth;
      store_float(at, fresh ? tile.sums[r][half] : load_float(at) + tile.sums[r][half]);
    }
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

// `group_stride`: from one group of kMaxRows rows of A to the next.
GENFAST_NOINLINE void tile_rows(int64_t rows, float* out, int64_t stride, bool fresh, Left a, int64_t group_stride,
                                const float* b, int64_t b_stride, int64_t count) {
  int64_t row = 0;
  for (; row + kMaxRows <= rows; row += kMaxRows) {
    tile_step<kMaxRows>(out + row * stride, stride, fresh, a, b, b_stride, count);
    a.data += group_stride;
  }
  tile_rest<kMaxRows - 1>(rows - row, out + row * stride, stride, fresh, a, b, b_stride, count);
}

// Rows of a transposed A, kMaxRows together: [group][count][kMaxRows].
static void gather(Left a, int64_t rows, int64_t count, float* out) {
  constexpr int kVectors = (kMaxRows + kWidth - 1) / kWidth;
  for (int64_t row = 0; row < rows; row += kMaxRows, out += count * kMaxRows) {
    const float* from = a.data + row;
    if (row + kVectors * kWidth <= rows) {  // a step's last vector may pass its end: the next step overwrites it
      for (int64_t k = 0; k < count; ++k, from += a.step) {
        for (int i = 0; i < kVectors; ++i) store_float(out + k * kMaxRows + i * kWidth, load_float(from + i * kWidth));
      }
    } else {
      const int64_t some = rows - row < kMaxRows ? rows - row : kMaxRows;
      for (int64_t k = 0; k < count; ++k, from += a.step) {
        for (int64_t r = 0; r < some; ++r) out[k * kMaxRows + r] = from[r];
      }
    }
  }
}

// The same of rows that are contiguous, of any storage type: kWidth steps at a time are turned in registers.
template <typename T>
static void gather_rows(const T* data, int64_t stride, int64_t rows, int64_t count, float* out) {
  constexpr int kVectors = (kMaxRows + kWidth - 1) / kWidth;
  for (int64_t row = 0; row < rows; row += kMaxRows, out += count * kMaxRows) {
    const int64_t some = rows - row < kMaxRows ? rows - row : kMaxRows;
    const T* from = data + row * stride;
    for (int64_t k = 0; k < count; k += kWidth) {
      VecF squares[kVectors][kWidth];
      for (int i = 0; i < kVectors; ++i) {
        for (int r = 0; r < kWidth; ++r) {
          const int64_t at = i * kWidth + r;
          squares[i][r] = at < some ? load_upto(from + at * stride + k, count - k) : broadcast(0.0f);
        }
        transpose(squares[i]);
      }
      const int64_t steps = count - k < kWidth ? count - k : kWidth;
      for (int64_t j = 0; j < steps; ++j) {
        for (int i = 0; i < kVectors; ++i) store_float(out + (k + j) * kMaxRows + i * kWidth, squares[i][j]);
      }
    }
  }
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
  const bool gathered = term_count == 1 && terms[0].a.step == 1;
  if (gathered) {
    const Term& term = terms[0];
    for (int64_t k = 0; k < term.depth; k += kDepthBlock) {
      const int64_t count = term.depth - k < kDepthBlock ? term.depth - k : kDepthBlock;
      gather_rows(term.a.data + k, term.a.row_stride, rows, count, room + k * padded_rows);
    }
  }
  for (int64_t first = 0; first < panels; first += block_panels) {
    const int64_t last = first + block_panels < panels ? first + block_panels : panels;
    bool fresh = true;
    for (int t = 0; t < term_count; ++t) {
      const Term& term = terms[t];
      for (int64_t k = 0; k < term.depth; k += kDepthBlock) {
        const int64_t count = term.depth - k < kDepthBlock ? term.depth - k : kDepthBlock;
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
          tile_rows(rows, block + (panel - first) * kTileColumns, stride, fresh, a, group_stride, b, term.b.row_stride,
                    count);
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
