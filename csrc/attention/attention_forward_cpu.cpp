// Attention forward: online softmax over blocks of keys. Compiled once per instruction set.
#include "attention/attention_cpu.h"
#include "attention/attention_tile.h"

namespace genfast {
namespace GENFAST_ISA {

using namespace attention;

namespace {

// One block of scores: moves the running maximum and sum of each query on, and leaves P, relative to the new maximum,
// in the tile, in pairs of keys where kPairs. `rescale` takes the factors of what was summed before.
template <bool kPairs>
GENFAST_NOINLINE void softmax_block(const Attention& a, const Tile& t, float* tile, const float* dropped, float* top,
                                    float* total, float* rescale) {
  for (int64_t i = 0; i < t.queries; i += kWidth) {
    const VecF before = load_float(top + i);
    VecF most[2] = {before, before};
    float* const column = tile + i;
    const int64_t keys = computed_until(a, t, i);
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      most[0] = max(most[0], load_float(column + j * t.stride));
      most[1] = max(most[1], load_float(column + (j + 1) * t.stride));
    }
    if (j < keys) most[0] = max(most[0], load_float(column + j * t.stride));
    const VecF now = max(most[0], most[1]);
    const VecF base = select(less(now, broadcast(-3.4e38f)), broadcast(0.0f), now);  // nothing seen yet: no NaN
    const VecF factor = exp_or_zero(before - base);
    VecF sums[2] = {load_float(total + i) * factor, broadcast(0.0f)};
    for (j = 0; j < keys; j += 2) {
      VecF kept[2] = {broadcast(0.0f), broadcast(0.0f)};
      for (int l = 0; l < 2 && j + l < keys; ++l) {
        const int64_t at = (j + l) * t.stride;
        const VecF p = exp_or_zero(load_float(column + at) - base);
        sums[l] = sums[l] + p;
        kept[l] = dropped == nullptr ? p : p * load_float(dropped + at + i);
        if constexpr (!kPairs) store_float(column + at, kept[l]);
      }
      if constexpr (kPairs) store_float(column + j / 2 * t.stride, gemm::pair_of(kept[0], kept[1]));
    }
    if constexpr (kPairs) {
      for (j = parts(keys, 2); j < gemm::pair_steps(t.keys); ++j) store_float(column + j * t.stride, broadcast(0.0f));
    }
    store_float(top + i, now);
    store_float(total + i, sums[0] + sums[1]);
    store_float(rescale + i, factor);
  }
}

// Rows of queries for few_scores().
void load_few(const Attention& a, const Tile& t, float* out) {
  const int64_t width = up_to(a.depth, kWidth);
  memset(out, 0, static_cast<size_t>(kFewQueries * width) * sizeof(float));
  for (int64_t i = 0; i < t.queries; ++i) {
    const char* const row = row_at(a.q, a.dtype, t.batch, t.head, t.query + i);
    with_type(a.dtype, [&](auto* type) {
      using T = decltype(type);
      for (int64_t c = 0; c < a.depth; c += kWidth) {
        const VecF x = load_upto(reinterpret_cast<T>(const_cast<char*>(row)) + c, a.depth - c);
        store_float(out + i * width + c, x * broadcast(a.scale));
      }
    });
  }
}

// Rows [first, first + count) of a head of paged keys or values, as they lie in one page, or one after the other in
// `room`.
Rows page_rows(const Attention& a, const Rows& x, int64_t head, int64_t first, int64_t count, int64_t depth,
               float* room) {
  const int64_t bytes = depth * width_of(a.dtype);
  char* to = reinterpret_cast<char*>(room);
  for (int64_t i = 0; i < count;) {
    const int64_t key = first + i, row = key % a.page_size, run = smaller(count - i, a.page_size - row);
    char* const from = row_at(x, a.dtype, a.pages[key / a.page_size], head, row);
    if (run == count) return {from, 0, 0, x.row};
    if (x.row == depth) {
      memcpy(to, from, static_cast<size_t>(run * bytes));
    } else {
      for (int64_t r = 0; r < run; ++r) {
        memcpy(to + r * bytes, from + r * x.row * width_of(a.dtype), static_cast<size_t>(bytes));
      }
    }
    to += run * bytes;
    i += run;
  }
  return {room, 0, 0, depth};
}

// Calls body(rows, first, count) for the runs of keys or values [key, key + count) that lie one after the other: all,
// or those of a page, when the next page's first ones are on their way.
template <typename T, typename Body>
void for_runs(T*, const Attention& a, const Rows& x, int64_t batch, int64_t head, int64_t key, int64_t count,
              int64_t depth, const Body& body) {
  const auto rows_at = [&](int64_t element, int64_t row, int64_t last) -> FewRows<T> {
    return {reinterpret_cast<const T*>(row_at(x, a.dtype, element, head, row)), x.row, last};
  };
  if (a.pages == nullptr) return body(rows_at(batch, key, a.keys - key), int64_t{0}, count);
  const int64_t bytes = depth * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count;) {
    const int64_t row = (key + i) % a.page_size, page = (key + i) / a.page_size, there = a.page_size - row;
    if (there <= count - i && (page + 1) * a.page_size < a.keys) {
      const FewRows<T> next = rows_at(a.pages[page + 1], 0, 0);
      const int64_t rows = smaller(a.page_size, kFetchAhead / bytes);
      for (int64_t r = 0; r < rows; ++r) fetch(next.data + r * next.stride, bytes);
    }
    const int64_t run = smaller(there, count - i);
    body(rows_at(a.pages[page], row, there), i, run);
    i += run;
  }
}

// out = or += sums of a block: sums of those round less than one sum.
void add_sums(const float* sums, int64_t rows, int64_t columns, int64_t stride, bool fresh, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      float* const at = out + i * stride + c;
      const VecF sum = load_float(sums + i * stride + c);
      store_float(at, fresh ? sum : load_float(at) + sum);
    }
  }
}

void scale_row(float* row, int64_t columns, float factor) {
  for (int64_t k = 0; k < columns; k += kWidth) store_float(row + k, load_float(row + k) * broadcast(factor));
}

}  // namespace

int64_t attention_query_blocks(const Attention& a) { return parts(a.queries, query_block(a)); }

int64_t attention_forward_floats(const Attention& a) {
  const int64_t nq = query_block(a), nk = key_block(a), blocks = parts(a.keys, nk);
  const int64_t width = up_to(a.value_depth, kTileColumns), out = nq * width;
  const int64_t packed = a.queries <= kFewQueries
                             ? kFewQueries * width
                             : blocks * (groups_floats(nk, a.depth) + rows_floats(nk, a.value_depth) + 1);
  const int64_t gathered = a.pages == nullptr || a.queries <= kFewQueries ? 0 : nk * (a.depth + a.value_depth);
  return columns_floats(nq, a.depth) + kFewQueries * kWidth + packed + out + 3 * nq * nk + 3 * nq + gathered + 64;
}

void attention_forward_unit(const AttentionForward& args, const AttentionUnit& unit, float* room) {
  const Attention& a = args.a;
  const int64_t nq = query_block(a), nk = key_block(a), query_blocks = parts(a.queries, nq);
  const int64_t key_blocks = parts(a.keys, nk), group = a.heads / a.kv_heads;
  const int64_t width = up_to(a.value_depth, kTileColumns);
  const int64_t key_floats = groups_floats(nk, a.depth), value_floats = rows_floats(nk, a.value_depth);
  const bool plain = plain_scores(a), few = a.queries <= kFewQueries;
  float* const out = room;
  float* const tile = out + nq * width;
  float* const extra = tile + nq * nk;
  float* const factors = extra + nq * nk;
  float *const top = factors + nq * nk, *const total = top + nq, *const rescale = total + nq;
  float* const q = rescale + nq;
  float* const keys = q + columns_floats(nq, a.depth) + kFewQueries * kWidth;
  float* const values = keys + key_blocks * key_floats;
  float* const packed = values + key_blocks * value_floats;
  float* const few_sums = keys;  // few queries pack nothing
  float* const gathered = packed + key_blocks;
  for (int64_t block = 0; !few && block < key_blocks; ++block) packed[block] = 0.0f;
  if (few) memset(tile, 0, static_cast<size_t>(nq * nk) * sizeof(float));  // lanes that nothing writes
  RoundKeys round_keys;
  make_round_keys(a.seed, &round_keys);

  for (int64_t item = unit.first; item < unit.last; ++item) {
    Tile t = {unit.batch, unit.kv_head * group + item / query_blocks, item % query_blocks * nq, 0, 0, 0, 0, nq};
    t.queries = smaller(a.queries - t.query, nq);
    if (few) {
      load_few(a, t, q);
    } else {
      pack(Form::kColumns, a, a.q, t.batch, t.head, t.query, t.queries, a.depth, a.scale, q);
    }
    for (int64_t i = 0; i < nq; ++i) {
      top[i] = a.sinks == nullptr ? scalar_from_bits(0xFF800000u) : a.sinks[t.head];
      total[i] = a.sinks == nullptr ? 0.0f : 1.0f;
    }
    bool fresh = true;
    int64_t first, last;
    visible_keys(a, t.query, t.queries, &first, &last);
    for (int64_t block = first / nk; block * nk < last; ++block) {
      t.key = block * nk;
      t.packed_keys = smaller(a.keys - t.key, nk);
      t.keys = smaller(last - t.key, t.packed_keys);
      float* const own_keys = keys + block * key_floats;
      float* const own_values = values + block * value_floats;
      if (few) {
        with_type(a.dtype, [&](auto* type) {
          for_runs(type, a, a.k, t.batch, unit.kv_head, t.key, t.keys, a.depth,
                   [&](const auto& rows, int64_t j, int64_t count) {
                     few_scores(q, t.queries, rows, count, a.depth, tile + j * t.stride, t.stride);
                   });
        });
      } else {
        if (packed[block] == 0.0f) {
          Rows k = a.k, v = a.v;
          int64_t row = t.key;
          if (a.pages != nullptr) {
            k = page_rows(a, a.k, unit.kv_head, t.key, t.packed_keys, a.depth, gathered);
            v = page_rows(a, a.v, unit.kv_head, t.key, t.packed_keys, a.value_depth, gathered + nk * a.depth);
            row = 0;
          }
          pack(Form::kGroups, a, k, t.batch, unit.kv_head, row, t.packed_keys, a.depth, 1.0f, own_keys);
          pack(Form::kRows, a, v, t.batch, unit.kv_head, row, t.packed_keys, a.value_depth, 1.0f, own_values);
          packed[block] = 1.0f;
        }
        scores_product(a, t, own_keys, q, a.depth, a.scale, tile, true);
      }
      if (!plain || !all_visible(a, t)) finish_scores(a, t, tile, nullptr, extra);
      if (a.dropout_threshold != 0) dropout_factors(a, round_keys, t, factors);
      auto* const softmax = a.pairs ? &softmax_block<true> : &softmax_block<false>;
      softmax(a, t, tile, a.dropout_threshold != 0 ? factors : nullptr, top, total, rescale);
      if (!fresh) {
        for (int64_t i = 0; i < t.queries; ++i) {
          if (rescale[i] != 1.0f) scale_row(out + i * width, width, rescale[i]);
        }
      }
      if (!a.pairs && !is_rectangle(a, t)) clear_hidden(a, t, tile);
      if (few) {
        memset(few_sums, 0, static_cast<size_t>(kFewQueries * width) * sizeof(float));
        with_type(a.dtype, [&](auto* type) {
          for_runs(type, a, a.v, t.batch, unit.kv_head, t.key, computed_until(a, t, 0), a.value_depth,
                   [&](const auto& rows, int64_t j, int64_t count) {
                     few_values(tile + j * t.stride, t.stride, t.queries, rows, count, a.value_depth, few_sums, width);
                   });
        });
        add_sums(few_sums, t.queries, a.value_depth, width, fresh, out);
      } else {
        query_product(a, t, tile, packed_keys(a, t, own_values), a.value_depth, out, width, fresh);
      }
      fresh = false;
    }
    for (int64_t i = 0; i < t.queries; ++i) {
      float* const lse = args.lse + statistics_at(a, t) + i * a.lse_row;
      *lse = total[i] == 0.0f ? scalar_from_bits(0xFF800000u) : top[i] + ::logf(total[i]);
      if (fresh || total[i] == 0.0f) memset(out + i * width, 0, static_cast<size_t>(width) * sizeof(float));
      char* const to = row_at(a.out, a.out_dtype, t.batch, t.head, t.query + i);
      with_type(a.out_dtype, [&](auto* type) {
        from_float(out + i * width, a.value_depth, total[i] == 0.0f ? 1.0f : 1.0f / total[i],
                   reinterpret_cast<decltype(type)>(to));
      });
    }
  }
}

void attention_merge_splits(const AttentionDecode& args, int64_t batch, int64_t head) {
  const Attention& a = args.a;
  const int64_t width = a.value_depth + 1, split = a.batch * a.heads * a.queries * width;
  for (int64_t i = 0; i < a.queries; ++i) {
    const float* const own = args.partial + ((batch * a.heads + head) * a.queries + i) * width;
    float top = scalar_from_bits(0xFF800000u), total = 0.0f;
    bool undefined = false;
    for (int64_t s = 0; s < args.splits; ++s) {
      const float lse = own[s * split + a.value_depth];
      undefined = undefined || lse != lse;
      top = top < lse ? lse : top;
    }
    const bool empty = top == scalar_from_bits(0xFF800000u);
    for (int64_t s = 0; s < args.splits; ++s) {
      if (!empty) total += ::expf(own[s * split + a.value_depth] - top);
    }
    const float lse = undefined ? scalar_from_bits(0x7FC00000u) : empty ? top : top + ::logf(total);
    args.lse[statistics_at(a, {batch, head, i, 0, 0, 0, 0, 0})] = lse;
    char* const to = row_at(a.out, a.dtype, batch, head, i);
    for (int64_t c = 0; c < a.value_depth; c += kWidth) {
      const int64_t some = a.value_depth - c;
      VecF sum = broadcast(0.0f);
      for (int64_t s = 0; s < args.splits && !empty; ++s) {
        const float part = own[s * split + a.value_depth];
        if (part == scalar_from_bits(0xFF800000u)) continue;  // nothing seen
        sum = fma(broadcast(::expf(part - lse)), load_upto(own + s * split + c, some), sum);
      }
      with_type(a.dtype, [&](auto* type) { store_upto(reinterpret_cast<decltype(type)>(to) + c, sum, some); });
    }
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
