// Normal variables of mean s and variance 1 given that they are not negative: rectified linear units, whose inputs and
// states are scaled by the root of the inverse temperature. Errors are those of float32 sums of numbers of size s.
#pragma once

#include "common/vec_math.h"

namespace genfast {
namespace GENFAST_ISA {

constexpr float kHalfLog2Pi = 0.918938533f;

// Beyond t, the standard normal's hazard phi(t) / Q(t), with Q its upper tail, is t + z P(z - 1/2) with z = 3 / (t + 3)
// for t >= 0; relative error of z P 3.1e-7 (tools/fit_polynomials.py).
constexpr float kHazard[] = {0.566197276f, 0.561025381f,  0.022888625f,  -0.495141298f, -0.135884881f, 0.580841124f,
                             0.16895242f,  -0.757273495f, -0.127079815f, 0.872698069f,  0.0397414416f, -0.581647992f};

GENFAST_INLINE VecF hazard_excess(VecF t) {
  const VecF three = broadcast(3.0f), z = div(three, t + three);
  return z * horner(z - broadcast(0.5f), kHazard);
}

struct TruncatedNormal {
  VecF s, t;            // t = |s|
  VecF excess, hazard;  // hazard = t + excess
  VecF density, tail;   // phi(t), Q(t)
  Mask positive;        // s > 0
};

// NaN stays in all results; infinite s count as the largest numbers.
GENFAST_INLINE TruncatedNormal truncated_normal(VecF s) {
  TruncatedNormal x;
  x.s = s;
  x.t = min(broadcast(3e38f), abs(s));
  x.excess = hazard_excess(x.t);
  x.hazard = x.t + x.excess;
  // Below e^-80 it does not count, and all numbers stay normal ones.
  x.density = exp_bounded(max(broadcast(-80.0f), fma(x.t * x.t, broadcast(-0.5f), broadcast(-kHalfLog2Pi))));
  x.tail = div(x.density, x.hazard);
  x.positive = less(broadcast(0.0f), s);
  return x;
}

GENFAST_INLINE VecF mean(const TruncatedNormal& x) {
  return select(x.positive, x.s + div(x.density, broadcast(1.0f) - x.tail), x.excess);
}

// log of the integral of e^(s y - y^2 / 2) over y >= 0.
GENFAST_INLINE VecF log_partition(const TruncatedNormal& x) {
  const VecF half = broadcast(0.5f);
  const VecF log_ratio = log(select(x.positive, broadcast(1.0f) - x.tail, x.hazard));
  return select(x.positive, fma(half * x.s, x.s, broadcast(kHalfLog2Pi)) + log_ratio, broadcast(0.0f) - log_ratio);
}

// The quantile of a uniform u in [0, 1), a multiple of 2^-24: y with a share 1 - u of the mass beyond it. The distance
// y from t with Q(t + y) = e^-E Q(t) solves t y + y^2 / 2 + log(hazard(t + y) / hazard(t)) = E; two of Halley's steps
// from the solution of the second-order expansion are exact to rounding for E below 17. Where s > 0, the smaller tail
// beside y, lower or upper, is at such a distance from zero.
GENFAST_INLINE VecF sample(const TruncatedNormal& x, VecF u) {
  const VecF zero = broadcast(0.0f), half = broadcast(0.5f), one = broadcast(1.0f);
  const VecF left = one - u, lower = left * (one - x.tail), upper = fma(left, x.tail, u);
  const VecF smaller = min(upper, lower);
  const VecF E = zero - log(select(x.positive, smaller + smaller, left));
  const VecF at_zero = broadcast(0.797884561f);
  const VecF t = select(x.positive, zero, x.t), excess = select(x.positive, at_zero, x.excess);
  const VecF hazard = select(x.positive, at_zero, x.hazard), inverse = div(one, hazard);
  const VecF twice = E + E;
  VecF y = div(twice, hazard + sqrt(hazard * fma(twice, excess, hazard)));
  for (int step = 0; step < 2; ++step) {
    const VecF beyond = t + y, g = hazard_excess(beyond), h = beyond + g;
    const VecF error = fma(y, fma(half, y, t), log(h * inverse) - E);
    y = y - div(error, fma(half * error, zero - g, h));
  }
  const VecF inner = select(less(lower, half), x.s + y, x.s - y);
  return select(less(zero, u), max(zero, select(x.positive, inner, y)), zero * x.t);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
