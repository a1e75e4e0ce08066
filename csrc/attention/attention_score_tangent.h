// What the derivatives of attention share: known statistics of rows, and tangents of scores.
#pragma once

#include "attention/attention_tile.h"

namespace genfast {
namespace GENFAST_ISA {
namespace attention {

// L of a block of queries. A row that saw nothing has L = -inf, and lanes beyond the last query have none: with +inf
// their P is exactly zero.
GENFAST_NOINLINE void load_lse(const float* lse, int64_t queries, int64_t block, float* out) {
  for (int64_t i = 0; i < block; ++i) {
    out[i] = i < queries && lse[i] != scalar_from_bits(0xFF800000u) ? lse[i] : scalar_from_bits(0x7F800000u);
  }
}

// Tangents of products to tangents of scores: tau Z' + B'.
GENFAST_NOINLINE void score_tangents(const AttentionTangent& args, const Tile& t, float* tile, const float* capped,
                                     float* room) {
  const Attention& a = args.a;
  if (a.softcap != 0.0f) {
    for (int64_t j = 0; j < t.keys; ++j) {
      for (int64_t i = 0; i < t.queries; i += kWidth) {
        float* const at = tile + j * t.stride + i;
        const VecF c = load_float(capped + j * t.stride + i);
        store_float(at, load_float(at) * (broadcast(1.0f) - c * c));
      }
    }
  }
  if (args.bias != nullptr) {
    load_bias(a.dtype, args.bias, args.bias_stride, t, room);
    for (int64_t j = 0; j < t.keys; ++j) {
      for (int64_t i = 0; i < t.queries; i += kWidth) {
        float* const at = tile + j * t.stride + i;
        store_float(at, load_float(at) + load_float(room + j * t.stride + i));
      }
    }
  }
  if (args.table != nullptr) add_table(a, args.table, t, tile);
}

}  // namespace attention
}  // namespace GENFAST_ISA
}  // namespace genfast
