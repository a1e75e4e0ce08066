// product_pairs.h on AMX tiles.
//
//   out[rows, 32] (+)= A[rows, depth] B[depth, 32]
//
// An operand's element is a pair of neighbours in depth. Depth comes in whole chunks of 16 pairs, zeros beyond the last
// in both operands: the zeros of one would not silence an infinity in the other. A lies by rows, whole tiles of which
// can be read; columns must be turned before. A panel of B is as product_pairs.h has it: 16 of its rows, 128 bytes
// apart, are two tiles as they lie, so that both products read the same packing.
//
// A step takes two tiles of A and two of B to four products, 4 loads of 1 KiB to 64 cycles. Sums begin at what `out`
// holds, so that a row's bits do not depend on the rows beside it; incomplete tiles go through a buffer.
#pragma once

#include "common/gemm/bfloat16.h"
#include "common/gemm/micro_kernel_amx.h"
#include "common/gemm/tile_fma.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr bool kPairsByRows = true;
constexpr int kPairRows = 2 * kTileRows;
constexpr int kChunkPairs = kChunk / 2;

constexpr int64_t pair_steps(int64_t depth) { return (depth + kChunk - 1) / kChunk * kChunkPairs; }

// Rows of `pairs` pairs for A, zeros to whole chunks and tiles: [row][pair_steps(2 * pairs)].
static void pack_left_pairs(const float* x, int64_t stride, int64_t rows, int64_t pairs, float* out) {
  const int64_t steps = pair_steps(2 * pairs), last = (rows + kPairRows - 1) / kPairRows * kPairRows;
  for (int64_t i = 0; i < last; ++i, out += steps) {
    for (int64_t k = 0; k < steps; k += kWidth) {
      store_float(out + k, i < rows ? load_upto(x + i * stride + k, pairs - k) : broadcast(0.0f));
    }
  }
}

template <int kRowTiles>
static void pair_tiles_block(float* out, int64_t stride, bool fresh, Left a, const float* b, int64_t b_stride,
                             int64_t steps) {
  constexpr int64_t kBytes = sizeof(float);
  const int64_t bytes = stride * kBytes, a_bytes = a.row_stride * kBytes, b_bytes = b_stride * kBytes;
  const float* const a_below = a.data + kTileRows * a.row_stride;
  __asm__ volatile("" ::: "memory");  // the compiler does not see that tile loads read memory
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kRowTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + 16, bytes);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(2, out + kTileRows * stride, bytes);
      _tile_loadd(3, out + kTileRows * stride + 16, bytes);
    }
  }
  for (int64_t k = 0; k < steps; k += kChunkPairs, b += kChunkPairs * b_stride) {
    _tile_loadd(4, a.data + k, a_bytes);
    if constexpr (kRowTiles == 2) _tile_loadd(5, a_below + k, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(7, b + 16, b_bytes);
    multiply<kRowTiles>();
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, out + kTileRows * stride, bytes);
    _tile_stored(3, out + kTileRows * stride + 16, bytes);
  }
}

// tile_rows() of pairs with A by rows, times a factor: 1 unless fresh. The thread's tiles must be configured.
GENFAST_NOINLINE void pair_tile_rows(int64_t rows, float* out, int64_t stride, bool fresh, Left a, int64_t group_stride,
                                     const float* b, int64_t b_stride, int64_t steps, float factor) {
  alignas(64) float buffer[kPairRows * kTileColumns];
  for (int64_t row = 0; row < rows; row += kPairRows, out += kPairRows * stride, a.data += group_stride) {
    const int64_t count = rows - row < kPairRows ? rows - row : kPairRows;
    const bool one = count <= kTileRows, direct = count == (one ? kTileRows : kPairRows) && factor == 1.0f;
    const auto run = one ? pair_tiles_block<1> : pair_tiles_block<2>;
    if (direct) {
      run(out, stride, fresh, a, b, b_stride, steps);
      continue;
    }
    for (int64_t r = 0; !fresh && r < count; ++r) {
      memcpy(buffer + r * kTileColumns, out + r * stride, kTileColumns * sizeof(float));
    }
    run(buffer, kTileColumns, fresh, a, b, b_stride, steps);
    for (int64_t r = 0; r < count; ++r) {
      for (int half = 0; half < 2; ++half) {
        const VecF sums = load_float(buffer + r * kTileColumns + half * kWidth);
        store_float(out + r * stride + half * kWidth, sums * broadcast(factor));
      }
    }
  }
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
