// One tile of the gradients of attention, of first or second order.
#pragma once

#include "attention/attention_score_tangent.h"

namespace genfast {
namespace GENFAST_ISA {
namespace attention {

// What the gradients need of a block of queries, packed; each array belongs to one head.
struct QuerySide {
  float *q, *q_rows;              // columns, rows; times the scale but in pairs
  float *dout, *dout_rows;        // columns, rows
  float *tangent, *tangent_rows;  // of q, likewise; second order
  float *lse, *shift;             // L; dlse - delta
  float *mean, *dot;              // mu and r; second order
};

// The same of a block of keys.
struct KeySide {
  float *k, *k_rows, *v;                      // groups, rows, groups
  float *tangent, *tangent_rows, *v_tangent;  // second order
};

// Tiles of scores.
struct GradientTiles {
  float* p;        // M P, or M P (A' - mu): the left operand of dV
  float* g;        // dZ or gZ
  float* z;        // gZ'; second order
  float* w;        // dA or W, the gradient to scores after the cap: g itself where there is no cap
  float *h, *raw;  // rooms of second order
  float *capped, *factors, *extra;
};

GENFAST_INLINE int64_t query_side_floats(const AttentionGradient& args, int64_t block) {
  const Attention& a = args.a;
  const int64_t q = columns_floats(block, a.depth) + rows_floats(block, a.depth);
  return (args.second ? 2 : 1) * q + columns_floats(block, a.value_depth) + rows_floats(block, a.value_depth) +
         4 * block;
}
GENFAST_INLINE int64_t key_side_floats(const AttentionGradient& args, int64_t block) {
  const Attention& a = args.a;
  return (args.second ? 2 : 1) *
         (groups_floats(block, a.depth) + rows_floats(block, a.depth) + groups_floats(block, a.value_depth));
}
GENFAST_INLINE int64_t gradient_tiles_floats(const AttentionGradient& args, int64_t tile) {
  return (args.second ? 9 : 6) * tile;
}

// Where a block of queries lies in its room.
static QuerySide query_side(const AttentionGradient& args, int64_t block, float* room) {
  const Attention& a = args.a;
  const auto take = [&](int64_t floats) {
    float* const own = room;
    room += floats;
    return own;
  };
  QuerySide side = {};
  side.q = take(columns_floats(block, a.depth));
  side.q_rows = take(rows_floats(block, a.depth));
  side.dout = take(columns_floats(block, a.value_depth));
  side.dout_rows = take(rows_floats(block, a.value_depth));
  side.lse = take(block);
  side.shift = take(block);
  if (args.second) {
    side.tangent = take(columns_floats(block, a.depth));
    side.tangent_rows = take(rows_floats(block, a.depth));
    side.mean = take(block);
    side.dot = take(block);
  }
  return side;
}

GENFAST_NOINLINE void load_queries(const AttentionGradient& args, const Tile& t, const QuerySide& side) {
  const Attention& a = args.a;
  const int64_t block = t.stride, row = statistics_at(a, t);
  const auto load = [&](const Rows& x, int64_t depth, float scale, float* columns, float* rows) {
    pack(Form::kColumns, a, x, t.batch, t.head, t.query, t.queries, depth, scale, columns);
    pack(Form::kRows, a, x, t.batch, t.head, t.query, t.queries, depth, scale, rows);
  };
  load(a.q, a.depth, a.scale, side.q, side.q_rows);
  load(args.dout, a.value_depth, 1.0f, side.dout, side.dout_rows);
  load_lse(a.lse + row, t.queries, block, side.lse);
  for (int64_t i = 0; i < block; ++i) side.shift[i] = 0.0f;
  row_products(a.dtype, args.dout, a.out, t.batch, t.head, t.query, t.queries, a.value_depth, side.shift);
  for (int64_t i = 0; i < t.queries; ++i) {
    side.shift[i] = (args.dlse == nullptr ? 0.0f : args.dlse[row + i]) - side.shift[i];
  }
  if (!args.second) return;
  load(args.t.q, a.depth, a.scale, side.tangent, side.tangent_rows);
  for (int64_t i = 0; i < block; ++i) {
    side.mean[i] = i < t.queries ? args.t.lse[row + i] : 0.0f;
    side.dot[i] = 0.0f;
  }
  row_products(a.dtype, args.dout, args.t.out, t.batch, t.head, t.query, t.queries, a.value_depth, side.dot);
}

GENFAST_NOINLINE KeySide load_keys(const AttentionGradient& args, const Tile& t, int64_t kv_head, float* room) {
  const Attention& a = args.a;
  KeySide side = {};
  const auto load = [&](Form form, const Rows& x, int64_t depth) {
    float* const to = room;
    room += form == Form::kGroups ? groups_floats(t.packed_keys, depth) : rows_floats(t.packed_keys, depth);
    pack(form, a, x, t.batch, kv_head, t.key, t.packed_keys, depth, 1.0f, to);
    return to;
  };
  side.k = load(Form::kGroups, a.k, a.depth);
  side.k_rows = load(Form::kRows, a.k, a.depth);
  side.v = load(Form::kGroups, a.v, a.value_depth);
  if (!args.second) return side;
  side.tangent = load(Form::kGroups, args.t.k, a.depth);
  side.tangent_rows = load(Form::kRows, args.t.k, a.depth);
  side.v_tangent = load(Form::kGroups, args.t.v, a.value_depth);
  return side;
}

static GradientTiles gradient_tiles(const AttentionGradient& args, float* room, int64_t tile) {
  GradientTiles tiles;
  tiles.p = room;
  tiles.g = room + tile;
  tiles.capped = room + 2 * tile;
  tiles.factors = room + 3 * tile;
  tiles.extra = room + 4 * tile;
  tiles.w = args.a.softcap != 0.0f ? room + 5 * tile : tiles.g;
  tiles.z = tiles.h = tiles.raw = nullptr;
  if (args.second) {
    tiles.z = room + 6 * tile;
    tiles.h = room + 7 * tile;
    tiles.raw = room + 8 * tile;
  }
  return tiles;
}

// The elements of a tile; formulas and names in docs/kernels/attention.md.
template <bool kSecond, bool kCapped>
GENFAST_NOINLINE void gradient_elements(const AttentionGradient& args, const QuerySide& q, const Tile& t,
                                        const GradientTiles& x) {
  const bool dropped = args.a.dropout_threshold != 0;
  const VecF one = broadcast(1.0f);
  const VecF curvature = broadcast(kCapped ? 2.0f / args.a.softcap : 0.0f);
  for (int64_t i = 0; i < t.queries; i += kWidth) {
    const VecF lse = load_float(q.lse + i), shift = load_float(q.shift + i);
    VecF mean = shift, dot = shift;
    if constexpr (kSecond) {
      mean = load_float(q.mean + i);
      dot = load_float(q.dot + i);
    }
    const int64_t computed = computed_until(args.a, t, i);
    for (int64_t j = 0; j < computed; ++j) {
      const int64_t at = j * t.stride + i;
      const VecF p = exp_or_zero(load_float(x.p + at) - lse);
      VecF kept = p, g = load_float(x.g + at), factor = one, tau = one, c = one;
      if (dropped) {
        factor = load_float(x.factors + at);
        kept = p * factor;
        g = g * factor;
      }
      if constexpr (kCapped) {
        c = load_float(x.capped + at);
        tau = one - c * c;
      }
      const VecF e = g + shift;
      const VecF da = p * e;
      if constexpr (!kSecond) {
        store_float(x.p + at, kept);
        store_float(x.g + at, kCapped ? da * tau : da);
        if constexpr (kCapped) store_float(x.w + at, da);
      } else {
        const VecF centered = load_float(x.z + at) - mean;
        VecF h = load_float(x.h + at);
        if (dropped) h = h * factor;
        const VecF w = p * (fma(centered, e, h) - dot);
        store_float(x.p + at, kept * centered);
        if constexpr (kCapped) {
          store_float(x.g + at, tau * (w - da * load_float(x.raw + at) * curvature * c));
          store_float(x.z + at, tau * da);
          store_float(x.w + at, w);
        } else {
          store_float(x.g + at, w);
          store_float(x.z + at, da);
        }
      }
    }
  }
}

GENFAST_NOINLINE void gradient_tile(const AttentionGradient& args, const RoundKeys& round_keys, const QuerySide& q,
                                    const KeySide& k, const Tile& t, const GradientTiles& x) {
  const Attention& a = args.a;
  scores_product(a, t, k.k, q.q, a.depth, a.scale, x.p, true);
  if (!plain_scores(a) || !all_visible(a, t)) finish_scores(a, t, x.p, x.capped, x.extra);
  scores_product(a, t, k.v, q.dout, a.value_depth, 1.0f, x.g, true);
  if (a.dropout_threshold != 0) dropout_factors(a, round_keys, t, x.factors);
  if (!args.second) {
    if (a.softcap != 0.0f) {
      gradient_elements<false, true>(args, q, t, x);
    } else {
      gradient_elements<false, false>(args, q, t, x);
    }
  } else {
    scores_product(a, t, k.k, q.tangent, a.depth, a.scale, x.z, true);
    scores_product(a, t, k.tangent, q.q, a.depth, a.scale, x.z, false);
    scores_product(a, t, k.v_tangent, q.dout, a.value_depth, 1.0f, x.h, true);
    if (a.softcap != 0.0f) {
      memcpy(x.raw, x.z, static_cast<size_t>(t.keys * t.stride) * sizeof(float));
      score_tangents(args.t, t, x.z, x.capped, x.extra);
      gradient_elements<true, true>(args, q, t, x);
    } else {
      score_tangents(args.t, t, x.z, x.capped, x.extra);
      gradient_elements<true, false>(args, q, t, x);
    }
  }
  if (is_rectangle(a, t)) return;
  clear_hidden(a, t, x.p);
  clear_hidden(a, t, x.g);
  if (x.w != x.g) clear_hidden(a, t, x.w);
  if (args.second) clear_hidden(a, t, x.z);
}

// P and dZ for products in pairs: both in rows of bfloat16, and dZ once more in pairs of keys; zeros where operands are
// padded.
GENFAST_NOINLINE void pair_tiles(const Tile& t, float* p, float* g, float* key_pairs) {
  const auto store = [](float* row, int64_t i, VecF x) {
    store_low16(reinterpret_cast<uint16_t*>(row) + i, shift_right<16>(as_uint(gemm::round_to_bfloat16(x))));
  };
  const int64_t lanes = 2 * gemm::pair_steps(t.queries);
  for (int64_t j = 0; j < t.keys; j += 2) {
    const bool both = j + 1 < t.keys;
    float *const p_row = p + j * t.stride, *const g_row = g + j * t.stride;
    for (int64_t i = 0; i < t.queries; i += kWidth) {  // a row's bfloat16 take the place of floats that were read
      const VecF first = load_float(g_row + i), second = both ? load_float(g_row + t.stride + i) : broadcast(0.0f);
      store_float(key_pairs + j / 2 * t.stride + i, gemm::pair_of(first, second));
      store(p_row, i, load_float(p_row + i));
      store(g_row, i, first);
      if (both) {
        store(p_row + t.stride, i, load_float(p_row + t.stride + i));
        store(g_row + t.stride, i, second);
      }
    }
    for (int64_t i = up_to(t.queries, kWidth); i < lanes; i += kWidth) {
      for (int64_t row = j; row < smaller(j + 2, t.keys); ++row) {
        store(p + row * t.stride, i, broadcast(0.0f));
        store(g + row * t.stride, i, broadcast(0.0f));
      }
    }
  }
  for (int64_t j = parts(t.keys, 2); j < gemm::pair_steps(t.keys); ++j) {
    for (int64_t i = 0; i < t.queries; i += kWidth) store_float(key_pairs + j * t.stride + i, broadcast(0.0f));
  }
}

// out[queries, keys] of a tile, or of zeros where it is null.
GENFAST_NOINLINE void store_matrix(DType dtype, const float* tile, const Tile& t, void* out, int64_t stride) {
  with_type(dtype, [&](auto* type) {
    auto* const to = static_cast<decltype(type)>(out);
    for (int64_t i = 0; i < t.queries; i += kWidth) {
      for (int64_t j = 0; j < t.keys; j += kWidth) {
        const int64_t keys = smaller(t.keys - j, kWidth), queries = smaller(t.queries - i, kWidth);
        VecF square[kWidth];
        for (int l = 0; l < kWidth; ++l) {
          square[l] = tile != nullptr && l < keys ? load_float(tile + (j + l) * t.stride + i) : broadcast(0.0f);
        }
        transpose(square);
        for (int64_t l = 0; l < queries; ++l) store_upto(to + (t.query + i + l) * stride + t.key + j, square[l], keys);
      }
    }
  });
}

}  // namespace attention
}  // namespace GENFAST_ISA
}  // namespace genfast
