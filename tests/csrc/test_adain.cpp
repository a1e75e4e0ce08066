// instance_norm and its backward against the formulas in float64: every dtype, sizes around vectors and blocks of sums,
// means that are large beside their deviation, planes of one value, threads, and what must stay untouched.
#include "check.h"
#include "gan/adain.h"
#include "isas.h"
#include "storage.h"

using genfast::DType;
using genfast::InstanceNorm;

namespace {

constexpr double kEps = 1e-5;

std::vector<double> drawn(int64_t count, uint64_t seed, double mean = 0.0) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> between(-1.0, 1.0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = mean + between(random);
  return values;
}

DType wide_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

struct Moments {
  double mean, rstd;
};

Moments moments_of(const Array& x, int64_t plane, int64_t size) {
  double mean = 0.0, square = 0.0;
  for (int64_t i = 0; i < size; ++i) mean += x.get(plane * size + i) / static_cast<double>(size);
  for (int64_t i = 0; i < size; ++i) {
    const double d = x.get(plane * size + i) - mean;
    square += d * d / static_cast<double>(size);
  }
  return {mean, 1.0 / std::sqrt(square + kEps)};
}

}  // namespace

TEST(instance_norm_values_and_gradients) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      for (const auto& [planes, size] : {std::pair<int64_t, int64_t>{1, 1},
                                         {3, 2},
                                         {5, 7},
                                         {2, 16},
                                         {3, 33},
                                         {4, 1025},
                                         {7, 2500},
                                         {0, 4},
                                         {3, 0}}) {
        for (int mode = 0; mode < 4; ++mode) {
          const bool affine = mode & 1, shifted = mode & 2;
          const int64_t count = planes * size;
          const DType wide = wide_of(dtype);
          Array x(dtype, drawn(count, 1, shifted ? 8.0 : 0.0)), dout(dtype, drawn(count, 2));
          Array scale(wide, drawn(planes, 3, 1.0)), shift(wide, drawn(planes, 4));
          Array out(dtype, count), dx(dtype, count), again = out;
          Array offset(wide, planes), rstd(wide, planes), dscale(wide, planes), dshift(wide, planes);
          InstanceNorm args = {};
          args.dtype = dtype, args.x = x.data(), args.out = out.data();
          args.scale = affine ? scale.data() : nullptr, args.shift = affine ? shift.data() : nullptr;
          args.offset = offset.data(), args.rstd = rstd.data(), args.planes = planes, args.size = size;
          args.eps = kEps;
          genfast::cpu::instance_norm(args, 1);
          args.out = again.data();
          genfast::cpu::instance_norm(args, 4);
          CHECK(out == again, "%s %s: threads matter", isa, dtype_name(dtype));
          args.out = dx.data(), args.dout = dout.data(), args.dscale = dscale.data(), args.dshift = dshift.data();
          genfast::cpu::instance_norm_backward(args, 1);
          Array dx_again(dtype, count), dscale_again(wide, planes), dshift_again(wide, planes);
          args.out = dx_again.data(), args.dscale = dscale_again.data(), args.dshift = dshift_again.data();
          genfast::cpu::instance_norm_backward(args, 3);
          CHECK(dx == dx_again && dscale == dscale_again && dshift == dshift_again, "%s %s: threads matter", isa,
                dtype_name(dtype));
          const double unit = dtype == DType::kFloat64 ? 2e-14 : 2e-6 * (shifted ? 4.0 : 1.0);
          for (int64_t p = 0; p < planes && size > 0; ++p) {
            const Moments m = moments_of(x, p, size);
            const double s = affine ? scale.get(p) : 1.0, t = affine ? shift.get(p) : 0.0;
            CHECK(std::fabs(x.get(p * size) + offset.get(p) - m.mean) <= unit * 10, "%s: mean", isa);
            CHECK(std::fabs(rstd.get(p) - m.rstd) <= 8 * unit * m.rstd, "%s %s size %d: rstd %.9g, not %.9g", isa,
                  dtype_name(dtype), static_cast<int>(size), rstd.get(p), m.rstd);
            double sum = 0.0, along = 0.0, most = 0.0;
            for (int64_t i = p * size; i < (p + 1) * size; ++i) {
              const double z = (x.get(i) - m.mean) * m.rstd;
              sum += dout.get(i), along += dout.get(i) * z;
              most = std::fmax(most, std::fabs(z));
            }
            const double sums = 4 * unit * static_cast<double>(size) * (1.0 + most);
            CHECK(std::fabs(dshift.get(p) - sum) <= sums, "%s %s: dshift", isa, dtype_name(dtype));
            CHECK(std::fabs(dscale.get(p) - along) <= sums, "%s %s: dscale %.9g, not %.9g", isa, dtype_name(dtype),
                  dscale.get(p), along);
            const double n = static_cast<double>(size);
            for (int64_t i = p * size; i < (p + 1) * size; ++i) {
              const double z = (x.get(i) - m.mean) * m.rstd, y = s * z + t;
              const double d = s * m.rstd * (dout.get(i) - sum / n - z * along / n);
              const double loose = 8 * unit * (1.0 + most);
              CHECK(std::fabs(out.get(i) - y) <=
                        loose * (std::fabs(s) + std::fabs(t)) + rounding_of(dtype) * std::fabs(y),
                    "%s %s mode %d size %d at %d: %.9g, not %.9g", isa, dtype_name(dtype), mode, static_cast<int>(size),
                    static_cast<int>(i), out.get(i), y);
              CHECK(std::fabs(dx.get(i) - d) <= loose * std::fabs(s) * m.rstd * 2 + rounding_of(dtype) * std::fabs(d),
                    "%s %s mode %d size %d gradient at %d: %.9g, not %.9g", isa, dtype_name(dtype), mode,
                    static_cast<int>(size), static_cast<int>(i), dx.get(i), d);
            }
          }
          CHECK(out.guards_hold() && dx.guards_hold() && rstd.guards_hold() && offset.guards_hold() &&
                    dscale.guards_hold() && dshift.guards_hold(),
                "%s %s: wrote outside", isa, dtype_name(dtype));
        }
      }
    }
  });
}

TEST(instance_norm_shares_planes_among_threads) {
  const int64_t planes = 9, size = 4001;  // enough elements that threads share them
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      Array x(dtype, drawn(planes * size, 5)), dout(dtype, drawn(planes * size, 6));
      Array first(dtype, planes * size), other = first;
      Array offset(DType::kFloat32, planes), rstd(DType::kFloat32, planes);
      Array dscale(DType::kFloat32, planes), dshift(DType::kFloat32, planes), dscale_one = dscale;
      for (int threads : {1, 2, 5}) {
        Array& out = threads == 1 ? first : other;
        InstanceNorm args = {};
        args.dtype = dtype, args.x = x.data(), args.dout = dout.data(), args.out = out.data();
        args.offset = offset.data(), args.rstd = rstd.data(), args.planes = planes, args.size = size, args.eps = kEps;
        genfast::cpu::instance_norm(args, threads);
        args.dscale = dscale.data(), args.dshift = dshift.data();
        genfast::cpu::instance_norm_backward(args, threads);
        if (threads == 1) dscale_one = dscale;
        CHECK(threads == 1 || (first == other && dscale == dscale_one), "%s: %d threads matter", isa, threads);
      }
    }
  });
}
