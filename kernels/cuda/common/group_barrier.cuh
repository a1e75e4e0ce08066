// A barrier of some blocks of a cooperative grid.
#pragma once

#include <cstdint>

namespace genfast {
namespace cuda {

#if defined(__CUDACC__)
// Every thread of every block calls it; the counter started at 0, and `arrivals` is the number of blocks times the
// number of barriers so far, this one included. What a block wrote before is visible to the others after (past the
// first-level cache: by __ldcg).
__device__ __forceinline__ void group_barrier(uint32_t* counter, uint32_t arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(counter) : "memory");
    uint32_t seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (static_cast<int32_t>(seen - arrivals) < 0);
  }
  __syncthreads();
}
#endif

}  // namespace cuda
}  // namespace genfast
