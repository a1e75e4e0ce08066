// The inner product of the CPU matrix product on AMX tiles: 32 x 32 sums in four tiles, A and B in bfloat16 parts.
//
// A float32 is the sum of three bfloat16 (split_amx.h): x = hi + mid + lo, |mid| <= 2^-8 |x|, |lo| < 2^-16 |x|, without
// a rest: 24 bits are 8 + 8 + 8. A product of two is then
//
//   hi.hi + (hi.mid + mid.hi) + (hi.lo + mid.mid + lo.hi) + less than 2^-23 |a| |b|, of either sign
//
// and a tile product adds bfloat16 products to float32 sums: six of them give what float32 does, three where A is
// exact in bfloat16 (states 0 and 1). The smallest come first, so that a sum of one term has one rounding.
//
// One step is 32 of depth ("chunk"). A tile of A is 16 rows x 16 pairs, a tile of B 16 pairs x 16 columns, a pair being
// two neighbours in depth. Four products (64 cycles) follow each pair of B's tiles: with one part of A and three of B
// 12 products (192 cycles) to 8 loads of 1 KiB, with three and three 24 products to 20 loads. All loads are of whole
// tiles that lie together.
#pragma once

#include <immintrin.h>

#include "common/gemm/operands.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr int kTileRows = 16;
constexpr int kChunk = 32;              // of depth
constexpr int64_t kTileElements = 512;  // of a tile of A or B: 16 lines of 16 pairs

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 3: sums [row half][column half]; 4 and 5: A; 6 and 7: B. All 16 rows of 64 bytes.
static const TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// A thread's tiles, configured for as long as this lives; released ones cost nothing at a change of context.
struct TilesInUse {
  TilesInUse() { _tile_loadconfig(&kTileConfig); }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// Where the tiles of an operand are: one row tile of A at data, the next row_tile_stride further, part p p *
// part_stride further, the next chunk chunk_stride further; of B two tiles, 16 columns each, lie together.
struct Tiles {
  const uint16_t* data;
  int64_t row_tile_stride, part_stride, chunk_stride;
};

template <int kRowTiles>
GENFAST_INLINE void load_left(const Tiles& a, int64_t offset, int part) {
  const uint16_t* const from = a.data + offset + part * a.part_stride;
  _tile_loadd(4, from, 64);
  if constexpr (kRowTiles == 2) _tile_loadd(5, from + a.row_tile_stride, 64);
}

GENFAST_INLINE void load_right(const Tiles& b, int64_t offset, int part) {
  const uint16_t* const from = b.data + offset + part * b.part_stride;
  _tile_loadd(6, from, 64);
  _tile_loadd(7, from + kTileElements, 64);
}

template <int kRowTiles>
GENFAST_INLINE void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kRowTiles == 2) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// out[kRowTiles * 16, 32] = A B over `chunks`. Where A's mid and lo are zero, six products give the bits of three.
template <int kRowTiles, int kLeftParts, int kRightParts>
static void tile_product(Tiles a, Tiles b, int64_t chunks, float* out, int64_t stride) {
  constexpr int kHi = 0, kMid = 1, kLo = 2;
  __asm__ volatile("" ::: "memory");  // the compiler does not see that tile loads read memory
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kRowTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t i = 0, j = 0;  // of the chunk
  for (int64_t chunk = 0; chunk < chunks; ++chunk, i += a.chunk_stride, j += b.chunk_stride) {
    if constexpr (kLeftParts == 3) {
      load_left<kRowTiles>(a, i, kLo);
      load_right(b, j, kHi);
      multiply<kRowTiles>();
      load_left<kRowTiles>(a, i, kMid);
      if constexpr (kRightParts == 3) {
        load_right(b, j, kMid);
        multiply<kRowTiles>();
      } else {
        multiply<kRowTiles>();
      }
    }
    if constexpr (kRightParts == 3) {
      load_left<kRowTiles>(a, i, kHi);
      load_right(b, j, kLo);
      multiply<kRowTiles>();
      load_right(b, j, kMid);
      multiply<kRowTiles>();
      if constexpr (kLeftParts == 3) {
        load_left<kRowTiles>(a, i, kMid);
        load_right(b, j, kHi);
        multiply<kRowTiles>();
        load_left<kRowTiles>(a, i, kHi);
        multiply<kRowTiles>();
      } else {
        load_right(b, j, kHi);
        multiply<kRowTiles>();
      }
    } else {
      load_left<kRowTiles>(a, i, kHi);
      if constexpr (kLeftParts == 1) load_right(b, j, kHi);
      multiply<kRowTiles>();
    }
  }
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, out + 16 * stride, bytes);
    _tile_stored(3, out + 16 * stride + 16, bytes);
  }
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
