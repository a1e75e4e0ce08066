// float32 operands in bfloat16 parts, in the tiles of micro_kernel_amx.h: 16 lines of 16 pairs, a pair being two
// neighbours in depth. A line is a row of A or, over two steps of depth, a column of pairs of B.
//
// The pairs come from a source whose rows run along the depth (two vectors of a row make a line) or across it (two rows
// make one), and are turned where lines and source differ.
#pragma once

#include "common/gemm/bfloat16.h"
#include "common/gemm/micro_kernel_amx.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

enum class Source { kAlong, kAcross };

// Pair i: along, elements 2 i and 2 i + 1 of first and second, one after the other; across, first[i] and second[i].
struct Line {
  VecF first, second;
};

// x = hi + mid + lo without a rest: hi is the nearest bfloat16, mid the upper half of what it leaves. Where hi is not
// finite, mid is NaN.
struct Split {
  VecF hi, mid, lo;
};

GENFAST_INLINE Split split(VecF x) {
  const VecU upper = broadcast(uint32_t{0xFFFF0000});
  const VecF hi = as_float(bit_and(add(as_uint(x), broadcast(uint32_t{0x8000})), upper));
  const VecF rest = x - hi, mid = as_float(bit_and(as_uint(rest), upper));
  return {hi, mid, rest - mid};
}

// Pairs of numbers that are bfloat16 already.
template <Source kSource>
GENFAST_INLINE VecF pairs(VecF first, VecF second) {
  if constexpr (kSource == Source::kAlong) return as_float(bfloat16_pairs(first, second));
  const VecU low = shift_right<16>(as_uint(first)), high = bit_and(as_uint(second), broadcast(uint32_t{0xFFFF0000}));
  return as_float(bit_or(low, high));
}

template <Source kSource>
GENFAST_INLINE VecF rounded_pairs(VecF first, VecF second) {
  if constexpr (kSource == Source::kAlong) return pairs<kSource>(first, second);  // the instruction rounds
  return pairs<kSource>(round_to_bfloat16(first), round_to_bfloat16(second));
}

// One tile of line(0) ... line(15) as one part, rounded, or three; part p goes to out + p * part_stride. Returns the
// bits of all elements, or'ed.
template <Source kSource, bool kTurned, int kParts, typename Lines>
GENFAST_INLINE VecU convert_tile(const Lines& line, uint16_t* out, int64_t part_stride) {
  VecF parts[kParts][16];
  VecU bits = broadcast(uint32_t{0});
  for (int i = 0; i < 16; ++i) {
    const Line x = line(i);
    bits = bit_or(bits, bit_or(as_uint(x.first), as_uint(x.second)));
    if constexpr (kParts == 1) {
      parts[0][i] = rounded_pairs<kSource>(x.first, x.second);
    } else {
      const Split first = split(x.first), second = split(x.second);
      parts[0][i] = pairs<kSource>(first.hi, second.hi);
      parts[1][i] = pairs<kSource>(first.mid, second.mid);
      parts[2][i] = pairs<kSource>(first.lo, second.lo);
    }
  }
  for (int p = 0; p < kParts; ++p) {
    if constexpr (kTurned) transpose(parts[p]);
    auto* to = reinterpret_cast<float*>(out + p * part_stride);
    for (int i = 0; i < 16; ++i) store_float(to + 16 * i, parts[p][i]);
  }
  return bits;
}

// Whether elements with these bits, or'ed, are exact in bfloat16.
GENFAST_INLINE bool exact_in_bfloat16(VecU bits) {
  const VecF lower = float_from_int(bit_and(bits, broadcast(uint32_t{0xFFFF})));
  return !any(less(broadcast(0.0f), lower));
}

template <typename T>
GENFAST_INLINE VecF load_within(const T* p, int64_t count) {
  return count > 0 ? load_upto(p, count) : broadcast(0.0f);
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
