// vec.h with AVX2, FMA and F16C: eight lanes.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace genfast {
namespace GENFAST_ISA {

#define GENFAST_OP static inline __attribute__((always_inline))

constexpr int kWidth = 8;

struct VecF {
  __m256 v;
};
struct VecU {
  __m256i v;
};
struct Mask {
  __m256 v;
};

GENFAST_OP VecF broadcast(float x) { return {_mm256_set1_ps(x)}; }
GENFAST_OP VecU broadcast(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
GENFAST_OP VecF load_float(const float* p) { return {_mm256_loadu_ps(p)}; }
GENFAST_OP void store_float(float* p, VecF x) { _mm256_storeu_ps(p, x.v); }
// Past the caches: p is aligned to the vector, and stream_fence() ends a run of them.
GENFAST_OP void stream_float(float* p, VecF x) { _mm256_stream_ps(p, x.v); }
GENFAST_OP void stream_fence() { _mm_sfence(); }
GENFAST_OP VecU load_u16(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
GENFAST_OP void store_low16(uint16_t* p, VecU x) {
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.v, _mm256_set1_epi32(0xFFFF)), _mm256_setzero_si256());
  const __m256i joined = _mm256_permute4x64_epi64(packed, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
}
GENFAST_OP VecF load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
GENFAST_OP void store_half(uint16_t* p, VecF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

GENFAST_OP VecF as_float(VecU x) { return {_mm256_castsi256_ps(x.v)}; }
GENFAST_OP VecU as_uint(VecF x) { return {_mm256_castps_si256(x.v)}; }

GENFAST_OP VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
GENFAST_OP VecF sub(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
GENFAST_OP VecF mul(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
GENFAST_OP VecF div(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
GENFAST_OP VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
GENFAST_OP VecF sqrt(VecF a) { return {_mm256_sqrt_ps(a.v)}; }
GENFAST_OP VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
GENFAST_OP VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }

GENFAST_OP VecU add(VecU a, VecU b) { return {_mm256_add_epi32(a.v, b.v)}; }
GENFAST_OP VecU sub(VecU a, VecU b) { return {_mm256_sub_epi32(a.v, b.v)}; }
GENFAST_OP VecU bit_and(VecU a, VecU b) { return {_mm256_and_si256(a.v, b.v)}; }
GENFAST_OP VecU bit_or(VecU a, VecU b) { return {_mm256_or_si256(a.v, b.v)}; }
GENFAST_OP VecU bit_xor(VecU a, VecU b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int N>
GENFAST_OP VecU shift_left(VecU a) {
  return {_mm256_slli_epi32(a.v, N)};
}
template <int N>
GENFAST_OP VecU shift_right(VecU a) {
  return {_mm256_srli_epi32(a.v, N)};
}

GENFAST_OP Mask less(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
GENFAST_OP Mask equal(VecU a, VecU b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
GENFAST_OP Mask is_nan(VecF a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
GENFAST_OP Mask sign_bit(VecU a) { return {_mm256_castsi256_ps(a.v)}; }  // only for select
GENFAST_OP Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
GENFAST_OP Mask no_lane() { return {_mm256_setzero_ps()}; }
GENFAST_OP bool any(Mask a) { return _mm256_movemask_ps(a.v) != 0; }
GENFAST_OP uint32_t lane_bits(Mask a) { return static_cast<uint32_t>(_mm256_movemask_ps(a.v)); }  // lane i to bit i
GENFAST_OP Mask mask_of(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane))};
}
GENFAST_OP VecF select(Mask m, VecF a, VecF b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
GENFAST_OP VecU select(Mask m, VecU a, VecU b) { return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))}; }

GENFAST_OP VecF float_from_int(VecU a) { return {_mm256_cvtepi32_ps(a.v)}; }
GENFAST_OP VecU int_from_float(VecF a) { return {_mm256_cvtps_epi32(a.v)}; }

GENFAST_OP float sum(VecF a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// The key of each Philox round, in every lane; kept in memory, where the exclusive-or reads it at no cost.
struct RoundKeys {
  __m256i k0[10], k1[10];
};

GENFAST_OP void make_round_keys(uint64_t seed, RoundKeys* keys) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    keys->k0[round] = _mm256_set1_epi64x(k0);
    keys->k1[round] = _mm256_set1_epi64x(k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  __asm__ volatile("" : : "r"(keys) : "memory");  // else the compiler rebuilds them from scalars in every batch
}

// Philox of eight consecutive counters, in 64-bit lanes: vpmuludq reads only the low word of a lane, so the high words
// may hold anything and each round costs two multiplications, two shifts and four exclusive-ors for four counters.
GENFAST_OP void philox_quarter(__m256i c0, __m256i c1, __m256i c2, __m256i c3, const RoundKeys& keys,
                               __m256i words[4]) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53ll), m1 = _mm256_set1_epi64x(0xCD9E8D57ll);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, keys.k0[round]));
    c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, keys.k1[round]));
    c1 = p1;
    c3 = p0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// 32-bit lane l = 4 b + j of a word belongs to counter group + 2 j + b: the order that interleave4 undoes.
GENFAST_OP void philox_lanes(uint64_t group, uint32_t c1_fixed, bool group_is_64_bit, uint32_t c2, uint32_t c3,
                             const RoundKeys& keys, VecU words[4]) {
  const __m256i base = _mm256_set1_epi64x(static_cast<long long>(group));
  const __m256i even = _mm256_add_epi64(base, _mm256_setr_epi64x(0, 4, 1, 5));
  const __m256i odd = _mm256_add_epi64(base, _mm256_setr_epi64x(2, 6, 3, 7));
  const __m256i fixed = _mm256_set1_epi64x(c1_fixed);
  const __m256i v2 = _mm256_set1_epi64x(c2), v3 = _mm256_set1_epi64x(c3);
  __m256i a[4], b[4];
  philox_quarter(even, group_is_64_bit ? _mm256_srli_epi64(even, 32) : fixed, v2, v3, keys, a);
  philox_quarter(odd, group_is_64_bit ? _mm256_srli_epi64(odd, 32) : fixed, v2, v3, keys, b);
  for (int w = 0; w < 4; ++w) words[w].v = _mm256_blend_epi32(a[w], _mm256_slli_epi64(b[w], 32), 0xAA);
}

// Philox of counters (c0, row + lane, c2, c3), lanes in order.
GENFAST_OP void philox_rows(uint32_t c0, uint32_t row, uint32_t c2, uint32_t c3, const RoundKeys& keys, VecU words[4]) {
  const __m256i base = _mm256_set1_epi64x(row);
  const __m256i v0 = _mm256_set1_epi64x(c0), v2 = _mm256_set1_epi64x(c2), v3 = _mm256_set1_epi64x(c3);
  __m256i a[4], b[4];
  philox_quarter(v0, _mm256_add_epi64(base, _mm256_setr_epi64x(0, 2, 4, 6)), v2, v3, keys, a);
  philox_quarter(v0, _mm256_add_epi64(base, _mm256_setr_epi64x(1, 3, 5, 7)), v2, v3, keys, b);
  for (int w = 0; w < 4; ++w) words[w].v = _mm256_blend_epi32(a[w], _mm256_slli_epi64(b[w], 32), 0xAA);
}

GENFAST_OP void interleave4(const VecF n[4], float* out) {
  const __m256 t0 = _mm256_unpacklo_ps(n[0].v, n[1].v), t1 = _mm256_unpackhi_ps(n[0].v, n[1].v);
  const __m256 t2 = _mm256_unpacklo_ps(n[2].v, n[3].v), t3 = _mm256_unpackhi_ps(n[2].v, n[3].v);
  const __m256d d0 = _mm256_castps_pd(t0), d1 = _mm256_castps_pd(t1), d2 = _mm256_castps_pd(t2),
                d3 = _mm256_castps_pd(t3);
  _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_unpacklo_pd(d0, d2)));
  _mm256_storeu_ps(out + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(d0, d2)));
  _mm256_storeu_ps(out + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(d1, d3)));
  _mm256_storeu_ps(out + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(d1, d3)));
}

// Elements 0, 2, ... and 1, 3, ... of two vectors of memory order, and back.
GENFAST_OP void unzip(VecF low, VecF high, VecF* even, VecF* odd) {
  const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(low.v, high.v, 0x88));
  const __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(low.v, high.v, 0xDD));
  even->v = _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xD8));
  odd->v = _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xD8));
}
GENFAST_OP void zip(VecF even, VecF odd, VecF* low, VecF* high) {
  const __m256 l = _mm256_unpacklo_ps(even.v, odd.v), h = _mm256_unpackhi_ps(even.v, odd.v);
  low->v = _mm256_permute2f128_ps(l, h, 0x20);
  high->v = _mm256_permute2f128_ps(l, h, 0x31);
}

// Lane i: the sum over vector i. Half the shuffles of a transpose.
GENFAST_OP VecF sums_of(const VecF square[kWidth]) {
  __m256 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    const __m256 a = square[2 * i].v, b = square[2 * i + 1].v;
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {  // of vectors 4 i ... 4 i + 3, over each 128-bit part
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                        _mm256_permute2f128_ps(quads[0], quads[1], 0x31))};
}

// Lane j of vector i goes to lane i of vector j.
GENFAST_OP void transpose(VecF square[kWidth]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(square[i].v, square[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(square[i].v, square[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    square[i].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    square[i + 4].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

#undef GENFAST_OP

}  // namespace GENFAST_ISA
}  // namespace genfast
