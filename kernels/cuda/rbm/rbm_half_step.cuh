// The kernels of rbm_half_step.cu.
#pragma once

#include "rbm/rbm_draw.cuh"
#include "rbm/rbm_product.cuh"

namespace genfast {
namespace cuda {

constexpr int kPrepareThreads = 256;
constexpr int kTileBand = 8;  // tiles of rows that share a column of W's tiles in the second-level cache

template <typename Tile, bool kUp>
__global__ void __launch_bounds__(Tile::kThreads, 1) half_step_kernel(const __grid_constant__ RbmHalfStepCuda args) {
  extern __shared__ __align__(128) char memory[];
  const auto row_tiles = static_cast<uint32_t>((args.draw.rows + Tile::kRows - 1) / Tile::kRows);
  const auto unit_tiles = static_cast<uint32_t>((args.draw.units + Tile::kUnits - 1) / Tile::kUnits);
  const uint32_t band = blockIdx.x / (kTileBand * unit_tiles), within = blockIdx.x % (kTileBand * unit_tiles);
  const uint32_t left = row_tiles - band * kTileBand, height = left < kTileBand ? left : kTileBand;
  const int64_t first_row = int64_t{band * kTileBand + within % height} * Tile::kRows;
  const int64_t first_unit = int64_t{within / height} * Tile::kUnits;

  int x_parts = args.x.parts;
  if constexpr (Tile::kXParts > 1) {
    if (args.x.row_parts != nullptr) {
      const int64_t row = first_row + threadIdx.x;
      static_assert(Tile::kThreads >= Tile::kRows);
      const int needed =
          threadIdx.x < Tile::kRows && row < args.draw.rows ? static_cast<int>(args.x.row_parts[row]) : 1;
      x_parts = __syncthreads_or(needed > 2) ? 3 : __syncthreads_or(needed > 1) ? 2 : 1;
    }
  } else {
    x_parts = 1;
  }
  Product<Tile, kUp> product = {
      args, mma::shared_address(memory), first_row, first_unit, x_parts, Tile::kWParts == 1 ? 1 : args.weights.parts,
      {}};
  product.run();

  float* const sums = reinterpret_cast<float*>(memory);
  __syncthreads();
  product.spread(sums);
  __syncthreads();
  const RbmDraw& draw = args.draw;
  const uint64_t seed = draw.seed_pointer != nullptr ? static_cast<uint64_t>(__ldg(draw.seed_pointer)) : draw.seed;
  constexpr int kGroups = Tile::kUnits / kGroup;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * kGroups; i += Tile::kThreads) {
    const int row = i / kGroups, unit = i % kGroups * kGroup;
    const float4 four = *reinterpret_cast<const float4*>(sums + row * Tile::kSumStride + unit);
    float x[kGroup] = {four.x, four.y, four.z, four.w};
    draw_units(draw, seed, draw.step, true, first_row + row, first_unit + unit, x);
  }
}

// A matrix as an operand. A warp takes a row, a lane four neighbours at a time.
template <int kParts>
__global__ void __launch_bounds__(kPrepareThreads, 1) prepare_kernel(const __grid_constant__ RbmPrepare args) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / 32);
  for (int64_t row = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; row < args.rows; row += warps) {
    const float scale = args.scale == nullptr ? 1.0f : __ldg(args.scale + row);
    int needed = 1;
    for (int64_t column = lane * 4; column < args.columns; column += 128) {
      uint16_t part[4][split::kMostParts];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x = 0.0f;
        if (column + j < args.columns) x = load_number(args.dtype, args.from, row * args.columns + column + j);
        if (args.scale != nullptr) x *= scale;
#pragma unroll
        for (int i = 0; i < split::kMostParts; ++i) part[j][i] = 0;
        const int parts = split::into_parts(x, kParts, part[j]);
        needed = parts > needed ? parts : needed;
      }
#pragma unroll
      for (int i = 0; i < kParts; ++i) {  // stride is a multiple of 8: columns beyond the last one exist and get zeros
        uint16_t* const to = static_cast<uint16_t*>(args.to) + i * args.part_stride + row * args.stride + column;
        *reinterpret_cast<uint2*>(to) = make_uint2(part[0][i] | static_cast<uint32_t>(part[1][i]) << 16,
                                                   part[2][i] | static_cast<uint32_t>(part[3][i]) << 16);
      }
    }
    if (args.row_parts != nullptr) {
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) {
        const int other = __shfl_xor_sync(0xFFFFFFFFu, needed, mask);
        needed = other > needed ? other : needed;
      }
      if (lane == 0) args.row_parts[row] = static_cast<uint8_t>(needed);
    }
  }
}

}  // namespace cuda
}  // namespace genfast
