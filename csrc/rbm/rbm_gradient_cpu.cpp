// The gradient of contrastive divergence as one product over the rows of both phases; compiled once per instruction
// set.
#include "common/gemm/product.h"
#include "rbm/rbm_gradient.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

struct Finish {
  const RbmGradient& args;
  int64_t first_row;

  void operator()(int64_t row, int64_t column, int64_t count, const float* values) const {
    const int64_t v = first_row + row;
    const int64_t at = v * args.hidden + column;
    const VecF scale = broadcast(args.scale == nullptr ? 1.0f : args.scale[v]);
    for (int64_t i = 0; i < count; i += kWidth) {
      VecF x = load_float(values + i) * scale;
      if (args.visible_offset != nullptr) {
        x = x - broadcast(args.visible_offset[v]) * load_upto(args.dc + column + i, count - i);
      }
      if (args.hidden_offset != nullptr) {
        x = x - broadcast(args.db[v]) * load_upto(args.hidden_offset + column + i, count - i);
      }
      if (args.dW != nullptr) store_upto(args.dW + at + i, x, count - i);
      if (args.sgd != nullptr) descend(*args.sgd, at + i, count - i, x);
    }
  }

  static void descend(const RbmSgd& sgd, int64_t at, int64_t count, VecF dW) {
    const VecF W = load_upto(sgd.W + at, count);
    VecF velocity = fma(broadcast(sgd.weight_decay), W, dW);
    if (sgd.velocity != nullptr) {
      velocity = fma(broadcast(sgd.momentum), load_upto(sgd.velocity + at, count), velocity);
      store_upto(sgd.velocity + at, velocity, count);
    }
    store_upto(sgd.W + at, fma(broadcast(-sgd.rate), velocity, W), count);
  }
};

}  // namespace

int64_t rbm_gradient_scratch(int64_t rows, int64_t hidden, int64_t depth) {
  return rows * gemm::block_panels(hidden, true) * gemm::kTileColumns + gemm::room_floats(rows, depth, true);
}

void rbm_gradient_rows(const RbmGradient& args, int64_t begin, int64_t end, float* scratch) {
  gemm::Term terms[2];
  int count = 0;
  for (int phase = 0; phase < 2; ++phase) {
    if (args.rows[phase] == 0) continue;
    terms[count++] = {{args.x[phase] + begin, 1, args.x_stride},
                      {args.h[phase], args.rows[phase] * gemm::kTileColumns, gemm::kTileColumns},
                      args.rows[phase]};
  }
  const int64_t panels = gemm::block_panels(args.hidden, true);
  Finish finish = {args, begin};
  gemm::product(terms, count, end - begin, args.hidden, panels, scratch, finish,
                scratch + (end - begin) * panels * gemm::kTileColumns);
}

void rbm_column_sums(const float* x, int64_t stride, int64_t rows, int64_t begin, int64_t end, float scale, bool add,
                     float* out) {
  constexpr int64_t kPiece = 128;  // rows summed before they join the rest: shorter sums round less
  for (int64_t column = begin; column < end; column += kWidth) {
    VecF all = broadcast(0.0f);
    for (int64_t first = 0; first < rows; first += kPiece) {
      const int64_t last = first + kPiece < rows ? first + kPiece : rows;
      VecF piece = broadcast(0.0f);
      for (int64_t r = first; r < last; ++r) piece = piece + load_float(x + r * stride + column);
      all = all + piece;
    }
    all = all * broadcast(scale);
    if (add) all = all + load_upto(out + column, end - column);
    store_upto(out + column, all, end - column);
  }
}

void rbm_visible_energy(const float* x, int64_t stride, int64_t rows, int64_t visible, const float* b,
                        const float* inverse_variance, double* out) {
  constexpr int64_t kPiece = 512;
  for (int64_t r = 0; r < rows; ++r) {
    double energy = 0.0;
    for (int64_t first = 0; first < visible; first += kPiece) {
      const int64_t last = first + kPiece < visible ? first + kPiece : visible;
      VecF piece = broadcast(0.0f);
      for (int64_t i = first; i < last; i += kWidth) {
        const VecF v = load_upto(x + r * stride + i, last - i), bias = load_upto(b + i, last - i);
        if (inverse_variance == nullptr) {
          piece = fma(v, bias, piece);
        } else {
          const VecF difference = v - bias;
          piece = fma(difference * difference, load_upto(inverse_variance + i, last - i), piece);
        }
      }
      energy += static_cast<double>(sum(piece));
    }
    out[r] = inverse_variance == nullptr ? -energy : 0.5 * energy;
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
