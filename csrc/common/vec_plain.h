// vec.h for any CPU: plain loops over four lanes, which compilers turn into SSE2 or NEON.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace genfast {
namespace GENFAST_ISA {

#define GENFAST_OP static inline __attribute__((always_inline))
#define GENFAST_LANES for (int i = 0; i < kWidth; ++i)

constexpr int kWidth = 4;

struct VecF {
  float v[kWidth];
};
struct VecU {
  uint32_t v[kWidth];
};
struct Mask {
  bool v[kWidth];
};

// clang-format off: one operation a line
GENFAST_OP VecF broadcast(float x) { VecF r; GENFAST_LANES r.v[i] = x; return r; }
GENFAST_OP VecU broadcast(uint32_t x) { VecU r; GENFAST_LANES r.v[i] = x; return r; }
GENFAST_OP VecF load_float(const float* p) { VecF r; memcpy(r.v, p, sizeof r.v); return r; }
GENFAST_OP void store_float(float* p, VecF x) { memcpy(p, x.v, sizeof x.v); }
GENFAST_OP void stream_float(float* p, VecF x) { store_float(p, x); }
GENFAST_OP void stream_fence() {}
GENFAST_OP VecU load_u16(const uint16_t* p) { VecU r; GENFAST_LANES r.v[i] = p[i]; return r; }
GENFAST_OP void store_low16(uint16_t* p, VecU x) { GENFAST_LANES p[i] = static_cast<uint16_t>(x.v[i]); }

GENFAST_OP VecF as_float(VecU x) { VecF r; memcpy(r.v, x.v, sizeof r.v); return r; }
GENFAST_OP VecU as_uint(VecF x) { VecU r; memcpy(r.v, x.v, sizeof r.v); return r; }

GENFAST_OP VecF add(VecF a, VecF b) { GENFAST_LANES a.v[i] += b.v[i]; return a; }
GENFAST_OP VecF sub(VecF a, VecF b) { GENFAST_LANES a.v[i] -= b.v[i]; return a; }
GENFAST_OP VecF mul(VecF a, VecF b) { GENFAST_LANES a.v[i] *= b.v[i]; return a; }
GENFAST_OP VecF div(VecF a, VecF b) { GENFAST_LANES a.v[i] /= b.v[i]; return a; }
GENFAST_OP VecF fma(VecF a, VecF b, VecF c) { GENFAST_LANES a.v[i] = a.v[i] * b.v[i] + c.v[i]; return a; }
GENFAST_OP VecF sqrt(VecF a) { GENFAST_LANES a.v[i] = ::sqrtf(a.v[i]); return a; }
// As the SSE instructions: the second operand where either is NaN.
GENFAST_OP VecF min(VecF a, VecF b) { GENFAST_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
GENFAST_OP VecF max(VecF a, VecF b) { GENFAST_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }

GENFAST_OP VecU add(VecU a, VecU b) { GENFAST_LANES a.v[i] += b.v[i]; return a; }
GENFAST_OP VecU sub(VecU a, VecU b) { GENFAST_LANES a.v[i] -= b.v[i]; return a; }
GENFAST_OP VecU bit_and(VecU a, VecU b) { GENFAST_LANES a.v[i] &= b.v[i]; return a; }
GENFAST_OP VecU bit_or(VecU a, VecU b) { GENFAST_LANES a.v[i] |= b.v[i]; return a; }
GENFAST_OP VecU bit_xor(VecU a, VecU b) { GENFAST_LANES a.v[i] ^= b.v[i]; return a; }
template <int N>
GENFAST_OP VecU shift_left(VecU a) { GENFAST_LANES a.v[i] <<= N; return a; }
template <int N>
GENFAST_OP VecU shift_right(VecU a) { GENFAST_LANES a.v[i] >>= N; return a; }

GENFAST_OP Mask less(VecF a, VecF b) { Mask r; GENFAST_LANES r.v[i] = a.v[i] < b.v[i]; return r; }
GENFAST_OP Mask equal(VecU a, VecU b) { Mask r; GENFAST_LANES r.v[i] = a.v[i] == b.v[i]; return r; }
GENFAST_OP Mask is_nan(VecF a) { Mask r; GENFAST_LANES r.v[i] = a.v[i] != a.v[i]; return r; }
GENFAST_OP Mask sign_bit(VecU a) { Mask r; GENFAST_LANES r.v[i] = (a.v[i] >> 31) != 0; return r; }  // only for select
GENFAST_OP Mask either(Mask a, Mask b) { GENFAST_LANES a.v[i] = a.v[i] || b.v[i]; return a; }
GENFAST_OP Mask no_lane() { Mask r; GENFAST_LANES r.v[i] = false; return r; }
GENFAST_OP bool any(Mask a) { bool r = false; GENFAST_LANES r = r || a.v[i]; return r; }
GENFAST_OP uint32_t lane_bits(Mask a) { uint32_t r = 0; GENFAST_LANES r |= static_cast<uint32_t>(a.v[i]) << i; return r; }  // lane i to bit i
GENFAST_OP Mask mask_of(uint32_t bits) { Mask r; GENFAST_LANES r.v[i] = (bits >> i & 1) != 0; return r; }
GENFAST_OP VecF select(Mask m, VecF a, VecF b) { GENFAST_LANES a.v[i] = m.v[i] ? a.v[i] : b.v[i]; return a; }
GENFAST_OP VecU select(Mask m, VecU a, VecU b) { GENFAST_LANES a.v[i] = m.v[i] ? a.v[i] : b.v[i]; return a; }

// Signed 32-bit integers to float and back (nearest even).
GENFAST_OP VecF float_from_int(VecU a) { VecF r; GENFAST_LANES r.v[i] = static_cast<float>(static_cast<int32_t>(a.v[i])); return r; }
// clang-format on
GENFAST_OP VecU int_from_float(VecF a) {
  // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits; |a| < 2^22.
  VecU r;
  GENFAST_LANES {
    const float shifted = a.v[i] + 12582912.0f;
    memcpy(&r.v[i], &shifted, sizeof shifted);
    r.v[i] -= 0x4B400000u;
  }
  return r;
}

GENFAST_OP float sum(VecF a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

GENFAST_OP float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1F;
  uint32_t mantissa = h & 0x3FFu;
  uint32_t bits;
  if (exponent == 0x1F) {
    bits = sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
GENFAST_OP uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00u;
  if (bits >= 0x477FF000u) return sign | 0x7C00u;  // rounds to infinity from 65520
  if (bits < 0x38800000u) {                        // subnormal: let float addition round to a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof bits);
    return sign | static_cast<uint16_t>(bits - 0x3F000000u);
  }
  bits += 0xFFFu + ((bits >> 13) & 1u) - 0x38000000u;
  return sign | static_cast<uint16_t>(bits >> 13);
}
GENFAST_OP VecF load_half(const uint16_t* p) {
  VecF r;
  GENFAST_LANES r.v[i] = half_to_float(p[i]);
  return r;
}
GENFAST_OP void store_half(uint16_t* p, VecF x) { GENFAST_LANES p[i] = float_to_half(x.v[i]); }

struct RoundKeys {
  uint64_t seed;
};
GENFAST_OP void make_round_keys(uint64_t seed, RoundKeys* keys) { keys->seed = seed; }

// Philox of kWidth consecutive counters; lane i of word w belongs to counter group + i (see vec_math.h's interleave4).
GENFAST_OP void philox_lane(int i, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const RoundKeys& keys,
                            VecU words[4]) {
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
  words[0].v[i] = c0;
  words[1].v[i] = c1;
  words[2].v[i] = c2;
  words[3].v[i] = c3;
}

GENFAST_OP void philox_lanes(uint64_t group, uint32_t c1_fixed, bool group_is_64_bit, uint32_t c2, uint32_t c3,
                             const RoundKeys& keys, VecU words[4]) {
  GENFAST_LANES {
    const uint64_t counter = group + static_cast<uint64_t>(i);
    philox_lane(i, static_cast<uint32_t>(counter), group_is_64_bit ? static_cast<uint32_t>(counter >> 32) : c1_fixed,
                c2, c3, keys, words);
  }
}

// Philox of counters (c0, row + lane, c2, c3), lanes in order.
GENFAST_OP void philox_rows(uint32_t c0, uint32_t row, uint32_t c2, uint32_t c3, const RoundKeys& keys, VecU words[4]) {
  GENFAST_LANES philox_lane(i, c0, row + static_cast<uint32_t>(i), c2, c3, keys, words);
}

// Stores the values of kWidth groups of four in index order.
GENFAST_OP void interleave4(const VecF n[4], float* out) {
  GENFAST_LANES for (int w = 0; w < 4; ++w) out[4 * i + w] = n[w].v[i];
}

// Elements 0, 2, ... and 1, 3, ... of two vectors of memory order, and back.
GENFAST_OP void unzip(VecF low, VecF high, VecF* even, VecF* odd) {
  float all[2 * kWidth];
  store_float(all, low);
  store_float(all + kWidth, high);
  GENFAST_LANES even->v[i] = all[2 * i];
  GENFAST_LANES odd->v[i] = all[2 * i + 1];
}
GENFAST_OP void zip(VecF even, VecF odd, VecF* low, VecF* high) {
  float all[2 * kWidth];
  GENFAST_LANES all[2 * i] = even.v[i];
  GENFAST_LANES all[2 * i + 1] = odd.v[i];
  *low = load_float(all);
  *high = load_float(all + kWidth);
}

#undef GENFAST_LANES
// Lane i: the sum over vector i.
GENFAST_OP VecF sums_of(const VecF square[kWidth]) {
  VecF out;
  for (int i = 0; i < kWidth; ++i) out.v[i] = sum(square[i]);
  return out;
}

// Lane j of vector i goes to lane i of vector j.
GENFAST_OP void transpose(VecF square[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = square[i].v[j];
      square[i].v[j] = square[j].v[i];
      square[j].v[i] = x;
    }
  }
}

#undef GENFAST_OP

}  // namespace GENFAST_ISA
}  // namespace genfast
