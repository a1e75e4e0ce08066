// Splits the rows of a half step, and of free energies, over threads.
#include "rbm/rbm_half_step.h"

#include <atomic>

#include "common/gemm/gemm.h"
#include "common/parallel.h"
#include "rbm/rbm_gradient.h"

namespace genfast {
namespace cpu {

bool rbm_half_step(const RbmHalfStep& args, int threads) {
  if (args.rows == 0) return false;
  const RbmParameters& p = args.parameters;
  const int64_t units = args.up ? p.hidden : p.visible, depth = args.up ? p.visible : p.hidden;
  const int64_t block_rows = rows_per_block(args.rows, threads);
  const int64_t x_stride = padded_stride(depth), stride = padded_stride(units);
  const int64_t scratch = round_up(GENFAST_FOR_ISA(rbm_rows_scratch)(rbm_side(p, args.up), block_rows), 16);
  const int64_t slot_floats = block_rows * (x_stride + 2 * stride) + scratch;
  Workspace workspace(rbm_side_floats(p, args.up) + threads * slot_floats);
  RbmSide side = rbm_prepare(p, args.up, workspace, threads);
  side.state_dtype = DType::kFloat32;  // the sample has a type of its own
  float* const slots = workspace.take(threads * slot_floats);
  auto* const load = GENFAST_FOR_ISA(rbm_load_rows);
  auto* const store = GENFAST_FOR_ISA(rbm_store_rows);
  auto* const draw = GENFAST_FOR_ISA(rbm_rows);
  const int64_t x_bytes = args.x_packed ? (depth + 7) / 8 : depth * bytes_of(args.state_dtype);
  const int64_t sample_bytes = args.sample_packed ? (units + 7) / 8 : units * bytes_of(args.sample_dtype);
  std::atomic<bool> bad{false};
  const int useful = args.rows * units * depth < (1 << 16) ? 1 : threads;
  parallel_slots((args.rows + block_rows - 1) / block_rows, useful, [&](int64_t slot, int64_t first, int64_t last) {
    float* x = slots + slot * slot_floats;
    float* state = x + block_rows * x_stride;
    float* mean = state + block_rows * stride;
    bool met = false;
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block_rows, end = begin + block_rows < args.rows ? begin + block_rows : args.rows;
      const char* from = static_cast<const char*>(args.x) + begin * x_bytes;
      if (args.x_packed) {
        GENFAST_FOR_ISA(rbm_load_bits)(reinterpret_cast<const uint8_t*>(from), x, x_stride, end - begin, depth);
      } else {
        met |= load(args.state_dtype, from, depth, x, x_stride, end - begin, depth);
      }
      RbmRows rows = {};
      rows.side = &side;
      rows.rows = end - begin;
      rows.x = x;
      rows.x_stride = x_stride;
      rows.beta_stride = args.beta_count > 1 ? 1 : 0;
      rows.beta = args.beta == nullptr ? nullptr : args.beta + begin * rows.beta_stride;
      rows.seed = args.seed;
      rows.chain = static_cast<uint32_t>(args.chain_offset + begin);
      rows.step = static_cast<uint32_t>(args.step);
      rows.state = args.sample == nullptr ? nullptr : state;
      rows.state_stride = stride;
      rows.mean = args.mean == nullptr ? nullptr : mean;
      rows.mean_stride = stride;
      rows.mean_panel_stride = GENFAST_FOR_ISA(gemm_tile_columns)();
      rows.mean_scale = 1.0f;
      met |= draw(rows, mean + block_rows * stride);
      const auto out = [&](void* to, int64_t row_bytes) { return static_cast<char*>(to) + begin * row_bytes; };
      if (args.sample != nullptr && args.sample_packed) {
        auto* const to = reinterpret_cast<uint8_t*>(out(args.sample, sample_bytes));
        GENFAST_FOR_ISA(rbm_store_bits)(state, stride, to, end - begin, units);
      } else if (args.sample != nullptr) {
        store(args.sample_dtype, state, stride, out(args.sample, sample_bytes), units, end - begin, units);
      }
      if (args.mean != nullptr) {
        store(p.dtype, mean, stride, out(args.mean, units * bytes_of(p.dtype)), units, end - begin, units);
      }
    }
    if (met) bad.store(true, std::memory_order_relaxed);
  });
  return bad.load();
}

void rbm_free_energy(const RbmFreeEnergy& args, int threads) {
  if (args.rows == 0) return;
  const RbmParameters& p = args.parameters;
  const int64_t block_rows = rows_per_block(args.rows, threads);
  const int64_t x_stride = padded_stride(p.visible);
  const int64_t scratch = round_up(GENFAST_FOR_ISA(rbm_rows_scratch)(rbm_side(p, true), block_rows), 16);
  const int64_t slot_floats = block_rows * x_stride + scratch + round_up(4 * block_rows, 16);
  Workspace workspace(rbm_side_floats(p, true) + threads * slot_floats);
  const RbmSide side = rbm_prepare(p, true, workspace, threads);
  float* const slots = workspace.take(threads * slot_floats);
  const bool gaussian = p.visible_kind == UnitKind::kGaussian;
  const int useful = args.rows * p.visible * p.hidden < (1 << 16) ? 1 : threads;
  parallel_slots((args.rows + block_rows - 1) / block_rows, useful, [&](int64_t slot, int64_t first, int64_t last) {
    float* x = slots + slot * slot_floats;
    auto* partition = reinterpret_cast<double*>(x + block_rows * x_stride);
    double* energy = partition + block_rows;
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block_rows, end = begin + block_rows < args.rows ? begin + block_rows : args.rows;
      const char* from = static_cast<const char*>(args.v) + begin * p.visible * bytes_of(args.state_dtype);
      GENFAST_FOR_ISA(rbm_load_rows)(args.state_dtype, from, p.visible, x, x_stride, end - begin, p.visible);
      GENFAST_FOR_ISA(rbm_visible_energy)(x, x_stride, end - begin, p.visible, p.b,
                                          gaussian ? p.inverse_variance : nullptr, energy);
      RbmRows rows = {};
      rows.side = &side;
      rows.rows = end - begin;
      rows.x = x;
      rows.x_stride = x_stride;
      rows.log_partition = partition;
      GENFAST_FOR_ISA(rbm_rows)(rows, x + block_rows * x_stride + round_up(4 * block_rows, 16));
      for (int64_t r = 0; r < end - begin; ++r) args.out[begin + r] = static_cast<float>(energy[r] - partition[r]);
    }
  });
}

}  // namespace cpu
}  // namespace genfast
