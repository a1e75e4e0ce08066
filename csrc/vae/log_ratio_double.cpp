// log_ratio for float64: plain loops and the C library.
#include "vae/gaussian_double.h"
#include "vae/log_ratio_cpu.h"

namespace genfast {

void log_ratio_forward_double(const LogRatioForward& args, const RowPiece& piece) {
  const ReparameterizeShape& shape = args.shape;
  for (int64_t k = piece.k_begin; k < piece.k_end; ++k) {
    for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
      double total = 0.0;
      for (int64_t i = row * shape.event; i < (row + 1) * shape.event; ++i) {
        const double logvar = doubles(args.logvar)[i], root = root_of(logvar), eps = normal(shape, k, i);
        const double z = doubles(args.mu)[i] + root * eps * root;
        doubles(args.z)[k * shape.rows * shape.event + i] = z;
        total += 0.5 * (eps * eps + logvar) - 0.5 * z * z;
      }
      doubles(args.ratio)[k * shape.rows + row] = total;
    }
  }
}

void log_ratio_backward_double(const LogRatioBackward& args, int64_t begin, int64_t end) {
  const ReparameterizeShape& shape = args.shape;
  const int64_t total = shape.rows * shape.event;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / shape.event;
    const double mu = doubles(args.mu)[i], logvar = doubles(args.logvar)[i];
    const double root = root_of(logvar), inverse = root_of(-logvar);
    double to_mu = 0.0, along = 0.0, direct = 0.0;
    for (int64_t k = 0; k < shape.samples; ++k) {
      const double eps = normal(shape, k, i);
      double grad = 0.0;
      if (args.dz != nullptr) {
        grad = doubles(args.dz)[k * total + i];
        if (args.weights != nullptr) grad *= doubles(args.weights)[k * shape.rows + row];
      }
      if (args.dratio != nullptr) {
        const double r = doubles(args.dratio)[k * shape.rows + row];
        grad = grad - r * mu - r * eps * root * root;
        direct += args.path ? r * eps * eps : r;
        if (args.path) to_mu += r * eps * inverse * inverse;
      }
      to_mu += grad;
      along += grad * (eps * 0.0625);
    }
    doubles(args.dmu)[i] = to_mu;
    doubles(args.dlogvar)[i] = 8.0 * (along * root * root) + 0.5 * direct;
  }
}

void log_ratio_jvp_double(const LogRatioJvp& args, const RowPiece& piece) {
  const ReparameterizeShape& shape = args.shape;
  for (int64_t k = piece.k_begin; k < piece.k_end; ++k) {
    for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
      double total = 0.0;
      for (int64_t i = row * shape.event; i < (row + 1) * shape.event; ++i) {
        const double mu = doubles(args.mu)[i], logvar = doubles(args.logvar)[i];
        const double dmu = doubles(args.mu_tangent)[i], dlogvar = doubles(args.logvar_tangent)[i];
        const double root = root_of(logvar), inverse = root_of(-logvar), eps = normal(shape, k, i);
        doubles(args.z_tangent)[k * shape.rows * shape.event + i] =
            dmu + 8.0 * (dlogvar * (eps * 0.0625) * root * root);
        // z z' in powers of sigma: no 0 * inf, and one bracket where two terms may overflow.
        const double half = 0.5 * dlogvar * eps;
        const double product = mu * dmu + (eps * dmu + mu * half + eps * half * root * root) * root * root;
        total += (args.path ? eps * dmu * inverse * inverse + eps * half : 0.5 * dlogvar) - product;
      }
      doubles(args.ratio_tangent)[k * shape.rows + row] = total;
    }
  }
}

}  // namespace genfast
