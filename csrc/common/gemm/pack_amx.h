// pack.h for product_amx.h: a panel is [chunk][part][column half], tiles of B.
#pragma once

#include "common/gemm/gemm.h"
#include "common/gemm/split_amx.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

constexpr int64_t panel_floats(int64_t depth, int parts) {
  return (depth + kChunk - 1) / kChunk * parts * kTileElements;  // two tiles of half a float an element
}

template <int kParts, typename T>
static void pack_parts(const T* w, const Pack& args, int64_t panel, uint16_t* out) {
  const int64_t rows = args.rows, columns = args.columns, depth = args.transposed ? columns : rows;
  for (int64_t k = 0; k < depth; k += kChunk) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = panel * kTileColumns + half * kWidth;
      uint16_t* const to = out + (k / kChunk * kParts * 2 + half) * kTileElements;
      if (args.transposed) {
        const auto line = [&](int i) -> Line {
          const T* row = w + (first + i < rows ? first + i : 0) * columns + k;
          const int64_t count = first + i < rows ? columns - k : 0;
          return {load_within(row, count), load_within(row + kWidth, count - kWidth)};
        };
        convert_tile<Source::kAlong, true, kParts>(line, to, 2 * kTileElements);
      } else {
        const auto scaled = [&](int64_t row) {
          if (row >= rows) return broadcast(0.0f);
          const VecF scale = broadcast(args.row_scale == nullptr ? 1.0f : args.row_scale[row]);
          return load_within(w + row * columns + first, columns - first) * scale;
        };
        const auto line = [&](int i) -> Line { return {scaled(k + 2 * i), scaled(k + 2 * i + 1)}; };
        convert_tile<Source::kAcross, false, kParts>(line, to, 2 * kTileElements);
      }
    }
  }
}

template <typename T>
static void pack_panel(const T* w, const Pack& args, int64_t panel, float* out) {
  auto* const to = reinterpret_cast<uint16_t*>(out);
  if (args.parts() == 1) {
    pack_parts<1>(w, args, panel, to);
  } else {
    pack_parts<3>(w, args, panel, to);
  }
}

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
