// Truncated normals against the C library's error function in double.
#include "check.h"
#include "isas.h"

namespace {

double upper_tail(double a) { return 0.5 * std::erfc(a * M_SQRT1_2); }

// -log Q(a), with digits where Q(a) is near one.
double minus_log_tail(double a) { return a < -1.0 ? -std::log1p(-upper_tail(-a)) : -std::log(upper_tail(a)); }

double hazard(double a) { return std::exp(-0.5 * a * a - 0.5 * std::log(2.0 * M_PI) + minus_log_tail(a)); }

std::vector<float> inputs() {
  std::vector<float> s = {0.0f, -0.0f, 1e-30f, -1e-30f};
  for (int i = -3500; i <= 3500; i += 7) s.push_back(static_cast<float>(i) / 100.0f);
  return s;
}

}  // namespace

TEST(truncated_normal_moments) {
  const std::vector<float> s = inputs();
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<float> mean(s.size()), log_partition(s.size());
    probe.truncated_mean(s.data(), mean.data(), static_cast<int64_t>(s.size()));
    probe.truncated_log_partition(s.data(), log_partition.data(), static_cast<int64_t>(s.size()));
    for (size_t i = 0; i < s.size(); ++i) {
      const double x = s[i], exact = x + hazard(-x);
      // In double the sum cancels where x is negative.
      CHECK(std::fabs(mean[i] - exact) <= 5e-7 * exact + 1e-14 * x * x, "%s mean(%g) = %.9g, not %.9g", isa, x, mean[i],
            exact);
      const double log_z = 0.5 * x * x + 0.5 * std::log(2.0 * M_PI) - minus_log_tail(-x);
      CHECK(std::fabs(log_partition[i] - log_z) <= 3e-7 * (1.0 + std::fabs(log_z)), "%s log Z(%g) = %.9g, not %.9g",
            isa, x, log_partition[i], log_z);
    }
    const float extreme[] = {-1e30f, -1e10f, -1e4f, 1e4f, NAN, -INFINITY};
    float found[6], log_z[6];
    probe.truncated_mean(extreme, found, 6);
    probe.truncated_log_partition(extreme, log_z, 6);
    for (int i = 0; i < 3; ++i) {
      CHECK(std::fabs(found[i] * extreme[i] + 1.0f) < 1e-6f, "%s mean(%g) = %g", isa, extreme[i], found[i]);
      CHECK(std::fabs(log_z[i] + std::log(-extreme[i])) < 1e-5f, "%s log Z(%g) = %g", isa, extreme[i], log_z[i]);
    }
    CHECK(found[3] == 1e4f && log_z[3] == 5e7f + 1.0f, "%s mean(1e4) = %.9g, log Z %.9g", isa, found[3], log_z[3]);
    CHECK(std::isnan(found[4]) && std::isnan(log_z[4]), "%s NaN gives %g, %g", isa, found[4], log_z[4]);
    CHECK(found[5] >= 0.0f && found[5] < 1e-30f, "%s mean(-infinity) = %g", isa, found[5]);
  });
}

// The share of the mass beyond a draw is 1 - u: its logarithm's error over the hazard is that of the draw.
TEST(truncated_normal_quantiles) {
  std::vector<uint32_t> shares = {0, 1, 2, 3, 100, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFE, 0xFFFFFF};
  for (uint32_t i = 0; i < 200; ++i) shares.push_back(i * 83886u);
  const std::vector<float> values = inputs();
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    double worst = 0.0;
    for (const float value : values) {
      std::vector<float> s(shares.size(), value), u, found(s.size());
      for (const uint32_t share : shares) u.push_back(static_cast<float>(share) * 0x1p-24f);
      probe.truncated_sample(s.data(), u.data(), found.data(), static_cast<int64_t>(s.size()));
      for (size_t i = 0; i < s.size(); ++i) {
        const double y = found[i], x = value;
        CHECK(y >= 0.0 && (shares[i] != 0 || y == 0.0), "%s quantile(%g, %g) = %g", isa, x, u[i], y);
        if (shares[i] == 0) continue;
        const double error = (minus_log_tail(y - x) - minus_log_tail(-x) + std::log1p(-static_cast<double>(u[i]))) /
                             std::max(hazard(y - x), 1e-300);
        CHECK(std::fabs(error) <= 1e-6 * (1.0 + 0.25 * std::max(x, 0.0)), "%s quantile(%g, %.9g) = %.9g is off by %g",
              isa, x, u[i], y, error);
        worst = std::max(worst, std::fabs(error) / (1.0 + std::max(x, 0.0)));
      }
    }
    std::printf("     %s: quantiles of s within %.2g (1 + s)\n", isa, worst);
    const float s[] = {-1e30f, -1e4f, NAN, -INFINITY, NAN}, u[] = {0.5f, 0.5f, 0.5f, 0.5f, 0.0f};
    float found[5];
    probe.truncated_sample(s, u, found, 5);
    for (int i = 0; i < 2; ++i) {
      CHECK(std::fabs(found[i] * -s[i] - 0.69314718f) < 2e-6f, "%s quantile(%g, 1/2) = %g", isa, s[i], found[i]);
    }
    CHECK(std::isnan(found[2]) && std::isnan(found[4]), "%s NaN gives %g, %g", isa, found[2], found[4]);
    CHECK(found[3] >= 0.0f && found[3] < 1e-30f, "%s quantile(-infinity, 1/2) = %g", isa, found[3]);
  });
}
