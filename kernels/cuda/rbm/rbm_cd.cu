// The statistics of contrastive divergence, whose other parts are rbm_half_step, rbm_free_energy and one matrix
// product: docs/kernels/rbm_cd.md.
//
//   out = (mean over rows of |v - mean of v given h|^2, mean F(data) - mean F(model))
//
// Floor: the bytes of a few numbers a row; it saves launches. Tiling: one block, sums in float64 in a fixed order.
#include "rbm/rbm_half_step.cuh"
#include "rbm/rbm_launch.cuh"

namespace genfast {
namespace cuda {
namespace {

__device__ __forceinline__ double block_sum(double x, double* room) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < kThreads / 32; ++i) total += room[i];
  __syncthreads();
  return total;
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 1) statistics_kernel(const __grid_constant__ RbmStatisticsCuda args) {
  extern __shared__ __align__(128) char memory[];
  double* const room = reinterpret_cast<double*>(memory);
  double error = 0.0, data = 0.0, model = 0.0;
  const int64_t count = args.squared_error == nullptr ? 0 : (args.visible + kSumUnits - 1) / kSumUnits * args.rows;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) error += static_cast<double>(args.squared_error[i]);
  for (int64_t i = threadIdx.x; i < args.rows; i += kThreads) data += static_cast<double>(args.data[i]);
  for (int64_t i = threadIdx.x; i < args.chains; i += kThreads) model += static_cast<double>(args.model[i]);
  error = block_sum(error, room) / static_cast<double>(args.rows);
  data = block_sum(data, room) / static_cast<double>(args.rows);
  model = block_sum(model, room) / static_cast<double>(args.chains);
  if (threadIdx.x == 0) {
    args.out[0] = static_cast<float>(error);
    args.out[1] = static_cast<float>(data - model);
  }
}

void rbm_statistics(const RbmStatisticsCuda& args, void* stream) {
  if (args.rows < 1 || args.chains < 1 || args.visible < 1) throw std::invalid_argument("rbm_cd: no rows or no units");
  launch_grid("rbm_cd", statistics_kernel, 1, kThreads, kThreads / 32 * 8, false, args, stream);
}

}  // namespace cuda
}  // namespace genfast
