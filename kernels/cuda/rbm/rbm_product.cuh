// x W or x W' by tiles, for rbm_half_step.cu. Operands are sums of bfloat16 parts (csrc/rbm/rbm_split.h).
//
// A block makes kRows chains x kUnits units and walks the inputs in steps of 32 through a ring of kStages shared-memory
// buffers, filled by cp.async while older ones are used. Towards the hidden side a tile of W is read through ldmatrix
// with transposition, towards the visible side without. Where operands have several parts, the products of parts i and
// j with i + j <= 2 are added for every 16 inputs, the smallest first; what is left out is below 2^-24 of the terms.
// Tensor cores cut bits off rather than round: their sums run over 64 inputs and are then added up in float32. With one
// part each they run over all inputs. The order of sums does not depend on the tile.
#pragma once

#include "common/mma.cuh"
#include "rbm/rbm_half_step_cuda.h"
#include "rbm/rbm_split.h"

namespace genfast {
namespace cuda {

template <int kXParts_, int kWParts_, int kRows_, int kUnits_, int kRowWarps_, int kUnitWarps_, int kStages_>
struct ProductTile {
  static constexpr int kXParts = kXParts_, kWParts = kWParts_, kRows = kRows_, kUnits = kUnits_;
  static constexpr int kRowWarps = kRowWarps_, kUnitWarps = kUnitWarps_, kStages = kStages_;
  static constexpr int kDepth = 32;  // inputs of a step
  static constexpr int kThreads = 32 * kRowWarps * kUnitWarps;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpUnits = kUnits / kUnitWarps;
  static constexpr bool kSplit = kXParts * kWParts > 1;
  static constexpr int kXBytes = kRows * kDepth * 2, kWBytes = kUnits * kDepth * 2;
  static constexpr int kStageBytes = kXParts * kXBytes + kWParts * kWBytes;
  static constexpr int kSumStride = kUnits + 8;  // floats; eight rows of a fragment lie in different banks
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static_assert(kWarpRows % 16 == 0 && kWarpUnits % 16 == 0 && split::kChunk % kDepth == 0);
};

// One part of a tile, [kTileRows, kRowBytes / 2] from (first_row, first_column) of a matrix [rows, columns] on; zero
// beyond its end.
template <int kTileRows, int kRowBytes, int kThreads>
__device__ __forceinline__ void copy_tile(uint32_t to, const char* from, int64_t stride, int64_t first_row,
                                          int64_t rows, int64_t first_column, int64_t columns) {
  constexpr int kPieces = kRowBytes / 16, kStep = kThreads / kPieces, kCount = kTileRows / kStep;
  static_assert(kThreads % kPieces == 0 && kTileRows % kStep == 0 && (kStep % 8 == 0 || kCount == 1));
  const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  const int64_t column = first_column + piece * 8;
  const char* source = from + ((first_row + row) * stride + column) * 2;
  to += mma::place<kRowBytes>(row, piece);
  if (first_row + kTileRows <= rows && first_column + kRowBytes / 2 <= columns) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) mma::copy16(to + i * kStep * kRowBytes, source + i * kStep * stride * 2);
  } else {
    const int64_t left = (columns - column) * 2;
    const int bytes = left <= 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool inside = bytes > 0 && first_row + row + i * kStep < rows;
      mma::copy16(to + i * kStep * kRowBytes, inside ? source + i * kStep * stride * 2 : from, inside ? bytes : 0);
    }
  }
}

template <typename Tile, bool kUp>
struct Product {
  static constexpr int kRowFragments = Tile::kWarpRows / 16, kUnitFragments = Tile::kWarpUnits / 8;
  static constexpr int kWRowBytes = kUp ? Tile::kUnits * 2 : Tile::kDepth * 2;

  const RbmHalfStepCuda& args;
  uint32_t shared;
  int64_t first_row, first_unit;
  int x_parts, w_parts;
  float total[kRowFragments][kUnitFragments][4];

  __device__ __forceinline__ void copy_step(int64_t step) {
    const int64_t inputs = kUp ? args.visible : args.hidden, k = step * Tile::kDepth;
    if (k < inputs) {
      const uint32_t to = shared + static_cast<uint32_t>(step % Tile::kStages) * Tile::kStageBytes;
#pragma unroll
      for (int i = 0; i < Tile::kXParts; ++i) {
        if (i < x_parts) {
          copy_tile<Tile::kRows, Tile::kDepth * 2, Tile::kThreads>(
              to + i * Tile::kXBytes, static_cast<const char*>(args.x.data) + i * args.x.part_stride * 2, args.x.stride,
              first_row, args.draw.rows, k, inputs);
        }
      }
#pragma unroll
      for (int j = 0; j < Tile::kWParts; ++j) {
        if (j < w_parts) {
          copy_tile<kUp ? Tile::kDepth : Tile::kUnits, kWRowBytes, Tile::kThreads>(
              to + Tile::kXParts * Tile::kXBytes + j * Tile::kWBytes,
              static_cast<const char*>(args.weights.data) + j * args.weights.part_stride * 2, args.weights.stride,
              kUp ? k : first_unit, args.visible, kUp ? first_unit : k, args.hidden);
        }
      }
    }
    mma::commit_copies();
  }

  // Adds the products of a step to `sum`.
  __device__ __forceinline__ void multiply(int64_t step, float (&sum)[kRowFragments][kUnitFragments][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / Tile::kUnitWarps * Tile::kWarpRows, unit = warp % Tile::kUnitWarps * Tile::kWarpUnits;
    const int matrix = lane / 8, line = lane % 8;
    const uint32_t x = shared + static_cast<uint32_t>(step % Tile::kStages) * Tile::kStageBytes;
    const uint32_t w = x + Tile::kXParts * Tile::kXBytes;
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += 16) {
      uint32_t b[Tile::kWParts][kUnitFragments / 2][4];
#pragma unroll
      for (int j = 0; j < Tile::kWParts; ++j) {
        if (j < w_parts) {
#pragma unroll
          for (int n = 0; n < kUnitFragments / 2; ++n) {
            if constexpr (kUp) {
              const int at = k + matrix % 2 * 8 + line, piece = unit / 8 + n * 2 + matrix / 2;
              mma::load_transposed(b[j][n], w + j * Tile::kWBytes + mma::place<kWRowBytes>(at, piece));
            } else {
              const int at = unit + n * 16 + matrix / 2 * 8 + line, piece = k / 8 + matrix % 2;
              mma::load_matrices(b[j][n], w + j * Tile::kWBytes + mma::place<kWRowBytes>(at, piece));
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) {
        uint32_t a[Tile::kXParts][4];
#pragma unroll
        for (int i = 0; i < Tile::kXParts; ++i) {
          if (i < x_parts) {
            const int at = row + m * 16 + matrix % 2 * 8 + line, piece = k / 8 + matrix / 2;
            mma::load_matrices(a[i], x + i * Tile::kXBytes + mma::place<Tile::kDepth * 2>(at, piece));
          }
        }
#pragma unroll
        for (int level = split::kMostParts - 1; level >= 0; --level) {
#pragma unroll
          for (int i = level < Tile::kXParts ? level : Tile::kXParts - 1; i >= 0; --i) {
            const int j = level - i;
            if (j < Tile::kWParts && i < x_parts && j < w_parts) {
#pragma unroll
              for (int n = 0; n < kUnitFragments; ++n) {
                mma::multiply_add(sum[m][n], a[i], b[j < Tile::kWParts ? j : 0][n / 2][n % 2 * 2],
                                  b[j < Tile::kWParts ? j : 0][n / 2][n % 2 * 2 + 1]);
              }
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int64_t inputs = kUp ? args.visible : args.hidden;
    const int64_t steps = (inputs + Tile::kDepth - 1) / Tile::kDepth;
    float chunk[kRowFragments][kUnitFragments][4];
    clear(total);
    if constexpr (Tile::kSplit) clear(chunk);
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) copy_step(i);
    for (int64_t step = 0; step < steps; ++step) {
      mma::wait_copies<Tile::kStages - 2>();
      __syncthreads();
      copy_step(step + Tile::kStages - 1);
      if constexpr (Tile::kSplit) {
        multiply(step, chunk);
        if ((step + 1) % (split::kChunk / Tile::kDepth) == 0 || step + 1 == steps) {
#pragma unroll
          for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
            for (int n = 0; n < kUnitFragments; ++n) {
#pragma unroll
              for (int e = 0; e < 4; ++e) total[m][n][e] += chunk[m][n][e];
            }
          }
          clear(chunk);
        }
      } else {
        multiply(step, total);
      }
    }
    mma::wait_copies<0>();
  }

  // The sums as rows of kSumStride floats, for threads to take neighbours from.
  __device__ __forceinline__ void spread(float* to) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / Tile::kUnitWarps * Tile::kWarpRows + lane / 4;
    const int unit = warp % Tile::kUnitWarps * Tile::kWarpUnits + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
      for (int n = 0; n < kUnitFragments; ++n) {
        float* const at = to + (row + m * 16) * Tile::kSumStride + unit + n * 8;
        *reinterpret_cast<float2*>(at) = make_float2(total[m][n][0], total[m][n][1]);
        *reinterpret_cast<float2*>(at + 8 * Tile::kSumStride) = make_float2(total[m][n][2], total[m][n][3]);
      }
    }
  }

 private:
  static __device__ __forceinline__ void clear(float (&sum)[kRowFragments][kUnitFragments][4]) {
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
      for (int n = 0; n < kUnitFragments; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] = 0.0f;
      }
    }
  }
};

}  // namespace cuda
}  // namespace genfast
