// A Gibbs chain in one parallel region: each thread takes its chains through all steps, block by block, with both
// states in its own cache and no barrier between half steps.
#include "rbm/rbm_gibbs.h"

#include <algorithm>
#include <atomic>

#include "common/gemm/gemm.h"
#include "common/parallel.h"

namespace genfast {
namespace cpu {
namespace {

void keep_clamped(const RbmGibbs& args, int64_t begin, int64_t rows, const float* start, float* state, int64_t stride) {
  const int64_t count = args.parameters.visible;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* clamp = args.clamp + (args.clamp_rows == 1 ? 0 : (begin + r) * count);
    for (int64_t i = 0; i < count; ++i) {
      state[r * stride + i] = clamp[i] != 0 ? start[r * stride + i] : state[r * stride + i];
    }
  }
}

}  // namespace

bool rbm_gibbs(const RbmGibbs& args, int threads) {
  if (args.chains == 0) return false;
  const RbmParameters& p = args.parameters;
  const int64_t block_rows = rows_per_block(args.chains, threads);
  const int64_t v_stride = padded_stride(p.visible), h_stride = padded_stride(p.hidden);
  int64_t scratch = 0;
  for (const bool upwards : {true, false}) {
    scratch = std::max(scratch, GENFAST_FOR_ISA(rbm_rows_scratch)(rbm_side(p, upwards), block_rows));
  }
  const int64_t start_floats = args.clamp == nullptr ? 0 : block_rows * v_stride;
  const int64_t slot_floats = block_rows * (v_stride + h_stride) + start_floats + round_up(scratch, 16);
  Workspace workspace(rbm_side_floats(p, true) + rbm_side_floats(p, false) + threads * slot_floats);
  const RbmSide up = rbm_prepare(p, true, workspace, threads), down = rbm_prepare(p, false, workspace, threads);
  float* const slots = workspace.take(threads * slot_floats);
  auto* const load = GENFAST_FOR_ISA(rbm_load_rows);
  auto* const store = GENFAST_FOR_ISA(rbm_store_rows);
  auto* const draw = GENFAST_FOR_ISA(rbm_rows);
  std::atomic<bool> bad{false};
  const int useful = args.chains * p.visible * p.hidden * args.k < (1 << 16) ? 1 : threads;
  parallel_slots((args.chains + block_rows - 1) / block_rows, useful, [&](int64_t slot, int64_t first, int64_t last) {
    float* v = slots + slot * slot_floats;
    float* h = v + block_rows * v_stride;
    float* start = h + block_rows * h_stride;
    float* room = start + start_floats;
    bool met = false;
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block_rows;
      const int64_t count = begin + block_rows < args.chains ? block_rows : args.chains - begin;
      const char* from = static_cast<const char*>(args.v) + begin * p.visible * bytes_of(args.state_dtype);
      met |= load(args.state_dtype, from, p.visible, v, v_stride, count, p.visible);
      if (args.clamp != nullptr) {
        load(args.state_dtype, from, p.visible, start, v_stride, count, p.visible);
      }
      RbmRows rows = {};
      rows.rows = count;
      rows.beta_stride = args.beta_count > 1 ? 1 : 0;
      rows.beta = args.beta == nullptr ? nullptr : args.beta + begin * rows.beta_stride;
      rows.seed = args.seed;
      rows.chain = static_cast<uint32_t>(args.chain_offset + begin);
      for (int64_t t = 0; t < args.k; ++t) {
        const auto half_step = static_cast<uint32_t>(args.step + 2 * t);
        for (const bool upwards : {true, false}) {
          rows.side = upwards ? &up : &down;
          rows.x = upwards ? v : h;
          rows.x_stride = upwards ? v_stride : h_stride;
          rows.state = upwards ? h : v;
          rows.state_stride = upwards ? h_stride : v_stride;
          rows.step = upwards ? half_step : half_step + 1;
          met |= draw(rows, room);
        }
        if (args.clamp != nullptr) keep_clamped(args, begin, count, start, v, v_stride);
      }
      const auto out = [&](void* to, int64_t units) {
        return static_cast<char*>(to) + begin * units * bytes_of(p.dtype);
      };
      store(p.dtype, v, v_stride, out(args.visible, p.visible), p.visible, count, p.visible);
      if (args.hidden != nullptr) {
        store(p.dtype, h, h_stride, out(args.hidden, p.hidden), p.hidden, count, p.hidden);
      }
    }
    if (met) bad.store(true, std::memory_order_relaxed);
  });
  return bad.load();
}

}  // namespace cpu
}  // namespace genfast
