// rbm_split: parts add up to the number, and sums of products of parts, as tensor cores make them, are no worse than a
// float32 product's.
#include <algorithm>
#include <cstdlib>

#include "check.h"
#include "rbm/rbm_split.h"

using genfast::split::into_parts;
using genfast::split::kChunk;
using genfast::split::kMostParts;
using genfast::split::rounded;
using genfast::split::widened;

namespace {

double sum_of(const uint16_t (&part)[kMostParts], int parts) {
  double sum = 0.0;
  for (int i = 0; i < parts; ++i) sum += static_cast<double>(widened(part[i]));
  return sum;
}

// One instruction: `total` and the terms are cut to 24 + extra bits of the largest of them, added, and cut to 24 bits.
struct TensorCore {
  int terms, extra;  // A100: 8, 1; H100: 16, 2

  float add(float total, const double* products) const {
    double largest = std::fabs(static_cast<double>(total));
    for (int i = 0; i < terms; ++i) largest = std::max(largest, std::fabs(products[i]));
    if (largest == 0.0) return 0.0f;
    const double quantum = std::ldexp(1.0, std::ilogb(largest) - 23 - extra);
    double sum = std::trunc(static_cast<double>(total) / quantum) * quantum;
    for (int i = 0; i < terms; ++i) sum += std::trunc(products[i] / quantum) * quantum;
    if (sum == 0.0) return 0.0f;
    const double last = std::ldexp(1.0, std::ilogb(sum) - 23);
    return static_cast<float>(std::trunc(sum / last) * last);
  }
};

// The order of kernels/cuda/rbm/rbm_product.cuh: for every 16 inputs the pairs of parts, the smallest first; chunks.
float split_product(const TensorCore& core, const std::vector<float>& x, const std::vector<float>& w, int x_parts,
                    int w_parts) {
  const int count = static_cast<int>(x.size());
  std::vector<double> a[kMostParts], b[kMostParts];
  for (int i = 0; i < count; ++i) {
    uint16_t part[kMostParts] = {};
    into_parts(x[static_cast<size_t>(i)], x_parts, part);
    for (int p = 0; p < x_parts; ++p) a[p].push_back(static_cast<double>(widened(part[p])));
    into_parts(w[static_cast<size_t>(i)], w_parts, part);
    for (int p = 0; p < w_parts; ++p) b[p].push_back(static_cast<double>(widened(part[p])));
  }
  float total = 0.0f;
  for (int begin = 0; begin < count; begin += kChunk) {
    float chunk = 0.0f;
    for (int k = begin; k < std::min(begin + kChunk, count); k += 16) {
      for (int level = kMostParts - 1; level >= 0; --level) {
        for (int i = std::min(level, x_parts - 1); i >= 0; --i) {
          const int j = level - i;
          if (j >= w_parts) continue;
          for (int from = k; from < k + 16; from += core.terms) {
            double products[16] = {};
            for (int t = 0; t < core.terms && from + t < count; ++t) {
              const auto at = static_cast<size_t>(from + t);
              products[t] = a[i][at] * b[j][at];
            }
            chunk = core.add(chunk, products);
          }
        }
      }
    }
    total += chunk;
  }
  return total;
}

}  // namespace

TEST(rbm_split_parts) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 200000; ++i) {
    // Exponents from where three parts are normal numbers to the largest.
    const uint32_t exponent = 24 + static_cast<uint32_t>(random() % 231);
    const float x = check::from_bits(static_cast<uint32_t>(random() & 0x807FFFFFu) | exponent << 23);
    uint16_t part[kMostParts] = {};
    const int needed = into_parts(x, 3, part);
    CHECK(sum_of(part, 3) == static_cast<double>(x));
    CHECK(needed >= 1 && needed <= 3);
    CHECK(sum_of(part, needed) == static_cast<double>(x));
    const double size = std::fabs(static_cast<double>(x));
    into_parts(x, 2, part);
    CHECK(std::fabs(sum_of(part, 2) - static_cast<double>(x)) <= size * 0x1p-16);
    into_parts(x, 1, part);
    CHECK(part[0] == rounded(x));
  }
  for (int i = 0; i <= 256; ++i) {
    uint16_t part[kMostParts] = {};
    CHECK(into_parts(static_cast<float>(i), 3, part) == 1 && widened(part[0]) == static_cast<float>(i));
  }
  for (uint32_t bits : {0x7F800000u, 0xFF800000u, 0x7FC00000u, 0x7F800001u}) {
    uint16_t part[kMostParts] = {};
    CHECK(into_parts(check::from_bits(bits), 3, part) == 1);
    CHECK(check::same(static_cast<double>(widened(part[0])), static_cast<double>(check::from_bits(bits))));
    CHECK(part[1] == 0 && part[2] == 0);
  }
}

TEST(rbm_split_sums) {
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  const TensorCore cores[] = {{8, 1}, {16, 2}};
  for (const TensorCore& core : cores) {
    for (const bool binary : {true, false}) {
      for (const int inputs : {500, 784, 4096}) {
        double split_error = 0.0, float_error = 0.0, one_part = 0.0;
        for (int unit = 0; unit < 400; ++unit) {
          std::vector<float> x, w;
          double exact = 0.0;
          float chain = 0.0f;
          for (int i = 0; i < inputs; ++i) {
            x.push_back(binary ? static_cast<float>(random() % 2) : normal(random));
            w.push_back(0.3f * normal(random));
            exact += static_cast<double>(x.back()) * static_cast<double>(w.back());
            chain = std::fma(x.back(), w.back(), chain);
          }
          const int parts = binary ? 1 : 3;
          split_error =
              std::max(split_error, std::fabs(static_cast<double>(split_product(core, x, w, parts, 3)) - exact));
          one_part = std::max(one_part, std::fabs(static_cast<double>(split_product(core, x, w, parts, 1)) - exact));
          float_error = std::max(float_error, std::fabs(static_cast<double>(chain) - exact));
        }
        if (std::getenv("GENFAST_PRINT") != nullptr) {
          std::printf("terms %d %s %d: split %.2e float32 %.2e one part %.2e\n", core.terms, binary ? "0/1" : "normal",
                      inputs, split_error, float_error, one_part);
        }
        CHECK(split_error <= float_error);
        CHECK(one_part > 100.0 * float_error);  // W's rounding shows
      }
    }
  }
}
