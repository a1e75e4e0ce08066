// reparameterize for float32, bfloat16 and float16: compiled once per instruction set. Formulas in reparameterize.h,
// tiling in docs/kernels/reparameterize.md. Blocks of kBlock elements keep noise and intermediates in the first cache.
#include "vae/reparameterize_cpu.h"

#include "vae/gaussian_blocks.h"
#include "vae/row_sums.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr float kLargeLogvar = 17.0f;  // from here e^x - 1 is e^x in float32

// e^logvar / 2, infinite only where that is.
VecF half_exp(VecF root) {
  const VecF square = root * root;
  return broadcast(0.5f) * square * square;
}

// row * expm1(logvar) / 2, finite where that is, zero where row is.
VecF half_row_expm1(VecF row, VecF logvar, VecF root) {
  const VecF small = row * half_expm1(logvar, half_exp(root));
  const VecF large = broadcast(0.5f) * row * root * root * root * root;
  return select(less(broadcast(kLargeLogvar), logvar), large, small);
}

template <typename T>
void forward(const ReparameterizeForward& args, int64_t begin, int64_t end, KlPartials* partials) {
  const ReparameterizeShape& shape = args.shape;
  const T* mu = static_cast<const T*>(args.mu);
  const T* logvar = static_cast<const T*>(args.logvar);
  T* z = static_cast<T*>(args.z);
  const int64_t total = shape.rows * shape.event;
  RowSums<float> sums(static_cast<float*>(args.kl), shape.event, begin, partials);
  float room[kNoiseRoom], means[kBlock + kWidth], roots[kBlock + kWidth], terms[kBlock + kWidth];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF m = load_upto(mu + at + i, count - i), v = load_upto(logvar + at + i, count - i);
      store(means + i, m);
      const VecF root = root_of(v);
      store(roots + i, root);
      if (args.kl != nullptr) store(terms + i, fma(broadcast(0.5f) * m, m, half_expm1_minus(v, half_exp(root))));
    }
    if (args.kl != nullptr) {
      sums.add(at, count, [&](int64_t i, int64_t n) { return segment_sum(terms + i, n); });
    }
    if (z == nullptr) continue;
    for (int64_t k = 0; k < shape.samples; ++k) {
      const float* eps = noise(shape, k, at, count, room);
      T* out = z + k * total + at;
      for (int64_t i = 0; i < count; i += kWidth) {
        const VecF root = load(roots + i);
        store_upto(out + i, fma(root * load(eps + i), root, load(means + i)), count - i);
      }
    }
  }
  sums.finish();
}

template <typename T>
void backward(const ReparameterizeBackward& args, int64_t begin, int64_t end) {
  const ReparameterizeShape& shape = args.shape;
  const T* mu = static_cast<const T*>(args.mu);
  const T* logvar = static_cast<const T*>(args.logvar);
  const T* dz = static_cast<const T*>(args.dz);
  const float* dkl = static_cast<const float*>(args.dkl);
  T* dmu = static_cast<T*>(args.dmu);
  T* dlogvar = static_cast<T*>(args.dlogvar);
  const int64_t total = shape.rows * shape.event;
  float room[kNoiseRoom], sums[kBlock + kWidth], along[kBlock + kWidth], rows[kBlock + kWidth];
  for (int64_t i = 0; i < kBlock + kWidth; ++i) sums[i] = along[i] = rows[i] = 0.0f;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int64_t k = 0; dz != nullptr && k < shape.samples; ++k) {
      const float* eps = noise(shape, k, at, count, room);
      const T* grad = dz + k * total + at;
      for (int64_t i = 0; i < count; i += kWidth) {
        const VecF g = load_upto(grad + i, count - i);
        const VecF term = g * (load(eps + i) * broadcast(0.0625f));
        store(sums + i, k == 0 ? g : load(sums + i) + g);
        store(along + i, k == 0 ? term : load(along + i) + term);
      }
    }
    if (dkl != nullptr) spread_rows(dkl, shape.event, at, count, rows);
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF v = load_upto(logvar + at + i, count - i);
      const VecF root = root_of(v), a = load(along + i), eight = broadcast(8.0f);
      VecF to_mu = load(sums + i);
      VecF to_logvar = eight * (a * root * root);
      if (dkl != nullptr) {
        const VecF row = load(rows + i);
        to_mu = fma(row, load_upto(mu + at + i, count - i), to_mu);
        // One bracket where both parts may overflow, so that inf - inf does not arise.
        const VecF large = fma(eight, a, broadcast(0.5f) * row * root * root) * root * root;
        const VecF small = fma(row, half_expm1(v, half_exp(root)), to_logvar);
        to_logvar = select(less(broadcast(kLargeLogvar), v), large, small);
      }
      store_upto(dlogvar + at + i, to_logvar, count - i);
      if (dmu != nullptr) store_upto(dmu + at + i, to_mu, count - i);
    }
  }
}

template <typename T>
void jvp(const ReparameterizeJvp& args, int64_t begin, int64_t end, KlPartials* partials) {
  const ReparameterizeShape& shape = args.shape;
  const T* mu = static_cast<const T*>(args.mu);
  const T* logvar = static_cast<const T*>(args.logvar);
  const T* mu_tangent = static_cast<const T*>(args.mu_tangent);
  const T* logvar_tangent = static_cast<const T*>(args.logvar_tangent);
  T* z_tangent = static_cast<T*>(args.z_tangent);
  const int64_t total = shape.rows * shape.event;
  RowSums<float> sums(static_cast<float*>(args.kl_tangent), shape.event, begin, partials);
  float room[kNoiseRoom], terms[kBlock + kWidth];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    if (args.kl_tangent != nullptr) {
      for (int64_t i = 0; i < count; i += kWidth) {
        const VecF v = load_upto(logvar + at + i, count - i);
        const VecF growth = half_row_expm1(load_upto(logvar_tangent + at + i, count - i), v, root_of(v));
        store(terms + i, fma(load_upto(mu + at + i, count - i), load_upto(mu_tangent + at + i, count - i), growth));
      }
      sums.add(at, count, [&](int64_t i, int64_t n) { return segment_sum(terms + i, n); });
    }
    for (int64_t k = 0; z_tangent != nullptr && k < shape.samples; ++k) {
      const float* eps = noise(shape, k, at, count, room);
      T* out = z_tangent + k * total + at;
      for (int64_t i = 0; i < count; i += kWidth) {
        const VecF root = root_of(load_upto(logvar + at + i, count - i));
        const VecF along = load_upto(logvar_tangent + at + i, count - i) * (load(eps + i) * broadcast(0.0625f));
        const VecF m = load_upto(mu_tangent + at + i, count - i);
        store_upto(out + i, fma(broadcast(8.0f), along * root * root, m), count - i);
      }
    }
  }
  sums.finish();
}

}  // namespace

void reparameterize_forward_piece(const ReparameterizeForward& args, int64_t begin, int64_t end, KlPartials* partials) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return forward<BFloat16>(args, begin, end, partials);
    case DType::kFloat16:
      return forward<Float16>(args, begin, end, partials);
    default:
      return forward<float>(args, begin, end, partials);
  }
}

void reparameterize_backward_piece(const ReparameterizeBackward& args, int64_t begin, int64_t end) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return backward<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return backward<Float16>(args, begin, end);
    default:
      return backward<float>(args, begin, end);
  }
}

void reparameterize_jvp_piece(const ReparameterizeJvp& args, int64_t begin, int64_t end, KlPartials* partials) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return jvp<BFloat16>(args, begin, end, partials);
    case DType::kFloat16:
      return jvp<Float16>(args, begin, end, partials);
    default:
      return jvp<float>(args, begin, end, partials);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
