// The units of a row given their products: bias, inverse temperature, mean, sample and what is stored of them, for the
// kernels of rbm_half_step.cu and rbm_gibbs.cu. csrc/rbm/rbm_half_step_cuda.h states the contract.
//
// A thread handles four neighbouring units, one Philox call: unit / 4 is the counter, and no word is dropped but past
// the last unit. Eight neighbouring threads hold 32 units, over which rows are summed by shuffles alone, so that sums
// do not depend on the tiling.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/math.cuh"
#include "rbm/rbm_half_step_cuda.h"

namespace genfast {
namespace cuda {

constexpr int kGroup = 4;      // units of a thread
constexpr int kSumUnits = 32;  // units of a partial sum
constexpr float kHalfLog2Pi = 0.918938533f;

__device__ __forceinline__ float load_number(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(p)[i];
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(p)[i]);
    default:
      return static_cast<float>(static_cast<const uint8_t*>(p)[i]);
  }
}

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

__device__ __forceinline__ uint32_t float16_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

__device__ __forceinline__ uint32_t state_byte(float x, uint32_t nan) { return isnan(x) ? nan : x != 0.0f ? 1u : 0u; }

// Stores x[0 .. count) at elements i .. of p: in one access where there are four and they are aligned, else one each.
__device__ __forceinline__ void store_numbers(DType dtype, void* p, int64_t i, int count, const float (&x)[kGroup]) {
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2 : 1;
  char* const to = static_cast<char*>(p) + i * bytes;
  const bool whole = count == kGroup && reinterpret_cast<uintptr_t>(to) % (kGroup * bytes) == 0;
  if (dtype == DType::kFloat32) {
    if (whole) {
      *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j < count) reinterpret_cast<float*>(to)[j] = x[j];
      }
    }
  } else if (bytes == 2) {
    const bool brain = dtype == DType::kBFloat16;
    const uint32_t low = brain ? bfloat16_pair(x[0], x[1]) : float16_pair(x[0], x[1]);
    const uint32_t high = brain ? bfloat16_pair(x[2], x[3]) : float16_pair(x[2], x[3]);
    if (whole) {
      *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const uint32_t pair = j < 2 ? low : high;
        if (j < count) reinterpret_cast<uint16_t*>(to)[j] = static_cast<uint16_t>(j % 2 == 0 ? pair : pair >> 16);
      }
    }
  } else {
    const uint32_t nan = dtype == DType::kBool ? 1u : 255u;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) word |= state_byte(x[j], nan) << (8 * j);
    if (whole) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j < count) reinterpret_cast<uint8_t*>(to)[j] = static_cast<uint8_t>(word >> (8 * j));
      }
    }
  }
}

// As the kernel bernoulli_sample has it: 0 below the smallest float32 probability, NaN for NaN.
__device__ __forceinline__ float probability(float x) {
  const float p = reciprocal_fast(1.0f + exp(clamp(-x, -86.0f, 87.33f)));
  return x < -87.33f ? 0.0f : p;
}

// log(1 + e^x), NaN kept; 1 + e^-|x| is 1 + e, or 2 (1 + (e - 1) / 2), whichever is next to 1.
__device__ __forceinline__ float softplus(float x) {
  constexpr float kLog1p[] = {poly::kLog1p[0], poly::kLog1p[1], poly::kLog1p[2], poly::kLog1p[3], poly::kLog1p[4],
                              poly::kLog1p[5], poly::kLog1p[6], poly::kLog1p[7], poly::kLog1p[8]};
  static_assert(sizeof(kLog1p) == sizeof(poly::kLog1p));
  const float size = fabsf(x);
  const float e = size > 86.0f ? 0.0f : exp(clamp(-size, -86.0f, 0.0f));
  const bool high = e > 0.41421356f;
  const float s = high ? (e - 1.0f) * 0.5f : e;
  const float log1p = (high ? poly::kLn2 : 0.0f) + fmaf(s * s, fmaf(s, horner(s, kLog1p), -0.5f), s);
  return isnan(x) ? x : fmaxf(x, 0.0f) + log1p;
}

__device__ __forceinline__ float sum_of_eight_lanes(float x) {
#pragma unroll
  for (int mask = 4; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  return x;
}

// Finishes units column .. column + 3 of a row, whose products are x. Every lane of a warp calls it, lanes 8i .. 8i + 7
// with the 32 units from a multiple of 32 on of one row (without sums over them: lanes 2i and 2i + 1 with 8); rows and
// units beyond the end are left out. `keep` says whether args.state is written.
__device__ __forceinline__ void draw_units(const RbmDraw& args, uint64_t seed, int64_t step, bool keep, int64_t row,
                                           int64_t column, float (&x)[kGroup]) {
  const int64_t left = args.units - column;
  const int count = row >= args.rows || left <= 0 ? 0 : left < kGroup ? static_cast<int>(left) : kGroup;
  const int64_t place = row * args.units + column;
  const bool gaussian = args.kind == UnitKind::kGaussian;
  float beta = 1.0f;
  if (args.beta != nullptr && count > 0) beta = __ldg(args.beta + (args.beta_count > 1 ? row : 0));
  if (args.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (j < count) x[j] += __ldg(args.bias + column + j);
    }
  }

  if (args.log_partition != nullptr) {
    const float offset = gaussian ? kHalfLog2Pi - (args.beta == nullptr ? 0.0f : 0.5f * logf(beta)) : 0.0f;
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float term = gaussian ? fmaf(0.5f * beta * x[j], x[j], offset) : softplus(beta * x[j]);
      total += j < count ? term : 0.0f;
    }
    total = sum_of_eight_lanes(total);
    if (count > 0 && column % kSumUnits == 0) args.log_partition[column / kSumUnits * args.rows + row] = total;
  }

  float mean[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) mean[j] = gaussian ? x[j] : probability(beta * x[j]);
  if (args.mean != nullptr && count > 0) {
    float scaled[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) scaled[j] = mean[j] * args.mean_scale;
    store_numbers(args.mean_dtype, args.mean, place, count, scaled);
  }
  if (args.squared_error != nullptr) {
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float gap = j < count ? load_number(args.target_dtype, args.target, place + j) - mean[j] : 0.0f;
      total = fmaf(gap, gap, total);
    }
    total = sum_of_eight_lanes(total);
    if (count > 0 && column % kSumUnits == 0) args.squared_error[column / kSumUnits * args.rows + row] = total;
  }
  if (args.state == nullptr && args.operand == nullptr && args.bits == nullptr) return;

  float state[kGroup] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (count > 0) {
    const philox::Words words =
        philox::philox(static_cast<uint32_t>(column / kGroup), static_cast<uint32_t>(args.chain_offset + row),
                       static_cast<uint32_t>(step), gaussian ? philox::kRbmNormal : philox::kRbmUnit, seed);
    if (gaussian) {
      box_muller(words.w[0], words.w[1], state[0], state[1]);
      box_muller(words.w[2], words.w[3], state[2], state[3]);
      const float cooled = args.beta == nullptr ? 1.0f : 1.0f / sqrtf(beta);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        float deviation = cooled;
        if (args.deviation != nullptr && j < count) deviation *= __ldg(args.deviation + column + j);
        state[j] = fmaf(deviation, state[j], x[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float drawn = philox::uniform(words.w[j]) < mean[j] ? 1.0f : 0.0f;
        state[j] = isnan(mean[j]) ? mean[j] : drawn;
      }
    }
    if (args.clamp != nullptr) {
      const int64_t first = args.clamp_rows > 1 ? place : column;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j < count && __ldg(args.clamp + first + j) != 0) {
          state[j] = load_number(args.target_dtype, args.target, place + j);
        }
      }
    }
    if (keep && args.state != nullptr) store_numbers(args.state_dtype, args.state, place, count, state);
    if (args.operand != nullptr) {
      store_numbers(DType::kBFloat16, args.operand, row * args.operand_stride + column, count, state);
    }
  }
  if (args.bits != nullptr) {
    uint32_t byte = 0;
    bool nan = false;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      byte |= (j < count && state[j] == 1.0f ? 1u : 0u) << j;
      nan |= j < count && isnan(state[j]);
    }
    const bool first = column % 8 == 0;
    byte |= __shfl_xor_sync(0xFFFFFFFFu, byte, 1) << kGroup;
    if (first && count > 0) args.bits[row * args.bits_stride + column / 8] = static_cast<uint8_t>(byte);
    if (nan) args.bits_nan[row] = 1;
  }
}

}  // namespace cuda
}  // namespace genfast
