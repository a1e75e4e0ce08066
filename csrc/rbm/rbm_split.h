// A float32 as a sum of bfloat16 parts, for products on tensor cores: x = part 0 + part 1 + part 2, exactly where no
// part falls below the smallest normal number (8 bits each and two signs hold the 24 bits of a float32).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GENFAST_SPLIT_INLINE __host__ __device__ __forceinline__
#else
#define GENFAST_SPLIT_INLINE static inline
#endif

namespace genfast {
namespace split {

constexpr int kMostParts = 3;
// Products of parts are summed in tensor-core accumulators over kChunk inputs, those sums in float32, in order.
constexpr int kChunk = 64;

GENFAST_SPLIT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

GENFAST_SPLIT_INLINE float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The nearest bfloat16, ties to even; NaN stays NaN.
GENFAST_SPLIT_INLINE uint16_t rounded(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Writes `parts` parts of x and returns how many of them are needed. NaN and infinity are in the first part alone; the
// largest finite numbers are cut rather than rounded to infinity where a second part can take the rest.
GENFAST_SPLIT_INLINE int into_parts(float x, int parts, uint16_t (&part)[kMostParts]) {
  int needed = 1;
  part[0] = rounded(x);
  if (parts == 1) return needed;
  if ((part[0] & 0x7FFFu) == 0x7F80u && (bits_of(x) & 0x7F800000u) != 0x7F800000u) {
    part[0] = static_cast<uint16_t>(bits_of(x) >> 16);
  }
  const bool finite = (part[0] & 0x7F80u) != 0x7F80u;
  float rest = finite ? x - widened(part[0]) : 0.0f;
  for (int i = 1; i < parts; ++i) {
    part[i] = rounded(rest);
    rest -= widened(part[i]);
    if ((part[i] & 0x7FFFu) != 0) needed = i + 1;
  }
  return needed;
}

}  // namespace split
}  // namespace genfast
