// Likelihoods whose positions have one to three parameters, for float32, bfloat16 and float16: compiled once per
// instruction set. Formulas in docs/kernels/log_likelihood.md. Blocks of kBlock positions stay in the first cache.
#include "vae/log_likelihood_cpu.h"

#include "vae/log_likelihood_values.h"
#include "vae/row_sums.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr float kInfinity = __builtin_inff();

// A block's inputs, its terms of log p, and where its gradients go (null: not wanted).
struct Block {
  const float *first, *second, *third, *x;
  float *terms, *to_first, *to_second, *to_third;
  int64_t count;
  float logvar, factor;
};

// body(i, left) for every vector of a block; `left` is a constant where the vector is whole.
template <typename Body>
GENFAST_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) body(i, int64_t{kWidth});
  if (i < count) body(i, count - i);
}

// e^-|logit| of a block. In a loop of its own: exponential and logarithm one after the other are a chain of some 100
// cycles, and the registers of a core hold two or three of them in flight, but twice as many of each half.
void decays(const Block& b, float bound) {
  const float* const first = b.first;
  float* const terms = b.terms;  // has room past the end
  for_vectors(b.count, [=](int64_t i, int64_t left) __attribute__((always_inline)) {
    store_float(terms + i, exp_bounded(negative(min(broadcast(bound), abs(load_upto(first + i, left))))));
  });
}

template <bool kGradient>
bool bernoulli_terms(const Block& b) {
  const VecF zero = broadcast(0.0f), one = broadcast(1.0f), factor = broadcast(b.factor);
  const float *const first = b.first, *const targets = b.x;
  float *const terms = b.terms, *const to_first = b.to_first;
  Mask bad = no_lane();
  for_vectors(b.count, [=, &bad](int64_t i, int64_t left) __attribute__((always_inline)) {
    const VecF logit = load_upto(first + i, left), x = load_upto(targets + i, left), y = load_float(terms + i);
    store_float(terms + i, (x * logit - max(zero, logit)) - log1p_unit(y));
    bad = either(bad, either(less(x, zero), less(one, x)));
    if (!kGradient) return;
    const VecF r = div(one, one + y);
    const VecF p = select(less(logit, zero), y * r, r);
    store_upto(to_first + i, factor * (x - p), left);
  });
  return !any(bad);
}

bool bernoulli(const Block& b) {
  decays(b, kInfinity);
  return b.to_first == nullptr ? bernoulli_terms<false>(b) : bernoulli_terms<true>(b);
}

// B_2n / (2n)!, for l / 2 coth(l / 2).
constexpr float kCoth[] = {1.0f / 12, -1.0f / 720, 1.0f / 30240, -1.0f / 1209600, 1.0f / 47900160, -5.284190e-10f};

bool continuous_bernoulli(const Block& b) {
  const VecF zero = broadcast(0.0f), one = broadcast(1.0f), factor = broadcast(b.factor);
  Mask bad = no_lane();
  decays(b, 1e37f);
  for (int64_t i = 0; i < b.count; i += kWidth) {
    const int64_t left = b.count - i;
    const VecF logit = load_upto(b.first + i, left), x = load_upto(b.x + i, left), y = load_float(b.terms + i);
    const VecF size = min(broadcast(1e37f), abs(logit));
    store_upto(b.terms + i, (x * logit - max(zero, logit)) - log(decay(size, y)), left);
    bad = either(bad, either(less(x, zero), less(one, x)));
    if (b.to_first == nullptr) continue;
    // The mean: 1 / (1 - e^-l) - 1 / l.
    const Mask small = less(size, broadcast(1.5f));
    const VecF near = fma(logit, horner(logit * logit, kCoth), broadcast(0.5f));
    const VecF safe = select(small, one, size);
    const VecF inverse = div(one, safe), spread = div(one, one - select(small, zero, y));
    const VecF far = select(less(logit, zero), inverse - y * spread, spread - inverse);
    store_upto(b.to_first + i, factor * (x - select(small, near, far)), left);
  }
  return !any(bad);
}

template <bool kFixed>
bool gaussian(const Block& b) {
  const VecF half = broadcast(0.5f), factor = broadcast(b.factor);
  for (int64_t i = 0; i < b.count; i += kWidth) {
    const int64_t left = b.count - i;
    const VecF mean = load_upto(b.first + i, left), x = load_upto(b.x + i, left);
    const VecF logvar = kFixed ? broadcast(b.logvar) : load_upto(b.second + i, left);
    const VecF root = exp_bounded(logvar * broadcast(-0.25f));
    const VecF z = (x - mean) * root * root;
    store_upto(b.terms + i, broadcast(-0.5f) * (fma(z, z, logvar) + broadcast(1.8378770664f)), left);
    if (b.to_first != nullptr) store_upto(b.to_first + i, factor * z * root * root, left);
    if (b.to_second != nullptr) store_upto(b.to_second + i, factor * (half * fma(z, z, broadcast(-1.0f))), left);
  }
  return true;
}

bool discretized_logistic(const Block& b, bool unit) {
  const VecF factor = broadcast(b.factor);
  Mask bad = no_lane();
  for (int64_t i = 0; i < b.count; i += kWidth) {
    const int64_t left = b.count - i;
    const VecF level = levels_of(load_upto(b.x + i, left), unit, &bad);
    const VecF centre = fma(level, broadcast(2.0f * kHalfBin), broadcast(-1.0f));
    VecF to_mean, to_scale;
    const VecF value = logistic_bin(centre, less(level, broadcast(0.5f)), less(broadcast(254.5f), level),
                                    load_upto(b.first + i, left), load_upto(b.second + i, left), &to_mean, &to_scale);
    store_upto(b.terms + i, value, left);
    if (b.to_first == nullptr) continue;
    store_upto(b.to_first + i, factor * to_mean, left);
    store_upto(b.to_second + i, factor * to_scale, left);
  }
  return !any(bad);
}

bool counts(const Block& b, bool inflated) {
  bool valid = true;
  for (int64_t i = 0; i < b.count; ++i) {
    const double x = b.x[i];
    if (x < 0.0 || x - x != 0.0) valid = valid && x != x;  // NaN goes through
    const CountTerms terms = inflated ? zero_inflated_terms(b.first[i], b.second[i], b.third[i], x)
                                      : negative_binomial_terms(b.first[i], b.second[i], x);
    const double factor = b.factor;
    b.terms[i] = static_cast<float>(terms.value);
    if (b.to_first != nullptr) b.to_first[i] = static_cast<float>(factor * terms.to_log_mean);
    if (b.to_second != nullptr) b.to_second[i] = static_cast<float>(factor * terms.to_log_theta);
    if (b.to_third != nullptr) b.to_third[i] = static_cast<float>(factor * terms.to_logit);
  }
  return valid;
}

bool run(const LogLikelihood& args, const Block& block) {
  switch (args.likelihood) {
    case Likelihood::kBernoulli:
      return bernoulli(block);
    case Likelihood::kContinuousBernoulli:
      return continuous_bernoulli(block);
    case Likelihood::kGaussian:
      return block.second == nullptr ? gaussian<true>(block) : gaussian<false>(block);
    case Likelihood::kDiscretizedLogistic:
      return discretized_logistic(block, args.x_dtype != static_cast<int32_t>(DType::kUInt8) &&
                                             args.x_dtype != static_cast<int32_t>(DType::kBool));
    case Likelihood::kNegativeBinomial:
      return counts(block, false);
    default:
      return counts(block, true);
  }
}

}  // namespace

bool log_likelihood_piece(const LogLikelihood& args, int64_t begin, int64_t end, float*, KlPartials* partials) {
  RowSums<float> sums(static_cast<float*>(args.value), args.size, begin, partials);
  // Rows follow one another in every array: a block may hold parts of several.
  const bool flat = args.planes == 1 && args.shared == nullptr && args.x_rows == args.rows;
  float rooms[4][kBlock + kWidth], out[3][kBlock + kWidth], terms[kBlock + kWidth];
  bool valid = true;
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / args.size, column = at % args.size;
    int64_t count = end - at < kBlock ? end - at : kBlock;
    if (!flat && args.size - column < count) count = args.size - column;
    const int64_t x_row = row % args.x_rows;
    const int32_t dtype = static_cast<int32_t>(args.dtype);
    const float* inputs[3] = {nullptr, nullptr, nullptr};
    float* gradients[3] = {nullptr, nullptr, nullptr};
    int64_t places[3];
    int plane = 0;
    for (int i = 0; i < 3 && plane < args.planes + (args.shared != nullptr); ++i, ++plane) {
      if (i == 1 && args.shared != nullptr) {
        inputs[1] = static_cast<const float*>(args.shared) + (args.shared_rows == 1 ? 0 : x_row) * args.size + column;
        if (args.to_shared != nullptr) gradients[1] = static_cast<float*>(args.to_shared) + at;
        continue;
      }
      const int64_t own = args.shared != nullptr && i == 2 ? 1 : i;
      places[i] = (row * args.planes + own) * args.size + column;
      inputs[i] = floats_of(args.params, dtype, places[i], count, rooms[i], false);
      if (args.to_params != nullptr) gradients[i] = place_for(args.to_params, args.dtype, places[i], out[i]);
    }
    const int64_t x_at = flat ? at : x_row * args.size + column;
    const Block block = {inputs[0],
                         inputs[1],
                         inputs[2],
                         floats_of(args.x, args.x_dtype, x_at, count, rooms[3], false),
                         terms,
                         gradients[0],
                         gradients[1],
                         gradients[2],
                         count,
                         static_cast<float>(args.logvar),
                         static_cast<float>(args.factor)};
    valid = run(args, block) && valid;
    for (int i = 0; i < 3 && args.to_params != nullptr; ++i) {
      if (gradients[i] == out[i]) store_floats(out[i], count, args.to_params, args.dtype, places[i]);
    }
    sums.add(at, count, [&](int64_t i, int64_t n) { return segment_sum(terms + i, n); });
    at += count;
  }
  sums.finish();
  return valid;
}

namespace {

template <typename T>
void scale(const ScaleRows& args, int64_t begin, int64_t end) {
  T* values = static_cast<T*>(args.values);
  const float held = static_cast<float>(args.held);
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / args.event;
    const int64_t stop = (row + 1) * args.event < end ? (row + 1) * args.event : end;
    const float cotangent = static_cast<const float*>(args.cotangent)[row], ratio = cotangent / held;
    // One rounding away from `held` counts as it: 1 / n is rounded in more than one way.
    if (!(ratio >= 0.99999988f && ratio <= 1.00000012f)) {
      for (; at < stop; at += kWidth) {
        const VecF value = load_upto(values + at, stop - at) * broadcast(ratio);
        store_upto(values + at, cotangent == 0.0f ? broadcast(0.0f) : value, stop - at);
      }
    }
    at = stop;
  }
}

}  // namespace

void scale_rows_piece(const ScaleRows& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return scale<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return scale<Float16>(args, begin, end);
    case DType::kFloat32:
      return scale<float>(args, begin, end);
    default: {
      double* values = static_cast<double*>(args.values);
      for (int64_t at = begin; at < end; ++at) {
        const double cotangent = static_cast<const double*>(args.cotangent)[at / args.event];
        if (cotangent != args.held) values[at] = cotangent == 0.0 ? 0.0 : values[at] * (cotangent / args.held);
      }
    }
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
