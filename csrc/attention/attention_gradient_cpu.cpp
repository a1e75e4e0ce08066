// Gradients of attention, of first and second order: for each block of keys all blocks of queries that see it, so that
// a tile is computed once for dq, dk and dv. Compiled once per instruction set.
#include "attention/attention_cpu.h"
#include "attention/attention_gradient_tile.h"

namespace genfast {
namespace GENFAST_ISA {

using namespace attention;

namespace {

struct SplitRange {
  int64_t first, last;  // blocks of keys
};

SplitRange split_range(const AttentionGradient& args, int64_t split) {
  const int64_t blocks = parts(args.a.keys, key_block(args.a)), each = parts(blocks, args.splits);
  return {smaller(split * each, blocks), smaller((split + 1) * each, blocks)};
}

// Adds one tile to the gradients of bias and table; null for one that is hidden.
void add_bias_gradient(const AttentionGradient& args, const Tile& t, const float* w, int64_t split) {
  const Attention& a = args.a;
  const int64_t matrix = t.batch * a.heads + t.head;
  if (args.bias_gradient == BiasGradient::kElements) {
    char* const own = static_cast<char*>(args.dbias) + matrix * a.queries * a.keys * width_of(a.dtype);
    store_matrix(a.dtype, w, t, own, a.keys);
  } else if (args.bias_gradient == BiasGradient::kColumns) {
    float* const own = static_cast<float*>(args.dbias) + matrix * a.keys + t.key;
    for (int64_t j = 0; j < t.keys; ++j) {
      float total = 0.0f;
      for (int64_t i = 0; i < t.queries; ++i) total += w[j * t.stride + i];
      own[j] += total;
    }
  } else if (args.bias_gradient == BiasGradient::kRows) {
    const int64_t own_matrix = split * a.batch * a.heads + matrix;
    float* const own = static_cast<float*>(args.dbias) + own_matrix * a.queries + t.query;
    for (int64_t i = 0; i < t.queries; i += kWidth) {
      VecF total = broadcast(0.0f);
      for (int64_t j = 0; j < t.keys; ++j) total = total + load_float(w + j * t.stride + i);
      store_upto(own + i, load_upto(own + i, t.queries - i) + total, t.queries - i);
    }
  }
  if (args.dtable != nullptr && w != nullptr) {
    scatter_table(a, t, w, args.dtable + (split * a.batch * a.heads + matrix) * a.table_length);
  }
}

// Where dq of (batch, head) begins in a split's partial sums.
int64_t partial_at(const AttentionGradient& args, int64_t batch, int64_t head) {
  return batch * args.partial_batch + head * args.a.lse_head * args.a.depth;
}

void clear(float* out, int64_t floats) { memset(out, 0, static_cast<size_t>(floats) * sizeof(float)); }

// Zeros for the sums that add_bias_gradient() adds to.
void clear_bias_gradient(const AttentionGradient& args, const Tile& t, int64_t split, SplitRange range) {
  const Attention& a = args.a;
  const int64_t matrix = t.batch * a.heads + t.head, own_matrix = split * a.batch * a.heads + matrix;
  if (args.bias_gradient == BiasGradient::kColumns) {
    const int64_t first = range.first * key_block(a), last = smaller(range.last * key_block(a), a.keys);
    if (first < last) clear(static_cast<float*>(args.dbias) + matrix * a.keys + first, last - first);
  } else if (args.bias_gradient == BiasGradient::kRows) {
    clear(static_cast<float*>(args.dbias) + own_matrix * a.queries, a.queries);
  }
  if (args.dtable != nullptr) clear(args.dtable + own_matrix * a.table_length, a.table_length);
}

}  // namespace

int64_t attention_gradient_floats(const AttentionGradient& args) {
  const Attention& a = args.a;
  const int64_t nq = query_block(a), nk = key_block(a), query_blocks = parts(a.queries, nq);
  const int64_t each = parts(parts(a.keys, nk), args.splits);
  const int64_t depth = up_to(a.depth, kTileColumns), value_depth = up_to(a.value_depth, kTileColumns);
  return query_blocks * query_side_floats(args, nq) + key_side_floats(args, nk) + gradient_tiles_floats(args, nq * nk) +
         query_blocks * nq * depth + each * nk * (depth + value_depth) + 64;
}

void attention_gradient_unit(const AttentionGradient& args, int64_t batch, int64_t kv_head, int64_t split,
                             float* room) {
  const Attention& a = args.a;
  const int64_t nq = query_block(a), nk = key_block(a), query_blocks = parts(a.queries, nq);
  const int64_t group = a.heads / a.kv_heads;
  const int64_t depth = up_to(a.depth, kTileColumns), value_depth = up_to(a.value_depth, kTileColumns);
  const SplitRange range = split_range(args, split);
  const int64_t keys = smaller(range.last * nk, a.keys) - range.first * nk;
  const GradientTiles tiles = gradient_tiles(args, room, nq * nk);
  float* const dq = room + gradient_tiles_floats(args, nq * nk);
  float* const dk = dq + query_blocks * nq * depth;
  float* const dv = dk + parts(parts(a.keys, nk), args.splits) * nk * depth;
  float* const key_room = dv + parts(parts(a.keys, nk), args.splits) * nk * value_depth;
  float* const query_room = key_room + key_side_floats(args, nk);
  const int64_t side_floats = query_side_floats(args, nq);
  RoundKeys round_keys;
  make_round_keys(a.seed, &round_keys);
  if (keys > 0) {
    clear(dk, keys * depth);
    clear(dv, keys * value_depth);
  }
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    Tile t = {batch, head, 0, 0, 0, 0, 0, nq};
    clear(dq, a.queries * depth);
    clear_bias_gradient(args, t, split, range);
    bool loaded = false;  // the queries of this head
    for (int64_t block = range.first; block < range.last; ++block) {
      t.key = block * nk;
      t.packed_keys = t.keys = smaller(a.keys - t.key, nk);
      float* const own_dk = dk + (t.key - range.first * nk) * depth;
      float* const own_dv = dv + (t.key - range.first * nk) * value_depth;
      const KeySide k = load_keys(args, t, kv_head, key_room);
      for (int64_t i = 0; i < query_blocks; ++i) {
        t.query = i * nq;
        t.queries = smaller(a.queries - t.query, nq);
        t.keys = t.packed_keys;
        const QuerySide q = query_side(args, nq, query_room + i * side_floats);
        if (!loaded) load_queries(args, t, q);
        if (none_visible(a, t)) {
          if (args.bias_gradient == BiasGradient::kElements) add_bias_gradient(args, t, nullptr, split);
          continue;
        }
        if (args.bias_gradient == BiasGradient::kNone) t.keys = seen_until(a, t, t.queries);
        gradient_tile(args, round_keys, q, k, t, tiles);
        if (args.bias_gradient != BiasGradient::kNone || args.dtable != nullptr) {
          add_bias_gradient(args, t, tiles.w, split);
        }
        if (a.pairs) pair_tiles(t, tiles.p, tiles.g, tiles.extra);
        float* const own_dq = dq + t.query * depth;
        key_product(a, t, tiles.p, q.dout_rows, a.value_depth, own_dv, value_depth);
        key_product(a, t, tiles.g, q.q_rows, a.depth, own_dk, depth);
        query_product(a, t, a.pairs ? tiles.extra : tiles.g, packed_keys(a, t, k.k_rows), a.depth, own_dq, depth,
                      false);
        if (args.second) {
          key_product(a, t, tiles.z, q.tangent_rows, a.depth, own_dk, depth);
          query_product(a, t, tiles.z, packed_keys(a, t, k.tangent_rows), a.depth, own_dq, depth, false);
        }
      }
      loaded = true;
    }
    if (args.splits == 1) {
      store_rows(a.dtype, dq, depth, a.queries, a.depth, a.scale, args.dq, batch, head, 0);
    } else {
      float* const own = args.dq_partial + split * args.partial_split + partial_at(args, batch, head);
      for (int64_t i = 0; i < a.queries; ++i) from_float(dq + i * depth, a.depth, a.scale, own + i * a.depth);
    }
  }
  if (keys > 0) {
    store_rows(a.dtype, dk, depth, keys, a.depth, a.pairs ? a.scale : 1.0f, args.dk, batch, kv_head, range.first * nk);
    store_rows(a.dtype, dv, value_depth, keys, a.value_depth, 1.0f, args.dv, batch, kv_head, range.first * nk);
  }
}

void attention_sum_splits(const AttentionGradient& args, int64_t batch, int64_t head) {
  const Attention& a = args.a;
  const int64_t split = args.partial_split;
  const float* const own = args.dq_partial + partial_at(args, batch, head);
  for (int64_t i = 0; i < a.queries; ++i) {
    char* const to = row_at(args.dq, a.dtype, batch, head, i);
    for (int64_t c = 0; c < a.depth; c += kWidth) {
      const int64_t some = a.depth - c;
      VecF total = load_upto(own + i * a.depth + c, some);
      for (int64_t s = 1; s < args.splits; ++s) total = total + load_upto(own + s * split + i * a.depth + c, some);
      with_type(a.dtype, [&](auto* type) { store_upto(reinterpret_cast<decltype(type)>(to) + c, total, some); });
    }
  }
}

int64_t attention_bias_floats(const AttentionGradient& args) {
  const int64_t nq = query_block(args.a), nk = key_block(args.a);
  return gradient_tiles_floats(args, nq * nk) + nq * nk + key_side_floats(args, nk) + query_side_floats(args, nq) + 64;
}

int64_t attention_bias_tiles(const AttentionGradient& args) {
  const Attention& a = args.a;
  return args.bias_batch * args.bias_heads * parts(a.queries, query_block(a)) * parts(a.keys, key_block(a));
}

void attention_bias_tile(const AttentionGradient& args, int64_t tile, float* room) {
  const Attention& a = args.a;
  const int64_t nq = query_block(a), nk = key_block(a);
  const int64_t query_blocks = parts(a.queries, nq), key_blocks = parts(a.keys, nk);
  const int64_t matrix = tile / (query_blocks * key_blocks);
  const int64_t bias_batch = matrix / args.bias_heads, bias_head = matrix % args.bias_heads;
  const GradientTiles tiles = gradient_tiles(args, room, nq * nk);
  float* const total = room + gradient_tiles_floats(args, nq * nk);
  float* const key_room = total + nq * nk;
  float* const query_room = key_room + key_side_floats(args, nk);
  RoundKeys round_keys;
  make_round_keys(a.seed, &round_keys);
  Tile t = {0, 0, tile / key_blocks % query_blocks * nq, 0, tile % key_blocks * nk, 0, 0, nq};
  t.queries = smaller(a.queries - t.query, nq);
  t.packed_keys = t.keys = smaller(a.keys - t.key, nk);
  clear(total, nq * nk);
  const bool one_batch = args.bias_batch > 1, one_head = args.bias_heads > 1;
  if (!none_visible(a, t)) {
    for (t.batch = one_batch ? bias_batch : 0; t.batch < (one_batch ? bias_batch + 1 : a.batch); ++t.batch) {
      for (t.head = one_head ? bias_head : 0; t.head < (one_head ? bias_head + 1 : a.heads); ++t.head) {
        const QuerySide q = query_side(args, nq, query_room);
        load_queries(args, t, q);
        const KeySide k = load_keys(args, t, t.head / (a.heads / a.kv_heads), key_room);
        gradient_tile(args, round_keys, q, k, t, tiles);
        for (int64_t j = 0; j < t.keys; ++j) {
          for (int64_t i = 0; i < t.queries; i += kWidth) {
            float* const at = total + j * nq + i;
            store_float(at, load_float(at) + load_float(tiles.w + j * nq + i));
          }
        }
      }
    }
  }
  char* const own = static_cast<char*>(args.dbias) + matrix * a.queries * a.keys * width_of(a.dtype);
  store_matrix(a.dtype, total, t, own, a.keys);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
