// filtered_lrelu: its three modes by the definition, every dtype; threads and bands, NaN, and what must stay untouched.
#include "check.h"
#include "gan/filtered_lrelu.h"
#include "isas.h"
#include "storage.h"

using genfast::DType;
using genfast::FilteredLrelu;

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
  int64_t planes, height, width, mid_height, mid_width, out_height, out_width, up_taps, down_taps;
  int64_t up_y, up_x, down_y, down_x, pad_y, pad_x;
};

// [rows, columns]: an upsampling by `up`, or a downsampling by `down`, along one axis.
std::vector<double> matrix(const Array& f, bool correlate, int64_t outputs, int64_t inputs, int64_t up, int64_t down,
                           int64_t pad) {
  std::vector<double> entries(static_cast<size_t>(outputs * inputs), 0.0);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < inputs; ++i) {
      const int64_t k = i * up + pad - o * down;
      if (k < 0 || k >= f.size()) continue;
      entries[static_cast<size_t>(o * inputs + i)] = f.get(correlate ? k : f.size() - 1 - k);
    }
  }
  return entries;
}

// rows x columns^T, or rows^T x columns where `turned`.
std::vector<double> applied(const std::vector<double>& rows, const std::vector<double>& columns,
                            const std::vector<double>& x, int64_t out_h, int64_t out_w, int64_t in_h, int64_t in_w,
                            bool turned) {
  std::vector<double> half(static_cast<size_t>(out_h * in_w), 0.0), out(static_cast<size_t>(out_h * out_w), 0.0);
  for (int64_t i = 0; i < out_h; ++i)
    for (int64_t k = 0; k < in_h; ++k)
      for (int64_t j = 0; j < in_w; ++j)
        half[static_cast<size_t>(i * in_w + j)] +=
            rows[static_cast<size_t>(turned ? k * out_h + i : i * in_h + k)] * x[static_cast<size_t>(k * in_w + j)];
  for (int64_t i = 0; i < out_h; ++i)
    for (int64_t j = 0; j < out_w; ++j)
      for (int64_t k = 0; k < in_w; ++k)
        out[static_cast<size_t>(i * out_w + j)] += half[static_cast<size_t>(i * in_w + k)] *
                                                   columns[static_cast<size_t>(turned ? k * out_w + j : j * in_w + k)];
  return out;
}

std::vector<double> plane_of(const Array& x, int64_t plane, int64_t size, double bias) {
  std::vector<double> values;
  for (int64_t i = 0; i < size; ++i) values.push_back(x.get(plane * size + i) + bias);
  return values;
}

}  // namespace

TEST(filtered_lrelu_values) {
  const Case cases[] = {
      {3, 6, 7, 13, 15, 5, 6, 4, 4, 2, 2, 2, 2, 3, 3},   {2, 5, 20, 5, 20, 5, 20, 1, 1, 1, 1, 1, 1, 0, 0},
      {1, 4, 9, 9, 30, 4, 7, 12, 6, 2, 3, 1, 4, 5, 4},   {2, 3, 40, 12, 37, 4, 36, 5, 2, 4, 1, 3, 1, 2, 1},
      {1, 60, 5, 61, 10, 30, 5, 2, 3, 1, 2, 2, 2, 1, 0}, {1, 0, 4, 5, 6, 4, 5, 3, 2, 2, 2, 1, 1, 4, 1},
      {1, 4, 4, 3, 4, 2, 3, 2, 2, 1, 1, 1, 1, -1, 0},    {0, 4, 4, 5, 5, 4, 4, 2, 2, 1, 1, 1, 1, 1, 1}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Case& c : cases) {
      for (DType dtype : kDTypes) {
        for (int variant = 0; variant < 12; ++variant) {
          const auto mode = static_cast<FilteredLrelu::Mode>(variant % 3);
          const bool turned = mode == FilteredLrelu::kTranspose, correlate = variant / 3 % 2, bounded = variant / 6;
          const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
          const int64_t in = c.height * c.width, out_size = c.out_height * c.out_width;
          const int64_t mid = c.mid_height * c.mid_width, results = turned ? in : out_size;
          Array v(dtype, drawn(c.planes * (turned ? out_size : in), 1)), gate(dtype, drawn(c.planes * in, 2));
          Array v_bias(wide, drawn(c.planes, 3)), gate_bias(wide, drawn(c.planes, 4));
          Array fu(wide, drawn(c.up_taps, 5)), fd(wide, drawn(c.down_taps, 6));
          Array out(dtype, c.planes * results), again = out;
          FilteredLrelu args = {};
          args.dtype = dtype, args.mode = mode, args.v = v.data(), args.gate = gate.data(), args.out = out.data();
          args.v_bias = turned || correlate ? nullptr : v_bias.data();
          args.gate_bias = mode == FilteredLrelu::kForward ? nullptr : gate_bias.data();
          args.up_filter = fu.data(), args.down_filter = fd.data();
          args.up_taps = c.up_taps, args.down_taps = c.down_taps, args.correlate = correlate;
          args.batch = 1, args.channels = c.planes, args.in_height = c.height, args.in_width = c.width;
          args.mid_height = c.mid_height, args.mid_width = c.mid_width;
          args.out_height = c.out_height, args.out_width = c.out_width;
          args.up_y = c.up_y, args.up_x = c.up_x, args.down_y = c.down_y, args.down_x = c.down_x;
          args.pad_y = c.pad_y, args.pad_x = c.pad_x;
          args.gain = 1.5, args.slope = 0.25, args.limit = bounded ? 2.0 : INFINITY;
          CHECK(genfast::cpu::filtered_lrelu(args, 1));
          args.out = again.data();
          CHECK(genfast::cpu::filtered_lrelu(args, 5));
          CHECK(out == again, "%s %s variant %d: threads matter", isa, dtype_name(dtype), variant);
          CHECK(out.guards_hold(), "%s %s variant %d: wrote outside", isa, dtype_name(dtype), variant);
          const double up_gain = static_cast<double>(c.up_y * c.up_x);
          const auto up_y = matrix(fu, correlate, c.mid_height, c.height, c.up_y, 1, c.pad_y);
          const auto up_x = matrix(fu, correlate, c.mid_width, c.width, c.up_x, 1, c.pad_x);
          const auto down_y = matrix(fd, correlate, c.out_height, c.mid_height, 1, c.down_y, 0);
          const auto down_x = matrix(fd, correlate, c.out_width, c.mid_width, 1, c.down_x, 0);
          for (int64_t plane = 0; plane < c.planes; ++plane) {
            const Array& from = mode == FilteredLrelu::kForward ? v : gate;
            const double by =
                mode == FilteredLrelu::kForward ? (args.v_bias ? v_bias.get(plane) : 0.0) : gate_bias.get(plane);
            auto a =
                applied(up_y, up_x, plane_of(from, plane, in, by), c.mid_height, c.mid_width, c.height, c.width, false);
            std::vector<double> middle(static_cast<size_t>(mid));
            if (turned) {
              middle = applied(down_y, down_x, plane_of(v, plane, out_size, 0.0), c.mid_height, c.mid_width,
                               c.out_height, c.out_width, true);
            } else if (mode == FilteredLrelu::kTangent) {
              middle = applied(up_y, up_x, plane_of(v, plane, in, args.v_bias ? v_bias.get(plane) : 0.0), c.mid_height,
                               c.mid_width, c.height, c.width, false);
              for (double& x : middle) x *= up_gain;
            }
            bool near = false;  // where rounding may decide: a kink or a bound of act
            for (size_t i = 0; i < middle.size(); ++i) {
              const double x = a[i] * up_gain, factor = 1.5 * (x > 0 ? 1.0 : 0.25), y = x * factor;
              near = near || (mode != FilteredLrelu::kForward &&
                              ((x != 0 && std::fabs(x) < 1e-5) || std::fabs(std::fabs(y) - args.limit) < 1e-4));
              if (mode == FilteredLrelu::kForward) {
                middle[i] = y > args.limit ? args.limit : y < -args.limit ? -args.limit : y;
              } else {
                middle[i] *= std::fabs(y) > args.limit ? 0.0 : factor;
              }
            }
            if (near) continue;
            auto want =
                turned ? applied(up_y, up_x, middle, c.height, c.width, c.mid_height, c.mid_width, true)
                       : applied(down_y, down_x, middle, c.out_height, c.out_width, c.mid_height, c.mid_width, false);
            double largest = 0.0;
            for (double& x : want) {
              if (turned) x *= up_gain;
              largest = std::fabs(x) > largest ? std::fabs(x) : largest;
            }
            for (int64_t i = 0; i < results; ++i) {
              const double got = out.get(plane * results + i), exact = want[static_cast<size_t>(i)];
              const double allowed =
                  (dtype == DType::kFloat64 ? 1e-13 : 1e-5) * largest + rounding_of(dtype) * std::fabs(exact) + 1e-7;
              CHECK(std::fabs(got - exact) <= allowed, "%s %s variant %d width %d at %d: %.9g, not %.9g", isa,
                    dtype_name(dtype), variant, static_cast<int>(c.width), static_cast<int>(i), got, exact);
            }
          }
        }
      }
    }
  });
}

TEST(filtered_lrelu_refuses_what_it_cannot) {
  Array x(DType::kFloat32, 4), out(DType::kFloat32, 4), f(DType::kFloat32, 64);
  FilteredLrelu args = {};
  args.dtype = DType::kFloat32, args.v = x.data(), args.out = out.data();
  args.up_filter = args.down_filter = f.data(), args.up_taps = args.down_taps = 1, args.batch = args.channels = 1;
  args.in_height = args.in_width = args.mid_height = args.mid_width = args.out_height = args.out_width = 2;
  args.up_y = args.up_x = args.down_y = args.down_x = 1;
  for (int wrong = 0; wrong < 4; ++wrong) {
    FilteredLrelu bad = args;
    if (wrong == 0) bad.up_taps = FilteredLrelu::kMostTaps + 1;
    if (wrong == 1) bad.down_x = 0;
    if (wrong == 2) bad.pad_y = INT64_MIN;
    if (wrong == 3) bad.mid_width = int64_t{1} << 50;
    CHECK(!genfast::cpu::filtered_lrelu(bad, 1), "%d", wrong);
    CHECK(std::isnan(out.get(0)), "%d: written", wrong);
  }
}
