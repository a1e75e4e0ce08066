// product_fma.h's products of tiles for operands in bfloat16, two neighbours in depth together: an element of A and B
// is the 32 bits of such a pair, and a step adds both products to float32 sums. AVX512_BF16 has an instruction for it
// (vdpbf16ps), which does twice the work of a multiply-add; elsewhere two multiply-adds do, for tests.
//
// Layouts are product_fma.h's, with half the depth: A is row-major bfloat16 as it lies, or float32 that is rounded as
// it is gathered; B has two rows interleaved.
#pragma once

#include "common/gemm/bfloat16.h"
#include "common/gemm/tile_fma.h"

// Emulated AVX-512 (tests/csrc/simde) has no __AVX512F__.
#if defined(__AVX512F__) && defined(GENFAST_WITH_AMX)
#define GENFAST_DOT_TARGET __attribute__((target("avx512bf16")))
#else
#define GENFAST_DOT_TARGET
#endif

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr bool kPairsByRows = false;
constexpr int kPairRows = kMaxRows;

constexpr int64_t pair_steps(int64_t depth) { return (depth + 1) / 2; }

static void pack_left_pairs(const float* x, int64_t stride, int64_t rows, int64_t pairs, float* out) {
  gather_rows(x, stride, rows, pairs, out);
}

// gather_rows() of float32 rows whose pairs are made, and rounded, on the way: `left` elements of each are in memory.
static void gather_row_pairs(const float* data, int64_t stride, int64_t rows, int64_t left, int64_t pairs, float* out) {
  constexpr int kVectors = (kMaxRows + kWidth - 1) / kWidth;
  for (int64_t row = 0; row < rows; row += kMaxRows, out += pairs * kMaxRows) {
    const int64_t some = rows - row < kMaxRows ? rows - row : kMaxRows;
    for (int64_t k = 0; k < pairs; k += kWidth) {
      VecF squares[kVectors][kWidth];
      for (int i = 0; i < kVectors; ++i) {
        for (int r = 0; r < kWidth; ++r) {
          const int64_t at = i * kWidth + r;
          squares[i][r] = at < some ? pairs_within(data + (row + at) * stride + 2 * k, left - 2 * k) : broadcast(0.0f);
        }
        transpose(squares[i]);
      }
      const int64_t steps = pairs - k < kWidth ? pairs - k : kWidth;
      for (int64_t j = 0; j < steps; ++j) {
        for (int i = 0; i < kVectors; ++i) store_float(out + (k + j) * kMaxRows + i * kWidth, squares[i][j]);
      }
    }
  }
}

GENFAST_DOT_TARGET GENFAST_INLINE VecF add_products(VecF a, VecF b, VecF sum) {
#if defined(__AVX512F__) && defined(GENFAST_WITH_AMX)
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  return fma(high_of_pair(a), high_of_pair(b), fma(low_of_pair(a), low_of_pair(b), sum));
#endif
}

template <int kRows>
GENFAST_DOT_TARGET GENFAST_INLINE void pair_step(float* out, int64_t stride, bool fresh, Left a, const float* b,
                                                 int64_t b_stride, int64_t count, float factor) {
  constexpr int kGroups = (kRows + 2) / 3;  // three rows a pointer
  const float* rows[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) rows[g] = a.data + 3 * g * a.row_stride;
  VecF sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = broadcast(0.0f);
  for (int64_t k = 0; k < count; ++k) {
    const VecF b0 = load_float(b), b1 = load_float(b + kWidth);
    b += b_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const VecF pair = broadcast(rows[r / 3][(r % 3) * a.row_stride]);
      sums[r][0] = add_products(pair, b0, sums[r][0]);
      sums[r][1] = add_products(pair, b1, sums[r][1]);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) rows[g] += a.step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      float* const at = out + r * stride + half * kWidth;
      const VecF sum = sums[r][half] * broadcast(factor);
      store_float(at, fresh ? sum : load_float(at) + sum);
    }
  }
}

template <int kRows>
GENFAST_DOT_TARGET static void pair_rest(int64_t rows, float* out, int64_t stride, bool fresh, Left a, const float* b,
                                         int64_t b_stride, int64_t count, float factor) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      pair_step<kRows>(out, stride, fresh, a, b, b_stride, count, factor);
    } else {
      pair_rest<kRows - 1>(rows, out, stride, fresh, a, b, b_stride, count, factor);
    }
  }
}

// tile_rows() of pairs, times a factor.
GENFAST_DOT_TARGET GENFAST_NOINLINE void pair_tile_rows(int64_t rows, float* out, int64_t stride, bool fresh, Left a,
                                                        int64_t group_stride, const float* b, int64_t b_stride,
                                                        int64_t count, float factor) {
  int64_t row = 0;
  for (; row + kMaxRows <= rows; row += kMaxRows) {
    pair_step<kMaxRows>(out + row * stride, stride, fresh, a, b, b_stride, count, factor);
    a.data += group_stride;
  }
  pair_rest<kMaxRows - 1>(rows - row, out + row * stride, stride, fresh, a, b, b_stride, count, factor);
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
