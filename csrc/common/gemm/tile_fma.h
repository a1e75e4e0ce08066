// Tiles of product_fma.h: an A that is gathered, a tile's rows together, times a piece of a panel of B.
#pragma once

#include "common/gemm/micro_kernel.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr int64_t kDepthBlock = 16384 / static_cast<int64_t>(sizeof(float)) / kTileColumns;  // of B: 16 KiB

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

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
