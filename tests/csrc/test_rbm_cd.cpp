// Contrastive divergence against plain double loops: chains, gradients, statistics.
#include "isas.h"
#include "rbm/rbm_cd.h"
#include "rbm_model.h"

using genfast::DType;
using genfast::UnitKind;

namespace {

struct Inputs {
  std::vector<double> data, chains;  // chains: empty, or persistent ones
  int64_t rows, chain_count;
  std::vector<float> visible_offset, hidden_offset;
  int64_t k;
  bool sample_hidden = false;
};

struct Outputs {
  std::vector<double> dW, db, dc, moved, statistics, hidden_mean;
  std::vector<double> dW_size;  // sums of the magnitudes
  bool tie = false;
};

constexpr int64_t kOffset = 11, kStep = 4;

Outputs exact_cd(const RbmModel& model, const Inputs& in, uint64_t seed) {
  const size_t V = static_cast<size_t>(model.shape.visible), H = static_cast<size_t>(model.shape.hidden);
  const bool persistent = !in.chains.empty();
  Outputs out;
  out.dW.assign(V * H, 0.0);
  out.dW_size = out.dW;
  out.db.assign(V, 0.0);
  out.dc.assign(H, 0.0);
  out.hidden_mean = out.dc;
  out.moved = persistent ? in.chains : in.data;
  out.statistics = {0.0, 0.0};
  const auto add = [&](const double* v, int64_t rows, double sign, int64_t row, int64_t step) {
    const RbmDraw drawn =
        model.draw(v, true, 1.0, seed, static_cast<uint32_t>(kOffset + row), static_cast<uint32_t>(step));
    const std::vector<double>& h = in.sample_hidden ? drawn.state : drawn.mean;
    out.tie |= in.sample_hidden && drawn.tie;
    const double share = sign / static_cast<double>(rows);
    for (size_t i = 0; i < V; ++i) {
      const double scale = model.inverse_variance.empty() ? 1.0 : static_cast<double>(model.inverse_variance[i]);
      out.db[i] += share * scale * v[i];
      for (size_t j = 0; j < H; ++j) {
        out.dW[i * H + j] += share * scale * v[i] * h[j];
        out.dW_size[i * H + j] += std::fabs(share * scale * v[i] * h[j]);
      }
    }
    for (size_t j = 0; j < H; ++j) {
      out.dc[j] += share * h[j];
      if (sign < 0) out.hidden_mean[j] -= share * h[j];
    }
    out.statistics[1] -= share * model.free_energy(v);
  };
  for (int64_t r = 0; r < in.chain_count; ++r) {
    double* v = out.moved.data() + static_cast<size_t>(r) * V;
    const auto chain = static_cast<uint32_t>(kOffset + r);
    for (int64_t t = 0; t < in.k; ++t) {
      const auto step = static_cast<uint32_t>(kStep + 2 * t);
      const RbmDraw h = model.draw(v, true, 1.0, seed, chain, step);
      const RbmDraw next = model.draw(h.state.data(), false, 1.0, seed, chain, step + 1);
      out.tie |= h.tie || next.tie;
      std::copy(next.state.begin(), next.state.end(), v);
      if (persistent || t + 1 < in.k) continue;
      for (size_t i = 0; i < V; ++i) {
        const double difference = in.data[static_cast<size_t>(r) * V + i] - next.mean[i];
        out.statistics[0] += difference * difference / static_cast<double>(in.rows);
      }
    }
    add(v, in.chain_count, 1.0, r, kStep + 2 * in.k);
  }
  const int64_t positive_step = persistent || in.k == 0 ? kStep + 2 * in.k + 1 : kStep;
  for (int64_t r = 0; r < in.rows; ++r) {
    add(in.data.data() + static_cast<size_t>(r) * V, in.rows, -1.0, r, positive_step);
  }
  for (size_t i = 0; i < V; ++i) {
    for (size_t j = 0; j < H; ++j) {
      if (!in.visible_offset.empty()) out.dW[i * H + j] -= static_cast<double>(in.visible_offset[i]) * out.dc[j];
      if (!in.hidden_offset.empty()) out.dW[i * H + j] -= out.db[i] * static_cast<double>(in.hidden_offset[j]);
    }
  }
  return out;
}

struct Found {
  Array dW, db, dc, moved, statistics, hidden_mean;
  bool bad;
  bool operator==(const Found& other) const {
    return dW == other.dW && db == other.db && dc == other.dc && moved == other.moved &&
           statistics == other.statistics && hidden_mean == other.hidden_mean;
  }
};

Found run_cd(RbmModel& model, const Inputs& in, uint64_t seed, int threads) {
  const int64_t V = model.shape.visible, H = model.shape.hidden;
  const DType f = DType::kFloat32;
  Array data(f, in.data), chains(f, in.chains);
  Found out = {Array(f, V * H), Array(f, V), Array(f, H), Array(model.shape.dtype, in.chain_count * V),
               Array(f, 2),     Array(f, H), false};
  const auto floats = [](Array& x) { return static_cast<float*>(x.data()); };
  genfast::RbmCd args = {};
  args.parameters = model.parameters();
  args.v_dtype = args.chains_dtype = f;
  args.v = data.data();
  args.rows = in.rows;
  args.chains = in.chains.empty() ? nullptr : chains.data();
  args.chain_count = in.chains.empty() ? 0 : in.chain_count;
  args.visible_offset = in.visible_offset.empty() ? nullptr : in.visible_offset.data();
  args.hidden_offset = in.hidden_offset.empty() ? nullptr : in.hidden_offset.data();
  args.seed = seed;
  args.k = in.k;
  args.chain_offset = kOffset;
  args.step = kStep;
  args.sample_hidden = in.sample_hidden;
  args.dW = floats(out.dW);
  args.db = floats(out.db);
  args.dc = floats(out.dc);
  args.moved = out.moved.data();
  args.statistics = floats(out.statistics);
  args.hidden_mean = floats(out.hidden_mean);
  out.bad = genfast::cpu::rbm_cd(args, threads);
  return out;
}

}  // namespace

TEST(rbm_cd_values) {
  struct Case {
    int64_t rows, chain_count, k;  // chain_count 0: chains start at the data
    bool offsets, sample_hidden;
  };
  const Case cases[] = {{1, 0, 1, false, false}, {40, 0, 1, true, false},  {33, 0, 3, false, true},
                        {20, 37, 2, true, true}, {37, 6, 1, false, false}, {9, 0, 0, true, true},
                        {9, 5, 0, false, true},  {9, 5, 0, true, false}};
  int index = 0;
  for (const RbmShape& shape : rbm_shapes()) {
    if (shape.rounded && shape.visible_kind == UnitKind::kGaussian) continue;  // rounding to bfloat16 has ties too
    RbmModel model(shape);
    for (const Case& c : cases) {
      if (shape.visible > 200 && c.rows == 33) continue;  // long in emulation
      Inputs in = {model.states(c.rows, false, 21),
                   {},
                   c.rows,
                   c.chain_count == 0 ? c.rows : c.chain_count,
                   {},
                   {},
                   c.k,
                   c.sample_hidden};
      if (c.chain_count > 0) in.chains = model.states(c.chain_count, false, 22);
      if (c.offsets) {
        in.visible_offset = RbmModel::floats(shape.visible, 0.5, 23);
        in.hidden_offset = RbmModel::floats(shape.hidden, 0.5, 24);
      }
      uint64_t seed = 100 + static_cast<uint64_t>(++index);
      Outputs exact = exact_cd(model, in, seed);
      for (int tries = 0; exact.tie && tries < 20; ++tries) exact = exact_cd(model, in, seed += 1000);
      CHECK(!exact.tie, "no seed without ties");
      for_each_isa([&](const genfast::Probe&, const char* isa) {
        const Found found = run_cd(model, in, seed, 1);
        CHECK(!found.bad && found == run_cd(model, in, seed, 3), "%s %s threads", isa, shape.name().c_str());
        const bool real = is_real(shape.visible_kind) || is_real(shape.hidden_kind);
        const auto compare = [&](const char* what, const Array& values, const std::vector<double>& truth, double bound,
                                 const std::vector<double>* sizes) {
          CHECK(values.guards_hold(), "%s", what);
          for (size_t i = 0; i < truth.size(); ++i) {
            const double x = values.get(static_cast<int64_t>(i)), size = sizes == nullptr ? 1.0 : 1.0 + (*sizes)[i];
            CHECK(std::fabs(x - truth[i]) <= bound * size,
                  "%s %s rows %lld chains %lld k %lld %s [%zu]: %.9g, not %.9g", isa, shape.name().c_str(),
                  static_cast<long long>(c.rows), static_cast<long long>(c.chain_count), static_cast<long long>(c.k),
                  what, i, x, truth[i]);
          }
        };
        const double bound = real ? 2e-5 : 3e-6;
        compare("dW", found.dW, exact.dW, bound, &exact.dW_size);
        compare("db", found.db, exact.db, bound, nullptr);
        compare("dc", found.dc, exact.dc, bound, nullptr);
        compare("hidden_mean", found.hidden_mean, exact.hidden_mean, bound, nullptr);
        compare("moved", found.moved, exact.moved, real ? 1e-4 : 0.0, nullptr);
        const double units = static_cast<double>(shape.visible + shape.hidden);
        compare("statistics", found.statistics, exact.statistics, bound * units, nullptr);
      });
    }
  }
}

// Sums over more rows than a piece of the product's depth, data in [0, 1]: the bound is that of float32.
TEST(rbm_cd_gradient_of_many_rows) {
  RbmModel model({50, 70});
  Inputs in = {{}, {}, 700, 700, {}, {}, 0};
  std::mt19937_64 random(31);
  for (int64_t i = 0; i < 700 * 50; ++i)
    in.data.push_back(static_cast<float>(static_cast<double>(random() % 256) / 255.0));
  in.chains = model.states(300, false, 32);
  in.chain_count = 300;
  const Outputs exact = exact_cd(model, in, 1);
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    const Found found = run_cd(model, in, 1, 2);
    double worst = 0.0;
    for (size_t i = 0; i < exact.dW.size(); ++i) {
      const double error = std::fabs(found.dW.get(static_cast<int64_t>(i)) - exact.dW[i]) / exact.dW_size[i];
      if (!(error <= worst)) worst = error;
    }
    CHECK(worst <= 1e-6, "%s: %.3g of the sum of magnitudes", isa, worst);
    std::printf("     %s: gradient within %.2g of the sum of magnitudes\n", isa, worst);
  });
}

TEST(rbm_cd_reports_nan) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (int where = 0; where < 4; ++where) {
      RbmModel model({37, 29});
      Inputs in = {model.states(8, false, 1), model.states(5, false, 2), 8, 5, {}, {}, 1};
      if (where == 1) in.data[100] = NAN;
      if (where == 2) in.chains[3] = INFINITY;
      if (where == 3) model.c[28] = NAN;
      CHECK(run_cd(model, in, 1, 2).bad == (where != 0), "%s NaN at %d", isa, where);
    }
  });
}
