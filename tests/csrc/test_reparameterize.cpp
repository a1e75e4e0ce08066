// reparameterize forward, backward and jvp: against double, one thread against four, poisoned and guarded outputs.
#include "check.h"
#include "common/philox.h"
#include "isas.h"
#include "storage.h"
#include "vae/reparameterize.h"

using genfast::DType;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

struct Case {
  int64_t rows, event, samples, offset;
};

// Odd sizes; rows inside a piece of work, rows that span one or several, pieces that end with a row.
constexpr Case kCases[] = {
    {1, 1, 1, 0},     {3, 5, 2, 1},     {7, 513, 1, 3},
    {2, 40000, 1, 2}, {3, 16384, 1, 4}, {16385, 1, 2, 5},
    {41, 811, 3, 0},  {1, 70001, 1, 7}, {5, 13, 4, (1ll << 34) - 3},
    {0, 5, 1, 0},     {5, 0, 1, 0},     {2, 3, 0, 0},
    {1, 16383, 1, 0}, {2, 16385, 1, 0},
};

double normal(const Case& c, int64_t k, int64_t i, uint64_t seed) {
  const uint64_t at = static_cast<uint64_t>(c.offset + i);
  const genfast::philox::Words words =
      genfast::philox::tensor_words(at >> 2, static_cast<uint32_t>(k), genfast::philox::kTensorNormal, seed);
  const int pair = static_cast<int>(at & 2);
  const double radius = std::sqrt(-2.0 * std::log((words.w[pair] + 1.0) * 0x1p-32));
  const double angle = words.w[pair + 1] * (2.0 * M_PI * 0x1p-32);
  return radius * (at & 1 ? std::sin(angle) : std::cos(angle));
}

double kl_term(double mu, double logvar) { return 0.5 * (mu * mu + check::expm1_minus(logvar)); }

std::vector<double> draw(std::mt19937_64& random, int64_t count, double scale) {
  std::uniform_real_distribution<double> between(-scale, scale);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

// Noise is good to 2e-6 in float32; the rest is roundings of intermediates.
double tolerance(DType dtype, double value, double magnitude) {
  const double arithmetic = dtype == DType::kFloat64 ? 1e-13 : 4e-6;
  const double subnormal = dtype == DType::kFloat16 ? 0x1p-24 : 0.0;
  return rounding_of(dtype) * std::fabs(value) + arithmetic * magnitude + subnormal;
}

void check_close(const char* what, const Case& c, DType dtype, const char* isa, int64_t i, double found, double exact,
                 double bound) {
  CHECK(std::fabs(found - exact) <= bound, "%s %s %s [%lld, %lld, %lld] at %lld: %.9g, not %.9g", what,
        dtype_name(dtype), isa, static_cast<long long>(c.samples), static_cast<long long>(c.rows),
        static_cast<long long>(c.event), static_cast<long long>(i), found, exact);
}

template <typename Body>
void for_each_case(const Body& body) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Case& c : kCases) {
      for (DType dtype : kDTypes) {
        const genfast::ReparameterizeShape shape = {dtype, c.rows, c.event, c.samples, c.offset, 99, nullptr, 1};
        std::mt19937_64 random(5);
        Array mu(dtype, draw(random, c.rows * c.event, 2.0)), logvar(dtype, draw(random, c.rows * c.event, 3.0));
        body(isa, c, shape, mu, logvar, random);
      }
    }
  });
}

DType sums_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace

TEST(reparameterize_forward) {
  for_each_case([](const char* isa, const Case& c, const genfast::ReparameterizeShape& shape, Array& mu, Array& logvar,
                   std::mt19937_64&) {
    const int64_t total = c.rows * c.event;
    Array z(shape.dtype, c.samples * total), kl(sums_dtype(shape.dtype), c.rows);
    Array z4 = z, kl4 = kl, z_alone = z, kl_alone = kl;
    genfast::cpu::reparameterize_forward({shape, mu.data(), logvar.data(), z.data(), kl.data()}, 1);
    genfast::cpu::reparameterize_forward({shape, mu.data(), logvar.data(), z4.data(), kl4.data()}, 4);
    genfast::cpu::reparameterize_forward({shape, mu.data(), logvar.data(), z_alone.data(), nullptr}, 3);
    genfast::cpu::reparameterize_forward({shape, mu.data(), logvar.data(), nullptr, kl_alone.data()}, 2);
    CHECK(z == z4 && kl == kl4 && z == z_alone && kl == kl_alone, "%s %s event %lld", isa, dtype_name(shape.dtype),
          static_cast<long long>(c.event));
    CHECK(z.guards_hold() && kl.guards_hold());
    for (int64_t row = 0; row < c.rows; ++row) {
      double sum = 0.0;
      for (int64_t i = row * c.event; i < (row + 1) * c.event; ++i) {
        const double m = mu.get(i), v = logvar.get(i), sigma = std::exp(0.5 * v);
        sum += kl_term(m, v);
        for (int64_t k = 0; k < c.samples; ++k) {
          const double exact = m + sigma * normal(c, k, i, shape.seed);
          check_close("z", c, shape.dtype, isa, i, z.get(k * total + i), exact,
                      tolerance(shape.dtype, exact, std::fabs(m) + sigma));
        }
      }
      check_close("kl", c, shape.dtype, isa, row, kl.get(row), sum, tolerance(sums_dtype(shape.dtype), sum, sum));
    }
  });
}

TEST(reparameterize_backward) {
  for_each_case([](const char* isa, const Case& c, const genfast::ReparameterizeShape& shape, Array& mu, Array& logvar,
                   std::mt19937_64& random) {
    const int64_t total = c.rows * c.event;
    Array dz(shape.dtype, draw(random, c.samples * total, 1.0)),
        dkl(sums_dtype(shape.dtype), draw(random, c.rows, 1.0));
    Array dmu(shape.dtype, total), dlogvar(shape.dtype, total);
    for (int wanted = 1; wanted < 4; ++wanted) {
      void *from_z = wanted & 1 ? dz.data() : nullptr, *from_kl = wanted & 2 ? dkl.data() : nullptr;
      Array dmu1 = dmu, dlogvar1 = dlogvar, dmu4 = dmu, dlogvar4 = dlogvar, dlogvar_alone = dlogvar;
      genfast::cpu::reparameterize_backward(
          {shape, mu.data(), logvar.data(), from_z, from_kl, dmu1.data(), dlogvar1.data()}, 1);
      genfast::cpu::reparameterize_backward(
          {shape, mu.data(), logvar.data(), from_z, from_kl, dmu4.data(), dlogvar4.data()}, 4);
      genfast::cpu::reparameterize_backward(
          {shape, mu.data(), logvar.data(), from_z, from_kl, nullptr, dlogvar_alone.data()}, 2);
      CHECK(dmu1 == dmu4 && dlogvar1 == dlogvar4 && dlogvar1 == dlogvar_alone, "%s %s event %lld wanted %d", isa,
            dtype_name(shape.dtype), static_cast<long long>(c.event), wanted);
      CHECK(dmu1.guards_hold() && dlogvar1.guards_hold());
      for (int64_t i = 0; i < total; ++i) {
        const double v = logvar.get(i), sigma = std::exp(0.5 * v);
        double to_mu = 0, to_logvar = 0, size = 0, logvar_size = 0;
        for (int64_t k = 0; from_z != nullptr && k < c.samples; ++k) {
          const double g = dz.get(k * total + i);
          to_mu += g;
          to_logvar += 0.5 * g * sigma * normal(c, k, i, shape.seed);
          size += std::fabs(g);
          logvar_size += std::fabs(g) * sigma * 4.0;
        }
        if (from_kl != nullptr) {
          const double row = dkl.get(i / c.event);
          to_mu += row * mu.get(i);
          to_logvar += 0.5 * row * std::expm1(v);
          size += std::fabs(row * mu.get(i));
          logvar_size += std::fabs(row * std::expm1(v));
        }
        check_close("dmu", c, shape.dtype, isa, i, dmu1.get(i), to_mu, tolerance(shape.dtype, to_mu, size));
        check_close("dlogvar", c, shape.dtype, isa, i, dlogvar1.get(i), to_logvar,
                    tolerance(shape.dtype, to_logvar, logvar_size));
      }
    }
  });
}

TEST(reparameterize_jvp) {
  for_each_case([](const char* isa, const Case& c, const genfast::ReparameterizeShape& shape, Array& mu, Array& logvar,
                   std::mt19937_64& random) {
    const int64_t total = c.rows * c.event;
    Array dmu(shape.dtype, draw(random, total, 1.0)), dlogvar(shape.dtype, draw(random, total, 1.0));
    Array dz(shape.dtype, c.samples * total), dkl(sums_dtype(shape.dtype), c.rows);
    Array dz4 = dz, dkl4 = dkl;
    genfast::cpu::reparameterize_jvp(
        {shape, mu.data(), logvar.data(), dmu.data(), dlogvar.data(), dz.data(), dkl.data()}, 1);
    genfast::cpu::reparameterize_jvp(
        {shape, mu.data(), logvar.data(), dmu.data(), dlogvar.data(), dz4.data(), dkl4.data()}, 4);
    CHECK(dz == dz4 && dkl == dkl4, "%s %s event %lld", isa, dtype_name(shape.dtype), static_cast<long long>(c.event));
    CHECK(dz.guards_hold() && dkl.guards_hold());
    for (int64_t row = 0; row < c.rows; ++row) {
      double sum = 0.0, size = 0.0;
      for (int64_t i = row * c.event; i < (row + 1) * c.event; ++i) {
        const double v = logvar.get(i), sigma = std::exp(0.5 * v), m = dmu.get(i), t = dlogvar.get(i);
        sum += mu.get(i) * m + 0.5 * std::expm1(v) * t;
        size += std::fabs(mu.get(i) * m) + std::fabs(std::expm1(v) * t);
        for (int64_t k = 0; k < c.samples; ++k) {
          const double exact = m + 0.5 * sigma * normal(c, k, i, shape.seed) * t;
          check_close("z'", c, shape.dtype, isa, i, dz.get(k * total + i), exact,
                      tolerance(shape.dtype, exact, std::fabs(m) + 4.0 * sigma * std::fabs(t)));
        }
      }
      check_close("kl'", c, shape.dtype, isa, row, dkl.get(row), sum, tolerance(sums_dtype(shape.dtype), sum, size));
    }
  });
}

TEST(reparameterize_extremes) {
  const std::vector<double> mus = {0, 0, 1e30, 0, 3, 0, 0, 0, NAN, 0, 1};
  const std::vector<double> logvars = {-INFINITY, -300, 60, 88, -0.0, 170, 1e-4, 500, 0, NAN, 16.9};
  const int64_t count = static_cast<int64_t>(mus.size());
  const Case c = {count, 1, 1, 0};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
      const genfast::ReparameterizeShape shape = {dtype, count, 1, 1, 0, 3, nullptr, 1};
      Array mu(dtype, mus), logvar(dtype, logvars), z(dtype, count), kl = z, dmu = z, dlogvar = z, dz = z, dkl = z;
      Array ones(dtype, std::vector<double>(static_cast<size_t>(count), 1.0));
      genfast::cpu::reparameterize_forward({shape, mu.data(), logvar.data(), z.data(), kl.data()}, 1);
      genfast::cpu::reparameterize_backward(
          {shape, mu.data(), logvar.data(), ones.data(), nullptr, dmu.data(), dlogvar.data()}, 1);
      genfast::cpu::reparameterize_jvp(
          {shape, mu.data(), logvar.data(), ones.data(), ones.data(), dz.data(), dkl.data()}, 1);
      for (int64_t i = 0; i < count; ++i) {
        const double m = mu.get(i), v = logvar.get(i), sigma = std::exp(0.5 * v),
                     slope = 0.5 * sigma * normal(c, 0, i, 3);
        const auto near = [&](const char* what, double found, double exact, double size) {
          const double stored = dtype == DType::kFloat32 ? static_cast<float>(exact) : exact;
          CHECK(check::same(found, stored) || std::fabs(found - exact) <= 4e-6 * size,
                "%s %s %s of mu %g, logvar %g: %g, not %g", isa, dtype_name(dtype), what, m, v, found, stored);
        };
        near("z", z.get(i), m + 2.0 * slope, std::fabs(m) + sigma);
        near("kl", kl.get(i), kl_term(m, v), kl_term(m, v));
        near("dlogvar", dlogvar.get(i), slope, sigma);
        near("z'", dz.get(i), 1.0 + slope, 1.0 + sigma);
        near("kl'", dkl.get(i), m + 0.5 * std::expm1(v), std::fabs(m) + std::fabs(std::expm1(v)));
      }
    }
  });
}
