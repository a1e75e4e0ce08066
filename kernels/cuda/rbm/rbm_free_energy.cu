// F = E_v(v) - sum_j log Z_j of visible states, given the sums over 32 hidden units each that rbm_half_step leaves:
// docs/kernels/rbm_free_energy.md.
//
//   E_v = -v b (0/1 units), (v - b)^2 / (2 sigma^2) (Gaussian units)
//
// Floor: v once more than the product needs. Tiling: a warp takes a row; no atomics, the same bits on every run.
#include "rbm/rbm_half_step.cuh"
#include "rbm/rbm_launch.cuh"

namespace genfast {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 1) free_energy_kernel(const __grid_constant__ RbmFreeEnergyCuda args) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32), tiles = (args.hidden + kSumUnits - 1) / kSumUnits;
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; row < args.rows; row += warps) {
    float energy = 0.0f;
    for (int64_t unit = lane; unit < args.visible; unit += 32) {
      const float v = load_number(args.dtype, args.v, row * args.visible + unit);
      const float b = args.b == nullptr ? 0.0f : __ldg(args.b + unit);
      if (args.gaussian) {
        const float gap = v - b, scale = args.inverse_variance == nullptr ? 1.0f : __ldg(args.inverse_variance + unit);
        energy = fmaf(0.5f * gap * scale, gap, energy);
      } else {
        energy = fmaf(-v, b, energy);
      }
    }
    for (int64_t tile = lane; tile < tiles; tile += 32) energy -= __ldg(args.log_partition + tile * args.rows + row);
    energy = segment_sum(energy, 5);
    if (lane == 0) args.out[row] = energy;
  }
}

}  // namespace

void rbm_free_energy(const RbmFreeEnergyCuda& args, void* stream) {
  if (args.rows < 0 || args.visible <= 0 || args.hidden <= 0 || args.dtype == DType::kFloat64) {
    throw std::invalid_argument("rbm_free_energy: a negative size or float64");
  }
  if (args.rows == 0) return;
  const int64_t blocks = std::min<int64_t>((args.rows + kThreads / 32 - 1) / (kThreads / 32), 65535);
  launch_grid("rbm_free_energy", free_energy_kernel, blocks, kThreads, 0, false, args, stream);
}

}  // namespace cuda
}  // namespace genfast
