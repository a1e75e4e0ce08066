// Puts the two sides of a GAN's loss together, and float64 in plain loops. One thread: batches of logits are small, and
// the call is what costs.
#include "gan/gan_loss.h"

#include <cmath>

#include "gan/gan_loss_cpu.h"

namespace genfast {
namespace cpu {
namespace {

void evaluate(GanFunction function, double y, double* value, double* slope) {
  switch (function) {
    case GanFunction::kSoftplus: {
      const double e = std::exp(-std::fabs(y));
      *value = (y > 0.0 || y != y ? y : 0.0) + std::log1p(e);
      *slope = y < 0.0 ? e / (1.0 + e) : 1.0 / (1.0 + e);
      return;
    }
    case GanFunction::kHinge:
      *value = y < 0.0 ? 0.0 : y;
      *slope = y > 0.0 ? 1.0 : y != y ? y : 0.0;
      return;
    case GanFunction::kSquare:
      *value = 0.5 * y * y;
      *slope = y;
      return;
    default:
      *value = y;
      *slope = 1.0;
  }
}

void double_term(GanTerm* t) {
  const double* const x = static_cast<const double*>(t->x);
  const double* const other = static_cast<const double*>(t->other);
  double* const gradient = static_cast<double*>(t->gradient);
  t->value = t->slope = 0.0;
  for (int64_t i = 0; i < t->count; ++i) {
    double value, slope;
    const double from = other == nullptr ? x[i] - t->mean : x[i] - t->mean - other[i];
    evaluate(t->function, t->sign * from + t->shift, &value, &slope);
    t->value += value;
    t->slope += slope;
    if (gradient != nullptr) gradient[i] = t->factor * slope;
  }
}

void run_term(GanTerm* t) {
  if (t->dtype == DType::kFloat64) {
    double_term(t);
  } else {
    GENFAST_FOR_ISA(gan_term)(t);
  }
}

double mean_of(DType dtype, const void* x, int64_t count) {
  double total = 0.0;
  if (dtype == DType::kFloat64) {
    for (int64_t i = 0; i < count; ++i) total += static_cast<const double*>(x)[i];
  } else {
    total = GENFAST_FOR_ISA(gan_sum)(dtype, x, count);
  }
  return total / static_cast<double>(count);
}

template <typename T>
void negate(const void* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = -static_cast<const T*>(from)[i];
}

template <typename T>
void add(void* to, double value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] += static_cast<T>(value);
}

}  // namespace

void gan_loss(const GanLoss& args) {
  const bool wide = args.dtype == DType::kFloat64, average = args.pairing == GanPairing::kAverage;
  const double reals = static_cast<double>(args.reals), fakes = static_cast<double>(args.fakes);
  GanTerm real = {args.dtype,
                  args.function,
                  args.real,
                  nullptr,
                  args.reals,
                  0.0,
                  args.real_sign,
                  args.real_shift,
                  args.scale * args.real_sign / reals,
                  args.to_real,
                  0.0,
                  0.0};
  GanTerm fake = {args.dtype,
                  args.function,
                  args.fake,
                  nullptr,
                  args.fakes,
                  0.0,
                  args.fake_sign,
                  args.fake_shift,
                  args.scale * args.fake_sign / fakes,
                  args.to_fake,
                  0.0,
                  0.0};
  double total = 0.0;
  if (args.pairing == GanPairing::kPaired) {
    // The fake side's gradient is minus the real side's; where only that is asked for, it serves as its buffer.
    real.other = args.fake;
    if (args.to_real == nullptr) {
      real.gradient = args.to_fake;
      real.factor = -real.factor;
    }
    run_term(&real);
    total = real.value / reals;
    if (args.to_real != nullptr && args.to_fake != nullptr) {
      wide ? negate<double>(args.to_real, args.to_fake, args.reals)
           : negate<float>(args.to_real, args.to_fake, args.reals);
    }
  } else {
    if (average) {
      real.mean = mean_of(args.dtype, args.fake, args.fakes);
      fake.mean = mean_of(args.dtype, args.real, args.reals);
    }
    if (args.real != nullptr) {
      run_term(&real);
      total += real.value / reals;
    }
    if (args.fake != nullptr) {
      run_term(&fake);
      total += fake.value / fakes;
    }
    if (average) {  // through the means
      const double to_real = -fake.factor * fake.slope / reals, to_fake = -real.factor * real.slope / fakes;
      if (args.to_real != nullptr) {
        wide ? add<double>(args.to_real, to_real, args.reals) : add<float>(args.to_real, to_real, args.reals);
      }
      if (args.to_fake != nullptr) {
        wide ? add<double>(args.to_fake, to_fake, args.fakes) : add<float>(args.to_fake, to_fake, args.fakes);
      }
    }
  }
  total *= args.scale;
  if (wide) {
    *static_cast<double*>(args.loss) = total;
  } else {
    *static_cast<float*>(args.loss) = static_cast<float>(total);
  }
}

}  // namespace cpu
}  // namespace genfast
