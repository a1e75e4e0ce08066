// product.h on AMX tiles.
//
// A is converted to bfloat16 parts once a call: one where all of it is exact (states 0 and 1), else three. B is read a
// panel of 32 columns and a piece of the depth at a time, 24 KiB that the first cache keeps against all rows of A. Each
// piece is summed from zero in the tiles (4 KiB) and added to the block as vectors: short sums, which round less.
#pragma once

#include "common/gemm/split_amx.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr int kMaxRows = 2 * kTileRows;
constexpr bool kConvertsLeft = true;
// Each weight's three parts, 6 bytes, are used 512 times: 7 GB/s of them feed a core at 3.5 TFLOP/s.
constexpr int64_t kMostRows = 512;
constexpr int64_t kPieceElements = 12288;  // of B: three parts of 128, or one of 384, in depth

constexpr int64_t block_panels(int64_t columns, bool) {
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  return panels < kBlockPanels ? panels : kBlockPanels;
}

// `panels` by pack.h, with so many parts.
GENFAST_INLINE Right packed_right(const float* panels, int64_t depth, int parts) {
  return {panels, (depth + kChunk - 1) / kChunk * parts * kTileElements, 0, parts};
}

constexpr int64_t whole_tiles(int64_t x) { return (x + 31) / 32 * 32; }

// For A in three parts, each term's depth in whole chunks, and a piece of B.
constexpr int64_t room_floats(int64_t rows, int64_t depth, bool) {
  return whole_tiles(rows) * (whole_tiles(depth) + (kMostTerms - 1) * kChunk) * 3 / 2 + kPieceElements / 2;
}

struct ConvertedLeft {
  Tiles tiles;
  int parts;
};

template <int kParts>
static bool convert_left(const Term& term, int64_t rows, bool only_exact, const Tiles& tiles, uint16_t* out) {
  const Left& a = term.a;
  for (int64_t row = 0; row < rows; row += kTileRows, out += tiles.row_tile_stride) {
    VecU bits = broadcast(uint32_t{0});
    for (int64_t k = 0; k < term.depth; k += kChunk) {
      uint16_t* const to = out + k / kChunk * tiles.chunk_stride;
      if (a.step == 1) {
        const auto line = [&](int i) -> Line {
          const float* from = a.data + (row + i < rows ? row + i : 0) * a.row_stride + k;
          const int64_t count = row + i < rows ? term.depth - k : 0;
          return {load_within(from, count), load_within(from + kWidth, count - kWidth)};
        };
        bits = bit_or(bits, convert_tile<Source::kAlong, false, kParts>(line, to, tiles.part_stride));
      } else {
        const auto step = [&](int64_t i) {
          return load_within(a.data + (i < term.depth ? i : 0) * a.step + row, i < term.depth ? rows - row : 0);
        };
        const auto line = [&](int i) -> Line { return {step(k + 2 * i), step(k + 2 * i + 1)}; };
        bits = bit_or(bits, convert_tile<Source::kAcross, true, kParts>(line, to, tiles.part_stride));
      }
    }
    if (only_exact && !exact_in_bfloat16(bits)) return false;
  }
  return true;
}

// A of one term: [part][row tile][chunk].
static ConvertedLeft convert_left(const Term& term, int64_t rows, uint16_t* out) {
  const int64_t row_tile = whole_tiles(term.depth) * kTileRows;
  ConvertedLeft a = {{out, row_tile, whole_tiles(rows) / kTileRows * row_tile, kTileElements}, 1};
  if (!convert_left<1>(term, rows, !term.rounded, a.tiles, out)) {
    convert_left<3>(term, rows, false, a.tiles, out);
    a.parts = 3;
  }
  return a;
}

// `depth` rows of float32 B as three parts: [chunk][part][column half].
static void convert_right(const float* b, int64_t stride, int64_t depth, uint16_t* out) {
  for (int64_t k = 0; k < depth; k += kChunk) {
    for (int half = 0; half < 2; ++half) {
      const auto row = [&](int64_t i) {
        return i < depth ? load_float(b + i * stride + half * kWidth) : broadcast(0.0f);
      };
      const auto line = [&](int i) -> Line { return {row(k + 2 * i), row(k + 2 * i + 1)}; };
      convert_tile<Source::kAcross, false, 3>(line, out + (k / kChunk * 6 + half) * kTileElements, 2 * kTileElements);
    }
  }
}

using TileProduct = void (*)(Tiles a, Tiles b, int64_t chunks, float* out, int64_t stride);

template <int kRowTiles>
static TileProduct tile_product_of(int left_parts, int right_parts) {
  if (left_parts == 1) return right_parts == 1 ? tile_product<kRowTiles, 1, 1> : tile_product<kRowTiles, 1, 3>;
  return right_parts == 1 ? tile_product<kRowTiles, 3, 1> : tile_product<kRowTiles, 3, 3>;
}

// block[rows, panel's columns] (+)= A B for a piece of the depth.
static void piece_product(const ConvertedLeft& left, int64_t first_chunk, Tiles b, int b_parts, int64_t chunks,
                          int64_t rows, bool fresh, float* block, int64_t stride) {
  alignas(64) float piece[kMaxRows * kTileColumns];
  Tiles a = left.tiles;
  a.data += first_chunk * a.chunk_stride;
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int64_t count = rows - row < kMaxRows ? rows - row : kMaxRows;
    const bool one = count <= kTileRows, direct = fresh && count == kMaxRows;
    float* const to = block + row * stride;
    const TileProduct run = one ? tile_product_of<1>(left.parts, b_parts) : tile_product_of<2>(left.parts, b_parts);
    run(a, b, chunks, direct ? to : piece, direct ? stride : kTileColumns);
    for (int64_t r = 0; !direct && r < count; ++r) {
      for (int half = 0; half < 2; ++half) {
        const VecF sums = load_float(piece + r * kTileColumns + half * kWidth);
        float* const at = to + r * stride + half * kWidth;
        store_float(at, fresh ? sums : load_float(at) + sums);
      }
    }
    a.data += 2 * a.row_tile_stride;
  }
}

template <typename Epilogue>
void product(const Term* terms, int term_count, int64_t rows, int64_t columns, int64_t block_panels, float* block,
             Epilogue& epilogue, float* room) {
  const int64_t panels = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t stride = block_panels * kTileColumns;
  auto* const piece_of_b = reinterpret_cast<uint16_t*>(room);
  uint16_t* free = piece_of_b + kPieceElements;
  ConvertedLeft left[kMostTerms];
  for (int t = 0; t < term_count; ++t) {
    left[t] = convert_left(terms[t], rows, free);
    free += left[t].parts * left[t].tiles.part_stride;
  }
  const TilesInUse tiles;
  for (int64_t first = 0; first < panels; first += block_panels) {
    const int64_t last = first + block_panels < panels ? first + block_panels : panels;
    bool fresh = true;
    for (int t = 0; t < term_count; ++t) {
      const Right& b = terms[t].b;
      const int parts = b.parts == 0 ? 3 : b.parts;
      const int64_t step = kPieceElements / (parts * 2 * kTileElements) * kChunk;
      for (int64_t k = 0; k < terms[t].depth; k += step) {
        const int64_t depth = terms[t].depth - k < step ? terms[t].depth - k : step;
        for (int64_t panel = first; panel < last; ++panel) {
          Tiles tiles_of_b = {piece_of_b, 0, 2 * kTileElements, parts * 2 * kTileElements};
          if (b.parts == 0) {
            convert_right(b.data + panel * b.panel_stride + k * b.row_stride, b.row_stride, depth, piece_of_b);
          } else {
            tiles_of_b.data = reinterpret_cast<const uint16_t*>(b.data + panel * b.panel_stride) +
                              k / kChunk * tiles_of_b.chunk_stride;
          }
          piece_product(left[t], k / kChunk, tiles_of_b, parts, (depth + kChunk - 1) / kChunk, rows, fresh,
                        block + (panel - first) * kTileColumns, stride);
        }
        fresh = false;
      }
    }
    const int64_t column = first * kTileColumns;
    const int64_t width = (last - first) * kTileColumns;
    if (fresh) {
      for (int64_t i = 0; i < rows; ++i) memset(block + i * stride, 0, static_cast<size_t>(width) * sizeof(float));
    }
    const int64_t count = columns - column < width ? columns - column : width;
    for (int64_t row = 0; row < rows; ++row) epilogue(row, column, count, block + row * stride);
  }
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
