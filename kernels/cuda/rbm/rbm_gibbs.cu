// A whole Gibbs chain; csrc/rbm/rbm_half_step_cuda.h states the contract.
//
// General form: 2 k launches of rbm_half_step, states between them in bfloat16 (0, 1 and NaN are exact).
//
// Resident form, for few chains of 0/1 units whose time would be launches and reads of W: one cooperative grid keeps W
// in shared memory, as mma fragments, for all half steps but the first. The grid is groups x slices blocks: a group
// takes chains of its own, a block a slice of the hidden units and one of the visible units, so it holds two slices of
// W. States travel through the second-level cache as bits (one byte a block, chain and eight units), and each half step
// ends in a barrier of the group's blocks alone. Fragments of chains are made from bits in registers. The sums are
// those of rbm_product.cuh, in its order, so that both forms draw the same bits. docs/kernels/rbm_gibbs.md counts it.
#include "rbm/rbm_half_step.cuh"
#include "rbm/rbm_launch.cuh"
#include "rbm/rbm_resident.cuh"

namespace genfast {
namespace cuda {
namespace {

constexpr const char* kGibbs = "rbm_gibbs";
// Where launches no longer weigh beside the products: chains of a group and units of a side (reckoned, not measured).
constexpr int64_t kMostResidentRows = 64;
constexpr int64_t kMostResidentUnits = 2048;
constexpr int64_t kLeastResidentSteps = 4;  // which pay for filling shared memory

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Workspace {
  int64_t v_operand, h_operand, v_wide, h_wide, v_parts, h_parts, v_bits, h_bits, counters, zeros, total;
};

// Whether states go on as what the kernel stores in bfloat16; others are rounded to W's dtype and split.
bool exact_operand(const RbmGibbsCuda& args, UnitKind kind, bool clamped) {
  if (kind == UnitKind::kBernoulli && !clamped) return true;
  return args.dtype == DType::kBFloat16 || (args.dtype == DType::kFloat32 && args.rounded);
}

int parts_of(const RbmGibbsCuda& args) {
  return args.rounded || args.dtype == DType::kBFloat16 ? 1 : args.dtype == DType::kFloat16 ? 2 : 3;
}

Workspace layout(const RbmGibbsCuda& args) {
  Workspace w = {};
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = used;
    used += round_up(bytes, 256);
    return at;
  };
  const int64_t rows = args.chains, v = round_up(args.visible, 8), h = round_up(args.hidden, 8);
  w.v_operand = take(rows * v * 2);
  w.h_operand = take(rows * h * 2);
  const bool v_wide = !exact_operand(args, args.visible_kind, args.clamp != nullptr);
  const bool h_wide = !exact_operand(args, args.hidden_kind, false);
  w.v_wide = take(v_wide ? rows * args.visible * bytes_of(args.dtype) : 0);
  w.h_wide = take(h_wide ? rows * args.hidden * bytes_of(args.dtype) : 0);
  w.v_parts = take(v_wide ? rows * (1 + v * 2 * parts_of(args)) : 0);
  w.h_parts = take(h_wide ? rows * (1 + h * 2 * parts_of(args)) : 0);
  w.v_bits = take(rows * round_up(args.visible, 32) / 8);
  w.h_bits = take(rows * round_up(args.hidden, 32) / 8);
  w.counters = used;
  used += round_up(4 * rows + 2 * rows, 256);  // counters of at most one group a chain, NaN flags of both sides
  w.zeros = used - w.counters;
  w.total = used;
  return w;
}

// The split of chains and units over blocks with the least work a block, or none: groups = 0.
ResidentPlan plan_of(const RbmGibbsCuda& args) {
  ResidentPlan best = {};
  const int parts = args.up_weights.parts;
  if (args.k < 2 || args.visible_kind != UnitKind::kBernoulli || args.hidden_kind != UnitKind::kBernoulli ||
      args.clamp != nullptr || args.down_weights.parts != parts || args.visible > kMostResidentUnits ||
      args.hidden > kMostResidentUnits || device_attribute(kGibbs, cudaDevAttrCooperativeLaunch) == 0) {
    return best;
  }
  const int blocks = device_attribute(kGibbs, cudaDevAttrMultiProcessorCount);
  const int64_t memory = device_attribute(kGibbs, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                fragments = (args.chains + 15) / 16;
  double least = 0.0;
  for (int slices = 1; slices <= blocks; ++slices) {
    ResidentPlan plan = {};
    plan.slices = slices;
    const int64_t up = (args.hidden + slices * 8 - 1) / (slices * 8);
    const int64_t down = (args.visible + slices * 8 - 1) / (slices * 8);
    if (up > kResidentTiles || down > kResidentTiles) continue;
    plan.up_tiles = static_cast<int>(up), plan.down_tiles = static_cast<int>(down);
    plan.group_rows = (fragments + blocks / slices - 1) / (blocks / slices) * 16;
    plan.groups = static_cast<int>((args.chains + plan.group_rows - 1) / plan.group_rows);
    plan.shared_bytes = resident_bytes(args.visible, args.hidden, parts, plan);
    if (plan.shared_bytes > memory || plan.group_rows > kMostResidentRows) continue;
    const auto work = static_cast<double>(round_up(plan.group_rows, kResidentRows)) *
                      static_cast<double>(up * args.visible + down * args.hidden);
    if (best.groups == 0 || work < least) least = work, best = plan;
  }
  return best;
}

class Chain {
 public:
  Chain(const RbmGibbsCuda& args, void* stream)
      : args_(args), stream_(stream), layout_(layout(args)), memory_(static_cast<char*>(args.workspace)) {}

  void run() {
    ResidentPlan plan = {};
    const bool worthwhile = args_.form == RbmGibbsForm::kAuto && args_.k >= kLeastResidentSteps;
    if (worthwhile || args_.form == RbmGibbsForm::kResident) plan = plan_of(args_);
    if (plan.groups > 0) return resident(plan);
    if (args_.form == RbmGibbsForm::kResident) {
      throw std::invalid_argument("rbm_gibbs: W and these units, chains and steps do not fit the resident kernel");
    }
    RbmOperand x = args_.x;
    for (int64_t t = 0; t < args_.k; ++t) {
      x = half_step(x, true, t);
      x = half_step(x, false, t);
    }
  }

 private:
  RbmDraw draw(bool up) const {
    RbmDraw draw = {};
    draw.kind = up ? args_.hidden_kind : args_.visible_kind;
    draw.rows = args_.chains;
    draw.units = up ? args_.hidden : args_.visible;
    draw.bias = up ? args_.c : args_.b;
    draw.beta = args_.beta;
    draw.beta_count = args_.beta_count;
    draw.deviation = up ? nullptr : args_.deviation;
    draw.seed = args_.seed;
    draw.seed_pointer = args_.seed_pointer;
    draw.chain_offset = args_.chain_offset;
    draw.state_dtype = args_.dtype;
    return draw;
  }

  RbmHalfStepCuda launch_of(const RbmOperand& x, bool up) const {
    return {up ? args_.up_weights : args_.down_weights, x, args_.visible, args_.hidden, up, draw(up)};
  }

  // Draws one side; the states as operand of the next half step.
  RbmOperand half_step(const RbmOperand& x, bool up, int64_t t) {
    const bool last = t + 1 == args_.k, clamped = !up && args_.clamp != nullptr;
    RbmHalfStepCuda call = launch_of(x, up);
    RbmDraw& draw = call.draw;
    const bool exact = exact_operand(args_, draw.kind, clamped);
    const int64_t stride = round_up(draw.units, 8);
    draw.step = args_.step + 2 * t + (up ? 0 : 1);
    if (clamped) {
      draw.clamp = args_.clamp;
      draw.clamp_rows = args_.clamp_rows;
      draw.target_dtype = args_.target_dtype;
      draw.target = args_.target;
    }
    if (last) {
      draw.state = up ? args_.hidden_out : args_.visible_out;
    } else if (!exact) {
      draw.state = memory_ + (up ? layout_.h_wide : layout_.v_wide);
    }
    const bool wanted = up || !last;
    if (exact && wanted) {
      draw.operand = memory_ + (up ? layout_.h_operand : layout_.v_operand);
      draw.operand_stride = stride;
    }
    rbm_half_step(call, stream_);
    if (!wanted) return {};
    if (exact) return {draw.operand, 0, stride, 1, nullptr};
    char* const parts = memory_ + (up ? layout_.h_parts : layout_.v_parts);
    const int count = parts_of(args_);
    const int64_t part_stride = args_.chains * stride;
    auto* const row_parts = reinterpret_cast<uint8_t*>(parts + part_stride * 2 * count);
    rbm_prepare({args_.dtype, draw.state, draw.rows, draw.units, nullptr, count, parts, part_stride, stride, row_parts},
                stream_);
    return {parts, part_stride, stride, count, row_parts};
  }

  void resident(const ResidentPlan& plan) {
    const auto stream = static_cast<cudaStream_t>(stream_);
    check(cudaMemsetAsync(memory_ + layout_.counters, 0, static_cast<size_t>(layout_.zeros), stream), kGibbs);
    ResidentGibbs all = {args_.up_weights, args_.down_weights, args_.visible, args_.hidden, draw(true), draw(false),
                         args_.k,          args_.step,         plan,          nullptr};
    all.counters = reinterpret_cast<uint32_t*>(memory_ + layout_.counters);
    all.up.bits_nan = reinterpret_cast<uint8_t*>(all.counters + args_.chains);
    all.down.bits_nan = all.up.bits_nan + args_.chains;
    all.up.bits = reinterpret_cast<uint8_t*>(memory_ + layout_.h_bits);
    all.down.bits = reinterpret_cast<uint8_t*>(memory_ + layout_.v_bits);
    all.up.bits_stride = round_up(args_.hidden, 32) / 8;
    all.down.bits_stride = round_up(args_.visible, 32) / 8;
    all.up.state = args_.hidden_out;
    all.down.state = args_.visible_out;

    RbmHalfStepCuda first = launch_of(args_.x, true);
    first.draw.step = args_.step;
    first.draw.bits = all.up.bits;
    first.draw.bits_stride = all.up.bits_stride;
    first.draw.bits_nan = all.up.bits_nan;
    rbm_half_step(first, stream_);

    const auto kernel = args_.up_weights.parts > 1 ? resident_kernel<true> : resident_kernel<false>;
    launch_grid(kGibbs, kernel, int64_t{plan.groups} * plan.slices, kResidentThreads, plan.shared_bytes, true, all,
                stream_);
  }

  const RbmGibbsCuda& args_;
  void* const stream_;
  const Workspace layout_;
  char* const memory_;
};

}  // namespace

int64_t rbm_gibbs_workspace(const RbmGibbsCuda& args) {
  if (args.chains < 0 || args.visible <= 0 || args.hidden <= 0) throw std::invalid_argument("rbm_gibbs: bad sizes");
  return layout(args).total;
}

void rbm_gibbs(const RbmGibbsCuda& args, void* stream) {
  if (args.chains < 0 || args.visible <= 0 || args.hidden <= 0 || args.k < 1) {
    throw std::invalid_argument("rbm_gibbs: a negative size or no step");
  }
  if (args.chains == 0) return;
  if (args.workspace_bytes < layout(args).total || reinterpret_cast<uintptr_t>(args.workspace) % 16 != 0) {
    throw std::invalid_argument("rbm_gibbs: the workspace is too small or not aligned to 16 bytes");
  }
  Chain(args, stream).run();
}

}  // namespace cuda
}  // namespace genfast
