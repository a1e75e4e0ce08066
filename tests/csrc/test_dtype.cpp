// float16 and bfloat16: every value read, and every boundary of rounding written.
#include "check.h"
#include "isas.h"
#include "storage.h"

namespace {

// Every combination of upper bits with the lower bits at which rounding to `kept` bits of mantissa turns.
std::vector<float> boundaries(int kept) {
  const uint32_t dropped = 23 - static_cast<uint32_t>(kept), half = 1u << (dropped - 1), full = 1u << dropped;
  std::vector<float> values;
  for (uint32_t upper = 0; upper < (1u << (9 + kept)); ++upper) {
    for (uint32_t lower : {0u, 1u, half - 1, half, half + 1, full - 1})
      values.push_back(check::from_bits(upper << dropped | lower));
  }
  return values;
}

}  // namespace

TEST(reads_every_half) {
  std::vector<uint16_t> words(65536);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint16_t>(i);
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<float> found(words.size());
    probe.from_half(words.data(), found.data(), 65536);
    for (size_t i = 0; i < words.size(); ++i) {
      const double expected = half_value(words[i]);
      CHECK(check::same(found[i], expected) && std::signbit(found[i]) == (words[i] >> 15 != 0), "%s %04zx: %g", isa, i,
            found[i]);
    }
    probe.from_bfloat16(words.data(), found.data(), 65536);
    for (size_t i = 0; i < words.size(); ++i) CHECK(check::bits(found[i]) == i << 16, "%s %04zx: %g", isa, i, found[i]);
  });
}

TEST(rounds_to_half) {
  std::vector<float> values = boundaries(10);
  for (int exponent = -26; exponent < -13; ++exponent) {  // subnormal halves: ties are elsewhere
    for (int eighths = 8; eighths < 64; ++eighths) {
      for (float x : {-1.0f, 1.0f}) {
        const float at = std::ldexp(x * static_cast<float>(eighths), exponent - 3);
        for (float near : {at, std::nextafter(at, 0.0f), std::nextafter(at, 2 * at)}) values.push_back(near);
      }
    }
  }
  for (int multiple = 0; multiple < 2100; ++multiple) {
    const float at = std::ldexp(static_cast<float>(multiple), -25);
    for (float near : {at, std::nextafter(at, 0.0f), std::nextafter(at, 1.0f)}) values.push_back(near);
  }
  for (float x : {65503.99f, 65504.0f, 65519.99f, 65520.0f, 65536.0f, 1e30f, INFINITY}) {
    values.push_back(x);
    values.push_back(-x);
  }
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<uint16_t> found(values.size());
    probe.to_half(values.data(), found.data(), static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      const bool nan = std::isnan(values[i]);
      CHECK(nan ? std::isnan(half_value(found[i])) : found[i] == half_word(values[i]), "%s %.9g -> %04x, not %04x", isa,
            values[i], found[i], half_word(values[i]));
    }
  });
}

TEST(rounds_to_bfloat16) {
  const std::vector<float> values = boundaries(7);
  for_each_isa([&](const genfast::Probe& probe, const char* isa) {
    std::vector<uint16_t> found(values.size());
    probe.to_bfloat16(values.data(), found.data(), static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      const float back = check::from_bits(static_cast<uint32_t>(found[i]) << 16);
      CHECK(check::same(back, bfloat16_rounded(values[i])) && std::signbit(back) == std::signbit(values[i]),
            "%s %.9g -> %.9g, not %.9g", isa, values[i], back, bfloat16_rounded(values[i]));
    }
  });
}
