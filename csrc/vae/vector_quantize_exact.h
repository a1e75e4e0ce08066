// Comparison of two distances without rounding: the sign of a sum of products in a fixed-point number as wide as
// products of doubles reach.
#pragma once

#include <cstdint>
#include <cstring>

namespace genfast {

class ExactSum {
 public:
  // Adds sign * a * b * 2^shift; a and b finite, shift 0 or 1. At most 2^30 times.
  void add(double a, double b, bool negative, int shift) {
    int exponent_a, exponent_b;
    const uint64_t m = magnitude(a, &exponent_a), n = magnitude(b, &exponent_b);
    if (m == 0 || n == 0) return;
    if ((a < 0.0) != (b < 0.0)) negative = !negative;
    const int place = exponent_a + exponent_b + shift + kLowest;
    int64_t* digit = digits_ + place / 32;
    Wide rest = static_cast<Wide>(m) * n;  // 106 bits
    const int within = place % 32;
    const auto put = [&](uint64_t value) {
      *digit++ += negative ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
    };
    put(static_cast<uint32_t>(static_cast<uint64_t>(rest) << within));
    for (rest >>= 32 - within; rest != 0; rest >>= 32) put(static_cast<uint32_t>(rest));
  }

  int sign() const {
    int64_t carry = 0;
    bool any = false;
    for (const int64_t digit : digits_) {
      const int64_t sum = digit + carry;
      any |= (sum & 0xFFFFFFFF) != 0;
      carry = sum >> 32;
    }
    return carry < 0 ? -1 : any || carry > 0 ? 1 : 0;
  }

 private:
  __extension__ using Wide = unsigned __int128;
  static constexpr int kLowest = 2 * 1074;                          // the smallest product is 2^-2148
  static constexpr int kDigits = (kLowest + 2 * 971 + 1) / 32 + 6;  // the largest place, and 106 bits above it

  // |x| = the result times 2^exponent.
  static uint64_t magnitude(double x, int* exponent) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int field = static_cast<int>(bits >> 52 & 0x7FF);
    const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
    *exponent = (field == 0 ? 1 : field) - 1075;
    return field == 0 ? fraction : fraction | uint64_t{1} << 52;
  }

  int64_t digits_[kDigits] = {};
};

// Whether ||z - a||^2 < ||z - b||^2, of float or double, all finite.
template <typename T>
bool exactly_nearer(const T* z, const T* a, const T* b, int64_t dim) {
  if (std::memcmp(a, b, sizeof(T) * static_cast<size_t>(dim)) == 0) return false;
  ExactSum difference;
  for (int64_t i = 0; i < dim; ++i) {
    const double x = static_cast<double>(z[i]), p = static_cast<double>(a[i]), q = static_cast<double>(b[i]);
    if (p == q) continue;
    difference.add(p, p, false, 0);
    difference.add(q, q, true, 0);
    difference.add(x, p, true, 1);
    difference.add(x, q, false, 1);
  }
  return difference.sign() < 0;
}

}  // namespace genfast
