// The matrix product against double: sizes, transposed operands, threads, splits of the rows, and the error of products
// on bfloat16 tiles against that of a float32 product.
#include <algorithm>

#include "check.h"
#include "common/gemm/gemm.h"
#include "isas.h"
#include "storage.h"

namespace {

using Matrix = std::vector<float>;

enum class Kind { kStates, kSparse, kGrayscale, kNormal, kMixed };
constexpr Kind kKinds[] = {Kind::kStates, Kind::kSparse, Kind::kGrayscale, Kind::kNormal, Kind::kMixed};

Matrix random_matrix(Kind kind, int64_t rows, int64_t columns, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  Matrix values(static_cast<size_t>(rows * columns));
  for (size_t i = 0; i < values.size(); ++i) {
    const bool odd_row = i / static_cast<size_t>(columns) % 2 == 1;
    const Kind here = kind != Kind::kMixed ? kind : odd_row ? Kind::kNormal : Kind::kStates;
    const float u = uniform(random);
    values[i] = here == Kind::kNormal      ? normal(random)
                : here == Kind::kGrayscale ? std::round(u * 255.0f) / 255.0f
                                           : (u < (here == Kind::kSparse ? 0.02f : 0.5f) ? 1.0f : 0.0f);
  }
  return values;
}

Matrix transposed(const Matrix& x, int64_t rows, int64_t columns) {
  Matrix out(x.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c)
      out[static_cast<size_t>(c * rows + r)] = x[static_cast<size_t>(r * columns + c)];
  }
  return out;
}

// a [m, k] times b [k, n] through the kernels, from a transposed copy where asked; NaN around and under the result.
Matrix product(const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed,
               int threads) {
  constexpr size_t kGuard = 40;
  const Matrix left = a_transposed ? transposed(a, m, k) : a, right = b_transposed ? transposed(b, k, n) : b;
  Matrix out(static_cast<size_t>(m * n) + 2 * kGuard, NAN);
  genfast::cpu::matmul(left.data(), right.data(), out.data() + kGuard, m, n, k, a_transposed, b_transposed, threads);
  for (size_t i = 0; i < kGuard; ++i) CHECK(std::isnan(out[i]) && std::isnan(out[out.size() - 1 - i]), "a guard");
  return Matrix(out.begin() + kGuard, out.end() - kGuard);
}

// Sums of the products and of their magnitudes, in double.
struct Exact {
  std::vector<double> sums, magnitudes;
};

Exact exact_product(const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k) {
  Exact out = {std::vector<double>(static_cast<size_t>(m * n)), std::vector<double>(static_cast<size_t>(m * n))};
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t l = 0; l < k; ++l) {
      const double x = a[static_cast<size_t>(i * k + l)];
      for (int64_t j = 0; j < n; ++j) {
        const double term = x * b[static_cast<size_t>(l * n + j)];
        out.sums[static_cast<size_t>(i * n + j)] += term;
        out.magnitudes[static_cast<size_t>(i * n + j)] += std::fabs(term);
      }
    }
  }
  return out;
}

// One float32 chain of fused multiply-adds an element.
Matrix float32_product(const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k) {
  Matrix out(static_cast<size_t>(m * n), 0.0f);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t l = 0; l < k; ++l) {
      for (int64_t j = 0; j < n; ++j) {
        float& sum = out[static_cast<size_t>(i * n + j)];
        sum = std::fma(a[static_cast<size_t>(i * k + l)], b[static_cast<size_t>(l * n + j)], sum);
      }
    }
  }
  return out;
}

double worst_error(const Matrix& found, const Exact& exact) {
  double worst = 0.0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double error = std::fabs(found[i] - exact.sums[i]);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

bool same_bits(const Matrix& a, const Matrix& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

Matrix rows_of(const Matrix& x, int64_t columns, int64_t begin, int64_t end) {
  return Matrix(x.begin() + begin * columns, x.begin() + end * columns);
}

float rounded_part(float x) { return static_cast<float>(bfloat16_rounded(x)); }

}  // namespace

TEST(gemm_against_double) {
  struct Size {
    int64_t m, n, k;
  };
  const Size sizes[] = {{1, 1, 1},    {1, 33, 2},     {2, 7, 31},     {5, 31, 33},    {6, 32, 32},   {12, 17, 64},
                        {13, 64, 65}, {15, 129, 40},  {16, 100, 127}, {17, 65, 128},  {31, 48, 129}, {32, 160, 257},
                        {33, 1, 300}, {49, 130, 385}, {70, 300, 83},  {100, 40, 784}, {3, 515, 19},  {193, 34, 20}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    uint64_t seed = 1;
    for (const Size& size : sizes) {
      const int64_t m = size.m, n = size.n, k = size.k;
      for (int transposes = 0; transposes < 4; ++transposes) {
        const bool a_transposed = (transposes & 1) != 0, b_transposed = (transposes & 2) != 0;
        const Kind kind = kKinds[seed % 5];
        const Matrix a = random_matrix(kind, m, k, ++seed), b = random_matrix(Kind::kNormal, k, n, ++seed);
        const Matrix found = product(a, b, m, n, k, a_transposed, b_transposed, 1);
        const Exact exact = exact_product(a, b, m, n, k);
        for (size_t i = 0; i < found.size(); ++i) {
          const double bound = (4.0 + std::sqrt(static_cast<double>(k))) * 0x1p-24 * exact.magnitudes[i];
          CHECK(std::fabs(found[i] - exact.sums[i]) <= bound,
                "%s [%lld, %lld, %lld] transposes %d at %zu: %.9g, not %.9g", isa, static_cast<long long>(m),
                static_cast<long long>(n), static_cast<long long>(k), transposes, i, found[i], exact.sums[i]);
        }
        for (int threads = 2; threads <= 3; ++threads) {
          CHECK(same_bits(found, product(a, b, m, n, k, a_transposed, b_transposed, threads)), "%s threads %d", isa,
                threads);
        }
      }
    }
  });
}

// Rows alone, in pairs and in blocks have the bits that they have among all rows: also where the others are 0 or 1.
TEST(gemm_rows_do_not_depend_on_others) {
  constexpr int64_t kRows = 45, kColumns = 70, kDepth = 290;
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const bool a_transposed : {false, true}) {
      const Matrix a = random_matrix(Kind::kMixed, kRows, kDepth, 3),
                   b = random_matrix(Kind::kNormal, kDepth, kColumns, 4);
      const Matrix whole = product(a, b, kRows, kColumns, kDepth, a_transposed, false, 1);
      for (int64_t step : {1, 2, 7, 16, 31, 32, 33}) {
        for (int64_t begin = 0; begin < kRows; begin += step) {
          const int64_t end = std::min(begin + step, kRows);
          const Matrix part =
              product(rows_of(a, kDepth, begin, end), b, end - begin, kColumns, kDepth, a_transposed, false, 1);
          CHECK(same_bits(part, rows_of(whole, kColumns, begin, end)), "%s rows %lld ... %lld, transposed %d", isa,
                static_cast<long long>(begin), static_cast<long long>(end), a_transposed);
        }
      }
    }
  });
}

TEST(gemm_without_depth_rows_or_columns) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (const bool a_transposed : {false, true}) {
      const Matrix none, some(40, 1.0f);
      for (float x : product(none, none, 7, 140, 0, a_transposed, false, 2)) CHECK(x == 0.0f, "%s %g", isa, x);
      CHECK(product(none, some, 0, 5, 8, a_transposed, false, 2).empty());
      CHECK(product(some, none, 5, 0, 8, a_transposed, false, 2).empty());
    }
  });
}

// The largest error of a product is at most that of a float32 product; weights in one or two bfloat16 parts break it.
TEST(gemm_is_as_exact_as_float32) {
  constexpr int64_t kRows = 40, kColumns = 96;
  for (const int64_t depth : {100ll, 784ll, 2000ll}) {
    for (Kind kind : kKinds) {
      const Matrix a = random_matrix(kind, kRows, depth, 11);
      Matrix b = random_matrix(Kind::kNormal, depth, kColumns, 12), one = b, two = b;
      for (size_t i = 0; i < b.size(); ++i) {
        b[i] *= 0.1f;
        one[i] = rounded_part(b[i]);
        two[i] = one[i] + rounded_part(b[i] - one[i]);
      }
      const Exact exact = exact_product(a, b, kRows, kColumns, depth);
      const double bound = worst_error(float32_product(a, b, kRows, kColumns, depth), exact);
      for_each_isa([&](const genfast::Probe&, const char* isa) {
        const auto error = [&](const Matrix& weights, bool a_transposed) {
          return worst_error(product(a, weights, kRows, kColumns, depth, a_transposed, false, 1), exact);
        };
        for (const bool a_transposed : {false, true}) {
          const double found = error(b, a_transposed);
          // The baseline rounds products too; two or three terms round alike in any order.
          const double slack = isa == std::string("baseline") || (depth == 100 && kind == Kind::kSparse) ? 1.1 : 1.0;
          CHECK(found <= slack * bound, "%s depth %lld, kind %d: %.3g, float32 %.3g", isa,
                static_cast<long long>(depth), static_cast<int>(kind), found, bound);
        }
        CHECK(error(one, false) > 100.0 * bound, "%s: one part is too good", isa);
        if (depth < 2000) CHECK(error(two, false) > 1.5 * bound, "%s: two parts are too good", isa);
        if (depth == 784) {
          std::printf("     %s kind %d: within %.2g, float32 %.2g, one part %.2g, two %.2g\n", isa,
                      static_cast<int>(kind), error(b, false), bound, error(one, false), error(two, false));
        }
      });
    }
  }
}

TEST(gemm_of_numbers_that_are_not_finite) {
  constexpr int64_t kRows = 20, kColumns = 50, kDepth = 70;
  const float nan_of_low_bits = check::from_bits(0x7F800001u);
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const bool b_transposed : {false, true}) {
      for (const float bad : {INFINITY, -INFINITY, static_cast<float>(NAN), nan_of_low_bits}) {
        Matrix a = random_matrix(Kind::kStates, kRows, kDepth, 5),
               b = random_matrix(Kind::kNormal, kDepth, kColumns, 6);
        a[3 * kDepth + 8] = bad;
        b[9 * kColumns + 33] = bad;
        const Matrix found = product(a, b, kRows, kColumns, kDepth, false, b_transposed, 1);
        for (int64_t i = 0; i < kRows; ++i) {
          for (int64_t j = 0; j < kColumns; ++j) {
            const float x = found[static_cast<size_t>(i * kColumns + j)];
            CHECK(std::isfinite(x) == (i != 3 && j != 33), "%s [%lld, %lld] of %g: %g", isa, static_cast<long long>(i),
                  static_cast<long long>(j), bad, x);
            if (std::isnan(bad) && (i == 3 || j == 33)) CHECK(std::isnan(x), "%s: %g, not NaN", isa, x);
          }
        }
      }
    }
  });
}

// Tiles take subnormal numbers for zero: an element and its parts lose at most 2^-125.
TEST(gemm_of_tiny_and_huge_numbers) {
  constexpr int64_t kRows = 9, kColumns = 40, kDepth = 50;
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const float scale : {0x1p-130f, 0x1p-118f, 0x1p-60f, 0x1p60f, 0x1p115f}) {
      const Matrix a = random_matrix(Kind::kStates, kRows, kDepth, 7);
      Matrix b = random_matrix(Kind::kNormal, kDepth, kColumns, 8);
      for (float& x : b) x *= scale;
      const Matrix found = product(a, b, kRows, kColumns, kDepth, false, false, 1);
      const Exact exact = exact_product(a, b, kRows, kColumns, kDepth);
      for (size_t i = 0; i < found.size(); ++i) {
        const double bound = 11.0 * 0x1p-24 * exact.magnitudes[i] + kDepth * 0x1p-125;
        CHECK(std::fabs(found[i] - exact.sums[i]) <= bound, "%s scale %g: %g, not %g", isa, scale, found[i],
              exact.sums[i]);
      }
    }
  });
}

// Packed panels in the types and with the options of a product with weights, through a product with single rows of
// ones.
TEST(gemm_packs_every_type) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (genfast::DType dtype : {genfast::DType::kFloat32, genfast::DType::kBFloat16, genfast::DType::kFloat16}) {
      const auto parts = [&](bool rounded, const float* scale) {
        return genfast::Pack{dtype, nullptr, 1, 1, false, rounded, scale, nullptr}.parts();
      };
      const float scale = 1.0f;
      CHECK(parts(true, nullptr) == 1 && parts(true, &scale) == 1 && parts(false, &scale) == 3);
      CHECK(parts(false, nullptr) == (dtype == genfast::DType::kBFloat16 ? 1 : 3), "%s %s", isa, dtype_name(dtype));
    }
    // What a product never reads: panels do not reach beyond packed_floats().
    for (const bool is_transposed : {false, true}) {
      for (int64_t rows : {1, 31, 32, 33, 100}) {
        const int64_t columns = 45;
        const Matrix w = random_matrix(Kind::kNormal, rows, columns, 9);
        const int64_t depth = is_transposed ? columns : rows, units = is_transposed ? rows : columns;
        Matrix packed(static_cast<size_t>(genfast::cpu::packed_floats(depth, units)) + 8, 77.0f);
        genfast::cpu::pack(
            {genfast::DType::kFloat32, w.data(), rows, columns, is_transposed, false, nullptr, packed.data()}, 2);
        for (size_t i = packed.size() - 8; i < packed.size(); ++i) CHECK(packed[i] == 77.0f, "%s", isa);
      }
    }
  });
}
