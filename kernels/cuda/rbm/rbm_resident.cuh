// The Gibbs chain that keeps W in shared memory; rbm_gibbs.cu says when and why.
#pragma once

#include "common/group_barrier.cuh"
#include "common/mma.cuh"
#include "rbm/rbm_draw.cuh"
#include "rbm/rbm_split.h"

namespace genfast {
namespace cuda {

constexpr int kResidentThreads = 512;
constexpr int kResidentRows = 32;  // chains of a pass: two fragments
constexpr int kResidentTiles = 4;  // eights of units that a block has of a side, at most

// How a grid is laid over chains and units.
struct ResidentPlan {
  int groups, slices;        // blocks = groups * slices; a group has chains of its own
  int64_t group_rows;        // a multiple of 16
  int up_tiles, down_tiles;  // eights of hidden and of visible units that a block draws
  int64_t shared_bytes;
};

struct ResidentGibbs {
  RbmOperand up_weights, down_weights;
  int64_t visible, hidden;
  RbmDraw up, down;  // bits and bits_nan are the states between half steps; state is written in the last ones
  int64_t k, step;
  ResidentPlan plan;
  uint32_t* counters;  // [groups], zero
};

__host__ __device__ constexpr int64_t fragment_steps(int64_t inputs) { return (inputs + 15) / 16; }
__host__ __device__ constexpr int64_t sum_chunks(int64_t inputs, bool split) {
  return split ? (inputs + split::kChunk - 1) / split::kChunk : 1;
}
__host__ __device__ constexpr int64_t state_words(int64_t units) { return ((units + 31) / 32) | 1; }

// Bytes of shared memory: both slices of W, partial sums of a pass, states of a pass.
inline int64_t resident_bytes(int64_t visible, int64_t hidden, int parts, const ResidentPlan& plan) {
  const int64_t weights =
      (fragment_steps(visible) * plan.up_tiles + fragment_steps(hidden) * plan.down_tiles) * parts * 256;
  const int64_t up = sum_chunks(visible, parts > 1) * (plan.up_tiles + 1);
  const int64_t down = sum_chunks(hidden, parts > 1) * (plan.down_tiles + 1);
  const int64_t most = visible > hidden ? visible : hidden;
  return weights + (up > down ? up : down) * kResidentRows * 32 + kResidentRows * state_words(most) * 4;
}

// Bits 0 and 1 of x as a pair of bfloat16 ones or zeros.
__host__ __device__ constexpr uint32_t ones_of(uint32_t x) { return ((x & 1u) | (x & 2u) << 15) * 0x3F80u; }

// One side's slice of W, [parts][fragment steps][tiles][32 lanes][2 registers], zero beyond the ends.
template <bool kUp>
__device__ __forceinline__ void keep_weights(uint32_t* to, const RbmOperand& weights, int64_t visible, int64_t hidden,
                                             int64_t first_unit, int tiles) {
  const int64_t steps = fragment_steps(kUp ? visible : hidden), inputs = kUp ? visible : hidden;
  const int64_t units = kUp ? hidden : visible, count = weights.parts * steps * tiles * 64;
  const auto* const from = static_cast<const uint16_t*>(weights.data);
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kResidentThreads) {
    const int in_tile = static_cast<int>(i % 64), lane = in_tile / 2;
    const auto tile = static_cast<uint32_t>(i / 64), step = tile / tiles;
    const int64_t part = step / static_cast<uint32_t>(steps);
    const int64_t k = (step - part * steps) * 16 + lane % 4 * 2 + in_tile % 2 * 8;
    const int64_t unit = first_unit + (tile - step * tiles) * 8 + lane / 4;
    uint32_t pair = 0;
    if constexpr (kUp) {
      const uint16_t* const at = from + part * weights.part_stride + k * weights.stride + unit;
      if (unit < units && k < inputs) pair = __ldg(at);
      if (unit < units && k + 1 < inputs) pair |= static_cast<uint32_t>(__ldg(at + weights.stride)) << 16;
    } else {  // k is even, and rows are aligned and padded
      const uint16_t* const at = from + part * weights.part_stride + unit * weights.stride + k;
      if (unit < units && k < inputs) pair = __ldg(reinterpret_cast<const uint32_t*>(at));
      if (k + 1 >= inputs) pair &= 0xFFFFu;
    }
    to[i] = pair;
  }
}

// The products of kTiles eights of units with kRows sixteens of chains, over fragment steps [first, last). Those beyond
// `tiles` and `fragments` are left out.
template <int kTiles, int kRows>
__device__ __forceinline__ void multiply_fragments(const uint32_t* weights, const uint32_t* states, int64_t words,
                                                   int parts, int64_t steps, int tiles, int first_tile, int fragments,
                                                   int first_fragment, int64_t first, int64_t last, float* sums,
                                                   int sum_stride) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t* const rows = states + (first_fragment * 16 + g) * words;
  float sum[kRows][kTiles][4] = {};
  for (int64_t step = first; step < last; ++step) {
    const int shift = static_cast<int>(step % 2) * 16 + 2 * t;
    uint32_t a[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const uint32_t x = rows[m * 16 * words + step / 2] >> shift, y = rows[(m * 16 + 8) * words + step / 2] >> shift;
      a[m][0] = ones_of(x), a[m][1] = ones_of(y), a[m][2] = ones_of(x >> 8), a[m][3] = ones_of(y >> 8);
    }
#pragma unroll
    for (int part = split::kMostParts - 1; part >= 0; --part) {
      if (part < parts) {
        const uint32_t* const b = weights + ((part * steps + step) * tiles + first_tile) * 64 + lane * 2;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (first_tile + n < tiles) {
            const uint2 pair = *reinterpret_cast<const uint2*>(b + n * 64);
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
              if (first_fragment + m < fragments) mma::multiply_add(sum[m][n], a[m], pair.x, pair.y);
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (first_tile + n < tiles && first_fragment + m < fragments) {
        float* const at = sums + ((first_fragment + m) * 16 + g) * sum_stride + (first_tile + n) * 8 + 2 * t;
        *reinterpret_cast<float2*>(at) = make_float2(sum[m][n][0], sum[m][n][1]);
        *reinterpret_cast<float2*>(at + 8 * sum_stride) = make_float2(sum[m][n][2], sum[m][n][3]);
      }
    }
  }
}

template <bool kSplit, bool kUp>
__device__ __forceinline__ void resident_half_step(const ResidentGibbs& args, uint64_t seed, int64_t step, bool last,
                                                   const uint32_t* weights, float* sums, uint32_t* states) {
  const RbmDraw& draw = kUp ? args.up : args.down;
  const RbmDraw& given = kUp ? args.down : args.up;
  const int tiles = kUp ? args.plan.up_tiles : args.plan.down_tiles;
  const int parts = kSplit ? args.up_weights.parts : 1;
  const int64_t inputs = given.units, steps = fragment_steps(inputs), words = state_words(inputs);
  const int64_t given_words = (inputs + 31) / 32, chunks = sum_chunks(inputs, kSplit);
  const int sum_stride = tiles * 8 + 8, warp = threadIdx.x / 32;
  const int64_t group = blockIdx.x / args.plan.slices;
  const int64_t first_unit = int64_t{blockIdx.x % args.plan.slices} * tiles * 8;
  const int64_t first_row = group * args.plan.group_rows;
  const int64_t end = first_row + args.plan.group_rows < draw.rows ? first_row + args.plan.group_rows : draw.rows;
  if (first_unit >= draw.units) return;
  for (int64_t row = first_row; row < end; row += kResidentRows) {
    const int here = end - row < kResidentRows ? static_cast<int>(end - row) : kResidentRows;
    for (int i = threadIdx.x; i < kResidentRows * given_words; i += kResidentThreads) {
      const int r = i / static_cast<int>(given_words), word = i % static_cast<int>(given_words);
      const auto* from = reinterpret_cast<const uint32_t*>(given.bits + (row + r) * given.bits_stride) + word;
      states[r * words + word] = r < here ? __ldcg(from) : 0u;
    }
    __syncthreads();
    const int fragments = (here + 15) / 16;
    // A warp takes 64 inputs for all of the block's units, or without parts all inputs for eight.
    if constexpr (kSplit) {
      constexpr int kSteps = split::kChunk / 16;
      for (int chunk = warp; chunk < chunks; chunk += kResidentThreads / 32) {
        const int64_t first = chunk * kSteps, until = first + kSteps < steps ? first + kSteps : steps;
        multiply_fragments<kResidentTiles, kResidentRows / 16>(weights, states, words, parts, steps, tiles, 0,
                                                               fragments, 0, first, until,
                                                               sums + chunk * kResidentRows * sum_stride, sum_stride);
      }
    } else {
      for (int item = warp; item < fragments * tiles; item += kResidentThreads / 32) {
        multiply_fragments<1, 1>(weights, states, words, 1, steps, tiles, item / fragments, fragments, item % fragments,
                                 0, steps, sums, sum_stride);
      }
    }
    __syncthreads();
    const int groups = tiles * 2;  // of four units
    for (int i = threadIdx.x; i < kResidentRows * groups; i += kResidentThreads) {
      const int r = i / groups, unit = i % groups * kGroup;
      float x[kGroup] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (r < here) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const float* from = sums + (chunk * kResidentRows + r) * sum_stride + unit;
          const float4 four = *reinterpret_cast<const float4*>(from);
          x[0] += four.x, x[1] += four.y, x[2] += four.z, x[3] += four.w;
        }
        if (__ldcg(given.bits_nan + row + r) != 0) x[0] = x[1] = x[2] = x[3] = __int_as_float(0x7FC00000);
      }
      draw_units(draw, seed, step, last, r < here ? row + r : draw.rows, first_unit + unit, x);
    }
    __syncthreads();
  }
}

// The half steps after the first one, which leaves its hidden states in args.up.bits.
template <bool kSplit>
__global__ void __launch_bounds__(kResidentThreads, 1) resident_kernel(const __grid_constant__ ResidentGibbs args) {
  extern __shared__ __align__(128) char memory[];
  const ResidentPlan& plan = args.plan;
  const int64_t slice = blockIdx.x % plan.slices, parts = args.up_weights.parts;
  uint32_t* const up = reinterpret_cast<uint32_t*>(memory);
  uint32_t* const down = up + fragment_steps(args.visible) * plan.up_tiles * parts * 64;
  float* const sums = reinterpret_cast<float*>(down + fragment_steps(args.hidden) * plan.down_tiles * parts * 64);
  const int64_t up_floats = sum_chunks(args.visible, kSplit) * (plan.up_tiles + 1);
  const int64_t down_floats = sum_chunks(args.hidden, kSplit) * (plan.down_tiles + 1);
  uint32_t* const states =
      reinterpret_cast<uint32_t*>(sums + (up_floats > down_floats ? up_floats : down_floats) * kResidentRows * 8);
  keep_weights<true>(up, args.up_weights, args.visible, args.hidden, slice * plan.up_tiles * 8, plan.up_tiles);
  keep_weights<false>(down, args.down_weights, args.visible, args.hidden, slice * plan.down_tiles * 8, plan.down_tiles);
  __syncthreads();

  const RbmDraw& draw = args.up;
  const uint64_t seed = draw.seed_pointer != nullptr ? static_cast<uint64_t>(__ldg(draw.seed_pointer)) : draw.seed;
  uint32_t arrivals = 0;
  for (int64_t t = 0; t < args.k; ++t) {
    if (t > 0) {
      resident_half_step<kSplit, true>(args, seed, args.step + 2 * t, t + 1 == args.k, up, sums, states);
      group_barrier(args.counters + blockIdx.x / plan.slices, arrivals += plan.slices);
    }
    resident_half_step<kSplit, false>(args, seed, args.step + 2 * t + 1, t + 1 == args.k, down, sums, states);
    if (t + 1 < args.k) group_barrier(args.counters + blockIdx.x / plan.slices, arrivals += plan.slices);
  }
}

}  // namespace cuda
}  // namespace genfast
