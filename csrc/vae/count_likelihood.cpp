// The negative binomial in float64; mu = e^a, theta = e^b, w = a - b:
//
//   log p(x) = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) - theta softplus(w) - x softplus(-w)
//
// For theta >= 32 the first two terms are x b and a remainder by Stirling's series, so that the Poisson limit is
// reached without cancellation; below, lgamma(theta) = lgamma(1 + theta) - b. genfast/ops/_count_likelihood.py is the
// same.
#include <cmath>

#include "vae/log_likelihood_cpu.h"

namespace genfast {
namespace {

constexpr double kLogLarge = 3.4657359027997265;  // log(32)
constexpr double kHalfLogTwoPi = 0.91893853320467274178;

double sigmoid(double x) { return x < 0.0 ? std::exp(x) / (1.0 + std::exp(x)) : 1.0 / (1.0 + std::exp(-x)); }
double softplus(double x) { return (x > 0.0 ? x : 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// log(1 + u) / u - 1 for u >= 0.
double log1p_ratio_minus(double u) {
  if (u > 0.125) return std::log1p(u) / u - 1.0;
  double total = 0.0;
  for (int n = 15; n >= 1; --n) total = total * -u + 1.0 / (n + 1);
  return -u * total;
}

// (v / (1 + v) - log(1 + v)) / v^2 for v in [0, 1].
double excess(double v) {
  if (v > 0.125) return (v / (1.0 + v) - std::log1p(v)) / (v * v);
  double total = 0.0;
  for (int n = 17; n >= 0; --n) total = total * -v + static_cast<double>(n + 1) / (n + 2);
  return -total;
}

// lgamma(1 / h) less its main terms, and (log(1 / h) - h / 2 - digamma(1 / h)) / h.
double lgamma_tail(double h) {
  const double s = h * h;
  return h * (1.0 / 12 - s * (1.0 / 360 - s * (1.0 / 1260 - s / 1680)));
}
double digamma_tail(double h) {
  const double s = h * h;
  return h * (1.0 / 12 - s * (1.0 / 120 - s * (1.0 / 252 - s / 240)));
}

// Both for z >= 1, moved up to where Stirling's series holds.
double lgamma(double z) {
  if (z == 1.0 || z == 2.0) return 0.0;  // exactly, as for counts of 0 and 1
  double product = 1.0;
  for (; z < 16.0; z += 1.0) product *= z;
  return (z - 0.5) * std::log(z) - z + kHalfLogTwoPi + lgamma_tail(1.0 / z) - std::log(product);
}
double digamma(double z) {
  double sum = 0.0;
  for (; z < 16.0; z += 1.0) sum += 1.0 / z;
  const double h = 1.0 / z;
  return std::log(z) - h * (0.5 + digamma_tail(h)) - sum;
}

}  // namespace

CountTerms negative_binomial_terms(double a, double b, double x) {
  const double w = a - b, drawn = x * sigmoid(-w);
  double loss, slope, bent;  // theta softplus(w), theta sigmoid(w), theta (sigmoid(w) - softplus(w))
  if (w < 0.0) {
    const double mean = std::exp(a), v = std::exp(w);
    loss = mean * (1.0 + log1p_ratio_minus(v));
    slope = mean * sigmoid(-w);
    bent = std::exp(a + w) * excess(v);
  } else {
    const double theta = std::exp(b);
    loss = theta * softplus(w);
    slope = theta * sigmoid(w);
    bent = theta * (sigmoid(w) - softplus(w));
  }
  double rise = 0.0, turn = 0.0;
  if (x > 0.0 && b >= kLogLarge) {
    const double h = std::exp(-b), u = x * h, k = h / (1.0 + u), ratio = log1p_ratio_minus(u);
    const double lowered = (a < b ? a : b) - std::log1p(std::exp(-std::fabs(w)));
    rise = x * ratio + (x - 0.5) * std::log1p(u) + lgamma_tail(k) - lgamma_tail(h) + x * lowered;
    turn = x * (1.0 + ratio) + 0.5 * x * k + digamma_tail(h) - digamma_tail(k) / (1.0 + u);
  } else if (x > 0.0) {
    const double theta = std::exp(b);
    // x + theta may be below 1 where a count is not whole.
    const double shift = x + theta < 1.0 ? 1.0 : 0.0, z = x + theta + shift;
    const double below = shift != 0.0 ? std::log(x + theta) : 0.0, inverse = shift != 0.0 ? 1.0 / (x + theta) : 0.0;
    rise = (lgamma(z) - below) - lgamma(1.0 + theta) + b - x * softplus(-w);
    turn = theta * ((digamma(z) - inverse) - digamma(1.0 + theta)) + 1.0;
  }
  return {rise - lgamma(x + 1.0) - loss, drawn - slope, bent + (turn - drawn), 0.0};
}

CountTerms zero_inflated_terms(double a, double b, double logit, double x) {
  const CountTerms counts = negative_binomial_terms(a, b, x);
  const double inflation = sigmoid(logit);
  if (!(x <= 0.0)) return {counts.value - softplus(logit), counts.to_log_mean, counts.to_log_theta, -inflation};
  const double share = sigmoid(counts.value - logit);  // of a zero that the counts explain
  const double value = logit + softplus(counts.value - logit) - softplus(logit);
  if (share == 0.0) return {value, 0.0, 0.0, 1.0 - inflation};
  return {value, share * counts.to_log_mean, share * counts.to_log_theta, (1.0 - share) - inflation};
}

}  // namespace genfast
