// Attention and its derivatives by plain double loops; the formulas of docs/kernels/attention.md.
#pragma once

#include "attention/attention.h"
#include "common/philox.h"
#include "storage.h"

struct AttentionCase {
  const char* name;
  genfast::DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
  bool bias_own[4];  // dimensions of the bias that are not broadcast
  bool bias, table, indexed, sinks, mask;
  float softcap, dropout;
  int64_t left, right;
};

// The inputs of a case, their tangents and cotangents.
struct AttentionModel {
  explicit AttentionModel(const AttentionCase& c)
      : c(c),
        length(c.indexed ? 40 : c.queries + c.keys - 1),
        q(draw(c.dtype, c.batch * c.heads * c.queries * c.depth)),
        k(draw(c.dtype, c.batch * c.kv_heads * c.keys * c.depth)),
        v(draw(c.dtype, c.batch * c.kv_heads * c.keys * c.value_depth)),
        q_t(draw(c.dtype, q.size())),
        k_t(draw(c.dtype, k.size())),
        v_t(draw(c.dtype, v.size())),
        dout(draw(c.dtype, c.batch * c.heads * c.queries * c.value_depth)),
        bias(draw(c.dtype, bias_size())),
        bias_t(draw(c.dtype, bias_size())),
        table(draw(genfast::DType::kFloat32, c.heads * length)),
        table_t(draw(genfast::DType::kFloat32, c.heads * length)),
        sinks(draw(genfast::DType::kFloat32, c.heads)),
        sinks_t(draw(genfast::DType::kFloat32, c.heads)),
        dlse(draw(genfast::DType::kFloat32, c.batch * c.heads * c.queries)) {
    for (int64_t i = 0; i < c.queries; ++i) q_index.push_back(static_cast<int32_t>(20 + (7 * i) % 20));
    for (int64_t j = 0; j < c.keys; ++j) k_index.push_back(static_cast<int32_t>((5 * j) % 20));
    for (int64_t i = 0; i < c.batch * c.queries * c.keys; ++i) {
      mask.push_back(static_cast<uint8_t>((i % c.queries != 1 || c.sinks) && random() % 4 != 0));
    }
  }

  int64_t bias_stride(int dimension) const {
    const int64_t sizes[4] = {c.batch, c.heads, c.queries, c.keys};
    if (!c.bias_own[dimension]) return 0;
    int64_t stride = 1;
    for (int i = dimension + 1; i < 4; ++i) stride *= c.bias_own[i] ? sizes[i] : 1;
    return stride;
  }
  int64_t bias_size() const {
    const int64_t sizes[4] = {c.batch, c.heads, c.queries, c.keys};
    int64_t size = 1;
    for (int i = 0; i < 4; ++i) size *= c.bias_own[i] ? sizes[i] : 1;
    return size;
  }
  int64_t bias_at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * bias_stride(0) + h * bias_stride(1) + i * bias_stride(2) + j * bias_stride(3);
  }
  int64_t table_at(int64_t h, int64_t i, int64_t j) const {
    const int64_t entry =
        c.indexed ? q_index[static_cast<size_t>(i)] - k_index[static_cast<size_t>(j)] : i - j + c.keys - 1;
    return h * length + entry;
  }
  int64_t shift() const { return c.keys - c.queries; }
  uint32_t threshold() const { return static_cast<uint32_t>(std::lround(static_cast<double>(c.dropout) * 65536)); }
  double factor(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (c.dropout == 0.0f) return 1.0;
    const genfast::philox::Words words =
        genfast::philox::philox(static_cast<uint32_t>(j / 8), static_cast<uint32_t>(i),
                                static_cast<uint32_t>(b * c.heads + h), genfast::philox::kAttentionDropout, kSeed);
    const uint32_t word = words.w[j % 8 / 2], lane = j % 2 == 0 ? word & 0xFFFF : word >> 16;
    return lane >= threshold() ? 1.0 / (1.0 - static_cast<double>(c.dropout)) : 0.0;
  }
  bool visible(int64_t b, int64_t i, int64_t j) const {
    const int64_t distance = j - (i + shift());
    if (c.right >= 0 && distance > c.right) return false;
    if (c.left >= 0 && distance < -c.left) return false;
    return !c.mask || mask[static_cast<size_t>((b * c.queries + i) * c.keys + j)] != 0;
  }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(c.depth)); }

  static genfast::Rows rows(Array& x, int64_t heads, int64_t count, int64_t width) {
    return {x.data(), heads * count * width, count * width, width};
  }

  genfast::Attention args(Array& out, const float* lse) {
    genfast::Attention a = {};
    a.dtype = c.dtype;
    a.batch = c.batch;
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.queries = c.queries;
    a.keys = c.keys;
    a.depth = c.depth;
    a.value_depth = c.value_depth;
    a.q = rows(q, c.heads, c.queries, c.depth);
    a.k = rows(k, c.kv_heads, c.keys, c.depth);
    a.v = rows(v, c.kv_heads, c.keys, c.value_depth);
    a.out = rows(out, c.heads, c.queries, c.value_depth);
    a.lse = lse;
    a.bias = c.bias ? bias.data() : nullptr;
    for (int i = 0; i < 4; ++i) a.bias_stride[i] = bias_stride(i);
    a.table = c.table ? static_cast<const float*>(table.data()) : nullptr;
    a.table_head = length;
    a.table_length = length;
    a.q_index = c.indexed ? q_index.data() : nullptr;
    a.k_index = c.indexed ? k_index.data() : nullptr;
    a.mask = c.mask ? mask.data() : nullptr;
    a.mask_stride[0] = c.queries * c.keys;
    a.mask_stride[2] = c.keys;
    a.mask_stride[3] = 1;
    a.sinks = c.sinks ? static_cast<const float*>(sinks.data()) : nullptr;
    a.scale = static_cast<float>(scale());
    a.softcap = c.softcap;
    a.dropout_threshold = threshold();
    a.dropout_factor = 1.0f / (1.0f - c.dropout);
    a.seed = kSeed;
    a.left = c.left;
    a.right = c.right;
    a.shift = shift();
    return a;
  }

  genfast::AttentionTangent tangent(const genfast::Attention& a, Array& out_t, float* lse_t) {
    genfast::AttentionTangent t = {};
    t.a = a;
    t.q = rows(q_t, c.heads, c.queries, c.depth);
    t.k = rows(k_t, c.kv_heads, c.keys, c.depth);
    t.v = rows(v_t, c.kv_heads, c.keys, c.value_depth);
    t.bias = c.bias ? bias_t.data() : nullptr;
    for (int i = 0; i < 4; ++i) t.bias_stride[i] = bias_stride(i);
    t.table = c.table ? static_cast<const float*>(table_t.data()) : nullptr;
    t.sinks = c.sinks ? static_cast<const float*>(sinks_t.data()) : nullptr;
    t.out = rows(out_t, c.heads, c.queries, c.value_depth);
    t.lse = lse_t;
    return t;
  }

  static constexpr uint64_t kSeed = 0x8000000000000007ull;
  AttentionCase c;
  int64_t length;
  std::mt19937 random{5};
  Array q, k, v, q_t, k_t, v_t, dout, bias, bias_t, table, table_t, sinks, sinks_t, dlse;
  std::vector<int32_t> q_index, k_index;
  std::vector<uint8_t> mask;

 private:
  Array draw(genfast::DType dtype, int64_t size) {
    std::normal_distribution<double> normal;
    std::vector<double> values;
    for (int64_t i = 0; i < size; ++i) values.push_back(normal(random));
    return {dtype, values};
  }
};

using Doubles = std::vector<double>;

// Everything that the kernels compute, in float64 from the stored inputs.
struct AttentionTruth {
  Doubles out, lse, out_t, lse_t;
  Doubles dq[2], dk[2], dv[2], dbias[2], dtable[2];  // of first and second order

  explicit AttentionTruth(AttentionModel& m) {
    const AttentionCase& c = m.c;
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    out.resize(size(m.dout.size()));
    out_t = out;
    lse.resize(size(m.dlse.size()));
    lse_t = lse;
    for (int order = 0; order < 2; ++order) {
      dq[order].resize(size(m.q.size()));
      dk[order].resize(size(m.k.size()));
      dv[order].resize(size(m.v.size()));
      dbias[order].resize(size(m.bias_size()));
      dtable[order].resize(size(c.heads * m.length));
    }
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads; ++h) {
        for (int64_t i = 0; i < c.queries; ++i) row(m, b, h, i);
      }
    }
  }

 private:
  void row(AttentionModel& m, int64_t b, int64_t h, int64_t i) {
    const AttentionCase& c = m.c;
    const int64_t at = (b * c.heads + h) * c.queries + i, kv = b * c.kv_heads + h / (c.heads / c.kv_heads);
    const size_t keys = static_cast<size_t>(c.keys), own = static_cast<size_t>(at);
    const double s = m.scale(), cap = static_cast<double>(c.softcap);
    Doubles a(keys), z_t(keys), a_t(keys), tau(keys, 1.0), th(keys), p(keys), f(keys), g(keys), hh(keys);
    const auto dot = [&](const Array& x, int64_t x_row, const Array& y, int64_t y_row, int64_t width) {
      double total = 0;
      for (int64_t d = 0; d < width; ++d) total += x.get(x_row * width + d) * y.get(y_row * width + d);
      return total;
    };
    double sum = c.sinks ? std::exp(m.sinks.get(h)) : 0.0;
    for (size_t j = 0; j < keys; ++j) {
      const int64_t key = static_cast<int64_t>(j), y = kv * c.keys + key;
      a[j] = s * dot(m.q, at, m.k, y, c.depth);
      z_t[j] = s * (dot(m.q_t, at, m.k, y, c.depth) + dot(m.q, at, m.k_t, y, c.depth));
      if (cap != 0) {
        th[j] = std::tanh(a[j] / cap);
        a[j] = cap * th[j];
        tau[j] = 1 - th[j] * th[j];
      }
      a_t[j] = tau[j] * z_t[j];
      if (c.bias) {
        a[j] += m.bias.get(m.bias_at(b, h, i, key));
        a_t[j] += m.bias_t.get(m.bias_at(b, h, i, key));
      }
      if (c.table) {
        a[j] += m.table.get(m.table_at(h, i, key));
        a_t[j] += m.table_t.get(m.table_at(h, i, key));
      }
      if (!m.visible(b, i, key)) a[j] = -INFINITY;
      p[j] = std::exp(a[j]);
      sum += p[j];
      f[j] = m.factor(b, h, i, key);
      g[j] = f[j] * dot(m.dout, at, m.v, y, c.value_depth);
      hh[j] = f[j] * dot(m.dout, at, m.v_t, y, c.value_depth);
    }
    lse[own] = std::log(sum);
    double mu = c.sinks ? std::exp(m.sinks.get(h)) / sum * m.sinks_t.get(h) : 0.0;
    for (size_t j = 0; j < keys; ++j) {
      p[j] = sum == 0 ? 0 : p[j] / sum;
      mu += p[j] * a_t[j];
    }
    lse_t[own] = mu;
    double delta = 0, r = 0;
    for (int64_t d = 0; d < c.value_depth; ++d) {
      double o = 0, o_t = 0;
      for (size_t j = 0; j < keys; ++j) {
        const int64_t y = (kv * c.keys + static_cast<int64_t>(j)) * c.value_depth + d;
        o += f[j] * p[j] * m.v.get(y);
        o_t += f[j] * p[j] * ((a_t[j] - mu) * m.v.get(y) + m.v_t.get(y));
      }
      out[static_cast<size_t>(at * c.value_depth + d)] = o;
      out_t[static_cast<size_t>(at * c.value_depth + d)] = o_t;
      delta += o * m.dout.get(at * c.value_depth + d);
      r += o_t * m.dout.get(at * c.value_depth + d);
    }
    for (size_t j = 0; j < keys; ++j) {
      const int64_t key = static_cast<int64_t>(j), y = kv * c.keys + key;
      const double e = g[j] - delta + m.dlse.get(at), da = p[j] * e;
      const double w = p[j] * ((a_t[j] - mu) * e + hh[j] - r);
      const double gz = tau[j] * w - (cap == 0 ? 0 : da * z_t[j] * 2 * th[j] * tau[j] / cap);
      const double to_scores[2] = {da, w}, to_products[2] = {tau[j] * da, gz};
      const double to_value[2] = {f[j] * p[j], f[j] * p[j] * (a_t[j] - mu)};
      for (size_t order = 0; order < 2; ++order) {
        dbias[order][static_cast<size_t>(m.bias_at(b, h, i, key))] += to_scores[order];
        dtable[order][static_cast<size_t>(m.table_at(h, i, key))] += to_scores[order];
        for (int64_t d = 0; d < c.depth; ++d) {
          const int64_t qd = at * c.depth + d, kd = y * c.depth + d;
          dq[order][static_cast<size_t>(qd)] += s * to_products[order] * m.k.get(kd);
          dk[order][static_cast<size_t>(kd)] += s * to_products[order] * m.q.get(qd);
          if (order == 1) {
            dq[1][static_cast<size_t>(qd)] += s * tau[j] * da * m.k_t.get(kd);
            dk[1][static_cast<size_t>(kd)] += s * tau[j] * da * m.q_t.get(qd);
          }
        }
        for (int64_t d = 0; d < c.value_depth; ++d) {
          dv[order][static_cast<size_t>(y * c.value_depth + d)] += to_value[order] * m.dout.get(at * c.value_depth + d);
        }
      }
    }
  }
};
