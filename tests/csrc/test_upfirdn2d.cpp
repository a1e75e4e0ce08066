// upfirdn2d: values by the definition for planar and channels-last tensors, separable filters and not, every dtype;
// threads, and what must stay untouched.
#include "check.h"
#include "gan/upfirdn2d.h"
#include "isas.h"
#include "storage.h"

using genfast::DType;
using genfast::Upfirdn2d;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

std::vector<double> drawn(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> between(-2.0, 2.0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

struct Case {
  int64_t batch, channels, height, width, out_height, out_width, taps_y, taps_x;
  int64_t up_y, up_x, down_y, down_x, pad_y, pad_x;
};

// Element [n, c, i, j] and the sum of its absolute terms.
void exact(const Upfirdn2d& a, const Array& x, const Array& f, int64_t n, int64_t c, int64_t i, int64_t j, double* out,
           double* scale) {
  *out = *scale = 0.0;
  for (int64_t k = 0; k < a.taps_y; ++k) {
    for (int64_t l = 0; l < a.taps_x; ++l) {
      const int64_t y = i * a.down_y + k - a.pad_y, z = j * a.down_x + l - a.pad_x;
      if (y < 0 || z < 0 || y % a.up_y != 0 || z % a.up_x != 0) continue;
      if (y / a.up_y >= a.height || z / a.up_x >= a.width) continue;
      const int64_t row = a.correlate ? k : a.taps_y - 1 - k, column = a.correlate ? l : a.taps_x - 1 - l;
      const double weight = a.separable ? f.get(row) * f.get(column) : f.get(row * a.taps_x + column);
      const double term =
          a.gain * weight * x.get(n * a.x_batch + c * a.x_channel + y / a.up_y * a.x_row + z / a.up_x * a.x_column);
      *out += term;
      *scale += std::fabs(term);
    }
  }
}

}  // namespace

TEST(upfirdn2d_values) {
  const Case cases[] = {
      {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0},        {2, 3, 5, 7, 10, 14, 4, 4, 2, 2, 1, 1, 2, 2},
      {1, 2, 10, 33, 5, 16, 4, 4, 1, 1, 2, 2, 1, 1},     {1, 9, 6, 5, 9, 4, 3, 3, 3, 2, 2, 3, 1, 2},
      {2, 17, 3, 4, 6, 9, 6, 6, 2, 2, 1, 1, 3, 3},       {1, 2, 4, 70, 9, 69, 12, 12, 1, 1, 1, 1, 9, 5},
      {1, 1, 4, 40, 3, 7, 5, 5, 1, 2, 1, 9, -1, -3},     {1, 3, 2, 3, 8, 20, 2, 2, 1, 5, 1, 1, 4, 3},
      {1, 2, 3, 3, 4, 5, 3, 3, 1, 1, 1, 1, 40, -40},     {1, 2, 0, 3, 4, 5, 3, 3, 1, 1, 1, 1, 1, 1},
      {0, 2, 3, 3, 4, 5, 3, 3, 1, 1, 1, 1, 1, 1},        {1, 70, 2, 3, 4, 6, 2, 2, 2, 2, 1, 1, 0, 1},
      {1, 1, 2, 9000, 2, 18001, 3, 3, 1, 2, 1, 1, 1, 1}, {1, 1, 3, 2, 70000, 3, 2, 2, 65535, 1, 3, 1, 0, 1}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Case& c : cases) {
      for (DType dtype : kDTypes) {
        for (int mode = 0; mode < 8; ++mode) {
          const bool separable = mode & 1, correlate = mode & 2, last = mode & 4;
          if (separable && c.taps_y != c.taps_x) continue;
          if (c.out_height * c.out_width > 10000 && (mode > 1 || dtype != DType::kFloat32)) continue;
          const int64_t count = c.batch * c.channels * c.height * c.width;
          const int64_t outputs = c.batch * c.channels * c.out_height * c.out_width;
          const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
          Array x(dtype, drawn(count, 1)), out(dtype, outputs), again = out;
          Array f(wide, drawn(separable ? c.taps_x : c.taps_y * c.taps_x, 2));
          Upfirdn2d args = {};
          args.dtype = dtype, args.x = x.data(), args.out = out.data(), args.filter = f.data();
          args.separable = separable, args.correlate = correlate, args.channels_last = last;
          args.batch = c.batch, args.channels = c.channels, args.height = c.height, args.width = c.width;
          args.out_height = c.out_height, args.out_width = c.out_width;
          args.x_batch = c.channels * c.height * c.width;
          args.x_channel = last ? 1 : c.height * c.width;
          args.x_row = last ? c.width * c.channels : c.width, args.x_column = last ? c.channels : 1;
          args.taps_y = c.taps_y, args.taps_x = c.taps_x;
          args.up_y = c.up_y, args.up_x = c.up_x, args.down_y = c.down_y, args.down_x = c.down_x;
          args.pad_y = c.pad_y, args.pad_x = c.pad_x, args.gain = 1.5;
          CHECK(genfast::cpu::upfirdn2d(args, 1));
          args.out = again.data();
          CHECK(genfast::cpu::upfirdn2d(args, 4));
          const double bound = dtype == DType::kFloat64 ? 1e-15 : 1e-6;
          for (int64_t at = 0; at < outputs; ++at) {
            const int64_t j = last ? at / c.channels % c.out_width : at % c.out_width;
            const int64_t i = (last ? at / c.channels : at) / c.out_width % c.out_height;
            const int64_t channel = last ? at % c.channels : at / c.out_width / c.out_height % c.channels;
            const int64_t n = at / (c.channels * c.out_height * c.out_width);
            double want, scale;
            exact(args, x, f, n, channel, i, j, &want, &scale);
            const double got = out.get(at), allowed = bound * scale + rounding_of(dtype) * std::fabs(want) + 1e-7;
            CHECK(std::fabs(got - want) <= allowed, "%s %s mode %d width %d at %d: %.9g, not %.9g", isa,
                  dtype_name(dtype), mode, static_cast<int>(c.width), static_cast<int>(at), got, want);
          }
          CHECK(out == again, "%s %s mode %d: threads matter", isa, dtype_name(dtype), mode);
          CHECK(out.guards_hold() && again.guards_hold(), "%s %s mode %d: wrote outside", isa, dtype_name(dtype), mode);
        }
      }
    }
  });
}

TEST(upfirdn2d_refuses_what_would_overflow) {
  Array x(DType::kFloat32, 4), out(DType::kFloat32, 4), f(DType::kFloat32, 1);
  Upfirdn2d args = {};
  args.dtype = DType::kFloat32, args.x = x.data(), args.out = out.data(), args.filter = f.data();
  args.separable = true, args.batch = args.channels = 1, args.height = args.width = 2;
  args.out_height = args.out_width = 2, args.taps_y = args.taps_x = 1;
  args.up_y = args.up_x = args.down_y = args.down_x = 1;
  for (int wrong = 0; wrong < 4; ++wrong) {
    Upfirdn2d bad = args;
    if (wrong == 0) bad.pad_x = INT64_MAX;
    if (wrong == 1) bad.up_y = 0;
    if (wrong == 2) bad.down_x = int64_t{1} << 40;
    if (wrong == 3) bad.taps_x = 0;
    CHECK(!genfast::cpu::upfirdn2d(bad, 1), "%d", wrong);
    CHECK(std::isnan(out.get(0)), "%d: written", wrong);
  }
}
