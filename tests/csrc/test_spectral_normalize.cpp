// spectral_normalize and its backward against the formulas in float64: several layers in a call, rows outside and
// inside, iterations and none, norms below eps, every dtype, threads, and what must stay untouched.
#include <memory>

#include "check.h"
#include "gan/spectral_normalize.h"
#include "isas.h"
#include "storage.h"

using genfast::DType;
using genfast::SpectralLayer;
using genfast::SpectralNormalize;

namespace {

std::vector<double> drawn(int64_t count, uint64_t seed, double size = 1.0) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> between(-size, size);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

std::vector<double> unit(std::vector<double> x, double eps) {
  double square = 0.0;
  for (double v : x) square += v * v;
  for (double& v : x) v /= std::fmax(std::sqrt(square), eps);
  return x;
}

std::vector<double> values_of(const Array& x) {
  std::vector<double> values(static_cast<size_t>(x.size()));
  for (int64_t i = 0; i < x.size(); ++i) values[static_cast<size_t>(i)] = x.get(i);
  return values;
}

// Where entry (row, column) of a layer's matrix lies.
int64_t place(const SpectralLayer& l, int64_t row, int64_t column) {
  return (column / l.inner * l.rows + row) * l.inner + column % l.inner;
}

std::vector<double> times(const SpectralLayer& l, const Array& w, const std::vector<double>& v, bool transposed) {
  std::vector<double> out(static_cast<size_t>(transposed ? l.columns() : l.rows), 0.0);
  for (int64_t r = 0; r < l.rows; ++r) {
    for (int64_t c = 0; c < l.columns(); ++c) {
      const int64_t to = transposed ? c : r, from = transposed ? r : c;
      out[static_cast<size_t>(to)] += w.get(place(l, r, c)) * v[static_cast<size_t>(from)];
    }
  }
  return out;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double total = 0.0;
  for (size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
  return total;
}

// The arrays of one layer.
struct Layer {
  Array weight, out, u, v, new_u, new_v, dout, dw;
  SpectralLayer spec;

  Layer(DType dtype, DType wide, int64_t rows, int64_t outer, int64_t inner, uint64_t seed, double size)
      : weight(dtype, drawn(rows * outer * inner, seed, size)),
        out(dtype, rows * outer * inner),
        u(wide, unit(drawn(rows, seed + 1), 1e-12)),
        v(wide, unit(drawn(outer * inner, seed + 2), 1e-12)),
        new_u(wide, rows),
        new_v(wide, outer * inner),
        dout(dtype, drawn(rows * outer * inner, seed + 3)),
        dw(dtype, rows * outer * inner),
        spec{} {
    spec = {weight.data(), out.data(), u.data(), v.data(), new_u.data(), new_v.data(), nullptr, rows, outer, inner};
  }
};

struct Shape {
  int64_t rows, outer, inner;
};

void compare(const Array& got, const std::vector<double>& want, double bound, DType stored, const char* what,
             const char* isa) {
  for (int64_t i = 0; i < got.size(); ++i) {
    const double y = want[static_cast<size_t>(i)];
    if (stored == DType::kFloat16 && std::isinf(half_rounded(y)) && got.get(i) == half_rounded(y)) continue;
    CHECK(std::fabs(got.get(i) - y) <= bound + rounding_of(stored) * std::fabs(y),
          "%s %s %s at %d of %d: %.9g, not %.9g", isa, dtype_name(stored), what, static_cast<int>(i),
          static_cast<int>(got.size()), got.get(i), y);
  }
}

double largest(const std::vector<double>& x) {
  double most = 0.0;
  for (double v : x) most = std::fmax(most, std::fabs(v));
  return most;
}

}  // namespace

TEST(spectral_normalize_values_and_gradients) {
  const Shape shapes[] = {{1, 1, 1}, {5, 1, 7}, {3, 4, 9}, {64, 1, 33}, {17, 3, 1}, {2, 1, 3000}, {130, 2, 140}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      for (int64_t iterations : {0, 1, 3}) {
        for (double eps : {1e-12, 2.0}) {  // with the second one some norms are below it
          const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
          std::vector<std::unique_ptr<Layer>> layers;
          std::vector<SpectralLayer> specs, other;
          for (const Shape& s : shapes) {
            layers.push_back(std::make_unique<Layer>(dtype, wide, s.rows, s.outer, s.inner, 10 * layers.size(), 0.5));
            specs.push_back(layers.back()->spec);
          }
          const int64_t count = static_cast<int64_t>(specs.size());
          Array sigma(wide, count), dsigma(wide, drawn(count, 99)), sigma_again = sigma;
          genfast::cpu::spectral_normalize({dtype, specs.data(), count, sigma.data(), nullptr, iterations, eps}, 1);
          std::vector<Array> kept;
          for (const auto& l : layers) kept.insert(kept.end(), {l->out, l->new_u, l->new_v});
          genfast::cpu::spectral_normalize({dtype, specs.data(), count, sigma_again.data(), nullptr, iterations, eps},
                                           4);
          bool same = sigma == sigma_again;
          for (size_t i = 0; i < layers.size(); ++i) {
            same = same && layers[i]->out == kept[3 * i] && layers[i]->new_u == kept[3 * i + 1] &&
                   layers[i]->new_v == kept[3 * i + 2];
          }
          CHECK(same, "%s %s: threads matter", isa, dtype_name(dtype));
          const double small = dtype == DType::kFloat64 ? 1e-13 : 4e-6;
          for (size_t i = 0; i < layers.size(); ++i) {
            Layer& l = *layers[i];
            const int64_t at = static_cast<int64_t>(i);
            std::vector<double> u = values_of(l.u), v = values_of(l.v);
            for (int64_t turn = 0; turn < iterations; ++turn) {
              u = unit(times(l.spec, l.weight, v, false), eps);
              v = unit(times(l.spec, l.weight, u, true), eps);
            }
            const std::vector<double> product = times(l.spec, l.weight, v, false);
            const double s = dot(u, product), size = std::sqrt(dot(product, product)) + 1e-30;
            // Errors of the power iteration are those of its products, which norms near zero enlarge.
            const double loose = small * (iterations > 0 ? 8.0 : 1.0);
            if (iterations > 0) {
              compare(l.new_u, u, loose, wide, "u", isa);
              compare(l.new_v, v, loose, wide, "v", isa);
            }
            CHECK(std::fabs(sigma.get(at) - s) <= 4 * loose * size, "%s %s layer %d: sigma %.9g, not %.9g", isa,
                  dtype_name(dtype), static_cast<int>(i), sigma.get(at), s);
            std::vector<double> want = values_of(l.weight);
            const double used = sigma.get(at);
            for (double& x : want) x /= used;
            compare(l.out, want, small * largest(want), dtype, "out", isa);
            CHECK(l.out.guards_hold() && l.new_u.guards_hold() && l.new_v.guards_hold(), "%s: wrote outside", isa);
            if (iterations == 0) CHECK(std::isnan(l.new_u.get(0)), "%s: u written without an iteration", isa);
            // What the backward takes as u and v are those of the forward.
            if (iterations > 0) specs[i].u = l.new_u.data(), specs[i].v = l.new_v.data();
            specs[i].dout = l.dout.data(), specs[i].out = l.dw.data();
          }
          for (bool given : {true, false}) {
            SpectralNormalize args = {dtype, specs.data(), count, sigma.data(), given ? dsigma.data() : nullptr,
                                      0,     0.0};
            genfast::cpu::spectral_normalize_backward(args, 3);
            std::vector<Array> first;
            for (const auto& l : layers) first.push_back(l->dw);
            genfast::cpu::spectral_normalize_backward(args, 1);
            for (size_t i = 0; i < layers.size(); ++i) {
              Layer& l = *layers[i];
              CHECK(l.dw == first[i], "%s %s: threads matter", isa, dtype_name(dtype));
              const std::vector<double> u = values_of(iterations > 0 ? l.new_u : l.u);
              const std::vector<double> v = values_of(iterations > 0 ? l.new_v : l.v);
              const double s = sigma.get(static_cast<int64_t>(i));
              double along = 0.0, terms = 0.0;
              for (int64_t k = 0; k < l.weight.size(); ++k) {
                along += l.dout.get(k) * l.weight.get(k), terms += std::fabs(l.dout.get(k) * l.weight.get(k));
              }
              along /= s, terms /= std::fabs(s);
              if (given) along -= dsigma.get(static_cast<int64_t>(i)) * s, terms += std::fabs(s);
              std::vector<double> want(static_cast<size_t>(l.weight.size()));
              for (int64_t r = 0; r < l.spec.rows; ++r) {
                for (int64_t c = 0; c < l.spec.columns(); ++c) {
                  const int64_t k = place(l.spec, r, c);
                  const double step = along * u[static_cast<size_t>(r)] * v[static_cast<size_t>(c)];
                  want[static_cast<size_t>(k)] = (l.dout.get(k) - step) / s;
                }
              }
              compare(l.dw, want, small * (1.0 + terms) / std::fabs(s), dtype, "gradient", isa);
              CHECK(l.dw.guards_hold(), "%s: wrote outside", isa);
            }
          }
        }
      }
    }
  });
}

TEST(spectral_normalize_of_nothing) {
  Array sigma(DType::kFloat32, 1);
  genfast::cpu::spectral_normalize({DType::kFloat32, nullptr, 0, sigma.data(), nullptr, 1, 1e-12}, 2);
  genfast::cpu::spectral_normalize_backward({DType::kFloat32, nullptr, 0, sigma.data(), nullptr, 0, 0.0}, 2);
  CHECK(std::isnan(sigma.get(0)), "written");
}
