// vec.h for any CPU: four lanes in the vector types of GCC and Clang, which become SSE2 or NEON.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace genfast {
namespace GENFAST_ISA {

#define GENFAST_OP static inline __attribute__((always_inline))
#define GENFAST_LANES for (int i = 0; i < kWidth; ++i)

constexpr int kWidth = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint16_t Shorts __attribute__((vector_size(8)));

struct VecF {
  Floats v;
};
struct VecU {
  Words v;
};
struct Mask {
  Ints v;  // 0 or -1
};

// clang-format off: one operation a line
GENFAST_OP VecF broadcast(float x) { return {Floats{x, x, x, x}}; }
GENFAST_OP VecU broadcast(uint32_t x) { return {Words{x, x, x, x}}; }
GENFAST_OP VecF load_float(const float* p) { VecF r; memcpy(&r.v, p, sizeof r.v); return r; }
GENFAST_OP void store_float(float* p, VecF x) { memcpy(p, &x.v, sizeof x.v); }
GENFAST_OP void stream_float(float* p, VecF x) { store_float(p, x); }
GENFAST_OP void stream_fence() {}
GENFAST_OP VecU load_u16(const uint16_t* p) { Shorts x; memcpy(&x, p, sizeof x); return {__builtin_convertvector(x, Words)}; }
GENFAST_OP void store_low16(uint16_t* p, VecU x) { const Shorts low = __builtin_convertvector(x.v, Shorts); memcpy(p, &low, sizeof low); }

GENFAST_OP VecF as_float(VecU x) { return {(Floats)x.v}; }
GENFAST_OP VecU as_uint(VecF x) { return {(Words)x.v}; }

GENFAST_OP VecF add(VecF a, VecF b) { return {a.v + b.v}; }
GENFAST_OP VecF sub(VecF a, VecF b) { return {a.v - b.v}; }
GENFAST_OP VecF mul(VecF a, VecF b) { return {a.v * b.v}; }
GENFAST_OP VecF div(VecF a, VecF b) { return {a.v / b.v}; }
GENFAST_OP VecF fma(VecF a, VecF b, VecF c) { return {a.v * b.v + c.v}; }
GENFAST_OP VecF sqrt(VecF a) { GENFAST_LANES a.v[i] = ::sqrtf(a.v[i]); return a; }
// As the SSE instructions: the second operand where either is NaN.
GENFAST_OP VecF min(VecF a, VecF b) { return {a.v < b.v ? a.v : b.v}; }
GENFAST_OP VecF max(VecF a, VecF b) { return {a.v > b.v ? a.v : b.v}; }

GENFAST_OP VecU add(VecU a, VecU b) { return {a.v + b.v}; }
GENFAST_OP VecU sub(VecU a, VecU b) { return {a.v - b.v}; }
GENFAST_OP VecU bit_and(VecU a, VecU b) { return {a.v & b.v}; }
GENFAST_OP VecU bit_or(VecU a, VecU b) { return {a.v | b.v}; }
GENFAST_OP VecU bit_xor(VecU a, VecU b) { return {a.v ^ b.v}; }
template <int N>
GENFAST_OP VecU shift_left(VecU a) { return {a.v << N}; }
template <int N>
GENFAST_OP VecU shift_right(VecU a) { return {a.v >> N}; }

GENFAST_OP Mask less(VecF a, VecF b) { return {(Ints)(a.v < b.v)}; }
GENFAST_OP Mask equal(VecU a, VecU b) { return {(Ints)(a.v == b.v)}; }
GENFAST_OP Mask is_nan(VecF a) { return {(Ints)(a.v != a.v)}; }
GENFAST_OP Mask sign_bit(VecU a) { return {(Ints)a.v >> 31}; }  // only for select
GENFAST_OP Mask either(Mask a, Mask b) { return {a.v | b.v}; }
GENFAST_OP Mask no_lane() { return {Ints{}}; }
GENFAST_OP uint32_t lane_bits(Mask a) { const Ints bits = a.v & Ints{1, 2, 4, 8}; return static_cast<uint32_t>((bits[0] | bits[1]) | (bits[2] | bits[3])); }  // lane i to bit i
GENFAST_OP bool any(Mask a) { return lane_bits(a) != 0; }
GENFAST_OP Mask mask_of(uint32_t bits) { return {(Ints)((broadcast(bits).v & Words{1, 2, 4, 8}) != 0)}; }
GENFAST_OP VecF select(Mask m, VecF a, VecF b) { return {m.v ? a.v : b.v}; }
GENFAST_OP VecU select(Mask m, VecU a, VecU b) { return {m.v ? a.v : b.v}; }

// Signed 32-bit integers to float and back (nearest even).
GENFAST_OP VecF float_from_int(VecU a) { return {__builtin_convertvector((Ints)a.v, Floats)}; }
// Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits; |a| < 2^22.
GENFAST_OP VecU int_from_float(VecF a) { return {(Words)(a.v + 12582912.0f) - 0x4B400000u}; }
// clang-format on

GENFAST_OP float sum(VecF a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

GENFAST_OP VecF load_half(const uint16_t* p) {
  const Words h = load_u16(p).v, size = h & 0x7FFFu;
  const Words tiny = (Words)(__builtin_convertvector((Ints)size, Floats) * 5.9604644775390625e-8f);  // subnormal: 2^-24
  const Words special = size == 0x7C00u ? (size << 13) + 0x70000000u : ((size << 13) + 0x70000000u) | 0x400000u;
  const Words magnitude = size < 0x400u ? tiny : size < 0x7C00u ? (size << 13) + 0x38000000u : special;
  return {(Floats)(magnitude | (h & 0x8000u) << 16)};
}
GENFAST_OP void store_half(uint16_t* p, VecF x) {
  const Words bits = (Words)x.v, size = bits & 0x7FFFFFFFu;
  const Words tiny = (Words)((Floats)size + 0.5f) - 0x3F000000u;  // rounds to a multiple of 2^-24
  const Words normal = (size + (0xFFFu + (size >> 13 & 1u)) - 0x38000000u) >> 13;
  const Words infinite = size > 0x7F800000u ? Words{} + 0x7E00u : Words{} + 0x7C00u;
  const Words half = size < 0x38800000u ? tiny : size < 0x477FF000u ? normal : infinite;  // 65520 rounds to infinity
  store_low16(p, {half | (bits >> 16 & 0x8000u)});
}

struct RoundKeys {
  uint64_t seed;
};
GENFAST_OP void make_round_keys(uint64_t seed, RoundKeys* keys) { keys->seed = seed; }

// Philox of kWidth consecutive counters; lane i of word w belongs to counter group + i (see vec_math.h's interleave4).
GENFAST_OP void philox_lane(int i, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const RoundKeys& keys,
                            uint32_t words[4][kWidth]) {
  uint32_t k0 = static_cast<uint32_t>(keys.seed), k1 = static_cast<uint32_t>(keys.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0][i] = c0;
  words[1][i] = c1;
  words[2][i] = c2;
  words[3][i] = c3;
}

GENFAST_OP void philox_lanes(uint64_t group, uint32_t c1_fixed, bool group_is_64_bit, uint32_t c2, uint32_t c3,
                             const RoundKeys& keys, VecU words[4]) {
  uint32_t found[4][kWidth];
  GENFAST_LANES {
    const uint64_t counter = group + static_cast<uint64_t>(i);
    philox_lane(i, static_cast<uint32_t>(counter), group_is_64_bit ? static_cast<uint32_t>(counter >> 32) : c1_fixed,
                c2, c3, keys, found);
  }
  memcpy(words, found, sizeof found);
}

// Philox of counters (c0, row + lane, c2, c3), lanes in order.
GENFAST_OP void philox_rows(uint32_t c0, uint32_t row, uint32_t c2, uint32_t c3, const RoundKeys& keys, VecU words[4]) {
  uint32_t found[4][kWidth];
  GENFAST_LANES philox_lane(i, c0, row + static_cast<uint32_t>(i), c2, c3, keys, found);
  memcpy(words, found, sizeof found);
}

// Stores the values of kWidth groups of four in index order.
GENFAST_OP void interleave4(const VecF n[4], float* out) {
  GENFAST_LANES store_float(out + 4 * i, {Floats{n[0].v[i], n[1].v[i], n[2].v[i], n[3].v[i]}});
}

// Elements 0, 2, ... and 1, 3, ... of two vectors of memory order, and back.
GENFAST_OP void unzip(VecF low, VecF high, VecF* even, VecF* odd) {
  *even = {Floats{low.v[0], low.v[2], high.v[0], high.v[2]}};
  *odd = {Floats{low.v[1], low.v[3], high.v[1], high.v[3]}};
}
GENFAST_OP void zip(VecF even, VecF odd, VecF* low, VecF* high) {
  *low = {Floats{even.v[0], odd.v[0], even.v[1], odd.v[1]}};
  *high = {Floats{even.v[2], odd.v[2], even.v[3], odd.v[3]}};
}

// Lane i: the sum over vector i.
GENFAST_OP VecF sums_of(const VecF square[kWidth]) {
  return {Floats{sum(square[0]), sum(square[1]), sum(square[2]), sum(square[3])}};
}

// Lane j of vector i goes to lane i of vector j.
GENFAST_OP void transpose(VecF square[kWidth]) {
  const Floats a = square[0].v, b = square[1].v, c = square[2].v, d = square[3].v;
  GENFAST_LANES square[i].v = Floats{a[i], b[i], c[i], d[i]};
}

#undef GENFAST_LANES
#undef GENFAST_OP

}  // namespace GENFAST_ISA
}  // namespace genfast
