// Likelihoods for float64: plain loops and the C library, for gradcheck and for those who need the digits.
#include <cmath>
#include <vector>

#include "vae/log_likelihood_cpu.h"
#include "vae/row_sums.h"

namespace genfast {
namespace {

constexpr double kBin = 2.0 / 255.0;
constexpr double kLeastLogScale = -7.0;

const double* doubles(const void* p) { return static_cast<const double*>(p); }
double* doubles(void* p) { return static_cast<double*>(p); }

double softplus(double x) { return (x > 0.0 || x != x ? x : 0.0) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid(double x) { return x < 0.0 ? std::exp(x) / (1.0 + std::exp(x)) : 1.0 / (1.0 + std::exp(-x)); }

// (1 - e^-d) / d for d >= 0, 1 at 0.
double decay(double d) {
  if (!(d < 0.5)) return -std::expm1(-d) / d;
  double total = 0.0;
  for (int n = 18; n >= 1; --n) total = 1.0 - total * d / (n + 1);
  return total;
}

// The mean of the density proportional to e^(l x) on [0, 1].
double tilted_mean(double l) {
  constexpr double kCoth[] = {1.0 / 12,
                              -1.0 / 720,
                              1.0 / 30240,
                              -1.0 / 1209600,
                              1.0 / 47900160,
                              -691.0 / 1307674368000.0,
                              1.0 / 74724249600.0,
                              -3617.0 / 10670622842880000.0,
                              43867.0 / 5109094217170944000.0};
  if (!(std::fabs(l) < 0.75)) return 0.5 + 0.5 / std::tanh(0.5 * l) - 1.0 / l;
  double total = 0.0;
  for (int n = 8; n >= 0; --n) total = total * (l * l) + kCoth[n];
  return 0.5 + l * total;
}

struct Target {
  const LogLikelihood& args;
  bool unit() const { return args.x_dtype == static_cast<int32_t>(DType::kFloat64); }
  double at(int64_t i) const { return unit() ? doubles(args.x)[i] : static_cast<const uint8_t*>(args.x)[i]; }
  double level(int64_t i, bool* valid) const {
    const double scaled = unit() ? at(i) * 255.0 : at(i), level = std::nearbyint(scaled);
    *valid = *valid && std::fabs(scaled - level) < 0.125 && level >= 0.0 && level <= 255.0;
    return level;
  }
};

double logistic_bin(double level, double mean, double log_scale, double* to_mean, double* to_scale) {
  const bool bottom = level <= 0.0, top = level >= 255.0;
  const double clamped = log_scale < kLeastLogScale ? kLeastLogScale : log_scale, inverse = std::exp(-clamped);
  const double bounded = mean > 1e30 ? 1e30 : mean < -1e30 ? -1e30 : mean;
  const double from_mean = level * kBin - 1.0 - bounded, width = kBin * inverse;
  const double plus = inverse * (from_mean + 0.5 * kBin), minus = inverse * (from_mean - 0.5 * kBin);
  const double left = top ? 0.0 : sigmoid(-plus), right = bottom ? 0.0 : sigmoid(minus);
  double value = (top ? 0.0 : -softplus(-plus)) - (bottom ? 0.0 : softplus(minus));
  double slope = minus * right - plus * left;
  if (!bottom && !top) {
    value += std::log(kBin) - clamped + std::log(decay(width));
    slope -= std::exp(-width) / decay(width);
  }
  *to_mean = inverse * (right - left);
  *to_scale = log_scale < kLeastLogScale ? 0.0 : slope;
  return value;
}

// One position of a likelihood with one to three parameters: p and its gradients d.
double position(const LogLikelihood& args, const double p[3], int64_t x_at, double d[3], bool* valid) {
  const Target target = {args};
  const double x = target.at(x_at);
  switch (args.likelihood) {
    case Likelihood::kBernoulli:
      *valid = *valid && !(x < 0.0) && !(x > 1.0);
      d[0] = x - sigmoid(p[0]);
      return -(((p[0] > 0.0 ? p[0] : 0.0) - x * p[0]) + std::log1p(std::exp(-std::fabs(p[0]))));
    case Likelihood::kContinuousBernoulli:
      *valid = *valid && !(x < 0.0) && !(x > 1.0);
      d[0] = x - tilted_mean(p[0]);
      return (x * p[0] - (p[0] > 0.0 ? p[0] : 0.0)) - std::log(decay(std::fabs(p[0])));
    case Likelihood::kGaussian: {
      const double root = std::exp(-0.25 * p[1] > 709.0 ? 709.0 : -0.25 * p[1]);
      const double z = (x - p[0]) * root * root;
      d[0] = z * root * root;
      d[1] = 0.5 * (z * z - 1.0);
      return -0.5 * (z * z + p[1] + 1.83787706640934548356);
    }
    case Likelihood::kDiscretizedLogistic:
      return logistic_bin(target.level(x_at, valid), p[0], p[1], &d[0], &d[1]);
    default: {
      if (x < 0.0 || x - x != 0.0) *valid = *valid && x != x;
      const CountTerms terms = args.likelihood == Likelihood::kNegativeBinomial
                                   ? negative_binomial_terms(p[0], p[1], x)
                                   : zero_inflated_terms(p[0], p[1], p[2], x);
      d[0] = terms.to_log_mean;
      d[1] = terms.to_log_theta;
      d[2] = terms.to_logit;
      return terms.value;
    }
  }
}

double few(const LogLikelihood& args, int64_t row, int64_t column, bool* valid) {
  const int64_t x_row = row % args.x_rows, first = row * args.planes * args.size + column;
  double p[3] = {0.0, args.logvar, 0.0}, d[3] = {0.0, 0.0, 0.0};
  int own[3] = {-1, -1, -1};  // which plane a parameter is
  for (int i = 0, plane = 0; i < 3 && plane < args.planes; ++i) {
    if (i == 1 && args.shared != nullptr) continue;
    own[i] = plane;
    p[i] = doubles(args.params)[first + plane++ * args.size];
  }
  if (args.shared != nullptr) p[1] = doubles(args.shared)[(args.shared_rows == 1 ? 0 : x_row) * args.size + column];
  const double value = position(args, p, x_row * args.size + column, d, valid);
  for (int i = 0; i < 3 && args.to_params != nullptr; ++i) {
    if (own[i] >= 0) doubles(args.to_params)[first + own[i] * args.size] = args.factor * d[i];
  }
  if (args.to_shared != nullptr) doubles(args.to_shared)[row * args.size + column] = args.factor * d[1];
  return value;
}

double softmax(const double* p, int64_t count, int64_t stride, std::vector<double>* out) {
  double most = p[0], total = 0.0;
  for (int64_t q = 1; q < count; ++q) most = p[q * stride] > most ? p[q * stride] : most;
  for (int64_t q = 0; q < count; ++q) total += (*out)[static_cast<size_t>(q)] = std::exp(p[q * stride] - most);
  for (int64_t q = 0; q < count; ++q) (*out)[static_cast<size_t>(q)] /= total;
  return most + std::log(total);
}

double categorical(const LogLikelihood& args, int64_t row, int64_t column, std::vector<double>* room, bool* valid) {
  const int64_t label = static_cast<const int64_t*>(args.x)[(row % args.x_rows) * args.size + column];
  if (label < 0 || label >= args.planes) {
    *valid = false;
    return 0.0;
  }
  const int64_t first = row * args.planes * args.size + column;
  const double* p = doubles(args.params) + first;
  const double total = softmax(p, args.planes, args.size, room);
  for (int64_t q = 0; args.to_params != nullptr && q < args.planes; ++q) {
    doubles(args.to_params)[first + q * args.size] =
        args.factor * ((q == label ? 1.0 : 0.0) - (*room)[static_cast<size_t>(q)]);
  }
  return p[label * args.size] - total;
}

double mixture(const LogLikelihood& args, int64_t row, int64_t column, std::vector<double>* room, bool* valid) {
  const int64_t channels = args.targets, groups = channels == 1 ? 2 : 3, size = args.size;
  const int64_t components = args.planes / (1 + groups * channels), first = row * args.planes * size + column;
  const double* p = doubles(args.params) + first;
  double level[3], centre[3];
  for (int64_t c = 0; c < channels; ++c) {
    level[c] = Target{args}.level(((row % args.x_rows) * channels + c) * size + column, valid);
    centre[c] = level[c] * kBin - 1.0;
  }
  std::vector<double> joint(static_cast<size_t>(components)), to(static_cast<size_t>(args.planes));
  const auto plane = [&](int64_t c, int64_t group, int64_t m) { return (1 + c * groups + group) * components + m; };
  const double weights = softmax(p, components, size, room);
  for (int64_t m = 0; m < components; ++m) {
    double& log_p = joint[static_cast<size_t>(m)];
    log_p = p[m * size] - weights;
    double by[3] = {0.0, 0.0, 0.0}, to_mean[3];
    for (int64_t c = 0; channels == 3 && c < 3; ++c) by[c] = std::tanh(p[plane(c, 2, m) * size]);
    const double shift[3] = {0.0, by[0] * centre[0], channels == 3 ? by[1] * centre[0] + by[2] * centre[1] : 0.0};
    for (int64_t c = 0; c < channels; ++c) {
      double to_scale;
      log_p +=
          logistic_bin(level[c], p[plane(c, 0, m) * size] + shift[c], p[plane(c, 1, m) * size], &to_mean[c], &to_scale);
      to[static_cast<size_t>(plane(c, 0, m))] = to_mean[c];
      to[static_cast<size_t>(plane(c, 1, m))] = to_scale;
    }
    if (channels == 3) {
      to[static_cast<size_t>(plane(0, 2, m))] = to_mean[1] * centre[0] * (1.0 - by[0] * by[0]);
      to[static_cast<size_t>(plane(1, 2, m))] = to_mean[2] * centre[0] * (1.0 - by[1] * by[1]);
      to[static_cast<size_t>(plane(2, 2, m))] = to_mean[2] * centre[1] * (1.0 - by[2] * by[2]);
    }
  }
  std::vector<double> share(static_cast<size_t>(components));
  const double value = softmax(joint.data(), components, 1, &share);
  for (int64_t q = 0; args.to_params != nullptr && q < args.planes; ++q) {
    const size_t m = static_cast<size_t>(q % components);
    const double gradient = q < components ? share[m] - (*room)[m] : share[m] * to[static_cast<size_t>(q)];
    doubles(args.to_params)[first + q * size] = args.factor * gradient;
  }
  return value;
}

}  // namespace

bool log_likelihood_double(const LogLikelihood& args, int64_t begin, int64_t end, float*, KlPartials* partials) {
  RowSums<double> sums(doubles(args.value), args.size, begin, partials);
  std::vector<double> room(static_cast<size_t>(args.planes));
  bool valid = true;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / args.size, column = i % args.size;
    const double term = args.likelihood == Likelihood::kCategorical ? categorical(args, row, column, &room, &valid)
                        : args.likelihood == Likelihood::kDiscretizedLogisticMixture
                            ? mixture(args, row, column, &room, &valid)
                            : few(args, row, column, &valid);
    sums.add(i, 1, [&](int64_t, int64_t) { return term; });
  }
  sums.finish();
  return valid;
}

}  // namespace genfast
