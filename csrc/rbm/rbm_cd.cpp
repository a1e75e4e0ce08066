// Contrastive divergence. One parallel region takes blocks of rows through the positive phase, the chain and the
// negative phase, keeping what the gradient needs; a second one makes the gradient, both phases in one product.
#include "rbm/rbm_cd.h"

#include <algorithm>
#include <atomic>

#include "common/gemm/gemm.h"
#include "common/parallel.h"

namespace genfast {
namespace cpu {
namespace {

class ContrastiveDivergence {
 public:
  ContrastiveDivergence(const RbmCd& args, int threads) : args_(args), p_(args.parameters), threads_(threads) {
    persistent_ = args.chains != nullptr;
    count_ = persistent_ ? args.chain_count : args.rows;
    v_stride_ = padded_stride(p_.visible);
    h_stride_ = padded_stride(p_.hidden);
    block_rows_ = rows_per_block(std::max(args.rows, count_), threads);
  }

  bool run() {
    const int64_t hidden_floats = block_rows_ * h_stride_;
    const int64_t whole = round_up(p_.visible, GENFAST_FOR_ISA(gemm_tile_rows)());
    gradient_rows_ = std::min(GENFAST_FOR_ISA(gemm_most_rows)(), whole);
    int64_t scratch = 0;
    for (const bool up : {true, false}) {
      scratch = std::max(scratch, GENFAST_FOR_ISA(rbm_rows_scratch)(rbm_side(p_, up), block_rows_));
    }
    const int64_t gradient_scratch =
        GENFAST_FOR_ISA(rbm_gradient_scratch)(gradient_rows_, p_.hidden, args_.rows + count_);
    slot_floats_ = round_up(std::max(hidden_floats + scratch, gradient_scratch), 16);
    tile_ = GENFAST_FOR_ISA(gemm_tile_columns)();
    const int64_t hidden_panels = round_up(p_.hidden, tile_);
    const int64_t all_rows = args_.rows + count_;
    Workspace workspace(rbm_side_floats(p_, true) + rbm_side_floats(p_, false) + threads_ * slot_floats_ +
                        all_rows * (v_stride_ + hidden_panels) + 8 * all_rows + 64);
    up_ = rbm_prepare(p_, true, workspace, threads_);
    if (args_.k > 0) down_ = rbm_prepare(p_, false, workspace, threads_);
    slots_ = workspace.take(threads_ * slot_floats_);
    data_v_ = workspace.take(args_.rows * v_stride_);
    data_h_ = workspace.take(args_.rows * hidden_panels);
    model_v_ = workspace.take(count_ * v_stride_);
    model_h_ = workspace.take(count_ * hidden_panels);
    partition_ = reinterpret_cast<double*>(workspace.take(2 * all_rows));
    energy_ = reinterpret_cast<double*>(workspace.take(2 * all_rows));
    error_ = reinterpret_cast<double*>(workspace.take(2 * args_.rows));

    phases();
    if (bad_.load()) return true;
    sums();
    gradient();
    statistics();
    return false;
  }

 private:
  int useful_threads() const { return (args_.rows + count_) * p_.visible * p_.hidden < (1 << 16) ? 1 : threads_; }

  // Blocks of data and of chains in even proportions, for a block of chains costs more.
  void phases() {
    const int64_t data_blocks = (args_.rows + block_rows_ - 1) / block_rows_;
    const int64_t chain_blocks = persistent_ ? (count_ + block_rows_ - 1) / block_rows_ : 0;
    const int64_t shares = std::max(data_blocks, chain_blocks);
    parallel_slots(shares, useful_threads(), [&](int64_t slot, int64_t first, int64_t last) {
      float* h = slots_ + slot * slot_floats_;
      float* room = h + block_rows_ * h_stride_;
      bool met = false;
      for (int64_t i = first * data_blocks / shares; i < last * data_blocks / shares; ++i) {
        const int64_t begin = i * block_rows_, rows = std::min(block_rows_, args_.rows - begin);
        met |= positive(begin, rows, h, room);
        if (!persistent_) met |= negative(begin, rows, h, room);
      }
      for (int64_t i = first * chain_blocks / shares; i < last * chain_blocks / shares; ++i) {
        const int64_t begin = i * block_rows_, rows = std::min(block_rows_, count_ - begin);
        met |= start_chains(begin, rows, h, room);
        met |= negative(begin, rows, h, room);
      }
      if (met) bad_.store(true, std::memory_order_relaxed);
    });
  }

  // The persistent chains, and, where they move, the first hidden states.
  bool start_chains(int64_t begin, int64_t rows, float* h, float* room) {
    float* v = model_v_ + begin * v_stride_;
    const char* from = static_cast<const char*>(args_.chains) + begin * p_.visible * bytes_of(args_.chains_dtype);
    bool bad = GENFAST_FOR_ISA(rbm_load_rows)(args_.chains_dtype, from, p_.visible, v, v_stride_, rows, p_.visible);
    if (args_.k > 0) {
      RbmRows up = upwards(v, rows, begin);
      up.step = static_cast<uint32_t>(args_.step);
      up.state = h;
      up.state_stride = h_stride_;
      bad |= GENFAST_FOR_ISA(rbm_rows)(up, room);
    }
    return bad;
  }

  RbmRows upwards(const float* v, int64_t rows, int64_t begin) const {
    RbmRows up = {};
    up.side = &up_;
    up.rows = rows;
    up.x = v;
    up.x_stride = v_stride_;
    up.seed = args_.seed;
    up.chain = static_cast<uint32_t>(args_.chain_offset + begin);
    return up;
  }

  // The data's hidden means or samples; these are the first hidden states where the chains start here, else drawn at
  // the half-step after those of the chain.
  bool positive(int64_t begin, int64_t rows, float* h, float* room) {
    float* v = data_v_ + begin * v_stride_;
    const char* from = static_cast<const char*>(args_.v) + begin * p_.visible * bytes_of(args_.v_dtype);
    bool bad = GENFAST_FOR_ISA(rbm_load_rows)(args_.v_dtype, from, p_.visible, v, v_stride_, rows, p_.visible);
    RbmRows up = upwards(v, rows, begin);
    const bool starts_chain = !persistent_ && args_.k > 0;
    up.step = static_cast<uint32_t>(starts_chain ? args_.step : args_.step + 2 * args_.k + 1);
    up.state = starts_chain || args_.sample_hidden ? h : nullptr;
    up.state_stride = h_stride_;
    up.mean = data_h_ + begin * tile_;
    up.mean_stride = tile_;
    up.mean_panel_stride = args_.rows * tile_;
    up.mean_scale = -1.0f / static_cast<float>(args_.rows);
    up.state_as_mean = args_.sample_hidden;
    up.log_partition = partition_ + begin;
    bad |= GENFAST_FOR_ISA(rbm_rows)(up, room);
    return bad;
  }

  // The chain from hidden states h on, and its hidden means or samples.
  bool negative(int64_t begin, int64_t rows, float* h, float* room) {
    auto* const draw = GENFAST_FOR_ISA(rbm_rows);
    float* v = model_v_ + begin * v_stride_;
    bool bad = false;
    if (!persistent_ && args_.k == 0) std::copy_n(data_v_ + begin * v_stride_, rows * v_stride_, v);
    for (int64_t t = 0; t < args_.k; ++t) {
      RbmRows down = {};
      down.side = &down_;
      down.rows = rows;
      down.x = h;
      down.x_stride = h_stride_;
      down.seed = args_.seed;
      down.chain = static_cast<uint32_t>(args_.chain_offset + begin);
      down.step = static_cast<uint32_t>(args_.step + 2 * t + 1);
      down.state = v;
      down.state_stride = v_stride_;
      if (!persistent_ && t + 1 == args_.k) {
        down.target = data_v_ + begin * v_stride_;
        down.target_stride = v_stride_;
        down.squared_error = error_ + begin;
      }
      bad |= draw(down, room);
      if (t + 1 < args_.k) {
        RbmRows up = upwards(v, rows, begin);
        up.step = static_cast<uint32_t>(args_.step + 2 * t + 2);
        up.state = h;
        up.state_stride = h_stride_;
        bad |= draw(up, room);
      }
    }
    RbmRows up = upwards(v, rows, begin);
    up.step = static_cast<uint32_t>(args_.step + 2 * args_.k);
    up.state = args_.sample_hidden ? h : nullptr;
    up.state_stride = h_stride_;
    up.mean = model_h_ + begin * tile_;
    up.mean_stride = tile_;
    up.mean_panel_stride = count_ * tile_;
    up.mean_scale = 1.0f / static_cast<float>(count_);
    up.state_as_mean = args_.sample_hidden;
    up.log_partition = partition_ + args_.rows + begin;
    bad |= draw(up, room);
    char* out = static_cast<char*>(args_.moved) + begin * p_.visible * bytes_of(p_.dtype);
    GENFAST_FOR_ISA(rbm_store_rows)(p_.dtype, v, v_stride_, out, p_.visible, rows, p_.visible);
    return bad;
  }

  void sums() {
    auto* const column_sums = GENFAST_FOR_ISA(rbm_column_sums);
    constexpr int64_t kPiece = 128;
    const int64_t visible_pieces = (p_.visible + kPiece - 1) / kPiece;
    const int64_t hidden_pieces = (p_.hidden + tile_ - 1) / tile_;
    const int useful = (args_.rows + count_) * (p_.visible + p_.hidden) < (1 << 17) ? 1 : threads_;
    parallel_for(visible_pieces + hidden_pieces, useful, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (i < visible_pieces) {
          const int64_t begin = i * kPiece, end = std::min(begin + kPiece, p_.visible);
          column_sums(data_v_, v_stride_, args_.rows, begin, end, -1.0f / static_cast<float>(args_.rows), false,
                      args_.db);
          column_sums(model_v_, v_stride_, count_, begin, end, 1.0f / static_cast<float>(count_), true, args_.db);
          if (p_.inverse_variance != nullptr) {
            for (int64_t v = begin; v < end; ++v) args_.db[v] *= p_.inverse_variance[v];
          }
        } else {
          const int64_t panel = i - visible_pieces, begin = panel * tile_, end = std::min(tile_, p_.hidden - begin);
          const float* data = data_h_ + panel * args_.rows * tile_;
          const float* model = model_h_ + panel * count_ * tile_;
          column_sums(data, tile_, args_.rows, 0, end, -1.0f, false, args_.hidden_mean + begin);
          column_sums(data, tile_, args_.rows, 0, end, 1.0f, false, args_.dc + begin);
          column_sums(model, tile_, count_, 0, end, 1.0f, true, args_.dc + begin);
        }
      }
    });
  }

  void gradient() {
    const RbmGradient task = {{data_v_, model_v_},
                              {data_h_, model_h_},
                              {args_.rows, count_},
                              v_stride_,
                              p_.visible,
                              p_.hidden,
                              p_.inverse_variance,
                              args_.visible_offset,
                              args_.hidden_offset,
                              args_.db,
                              args_.dc,
                              args_.dW,
                              args_.sgd};
    const int64_t tile = GENFAST_FOR_ISA(gemm_tile_rows)();
    const int64_t share = round_up((p_.visible + threads_ - 1) / threads_, tile);
    const int64_t piece = std::min(gradient_rows_ / tile * tile, share);
    parallel_slots((p_.visible + piece - 1) / piece, useful_threads(), [&](int64_t slot, int64_t first, int64_t last) {
      float* room = slots_ + slot * slot_floats_;
      for (int64_t i = first; i < last; ++i) {
        GENFAST_FOR_ISA(rbm_gradient_rows)(task, i * piece, std::min((i + 1) * piece, p_.visible), room);
      }
    });
  }

  void statistics() {
    double error = 0.0, gap = 0.0;
    if (!persistent_ && args_.k > 0) {
      for (int64_t r = 0; r < args_.rows; ++r) error += error_[r];
      error /= static_cast<double>(args_.rows);
    }
    double data = 0.0, model = 0.0;
    for (int64_t r = 0; r < args_.rows; ++r) data -= partition_[r];
    for (int64_t r = 0; r < count_; ++r) model -= partition_[args_.rows + r];
    if (p_.visible_kind == UnitKind::kGaussian) {
      auto* const energy = GENFAST_FOR_ISA(rbm_visible_energy);
      energy(data_v_, v_stride_, args_.rows, p_.visible, p_.b, p_.inverse_variance, energy_);
      energy(model_v_, v_stride_, count_, p_.visible, p_.b, p_.inverse_variance, energy_ + args_.rows);
      for (int64_t r = 0; r < args_.rows; ++r) data += energy_[r];
      for (int64_t r = 0; r < count_; ++r) model += energy_[args_.rows + r];
    } else {  // -v'b: db is the model's mean minus the data's
      for (int64_t v = 0; v < p_.visible; ++v) gap += static_cast<double>(args_.db[v]) * static_cast<double>(p_.b[v]);
    }
    gap += data / static_cast<double>(args_.rows) - model / static_cast<double>(count_);
    args_.statistics[0] = static_cast<float>(error);
    args_.statistics[1] = static_cast<float>(gap);
  }

  const RbmCd& args_;
  const RbmParameters& p_;
  const int threads_;
  bool persistent_;
  int64_t count_, v_stride_, h_stride_, block_rows_, tile_ = 0, gradient_rows_ = 0, slot_floats_ = 0;
  RbmSide up_ = {}, down_ = {};
  float *slots_ = nullptr, *data_v_ = nullptr, *data_h_ = nullptr, *model_v_ = nullptr, *model_h_ = nullptr;
  double *partition_ = nullptr, *energy_ = nullptr, *error_ = nullptr;
  std::atomic<bool> bad_{false};
};

}  // namespace

bool rbm_cd(const RbmCd& args, int threads) { return ContrastiveDivergence(args, threads).run(); }

}  // namespace cpu
}  // namespace genfast
