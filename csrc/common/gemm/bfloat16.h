// Rounding to bfloat16, in float32 registers.
#pragma once

#include "common/vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

// To nearest even. A NaN stays one in its upper half.
GENFAST_INLINE VecF round_to_bfloat16(VecF x) {
  const VecU bits = as_uint(x), odd = bit_and(shift_right<16>(bits), broadcast(uint32_t{1}));
  const VecU rounded = bit_and(add(bits, add(odd, broadcast(uint32_t{0x7FFF}))), broadcast(uint32_t{0xFFFF0000}));
  return as_float(select(is_nan(x), bit_or(bits, broadcast(uint32_t{0x400000})), rounded));
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
