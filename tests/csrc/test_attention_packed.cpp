// Attention over packed sequences, and over caches of keys in one piece and in pages, against dense calls.
#include <numeric>

#include "attention/attention.h"
#include "isas.h"
#include "storage.h"

using genfast::DType;

namespace {

std::mt19937 generator{11};

Array draw(DType dtype, int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<double> values;
  for (int64_t i = 0; i < size; ++i) values.push_back(normal(generator));
  return {dtype, values};
}

struct Numbers {
  DType dtype;
  genfast::Choice pairs;
};
constexpr Numbers kNumbers[] = {{DType::kFloat32, genfast::Choice::kAuto},
                                {DType::kBFloat16, genfast::Choice::kOff},
                                {DType::kBFloat16, genfast::Choice::kOn}};

constexpr int64_t kHeads = 4, kKvHeads = 2, kDepth = 24, kValueDepth = 16;

genfast::Rows rows(Array& x, DType dtype, int64_t count, int64_t width, int64_t first = 0, int64_t batch = 0) {
  return {static_cast<char*>(x.data()) + first * width * genfast::bytes_of(dtype), batch, count * width, width};
}

genfast::Attention options(DType dtype, float dropout) {
  genfast::Attention a = {};
  a.dtype = dtype;
  a.batch = 1;
  a.heads = kHeads;
  a.kv_heads = kKvHeads;
  a.depth = kDepth;
  a.value_depth = kValueDepth;
  a.scale = 0.2f;
  a.left = a.right = -1;
  a.seed = 9;
  a.dropout_threshold = static_cast<uint32_t>(dropout * 65536);
  a.dropout_factor = 1.0f / (1.0f - dropout);
  return a;
}

// Everything one call reads and writes: [heads, rows, width] of all sequences together.
struct Packed {
  DType dtype;
  std::vector<int64_t> q_starts, k_starts;
  int64_t queries = q_starts.back(), keys = k_starts.back();
  Array q = draw(dtype, kHeads * queries * kDepth), q_t = draw(dtype, q.size());
  Array k = draw(dtype, kKvHeads * keys * kDepth), k_t = draw(dtype, k.size());
  Array v = draw(dtype, kKvHeads * keys * kValueDepth), v_t = draw(dtype, v.size());
  Array dout = draw(dtype, kHeads * queries * kValueDepth), dlse = draw(DType::kFloat32, kHeads* queries);
  Array out{dtype, dout.size()}, lse{DType::kFloat32, dlse.size()};
  Array out_t{dtype, dout.size()}, lse_t{DType::kFloat32, dlse.size()};
  Array dq{dtype, q.size()}, dk{dtype, k.size()}, dv{dtype, v.size()}, partial{DType::kFloat32, 4 * q.size()};
};

float* floats(Array& x, int64_t first = 0) { return static_cast<float*>(x.data()) + first; }

// A call on rows [q, q + queries) and [k, k + keys) of what a Packed holds.
void run(Packed& p, genfast::Attention a, int64_t q, int64_t queries, int64_t k, int64_t keys, int64_t splits,
         int threads) {
  a.queries = queries;
  a.keys = keys;
  a.q = rows(p.q, p.dtype, p.queries, kDepth, q);
  a.k = rows(p.k, p.dtype, p.keys, kDepth, k);
  a.v = rows(p.v, p.dtype, p.keys, kValueDepth, k);
  a.out = rows(p.out, p.dtype, p.queries, kValueDepth, q);
  a.lse = floats(p.lse);
  genfast::cpu::attention_forward({a, floats(p.lse)}, threads);
  genfast::AttentionTangent t = {};
  t.a = a;
  t.q = rows(p.q_t, p.dtype, p.queries, kDepth, q);
  t.k = rows(p.k_t, p.dtype, p.keys, kDepth, k);
  t.v = rows(p.v_t, p.dtype, p.keys, kValueDepth, k);
  t.out = rows(p.out_t, p.dtype, p.queries, kValueDepth, q);
  t.lse = floats(p.lse_t);
  genfast::cpu::attention_tangent(t, threads);
  genfast::AttentionGradient g = {};
  g.a = a;
  g.dout = rows(p.dout, p.dtype, p.queries, kValueDepth, q);
  g.dlse = floats(p.dlse);
  g.dq = rows(p.dq, p.dtype, p.queries, kDepth, q);
  g.dk = rows(p.dk, p.dtype, p.keys, kDepth, k);
  g.dv = rows(p.dv, p.dtype, p.keys, kValueDepth, k);
  g.dq_partial = floats(p.partial);
  g.splits = splits;
  g.second = true;
  g.t = t;
  genfast::cpu::attention_gradient(g, threads);
}

// The statistics of one sequence are [heads, queries] in a dense call: the columns of a packed one.
void same_statistics(const char* isa, Array& packed, const Packed& p, Array& own, int64_t q, int64_t queries) {
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t i = 0; i < queries; ++i) {
      const double x = packed.get(h * p.queries + q + i), y = own.get(h * queries + i);
      CHECK(x == y, "%s: statistic of head %lld row %lld: %g, alone %g", isa, static_cast<long long>(h),
            static_cast<long long>(i), x, y);
    }
  }
}

}  // namespace

TEST(attention_of_packed_sequences_is_that_of_each) {
  const std::vector<int64_t> q_starts = {0, 70, 70, 71, 90, 97, 130}, k_starts = {0, 40, 60, 160, 160, 260, 1400};
  for (const auto& [dtype, pairs] : kNumbers) {
    genfast::set_bfloat16_pairs(pairs);
    for (int causal = 0; causal < 2; ++causal) {
      for_each_isa([&](const genfast::Probe&, const char* isa) {
        genfast::Attention a = options(dtype, causal ? 0.3f : 0.0f);
        if (causal) a.right = 0;
        a.softcap = causal ? 3.0f : 0.0f;
        Packed p = {dtype, q_starts, k_starts};
        genfast::Attention whole = a;
        whole.batch = static_cast<int64_t>(q_starts.size()) - 1;
        whole.q_starts = q_starts.data();
        whole.k_starts = k_starts.data();
        whole.bottom_right = true;
        run(p, whole, 0, p.queries, 0, p.keys, 4, 2);
        Packed one = p;
        for (Array* x : {&one.out, &one.out_t, &one.dq, &one.dk, &one.dv}) *x = Array(dtype, x->size());
        for (int64_t n = 0; n < whole.batch; ++n) {
          const auto i = static_cast<size_t>(n);
          const int64_t q = q_starts[i], queries = q_starts[i + 1] - q, k = k_starts[i], keys = k_starts[i + 1] - k;
          genfast::Attention alone = a;
          alone.shift = keys - queries;
          alone.batch_offset = n;
          for (int64_t h = 0; h < kHeads; ++h) {
            for (int64_t r = 0; r < queries; ++r)
              floats(one.dlse)[h * queries + r] = floats(p.dlse)[h * p.queries + q + r];
          }
          run(one, alone, q, queries, k, keys, genfast::cpu::attention_splits(1, kKvHeads, queries, keys), 1);
          same_statistics(isa, p.lse, p, one.lse, q, queries);
          same_statistics(isa, p.lse_t, p, one.lse_t, q, queries);
        }
        CHECK(p.out == one.out && p.out_t == one.out_t, "%s: values", isa);
        CHECK(p.dq == one.dq, "%s: dq", isa);
        CHECK(p.dk == one.dk && p.dv == one.dv, "%s: dk, dv", isa);
        CHECK(p.partial.guards_hold() && p.lse.guards_hold() && p.lse_t.guards_hold(), "%s: guards", isa);
      });
    }
  }
  genfast::set_bfloat16_pairs(genfast::Choice::kAuto);
}

TEST(attention_decode_is_attention_over_the_cache) {
  constexpr int64_t kBatch = 3, kCapacity = 1600, kPage = 32, kPages = kBatch * kCapacity / kPage;
  const std::vector<int64_t> lengths = {1600, 0, 700};
  std::vector<int32_t> blocks(kPages);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), generator);
  for (const auto& [dtype, pairs] : kNumbers) {
    genfast::set_bfloat16_pairs(pairs);
    for (int64_t queries : {1, 3, 20}) {
      for (int64_t left : {-1, 50}) {
        Array q = draw(dtype, kBatch * kHeads * queries * kDepth), sinks = draw(DType::kFloat32, kHeads);
        Array k = draw(dtype, kBatch * kKvHeads * kCapacity * kDepth);
        Array v = draw(dtype, kBatch * kKvHeads * kCapacity * kValueDepth);
        // The same rows in pages, appended in two pieces.
        Array paged_k(dtype, k.size()), paged_v(dtype, v.size());
        const std::vector<int64_t> none(kBatch, 0), some(kBatch, 100);
        for (int64_t piece = 0; piece < 2; ++piece) {
          const int64_t first = piece == 0 ? 0 : 100, count = piece == 0 ? 100 : kCapacity - 100;
          const auto append = [&](Array& from, Array& to, int64_t width) {
            genfast::Rows source = rows(from, dtype, kCapacity, width, first, kKvHeads * kCapacity * width);
            genfast::Rows cache = rows(to, dtype, kPage, width, 0, kKvHeads * kPage * width);
            genfast::cpu::attention_append({dtype, source, cache, kBatch, kKvHeads, count, width,
                                            piece == 0 ? none.data() : some.data(), blocks.data(), kCapacity / kPage,
                                            kPage});
          };
          append(k, paged_k, kDepth);
          append(v, paged_v, kValueDepth);
        }
        for_each_isa([&](const genfast::Probe&, const char* isa) {
          const int64_t size = kBatch * kHeads * queries;
          const auto decode = [&](bool paged, int64_t splits, int threads, Array& out, Array& lse) {
            genfast::Attention a = options(dtype, 0.0f);
            a.batch = kBatch;
            a.queries = queries;
            a.keys = kCapacity;
            a.left = left;
            a.right = 0;
            a.sinks = floats(sinks);
            a.q = rows(q, dtype, queries, kDepth, 0, kHeads * queries * kDepth);
            a.out = rows(out, dtype, queries, kValueDepth, 0, kHeads * queries * kValueDepth);
            const int64_t length = paged ? kPage : kCapacity;
            a.k = rows(paged ? paged_k : k, dtype, length, kDepth, 0, kKvHeads * length * kDepth);
            a.v = rows(paged ? paged_v : v, dtype, length, kValueDepth, 0, kKvHeads * length * kValueDepth);
            Array partial(DType::kFloat32, splits * size * (kValueDepth + 1));
            genfast::cpu::attention_decode({a, floats(lse), lengths.data(), paged ? blocks.data() : nullptr,
                                            kCapacity / kPage, kPage, splits, floats(partial)},
                                           threads);
            CHECK(partial.guards_hold() && out.guards_hold() && lse.guards_hold(), "%s: guards", isa);
          };
          Array out(dtype, size * kValueDepth), lse(DType::kFloat32, size);
          for (int64_t b = 0; b < kBatch; ++b) {  // attention over the rows of the cache that are in use
            const int64_t length = lengths[static_cast<size_t>(b)];
            genfast::Attention a = options(dtype, 0.0f);
            a.queries = queries;
            a.keys = length;
            a.left = left;
            a.right = 0;
            a.shift = length - queries;
            a.sinks = floats(sinks);
            a.q = rows(q, dtype, queries, kDepth, b * kHeads * queries);
            a.k = rows(k, dtype, kCapacity, kDepth, b * kKvHeads * kCapacity);
            a.v = rows(v, dtype, kCapacity, kValueDepth, b * kKvHeads * kCapacity);
            a.out = rows(out, dtype, queries, kValueDepth, b * kHeads * queries);
            genfast::cpu::attention_forward({a, floats(lse, b * kHeads * queries)}, 1);
          }
          for (int paged = 0; paged < 2; ++paged) {
            for (int64_t splits : {1, 3}) {
              Array found(dtype, out.size()), found_lse(DType::kFloat32, size);
              Array twice(dtype, out.size()), twice_lse(DType::kFloat32, size);
              decode(paged == 1, splits, 1, found, found_lse);
              decode(paged == 1, splits, 2, twice, twice_lse);
              CHECK(found == twice && found_lse == twice_lse, "%s: threads", isa);
              const double bound = dtype == DType::kFloat32 ? 4e-6 : 2.0 / 128;
              for (int64_t i = 0; i < out.size(); ++i) {
                const double x = out.get(i), y = found.get(i);
                CHECK(std::fabs(x - y) <= bound, "%s paged %d splits %lld queries %lld window %lld: %g, not %g", isa,
                      paged, static_cast<long long>(splits), static_cast<long long>(queries),
                      static_cast<long long>(left), y, x);
              }
              for (int64_t i = 0; i < size; ++i) {
                const double x = lse.get(i), y = found_lse.get(i);
                CHECK(x == y || std::fabs(x - y) <= 1e-5, "%s: lse %g, not %g", isa, y, x);
              }
            }
          }
        });
      }
    }
  }
  genfast::set_bfloat16_pairs(genfast::Choice::kAuto);
}
