// Attention's bfloat16 products (pairs, or AMX tiles) over head dimensions, lengths and options: errors beside those of
// the plain formula in bfloat16, with NaN in all memory that the kernels work in.
#include "attention_calls.h"
#include "common/memory.h"
#include "isas.h"

using genfast::Choice;
using genfast::DType;

namespace {

// Fills the memory that the next call will work in with NaN, of float32 and of bfloat16.
void poison() {
  constexpr int64_t kFloats = 1 << 21;
  genfast::Workspace workspace(kFloats);
  std::memset(workspace.take(kFloats), 0xFF, kFloats * sizeof(float));
}

// The formula with a matrix of scores, each step rounded to bfloat16 as PyTorch's are.
struct Plain {
  Doubles out, dq, dk, dv, dbias;

  explicit Plain(AttentionModel& m) {
    const AttentionCase& c = m.c;
    const auto zeros = [](int64_t n) { return Doubles(static_cast<size_t>(n)); };
    out = zeros(m.dout.size());
    dq = zeros(m.q.size());
    dk = zeros(m.k.size());
    dv = zeros(m.v.size());
    dbias = zeros(m.bias_size());
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads; ++h) head(m, b, h);
    }
    for (Doubles* sums : {&dk, &dv, &dbias}) {
      for (double& x : *sums) x = bfloat16_rounded(x);
    }
  }

 private:
  void head(AttentionModel& m, int64_t b, int64_t h) {
    const AttentionCase& c = m.c;
    const int64_t kv = b * c.kv_heads + h / (c.heads / c.kv_heads), first = (b * c.heads + h) * c.queries;
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    const auto round = bfloat16_rounded;
    const auto dot = [](const Array& x, int64_t x_row, const Array& y, int64_t y_row, int64_t width) {
      double total = 0;
      for (int64_t d = 0; d < width; ++d) total += x.get(x_row * width + d) * y.get(y_row * width + d);
      return total;
    };
    Doubles own_dk(size(c.keys * c.depth)), own_dv(size(c.keys * c.value_depth));
    for (int64_t i = 0; i < c.queries; ++i) {
      Doubles p(size(c.keys)), dropped(size(c.keys)), g(size(c.keys)), factor(size(c.keys));
      double top = -INFINITY, sum = 0, mean = 0;
      for (int64_t j = 0; j < c.keys; ++j) {
        double x = round(round(dot(m.q, first + i, m.k, kv * c.keys + j, c.depth)) * m.scale());
        if (c.bias) x = round(x + m.bias.get(m.bias_at(b, h, i, j)));
        p[size(j)] = m.visible(b, i, j) ? x : -INFINITY;
        top = std::fmax(top, p[size(j)]);
      }
      for (double& x : p) sum += x = std::isinf(x) ? 0 : std::exp(x - top);
      for (int64_t j = 0; j < c.keys; ++j) {
        p[size(j)] = sum == 0 ? 0 : round(p[size(j)] / sum);
        factor[size(j)] = round(m.factor(b, h, i, j));
        dropped[size(j)] = round(p[size(j)] * factor[size(j)]);
        const double dp = dot(m.dout, first + i, m.v, kv * c.keys + j, c.value_depth);
        g[size(j)] = round(round(dp) * factor[size(j)]);
        mean += g[size(j)] * p[size(j)];
      }
      for (int64_t j = 0; j < c.keys; ++j) {
        const double to_lse = round(p[size(j)] * m.dlse.get(first + i));
        const double ds = round(round(p[size(j)] * (g[size(j)] - mean)) + to_lse), scaled = round(ds * m.scale());
        dbias[size(m.bias_at(b, h, i, j))] += ds;
        for (int64_t d = 0; d < c.depth; ++d) {
          dq[size((first + i) * c.depth + d)] += scaled * m.k.get((kv * c.keys + j) * c.depth + d);
          own_dk[size(j * c.depth + d)] += scaled * m.q.get((first + i) * c.depth + d);
        }
        for (int64_t d = 0; d < c.value_depth; ++d) {
          out[size((first + i) * c.value_depth + d)] +=
              dropped[size(j)] * m.v.get((kv * c.keys + j) * c.value_depth + d);
          own_dv[size(j * c.value_depth + d)] += dropped[size(j)] * m.dout.get((first + i) * c.value_depth + d);
        }
      }
    }
    for (int64_t x = 0; x < c.queries * c.depth; ++x) {
      double& own = dq[size(first * c.depth + x)];
      own = round(own);
    }
    for (int64_t x = 0; x < c.queries * c.value_depth; ++x) {
      double& own = out[size(first * c.value_depth + x)];
      own = round(own);
    }
    for (int64_t x = 0; x < c.keys * c.depth; ++x) dk[size(kv * c.keys * c.depth + x)] += round(own_dk[size(x)]);
    for (int64_t x = 0; x < c.keys * c.value_depth; ++x) {
      dv[size(kv * c.keys * c.value_depth + x)] += round(own_dv[size(x)]);
    }
  }
};

double largest_of(const Doubles& exact) {
  double largest = 0.1;
  for (double x : exact) largest = std::fmax(largest, std::fabs(x));
  return largest;
}

// At most `factor` times the error of the plain formula, or of a rounding.
void as_exact_as(double factor, const char* isa, const AttentionCase& c, const char* what, const Array& found,
                 const Doubles& plain, const Doubles& exact) {
  double error = 0, plain_error = rounding_of(c.dtype) * largest_of(exact);
  for (int64_t i = 0; i < found.size(); ++i) {
    const double x = exact[static_cast<size_t>(i)], y = found.get(i);
    error = std::fmax(error, std::isfinite(y) ? std::fabs(y - x) : INFINITY);
    plain_error = std::fmax(plain_error, std::fabs(plain[static_cast<size_t>(i)] - x));
  }
  CHECK(error <= factor * plain_error, "%s %s, depths %lld and %lld: %s is off by %.2e, the plain formula by %.2e", isa,
        c.name, static_cast<long long>(c.depth), static_cast<long long>(c.value_depth), what, error, plain_error);
  CHECK(found.guards_hold(), "%s %s %s: guards", isa, c.name, what);
}

void compare(AttentionModel& m, const AttentionTruth& truth, const Plain& plain, const char* isa) {
  const AttentionCase& c = m.c;
  const auto run = [&](int threads) {
    poison();
    Array out(c.dtype, m.dout.size()), lse(DType::kFloat32, m.dlse.size());
    genfast::cpu::attention_forward({m.args(out, nullptr), floats_out(lse)}, threads);
    return Found{out, lse, Array(c.dtype, 0), Array(DType::kFloat32, 0)};
  };
  const auto pull = [&](Found& f, int threads) {
    poison();
    return gradients(m, f, false, threads);
  };
  Found f = run(1);
  const Found again = run(3);
  const Gradients g = pull(f, 1), twice = pull(f, 3);
  CHECK(f.out == again.out && f.lse == again.lse && g.dq == twice.dq && g.dk == twice.dk && g.dv == twice.dv &&
            g.dbias == twice.dbias,
        "%s %s: threads", isa, c.name);
  as_exact_as(2, isa, c, "out", f.out, plain.out, truth.out);
  close(isa, c, "lse", f.lse, truth.lse, DType::kFloat32);
  as_exact_as(3, isa, c, "dq", g.dq, plain.dq, truth.dq[0]);
  as_exact_as(3, isa, c, "dk", g.dk, plain.dk, truth.dk[0]);
  as_exact_as(3, isa, c, "dv", g.dv, plain.dv, truth.dv[0]);
  if (c.bias) as_exact_as(3, isa, c, "dbias", g.dbias, plain.dbias, truth.dbias[0]);

  // Products of bfloat16 are what ran, where there are any: of whole pairs.
  genfast::set_bfloat16_pairs(Choice::kOff);
  const Found widened = run(1);
  genfast::set_bfloat16_pairs(Choice::kOn);
  const bool in_pairs = c.depth % 2 == 0 && c.value_depth % 2 == 0 && genfast::use_bfloat16_pairs();
  CHECK((widened.out == f.out) == !in_pairs, "%s %s, depth %lld: %s", isa, c.name, static_cast<long long>(c.depth),
        in_pairs ? "products of float32" : "products of bfloat16");
}

AttentionCase shape(const char* name, int64_t queries, int64_t keys) {
  AttentionCase c = {};
  c.name = name;
  c.dtype = DType::kBFloat16;
  c.batch = 1;
  c.heads = c.kv_heads = 2;
  c.queries = queries;
  c.keys = keys;
  c.left = c.right = -1;
  return c;
}

std::vector<AttentionCase> options() {
  AttentionCase plain = shape("plain", 70, 101);
  AttentionCase causal = shape("causal, grouped heads", 75, 75);
  causal.heads = 4;
  causal.right = 0;
  AttentionCase later = shape("causal, fewer queries", 45, 107);
  later.right = 0;
  AttentionCase biased = shape("bias, dropout", 33, 65);
  biased.bias = biased.bias_own[1] = biased.bias_own[2] = biased.bias_own[3] = true;
  biased.dropout = 0.25f;
  AttentionCase window = shape("window, mask, bias of keys, dropout", 67, 99);
  window.bias = window.bias_own[0] = window.bias_own[3] = window.mask = true;
  window.dropout = 0.1f;
  window.kv_heads = 1;
  window.left = 30;
  window.right = 9;
  return {plain, causal, later, biased, window, shape("short", 9, 5), shape("one tile", 16, 32)};
}

}  // namespace

TEST(attention_in_bfloat16_is_as_exact_as_the_plain_formula) {
  const int64_t depths[][2] = {{8, 80}, {21, 203}, {32, 8}, {64, 64}, {80, 32}, {128, 64}, {64, 128}, {203, 21}};
  genfast::set_bfloat16_pairs(Choice::kOn);
  for (const auto& depth : depths) {
    for (AttentionCase c : options()) {
      c.depth = depth[0];
      c.value_depth = depth[1];
      AttentionModel m(c);
      const AttentionTruth truth(m);
      const Plain plain(m);
      for_each_isa([&](const genfast::Probe&, const char* isa) { compare(m, truth, plain, isa); });
    }
  }
  genfast::set_bfloat16_pairs(Choice::kAuto);
}
