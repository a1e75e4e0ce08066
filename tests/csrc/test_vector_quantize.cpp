// nearest_code and code_sums: indices of numbers whose distances float64 holds exactly, with many ties; the screening's
// bound on every instruction set; sums.
#include "check.h"
#include "isas.h"
#include "storage.h"
#include "vae/vector_quantize.h"
#include "vae/vector_quantize_exact.h"

using genfast::DType;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

std::vector<double> integers(int64_t count, uint64_t seed, int low, int high, double offset) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int> between(low, high);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random) + offset;
  return values;
}

std::vector<double> normals(int64_t count, uint64_t seed, double scale) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = normal(random);
  return values;
}

int64_t nearest(const Array& z, const Array& codebook, int64_t row, int64_t codes, int64_t dim) {
  int64_t best = 0;
  long double least = INFINITY;
  for (int64_t k = 0; k < codes; ++k) {
    long double total = 0;
    for (int64_t i = 0; i < dim; ++i) {
      const long double gap = static_cast<long double>(z.get(row * dim + i)) - codebook.get(k * dim + i);
      total += gap * gap;
    }
    if (total < least) {
      least = total;
      best = k;
    }
  }
  return best;
}

struct Case {
  int64_t rows, codes, dim;
};

}  // namespace

TEST(vector_quantize_indices) {
  const Case cases[] = {{1, 1, 1}, {3, 70, 2}, {130, 33, 5}, {67, 200, 64}, {5, 129, 150}, {40, 300, 17}};
  for (genfast::Choice pairs : {genfast::Choice::kOff, genfast::Choice::kOn})
    for_each_isa([&](const genfast::Probe&, const char* isa) {
      genfast::set_bfloat16_pairs(pairs);
      if (pairs == genfast::Choice::kOn && !genfast::use_bfloat16_pairs()) return;
      for (const Case& c : cases) {
        for (DType dtype : kDTypes) {
          for (int kind = 0; kind < 3; ++kind) {  // few integers: ties; around a distant point: near ties; normal
            const double offset = kind == 1 ? 120.0 : 0.0;
            const auto drawn = [&](int64_t count, uint64_t seed) {
              return kind == 2 ? normals(count, seed, 1.0) : integers(count, seed, -2, 2, offset);
            };
            Array z(dtype, drawn(c.rows * c.dim, 1)), codebook(dtype, drawn(c.codes * c.dim, 2)),
                codes(dtype, c.rows * c.dim);
            Array distances(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32, c.rows);
            std::vector<int64_t> indices(static_cast<size_t>(c.rows), -1);
            const genfast::NearestCode args = {dtype, z.data(),       codebook.data(),  c.rows,      c.codes,
                                               c.dim, indices.data(), distances.data(), codes.data()};
            CHECK(genfast::cpu::nearest_code(args, 2) == genfast::NearestCodeStatus::kDone);
            for (int64_t n = 0; n < c.rows; ++n) {
              const int64_t want = nearest(z, codebook, n, c.codes, c.dim), got = indices[static_cast<size_t>(n)];
              CHECK(got == want, "%s dtype %d kind %d rows %ld codes %ld dim %ld: row %ld has %ld, not %ld", isa,
                    static_cast<int>(dtype), kind, static_cast<long>(c.rows), static_cast<long>(c.codes),
                    static_cast<long>(c.dim), static_cast<long>(n), static_cast<long>(got), static_cast<long>(want));
              double total = 0.0;
              for (int64_t i = 0; i < c.dim; ++i) {
                CHECK(codes.get(n * c.dim + i) == codebook.get(got * c.dim + i));
                const double gap = z.get(n * c.dim + i) - codebook.get(got * c.dim + i);
                total += gap * gap;
              }
              CHECK(std::fabs(distances.get(n) - total) <= 2e-6 * total);
            }
          }
        }
      }
    });
  genfast::set_bfloat16_pairs(genfast::Choice::kAuto);
}

TEST(vector_quantize_exact_comparison) {
  const double tiny = 0x1p-1074, huge = 0x1.fffffffffffffp1023;
  const auto nearer = [](std::vector<double> z, std::vector<double> a, std::vector<double> b) {
    return genfast::exactly_nearer(z.data(), a.data(), b.data(), static_cast<int64_t>(z.size()));
  };
  CHECK(nearer({0, 0}, {1, 0}, {1, 0x1p-53}));
  CHECK(!nearer({0, 0}, {1, 0x1p-53}, {1, 0}));
  CHECK(nearer({0, 0}, {1, 0}, {1, tiny}));
  CHECK(!nearer({0, 0}, {1, 0}, {-1, 0}));
  CHECK(!nearer({0, 0}, {-1, 0}, {0, 1}));
  CHECK(!nearer({0}, {0.0}, {-0.0}));
  CHECK(!nearer({0}, {-0.0}, {0.0}));
  CHECK(nearer({0}, {0}, {tiny}));
  CHECK(nearer({tiny}, {tiny}, {0}));
  CHECK(!nearer({tiny}, {2 * tiny}, {0}));
  CHECK(nearer({huge}, {huge}, {-huge}));
  CHECK(nearer({-huge, tiny}, {huge, tiny}, {huge, 0}));
  CHECK(!nearer({-huge, tiny}, {huge, 0}, {huge, tiny}));
  CHECK(nearer({3, -2.5}, {3, -2.5}, {3, -2.5000000000000004}));
  std::mt19937_64 random(5);
  std::uniform_int_distribution<int> between(-40, 40);
  for (int i = 0; i < 2000; ++i) {  // small integers at 2^e, whose distances fit long double
    double z[3], a[3], b[3];
    long double difference = 0;
    const int e = between(random) * 7;
    for (int j = 0; j < 3; ++j) {
      const int x = between(random) / 10, p = between(random) / 10, q = between(random) / 10;
      z[j] = std::ldexp(x, e);
      a[j] = std::ldexp(p, e);
      b[j] = std::ldexp(q, e);
      difference += (x - p) * (x - p) - (x - q) * (x - q);
    }
    CHECK(genfast::exactly_nearer(z, a, b, 3) == (difference < 0));
  }
}

TEST(vector_quantize_refuses_nan_and_infinity) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : kDTypes) {
      for (double value : {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
        for (int64_t at : {0, 12, 34}) {
          std::vector<double> good = normals(35, 3, 1.0), bad = good;
          bad[static_cast<size_t>(at)] = value;
          Array x(dtype, good), y(dtype, bad);
          int64_t indices[5];
          genfast::NearestCode args = {dtype, y.data(), x.data(), 5, 5, 7, indices, nullptr, nullptr};
          CHECK(genfast::cpu::nearest_code(args, 1) == genfast::NearestCodeStatus::kBadRow, "%s", isa);
          std::swap(args.z, args.codebook);
          CHECK(genfast::cpu::nearest_code(args, 1) == genfast::NearestCodeStatus::kBadCode, "%s", isa);
        }
      }
    }
  });
}

TEST(vector_quantize_sums) {
  const int64_t rows = 5000, codes = 23, dim = 19;
  std::mt19937_64 random(7);
  std::vector<int64_t> indices(static_cast<size_t>(rows));
  for (int64_t& index : indices) index = random() % 3 ? 4 : static_cast<int64_t>(random() % 20);
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    Array x(dtype, integers(rows * dim, 8, -9, 9, 0.25)), sums(dtype, codes * dim), again(dtype, codes * dim);
    std::vector<double> want(static_cast<size_t>(codes * dim), 0.0);
    std::vector<int64_t> counts(static_cast<size_t>(codes), -1), expected(static_cast<size_t>(codes), 0);
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t k = indices[static_cast<size_t>(n)];
      ++expected[static_cast<size_t>(k)];
      for (int64_t i = 0; i < dim; ++i) want[static_cast<size_t>(k * dim + i)] += x.get(n * dim + i);
    }
    genfast::CodeSums args = {dtype, x.data(), indices.data(), rows, codes, dim, sums.data(), counts.data()};
    CHECK(genfast::cpu::code_sums(args, 1));
    CHECK(counts == expected);
    for (int64_t i = 0; i < codes * dim; ++i) CHECK(sums.get(i) == want[static_cast<size_t>(i)]);
    for (int threads : {2, 3, 7, 64}) {
      args.sums = again.data();
      CHECK(genfast::cpu::code_sums(args, threads));
      CHECK(again == sums);
    }
    for (int64_t wrong : {int64_t{-1}, codes}) {
      std::vector<int64_t> bad = indices;
      bad[1234] = wrong;
      args.indices = bad.data();
      CHECK(!genfast::cpu::code_sums(args, 2));
    }
  }
}
