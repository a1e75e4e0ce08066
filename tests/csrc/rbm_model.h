// RBMs in plain double loops with the noise of common/philox.h: what the kernels of csrc/rbm are compared with.
#pragma once

#include <algorithm>

#include "check.h"
#include "common/philox.h"
#include "rbm/rbm_parameters.h"
#include "storage.h"

struct RbmShape {
  int64_t visible, hidden;
  genfast::UnitKind visible_kind = genfast::UnitKind::kBernoulli, hidden_kind = genfast::UnitKind::kBernoulli;
  int64_t visible_categories = 1, hidden_categories = 1;
  genfast::DType dtype = genfast::DType::kFloat32;
  bool rounded = false;
  bool pairs = false;  // of bfloat16 in products, wherever they can be had

  std::string name() const {
    return check::format("[%lld (%d), %lld (%d)] %s%s", static_cast<long long>(visible), static_cast<int>(visible_kind),
                         static_cast<long long>(hidden), static_cast<int>(hidden_kind), dtype_name(dtype),
                         pairs     ? " rounded, in pairs"
                         : rounded ? " rounded"
                                   : "");
  }
};

// Units given their inputs. `tie`: a sample is so near its threshold that rounding decides it.
struct RbmDraw {
  std::vector<double> state, mean;
  double log_partition = 0.0;
  bool tie = false;
};

// Whether states are real numbers: these round, others are exact.
inline bool is_real(genfast::UnitKind kind) {
  return kind == genfast::UnitKind::kGaussian || kind == genfast::UnitKind::kRelu;
}

class RbmModel {
 public:
  using UnitKind = genfast::UnitKind;

  explicit RbmModel(const RbmShape& shape, uint64_t seed = 1)
      : shape(shape), W(shape.dtype, values(shape.visible * shape.hidden, 0.3, seed)) {
    genfast::set_bfloat16_pairs(shape.pairs ? genfast::Choice::kOn : genfast::Choice::kOff);
    b = floats(shape.visible, 0.5, seed + 1);
    c = floats(shape.hidden, 0.5, seed + 2);
    if (shape.visible_kind != UnitKind::kGaussian) return;
    for (float x : floats(shape.visible, 0.4, seed + 3)) {
      inverse_variance.push_back(std::exp(-x));
      deviation.push_back(std::exp(0.5f * x));
    }
  }

  ~RbmModel() { genfast::set_bfloat16_pairs(genfast::Choice::kAuto); }
  RbmModel(const RbmModel&) = delete;
  RbmModel& operator=(const RbmModel&) = delete;

  genfast::RbmParameters parameters() {
    const bool gaussian = !inverse_variance.empty();
    return {shape.dtype,
            W.data(),
            shape.visible,
            shape.hidden,
            b.data(),
            c.data(),
            gaussian ? inverse_variance.data() : nullptr,
            gaussian ? deviation.data() : nullptr,
            shape.visible_kind,
            shape.hidden_kind,
            shape.visible_categories,
            shape.hidden_categories,
            shape.rounded};
  }

  int64_t units(bool up) const { return up ? shape.hidden : shape.visible; }
  UnitKind kind(bool up) const { return up ? shape.hidden_kind : shape.visible_kind; }

  // Inputs of one row's units, bias included: those of the hidden side (up) given v, of the visible side given h.
  std::vector<double> inputs(const double* x, bool up) const {
    std::vector<double> out(static_cast<size_t>(units(up)));
    for (int64_t j = 0; j < units(up); ++j)
      out[static_cast<size_t>(j)] = up ? c[static_cast<size_t>(j)] : b[static_cast<size_t>(j)];
    for (int64_t i = 0; i < units(!up); ++i) {
      const double state = shape.rounded ? bfloat16_rounded(x[i]) : x[i];
      for (int64_t j = 0; j < units(up); ++j) out[static_cast<size_t>(j)] += state * weight(up ? i : j, up ? j : i, up);
    }
    return out;
  }

  RbmDraw draw(const double* x, bool up, double beta, uint64_t seed, uint32_t chain, uint32_t step) const {
    RbmDraw out;
    out.mean = inputs(x, up);
    out.state = out.mean;
    switch (kind(up)) {
      case UnitKind::kGaussian:
        for (size_t i = 0; i < out.mean.size(); ++i) {
          const double sigma = (up ? 1.0 : static_cast<double>(deviation[i])) / std::sqrt(beta);
          out.state[i] = out.mean[i] + sigma * normal(i, chain, step, seed);
          out.log_partition += 0.5 * beta * out.mean[i] * out.mean[i] + 0.5 * std::log(2.0 * M_PI / beta);
        }
        return out;
      case UnitKind::kRelu:
        for (size_t i = 0; i < out.mean.size(); ++i) {
          const double root = std::sqrt(beta), s = root * out.mean[i];
          out.state[i] = truncated_quantile(s, uniform(i, chain, step, seed)) / root;
          out.mean[i] = (s + std::exp(-0.5 * s * s) / std::sqrt(2.0 * M_PI) / upper_tail(-s)) / root;
          out.log_partition += 0.5 * s * s + 0.5 * std::log(2.0 * M_PI / beta) + std::log(upper_tail(-s));
        }
        return out;
      case UnitKind::kSoftmax:
        softmax(up ? shape.hidden_categories : shape.visible_categories, beta, seed, chain, step, out);
        return out;
      default:
        for (size_t i = 0; i < out.mean.size(); ++i) {
          const double logit = beta * out.mean[i], u = uniform(i, chain, step, seed);
          out.log_partition += std::max(logit, 0.0) + std::log1p(std::exp(-std::fabs(logit)));
          out.mean[i] = 1.0 / (1.0 + std::exp(-logit));
          out.state[i] = u < out.mean[i] ? 1.0 : 0.0;
          out.tie |= std::fabs(u - out.mean[i]) < kTie;
        }
        return out;
    }
  }

  double visible_energy(const double* v) const {
    double energy = 0.0;
    for (size_t i = 0; i < b.size(); ++i) {
      energy += inverse_variance.empty() ? -v[i] * b[i] : 0.5 * inverse_variance[i] * (v[i] - b[i]) * (v[i] - b[i]);
    }
    return energy;
  }

  double free_energy(const double* v) const { return visible_energy(v) - draw(v, true, 1.0, 0, 0, 0).log_partition; }

  // Rows of visible states: 0 or 1, one of K, or real numbers that float32 holds.
  std::vector<double> states(int64_t rows, bool of_hidden, uint64_t seed) const {
    const int64_t count = units(of_hidden);
    const int64_t categories = of_hidden ? shape.hidden_categories : shape.visible_categories;
    std::mt19937_64 random(seed);
    std::vector<double> out(static_cast<size_t>(rows * count));
    for (size_t i = 0; i < out.size(); ++i) {
      if (is_real(kind(of_hidden))) {
        const double x = static_cast<float>(std::normal_distribution<double>()(random));
        out[i] = kind(of_hidden) == UnitKind::kRelu ? std::fabs(x) : x;
      } else if (categories == 1) {
        out[i] = static_cast<double>(random() & 1);
      } else if (i % static_cast<size_t>(categories) == 0) {
        out[i + random() % static_cast<size_t>(categories)] = 1.0;
      }
    }
    return out;
  }

  static double uniform(size_t unit, uint32_t chain, uint32_t step, uint64_t seed) {
    return genfast::philox::uniform(
        genfast::philox::rbm_words(static_cast<uint32_t>(unit >> 2), chain, step, seed).w[unit & 3]);
  }

  static double normal(size_t unit, uint32_t chain, uint32_t step, uint64_t seed) {
    const genfast::philox::Words words =
        genfast::philox::philox(static_cast<uint32_t>(unit >> 2), chain, step, genfast::philox::kRbmNormal, seed);
    const size_t pair = unit & 2;
    const double radius = std::sqrt(-2.0 * std::log((words.w[pair] + 1.0) * 0x1p-32));
    const double angle = words.w[pair + 1] * (2.0 * M_PI * 0x1p-32);
    return radius * (unit & 1 ? std::sin(angle) : std::cos(angle));
  }

  static std::vector<double> values(int64_t count, double scale, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal(0.0, scale);
    std::vector<double> out(static_cast<size_t>(count));
    for (double& x : out) x = normal(random);
    return out;
  }

  static std::vector<float> floats(int64_t count, double scale, uint64_t seed) {
    const std::vector<double> x = values(count, scale, seed);
    return std::vector<float>(x.begin(), x.end());
  }

  static constexpr double kTie = 4e-6;

  RbmShape shape;
  Array W;
  std::vector<float> b, c, inverse_variance, deviation;

 private:
  double weight(int64_t v, int64_t h, bool up) const {
    double w = W.get(v * shape.hidden + h);
    if (up && !inverse_variance.empty()) w *= static_cast<double>(inverse_variance[static_cast<size_t>(v)]);
    return shape.rounded ? bfloat16_rounded(static_cast<float>(w)) : w;
  }

  static double upper_tail(double x) { return 0.5 * std::erfc(x * M_SQRT1_2); }

  // y >= 0 with Q(y - s) = (1 - u) Q(-s), by bisection.
  static double truncated_quantile(double s, double u) {
    double low = 0.0, high = 12.0 + std::fabs(s);
    for (int i = 0; i < 60; ++i) {
      const double y = 0.5 * (low + high);
      (upper_tail(y - s) > (1.0 - u) * upper_tail(-s) ? low : high) = y;
    }
    return low;
  }

  static void softmax(int64_t K, double beta, uint64_t seed, uint32_t chain, uint32_t step, RbmDraw& out) {
    for (size_t first = 0; first < out.mean.size(); first += static_cast<size_t>(K)) {
      const size_t last = first + static_cast<size_t>(K);
      const double most = *std::max_element(out.mean.begin() + static_cast<int64_t>(first),
                                            out.mean.begin() + static_cast<int64_t>(last));
      double all = 0.0, below = 0.0;
      for (size_t i = first; i < last; ++i) all += std::exp(beta * (out.mean[i] - most));
      out.log_partition += beta * most + std::log(all);
      const double u = uniform(first / static_cast<size_t>(K), chain, step, seed);
      size_t chosen = first;
      for (size_t i = first; i < last; ++i) {
        out.mean[i] = std::exp(beta * (out.mean[i] - most)) / all;
        out.state[i] = 0.0;
        below += out.mean[i];
        if (i + 1 < last && below <= u) chosen = i + 1;
        out.tie |= std::fabs(below - u) < kTie;
      }
      out.state[chosen] = 1.0;
    }
  }
};

// Blocks of rows, of columns and of the depth that end inside and at their ends; every kind of unit.
inline std::vector<RbmShape> rbm_shapes() {
  using genfast::DType;
  using genfast::UnitKind;
  return {
      {1, 1},
      {37, 29},
      {300, 130},
      {64, 270},
      {45, 33, UnitKind::kBernoulli, UnitKind::kBernoulli, 1, 1, DType::kBFloat16},
      {45, 33, UnitKind::kBernoulli, UnitKind::kBernoulli, 1, 1, DType::kFloat16},
      {140, 51, UnitKind::kBernoulli, UnitKind::kBernoulli, 1, 1, DType::kFloat32, true},
      {141, 51, UnitKind::kBernoulli, UnitKind::kBernoulli, 1, 1, DType::kFloat32, true, true},
      {300, 37, UnitKind::kBernoulli, UnitKind::kBernoulli, 1, 1, DType::kFloat16, true, true},
      {43, 35, UnitKind::kGaussian, UnitKind::kBernoulli},
      {33, 40, UnitKind::kGaussian, UnitKind::kBernoulli, 1, 1, DType::kFloat32, true},
      {33, 40, UnitKind::kGaussian, UnitKind::kBernoulli, 1, 1, DType::kFloat32, true, true},
      {34, 19, UnitKind::kBernoulli, UnitKind::kGaussian},
      {39, 31, UnitKind::kSoftmax, UnitKind::kBernoulli, 3},
      {33, 40, UnitKind::kBernoulli, UnitKind::kSoftmax, 1, 5},
      {37, 22, UnitKind::kBernoulli, UnitKind::kRelu},
      {30, 70, UnitKind::kSoftmax, UnitKind::kRelu, 5},
  };
}
