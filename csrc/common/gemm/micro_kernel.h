// The inner product of the CPU matrix product: a tile of kMaxRows x kTileColumns sums kept in registers.
//
// Each step k adds a column of A (broadcast, one scalar a row) times a row of B (two vectors). Sums run over k in
// order, one fused multiply-add a step, so a row's result depends neither on the rows beside it nor on the thread that
// has it. Per step and tile: 2 loads of B and kMaxRows broadcasts for 2 kMaxRows multiply-adds, so the adders, two a
// cycle, set the time: kMaxRows cycles a step.
#pragma once

#include "common/gemm/operands.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

#if defined(GENFAST_VEC_AVX512)
constexpr int kMaxRows = 12;  // 24 sums, 2 of B and broadcasts from memory in 32 registers
#else
constexpr int kMaxRows = 6;  // 12 sums, 2 of B and 1 broadcast in 16 registers
#endif

template <int kRows>
struct Tile {
  VecF sums[kRows][2];
};

// tile += A[kRows, count] B[count, kTileColumns], with rows of B `b_stride` apart.
template <int kRows>
GENFAST_INLINE void accumulate(Tile<kRows>& tile, Left a, const float* b, int64_t b_stride, int64_t count) {
  constexpr int kGroups = (kRows + 2) / 3;  // three rows a pointer: base, base + stride, base + 2 stride
  const float* rows[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) rows[g] = a.data + 3 * g * a.row_stride;
  VecF sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = tile.sums[r][0];
    sums[r][1] = tile.sums[r][1];
  }
  for (int64_t k = 0; k < count; ++k) {
    const VecF b0 = load_float(b), b1 = load_float(b + kWidth);
    b += b_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const VecF scalar = broadcast(rows[r / 3][(r % 3) * a.row_stride]);
      sums[r][0] = fma(scalar, b0, sums[r][0]);
      sums[r][1] = fma(scalar, b1, sums[r][1]);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) rows[g] += a.step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    tile.sums[r][0] = sums[r][0];
    tile.sums[r][1] = sums[r][1];
  }
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
