// reparameterize for float64: plain loops and the C library, for gradcheck and for those who need the digits.
#include "vae/gaussian_double.h"
#include "vae/reparameterize_cpu.h"
#include "vae/row_sums.h"

namespace genfast {
namespace {

constexpr double kLargeLogvar = 40.0;  // from here e^x - 1 is e^x in float64

// (e^x - 1 - x) / 2.
double half_expm1_minus(double x) {
  if (x > 700.0) return std::exp(x - 0.69314718055994530942) - 0.5 * x;
  if (std::fabs(x) > 0.5) return 0.5 * (std::expm1(x) - x);
  double total = 0.0, term = 0.25 * x * x;
  for (int n = 3; n < 20; ++n) {
    total += term;
    term *= x / n;
  }
  return total;
}

double half_row_expm1(double row, double logvar, double root) {
  if (logvar > kLargeLogvar) return 0.5 * row * root * root * root * root;
  return 0.5 * row * std::expm1(logvar);
}

}  // namespace

void reparameterize_forward_double(const ReparameterizeForward& args, int64_t begin, int64_t end,
                                   KlPartials* partials) {
  const ReparameterizeShape& shape = args.shape;
  const int64_t total = shape.rows * shape.event;
  RowSums<double> sums(doubles(args.kl), shape.event, begin, partials);
  for (int64_t i = begin; i < end; ++i) {
    const double mu = doubles(args.mu)[i], logvar = doubles(args.logvar)[i];
    if (args.kl != nullptr) sums.add(i, 1, [&](int64_t, int64_t) { return 0.5 * mu * mu + half_expm1_minus(logvar); });
    if (args.z == nullptr) continue;
    const double root = root_of(logvar);
    for (int64_t k = 0; k < shape.samples; ++k) {
      doubles(args.z)[k * total + i] = mu + root * normal(shape, k, i) * root;
    }
  }
  sums.finish();
}

void reparameterize_backward_double(const ReparameterizeBackward& args, int64_t begin, int64_t end) {
  const ReparameterizeShape& shape = args.shape;
  const int64_t total = shape.rows * shape.event;
  for (int64_t i = begin; i < end; ++i) {
    const double logvar = doubles(args.logvar)[i], root = root_of(logvar);
    double to_mu = 0.0, along = 0.0;
    for (int64_t k = 0; args.dz != nullptr && k < shape.samples; ++k) {
      const double grad = doubles(args.dz)[k * total + i];
      to_mu += grad;
      along += grad * (normal(shape, k, i) * 0.0625);
    }
    double to_logvar = 8.0 * (along * root * root);
    if (args.dkl != nullptr) {
      const double row = doubles(args.dkl)[i / shape.event];
      to_mu += row * doubles(args.mu)[i];
      to_logvar = logvar > kLargeLogvar ? (8.0 * along + 0.5 * row * root * root) * root * root
                                        : to_logvar + half_row_expm1(row, logvar, root);
    }
    doubles(args.dlogvar)[i] = to_logvar;
    if (args.dmu != nullptr) doubles(args.dmu)[i] = to_mu;
  }
}

void reparameterize_jvp_double(const ReparameterizeJvp& args, int64_t begin, int64_t end, KlPartials* partials) {
  const ReparameterizeShape& shape = args.shape;
  const int64_t total = shape.rows * shape.event;
  RowSums<double> sums(doubles(args.kl_tangent), shape.event, begin, partials);
  for (int64_t i = begin; i < end; ++i) {
    const double logvar = doubles(args.logvar)[i], root = root_of(logvar);
    const double dmu = doubles(args.mu_tangent)[i], dlogvar = doubles(args.logvar_tangent)[i];
    if (args.kl_tangent != nullptr) {
      const double term = doubles(args.mu)[i] * dmu + half_row_expm1(dlogvar, logvar, root);
      sums.add(i, 1, [&](int64_t, int64_t) { return term; });
    }
    for (int64_t k = 0; args.z_tangent != nullptr && k < shape.samples; ++k) {
      doubles(args.z_tangent)[k * total + i] = dmu + 8.0 * (dlogvar * (normal(shape, k, i) * 0.0625) * root * root);
    }
  }
  sums.finish();
}

}  // namespace genfast
