// The little that the C++ tests need: checks that count, report and go on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace check {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void fail(const char* file, int line, const std::string& message) {
  if (++failures() <= 50) std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
}

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline uint32_t bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return word;
}

inline float from_bits(uint32_t word) {
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

// Equal as numbers, with any NaN equal to any other.
inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// e^x - 1 - x without cancellation.
inline double expm1_minus(double x) {
  if (!(std::fabs(x) < 0.5)) return std::expm1(x) - x;
  double total = 0.0, term = 0.5 * x * x;
  for (int n = 3; n < 25; ++n) {
    total += term;
    term *= x / n;
  }
  return total;
}

template <typename... Args>
std::string format(const char* pattern, Args... args) {
  char text[512];
  std::snprintf(text, sizeof text, pattern, args...);
  return text;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

// CHECK(condition) or CHECK(condition, "format", values...).
#define CHECK(condition, ...)                                                                                 \
  do {                                                                                                        \
    if (!(condition))                                                                                         \
      check::fail(__FILE__, __LINE__, #condition __VA_OPT__(+std::string(" ") + check::format(__VA_ARGS__))); \
  } while (false)
