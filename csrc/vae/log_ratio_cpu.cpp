// log_ratio for float32, bfloat16 and float16: compiled once per instruction set. Formulas in log_ratio.h. Blocks of
// kBlock elements keep noise and intermediates in the first cache.
#include "vae/log_ratio_cpu.h"

#include "vae/gaussian_blocks.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

// Adds the terms of block [at, at + count) of sample k to the sums of their rows; `open` holds what the row that goes
// on in the next block has so far.
void add_rows(const float* terms, int64_t event, int64_t at, int64_t count, float* sums, double* open) {
  int64_t row = at / event, row_end = (row + 1) * event - at;
  for (int64_t done = 0; done < count;) {
    const int64_t stop = row_end < count ? row_end : count;
    *open += segment_sum(terms + done, stop - done);
    done = stop;
    if (stop == row_end) {
      sums[row] = static_cast<float>(*open);
      *open = 0.0;
      ++row;
      row_end += event;
    }
  }
}

template <typename T>
void forward(const LogRatioForward& args, const RowPiece& piece) {
  const ReparameterizeShape& shape = args.shape;
  const T* mu = static_cast<const T*>(args.mu);
  const T* logvar = static_cast<const T*>(args.logvar);
  T* z = static_cast<T*>(args.z);
  float* ratio = static_cast<float*>(args.ratio);
  const int64_t total = shape.rows * shape.event, end = piece.row_end * shape.event;
  float room[kNoiseRoom], means[kBlock + kWidth], roots[kBlock + kWidth], halves[kBlock + kWidth],
      terms[kBlock + kWidth];
  double open[kPieceSamples] = {};
  const VecF half = broadcast(0.5f);
  for (int64_t at = piece.row_begin * shape.event; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF v = load_upto(logvar + at + i, count - i);
      store(means + i, load_upto(mu + at + i, count - i));
      store(roots + i, root_of(v));
      store(halves + i, half * v);
    }
    for (int64_t k = piece.k_begin; k < piece.k_end; ++k) {
      const float* eps = noise(shape, k, at, count, room);
      T* out = z + k * total + at;
      for (int64_t i = 0; i < count; i += kWidth) {
        const VecF root = load(roots + i), e = load(eps + i);
        const VecF value = fma(root * e, root, load(means + i));
        store_upto(out + i, value, count - i);
        store(terms + i, fma(half * e, e, load(halves + i)) - half * value * value);
      }
      add_rows(terms, shape.event, at, count, ratio + k * shape.rows, &open[k - piece.k_begin]);
    }
  }
}

template <typename T>
void backward(const LogRatioBackward& args, int64_t begin, int64_t end) {
  const ReparameterizeShape& shape = args.shape;
  const T* mu = static_cast<const T*>(args.mu);
  const T* logvar = static_cast<const T*>(args.logvar);
  const T* dz = static_cast<const T*>(args.dz);
  const float* dratio = static_cast<const float*>(args.dratio);
  const float* weights = static_cast<const float*>(args.weights);
  T* dmu = static_cast<T*>(args.dmu);
  T* dlogvar = static_cast<T*>(args.dlogvar);
  const int64_t total = shape.rows * shape.event;
  float room[kNoiseRoom], means[kBlock + kWidth], roots[kBlock + kWidth], to_mu[kBlock + kWidth],
      to_mean[kBlock + kWidth], along[kBlock + kWidth], direct[kBlock + kWidth], rows[kBlock + kWidth],
      factors[kBlock + kWidth];
  const VecF zero = broadcast(0.0f), half = broadcast(0.5f), sixteenth = broadcast(0.0625f);
  for (int64_t i = 0; i < kBlock + kWidth; ++i) rows[i] = factors[i] = 0.0f;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int64_t i = 0; i < count; i += kWidth) {
      store(means + i, load_upto(mu + at + i, count - i));
      store(roots + i, root_of(load_upto(logvar + at + i, count - i)));
      store(to_mu + i, zero);
      store(to_mean + i, zero);
      store(along + i, zero);
      store(direct + i, zero);
    }
    for (int64_t k = 0; k < shape.samples; ++k) {
      const float* eps = noise(shape, k, at, count, room);
      const T* grad = dz == nullptr ? nullptr : dz + k * total + at;
      if (dratio != nullptr) spread_rows(dratio + k * shape.rows, shape.event, at, count, rows);
      if (weights != nullptr) spread_rows(weights + k * shape.rows, shape.event, at, count, factors);
      for (int64_t i = 0; i < count; i += kWidth) {
        const VecF e = load(eps + i), root = load(roots + i);
        VecF g = grad == nullptr ? zero : load_upto(grad + i, count - i);
        if (weights != nullptr) g = g * load(factors + i);
        if (dratio != nullptr) {
          const VecF r = load(rows + i), re = r * e;
          g = (g - r * load(means + i)) - re * root * root;
          if (args.path) {
            store(to_mean + i, load(to_mean + i) + re);
            store(direct + i, fma(re, e, load(direct + i)));
          } else {
            store(direct + i, load(direct + i) + r);
          }
        }
        store(to_mu + i, load(to_mu + i) + g);
        store(along + i, fma(g, e * sixteenth, load(along + i)));
      }
    }
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF root = load(roots + i);
      VecF m = load(to_mu + i);
      if (args.path && dratio != nullptr) {
        const VecF inverse = root_of(zero - load_upto(logvar + at + i, count - i));
        m = fma(load(to_mean + i) * inverse, inverse, m);
      }
      const VecF v = fma(half, load(direct + i), broadcast(8.0f) * (load(along + i) * root * root));
      store_upto(dmu + at + i, m, count - i);
      store_upto(dlogvar + at + i, v, count - i);
    }
  }
}

template <typename T>
void jvp(const LogRatioJvp& args, const RowPiece& piece) {
  const ReparameterizeShape& shape = args.shape;
  const T* mu = static_cast<const T*>(args.mu);
  const T* logvar = static_cast<const T*>(args.logvar);
  const T* mu_tangent = static_cast<const T*>(args.mu_tangent);
  const T* logvar_tangent = static_cast<const T*>(args.logvar_tangent);
  T* z_tangent = static_cast<T*>(args.z_tangent);
  float* ratio_tangent = static_cast<float*>(args.ratio_tangent);
  const int64_t total = shape.rows * shape.event, end = piece.row_end * shape.event;
  float room[kNoiseRoom], roots[kBlock + kWidth], inverses[kBlock + kWidth], terms[kBlock + kWidth];
  double open[kPieceSamples] = {};
  const VecF half = broadcast(0.5f), eight = broadcast(8.0f), sixteenth = broadcast(0.0625f);
  for (int64_t at = piece.row_begin * shape.event; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF v = load_upto(logvar + at + i, count - i);
      store(roots + i, root_of(v));
      store(inverses + i, root_of(broadcast(0.0f) - v));
    }
    for (int64_t k = piece.k_begin; k < piece.k_end; ++k) {
      const float* eps = noise(shape, k, at, count, room);
      T* out = z_tangent + k * total + at;
      for (int64_t i = 0; i < count; i += kWidth) {
        const VecF root = load(roots + i), e = load(eps + i);
        const VecF m = load_upto(mu + at + i, count - i), dm = load_upto(mu_tangent + at + i, count - i);
        const VecF dv = load_upto(logvar_tangent + at + i, count - i);
        store_upto(out + i, fma(eight, dv * (e * sixteenth) * root * root, dm), count - i);
        // z z' in powers of sigma: no 0 * inf, and one bracket where two terms may overflow.
        const VecF h = half * dv * e;
        const VecF bracket = fma(e * h * root, root, fma(m, h, e * dm));
        const VecF product = fma(m, dm, bracket * root * root);
        VecF direct = half * dv;
        if (args.path) {
          const VecF inverse = load(inverses + i);
          direct = fma(e * dm * inverse, inverse, e * h);
        }
        store(terms + i, direct - product);
      }
      add_rows(terms, shape.event, at, count, ratio_tangent + k * shape.rows, &open[k - piece.k_begin]);
    }
  }
}

}  // namespace

void log_ratio_forward_piece(const LogRatioForward& args, const RowPiece& piece) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return forward<BFloat16>(args, piece);
    case DType::kFloat16:
      return forward<Float16>(args, piece);
    default:
      return forward<float>(args, piece);
  }
}

void log_ratio_backward_piece(const LogRatioBackward& args, int64_t begin, int64_t end) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return backward<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return backward<Float16>(args, begin, end);
    default:
      return backward<float>(args, begin, end);
  }
}

void log_ratio_jvp_piece(const LogRatioJvp& args, const RowPiece& piece) {
  switch (args.shape.dtype) {
    case DType::kBFloat16:
      return jvp<BFloat16>(args, piece);
    case DType::kFloat16:
      return jvp<Float16>(args, piece);
    default:
      return jvp<float>(args, piece);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
