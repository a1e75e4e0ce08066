// Annealed importance sampling: each thread takes its chains through the whole piece of the schedule. One product gives
// the hidden inputs that the weights and the hidden states share.
#include "rbm/rbm_ais.h"

#include <algorithm>
#include <atomic>

#include "common/gemm/gemm.h"
#include "common/parallel.h"
#include "rbm/rbm_gradient.h"

namespace genfast {
namespace cpu {

bool rbm_ais(const RbmAis& args, int threads) {
  if (args.chains == 0) return false;
  const RbmParameters& p = args.parameters;
  const int64_t block_rows = rows_per_block(args.chains, threads);
  const int64_t v_stride = padded_stride(p.visible), h_stride = padded_stride(p.hidden);
  int64_t scratch = 0;
  for (const bool upwards : {true, false}) {
    scratch = std::max(scratch, GENFAST_FOR_ISA(rbm_rows_scratch)(rbm_side(p, upwards), block_rows));
  }
  const int64_t slot_floats =
      block_rows * (v_stride + h_stride) + v_stride + 2 * round_up(2 * block_rows, 16) + round_up(scratch, 16);
  Workspace workspace(rbm_side_floats(p, true) + rbm_side_floats(p, false) + v_stride + threads * slot_floats);
  const RbmSide up = rbm_prepare(p, true, workspace, threads), down = rbm_prepare(p, false, workspace, threads);
  float* const change_of_bias = workspace.take(v_stride);  // -E_v changes by this much per unit of beta
  for (int64_t i = 0; i < p.visible; ++i) change_of_bias[i] = static_cast<float>(args.bias[i] - args.base_bias[i]);
  float* const slots = workspace.take(threads * slot_floats);
  auto* const draw = GENFAST_FOR_ISA(rbm_rows);
  std::atomic<bool> bad{false};
  parallel_slots((args.chains + block_rows - 1) / block_rows, threads, [&](int64_t slot, int64_t first, int64_t last) {
    float* v = slots + slot * slot_floats;
    float* h = v + block_rows * v_stride;
    float* bias = h + block_rows * h_stride;
    auto* hidden_change = reinterpret_cast<double*>(bias + v_stride);
    auto* energy = reinterpret_cast<double*>(bias + v_stride + round_up(2 * block_rows, 16));
    float* room = bias + v_stride + 2 * round_up(2 * block_rows, 16);
    std::fill(bias, bias + v_stride, 0.0f);
    const auto interpolate = [&](double beta) {
      for (int64_t i = 0; i < p.visible; ++i) {
        bias[i] = static_cast<float>((1.0 - beta) * args.base_bias[i] + beta * args.bias[i]);
      }
    };
    bool met = false;
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block_rows, count = std::min(block_rows, args.chains - begin);
      RbmRows rows = {};
      rows.rows = count;
      rows.seed = args.seed;
      rows.chain = static_cast<uint32_t>(args.chain_offset + begin);
      if (args.start) {
        RbmSide base = down;
        base.depth = 0;
        interpolate(0.0);
        RbmRows drawn = rows;
        drawn.side = &base;
        drawn.x = h;
        drawn.x_stride = h_stride;
        drawn.bias = bias;
        drawn.state = v;
        drawn.state_stride = v_stride;
        drawn.step = static_cast<uint32_t>(args.step + 1);
        met |= draw(drawn, room);
      } else {
        met |= GENFAST_FOR_ISA(rbm_load_rows)(DType::kFloat32, args.state + begin * p.visible, p.visible, v, v_stride,
                                              count, p.visible);
      }
      for (int64_t t = 1; t < args.count; ++t) {
        const double beta = args.betas[t], last_beta = args.betas[t - 1];
        const auto scale = static_cast<float>(beta);
        const auto half_step = static_cast<uint32_t>(args.step + 2 * t);
        RbmRows upwards = rows;
        upwards.side = &up;
        upwards.x = v;
        upwards.x_stride = v_stride;
        upwards.beta = &scale;
        upwards.step = half_step;
        upwards.state = h;
        upwards.state_stride = h_stride;
        upwards.log_partition_change = hidden_change;
        upwards.last_beta = static_cast<float>(last_beta);
        met |= draw(upwards, room);
        GENFAST_FOR_ISA(rbm_visible_energy)(v, v_stride, count, p.visible, change_of_bias, nullptr, energy);
        for (int64_t r = 0; r < count; ++r) {
          args.log_weights[begin + r] += hidden_change[r] - (beta - last_beta) * energy[r];
        }
        interpolate(beta);
        RbmRows downwards = rows;
        downwards.side = &down;
        downwards.x = h;
        downwards.x_stride = h_stride;
        downwards.input_scale = scale;
        downwards.bias = bias;
        downwards.step = half_step + 1;
        downwards.state = v;
        downwards.state_stride = v_stride;
        met |= draw(downwards, room);
      }
      GENFAST_FOR_ISA(rbm_store_rows)(DType::kFloat32, v, v_stride, args.state + begin * p.visible, p.visible, count,
                                      p.visible);
    }
    if (met) bad.store(true, std::memory_order_relaxed);
  });
  return bad.load();
}

}  // namespace cpu
}  // namespace genfast
