// bias_act for float64: a plain loop and the C library, for gradcheck and for those who need the digits.
#include <cmath>

#include "gan/bias_act_cpu.h"

namespace genfast {
namespace {

// act(z), act'(z) and act''(z).
struct Values {
  double f, first, second;
};

double bounded(double z, double limit) { return z < -limit ? -limit : z > limit ? limit : z; }

Values values_of(Activation act, double z, double alpha) {
  const bool above = z > 0.0;
  const double y = std::exp(-std::fabs(z)), r = 1.0 / (1.0 + y);
  const double p = z < 0.0 ? y * r : r, rest = z < 0.0 ? r : y * r, slope = y * r * r;
  switch (act) {
    case Activation::kLinear:
      return {z, 1.0, 0.0};
    case Activation::kRelu:
      return {above || z != z ? z : 0.0, above ? 1.0 : 0.0, 0.0};
    case Activation::kLeakyRelu:
      return {above ? z : alpha * z, above ? 1.0 : alpha, 0.0};
    case Activation::kTanh: {
      const double t = std::tanh(z), e = y * y, first = 4.0 * e / ((1.0 + e) * (1.0 + e));
      return {t, first, -2.0 * t * first};
    }
    case Activation::kSigmoid:
      return {p, slope, slope * (rest - p)};
    case Activation::kElu: {
      const double e = above ? 0.0 : alpha * std::exp(z);
      return {above ? z : alpha * std::expm1(z), above ? 1.0 : e, e};
    }
    case Activation::kSoftplus:
      return {(above || z != z ? z : 0.0) + std::log1p(y), p, slope};
    case Activation::kSwish: {
      const double near = bounded(z, 800.0);
      return {(z < -800.0 ? -800.0 : z) * p, p + near * slope, slope * (2.0 + near * (rest - p))};
    }
    default: {
      const double near = bounded(z, 40.0), density = 0.39894228040143267794 * std::exp(-0.5 * near * near);
      const double cdf = 0.5 * std::erfc(-0.70710678118654752440 * z);
      return {(z < -40.0 ? -40.0 : z) * cdf, cdf + near * density, density * (2.0 - near * near)};
    }
  }
}

int bit(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }

// In order: a group of 16 is zero until then.
void set_bit(uint8_t* bits, int64_t i, bool value) {
  if (i % 16 == 0) bits[i / 8] = bits[i / 8 + 1] = 0;
  bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | (value ? 1 << (i % 8) : 0));
}

void run_double(const BiasAct& args, const BiasActRun& run) {
  const auto element = [&](const void* p, int64_t i) { return static_cast<const double*>(p)[run.at + i]; };
  const auto per_channel = [&](const void* p, int64_t i) {
    return p == nullptr ? 0.0 : static_cast<const double*>(p)[run.columns ? i : 0];
  };
  const auto put = [&](void* p, int64_t i, double x) {
    if (p != nullptr) static_cast<double*>(p)[run.at + i] = x;
  };
  double total = 0.0;
  const bool two = args.planes == 2;
  for (int64_t i = 0; i < run.count; ++i) {
    double result = 0.0;
    if (args.order == 1 && run.bits != nullptr) {
      const double d = element(args.dy, i),
                   below = args.act == Activation::kLeakyRelu ? d * args.gain * args.alpha : 0.0;
      result = bit(run.bits, i) ? d * args.gain : below;
      if (two && !bit(run.bits + run.plane, i)) result = 0.0;
      put(args.out, i, result);
    } else {
      const double z = element(args.x, i) + per_channel(run.b, i);
      const Values s = values_of(args.act, z, args.alpha);
      const double f = args.gain * s.f;
      const bool inside = !(std::fabs(f) > args.clamp);
      if (args.order == 0) {
        put(args.out, i, bounded(f, args.clamp));
        if (run.bits != nullptr) {
          const bool above = args.act == Activation::kLinear || z > 0.0;
          set_bit(run.bits, i, two ? above : above && inside);
          if (two) set_bit(run.bits + run.plane, i, inside);
        }
        continue;
      }
      const double d = element(args.dy, i);
      if (args.order == 1) {
        result = inside && s.first != 0.0 ? d * (args.gain * s.first) : 0.0;
        put(args.out, i, result);
      } else {
        const double w =
            inside ? args.gain * (per_channel(run.v_b, i) + (args.v == nullptr ? 0.0 : element(args.v, i))) : 0.0;
        result = w * d * s.second;
        put(args.out, i, w * s.first);
        put(args.to_x, i, result);
      }
    }
    if (run.sums == nullptr) continue;
    total += result;
    if (run.columns) static_cast<double*>(run.sums)[i] += result;
  }
  if (run.sums != nullptr && !run.columns) *static_cast<double*>(run.sums) = total;
}

}  // namespace

BiasActKernel bias_act_double_kernel(const BiasAct&) { return run_double; }

}  // namespace genfast
