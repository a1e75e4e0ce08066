// Splits attention over threads. What a piece of work computes does not depend on the thread or on the other pieces.
#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "attention/attention_cpu.h"
#include "common/gemm/gemm.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace genfast {
namespace cpu {

namespace {

constexpr int64_t kUnitsPerThread = 4;     // so that threads with fewer visible keys find more work
constexpr double kWorthAThread = 1 << 18;  // multiply-adds

int useful_threads(double work, int threads) { return work < kWorthAThread ? 1 : threads; }

double work_of(const Attention& a) {
  return static_cast<double>(a.batch * a.heads) * static_cast<double>(a.queries) * static_cast<double>(a.keys) *
         static_cast<double>(a.depth + a.value_depth);
}

// The tiles that products in pairs may run on, configured on one thread for as long as this lives.
class PairProducts {
 public:
  explicit PairProducts(bool used) : used_(used) {
    if (used_) GENFAST_FOR_ISA(gemm_configure_tiles)();
  }
  ~PairProducts() {
    if (used_) GENFAST_FOR_ISA(gemm_release_tiles)();
  }
  PairProducts(const PairProducts&) = delete;
  PairProducts& operator=(const PairProducts&) = delete;

 private:
  const bool used_;
};

// body(unit, room) for every unit, in any order, with `floats` of room for each thread; `pairs` where one has products
// in pairs.
template <typename Body>
void for_units(int64_t count, int threads, int64_t floats, bool pairs, const Body& body) {
  if (count <= 0) return;
  const int64_t slots = threads < count ? threads : count;
  floats = (floats + 15) / 16 * 16;
  Workspace workspace(slots * floats);
  float* const room = workspace.take(slots * floats);
  std::atomic<int64_t> next{0};
  parallel_slots(slots, static_cast<int>(slots), [&](int64_t slot, int64_t, int64_t) {
    const PairProducts products(pairs);
    for (int64_t unit; (unit = next.fetch_add(1)) < count;) body(unit, room + slot * floats);
  });
}

// ---- sequences: what a call consists of ----
// A dense call is one, whose batch is units of work; packed ones are a call each, whose element of the batch, for what
// is by sequence, is their number.

Attention with_strides(const Attention& given) {
  Attention a = given;
  const bool packed = a.q_starts != nullptr;
  a.out_dtype = a.dtype;
  a.lse_batch = packed ? 0 : a.heads * a.queries;
  a.lse_head = a.queries;
  a.lse_row = 1;
  a.pairs = false;
  return a;
}

// Whether products may run in pairs of bfloat16: rows must begin at whole pairs.
bool in_pairs(const Attention& a, std::initializer_list<const Rows*> all) {
  if (a.dtype != DType::kBFloat16 || a.depth % 2 != 0 || a.value_depth % 2 != 0 || !use_bfloat16_pairs()) return false;
  return std::all_of(all.begin(), all.end(), [](const Rows* x) {
    return reinterpret_cast<uintptr_t>(x->data) % 4 == 0 && (x->batch | x->head | x->row) % 2 == 0;
  });
}

Rows moved(const Rows& x, DType dtype, int64_t rows) {
  if (x.data == nullptr) return x;
  return {static_cast<char*>(x.data) + rows * x.row * bytes_of(dtype), 0, x.head, x.row};
}

template <typename T>
T* moved(T* x, int64_t rows) {
  return x == nullptr ? x : x + rows;
}

Attention sequence(const Attention& a, int64_t n) {
  const int64_t q = a.q_starts[n], k = a.k_starts[n];
  Attention s = a;
  s.queries = a.q_starts[n + 1] - q;
  s.keys = a.k_starts[n + 1] - k;
  s.q = moved(a.q, a.dtype, q);
  s.k = moved(a.k, a.dtype, k);
  s.v = moved(a.v, a.dtype, k);
  s.out = moved(a.out, a.dtype, q);
  s.lse = moved(a.lse, q);
  s.q_index = moved(a.q_index, q);
  s.k_index = moved(a.k_index, k);
  if (a.bottom_right) s.shift += s.keys - s.queries;
  return s;
}

AttentionForward sequence(const AttentionForward& args, int64_t n) {
  return {sequence(args.a, n), args.lse + args.a.q_starts[n]};
}

AttentionTangent sequence(const AttentionTangent& args, int64_t n) {
  const DType dtype = args.a.dtype;
  const int64_t q = args.a.q_starts[n], k = args.a.k_starts[n];
  AttentionTangent s = args;
  s.a = sequence(args.a, n);
  s.q = moved(args.q, dtype, q);
  s.k = moved(args.k, dtype, k);
  s.v = moved(args.v, dtype, k);
  s.out = moved(args.out, dtype, q);
  s.lse = moved(args.lse, q);
  return s;
}

AttentionGradient sequence(const AttentionGradient& args, int64_t n) {
  const DType dtype = args.a.dtype;
  const int64_t q = args.a.q_starts[n], k = args.a.k_starts[n];
  AttentionGradient s = args;
  s.a = sequence(args.a, n);
  s.dout = moved(args.dout, dtype, q);
  s.dlse = moved(args.dlse, q);
  s.dq = moved(args.dq, dtype, q);
  s.dk = moved(args.dk, dtype, k);
  s.dv = moved(args.dv, dtype, k);
  s.dq_partial = moved(args.dq_partial, q * args.a.depth);
  s.splits = attention_splits(1, s.a.kv_heads, s.a.queries, s.a.keys);
  if (args.second) s.t = sequence(args.t, n);
  return s;
}

// Runs body(call, unit of the call, room) for the units of each of `count` calls: first `units(call)` says how many,
// and `floats(call)` the room.
template <typename Call, typename Units, typename Floats, typename Body>
void for_calls(int64_t count, int threads, const Call& call, const Units& units, const Floats& floats,
               const Body& body) {
  std::vector<int64_t> ends(static_cast<size_t>(count));
  int64_t total = 0, most = 0;
  bool pairs = false;
  for (int64_t i = 0; i < count; ++i) {
    const auto one = call(i);
    ends[static_cast<size_t>(i)] = total += units(one);
    most = std::max(most, floats(one));
    pairs = pairs || one.a.pairs;
  }
  for_units(total, threads, most, pairs, [&](int64_t unit, float* room) {
    const int64_t i = std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin();
    body(call(i), i, i == 0 ? unit : unit - ends[static_cast<size_t>(i - 1)], room);
  });
}

template <typename Args>
double work_of_calls(int64_t count, const Args& call) {
  double work = 0;
  for (int64_t i = 0; i < count; ++i) work += work_of(call(i).a);
  return work;
}

// Queries of one head of keys and values in units, which pack its keys and values once each. `elements`: of the batch
// of a call; `element(i)`: the first one's number.
template <typename Call, typename Element, typename Run>
void for_queries(int64_t count, int64_t elements, const Call& call, const Element& element, int threads, double work,
                 int64_t (*floats)(const Attention&), Run* run) {
  if (count == 0 || elements == 0) return;
  const int useful = useful_threads(work, threads);
  const int64_t heads = count * elements * call(0).a.kv_heads;
  if (heads == 0) return;
  const int64_t wanted = useful == 1 ? 1 : (kUnitsPerThread * useful + heads - 1) / heads;
  const auto items = [](const Attention& a) {
    return a.heads / a.kv_heads * GENFAST_FOR_ISA(attention_query_blocks)(a);
  };
  for_calls(
      count, useful, call, [&](const auto& one) { return elements * one.a.kv_heads * std::min(wanted, items(one.a)); },
      [&](const auto& one) { return floats(one.a); },
      [&](const auto& one, int64_t i, int64_t unit, float* room) {
        const Attention& a = one.a;
        const int64_t all = items(a), pieces = std::min(wanted, all);
        const int64_t head = unit / pieces, piece = pieces - 1 - unit % pieces;  // later queries see more keys: first
        run(one, {element(i) + head / a.kv_heads, head % a.kv_heads, all * piece / pieces, all * (piece + 1) / pieces},
            room);
      });
}

template <typename Args, typename Prepare, typename Run>
void for_queries(const Args& args, int threads, const Prepare& prepare, int64_t (*floats)(const Attention&), Run* run) {
  const bool packed = args.a.q_starts != nullptr;
  const int64_t count = packed ? args.a.batch : 1;
  const auto call = [&](int64_t i) { return prepare(packed ? sequence(args, i) : args); };
  for_queries(
      count, packed ? 1 : args.a.batch, call, [&](int64_t i) { return packed ? i : 0; }, threads,
      packed ? work_of_calls(count, call) : work_of(args.a), floats, run);
}

// One query a head, as in decoding: the heads of a group become the queries of one head, which read its keys together.
// Their scores must need nothing that is a head's own but a bias or a mask, which have strides.
AttentionForward folded_heads(const AttentionForward& args) {
  AttentionForward out = args;
  Attention& a = out.a;
  if (a.queries != 1 || a.heads <= a.kv_heads || a.table != nullptr || a.sinks != nullptr || a.dropout_threshold != 0)
    return args;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t first = a.left < 0 ? 0 : std::min(std::max<int64_t>(a.shift - a.left, 0), a.keys);
  const int64_t last = a.right < 0 ? a.keys : std::max(std::min(a.shift + a.right + 1, a.keys), first);
  const auto from = [&](const void* data, int64_t elements, DType dtype) -> void* {
    return data == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(data)) + elements * bytes_of(dtype);
  };
  if (a.pages != nullptr && first > 0) return args;
  a.k.data = from(a.k.data, first * a.k.row, a.dtype);
  a.v.data = from(a.v.data, first * a.v.row, a.dtype);
  a.bias = from(a.bias, first * a.bias_stride[3], a.dtype);
  a.mask = static_cast<const uint8_t*>(from(a.mask, first * a.mask_stride[3], DType::kBool));
  a.keys = last - first;
  a.left = a.right = -1;
  a.queries = group;
  a.heads = a.kv_heads;
  a.lse_row = a.lse_head;
  a.lse_head *= group;
  for (Rows* x : {&a.q, &a.out}) {
    x->row = x->head;
    x->head *= group;
  }
  for (int64_t* stride : {a.bias_stride, a.mask_stride}) {
    stride[2] = stride[1];
    stride[1] *= group;
  }
  return out;
}

AttentionForward folded(const AttentionForward& args) {
  AttentionForward out = folded_heads(args);
  out.a.pairs = out.a.queries > kFewQueries && in_pairs(out.a, {&out.a.q, &out.a.k, &out.a.v});
  return out;
}

// The keys of one split of one element of the batch.
AttentionForward decoded(const AttentionDecode& args, int64_t element, int64_t split) {
  AttentionForward out = {with_strides(args.a), args.lse};
  Attention& a = out.a;
  const int64_t keys = args.lengths[element], unit = args.blocks == nullptr ? 96 : args.page_size;
  const int64_t each = ((keys + args.splits - 1) / args.splits + unit - 1) / unit * unit;
  const int64_t first = std::min(split * each, keys);
  a.keys = std::min(each, keys - first);
  a.shift = keys - a.queries - first;
  a.bias =
      a.bias == nullptr ? nullptr : static_cast<const char*>(a.bias) + first * a.bias_stride[3] * bytes_of(a.dtype);
  a.mask = moved(a.mask, first * a.mask_stride[3]);
  a.q_index = moved(a.q_index, element * a.queries);
  a.k_index = moved(a.k_index, first);
  if (split > 0) a.sinks = nullptr;
  if (args.blocks == nullptr) {
    a.k.data = static_cast<char*>(a.k.data) + first * a.k.row * bytes_of(a.dtype);
    a.v.data = static_cast<char*>(a.v.data) + first * a.v.row * bytes_of(a.dtype);
  } else {
    a.pages = args.blocks + element * args.blocks_stride + first / args.page_size;
    a.page_size = args.page_size;
  }
  if (args.splits > 1) {
    const int64_t width = a.value_depth + 1, matrix = a.queries * width;
    float* const own = args.partial + split * a.batch * a.heads * matrix;
    a.out = {own, a.heads * matrix, matrix, width};
    a.out_dtype = DType::kFloat32;
    out.lse = own + a.value_depth;
    a.lse_batch = a.out.batch;
    a.lse_head = a.out.head;
    a.lse_row = width;
  }
  return folded(out);
}

}  // namespace

int64_t attention_splits(int64_t batch, int64_t kv_heads, int64_t queries, int64_t keys) {
  constexpr int64_t kUnits = 32, kLeastKeys = 512;
  const int64_t heads = batch * kv_heads;
  if (heads == 0 || queries == 0) return 1;
  const int64_t wanted = (kUnits + heads - 1) / heads, most = keys / kLeastKeys;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits;
}

void attention_forward(const AttentionForward& given, int threads) {
  const AttentionForward args = {with_strides(given.a), given.lse};
  for_queries(args, threads, folded, GENFAST_FOR_ISA(attention_forward_floats),
              GENFAST_FOR_ISA(attention_forward_unit));
}

void attention_decode(const AttentionDecode& args, int threads) {
  const Attention& a = args.a;
  const int64_t count = a.batch * args.splits;
  const auto call = [&](int64_t i) { return decoded(args, i / args.splits, i % args.splits); };
  const double work = a.batch == 0 ? 0 : work_of_calls(count, call) / static_cast<double>(a.batch);
  for_queries(
      count, 1, call, [&](int64_t i) { return i / args.splits; }, threads, work,
      GENFAST_FOR_ISA(attention_forward_floats), GENFAST_FOR_ISA(attention_forward_unit));
  if (args.splits == 1) return;
  AttentionDecode whole = args;
  whole.a = with_strides(a);
  auto* const merge = GENFAST_FOR_ISA(attention_merge_splits);
  parallel_for(a.batch * a.heads, useful_threads(work, threads), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) merge(whole, i / a.heads, i % a.heads);
  });
}

void attention_append(const AttentionAppend& args) {
  const int64_t bytes = bytes_of(args.dtype);
  const auto at = [&](const Rows& x, int64_t batch, int64_t head, int64_t row) {
    return static_cast<char*>(x.data) + (batch * x.batch + head * x.head + row * x.row) * bytes;
  };
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t i = 0; i < args.count; ++i) {
      const int64_t position = args.lengths[b] + i;
      const bool paged = args.blocks != nullptr;
      const int64_t element = paged ? args.blocks[b * args.blocks_stride + position / args.page_size] : b;
      const int64_t row = paged ? position % args.page_size : position;
      for (int64_t h = 0; h < args.heads; ++h) {
        memcpy(at(args.cache, element, h, row), at(args.rows, b, h, i), static_cast<size_t>(args.width * bytes));
      }
    }
  }
}

void attention_tangent(const AttentionTangent& given, int threads) {
  AttentionTangent args = given;
  args.a = with_strides(given.a);
  for_queries(
      args, threads, [](const AttentionTangent& one) { return one; }, GENFAST_FOR_ISA(attention_tangent_floats),
      GENFAST_FOR_ISA(attention_tangent_unit));
}

void attention_gradient(const AttentionGradient& given, int threads) {
  AttentionGradient args = given;
  args.a = with_strides(given.a);
  args.t.a = with_strides(given.t.a);
  args.a.pairs = !args.second && in_pairs(args.a, {&args.a.q, &args.a.k, &args.a.v, &args.dout});
  const Attention& a = args.a;
  const bool packed = a.q_starts != nullptr;
  args.partial_batch = packed ? 0 : a.heads * a.queries * a.depth;
  args.partial_split = (packed ? 1 : a.batch) * a.heads * a.queries * a.depth;
  const int64_t count = packed ? a.batch : 1, elements = packed ? 1 : a.batch;
  const auto call_of = [&](const AttentionGradient& from, int64_t i) { return packed ? sequence(from, i) : from; };
  const double work = packed ? work_of_calls(count, [&](int64_t i) { return sequence(args, i); }) : work_of(a);
  const int useful = useful_threads(work, threads);
  auto* const unit = GENFAST_FOR_ISA(attention_gradient_unit);
  const bool reduced = args.bias_gradient == BiasGradient::kReduced;
  AttentionGradient main = args;
  if (reduced) main.bias_gradient = BiasGradient::kNone;
  for_calls(
      count, useful, [&](int64_t i) { return call_of(main, i); },
      [&](const AttentionGradient& one) { return elements * a.kv_heads * one.splits; },
      GENFAST_FOR_ISA(attention_gradient_floats),
      [&](const AttentionGradient& one, int64_t i, int64_t at, float* room) {
        const int64_t head = at / one.splits;
        unit(one, i + head / a.kv_heads, head % a.kv_heads, one.splits - 1 - at % one.splits, room);
      });
  if (args.splits > 1) {
    auto* const sum = GENFAST_FOR_ISA(attention_sum_splits);
    parallel_for(a.batch * a.heads, useful, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const AttentionGradient one = call_of(args, i / a.heads);
        if (one.splits > 1) sum(one, i / a.heads, i % a.heads);
      }
    });
  }
  if (reduced && a.queries > 0 && a.keys > 0) {
    auto* const tile = GENFAST_FOR_ISA(attention_bias_tile);
    for_units(GENFAST_FOR_ISA(attention_bias_tiles)(args), useful, GENFAST_FOR_ISA(attention_bias_floats)(args),
              a.pairs, [&](int64_t at, float* room) { tile(args, at, room); });
  }
}

}  // namespace cpu
}  // namespace genfast
