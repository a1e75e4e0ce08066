// Splits attention over threads. What a piece of work computes does not depend on the thread or on the other pieces.
#include "attention/attention.h"

#include <algorithm>
#include <atomic>

#include "attention/attention_cpu.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace genfast {
namespace cpu {

namespace {

constexpr int64_t kUnitsPerThread = 4;     // so that threads with fewer visible keys find more work
constexpr double kWorthAThread = 1 << 18;  // multiply-adds

int useful_threads(const Attention& a, int threads) {
  const double work = static_cast<double>(a.batch * a.heads) * static_cast<double>(a.queries) *
                      static_cast<double>(a.keys) * static_cast<double>(a.depth + a.value_depth);
  return work < kWorthAThread ? 1 : threads;
}

// body(unit, room) for every unit, in any order, with `floats` of room for each thread.
template <typename Body>
void for_units(int64_t count, int threads, int64_t floats, const Body& body) {
  if (count <= 0) return;
  const int64_t slots = threads < count ? threads : count;
  floats = (floats + 15) / 16 * 16;
  Workspace workspace(slots * floats);
  float* const room = workspace.take(slots * floats);
  std::atomic<int64_t> next{0};
  parallel_slots(slots, static_cast<int>(slots), [&](int64_t slot, int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1)) < count;) body(unit, room + slot * floats);
  });
}

// Queries of one head of keys and values in units, which pack its keys and values once each.
template <typename Args, typename Run>
void for_queries(const Args& args, int threads, int64_t floats, Run* run) {
  const Attention& a = args.a;
  const int64_t heads = a.batch * a.kv_heads;
  if (heads == 0) return;
  const int64_t items = a.heads / a.kv_heads * GENFAST_FOR_ISA(attention_query_blocks)(a);
  if (items == 0) return;
  const int useful = useful_threads(a, threads);
  int64_t pieces = useful == 1 ? 1 : (kUnitsPerThread * useful + heads - 1) / heads;
  pieces = pieces < items ? pieces : items;
  for_units(heads * pieces, useful, floats, [&](int64_t unit, float* room) {
    const int64_t head = unit / pieces, piece = pieces - 1 - unit % pieces;  // later queries see more keys: first
    run(args, {head / a.kv_heads, head % a.kv_heads, items * piece / pieces, items * (piece + 1) / pieces}, room);
  });
}

// One query a head, as in decoding: the heads of a group become the queries of one head, which read its keys together.
// Their scores must need nothing that is a head's own but a bias or a mask, which have strides.
AttentionForward folded(const AttentionForward& args) {
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
  a.k.data = from(a.k.data, first * a.k.row, a.dtype);
  a.v.data = from(a.v.data, first * a.v.row, a.dtype);
  a.bias = from(a.bias, first * a.bias_stride[3], a.dtype);
  a.mask = static_cast<const uint8_t*>(from(a.mask, first * a.mask_stride[3], DType::kBool));
  a.keys = last - first;
  a.left = a.right = -1;
  a.queries = group;
  a.heads = a.kv_heads;
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
  const AttentionForward args = folded(given);
  for_queries(args, threads, GENFAST_FOR_ISA(attention_forward_floats)(args.a),
              GENFAST_FOR_ISA(attention_forward_unit));
}

void attention_tangent(const AttentionTangent& args, int threads) {
  for_queries(args, threads, GENFAST_FOR_ISA(attention_tangent_floats)(args.a),
              GENFAST_FOR_ISA(attention_tangent_unit));
}

void attention_gradient(const AttentionGradient& args, int threads) {
  const Attention& a = args.a;
  const int useful = useful_threads(a, threads);
  auto* const unit = GENFAST_FOR_ISA(attention_gradient_unit);
  const bool reduced = args.bias_gradient == BiasGradient::kReduced;
  AttentionGradient main = args;
  if (reduced) main.bias_gradient = BiasGradient::kNone;
  for_units(a.batch * a.kv_heads * args.splits, useful, GENFAST_FOR_ISA(attention_gradient_floats)(args),
            [&](int64_t at, float* room) {
              const int64_t head = at / args.splits;
              unit(main, head / a.kv_heads, head % a.kv_heads, args.splits - 1 - at % args.splits, room);
            });
  if (args.splits > 1) {
    auto* const sum = GENFAST_FOR_ISA(attention_sum_splits);
    parallel_for(a.batch * a.heads, useful, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) sum(args, i / a.heads, i % a.heads);
    });
  }
  if (reduced && a.queries > 0 && a.keys > 0) {
    auto* const tile = GENFAST_FOR_ISA(attention_bias_tile);
    for_units(GENFAST_FOR_ISA(attention_bias_tiles)(args), useful, GENFAST_FOR_ISA(attention_bias_floats)(args),
              [&](int64_t at, float* room) { tile(args, at, room); });
  }
}

}  // namespace cpu
}  // namespace genfast
