// How the RBM kernels are launched; tests/cuda/emulate.h runs them on a CPU instead.
#pragma once

#include "common/launch.cuh"

namespace genfast {
namespace cuda {

inline int device_attribute(const char* name, cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&value, which, device), name);
  return value;
}

#if defined(__CUDACC__)
// The one argument is a struct. A cooperative grid is resident as a whole.
template <typename Args>
void launch_grid(const char* name, void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes,
                 bool cooperative, Args args, void* stream) {
  if (blocks > INT32_MAX) throw std::invalid_argument(std::string(name) + ": too many tiles; split the call");
  const auto* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 0) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  void* arguments[] = {&args};
  const auto on = static_cast<cudaStream_t>(stream);
  const auto bytes = static_cast<size_t>(shared_bytes);
  check(cooperative ? cudaLaunchCooperativeKernel(function, grid, block, arguments, bytes, on)
                    : cudaLaunchKernel(function, grid, block, arguments, bytes, on),
        name);
}
#endif

}  // namespace cuda
}  // namespace genfast
