// The forward-mode derivative of attention: O' and mu = L' from the tangents of the inputs, with L known. Compiled once
// per instruction set.
#include "attention/attention_cpu.h"
#include "attention/attention_score_tangent.h"

namespace genfast {
namespace GENFAST_ISA {

using namespace attention;

int64_t attention_tangent_floats(const Attention& a) {
  const int64_t nq = query_block(a), nk = key_block(a);
  const int64_t packed = parts(a.keys, nk) * 2 * (groups_floats(nk, a.depth) + rows_floats(nk, a.value_depth) + 1);
  return 2 * columns_floats(nq, a.depth) + packed + nq * up_to(a.value_depth, kTileColumns) + 5 * nq * nk + 2 * nq + 64;
}

void attention_tangent_unit(const AttentionTangent& args, const AttentionUnit& unit, float* room) {
  const Attention& a = args.a;
  const int64_t nq = query_block(a), nk = key_block(a), query_blocks = parts(a.queries, nq);
  const int64_t key_blocks = parts(a.keys, nk), group = a.heads / a.kv_heads;
  const int64_t width = up_to(a.value_depth, kTileColumns);
  const int64_t key_floats = groups_floats(nk, a.depth), value_floats = rows_floats(nk, a.value_depth);
  float* const out = room;
  float* const p = out + nq * width;
  float *const z = p + nq * nk, *const capped = z + nq * nk;
  float *const factors = capped + nq * nk, *const extra = factors + nq * nk;
  float *const lse = extra + nq * nk, *const mean = lse + nq;
  float* const q = mean + nq;
  float* const q_tangent = q + columns_floats(nq, a.depth);
  float* const keys = q_tangent + columns_floats(nq, a.depth);
  float* const values = keys + key_blocks * 2 * key_floats;
  float* const packed = values + key_blocks * 2 * value_floats;
  for (int64_t block = 0; block < key_blocks; ++block) packed[block] = 0.0f;
  RoundKeys round_keys;
  make_round_keys(a.seed, &round_keys);

  for (int64_t item = unit.first; item < unit.last; ++item) {
    Tile t = {unit.batch, unit.kv_head * group + item / query_blocks, item % query_blocks * nq, 0, 0, 0, 0, nq};
    t.queries = smaller(a.queries - t.query, nq);
    const int64_t row = statistics_at(a, t);
    pack(Form::kColumns, a, a.q, t.batch, t.head, t.query, t.queries, a.depth, a.scale, q);
    pack(Form::kColumns, a, args.q, t.batch, t.head, t.query, t.queries, a.depth, a.scale, q_tangent);
    load_lse(a.lse + row, t.queries, nq, lse);
    for (int64_t i = 0; i < nq; ++i) mean[i] = 0.0f;
    bool fresh = true;
    int64_t first, last;
    visible_keys(a, t.query, t.queries, &first, &last);
    for (int64_t block = first / nk; block * nk < last; ++block) {
      t.key = block * nk;
      t.packed_keys = smaller(a.keys - t.key, nk);
      t.keys = smaller(last - t.key, t.packed_keys);
      float *const k = keys + block * 2 * key_floats, *const k_tangent = k + key_floats;
      float *const v = values + block * 2 * value_floats, *const v_tangent = v + value_floats;
      if (packed[block] == 0.0f) {
        pack(Form::kGroups, a, a.k, t.batch, unit.kv_head, t.key, t.packed_keys, a.depth, 1.0f, k);
        pack(Form::kGroups, a, args.k, t.batch, unit.kv_head, t.key, t.packed_keys, a.depth, 1.0f, k_tangent);
        pack(Form::kRows, a, a.v, t.batch, unit.kv_head, t.key, t.packed_keys, a.value_depth, 1.0f, v);
        pack(Form::kRows, a, args.v, t.batch, unit.kv_head, t.key, t.packed_keys, a.value_depth, 1.0f, v_tangent);
        packed[block] = 1.0f;
      }
      scores_product(a, t, k, q, a.depth, a.scale, p, true);
      if (!plain_scores(a) || !all_visible(a, t)) finish_scores(a, t, p, capped, extra);
      scores_product(a, t, k, q_tangent, a.depth, a.scale, z, true);
      scores_product(a, t, k_tangent, q, a.depth, a.scale, z, false);
      score_tangents(args, t, z, capped, extra);
      const float* const dropped = a.dropout_threshold != 0 ? factors : nullptr;
      if (dropped != nullptr) dropout_factors(a, round_keys, t, factors);
      for (int64_t i = 0; i < t.queries; i += kWidth) {  // P, and P A' in place of A'
        const VecF base = load_float(lse + i);
        VecF total = load_float(mean + i);
        const int64_t computed = computed_until(a, t, i);
        for (int64_t j = 0; j < computed; ++j) {
          const int64_t at = j * nq + i;
          VecF probability = exp_or_zero(load_float(p + at) - base);
          VecF product = probability * load_float(z + at);
          total = total + product;
          if (dropped != nullptr) {
            probability = probability * load_float(dropped + at);
            product = product * load_float(dropped + at);
          }
          store_float(p + at, probability);
          store_float(z + at, product);
        }
        store_float(mean + i, total);
      }
      if (!is_rectangle(a, t)) {
        clear_hidden(a, t, p);
        clear_hidden(a, t, z);
      }
      query_product(a, t, z, packed_keys(a, t, v), a.value_depth, out, width, fresh);
      query_product(a, t, p, packed_keys(a, t, v_tangent), a.value_depth, out, width, false);
      fresh = false;
    }
    for (int64_t i = 0; i < t.queries; ++i) {
      float mu = mean[i];
      if (args.sinks != nullptr)
        mu += ::expf(a.sinks[t.head] - lse[i]) * args.sinks[t.head];  // P of the sink times its tangent
      args.lse[row + i] = mu;
      float* const own = out + i * width;
      if (fresh) memset(own, 0, static_cast<size_t>(width) * sizeof(float));
      with_type(a.dtype, [&](auto* type) {
        using T = decltype(type);
        const T from = reinterpret_cast<T>(row_at(a.out, a.dtype, t.batch, t.head, t.query + i));
        const T to = reinterpret_cast<T>(row_at(args.out, a.dtype, t.batch, t.head, t.query + i));
        const VecF factor = broadcast(-mu);
        for (int64_t c = 0; c < a.value_depth; c += kWidth) {
          const int64_t some = a.value_depth - c;
          store_upto(to + c, fma(factor, load_upto(from + c, some), load_float(own + c)), some);
        }
      });
    }
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
