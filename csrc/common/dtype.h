// Element types that cross the Python boundary as small integers (genfast/_native.py holds the same table).
#pragma once

#include <cstdint>

namespace genfast {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kUInt8 = 4, kBool = 5 };

inline int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace genfast
