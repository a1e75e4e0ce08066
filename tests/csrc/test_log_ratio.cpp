// log_ratio and iwae_bound: against double, one thread against four, poisoned and guarded outputs.
#include "check.h"
#include "common/philox.h"
#include "isas.h"
#include "storage.h"
#include "vae/iwae_bound.h"
#include "vae/log_ratio.h"

using genfast::DType;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

struct Case {
  int64_t rows, event, samples, offset;
};

// Rows inside a block, rows of several blocks, more samples than a piece takes, no rows, no event.
constexpr Case kCases[] = {{1, 1, 1, 0},    {3, 5, 2, 1},    {7, 513, 18, 3},
                           {2, 2500, 2, 2}, {601, 3, 17, 5}, {1, 17001, 1, 7},
                           {0, 5, 1, 0},    {5, 0, 2, 0},    {20, 50, 50, (1ll << 34) - 3}};

double normal(const Case& c, int64_t k, int64_t i) {
  const uint64_t at = static_cast<uint64_t>(c.offset + i);
  const genfast::philox::Words words =
      genfast::philox::tensor_words(at >> 2, static_cast<uint32_t>(k), genfast::philox::kTensorNormal, 99);
  const int pair = static_cast<int>(at & 2);
  const double radius = std::sqrt(-2.0 * std::log((words.w[pair] + 1.0) * 0x1p-32));
  const double angle = words.w[pair + 1] * (2.0 * M_PI * 0x1p-32);
  return radius * (at & 1 ? std::sin(angle) : std::cos(angle));
}

std::vector<double> draw(std::mt19937_64& random, int64_t count, double scale) {
  std::uniform_real_distribution<double> between(-scale, scale);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

// A sum in double with the sum of its absolute terms, `factor` of it allowed as an error before rounding.
struct Sum {
  double value = 0.0, size = 0.0;
  void add(double x, double reach) { value += x, size += std::fabs(reach); }
};

void check_close(const char* what, DType dtype, const char* isa, int64_t i, double found, const Sum& exact) {
  const double arithmetic = dtype == DType::kFloat64 ? 1e-13 : 4e-6;
  const double bound =
      rounding_of(dtype) * std::fabs(exact.value) + arithmetic * exact.size + (dtype == DType::kFloat16 ? 0x1p-24 : 0);
  CHECK(std::fabs(found - exact.value) <= bound, "%s %s %s at %lld: %.9g, not %.9g", what, dtype_name(dtype), isa,
        static_cast<long long>(i), found, exact.value);
}

template <typename Body>
void for_each_case(const Body& body) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Case& c : kCases) {
      for (DType dtype : kDTypes) {
        const genfast::ReparameterizeShape shape = {dtype, c.rows, c.event, c.samples, c.offset, 99, nullptr, 1};
        std::mt19937_64 random(5);
        const int64_t total = c.rows * c.event;
        Array mu(dtype, draw(random, total, 2.0)), logvar(dtype, draw(random, total, 2.0));
        body(isa, c, shape, mu, logvar, random);
      }
    }
  });
}

DType sums_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace

TEST(log_ratio_forward_and_jvp) {
  for_each_case([](const char* isa, const Case& c, const genfast::ReparameterizeShape& shape, Array& mu, Array& logvar,
                   std::mt19937_64& random) {
    const int64_t total = c.rows * c.event;
    const DType dtype = shape.dtype, sums = sums_of(dtype);
    Array dmu(dtype, draw(random, total, 1.0)), dlogvar(dtype, draw(random, total, 1.0));
    for (int pass = 0; pass < 3; ++pass) {  // forward, jvp, jvp with the path derivative
      Array z(dtype, c.samples * total), ratio(sums, c.samples * c.rows), z4 = z, ratio4 = ratio;
      const auto run = [&](Array& to, Array& to_ratio, int threads) {
        if (pass == 0) {
          genfast::cpu::log_ratio_forward({shape, mu.data(), logvar.data(), to.data(), to_ratio.data()}, threads);
        } else {
          genfast::cpu::log_ratio_jvp(
              {shape, mu.data(), logvar.data(), dmu.data(), dlogvar.data(), to.data(), to_ratio.data(), pass == 2},
              threads);
        }
      };
      run(z, ratio, 1);
      run(z4, ratio4, 4);
      CHECK(z == z4 && ratio == ratio4 && z.guards_hold() && ratio.guards_hold(), "%s %s", isa, dtype_name(dtype));
      for (int64_t k = 0; k < c.samples; ++k) {
        for (int64_t row = 0; row < c.rows; ++row) {
          Sum sum;
          for (int64_t i = row * c.event; i < (row + 1) * c.event; ++i) {
            const double v = logvar.get(i), sigma = std::exp(0.5 * v), eps = normal(c, k, i),
                         reach = 1 + std::fabs(eps);
            const double value = mu.get(i) + sigma * eps, size = std::fabs(mu.get(i)) + sigma * reach;
            const double a = dmu.get(i), b = dlogvar.get(i);
            const double moved = a + 0.5 * b * sigma * eps, moved_size = std::fabs(a) + std::fabs(b) * sigma * reach;
            const double direct = pass == 2 ? eps * moved / sigma : 0.5 * b;
            Sum z_sum;
            if (pass == 0) {
              z_sum.add(value, size);
              sum.add(0.5 * (eps * eps + v - value * value), reach * reach + std::fabs(v) + size * size);
            } else {
              z_sum.add(moved, moved_size);
              sum.add(direct - value * moved, reach * moved_size / sigma + std::fabs(b) + size * moved_size);
            }
            check_close("z", dtype, isa, i, z.get(k * total + i), z_sum);
          }
          check_close("ratio", sums, isa, row, ratio.get(k * c.rows + row), sum);
        }
      }
    }
  });
}

TEST(log_ratio_backward) {
  for_each_case([](const char* isa, const Case& c, const genfast::ReparameterizeShape& shape, Array& mu, Array& logvar,
                   std::mt19937_64& random) {
    const int64_t total = c.rows * c.event;
    const DType dtype = shape.dtype, sums = sums_of(dtype);
    Array dz(dtype, draw(random, c.samples * total, 1.0)), dratio(sums, draw(random, c.samples * c.rows, 1.0)),
        weights(sums, draw(random, c.samples * c.rows, 1.0));
    for (int wanted = 1; wanted < 16; ++wanted) {
      const bool has_z = wanted & 1, has_ratio = wanted & 2, weighted = wanted & 4, path = wanted & 8;
      Array to_mu(dtype, total), to_logvar = to_mu, to_mu4 = to_mu, to_logvar4 = to_mu;
      const auto run = [&](Array& m, Array& v, int threads) {
        genfast::cpu::log_ratio_backward(
            {shape, mu.data(), logvar.data(), has_z ? dz.data() : nullptr, has_ratio ? dratio.data() : nullptr,
             weighted ? weights.data() : nullptr, m.data(), v.data(), path},
            threads);
      };
      run(to_mu, to_logvar, 1);
      run(to_mu4, to_logvar4, 4);
      CHECK(to_mu == to_mu4 && to_logvar == to_logvar4 && to_mu.guards_hold() && to_logvar.guards_hold(), "%s %s", isa,
            dtype_name(dtype));
      for (int64_t i = 0; i < total; ++i) {
        const double m = mu.get(i), v = logvar.get(i), sigma = std::exp(0.5 * v);
        Sum mean, logarithm;
        for (int64_t k = 0; k < c.samples; ++k) {
          const int64_t at = k * c.rows + i / c.event;
          const double eps = normal(c, k, i), reach = 1 + std::fabs(eps), r = has_ratio ? dratio.get(at) : 0.0;
          const double in = has_z ? dz.get(k * total + i) * (weighted ? weights.get(at) : 1.0) : 0.0;
          const double g = in - r * (m + sigma * eps);
          const double size = std::fabs(in) + std::fabs(r) * (std::fabs(m) + sigma * reach);
          mean.add(g + (path ? r * eps / sigma : 0.0), size + (path ? r * reach / sigma : 0.0));
          mean.size += path ? std::fabs(r) * reach / sigma : 0.0;
          logarithm.add(0.5 * (g * eps * sigma + (path ? r * eps * eps : r)), size * reach * sigma);
          logarithm.size += std::fabs(r) * reach * reach;
        }
        check_close("dmu", dtype, isa, i, to_mu.get(i), mean);
        check_close("dlogvar", dtype, isa, i, to_logvar.get(i), logarithm);
      }
    }
  });
}

TEST(iwae_bound) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (DType dtype : kDTypes) {
      for (const auto& [samples, columns] : {std::pair{1, 1}, {3, 5}, {50, 100}, {700, 17}, {2, 4099}, {3, 0}}) {
        const DType sums = sums_of(dtype);
        const genfast::IwaeShape shape = {dtype, samples, columns};
        const int64_t total = int64_t{samples} * columns;
        std::mt19937_64 random(5);
        Array l(dtype, draw(random, total, 9.0)), t(dtype, draw(random, total, 1.0)),
            y(sums, draw(random, columns, 1.0));
        Array bound(sums, columns), moved = bound, bound4 = bound, moved4 = bound;
        Array gradient(dtype, total), gradient4 = gradient;
        genfast::cpu::iwae_bound_forward({shape, l.data(), bound.data()}, 1);
        genfast::cpu::iwae_bound_forward({shape, l.data(), bound4.data()}, 4);
        genfast::cpu::iwae_bound_backward({shape, y.data(), l.data(), gradient.data()}, 1);
        genfast::cpu::iwae_bound_backward({shape, y.data(), l.data(), gradient4.data()}, 4);
        genfast::cpu::iwae_bound_jvp({shape, t.data(), l.data(), moved.data()}, 1);
        genfast::cpu::iwae_bound_jvp({shape, t.data(), l.data(), moved4.data()}, 4);
        CHECK(bound == bound4 && moved == moved4 && gradient == gradient4, "%s %s", isa, dtype_name(dtype));
        CHECK(bound.guards_hold() && moved.guards_hold() && gradient.guards_hold());
        for (int64_t i = 0; i < columns; ++i) {
          double mass = 0.0;
          for (int64_t k = 0; k < samples; ++k) mass += std::exp(l.get(k * columns + i));
          Sum value, tangent;
          value.add(std::log(mass / samples), 1.0 + 10.0);
          for (int64_t k = 0; k < samples; ++k) {
            const int64_t at = k * columns + i;
            const double w = std::exp(l.get(at)) / mass;
            Sum grad;
            grad.add(w * y.get(i), w);
            check_close("gradient", dtype, isa, at, gradient.get(at), grad);
            tangent.add(w * t.get(at), w);
          }
          check_close("bound", sums, isa, i, bound.get(i), value);
          check_close("tangent", sums, isa, i, moved.get(i), tangent);
        }
      }
    }
  });
}
