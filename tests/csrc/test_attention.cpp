// Attention, its tangents and its gradients of both orders against plain double loops.
#include "attention_calls.h"
#include "isas.h"

using genfast::BiasGradient;
using genfast::DType;

namespace {

constexpr float kNone = 0.0f;

std::vector<AttentionCase> cases() {
  const DType f32 = DType::kFloat32;
  return {
      {"plain", f32, 2, 2, 2, 70, 101, 16, 24, {}, false, false, false, false, false, kNone, kNone, -1, -1},
      {"causal", f32, 1, 4, 2, 75, 100, 21, 8, {}, false, false, false, false, false, kNone, kNone, -1, 0},
      {"window", f32, 1, 2, 1, 100, 130, 8, 40, {}, false, false, false, false, false, kNone, kNone, 20, 9},
      {"splits", f32, 1, 1, 1, 20, 1100, 8, 8, {}, false, true, false, false, false, kNone, kNone, -1, 0},
      {"own bias",
       f32,
       1,
       2,
       2,
       40,
       50,
       8,
       8,
       {true, true, true, true},
       true,
       false,
       false,
       true,
       false,
       3.0f,
       kNone,
       -1,
       0},
      {"shared bias",
       f32,
       2,
       2,
       1,
       40,
       50,
       8,
       8,
       {false, true, true, true},
       true,
       false,
       false,
       true,
       true,
       kNone,
       kNone,
       -1,
       0},
      {"bias of keys",
       f32,
       2,
       2,
       1,
       40,
       50,
       8,
       8,
       {true, false, false, true},
       true,
       false,
       false,
       false,
       false,
       kNone,
       0.25f,
       -1,
       -1},
      {"bias of queries",
       f32,
       2,
       2,
       1,
       40,
       50,
       8,
       8,
       {true, true, true, false},
       true,
       false,
       false,
       true,
       false,
       2.0f,
       0.25f,
       -1,
       -1},
      {"index", f32, 1, 3, 3, 33, 27, 8, 8, {}, false, true, true, false, true, kNone, kNone, -1, -1},
      {"few", f32, 2, 8, 2, 3, 120, 40, 16, {}, false, true, false, true, true, kNone, kNone, -1, 0},
      {"one query",
       f32,
       2,
       8,
       2,
       1,
       120,
       40,
       24,
       {true, true, true, true},
       true,
       false,
       false,
       false,
       true,
       kNone,
       kNone,
       90,
       0},
      {"bfloat16",
       DType::kBFloat16,
       1,
       2,
       1,
       20,
       40,
       16,
       16,
       {true, true, true, true},
       true,
       false,
       false,
       false,
       false,
       kNone,
       kNone,
       -1,
       0},
      {"bfloat16 tiles",
       DType::kBFloat16,
       1,
       4,
       2,
       75,
       101,
       24,
       40,
       {},
       false,
       true,
       false,
       false,
       false,
       kNone,
       kNone,
       -1,
       0},
      {"bfloat16 window",
       DType::kBFloat16,
       2,
       2,
       2,
       99,
       131,
       64,
       32,
       {true, true, true, true},
       true,
       false,
       false,
       true,
       true,
       3.0f,
       0.25f,
       30,
       9},
      {"bfloat16 splits",
       DType::kBFloat16,
       1,
       1,
       1,
       21,
       1101,
       16,
       18,
       {},
       false,
       false,
       false,
       false,
       false,
       kNone,
       kNone,
       -1,
       -1},
      {"float16", DType::kFloat16, 1, 2, 1, 2, 40, 16, 16, {}, false, false, false, false, false, kNone, kNone, -1, -1},
      {"one of each", f32, 1, 1, 1, 1, 1, 1, 1, {}, false, false, false, false, false, kNone, kNone, -1, -1},
  };
}

}  // namespace

// Of one instruction set, with or without products in pairs.
void compare(AttentionModel& m, const AttentionTruth& truth, const char* isa) {
  const AttentionCase& c = m.c;
  Found f = forward(m, 1);
  const Found again = forward(m, 3);
  CHECK(f.out == again.out && f.lse == again.lse && f.out_t == again.out_t && f.lse_t == again.lse_t, "%s %s: threads",
        isa, c.name);
  close(isa, c, "out", f.out, truth.out, c.dtype);
  close(isa, c, "lse", f.lse, truth.lse, DType::kFloat32);
  close(isa, c, "out'", f.out_t, truth.out_t, c.dtype);
  close(isa, c, "lse'", f.lse_t, truth.lse_t, DType::kFloat32);
  for (int order = 0; order < 2; ++order) {
    const Gradients g = gradients(m, f, order == 1, 1), twice = gradients(m, f, order == 1, 3);
    CHECK(
        g.dq == twice.dq && g.dk == twice.dk && g.dv == twice.dv && g.dbias == twice.dbias && g.dtable == twice.dtable,
        "%s %s: threads", isa, c.name);
    close(isa, c, order == 0 ? "dq" : "gq", g.dq, truth.dq[order], c.dtype);
    close(isa, c, order == 0 ? "dk" : "gk", g.dk, truth.dk[order], c.dtype);
    close(isa, c, order == 0 ? "dv" : "gv", g.dv, truth.dv[order], c.dtype);
    if (c.bias) close(isa, c, order == 0 ? "dbias" : "gbias", g.dbias, truth.dbias[order], c.dtype);
    if (c.table) close(isa, c, order == 0 ? "dtable" : "gtable", g.dtable, truth.dtable[order], c.dtype);
  }
}

TEST(attention_values_and_derivatives) {
  using genfast::Choice;
  for (const AttentionCase& c : cases()) {
    AttentionModel m(c);
    const AttentionTruth truth(m);
    for_each_isa([&](const genfast::Probe&, const char* isa) {
      genfast::set_bfloat16_pairs(Choice::kOff);
      compare(m, truth, isa);
      if (c.dtype != DType::kBFloat16) return;
      const Found apart = forward(m, 1);
      genfast::set_bfloat16_pairs(Choice::kOn);
      if (!genfast::use_bfloat16_pairs()) return;  // AVX-512 without the instruction
      compare(m, truth, isa);
      const Found paired = forward(m, 1);
      CHECK(!(paired.out == apart.out && paired.lse == apart.lse), "%s %s: pairs were not used", isa, c.name);
    });
  }
  genfast::set_bfloat16_pairs(Choice::kAuto);
}

TEST(attention_without_elements) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    AttentionCase c = cases()[0];
    c.keys = 0;
    AttentionModel m(c);
    Found f = forward(m, 2);
    for (int64_t i = 0; i < f.out.size(); ++i) CHECK(f.out.get(i) == 0.0, "%s", isa);
    for (int64_t i = 0; i < f.lse.size(); ++i) CHECK(f.lse.get(i) == -INFINITY, "%s", isa);
    const Gradients g = gradients(m, f, false, 2);
    for (int64_t i = 0; i < g.dq.size(); ++i) CHECK(g.dq.get(i) == 0.0, "%s", isa);
    c = cases()[0];
    c.queries = 0;
    AttentionModel none(c);
    Found nothing = forward(none, 2);
    const Gradients h = gradients(none, nothing, true, 2);
    for (int64_t i = 0; i < h.dk.size(); ++i) CHECK(h.dk.get(i) == 0.0 && h.dv.get(i % h.dv.size()) == 0.0, "%s", isa);
  });
}
