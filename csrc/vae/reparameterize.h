// Reparameterized Gaussian sample and KL(N(mu, e^logvar) || N(0, 1)), in one pass; formulas in
// docs/kernels/reparameterize.md.
//
//   forward   z = mu + e^(logvar/2) eps          kl = sum_event (mu^2 + (expm1(logvar) - logvar)) / 2
//   backward  dmu = sum_k dz + dkl mu            dlogvar = sum_k dz eps e^(logvar/2) / 2 + dkl expm1(logvar) / 2
//   jvp       z' = mu' + eps e^(logvar/2) logvar' / 2     kl' = sum_event (mu mu' + expm1(logvar) logvar' / 2)
//
// mu, logvar and their gradients and tangents are contiguous [rows, event]; z, dz and z' are [samples, rows, event]; kl
// and its relatives are [rows], float64 for float64 inputs and float32 otherwise. eps of element i = row * event +
// column of sample k is the normal at tensor index offset + i, step k (see common/philox.h); no pass stores it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct ReparameterizeShape {
  DType dtype;
  int64_t rows, event, samples;
  int64_t offset;
  uint64_t seed;
  const int64_t* seed_pointer;  // CUDA: where not null, the seed is read from there on the device.
  int64_t kl_chunks;            // CUDA: kl and kl' are [rows, kl_chunks] partial sums.
};

struct ReparameterizeForward {
  ReparameterizeShape shape;
  const void *mu, *logvar;
  void *z, *kl;  // either may be null: not wanted
};

struct ReparameterizeBackward {
  ReparameterizeShape shape;
  const void *mu, *logvar;  // mu is read only where dkl is not null
  const void *dz, *dkl;     // either may be null: zero
  void *dmu, *dlogvar;      // dmu may be null: not wanted
};

struct ReparameterizeJvp {
  ReparameterizeShape shape;
  const void *mu, *logvar;
  const void *mu_tangent, *logvar_tangent;
  void *z_tangent, *kl_tangent;  // either may be null: not wanted
};

namespace cpu {
void reparameterize_forward(const ReparameterizeForward& args, int threads);
void reparameterize_backward(const ReparameterizeBackward& args, int threads);
void reparameterize_jvp(const ReparameterizeJvp& args, int threads);
}  // namespace cpu

namespace cuda {
// The number of partial sums a row of `event` elements needs.
int64_t reparameterize_kl_chunks(int64_t event);
void reparameterize_forward(const ReparameterizeForward& args, void* stream);
void reparameterize_backward(const ReparameterizeBackward& args, void* stream);
void reparameterize_jvp(const ReparameterizeJvp& args, void* stream);
}  // namespace cuda

}  // namespace genfast
