// Arrays of any dtype as doubles, poisoned with NaN and with guards on both sides.
#pragma once

#include "check.h"
#include "common/dtype.h"

// Rounds to `digits` significant bits, nearest even, with exponents from `lowest` on (subnormals) and infinity from
// 2^highest.
inline double rounded_to(double x, int digits, int lowest, int highest) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = (exponent > lowest ? exponent : lowest) - digits;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::fabs(y) >= std::ldexp(1.0, highest) ? std::copysign(INFINITY, x) : y;
}

inline double half_rounded(double x) { return rounded_to(x, 11, -13, 16); }
inline double bfloat16_rounded(double x) { return rounded_to(x, 8, -125, 128); }

inline double half_value(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

inline uint16_t half_word(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double y = std::fabs(half_rounded(x));
  if (std::isnan(x)) return 0x7E00;
  if (std::isinf(y)) return sign | 0x7C00;
  if (y < std::ldexp(1.0, -14)) return sign | static_cast<uint16_t>(std::ldexp(y, 24));
  int exponent;
  const double fraction = std::frexp(y, &exponent);
  return sign | static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(std::ldexp(fraction, 11)) & 1023));
}

class Array {
 public:
  Array(genfast::DType dtype, int64_t size) : dtype_(dtype), size_(size), bytes_(kGuard * 2 + size * width(), 0xFF) {}

  Array(genfast::DType dtype, const std::vector<double>& values) : Array(dtype, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < size_; ++i) set(i, values[static_cast<size_t>(i)]);
  }

  void* data() { return bytes_.data() + kGuard; }
  int64_t size() const { return size_; }

  double get(int64_t i) const {
    switch (dtype_) {
      case genfast::DType::kFloat64:
        return read<double>(i);
      case genfast::DType::kFloat32:
        return read<float>(i);
      case genfast::DType::kBFloat16:
        return check::from_bits(static_cast<uint32_t>(read<uint16_t>(i)) << 16);
      case genfast::DType::kFloat16:
        return half_value(read<uint16_t>(i));
      default:
        return read<uint8_t>(i);
    }
  }

  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

  // The bytes around the array, which nothing may write.
  bool guards_hold() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (bytes_[i] != 0xFF || bytes_[bytes_.size() - 1 - i] != 0xFF) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;

  size_t width() const { return static_cast<size_t>(genfast::bytes_of(dtype_)); }

  template <typename T>
  T read(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + kGuard + static_cast<size_t>(i) * sizeof value, sizeof value);
    return value;
  }

  template <typename T>
  void write(int64_t i, T value) {
    std::memcpy(bytes_.data() + kGuard + static_cast<size_t>(i) * sizeof value, &value, sizeof value);
  }

  void set(int64_t i, double x) {
    switch (dtype_) {
      case genfast::DType::kFloat64:
        return write(i, x);
      case genfast::DType::kFloat32:
        return write(i, static_cast<float>(x));
      case genfast::DType::kBFloat16:
        return write(i, static_cast<uint16_t>(check::bits(static_cast<float>(bfloat16_rounded(x))) >> 16));
      case genfast::DType::kFloat16:
        return write(i, half_word(x));
      default:
        return write(i, static_cast<uint8_t>(x));
    }
  }

  genfast::DType dtype_;
  int64_t size_;
  std::vector<uint8_t> bytes_;  // poison: all ones is NaN in every floating-point dtype and 255 in uint8
};

inline const char* dtype_name(genfast::DType dtype) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16", "uint8", "bool"};
  return names[static_cast<int>(dtype)];
}

// The relative rounding error of one store.
inline double rounding_of(genfast::DType dtype) {
  switch (dtype) {
    case genfast::DType::kFloat64:
      return 1.2e-16;
    case genfast::DType::kFloat32:
      return 6e-8;
    case genfast::DType::kBFloat16:
      return 1.0 / 256;
    default:
      return 1.0 / 2048;
  }
}
