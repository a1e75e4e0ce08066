// Reparameterized Gaussian samples and their log density ratios to N(0, 1), in one pass; formulas in
// docs/kernels/log_ratio.md.
//
//   forward   z = mu + sigma eps          ratio = log N(z; 0, 1) - log N(z; mu, sigma^2) = sum_event (eps^2 + logvar -
//   z^2) / 2 backward  g = w dz - r z              dmu = sum_k g        dlogvar = sum_k (g eps sigma + r) / 2 jvp z' =
//   mu' + eps sigma logvar' / 2            ratio' = sum_event (logvar' / 2 - z z')
//
// r is the gradient of the ratio, w (one where null) what the gradient of z is multiplied by. With `path`, the mean and
// variance inside log N(z; mu, sigma^2) are constants:
//
//   backward  dmu = sum_k (g + r eps / sigma)             dlogvar = sum_k (g eps sigma + r eps^2) / 2
//   jvp       ratio' = sum_event (eps / sigma - z) z'
//
// mu, logvar, their gradients and tangents are contiguous [rows, event]; z and its relatives [samples, rows, event];
// the ratio, its relatives and w [samples, rows], float64 for float64 inputs and float32 otherwise. The noise is that
// of reparameterize.h; no pass stores it.
#pragma once

#include "vae/reparameterize.h"

namespace genfast {

struct LogRatioForward {
  ReparameterizeShape shape;
  const void *mu, *logvar;
  void *z, *ratio;
};

struct LogRatioBackward {
  ReparameterizeShape shape;
  const void *mu, *logvar;
  const void *dz, *dratio, *weights;  // each may be null: zero, zero, one
  void *dmu, *dlogvar;
  bool path;
};

struct LogRatioJvp {
  ReparameterizeShape shape;
  const void *mu, *logvar;
  const void *mu_tangent, *logvar_tangent;
  void *z_tangent, *ratio_tangent;
  bool path;
};

namespace cpu {
void log_ratio_forward(const LogRatioForward& args, int threads);
void log_ratio_backward(const LogRatioBackward& args, int threads);
void log_ratio_jvp(const LogRatioJvp& args, int threads);
}  // namespace cpu

}  // namespace genfast
