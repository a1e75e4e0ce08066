// minibatch_stddev and its backward against the formulas in float64: every dtype, groups of one sample and of all,
// features, pieces of several sizes, large means, threads, and what must stay untouched.
#include "check.h"
#include "gan/minibatch_stddev.h"
#include "isas.h"
#include "storage.h"

using genfast::DType;
using genfast::MinibatchStddev;

namespace {

constexpr double kEps = 1e-4;

std::vector<double> drawn(int64_t count, uint64_t seed, double mean = 0.0) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> between(-1.0, 1.0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = mean + between(random);
  return values;
}

// Element (c, s) of feature `feature` of samples m, m + M, ...: mean and standard deviation.
struct Deviation {
  double mean, sd;
};

Deviation deviation_of(const MinibatchStddev& a, const Array& x, int64_t group, int64_t element) {
  const int64_t all = a.channels * a.spatial, groups = a.groups();
  const double n = static_cast<double>(a.size);
  double mean = 0.0, square = 0.0;
  for (int64_t k = 0; k < a.size; ++k) mean += x.get((group + k * groups) * all + element) / n;
  for (int64_t k = 0; k < a.size; ++k) {
    const double d = x.get((group + k * groups) * all + element) - mean;
    square += d * d / n;
  }
  return {mean, std::sqrt(square + kEps)};
}

struct Case {
  int64_t batch, channels, spatial, size, features;
};

}  // namespace

TEST(minibatch_stddev_values_and_gradients) {
  const Case cases[] = {{4, 3, 5, 2, 1},  {4, 6, 7, 4, 3},   {6, 4, 1, 3, 2}, {3, 5, 9, 1, 5}, {2, 1, 1, 2, 1},
                        {5, 2, 33, 5, 1}, {4, 4, 700, 4, 2}, {2, 3, 0, 2, 1}, {0, 2, 3, 2, 1}, {4, 8, 2000, 2, 1}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Case& c : cases) {
      for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
        for (double mean : {0.0, 8.0}) {
          const int64_t all = c.channels * c.spatial, maps = (c.channels + c.features) * c.spatial;
          Array x(dtype, drawn(c.batch * all, 1, mean)), dout(dtype, drawn(c.batch * maps, 2));
          Array out(dtype, c.batch * maps), dx(dtype, c.batch * all), again = out, dx_again = dx;
          MinibatchStddev args = {dtype,      x.data(),  dout.data(), out.data(), c.batch,
                                  c.channels, c.spatial, c.size,      c.features, kEps};
          genfast::cpu::minibatch_stddev(args, 1);
          args.out = again.data();
          genfast::cpu::minibatch_stddev(args, 4);
          args.out = dx.data();
          genfast::cpu::minibatch_stddev_backward(args, 1);
          args.out = dx_again.data();
          genfast::cpu::minibatch_stddev_backward(args, 3);
          CHECK(out == again && dx == dx_again, "%s %s: threads matter", isa, dtype_name(dtype));
          CHECK(out.guards_hold() && dx.guards_hold() && again.guards_hold() && dx_again.guards_hold(),
                "%s %s: wrote outside", isa, dtype_name(dtype));
          const int64_t each = args.feature_elements(), groups = args.batch / args.size;
          if (each == 0) continue;
          const double unit = dtype == DType::kFloat64 ? 1e-14 : 2e-6 * (mean > 0.0 ? 4.0 : 1.0);
          const double rounding = rounding_of(dtype);
          for (int64_t m = 0; m < groups; ++m) {
            for (int64_t f = 0; f < c.features; ++f) {
              double y = 0.0, total = 0.0, size = 0.0;
              for (int64_t i = f * each; i < (f + 1) * each; ++i) {
                y += deviation_of(args, x, m, i).sd / static_cast<double>(each);
              }
              for (int64_t k = 0; k < c.size; ++k) {
                const int64_t first = (m + k * groups) * maps;
                for (int64_t s = 0; s < c.spatial; ++s) {
                  const int64_t at = first + all + f * c.spatial + s;
                  CHECK(std::fabs(out.get(at) - y) <= (2 * unit + rounding) * y, "%s %s: deviation %.9g, not %.9g", isa,
                        dtype_name(dtype), out.get(at), y);
                  total += dout.get(at), size += std::fabs(dout.get(at));
                }
              }
              const double share = 1.0 / static_cast<double>(c.size * each);
              for (int64_t k = 0; k < c.size; ++k) {
                const int64_t sample = m + k * groups;
                for (int64_t i = f * each; i < (f + 1) * each; ++i) {
                  const Deviation d = deviation_of(args, x, m, i);
                  const double own = dout.get(sample * maps + i);
                  const double slope = share * (x.get(sample * all + i) - d.mean) / d.sd, want = own + total * slope;
                  const double allowed = 16 * unit * (std::fabs(own) + share * size) + rounding * std::fabs(want);
                  CHECK(out.get(sample * maps + i) == x.get(sample * all + i), "%s %s: x is not copied", isa,
                        dtype_name(dtype));
                  CHECK(std::fabs(dx.get(sample * all + i) - want) <= allowed,
                        "%s %s batch %d spatial %d: gradient %.9g, not %.9g", isa, dtype_name(dtype),
                        static_cast<int>(c.batch), static_cast<int>(c.spatial), dx.get(sample * all + i), want);
                }
              }
            }
          }
        }
      }
    }
  });
}
