// What the RBM kernels take of kernels/cuda/common/launch.cuh, for a CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace genfast {
namespace cuda {

constexpr int kThreads = 256;

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(kernel);
}

inline float segment_sum(float x, int lane_bits) {
  for (int mask = (1 << lane_bits) >> 1; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  return x;
}

}  // namespace cuda
}  // namespace genfast
