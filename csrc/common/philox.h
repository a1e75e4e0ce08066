// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and genfast's counter layouts.
//
// Every random number is a pure function of (seed, stream, step, coordinates), so that any backend, tile, grid or shard
// draws what the whole would. The key is the 64-bit seed (low word, high word). Counters, 32 bits each:
//
//   layout          c0                 c1                  c2                      c3                 word
//   tensor          low(index / 4)     high(index / 4)     step                    kTensor*           index % 4
//   RBM unit        unit / 4           global chain        Gibbs half-step         kRbm*              unit % 4
//   attention       column / 8         row                 batch * heads + head    kAttentionDropout  16-bit lane
//   column % 8
//
// uniform  u = (word >> 8) * 2^-24, in [0, 1), equal bit for bit on every backend.
// normal   Box-Muller on the words (a, b) = (w0, w1) and (w2, w3): radius sqrt(-2 ln((a + 1) 2^-32)), angle b 2^-32
//          turns; the even element takes the cosine, the odd one the sine. The radius is never infinite and the tails
//          reach 6.66 sigma.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GENFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set's object keeps its own copy (see cpu_features.h).
#define GENFAST_HOST_DEVICE static inline
#endif

namespace genfast {
namespace philox {

enum Stream : uint32_t {
  kTensorNormal = 1,
  kTensorUniform = 2,
  kRbmUnit = 3,
  kAttentionDropout = 4,
  kRbmNormal = 5,
  kRbmSwap = 6,
};

constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

struct Words {
  uint32_t w[4];
};

GENFAST_HOST_DEVICE Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

GENFAST_HOST_DEVICE Words tensor_words(uint64_t group, uint32_t step, uint32_t stream, uint64_t seed) {
  return philox(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), step, stream, seed);
}

GENFAST_HOST_DEVICE Words rbm_words(uint32_t unit_group, uint32_t chain, uint32_t step, uint64_t seed) {
  return philox(unit_group, chain, step, kRbmUnit, seed);
}

GENFAST_HOST_DEVICE float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 5.9604644775390625e-8f; }

}  // namespace philox
}  // namespace genfast
