// Elementary functions against the C library in double, and lanes of comparisons and sums.
#include <numeric>

#include "check.h"
#include "isas.h"

namespace {

// Floats from `low` to `high`, `step` representable numbers apart (through zero), and the ends.
std::vector<float> scan(float low, float high, uint32_t step) {
  std::vector<float> values = {low, high, 0.0f, -0.0f};
  for (uint32_t bits = 0; bits < check::bits(high > 0 ? high : 0.0f); bits += step)
    values.push_back(check::from_bits(bits));
  for (uint32_t bits = 0; bits < check::bits(low < 0 ? -low : 0.0f); bits += step)
    values.push_back(-check::from_bits(bits));
  return values;
}

using Function = void (*genfast::Probe::*)(const float*, float*, int64_t);

// Checks |found - exact| <= relative |exact| + absolute over the values and prints the worst relative error.
template <typename Exact>
void check_accuracy(const char* name, Function function, const std::vector<float>& values, double relative,
                    double absolute, const Exact& exact) {
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<float> found(values.size());
    (probe.*function)(values.data(), found.data(), static_cast<int64_t>(values.size()));
    double worst = 0.0;
    for (size_t i = 0; i < values.size(); ++i) {
      const double truth = exact(static_cast<double>(values[i])), error = std::fabs(found[i] - truth);
      CHECK(check::same(found[i], static_cast<float>(truth)) || error <= relative * std::fabs(truth) + absolute,
            "%s %s(%.9g) = %.9g, not %.9g", isa, name, values[i], found[i], truth);
      if (std::fabs(truth) > 1e-37 && std::isfinite(truth) && error / std::fabs(truth) > worst)
        worst = error / std::fabs(truth);
    }
    std::printf("     %s: %s within %.2g\n", isa, name, worst);
  });
}

}  // namespace

TEST(exp_accuracy) {
  check_accuracy("exp", &genfast::Probe::exp, scan(-103.9f, 88.72f, 1501), 2e-7, 1.5e-45,
                 [](double x) { return std::exp(x); });
}

TEST(exp_limits) {
  const std::vector<float> x = {INFINITY, -INFINITY, NAN, 1e30f, -1e30f, 88.73f, -104.0f, 0.0f};
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<float> found(x.size());
    probe.exp(x.data(), found.data(), static_cast<int64_t>(x.size()));
    const float expected[] = {INFINITY, 0.0f, NAN, INFINITY, 0.0f, INFINITY, 0.0f, 1.0f};
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK(check::same(found[i], expected[i]), "%s exp(%g) = %g", isa, x[i], found[i]);
    }
  });
}

TEST(log_accuracy) {
  std::vector<float> values = {INFINITY, NAN};
  for (uint32_t bits = 0x00800000; bits < 0x7F800000; bits += 1501) values.push_back(check::from_bits(bits));
  for (uint32_t bits = 0x3F7F0000; bits < 0x3F810000; ++bits) values.push_back(check::from_bits(bits));
  check_accuracy("log", &genfast::Probe::log, values, 3e-7, 0.0,
                 [](double x) { return std::isinf(x) ? NAN : std::log(x); });
}

TEST(sigmoid_accuracy) {
  check_accuracy("sigmoid", &genfast::Probe::sigmoid, scan(-87.32f, 100.0f, 1501), 3e-7, 0.0,
                 [](double x) { return 1.0 / (1.0 + std::exp(-x)); });
}

TEST(sigmoid_limits) {
  const std::vector<float> x = {INFINITY, -INFINITY, NAN, 1e38f, -1e38f, -87.34f, 0.0f, -0.0f};
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<float> found(x.size());
    probe.sigmoid(x.data(), found.data(), static_cast<int64_t>(x.size()));
    const float expected[] = {1.0f, 0.0f, NAN, 1.0f, 0.0f, 0.0f, 0.5f, 0.5f};
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK(check::same(found[i], expected[i]), "%s sigmoid(%g) = %g", isa, x[i], found[i]);
    }
  });
}

TEST(softplus_accuracy) {
  check_accuracy("softplus", &genfast::Probe::softplus, scan(-86.9f, 1e30f, 1501), 3e-7, 0.0,
                 [](double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); });
}

TEST(softplus_limits) {
  const std::vector<float> x = {INFINITY, -INFINITY, NAN, 1e38f, -1e38f, -200.0f};
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<float> found(x.size());
    probe.softplus(x.data(), found.data(), static_cast<int64_t>(x.size()));
    const float expected[] = {INFINITY, 0.0f, NAN, 1e38f, 0.0f, 0.0f};
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK(check::same(found[i], expected[i]) || std::fabs(found[i] - expected[i]) <= 2e-38f, "%s softplus(%g) = %g",
            isa, x[i], found[i]);
    }
  });
}

TEST(tanh_accuracy) {
  check_accuracy("tanh", &genfast::Probe::tanh, scan(-100.0f, 100.0f, 1501), 6e-7, 0.0,
                 [](double x) { return std::tanh(x); });
}

TEST(normal_cdf_accuracy) {
  const auto cdf = [](double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); };
  const auto density = [](double x) { return std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::acos(-1.0)); };
  const std::vector<float> near = scan(-2.0f, 100.0f, 1501), far = scan(-12.9f, 12.9f, 1501);
  check_accuracy("normal_cdf", &genfast::Probe::normal_cdf, near, 9e-7, 0.0, cdf);
  check_accuracy("normal_cdf", &genfast::Probe::normal_cdf, far, 6e-6, 0.0, cdf);  // the bound without a fused a * a
  check_accuracy("normal_density", &genfast::Probe::normal_density, far, 6e-6, 0.0, density);
}

TEST(tanh_and_normal_cdf_limits) {
  const std::vector<float> x = {INFINITY, -INFINITY, NAN, 1e38f, -1e38f, 0.0f, -0.0f, -14.5f};
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<float> t(x.size()), p(x.size()), d(x.size());
    probe.tanh(x.data(), t.data(), static_cast<int64_t>(x.size()));
    probe.normal_cdf(x.data(), p.data(), static_cast<int64_t>(x.size()));
    probe.normal_density(x.data(), d.data(), static_cast<int64_t>(x.size()));
    const float tanhs[] = {1.0f, -1.0f, NAN, 1.0f, -1.0f, 0.0f, -0.0f, -1.0f};
    const float cdfs[] = {1.0f, 0.0f, NAN, 1.0f, 0.0f, 0.5f, 0.5f, 0.0f};
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK(check::same(t[i], tanhs[i]), "%s tanh(%g) = %g", isa, x[i], t[i]);
      CHECK(check::same(p[i], cdfs[i]) || std::fabs(p[i] - cdfs[i]) < 2e-7f, "%s normal_cdf(%g) = %g", isa, x[i], p[i]);
      CHECK(std::isnan(x[i]) ? std::isnan(d[i])
            : x[i] == 0.0f   ? std::fabs(d[i] - 0.39894228f) < 1e-7f
                             : d[i] == 0.0f,
            "%s normal_density(%g) = %g", isa, x[i], d[i]);
    }
  });
}

TEST(masks_to_bits_and_back) {
  for_each_isa([](const genfast::Probe& probe, const char* isa) {
    std::vector<float> x(static_cast<size_t>(64 * probe.width)), found(x.size());
    uint32_t state = 1;
    for (float& value : x) value = (state = state * 1664525u + 1013904223u) >> 31 ? -1.0f : 1.0f;
    probe.bits(x.data(), found.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) CHECK(found[i] == (x[i] < 0.0f ? 1.0f : 2.0f), "%s lane %zu", isa, i);
  });
}

TEST(half_expm1_accuracy) {
  check_accuracy("half_expm1_minus", &genfast::Probe::half_expm1_minus, scan(-100.0f, 88.0f, 1501), 1e-6, 1e-44,
                 [](double x) { return 0.5 * check::expm1_minus(x); });
  check_accuracy("half_expm1", &genfast::Probe::half_expm1, scan(-100.0f, 88.0f, 1501), 1e-6, 1.5e-45,
                 [](double x) { return 0.5 * std::expm1(x); });
}

TEST(lanes) {
  for_each_isa([](const genfast::Probe& probe, const char* isa) {
    const int width = probe.width;
    std::vector<float> x(static_cast<size_t>(3 * width)), sums(3);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(1u << (i % static_cast<size_t>(width)));
    probe.sums(x.data(), sums.data(), 3 * width);
    for (float sum : sums) CHECK(sum == std::ldexp(1.0f, width) - 1.0f, "%s sum %g", isa, sum);

    std::vector<float> square(static_cast<size_t>(width * width)), each(static_cast<size_t>(width));
    for (size_t i = 0; i < square.size(); ++i) square[i] = static_cast<float>(i * i % 101);
    probe.sums_of(square.data(), each.data());
    for (int64_t i = 0; i < width; ++i) {
      const float want = std::accumulate(square.begin() + i * width, square.begin() + (i + 1) * width, 0.0f);
      CHECK(each[static_cast<size_t>(i)] == want, "%s sum of vector %d: %g, not %g", isa, static_cast<int>(i),
            each[static_cast<size_t>(i)], want);
    }

    const float special[] = {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, 2.0f};
    std::vector<float> a, b;
    for (float left : special) {
      for (float right : special) {
        a.push_back(left);
        b.push_back(right);
      }
    }
    a.push_back(3.0f);  // a part of a vector
    b.push_back(2.0f);
    std::vector<float> found(a.size());
    probe.compare(a.data(), b.data(), found.data(), static_cast<int64_t>(a.size()));
    for (size_t i = 0; i < a.size(); ++i) {
      const float expected = std::isnan(a[i]) || std::isnan(b[i]) ? 7.0f : a[i] < b[i] ? a[i] : b[i];
      CHECK(check::bits(found[i]) == check::bits(expected), "%s compare(%g, %g) = %g", isa, a[i], b[i], found[i]);
    }
  });
}
