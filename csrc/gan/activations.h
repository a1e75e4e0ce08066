// Activations and their first two derivatives over vec.h's vectors. No finite z gives NaN, however large; NaN stays.
#pragma once

#include "common/vec_math.h"

namespace genfast {
namespace GENFAST_ISA {

// f'(z) and f''(z).
struct Slopes {
  VecF first, second;
};

GENFAST_INLINE VecF bounded(VecF z, float limit) { return max(broadcast(-limit), min(broadcast(limit), z)); }

// The logistic function p, 1 - p, and p (1 - p), each with full relative accuracy (zero beyond 87).
struct Logistic {
  VecF p, rest, slope;
};
GENFAST_INLINE Logistic logistic(VecF z) {
  const VecF zero = broadcast(0.0f), one = broadcast(1.0f), size = abs(z);
  const VecF y = select(less(broadcast(87.0f), size), zero, exp_bounded(zero - size)), r = div(one, one + y);
  const Mask negative = less(z, zero);
  return {select(negative, y * r, r), select(negative, r, y * r), y * r * r};
}

struct Tanh {
  GENFAST_INLINE VecF value(VecF z, VecF) { return tanh(z); }
  GENFAST_INLINE Slopes slopes(VecF z, VecF) {
    // tanh(z) = 2 p(2 z) - 1
    const Logistic s = logistic(bounded(z, 60.0f) * broadcast(2.0f));
    const VecF first = broadcast(4.0f) * s.slope, t = s.p - s.rest;
    return {first, broadcast(-2.0f) * t * first};
  }
};

struct Sigmoid {
  GENFAST_INLINE VecF value(VecF z, VecF) { return logistic(z).p; }
  GENFAST_INLINE Slopes slopes(VecF z, VecF) {
    const Logistic s = logistic(z);
    return {s.slope, s.slope * (s.rest - s.p)};
  }
};

struct Elu {
  GENFAST_INLINE VecF value(VecF z, VecF alpha) {
    const VecF low = min(broadcast(0.0f), z);
    const VecF below = alpha * broadcast(2.0f) * half_expm1(low, broadcast(0.5f) * exp_bounded(low));
    return select(less(broadcast(0.0f), z), z, below);
  }
  GENFAST_INLINE Slopes slopes(VecF z, VecF alpha) {
    const VecF zero = broadcast(0.0f), e = alpha * exp_bounded(min(zero, z));
    const Mask above = less(zero, z);
    return {select(above, broadcast(1.0f), e), select(above, zero, e)};
  }
};

struct Softplus {
  GENFAST_INLINE VecF value(VecF z, VecF) { return softplus(z); }
  GENFAST_INLINE Slopes slopes(VecF z, VecF) {
    const Logistic s = logistic(z);
    return {s.p, s.slope};
  }
};

// z p(z); beyond -100 zero.
struct Swish {
  GENFAST_INLINE VecF value(VecF z, VecF) { return max(broadcast(-100.0f), z) * logistic(z).p; }
  GENFAST_INLINE Slopes slopes(VecF z, VecF) {
    const Logistic s = logistic(z);
    const VecF near = bounded(z, 100.0f);
    return {fma(near, s.slope, s.p), s.slope * fma(near, s.rest - s.p, broadcast(2.0f))};
  }
};

// z Phi(z); beyond -14 zero.
struct Gelu {
  GENFAST_INLINE VecF value(VecF z, VecF) {
    VecF density;
    const VecF cdf = normal_cdf(z, &density);
    return max(broadcast(-14.0f), z) * cdf;
  }
  GENFAST_INLINE Slopes slopes(VecF z, VecF) {
    VecF density;
    const VecF cdf = normal_cdf(z, &density), near = bounded(z, 14.0f);
    return {fma(near, density, cdf), density * fma(near, broadcast(0.0f) - near, broadcast(2.0f))};
  }
};

}  // namespace GENFAST_ISA
}  // namespace genfast
