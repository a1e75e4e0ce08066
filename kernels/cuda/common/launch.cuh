// How rows of elements are spread over a grid. A row is cut into chunks of kChunk elements (the last takes what is
// left); a (row, chunk) pair is a segment, and 2 to 32 lanes of a warp share one, so that a warp packs up to 16 short
// rows and row sums need shuffles alone: no shared memory, no atomics, the same result on every run. The grid is
// persistent.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace genfast {
namespace cuda {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 1024;

struct Segments {
  int64_t rows, columns, count;
  int64_t offset;   // global index of element (0, 0), or of column 0 where rows do not continue one another
  uint32_t chunks;  // per row
  int lane_bits;    // log2 of the lanes of a segment
};

inline int64_t chunks_of(int64_t columns) { return std::max<int64_t>((columns + kChunk - 1) / kChunk, 1); }

// `width` is the number of elements a lane handles at once.
inline Segments segments(int64_t rows, int64_t columns, int64_t offset, int width) {
  const int64_t chunks = chunks_of(columns);
  if (chunks > INT32_MAX || rows > INT64_MAX / chunks) throw std::invalid_argument("genfast: row too long");
  int best = 5;  // the widest segment that leaves the fewest lanes idle
  if (chunks == 1) {
    const int64_t steps = (columns + width - 1) / width;
    int64_t least = INT64_MAX;
    for (int bits = 5; bits >= 1; --bits) {
      const int64_t used = ((steps + (1 << bits) - 1) >> bits) << bits;
      if (used < least) least = used, best = bits;
    }
  }
  return {rows, columns, rows * chunks, offset, static_cast<uint32_t>(chunks), best};
}

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": CUDA error: " + cudaGetErrorString(error));
}

inline bool aligned16(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

template <typename Kernel, typename Args>
void launch(const char* name, Kernel kernel, const Args& args, const Segments& plan, void* stream) {
  int device = 0, processors = 0, resident = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0), name);
  const int64_t per_block = kThreads >> plan.lane_bits;
  const int64_t wanted = (plan.count + per_block - 1) / per_block;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(wanted, int64_t{processors} * std::max(resident, 1) * 4));
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, plan);
  check(cudaGetLastError(), name);
}

#if defined(__CUDACC__)
// Calls visit(row, row_start, column, group) for every kWidth elements of this lane, then finish(row, chunk) once a
// segment, with all lanes of the warp present; `valid` says whether the segment exists. `group` is the Philox group of
// element `column`, which may be negative by up to 3 where not kAligned.
template <bool kAligned, int kWidth, typename Visit, typename Finish>
__device__ __forceinline__ void for_each_segment(const Segments& plan, bool rows_continue, Visit visit, Finish finish) {
  const int lane = threadIdx.x & ((1 << plan.lane_bits) - 1);
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t stride = (int64_t{gridDim.x} * kThreads) >> plan.lane_bits;
  const int64_t in_warp = (threadIdx.x & 31) >> plan.lane_bits;
  for (int64_t segment = thread >> plan.lane_bits; segment - in_warp < plan.count; segment += stride) {
    int64_t row = segment;
    uint32_t chunk = 0;
    if (plan.chunks > 1) {
      if (plan.count <= UINT32_MAX) {
        row = static_cast<uint32_t>(segment) / plan.chunks;
      } else {
        row = segment / plan.chunks;
      }
      chunk = static_cast<uint32_t>(segment - row * plan.chunks);
    }
    if (segment < plan.count) {
      const int64_t start = plan.offset + (rows_continue ? row * plan.columns : 0);
      const int lead = kAligned ? 0 : static_cast<int>(start & 3);
      const int64_t end = chunk + 1 == plan.chunks ? plan.columns : (chunk + 1) * kChunk - lead;
      for (int64_t column = chunk * kChunk + lane * kWidth - lead; column < end; column += kWidth << plan.lane_bits) {
        visit(row, column, static_cast<uint64_t>(start + column) >> 2);
      }
    }
    finish(row, chunk, segment < plan.count && lane == 0);
  }
}

__device__ __forceinline__ float segment_sum(float x, int lane_bits) {
  for (int mask = (1 << lane_bits) >> 1; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  return x;
}
#endif

}  // namespace cuda
}  // namespace genfast
