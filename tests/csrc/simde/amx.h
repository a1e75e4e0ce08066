// AMX tiles in plain C++, included by immintrin.h in this folder: the instructions that product_amx.h uses, with the
// semantics of Intel's manual ("TDPBF16PS", volume 2B). A use that the CPU would refuse ends the process, and
// so do tiles that were not released before they are configured again.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xmmintrin.h>

struct GenfastTiles {
  bool configured;
  uint8_t rows[8];
  uint16_t bytes[8];
  alignas(64) uint8_t data[8][16][64];
};

inline thread_local GenfastTiles genfast_tiles;  // one, whichever file configures it

static inline void genfast_tile_require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "AMX emulation: %s\n", what);
  abort();
}

static inline void genfast_tile_loadconfig(const void* config) {
  genfast_tile_require(!genfast_tiles.configured, "configured twice: an earlier use did not release its tiles");
  const auto* bytes = static_cast<const uint8_t*>(config);
  genfast_tile_require(bytes[0] == 1 && bytes[1] == 0, "palette 1 and start row 0 expected");
  for (int i = 2; i < 16; ++i) genfast_tile_require(bytes[i] == 0, "reserved bytes of the configuration");
  genfast_tiles.configured = true;
  for (int t = 0; t < 8; ++t) {
    memcpy(&genfast_tiles.bytes[t], bytes + 16 + 2 * t, 2);
    genfast_tiles.rows[t] = bytes[48 + t];
    genfast_tile_require(genfast_tiles.bytes[t] <= 64 && genfast_tiles.rows[t] <= 16, "size of a tile");
  }
  memset(genfast_tiles.data, 0, sizeof genfast_tiles.data);
}

static inline void genfast_tile_release() { genfast_tiles.configured = false; }

static inline void genfast_tile_zero(int t) {
  genfast_tile_require(genfast_tiles.configured, "tilezero without a configuration");
  memset(genfast_tiles.data[t], 0, sizeof genfast_tiles.data[t]);
}

static inline void genfast_tile_loadd(int t, const void* base, int64_t stride) {
  genfast_tile_require(genfast_tiles.configured, "tileloadd without a configuration");
  genfast_tile_zero(t);
  for (int row = 0; row < genfast_tiles.rows[t]; ++row) {
    memcpy(genfast_tiles.data[t][row], static_cast<const char*>(base) + row * stride, genfast_tiles.bytes[t]);
  }
}

static inline void genfast_tile_stored(int t, void* base, int64_t stride) {
  genfast_tile_require(genfast_tiles.configured, "tilestored without a configuration");
  for (int row = 0; row < genfast_tiles.rows[t]; ++row) {
    memcpy(static_cast<char*>(base) + row * stride, genfast_tiles.data[t][row], genfast_tiles.bytes[t]);
  }
}

// sums += a b. Even and odd elements of the pairs have sums of their own, each a chain of fused multiply-adds from
// zero; their sum is added last. Not inlined: the caller has set the CPU to treat subnormal numbers as zero.
__attribute__((noinline)) static void genfast_tile_multiply(float (*sums)[16], const uint16_t (*a)[32],
                                                            const uint16_t (*b)[32], int rows, int columns, int pairs) {
  float even_b[16][16] = {}, odd_b[16][16] = {};
  const auto widened = [](uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
  };
  for (int k = 0; k < pairs; ++k) {
    for (int n = 0; n < columns; ++n) {
      even_b[k][n] = widened(b[k][2 * n]);
      odd_b[k][n] = widened(b[k][2 * n + 1]);
    }
  }
  for (int m = 0; m < rows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < pairs; ++k) {
      const float even_a = widened(a[m][2 * k]), odd_a = widened(a[m][2 * k + 1]);
      for (int n = 0; n < 16; ++n) {
        even[n] = __builtin_fmaf(even_a, even_b[k][n], even[n]);
        odd[n] = __builtin_fmaf(odd_a, odd_b[k][n], odd[n]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      const float both = even[n] + odd[n];
      sums[m][n] = sums[m][n] + both;
    }
  }
}

static inline void genfast_tile_dpbf16ps(int c, int a, int b) {
  const GenfastTiles& t = genfast_tiles;
  genfast_tile_require(t.configured, "tdpbf16ps without a configuration");
  genfast_tile_require(c != a && c != b && a != b, "three different tiles expected");
  genfast_tile_require(t.bytes[a] % 4 == 0 && t.bytes[b] % 4 == 0 && t.bytes[c] == t.bytes[b] &&
                           t.rows[c] == t.rows[a] && t.bytes[a] / 4 == t.rows[b],
                       "sizes of tiles do not agree");
  float sums[16][16];
  uint16_t left[16][32], right[16][32];
  memcpy(sums, t.data[c], sizeof sums);
  memcpy(left, t.data[a], sizeof left);
  memcpy(right, t.data[b], sizeof right);
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040, kMasked = 0x1F80;  // and round to nearest even
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kMasked | kFlushToZero | kDenormalsAreZero);
  __asm__ volatile("" ::: "memory");
  genfast_tile_multiply(sums, left, right, t.rows[c], t.bytes[c] / 4, t.bytes[a] / 4);
  __asm__ volatile("" ::: "memory");
  _mm_setcsr(before);
  memcpy(genfast_tiles.data[c], sums, sizeof sums);
}

// VCVTNE2PS2BF16: the second operand fills the lower half.
static inline simde__m512i genfast_cvtne2ps_pbh(simde__m512 high, simde__m512 low) {
  uint32_t words[32];
  uint16_t rounded[32];
  simde_mm512_storeu_ps(words, low);
  simde_mm512_storeu_ps(words + 16, high);
  for (int i = 0; i < 32; ++i) {
    const uint32_t magnitude = words[i] & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) {
      rounded[i] = static_cast<uint16_t>(words[i] >> 16 | 0x40u);
    } else if (magnitude < 0x00800000u) {
      rounded[i] = static_cast<uint16_t>(words[i] >> 16 & 0x8000u);
    } else {
      rounded[i] = static_cast<uint16_t>((words[i] + 0x7FFFu + (words[i] >> 16 & 1u)) >> 16);
    }
  }
  return simde_mm512_loadu_si512(rounded);
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _mm512_cvtne2ps_pbh
#define _tile_loadconfig(config) genfast_tile_loadconfig(config)
#define _tile_release() genfast_tile_release()
#define _tile_zero(t) genfast_tile_zero(t)
#define _tile_loadd(t, base, stride) genfast_tile_loadd(t, base, stride)
#define _tile_stored(t, base, stride) genfast_tile_stored(t, base, stride)
#define _tile_dpbf16ps(c, a, b) genfast_tile_dpbf16ps(c, a, b)
#define _mm512_cvtne2ps_pbh(high, low) genfast_cvtne2ps_pbh(high, low)
