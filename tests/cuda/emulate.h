// Runs CUDA kernels on a CPU: every thread is a fiber, and barriers and warp instructions are where fibers meet. For
// index arithmetic, tails, rings of buffers and barriers; not for speed. Two settings look for races: `reversed` runs
// the threads in the other order, and `lazy` delays asynchronous copies until they are waited for (else they are done
// at once, so that a copy into a buffer in use shows).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __shared__
#define __shared__

namespace genfast {
namespace cuda {
constexpr size_t kEmulatedShared = 232448;  // what a block can have on sm_90
alignas(128) inline char memory[kEmulatedShared];
}  // namespace cuda
}  // namespace genfast

namespace emulate {

struct Index {
  unsigned x;
};

struct Copy {
  char* to;
  const void* from;
  int bytes;
};

// Where `size` threads meet.
struct Meeting {
  int size = 0, here = 0, generation = 0, flag = 0, any = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t words[32][8];
};

struct Fiber {
  ucontext_t context;  // to start with; jumps, which make no system call, from then on
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0, block = 0;
  bool done = false;
  const Meeting* waits = nullptr;
  int generation = 0;
  bool spins = false;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting meeting;
  std::vector<char> shared;
};

inline bool reversed = false, lazy = false;
inline int processors = 1;  // of the emulated GPU
inline Fiber* current = nullptr;
inline Block* block = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline Index threadIdx, blockIdx, blockDim, gridDim;

inline void yield() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void meet(Meeting& meeting) {
  if (++meeting.here == meeting.size) {
    meeting.here = 0;
    ++meeting.generation;
    return;
  }
  current->waits = &meeting;
  current->generation = meeting.generation;
  yield();
}

inline Warp& warp() { return block->warps[threadIdx.x / 32]; }

inline void enter() {
  body();
  current->done = true;
  yield();
}

inline bool ready(const Fiber& fiber) {
  return !fiber.done && (fiber.waits == nullptr || fiber.waits->generation != fiber.generation);
}

// Runs a block's fibers until none can go on; whether one went.
inline bool advance(Block& b) {
  block = &b;
  std::memcpy(genfast::cuda::memory, b.shared.data(), b.shared.size());
  bool any = false;
  // Each warp goes as far as it can before the next one does: a barrier that is missing shows.
  for (bool went = true; went;) {
    went = false;
    for (size_t w = 0; w < b.warps.size(); ++w) {
      const size_t first = (reversed ? b.warps.size() - 1 - w : w) * 32;
      for (bool more = true; more;) {
        more = false;
        for (size_t i = 0; i < 32; ++i) {
          Fiber& fiber = b.fibers[first + (reversed ? 31 - i : i)];
          if (!ready(fiber) || fiber.spins) continue;
          fiber.waits = nullptr;
          current = &fiber;
          threadIdx.x = fiber.thread;
          blockIdx.x = fiber.block;
          resume(fiber);
          went = any = more = true;
        }
      }
    }
  }
  for (Fiber& fiber : b.fibers) fiber.spins = false;
  std::memcpy(b.shared.data(), genfast::cuda::memory, b.shared.size());
  return any;
}

template <typename Args>
void run(void (*kernel)(Args), int64_t grid, int threads, int64_t shared_bytes, bool together, const Args& args) {
  if (shared_bytes > static_cast<int64_t>(genfast::cuda::kEmulatedShared)) std::abort();
  gridDim.x = static_cast<unsigned>(grid);
  blockDim.x = static_cast<unsigned>(threads);
  body = [&] { kernel(args); };
  const int64_t at_once = together ? grid : 1;
  for (int64_t first = 0; first < grid; first += at_once) {
    std::vector<Block> blocks(static_cast<size_t>(at_once));
    for (int64_t i = 0; i < at_once; ++i) {
      Block& b = blocks[static_cast<size_t>(i)];
      b.shared.assign(static_cast<size_t>(shared_bytes), static_cast<char>(0xFF));  // NaN
      b.warps = std::vector<Warp>(static_cast<size_t>(threads / 32));
      for (Warp& w : b.warps) w.meeting.size = 32;
      b.meeting.size = threads;
      b.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
      for (int t = 0; t < threads; ++t) {
        Fiber& fiber = b.fibers[static_cast<size_t>(t)];
        fiber.thread = static_cast<unsigned>(t);
        fiber.block = static_cast<unsigned>(first + i);
        constexpr size_t kStack = 1 << 15;
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
      }
    }
    for (int idle = 0; idle < 3;) {
      bool went = false, left = false;
      for (Block& b : blocks) went |= advance(b);
      for (Block& b : blocks) {
        for (Fiber& fiber : b.fibers) left |= !fiber.done;
      }
      if (!left) break;
      idle = went ? 0 : idle + 1;
      if (idle == 3) {
        std::fprintf(stderr, "deadlock\n");
        std::abort();
      }
    }
  }
}

}  // namespace emulate

using emulate::blockDim;
using emulate::blockIdx;
using emulate::gridDim;
using emulate::threadIdx;

inline void __syncthreads() { emulate::meet(emulate::block->meeting); }

inline int __syncthreads_or(int flag) {
  emulate::Meeting& meeting = emulate::block->meeting;
  meeting.flag |= flag != 0;
  emulate::meet(meeting);
  const int any = meeting.flag;
  emulate::meet(meeting);
  meeting.flag = 0;
  emulate::meet(meeting);
  return any;
}

template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  emulate::Warp& warp = emulate::warp();
  std::memcpy(warp.words[threadIdx.x % 32], &x, sizeof x);
  emulate::meet(warp.meeting);
  std::memcpy(&x, warp.words[(threadIdx.x % 32) ^ static_cast<unsigned>(mask)], sizeof x);
  emulate::meet(warp.meeting);
  return x;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
T __ldcg(const T* p) {
  return *p;
}

inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

namespace genfast {
namespace cuda {
namespace mma {

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - memory); }

inline void copy16(uint32_t to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || to % 16 != 0) std::abort();
  emulate::Copy copy = {memory + to, from, bytes};
  if (!emulate::lazy) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, from, static_cast<size_t>(bytes));
  } else {
    if (emulate::current->groups.empty()) emulate::current->groups.emplace_back();
    emulate::current->groups.back().push_back(copy);
  }
}

inline void copy16(uint32_t to, const void* from) { copy16(to, from, 16); }

inline void commit_copies() {
  if (emulate::current->groups.empty()) emulate::current->groups.emplace_back();
  emulate::current->groups.emplace_back();  // the last one is open
}

template <int kPending>
void wait_copies() {
  auto& groups = emulate::current->groups;
  while (groups.size() > kPending + 1) {
    for (const emulate::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    groups.pop_front();
  }
}

inline void load_any(uint32_t (&r)[4], uint32_t address, bool transposed) {
  emulate::Warp& warp = emulate::warp();
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (address % 16 != 0) std::abort();
  warp.words[lane][0] = address;
  emulate::meet(warp.meeting);
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      std::memcpy(&pair[i], memory + warp.words[m * 8 + row][0] + column * 2, 2);
    }
    std::memcpy(&r[m], pair, 4);
  }
  emulate::meet(warp.meeting);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { load_any(r, address, false); }
inline void load_transposed(uint32_t (&r)[4], uint32_t address) { load_any(r, address, true); }

inline float half_of(uint32_t pair, unsigned i) {
  const uint32_t bits = i == 0 ? pair << 16 : pair & 0xFFFF0000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The exact sum, cut off towards zero, as tensor cores do at least.
inline float cut(double x) {
  const auto y = static_cast<float>(x);
  return std::fabs(static_cast<double>(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulate::Warp& warp = emulate::warp();
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.words[lane], mine, sizeof mine);
  emulate::meet(warp.meeting);
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned column = 2 * t + e % 2;
    double sum = static_cast<double>(c[e]);
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned from = k % 8 / 2;
      const float x = half_of(warp.words[g * 4 + from][e / 2 + k / 8 * 2], k % 2);
      const float w = half_of(warp.words[column * 4 + from][4 + k / 8], k % 2);
      sum += static_cast<double>(x) * static_cast<double>(w);
    }
    c[e] = cut(sum);
  }
  emulate::meet(warp.meeting);
}

}  // namespace mma

inline void group_barrier(uint32_t* counter, uint32_t arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    ++*counter;
    while (static_cast<int32_t>(*counter - arrivals) < 0) {
      emulate::current->spins = true;
      emulate::yield();
    }
  }
  __syncthreads();
}

template <typename Args>
void launch_grid(const char*, void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes, bool cooperative,
                 Args args, void*) {
  emulate::run(kernel, blocks, threads, shared_bytes, cooperative, args);
}

}  // namespace cuda
}  // namespace genfast

// The runtime, as far as the launchers use it.
extern "C" {
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount            ? emulate::processors
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(genfast::cuda::kEmulatedShared)
                                                              : 1;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t count, cudaStream_t) {
  std::memset(p, value, count);
  return cudaSuccess;
}
}
