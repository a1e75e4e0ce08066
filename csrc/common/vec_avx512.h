// vec.h with AVX-512 (F, BW, DQ, VL): sixteen lanes.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace genfast {
namespace GENFAST_ISA {

#define GENFAST_OP static inline __attribute__((always_inline))

constexpr int kWidth = 16;

struct VecF {
  __m512 v;
};
struct VecU {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

GENFAST_OP VecF broadcast(float x) { return {_mm512_set1_ps(x)}; }
GENFAST_OP VecU broadcast(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
GENFAST_OP VecF load_float(const float* p) { return {_mm512_loadu_ps(p)}; }
GENFAST_OP void store_float(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
// Past the caches: p is aligned to the vector, and stream_fence() ends a run of them.
GENFAST_OP void stream_float(float* p, VecF x) {
  _mm256_stream_ps(p, _mm512_castps512_ps256(x.v));
  _mm256_stream_ps(p + 8, _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(x.v), 1)));
}
GENFAST_OP void stream_fence() { _mm_sfence(); }
GENFAST_OP VecU load_u16(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
GENFAST_OP void store_low16(uint16_t* p, VecU x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
}
GENFAST_OP VecF load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
GENFAST_OP void store_half(uint16_t* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

GENFAST_OP VecF as_float(VecU x) { return {_mm512_castsi512_ps(x.v)}; }
GENFAST_OP VecU as_uint(VecF x) { return {_mm512_castps_si512(x.v)}; }

GENFAST_OP VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
GENFAST_OP VecF sub(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
GENFAST_OP VecF mul(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
GENFAST_OP VecF div(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
GENFAST_OP VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
GENFAST_OP VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
GENFAST_OP VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
GENFAST_OP VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }

GENFAST_OP VecU add(VecU a, VecU b) { return {_mm512_add_epi32(a.v, b.v)}; }
GENFAST_OP VecU sub(VecU a, VecU b) { return {_mm512_sub_epi32(a.v, b.v)}; }
GENFAST_OP VecU bit_and(VecU a, VecU b) { return {_mm512_and_si512(a.v, b.v)}; }
GENFAST_OP VecU bit_or(VecU a, VecU b) { return {_mm512_or_si512(a.v, b.v)}; }
GENFAST_OP VecU bit_xor(VecU a, VecU b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N>
GENFAST_OP VecU shift_left(VecU a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
GENFAST_OP VecU shift_right(VecU a) {
  return {_mm512_srli_epi32(a.v, N)};
}

GENFAST_OP Mask less(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
GENFAST_OP Mask equal(VecU a, VecU b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
GENFAST_OP Mask is_nan(VecF a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
GENFAST_OP Mask sign_bit(VecU a) { return {_mm512_movepi32_mask(a.v)}; }  // only for select
GENFAST_OP Mask either(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
GENFAST_OP Mask no_lane() { return {0}; }
GENFAST_OP bool any(Mask a) { return a.v != 0; }
GENFAST_OP uint32_t lane_bits(Mask a) { return a.v; }  // lane i to bit i
GENFAST_OP Mask mask_of(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }
GENFAST_OP VecF select(Mask m, VecF a, VecF b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
GENFAST_OP VecU select(Mask m, VecU a, VecU b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

GENFAST_OP VecF float_from_int(VecU a) { return {_mm512_cvtepi32_ps(a.v)}; }
GENFAST_OP VecU int_from_float(VecF a) { return {_mm512_cvtps_epi32(a.v)}; }

// Halves first: the order is fixed.
GENFAST_OP float sum(VecF a) {
  const __m512 quarter = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4E));
  const __m512 eighth = _mm512_add_ps(quarter, _mm512_shuffle_f32x4(quarter, quarter, 0xB1));
  const __m128 four = _mm512_castps512_ps128(eighth);
  const __m128 pair = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// The key of each Philox round, in every lane; kept in memory, where the exclusive-or reads it at no cost.
struct RoundKeys {
  __m512i k0[10], k1[10];
};

GENFAST_OP void make_round_keys(uint64_t seed, RoundKeys* keys) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    keys->k0[round] = _mm512_set1_epi64(k0);
    keys->k1[round] = _mm512_set1_epi64(k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  __asm__ volatile("" : : "r"(keys) : "memory");  // else the compiler rebuilds them from scalars in every batch
}

// Philox of sixteen consecutive counters, in 64-bit lanes: vpmuludq reads only the low word of a lane, so the high
// words may hold anything and each round costs two multiplications, two shifts and four exclusive-ors for eight
// counters.
GENFAST_OP void philox_half(__m512i c0, __m512i c1, __m512i c2, __m512i c3, const RoundKeys& keys, __m512i words[4]) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53ll), m1 = _mm512_set1_epi64(0xCD9E8D57ll);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_xor_si512(_mm512_srli_epi64(p1, 32), _mm512_xor_si512(c1, keys.k0[round]));
    c2 = _mm512_xor_si512(_mm512_srli_epi64(p0, 32), _mm512_xor_si512(c3, keys.k1[round]));
    c1 = p1;
    c3 = p0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// 32-bit lane l = 4 b + j of a word belongs to counter group + 4 j + b: the order that interleave4 undoes.
GENFAST_OP void philox_lanes(uint64_t group, uint32_t c1_fixed, bool group_is_64_bit, uint32_t c2, uint32_t c3,
                             const RoundKeys& keys, VecU words[4]) {
  const __m512i base = _mm512_set1_epi64(static_cast<long long>(group));
  const __m512i even = _mm512_add_epi64(base, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11));
  const __m512i odd = _mm512_add_epi64(base, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15));
  const __m512i fixed = _mm512_set1_epi64(c1_fixed);
  const __m512i v2 = _mm512_set1_epi64(c2), v3 = _mm512_set1_epi64(c3);
  __m512i a[4], b[4];
  philox_half(even, group_is_64_bit ? _mm512_srli_epi64(even, 32) : fixed, v2, v3, keys, a);
  philox_half(odd, group_is_64_bit ? _mm512_srli_epi64(odd, 32) : fixed, v2, v3, keys, b);
  for (int w = 0; w < 4; ++w) words[w].v = _mm512_mask_blend_epi32(0xAAAA, a[w], _mm512_slli_epi64(b[w], 32));
}

// Philox of counters (c0, row + lane, c2, c3), lanes in order.
GENFAST_OP void philox_rows(uint32_t c0, uint32_t row, uint32_t c2, uint32_t c3, const RoundKeys& keys, VecU words[4]) {
  const __m512i base = _mm512_set1_epi64(row);
  const __m512i v0 = _mm512_set1_epi64(c0), v2 = _mm512_set1_epi64(c2), v3 = _mm512_set1_epi64(c3);
  __m512i a[4], b[4];
  philox_half(v0, _mm512_add_epi64(base, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14)), v2, v3, keys, a);
  philox_half(v0, _mm512_add_epi64(base, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15)), v2, v3, keys, b);
  for (int w = 0; w < 4; ++w) words[w].v = _mm512_mask_blend_epi32(0xAAAA, a[w], _mm512_slli_epi64(b[w], 32));
}

GENFAST_OP void interleave4(const VecF n[4], float* out) {
  const __m512 t0 = _mm512_unpacklo_ps(n[0].v, n[1].v), t1 = _mm512_unpackhi_ps(n[0].v, n[1].v);
  const __m512 t2 = _mm512_unpacklo_ps(n[2].v, n[3].v), t3 = _mm512_unpackhi_ps(n[2].v, n[3].v);
  const __m512d d0 = _mm512_castps_pd(t0), d1 = _mm512_castps_pd(t1), d2 = _mm512_castps_pd(t2),
                d3 = _mm512_castps_pd(t3);
  _mm512_storeu_ps(out, _mm512_castpd_ps(_mm512_unpacklo_pd(d0, d2)));
  _mm512_storeu_ps(out + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(d0, d2)));
  _mm512_storeu_ps(out + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(d1, d3)));
  _mm512_storeu_ps(out + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(d1, d3)));
}

// Elements 0, 2, ... and 1, 3, ... of two vectors of memory order, and back.
GENFAST_OP void unzip(VecF low, VecF high, VecF* even, VecF* odd) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even->v = _mm512_permutex2var_ps(low.v, evens, high.v);
  odd->v = _mm512_permutex2var_ps(low.v, _mm512_or_si512(evens, _mm512_set1_epi32(1)), high.v);
}
GENFAST_OP void zip(VecF even, VecF odd, VecF* low, VecF* high) {
  const __m512i lows = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low->v = _mm512_permutex2var_ps(even.v, lows, odd.v);
  high->v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(lows, _mm512_set1_epi32(8)), odd.v);
}

// Lane i: the sum over vector i. Half the shuffles of a transpose.
GENFAST_OP VecF sums_of(const VecF square[kWidth]) {
  __m512 pairs[8], quads[4];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = square[2 * i].v, b = square[2 * i + 1].v;
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {  // of vectors 4 i ... 4 i + 3, over each 128-bit part
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  return {halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]))};
}

// Lane j of vector i goes to lane i of vector j.
GENFAST_OP void transpose(VecF square[kWidth]) {
  __m512 pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(square[i].v, square[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(square[i].v, square[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {  // quads[4 g + i] holds, in its 128-bit part p, column 4 p + i of rows 4 g ... 4 g + 3
    const __m512 low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xDD);
    const __m512 high_odd = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xDD);
    square[i].v = _mm512_shuffle_f32x4(low, high, 0x88);
    square[i + 8].v = _mm512_shuffle_f32x4(low, high, 0xDD);
    square[i + 4].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    square[i + 12].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0xDD);
  }
}

#if defined(GENFAST_AMX)
// 32 floats in memory order, rounded to bfloat16 (nearest even, subnormal numbers to zero): 32-bit lane i holds
// elements 2 i and 2 i + 1.
GENFAST_OP VecU bfloat16_pairs(VecF low, VecF high) { return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)}; }
#endif

#undef GENFAST_OP

}  // namespace GENFAST_ISA
}  // namespace genfast
