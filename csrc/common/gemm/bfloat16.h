// Rounding to bfloat16, and pairs of them, in float32 registers.
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

// Pairs of bfloat16 in 32 bits.
GENFAST_INLINE VecF low_of_pair(VecF pair) { return as_float(shift_left<16>(as_uint(pair))); }
GENFAST_INLINE VecF high_of_pair(VecF pair) {
  return as_float(bit_and(as_uint(pair), broadcast(uint32_t{0xFFFF0000})));
}
// The pair of two numbers, rounded to bfloat16.
GENFAST_INLINE VecF pair_of(VecF low, VecF high) {
  return as_float(bit_or(shift_right<16>(as_uint(round_to_bfloat16(low))), as_uint(round_to_bfloat16(high))));
}

// kWidth pairs of neighbours, of which `count` numbers are in memory; the others are zero.
template <typename T>
GENFAST_INLINE VecF pairs_within(const T* p, int64_t count) {
  const VecF zero = broadcast(0.0f);
  VecF even, odd;
  unzip(count > 0 ? load_upto(p, count) : zero, count > kWidth ? load_upto(p + kWidth, count - kWidth) : zero, &even,
        &odd);
  return pair_of(even, odd);
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
