// The calls of attention that a model (attention_model.h) makes.
#pragma once

#include "attention_model.h"

// The largest error relative to the largest value, a rounding of the dtype allowed for.
inline void close(const char* isa, const AttentionCase& c, const char* what, const Array& found, const Doubles& exact,
                  genfast::DType dtype) {
  double largest = 1e-3, error = 0;
  for (double x : exact) largest = std::fmax(largest, std::isinf(x) ? 0 : std::fabs(x));
  for (int64_t i = 0; i < found.size(); ++i) {
    const double x = exact[static_cast<size_t>(i)], y = found.get(i);
    error = std::fmax(error, x == y ? 0 : std::isfinite(y) && std::isfinite(x) ? std::fabs(x - y) : INFINITY);
  }
  const double bound = dtype == genfast::DType::kFloat32 ? 1e-5 : 4 * rounding_of(dtype);
  CHECK(error <= bound * largest, "%s %s %s: error %.2e of %.2e", isa, c.name, what, error, largest);
  CHECK(found.guards_hold(), "%s %s %s: guards", isa, c.name, what);
}

inline const float* floats(Array& x) { return static_cast<const float*>(x.data()); }
inline float* floats_out(Array& x) { return static_cast<float*>(x.data()); }

struct Found {
  Array out, lse, out_t, lse_t;
};

inline Found forward(AttentionModel& m, int threads) {
  Found f = {Array(m.c.dtype, m.dout.size()), Array(genfast::DType::kFloat32, m.dlse.size()),
             Array(m.c.dtype, m.dout.size()), Array(genfast::DType::kFloat32, m.dlse.size())};
  genfast::cpu::attention_forward({m.args(f.out, nullptr), floats_out(f.lse)}, threads);
  genfast::cpu::attention_tangent(m.tangent(m.args(f.out, floats(f.lse)), f.out_t, floats_out(f.lse_t)), threads);
  return f;
}

struct Gradients {
  Array dq, dk, dv, dbias, dtable;
};

inline Gradients gradients(AttentionModel& m, Found& f, bool second, int threads) {
  const AttentionCase& c = m.c;
  const int64_t splits = genfast::cpu::attention_splits(c.batch, c.kv_heads, c.queries, c.keys);
  genfast::BiasGradient kind = genfast::BiasGradient::kNone;
  Array raw(genfast::DType::kFloat32, 0);
  if (c.bias) {
    const bool matrix = c.bias_own[2] && c.bias_own[3];
    kind = matrix
               ? (c.bias_own[0] && c.bias_own[1] ? genfast::BiasGradient::kElements : genfast::BiasGradient::kReduced)
           : c.bias_own[3] ? genfast::BiasGradient::kColumns
                           : genfast::BiasGradient::kRows;
    const int64_t matrices = c.batch * c.heads;
    raw = matrix ? Array(c.dtype, m.bias_size())
                 : Array(genfast::DType::kFloat32,
                         matrices * (kind == genfast::BiasGradient::kColumns ? c.keys : splits * c.queries));
  }
  Gradients g = {Array(c.dtype, m.q.size()), Array(c.dtype, m.k.size()), Array(c.dtype, m.v.size()), Array(c.dtype, 0),
                 Array(genfast::DType::kFloat32, 0)};
  Array partial(genfast::DType::kFloat32, splits > 1 ? splits * m.q.size() : 0);
  Array table(genfast::DType::kFloat32, c.table ? splits * c.batch * c.heads * m.length : 0);
  genfast::AttentionGradient args = {};
  args.a = m.args(f.out, floats(f.lse));
  args.dout = AttentionModel::rows(m.dout, c.heads, c.queries, c.value_depth);
  args.dlse = floats(m.dlse);
  args.dq = AttentionModel::rows(g.dq, c.heads, c.queries, c.depth);
  args.dk = AttentionModel::rows(g.dk, c.kv_heads, c.keys, c.depth);
  args.dv = AttentionModel::rows(g.dv, c.kv_heads, c.keys, c.value_depth);
  args.bias_gradient = kind;
  args.dbias = c.bias ? raw.data() : nullptr;
  args.bias_batch = c.bias_own[0] ? c.batch : 1;
  args.bias_heads = c.bias_own[1] ? c.heads : 1;
  args.dtable = c.table ? floats_out(table) : nullptr;
  args.dq_partial = floats_out(partial);
  args.splits = splits;
  args.second = second;
  args.t = m.tangent(args.a, f.out_t, floats_out(f.lse_t));
  genfast::cpu::attention_gradient(args, threads);
  CHECK(partial.guards_hold() && table.guards_hold() && raw.guards_hold(), "%s", c.name);

  // The sums over broadcast dimensions that the caller makes.
  Doubles bias(static_cast<size_t>(c.bias ? m.bias_size() : 0));
  if (kind == genfast::BiasGradient::kElements || kind == genfast::BiasGradient::kReduced) {
    g.dbias = raw;
  } else if (c.bias) {
    for (int64_t x = 0; x < raw.size(); ++x) {
      const bool columns = kind == genfast::BiasGradient::kColumns;
      const int64_t width = columns ? c.keys : c.queries, matrix = x / width % (c.batch * c.heads), at = x % width;
      const int64_t to = m.bias_at(matrix / c.heads, matrix % c.heads, columns ? 0 : at, columns ? at : 0);
      bias[static_cast<size_t>(to)] += raw.get(x);
    }
    g.dbias = Array(c.dtype, bias);
  }
  Doubles sums(static_cast<size_t>(c.table ? c.heads * m.length : 0));
  for (int64_t x = 0; x < table.size(); ++x) sums[static_cast<size_t>(x % (c.heads * m.length))] += table.get(x);
  g.dtable = Array(genfast::DType::kFloat32, sums);
  return g;
}
