// The parts of attention's kernels: products of tiles, scores, dropout.
//
// Tiles of scores lie transposed, [keys][queries]: statistics of a row of scores are then sums over vectors without a
// horizontal step, and a tile is the left operand of the next product as it lies, by columns (P V, dS K) or by rows
// (P' dO, dS' Q). A tile has room for a whole block of queries; lanes beyond the last query hold finite numbers that
// nothing reads.
#pragma once

#include "attention/attention_pack.h"

namespace genfast {
namespace GENFAST_ISA {
namespace attention {

// ---- products ----

struct Tile {
  int64_t batch, head;
  int64_t query, queries;  // the first and how many
  int64_t key, keys;       // those that some of the queries may see
  int64_t packed_keys;     // of the block, as packed
  int64_t stride;          // of the buffers, a whole block of queries
};

// Where the statistics of a tile's rows begin.
GENFAST_INLINE int64_t statistics_at(const Attention& a, const Tile& t) {
  return t.batch * a.lse_batch + t.head * a.lse_head + t.query * a.lse_row;
}

// Keys of a tile that come before the first that the queries [0, count) cannot see: the bound on the right.
GENFAST_INLINE int64_t seen_until(const Attention& a, const Tile& t, int64_t count) {
  return a.right < 0 ? t.keys : larger(smaller(t.query + count + a.shift + a.right - t.key, t.keys), 0);
}
// The same for whole panels of queries, which products of scores compute.
GENFAST_INLINE int64_t computed_until(const Attention& a, const Tile& t, int64_t query) {
  return seen_until(a, t, query / kTileColumns * kTileColumns + kTileColumns);
}
// Whether all queries see up to the last key: no element of the tile is left out of the products.
GENFAST_INLINE bool is_rectangle(const Attention& a, const Tile& t) { return computed_until(a, t, 0) == t.keys; }

// Products in pairs where operands are: half the steps.
GENFAST_INLINE int64_t steps_of(const Attention& a, int64_t depth) { return a.pairs ? gemm::pair_steps(depth) : depth; }
GENFAST_INLINE int64_t group_rows(const Attention& a) { return a.pairs ? gemm::kPairRows : kMaxRows; }
GENFAST_INLINE void tile_rows(const Attention& a, int64_t rows, float* out, int64_t stride, bool fresh, gemm::Left left,
                              int64_t group_stride, const float* b, int64_t b_stride, int64_t steps,
                              float factor = 1.0f) {
  if (a.pairs) {
    gemm::pair_tile_rows(rows, out, stride, fresh, left, group_stride, b, b_stride, steps, factor);
  } else {
    gemm::tile_rows(rows, out, stride, fresh, left, group_stride, b, b_stride, steps);
  }
}

// tile[keys, queries] = or += from groups of keys and columns of queries; of pairs, times `scale`.
GENFAST_NOINLINE void scores_product(const Attention& a, const Tile& t, const float* groups, const float* columns,
                                     int64_t depth, float scale, float* tile, bool fresh) {
  depth = steps_of(a, depth);
  const bool by_rows = a.pairs && gemm::kPairsByRows;
  const gemm::Left left = by_rows ? gemm::Left{groups, depth, 1} : gemm::Left{groups, 1, kMaxRows};
  for (int64_t i = 0; i < t.queries; i += kTileColumns) {
    tile_rows(a, computed_until(a, t, i), tile + i, t.stride, fresh, left, group_rows(a) * depth, columns + i * depth,
              kTileColumns, depth, scale);
  }
}

// Few queries read keys and values as they lie, packing nothing, so that memory sets most of the time. Rows are fetched
// ahead by hand: the hardware stops at every page of memory.
constexpr int64_t kFetchAhead = 4096;  // bytes, about what a core's share of the memory's rate brings in its latency

GENFAST_INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// Keys or values of one head; `last` of them lie one after the other.
template <typename T>
struct FewRows {
  const T* data;
  int64_t stride, last;
};

// Fetches the `count` rows that come kFetchAhead after `row`.
template <typename T>
GENFAST_INLINE void fetch_ahead(const FewRows<T>& x, int64_t row, int64_t count, int64_t depth) {
  const int64_t bytes = depth * static_cast<int64_t>(sizeof(T)), ahead = (kFetchAhead + bytes - 1) / bytes;
  const int64_t end = smaller(row + ahead + count, x.last);
  for (int64_t r = row + ahead; r < end; ++r) fetch(x.data + r * x.stride, bytes);
}

// Scores of few queries, rows of floats with zeros to whole vectors and to four rows: sums run along the depth.
template <typename T>
GENFAST_NOINLINE void few_scores(const float* query_rows, int64_t queries, const FewRows<T>& x, int64_t count,
                                 int64_t depth, float* tile, int64_t tile_stride) {
  constexpr int64_t kRows = 4, kKeys = kWidth / kRows;  // kWidth sums at a time
  for (int64_t j = 0; j < count; j += kKeys) {
    fetch_ahead(x, j, kKeys, depth);
    for (int64_t i = 0; i < queries; i += kRows) {
      VecF sums[kWidth];
      for (int l = 0; l < kWidth; ++l) sums[l] = broadcast(0.0f);
      const T* keys[kKeys];
      for (int64_t l = 0; l < kKeys; ++l) keys[l] = x.data + smaller(j + l, count - 1) * x.stride;
      for (int64_t c = 0; c < depth; c += kWidth) {
        VecF key[kKeys];
        for (int64_t l = 0; l < kKeys; ++l) key[l] = load_upto(keys[l] + c, depth - c);
        for (int64_t r = 0; r < kRows; ++r) {
          const VecF query = load_float(query_rows + (i + r) * up_to(depth, kWidth) + c);
          for (int64_t l = 0; l < kKeys; ++l) sums[l * kRows + r] = fma(query, key[l], sums[l * kRows + r]);
        }
      }
      float lanes[kWidth];
      store_float(lanes, sums_of(sums));
      for (int64_t l = 0; l < kKeys && j + l < count; ++l) {
        memcpy(tile + (j + l) * tile_stride + i, lanes + l * kRows, kRows * sizeof(float));
      }
    }
  }
}

// sums[4 queries, kVectors] += from keys [first, last) of a tile, whose queries begin at `tile`.
template <typename T, int kVectors>
GENFAST_INLINE void few_columns(const float* tile, int64_t tile_stride, const T* x, int64_t x_stride, int64_t first,
                                int64_t last, int64_t columns, float* sums, int64_t stride) {
  constexpr int kRows = 4;
  VecF own[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) own[r][c] = load_float(sums + r * stride + c * kWidth);
  }
  for (int64_t j = first; j < last; ++j) {
    VecF value[kVectors];
    for (int c = 0; c < kVectors; ++c) value[c] = load_upto(x + j * x_stride + c * kWidth, columns - c * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const VecF p = broadcast(tile[j * tile_stride + r]);
      for (int c = 0; c < kVectors; ++c) own[r][c] = fma(p, value[c], own[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) store_float(sums + r * stride + c * kWidth, own[r][c]);
  }
}

// sums[queries, depth] += from a tile of few queries and `count` values as they lie. `stride`, of kFewQueries rows of
// sums, is a multiple of kWidth.
template <typename T>
GENFAST_NOINLINE void few_values(const float* tile, int64_t tile_stride, int64_t queries, const FewRows<T>& x,
                                 int64_t count, int64_t depth, float* sums, int64_t stride) {
  constexpr int kVectors = kWidth == 16 ? 4 : 2;
  constexpr int64_t kPiece = 8, kColumns = kVectors * kWidth;  // as many rows as may be fetched at once
  for (int64_t j = 0; j < count; j += kPiece) {
    const int64_t last = smaller(j + kPiece, count);
    fetch_ahead(x, j, last - j, depth);
    for (int64_t i = 0; i < queries; i += 4) {
      int64_t c = 0;
      for (; c + kColumns <= depth; c += kColumns) {
        few_columns<T, kVectors>(tile + i, tile_stride, x.data + c, x.stride, j, last, kColumns, sums + i * stride + c,
                                 stride);
      }
      for (; c < depth; c += kWidth) {
        few_columns<T, 1>(tile + i, tile_stride, x.data + c, x.stride, j, last, depth - c, sums + i * stride + c,
                          stride);
      }
    }
  }
}

GENFAST_INLINE gemm::Right packed_keys(const Attention& a, const Tile& t, const float* rows) {
  return {rows, steps_of(a, t.packed_keys) * kTileColumns, kTileColumns};
}

// out[queries, depth] = or += from a tile and rows of keys. In pairs: the tile's rows are pairs of keys.
GENFAST_NOINLINE void query_product(const Attention& a, const Tile& t, const float* tile, gemm::Right keys,
                                    int64_t depth, float* out, int64_t stride, bool fresh) {
  const int64_t each = is_rectangle(a, t) ? t.queries : group_rows(a);
  constexpr int64_t kTurned = gemm::kPairsByRows ? kMostQueries * kMostKeys / 2 : 1;
  alignas(64) float turned[kTurned];
  const int64_t steps = steps_of(a, t.keys);
  if (a.pairs && gemm::kPairsByRows) turn_pairs(tile, t.stride, steps, t.queries, turned);
  const auto left = [&](int64_t i) -> gemm::Left {
    if (a.pairs && gemm::kPairsByRows) return {turned + i * steps, steps, 1};
    return {tile + i, 1, t.stride};
  };
  for (int64_t column = 0; column < depth; column += kTileColumns, keys.data += keys.panel_stride) {
    for (int64_t i = 0; i < t.queries; i += each) {
      const int64_t some = smaller(t.queries - i, each);
      const gemm::Left own = left(i);
      tile_rows(a, some, out + i * stride + column, stride, fresh, own, group_rows(a) * own.row_stride, keys.data,
                keys.row_stride, steps_of(a, computed_until(a, t, i + some - 1)));
    }
  }
}

// out[keys, depth] += from a tile and rows of queries. In pairs: pairs of queries lie together in the tile's rows.
GENFAST_NOINLINE void key_product(const Attention& a, const Tile& t, const float* tile, const float* rows,
                                  int64_t depth, float* out, int64_t stride) {
  const bool whole = is_rectangle(a, t);
  const int64_t steps = steps_of(a, t.queries);
  for (int64_t column = 0; column < depth; column += kTileColumns, rows += steps * kTileColumns) {
    const int64_t each = whole ? t.keys : group_rows(a);
    for (int64_t j = 0; j < t.keys; j += each) {
      // The first panel of queries that sees key j.
      const int64_t unseen = whole ? 0 : larger(t.key + j - a.right - a.shift - t.query, 0);
      const int64_t first = unseen / kTileColumns * kTileColumns;
      if (first >= t.queries) continue;
      const int64_t skipped = steps_of(a, first);
      tile_rows(a, smaller(t.keys - j, each), out + j * stride + column, stride, false,
                {tile + j * t.stride + skipped, t.stride, 1}, group_rows(a) * t.stride, rows + skipped * kTileColumns,
                kTileColumns, steps - skipped);
    }
  }
}

// Zeros in what the products of scores left out.
static void clear_hidden(const Attention& a, const Tile& t, float* tile) {
  for (int64_t i = 0; i < t.queries; i += kWidth) {
    for (int64_t j = computed_until(a, t, i); j < t.keys; ++j) store_float(tile + j * t.stride + i, broadcast(0.0f));
  }
}

// ---- scores ----

// Keys [*first, *last) that some of the queries see.
static void visible_keys(const Attention& a, int64_t query, int64_t queries, int64_t* first, int64_t* last) {
  *first = a.left < 0 ? 0 : smaller(larger(query + a.shift - a.left, 0), a.keys);
  *last = a.right < 0 ? a.keys : larger(smaller(query + queries + a.shift + a.right, a.keys), *first);
}

GENFAST_INLINE bool all_visible(const Attention& a, const Tile& t) {
  const bool right = a.right < 0 || t.key + t.keys - 1 - (t.query + a.shift) <= a.right;
  return right && (a.left < 0 || t.key - (t.query + t.queries - 1 + a.shift) >= -a.left);
}
GENFAST_INLINE bool none_visible(const Attention& a, const Tile& t) {
  const bool right = a.right >= 0 && t.key - (t.query + t.queries - 1 + a.shift) > a.right;
  return right || (a.left >= 0 && t.key + t.keys - 1 - (t.query + a.shift) < -a.left);
}

GENFAST_INLINE VecF infinity() { return broadcast(scalar_from_bits(0x7F800000u)); }
GENFAST_INLINE VecF minus_infinity() { return broadcast(scalar_from_bits(0xFF800000u)); }

// e^x, exactly zero below the normal numbers; NaN stays.
GENFAST_INLINE VecF exp_or_zero(VecF x) { return select(less(x, broadcast(-87.33f)), broadcast(0.0f), exp_bounded(x)); }

GENFAST_INLINE VecF load_byte(const uint8_t* p, int64_t count) {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < count ? static_cast<float>(p[i]) : 0.0f;
  return load_float(lanes);
}
template <typename T>
GENFAST_INLINE VecF load_element(const T* p, int64_t count) {
  return load_upto(p, count);
}
GENFAST_INLINE VecF load_element(const uint8_t* p, int64_t count) { return load_byte(p, count); }

// A [queries, keys] matrix with any strides as a tile; 0 where a lane is beyond the last query.
template <typename T>
GENFAST_NOINLINE void load_matrix(const T* x, int64_t query_stride, int64_t key_stride, const Tile& t, float* out) {
  x += t.query * query_stride + t.key * key_stride;
  if (query_stride == 0) {
    for (int64_t j = 0; j < t.keys; ++j) {
      float lanes[kWidth];
      store_float(lanes, load_element(x + j * key_stride, 1));
      for (int64_t i = 0; i < t.queries; i += kWidth) store_float(out + j * t.stride + i, broadcast(lanes[0]));
    }
  } else if (query_stride == 1) {
    for (int64_t j = 0; j < t.keys; ++j) {
      for (int64_t i = 0; i < t.queries; i += kWidth) {
        store_float(out + j * t.stride + i, load_element(x + j * key_stride + i, t.queries - i));
      }
    }
  } else if (key_stride == 1) {
    for (int64_t i = 0; i < t.queries; i += kWidth) {
      for (int64_t j = 0; j < t.keys; j += kWidth) {
        VecF square[kWidth];
        for (int l = 0; l < kWidth; ++l) {
          square[l] = i + l < t.queries ? load_element(x + (i + l) * query_stride + j, t.keys - j) : broadcast(0.0f);
        }
        transpose(square);
        const int64_t some = smaller(t.keys - j, kWidth);
        for (int64_t l = 0; l < some; ++l) store_float(out + (j + l) * t.stride + i, square[l]);
      }
    }
  } else {
    for (int64_t j = 0; j < t.keys; ++j) {
      for (int64_t i = 0; i < t.queries; i += kWidth) {
        float lanes[kWidth], element[kWidth];
        for (int l = 0; l < kWidth; ++l) {
          lanes[l] = 0.0f;
          if (i + l >= t.queries) continue;
          store_float(element, load_element(x + (i + l) * query_stride + j * key_stride, 1));
          lanes[l] = element[0];
        }
        store_float(out + j * t.stride + i, load_float(lanes));
      }
    }
  }
}

GENFAST_NOINLINE void load_bias(DType dtype, const void* bias, const int64_t stride[4], const Tile& t, float* out) {
  with_type(dtype, [&](auto* type) {
    const auto* const x = static_cast<decltype(type)>(const_cast<void*>(bias));
    load_matrix(x + t.batch * stride[0] + t.head * stride[1], stride[2], stride[3], t, out);
  });
}

// Calls body(key, lane, first entry or null, entries) for every vector of a tile: the table's entries either lie in
// order from the first, or at entries[0 ... kWidth).
template <typename Body>
GENFAST_INLINE void for_table(const Attention& a, const Tile& t, const Body& body) {
  for (int64_t j = 0; j < t.keys; ++j) {
    for (int64_t i = 0; i < t.queries; i += kWidth) {
      const int64_t lanes = smaller(t.queries - i, kWidth);
      if (a.q_index == nullptr) {
        body(j, i, lanes, t.query + i - (t.key + j) + a.keys - 1, static_cast<const int32_t*>(nullptr));
      } else {
        int32_t entries[kWidth];
        for (int64_t l = 0; l < lanes; ++l) entries[l] = a.q_index[t.query + i + l] - a.k_index[t.key + j];
        body(j, i, lanes, int64_t{0}, static_cast<const int32_t*>(entries));
      }
    }
  }
}

// tile += the entries of a table.
GENFAST_NOINLINE void add_table(const Attention& a, const float* table, const Tile& t, float* tile) {
  const float* const own = table + t.batch * a.table_batch + t.head * a.table_head;
  for_table(a, t, [&](int64_t j, int64_t i, int64_t lanes, int64_t first, const int32_t* entries) {
    float* const at = tile + j * t.stride + i;
    VecF x;
    if (entries == nullptr) {
      x = load_upto(own + first, lanes);
    } else {
      float values[kWidth] = {};
      for (int64_t l = 0; l < lanes; ++l) values[l] = own[entries[l]];
      x = load_float(values);
    }
    store_float(at, load_float(at) + x);
  });
}

// table[entry] += the elements of a tile.
GENFAST_NOINLINE void scatter_table(const Attention& a, const Tile& t, const float* tile, float* table) {
  for_table(a, t, [&](int64_t j, int64_t i, int64_t lanes, int64_t first, const int32_t* entries) {
    const float* const at = tile + j * t.stride + i;
    if (entries == nullptr) {
      store_upto(table + first, load_upto(table + first, lanes) + load_upto(at, lanes), lanes);
    } else {
      for (int64_t l = 0; l < lanes; ++l) table[entries[l]] += at[l];
    }
  });
}

GENFAST_INLINE bool plain_scores(const Attention& a) {
  return a.softcap == 0.0f && a.bias == nullptr && a.table == nullptr && a.mask == nullptr;
}

// Products to scores: cap, bias, table, then -inf where hidden. `capped` (null: not needed) takes tanh(Z / cap).
GENFAST_NOINLINE void finish_scores(const Attention& a, const Tile& t, float* tile, float* capped, float* room) {
  if (a.softcap != 0.0f) {
    const VecF cap = broadcast(a.softcap), inverse = broadcast(1.0f / a.softcap);
    for (int64_t j = 0; j < t.keys; ++j) {
      for (int64_t i = 0; i < t.queries; i += kWidth) {
        const VecF x = tanh(load_float(tile + j * t.stride + i) * inverse);
        if (capped != nullptr) store_float(capped + j * t.stride + i, x);
        store_float(tile + j * t.stride + i, x * cap);
      }
    }
  }
  if (a.bias != nullptr) {
    load_bias(a.dtype, a.bias, a.bias_stride, t, room);
    for (int64_t j = 0; j < t.keys; ++j) {
      for (int64_t i = 0; i < t.queries; i += kWidth) {
        float* const at = tile + j * t.stride + i;
        store_float(at, load_float(at) + load_float(room + j * t.stride + i));
      }
    }
  }
  if (a.table != nullptr) add_table(a, a.table, t, tile);
  if (a.mask != nullptr) {
    const uint8_t* const mask = a.mask + t.batch * a.mask_stride[0] + t.head * a.mask_stride[1];
    load_matrix(mask, a.mask_stride[2], a.mask_stride[3], t, room);
    for (int64_t j = 0; j < t.keys; ++j) {
      for (int64_t i = 0; i < t.queries; i += kWidth) {
        float* const at = tile + j * t.stride + i;
        const Mask hidden = less(load_float(room + j * t.stride + i), broadcast(0.5f));
        store_float(at, select(hidden, minus_infinity(), load_float(at)));
      }
    }
  }
  if (all_visible(a, t)) return;
  float ramp[kWidth];
  for (int i = 0; i < kWidth; ++i) ramp[i] = static_cast<float>(i);
  const VecF lanes = load_float(ramp);
  for (int64_t i = 0; i < t.queries; i += kWidth) {
    if (a.right >= 0) {  // lane l sees the first seen_until(i + l + 1) keys
      const int64_t first = seen_until(a, t, i + 1), last = computed_until(a, t, i);
      for (int64_t j = first; j < last; ++j) {
        const int64_t blind = t.key + j - (t.query + i + a.shift + a.right);
        float* const at = tile + j * t.stride + i;
        const Mask hidden = less(lanes, broadcast(static_cast<float>(smaller(blind, kWidth))));
        store_float(at, select(hidden, minus_infinity(), load_float(at)));
      }
    }
    if (a.left >= 0) {
      const int64_t behind = t.query + i + a.shift - a.left - t.key;  // keys before those that lane 0 sees
      const int64_t last = smaller(behind + kWidth - 1, t.keys);
      for (int64_t j = 0; j < last; ++j) {
        float* const at = tile + j * t.stride + i;
        const float seeing = static_cast<float>(larger(j - behind, -1));  // lanes up to it see key j
        store_float(at, select(less(broadcast(seeing), lanes), minus_infinity(), load_float(at)));
      }
    }
  }
}

// The factors of dropout: 0 or a.dropout_factor. Tiles begin at multiples of eight keys.
GENFAST_NOINLINE void dropout_factors(const Attention& a, const RoundKeys& keys, const Tile& t, float* out) {
  const VecF threshold = broadcast(static_cast<float>(a.dropout_threshold)), factor = broadcast(a.dropout_factor);
  const uint32_t matrix = static_cast<uint32_t>((a.batch_offset + t.batch) * a.heads + t.head);
  for (int64_t j = 0; j < t.keys; j += 8) {
    const int64_t some = smaller(t.keys - j, 8);
    for (int64_t i = 0; i < t.queries; i += kWidth) {
      VecU words[4];
      philox_rows(static_cast<uint32_t>((t.key + j) / 8), static_cast<uint32_t>(t.query + i), matrix,
                  philox::kAttentionDropout, keys, words);
      for (int64_t column = 0; column < some; ++column) {
        const VecU word = words[column / 2];
        const VecU lane = column % 2 == 0 ? bit_and(word, broadcast(uint32_t{0xFFFF})) : shift_right<16>(word);
        const VecF kept = select(less(float_from_int(lane), threshold), broadcast(0.0f), factor);
        store_float(out + (j + column) * t.stride + i, kept);
      }
    }
  }
}

}  // namespace attention
}  // namespace GENFAST_ISA
}  // namespace genfast
