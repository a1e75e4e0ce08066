// bernoulli_sample: exact thresholds, edge logits, every pair of dtypes, offsets and threads.
#include "check.h"
#include "common/philox.h"
#include "isas.h"
#include "rbm/bernoulli_sample.h"
#include "storage.h"

using genfast::BernoulliSample;
using genfast::DType;

namespace {

constexpr DType kLogits[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr DType kSamples[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                              DType::kFloat16, DType::kUInt8,   DType::kBool};

float uniform(int64_t chain, int64_t unit, int64_t step, uint64_t seed) {
  return genfast::philox::uniform(genfast::philox::rbm_words(static_cast<uint32_t>(unit >> 2),
                                                             static_cast<uint32_t>(chain), static_cast<uint32_t>(step),
                                                             seed)
                                      .w[unit & 3]);
}

std::vector<double> logits_of(int64_t count) {
  std::mt19937_64 random(17);
  std::uniform_real_distribution<double> between(-6.0, 6.0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

DType bias_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace

TEST(bernoulli_sample_values) {
  struct Case {
    int64_t rows, columns, row_offset, col_offset;
    double beta;
    bool bias;
  };
  const Case cases[] = {{1, 1, 0, 0, 1.0, false},           {3, 5, 7, 1, 0.5, true},
                        {2, 511, 1, 3, -1.5, true},         {5, 4099, 0, 2, 1.0, false},
                        {4, 9001, 1ll << 31, 5, 2.0, true}, {0, 4, 0, 0, 1.0, false},
                        {4, 0, 0, 0, 1.0, false},           {3, 37, (1ll << 32) - 3, (1ll << 32) - 37, 1.0, true}};
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Case& c : cases) {
      for (DType dtype : kLogits) {
        for (DType sample_dtype : kSamples) {
          const int64_t count = c.rows * c.columns;
          Array logits(dtype, logits_of(count)), bias(bias_dtype(dtype), logits_of(c.columns));
          Array sample(sample_dtype, count), prob(dtype, count), sample4 = sample, prob4 = prob, sample_alone = sample;
          BernoulliSample args = {dtype,         sample_dtype,
                                  logits.data(), c.bias ? bias.data() : nullptr,
                                  sample.data(), prob.data(),
                                  c.rows,        c.columns,
                                  c.beta,        21,
                                  nullptr,       c.row_offset,
                                  c.col_offset,  4};
          CHECK(!genfast::cpu::bernoulli_sample(args, 1));
          args.sample = sample4.data();
          args.prob = prob4.data();
          CHECK(!genfast::cpu::bernoulli_sample(args, 4));
          args.sample = sample_alone.data();
          args.prob = nullptr;
          CHECK(!genfast::cpu::bernoulli_sample(args, 2));
          CHECK(sample == sample4 && prob == prob4 && sample == sample_alone, "%s %s", isa, dtype_name(dtype));
          CHECK(sample.guards_hold() && prob.guards_hold());
          for (int64_t i = 0; i < count; ++i) {
            const int64_t row = i / c.columns, column = i % c.columns;
            const double x = (logits.get(i) + (c.bias ? bias.get(column) : 0.0)) * c.beta;
            const double p = 1.0 / (1.0 + std::exp(-x)), u = uniform(c.row_offset + row, c.col_offset + column, 4, 21);
            const double found = sample.get(i);
            CHECK(std::fabs(prob.get(i) - p) <=
                      (rounding_of(dtype) + 2e-6) * p + (dtype == DType::kFloat16 ? 0x1p-24 : 0.0),
                  "%s %s p(%g) = %g", isa, dtype_name(dtype), x, prob.get(i));
            CHECK(found == (u < p ? 1.0 : 0.0) || ((found == 0.0 || found == 1.0) && std::fabs(u - p) < 2e-6),
                  "%s %s -> %s at %lld: %g with u %g, p %g", isa, dtype_name(dtype), dtype_name(sample_dtype),
                  static_cast<long long>(i), found, u, p);
            if (dtype == DType::kFloat32)
              CHECK(found == (u < prob.get(i) ? 1.0 : 0.0), "%s u %g p %g", isa, u, prob.get(i));
          }
        }
      }
    }
  });
}

TEST(bernoulli_sample_edges) {
  const std::vector<double> edges = {INFINITY, -INFINITY, 100.0, -100.0, -87.32, -87.34,
                                     0.0,      -0.0,      3e38,  -3e38,  20.0,   -20.0};
  const int64_t count = static_cast<int64_t>(edges.size());
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
      for (DType sample_dtype : kSamples) {
        std::vector<double> values = edges;
        for (int nan_at = -1; nan_at < count; nan_at += 6) {
          if (nan_at >= 0) values[static_cast<size_t>(nan_at)] = NAN;
          Array logits(dtype, values), sample(sample_dtype, count), prob(dtype, count);
          const bool nan = genfast::cpu::bernoulli_sample({dtype, sample_dtype, logits.data(), nullptr, sample.data(),
                                                           prob.data(), 1, count, 1.0, 8, nullptr, 0, 0, 0},
                                                          1);
          CHECK(nan == (nan_at >= 0), "%s %s: NaN reported %d", isa, dtype_name(dtype), nan);
          for (int64_t i = 0; i < count; ++i) {
            const double x = values[static_cast<size_t>(i)], found = sample.get(i);
            if (std::isnan(x)) {
              const bool integer = sample_dtype == DType::kUInt8 || sample_dtype == DType::kBool;
              CHECK(std::isnan(prob.get(i)) && (integer ? found == 255.0 : std::isnan(found)), "%s %s: %g", isa,
                    dtype_name(sample_dtype), found);
            } else if (x == INFINITY || x >= 100.0) {
              CHECK(prob.get(i) == 1.0 && found == 1.0);
            } else if (x == -INFINITY || x <= -3e38) {
              CHECK(prob.get(i) == 0.0 && found == 0.0);
            } else {
              const double p = 1.0 / (1.0 + std::exp(-logits.get(i)));
              const bool flushed = dtype == DType::kFloat32 && x < -87.33;  // see sigmoid
              CHECK(std::fabs(prob.get(i) - (flushed ? 0.0 : p)) <= 1e-6 * p, "%s p(%g) = %g", isa, x, prob.get(i));
              CHECK(found == (uniform(0, i, 0, 8) < prob.get(i) ? 1.0 : 0.0));
            }
          }
        }
      }
    }
  });
}

TEST(bernoulli_sample_tiles_draw_what_the_whole_would) {
  constexpr int64_t kRows = 6, kColumns = 1037;
  const std::vector<double> values = logits_of(kRows * kColumns);
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    Array logits(DType::kFloat32, values), whole(DType::kUInt8, kRows * kColumns);
    genfast::cpu::bernoulli_sample({DType::kFloat32, DType::kUInt8, logits.data(), nullptr, whole.data(), nullptr,
                                    kRows, kColumns, 1.0, 77, nullptr, 100, 1000, 3},
                                   2);
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t begin : {0, 1, 2, 3, 500, 1030}) {
        const std::vector<double> part(values.begin() + row * kColumns + begin, values.begin() + (row + 1) * kColumns);
        Array tile(DType::kFloat32, part), sample(DType::kUInt8, kColumns - begin);
        genfast::cpu::bernoulli_sample({DType::kFloat32, DType::kUInt8, tile.data(), nullptr, sample.data(), nullptr, 1,
                                        kColumns - begin, 1.0, 77, nullptr, 100 + row, 1000 + begin, 3},
                                       1);
        for (int64_t i = begin; i < kColumns; ++i)
          CHECK(sample.get(i - begin) == whole.get(row * kColumns + i), "%s", isa);
      }
    }
  });
}
