// log_likelihood: every likelihood and dtype against the float64 kernel on the same numbers, that against the textbook
// and finite differences; one thread against four; targets that do not exist; poisoned and guarded outputs.
#include "check.h"
#include "isas.h"
#include "storage.h"
#include "vae/log_likelihood.h"

using genfast::DType;
using genfast::Likelihood;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

struct Kind {
  Likelihood likelihood;
  int64_t planes, targets;
  bool shared;
  char target;  // u: in [0, 1]; r: any; k: a class; l: a level; c: a count
  const char* name;
};
constexpr Kind kKinds[] = {
    {Likelihood::kBernoulli, 1, 1, false, 'u', "bernoulli"},
    {Likelihood::kContinuousBernoulli, 1, 1, false, 'u', "continuous bernoulli"},
    {Likelihood::kGaussian, 2, 1, false, 'r', "gaussian"},
    {Likelihood::kGaussian, 1, 1, false, 'r', "gaussian, fixed"},
    {Likelihood::kGaussian, 1, 1, true, 'r', "gaussian, shared"},
    {Likelihood::kCategorical, 7, 1, false, 'k', "categorical"},
    {Likelihood::kCategorical, 600, 1, false, 'k', "categorical of many classes"},
    {Likelihood::kDiscretizedLogistic, 2, 1, false, 'l', "discretized logistic"},
    {Likelihood::kDiscretizedLogisticMixture, 9, 1, false, 'l', "mixture"},
    {Likelihood::kDiscretizedLogisticMixture, 20, 3, false, 'l', "mixture of colours"},
    {Likelihood::kNegativeBinomial, 2, 1, false, 'c', "negative binomial"},
    {Likelihood::kZeroInflatedNegativeBinomial, 2, 1, true, 'c', "zero-inflated, shared"},
};

struct Case {
  int64_t x_rows, samples, size;
};
// One position, rows inside a block, two samples a target, rows of several blocks and pieces, no rows, no positions.
constexpr Case kCases[] = {{1, 1, 1}, {3, 2, 5}, {3, 1, 513}, {2, 2, 2500}, {1, 1, 17001}, {0, 1, 5}, {4, 1, 0}};
constexpr double kFactor = -0.125, kLogvar = 0.4;

DType sums_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

std::vector<double> draw(std::mt19937_64& random, int64_t count, double low, double high) {
  std::uniform_real_distribution<double> between(low, high);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

// Inputs that are exact in every dtype, so that all compute with the same numbers.
struct Inputs {
  std::vector<double> params, shared, x;
  std::vector<int64_t> classes;
};

Inputs inputs_of(const Kind& kind, const Case& c) {
  std::mt19937_64 random(7);
  Inputs in;
  const int64_t count = c.x_rows * kind.targets * c.size;
  in.params = draw(random, c.x_rows * c.samples * kind.planes * c.size, -3.0, 3.0);
  in.shared = draw(random, c.x_rows * c.size, -1.0, 1.0);
  const double ends[2] = {kind.target == 'r' ? -2.0 : 0.0, kind.target == 'u' || kind.target == 'r' ? 1.0
                                                           : kind.target == 'k'                     ? kind.planes - 0.01
                                                           : kind.target == 'l'                     ? 255.99
                                                                                                    : 12.0};
  in.x = draw(random, count, ends[0], ends[1]);
  for (double& value : in.params) value = bfloat16_rounded(half_rounded(value));
  for (double& value : in.shared) value = bfloat16_rounded(value);
  for (double& value : in.x) {
    value = kind.target == 'u' || kind.target == 'r' ? bfloat16_rounded(half_rounded(value)) : std::floor(value);
  }
  if (kind.target == 'l' && count > 1) in.x[0] = 0.0, in.x[1] = 255.0;
  in.classes.assign(in.x.begin(), in.x.end());
  return in;
}

struct Outputs {
  Array value, to_params, to_shared;
  bool valid;
};

Outputs run(const Kind& kind, const Case& c, DType dtype, Inputs in, bool gradients, int threads,
            double factor = kFactor) {
  const int64_t rows = c.x_rows * c.samples;
  Array params(dtype, in.params), shared(sums_of(dtype), in.shared);
  Array x(kind.target == 'l' || kind.target == 'c' ? DType::kUInt8 : dtype, in.x);
  const bool whole = kind.target == 'k';
  const int32_t x_dtype = whole                                      ? genfast::kInt64
                          : kind.target == 'l' || kind.target == 'c' ? static_cast<int32_t>(DType::kUInt8)
                                                                     : static_cast<int32_t>(dtype);
  Outputs out = {Array(sums_of(dtype), rows), Array(dtype, rows * kind.planes * c.size),
                 Array(sums_of(dtype), rows * c.size), false};
  const void* targets = whole ? static_cast<const void*>(in.classes.data()) : x.data();
  out.valid = genfast::cpu::log_likelihood(
      {kind.likelihood, dtype, x_dtype, params.data(), kind.shared ? shared.data() : nullptr, targets, out.value.data(),
       gradients ? out.to_params.data() : nullptr, gradients && kind.shared ? out.to_shared.data() : nullptr, rows,
       kind.planes, c.size, kind.targets, c.x_rows, c.x_rows, kLogvar, factor},
      threads);
  return out;
}

void check_close(const char* name, const char* what, DType dtype, const char* isa, int64_t i, double found,
                 double exact, double size, double tolerance = 4e-6) {
  const double bound = rounding_of(dtype) * std::fabs(exact) + tolerance * size + (dtype == DType::kFloat16 ? 1e-7 : 0);
  CHECK(std::fabs(found - exact) <= bound, "%s, %s, %s, %s at %lld: %.9g, not %.9g", name, what, dtype_name(dtype), isa,
        static_cast<long long>(i), found, exact);
}

}  // namespace

TEST(log_likelihood_against_float64) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Kind& kind : kKinds) {
      for (const Case& c : kCases) {
        if (kind.planes * c.size > 60000) continue;  // for emulated instructions that would take minutes
        const Inputs in = inputs_of(kind, c);
        const Outputs exact = run(kind, c, DType::kFloat64, in, true, 1);
        const bool logistics = kind.target == 'l';
        for (DType dtype : kDTypes) {
          const Outputs one = run(kind, c, dtype, in, true, 1), four = run(kind, c, dtype, in, true, 4);
          const Outputs bare = run(kind, c, dtype, in, false, 3);
          CHECK(one.valid && four.valid && bare.valid, "%s %s %s", kind.name, dtype_name(dtype), isa);
          CHECK(one.value == four.value && one.value == bare.value && one.to_params == four.to_params &&
                    one.to_shared == four.to_shared,
                "%s %s %s", kind.name, dtype_name(dtype), isa);
          CHECK(one.value.guards_hold() && one.to_params.guards_hold() && one.to_shared.guards_hold() &&
                    bare.to_params.guards_hold(),
                "%s %s %s", kind.name, dtype_name(dtype), isa);
          for (int64_t i = 0; i < one.value.size(); ++i) {
            check_close(kind.name, "value", sums_of(dtype), isa, i, one.value.get(i), exact.value.get(i),
                        std::fabs(exact.value.get(i)) + static_cast<double>(c.size), logistics ? 1.6e-5 : 4e-7);
          }
          for (int64_t i = 0; i < one.to_params.size(); ++i) {
            const double gradient = exact.to_params.get(i);
            check_close(kind.name, "gradient", dtype, isa, i, one.to_params.get(i), gradient, std::fabs(gradient) + 1,
                        logistics ? 2e-5 : 4e-6);  // errors of a mean count e^-s times, up to 20 here
          }
          for (int64_t i = 0; kind.shared && i < one.to_shared.size(); ++i) {
            const double gradient = exact.to_shared.get(i);
            check_close(kind.name, "of shared", sums_of(dtype), isa, i, one.to_shared.get(i), gradient,
                        std::fabs(gradient) + 1);
          }
        }
      }
    }
  });
}

TEST(log_likelihood_gradients_are_differences) {
  const Case c = {2, 2, 3};
  for (const Kind& kind : kKinds) {
    if (kind.planes > 100) continue;
    Inputs in = inputs_of(kind, c);
    const Outputs exact = run(kind, c, DType::kFloat64, in, true, 1, 1.0);
    const double step = 1e-5;
    const auto slope = [&](double* parameter, int64_t row) {
      const double before = *parameter;
      *parameter = before + step;
      const double above = run(kind, c, DType::kFloat64, in, false, 1).value.get(row);
      *parameter = before - step;
      const double below = run(kind, c, DType::kFloat64, in, false, 1).value.get(row);
      *parameter = before;
      return (above - below) / (2 * step);
    };
    const int64_t each = kind.planes * c.size;
    for (int64_t i = 0; i < exact.to_params.size(); ++i) {
      check_close(kind.name, "difference", DType::kFloat64, "", i, exact.to_params.get(i),
                  slope(&in.params[static_cast<size_t>(i)], i / each), 1.0, 1e-6);
    }
    for (int64_t i = 0; kind.shared && i < exact.to_shared.size(); ++i) {
      const int64_t row = i / c.size, at = row % c.x_rows * c.size + i % c.size;
      check_close(kind.name, "difference of shared", DType::kFloat64, "", i, exact.to_shared.get(i),
                  slope(&in.shared[static_cast<size_t>(at)], row), 1.0, 1e-6);
    }
  }
}

TEST(log_likelihood_values_are_the_textbooks) {
  const Case c = {2, 2, 3};
  for (const Kind& kind : kKinds) {
    const bool counts = kind.likelihood == Likelihood::kNegativeBinomial;
    const bool logistic = kind.likelihood == Likelihood::kDiscretizedLogistic;
    if (kind.planes > 100 || !(counts || logistic || kind.target == 'u' || kind.target == 'r' || kind.target == 'k')) {
      continue;
    }
    const Inputs in = inputs_of(kind, c);
    const Outputs out = run(kind, c, DType::kFloat64, in, false, 1);
    for (int64_t row = 0; row < c.x_rows * c.samples; ++row) {
      long double total = 0;
      for (int64_t s = 0; s < c.size; ++s) {
        const auto p = [&](int64_t plane) {
          return static_cast<long double>(in.params[static_cast<size_t>((row * kind.planes + plane) * c.size + s)]);
        };
        const int64_t x_at = row % c.x_rows * c.size + s;
        const long double x = in.x[static_cast<size_t>(x_at)], a = p(0);
        if (kind.likelihood == Likelihood::kBernoulli) {
          total += x * a - std::log1p(std::exp(a));
        } else if (kind.likelihood == Likelihood::kContinuousBernoulli) {
          total += x * a - std::log(std::expm1(a) / a);
        } else if (kind.likelihood == Likelihood::kGaussian) {
          const long double v = kind.shared        ? in.shared[static_cast<size_t>(x_at)]
                                : kind.planes == 2 ? p(1)
                                                   : static_cast<long double>(kLogvar);
          total += -0.5L * ((x - a) * (x - a) / std::exp(v) + v + std::log(2 * M_PIl));
        } else if (kind.likelihood == Likelihood::kCategorical) {
          long double sum = 0;
          for (int64_t q = 0; q < kind.planes; ++q) sum += std::exp(p(q));
          total += p(static_cast<int64_t>(x)) - std::log(sum);
        } else if (logistic) {
          const long double scale = std::exp(p(1)), edge = 1.0L / 255, middle = 2 * x / 255 - 1 - a;
          const long double side = middle > 0 ? -1 : 1;  // as differences of small numbers, not of those near one
          const auto below = [&](long double t) { return 1 / (1 + std::exp(-side * t / scale)); };
          const bool top = x >= 255, bottom = x <= 0;
          const long double up = top ? (side > 0 ? 1 : 0) : below(middle + edge);
          const long double down = bottom ? (side > 0 ? 0 : 1) : below(middle - edge);
          total += std::log(side * (up - down));
        } else {
          const long double mean = std::exp(a), theta = std::exp(p(1));
          total += std::lgamma(x + theta) - std::lgamma(theta) - std::lgamma(x + 1) +
                   theta * std::log(theta / (theta + mean)) + x * std::log(mean / (theta + mean));
        }
      }
      const double value = static_cast<double>(total);
      check_close(kind.name, "textbook", DType::kFloat64, "", row, out.value.get(row), value, 1 + std::fabs(value),
                  1e-11);
    }
  }
}

TEST(log_likelihood_targets_that_do_not_exist) {
  const Case c = {3, 1, 40};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Kind& kind : kKinds) {
      if (kind.target != 'u' && kind.target != 'k') continue;
      for (DType dtype : kDTypes) {
        for (double wrong : {-1.0, kind.target == 'u' ? 1.25 : static_cast<double>(kind.planes)}) {
          Inputs in = inputs_of(kind, c);
          in.x[77] = wrong;
          in.classes[77] = static_cast<int64_t>(wrong);
          CHECK(!run(kind, c, dtype, in, true, 2).valid, "%s %s %s", kind.name, dtype_name(dtype), isa);
        }
      }
    }
  });
}

TEST(scale_rows) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : kDTypes) {
      for (int64_t event : {1, 37, 20001}) {
        std::mt19937_64 random(3);
        const std::vector<double> ratios = {kFactor, 0.0, 0.5, -3.0};
        Array values(dtype, draw(random, 4 * event, -2.0, 2.0)), cotangent(sums_of(dtype), ratios);
        const Array before = values;
        genfast::cpu::scale_rows({dtype, values.data(), cotangent.data(), 4, event, kFactor}, 3);
        CHECK(values.guards_hold(), "%s %s", dtype_name(dtype), isa);
        for (int64_t i = 0; i < 4 * event; ++i) {
          const double ratio = ratios[static_cast<size_t>(i / event)] / kFactor;
          check_close("scale_rows", "value", dtype, isa, i, values.get(i), ratio * before.get(i),
                      std::fabs(ratio * before.get(i)), 1e-7);
        }
      }
    }
  });
}
