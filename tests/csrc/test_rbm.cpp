// The RBM half step, Gibbs chain and free energy against plain double loops.
#include "isas.h"
#include "rbm/rbm_gibbs.h"
#include "rbm/rbm_half_step.h"
#include "rbm_model.h"

using genfast::DType;
using genfast::UnitKind;

namespace {

constexpr uint64_t kSeed = 0x8000000000000007ull;
constexpr int64_t kOffset = (1ll << 31) + 5;

double state_bound(UnitKind kind, double exact) { return is_real(kind) ? 1e-5 * (1.0 + std::fabs(exact)) : 0.0; }

double mean_bound(DType dtype, UnitKind kind, double exact) {
  const double size = is_real(kind) ? 4.0 + std::fabs(exact) : 1.0;
  return rounding_of(dtype) * std::fabs(exact) + 3e-6 * size;
}

struct HalfStep {
  Array sample, mean;
  bool bad;
};

HalfStep half_step(RbmModel& model, bool up, DType state_dtype, Array& x, int64_t rows, const std::vector<float>& beta,
                   DType sample_dtype, int threads, int64_t step = 6) {
  HalfStep out = {Array(sample_dtype, rows * model.units(up)), Array(model.shape.dtype, rows * model.units(up)), false};
  out.bad = genfast::cpu::rbm_half_step(
      {model.parameters(), up, state_dtype, x.data(), rows, beta.empty() ? nullptr : beta.data(),
       static_cast<int64_t>(beta.size()), kSeed, kOffset, step, sample_dtype, out.sample.data(), out.mean.data()},
      threads);
  return out;
}

std::vector<float> betas(int64_t count) {
  std::vector<float> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(0.25f + 0.5f * static_cast<float>(i % 4));
  return out;
}

}  // namespace

TEST(rbm_half_step_values) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (const RbmShape& shape : rbm_shapes()) {
      RbmModel model(shape);
      for (const bool up : {true, false}) {
        for (int64_t rows : {1, 5, 45}) {
          const std::vector<double> states = model.states(rows, !up, 3);
          const bool real = is_real(model.kind(!up));
          const DType state_dtype = real || rows == 5 ? DType::kFloat32 : rows == 1 ? DType::kUInt8 : DType::kBFloat16;
          const DType sample_dtype = is_real(model.kind(up)) ? DType::kFloat32
                                     : rows == 5             ? DType::kUInt8
                                                             : DType::kFloat16;
          const std::vector<float> beta = betas(rows == 1 ? 0 : rows == 5 ? 1 : rows);
          Array x(state_dtype, states);
          HalfStep found = half_step(model, up, state_dtype, x, rows, beta, sample_dtype, 1);
          HalfStep again = half_step(model, up, state_dtype, x, rows, beta, sample_dtype, 3);
          CHECK(found.sample == again.sample && found.mean == again.mean, "%s %s threads", isa, shape.name().c_str());
          CHECK(!found.bad && found.sample.guards_hold() && found.mean.guards_hold(), "%s", isa);
          const int64_t units = model.units(up);
          for (int64_t r = 0; r < rows; ++r) {
            const double row_beta =
                beta.empty() ? 1.0 : static_cast<double>(beta[beta.size() == 1 ? 0 : static_cast<size_t>(r)]);
            const RbmDraw exact = model.draw(states.data() + r * model.units(!up), up, row_beta, kSeed,
                                             static_cast<uint32_t>(kOffset + r), 6);
            for (int64_t i = 0; i < units; ++i) {
              const double mean = exact.mean[static_cast<size_t>(i)], state = exact.state[static_cast<size_t>(i)];
              const double found_mean = found.mean.get(r * units + i), found_state = found.sample.get(r * units + i);
              CHECK(std::fabs(found_mean - mean) <= mean_bound(shape.dtype, model.kind(up), mean),
                    "%s %s up %d mean [%lld, %lld]: %.9g, not %.9g", isa, shape.name().c_str(), up,
                    static_cast<long long>(r), static_cast<long long>(i), found_mean, mean);
              CHECK(exact.tie || std::fabs(found_state - state) <= state_bound(model.kind(up), state),
                    "%s %s up %d state [%lld, %lld]: %.9g, not %.9g", isa, shape.name().c_str(), up,
                    static_cast<long long>(r), static_cast<long long>(i), found_state, state);
            }
          }
        }
      }
    }
  });
}

// Samples follow seed, chain and half-step: others differ in about half of the units.
TEST(rbm_half_step_noise) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    RbmModel model({37, 290});
    const int64_t rows = 20, count = rows * 290;
    Array x(DType::kFloat32, model.states(rows, false, 3));
    const HalfStep found = half_step(model, true, DType::kFloat32, x, rows, {}, DType::kUInt8, 1);
    const HalfStep other = half_step(model, true, DType::kFloat32, x, rows, {}, DType::kUInt8, 1, 7);
    int64_t different = 0;
    for (int64_t i = 0; i < count; ++i) different += found.sample.get(i) != other.sample.get(i);
    CHECK(different > count / 10, "%s: %lld of %lld samples differ", isa, static_cast<long long>(different),
          static_cast<long long>(count));
    for (int64_t begin : {1, 7}) {  // a part of the chains draws what the whole would
      const std::vector<double> states = model.states(rows, false, 3);
      Array some(DType::kFloat32, std::vector<double>(states.begin() + begin * 37, states.end()));
      Array sample(DType::kUInt8, (rows - begin) * 290);
      genfast::cpu::rbm_half_step({model.parameters(), true, DType::kFloat32, some.data(), rows - begin, nullptr, 0,
                                   kSeed, kOffset + begin, 6, DType::kUInt8, sample.data(), nullptr},
                                  2);
      for (int64_t i = 0; i < sample.size(); ++i) {
        CHECK(sample.get(i) == found.sample.get(begin * 290 + i), "%s rows from %lld", isa,
              static_cast<long long>(begin));
      }
    }
  });
}

// 0/1 states as bits, given and drawn, are those of bytes; unused bits given do not count, those drawn are zero.
TEST(rbm_half_step_packed) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (const int64_t V : {1, 8, 37, 130}) {
      for (const int64_t H : {1, 16, 29, 270}) {
        RbmModel model({V, H});
        const int64_t rows = 21, x_bytes = (V + 7) / 8, bytes = (H + 7) / 8;
        const std::vector<double> states = model.states(rows, false, 3);
        Array x(DType::kUInt8, states);
        const HalfStep found = half_step(model, true, DType::kUInt8, x, rows, {}, DType::kUInt8, 1);
        std::vector<double> packed(static_cast<size_t>(rows * x_bytes), 0.0);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < 8 * x_bytes; ++i) {
            const bool on = i >= V || states[static_cast<size_t>(r * V + i)] != 0.0;
            packed[static_cast<size_t>(r * x_bytes + i / 8)] += on ? 1 << (i & 7) : 0;
          }
        }
        Array bits(DType::kUInt8, packed);
        for (const int threads : {1, 3}) {
          Array sample(DType::kUInt8, rows * bytes), mean(DType::kFloat32, rows * H);
          genfast::cpu::rbm_half_step({model.parameters(), true, DType::kUInt8, bits.data(), rows, nullptr, 0, kSeed,
                                       kOffset, 6, DType::kUInt8, sample.data(), mean.data(), true, true},
                                      threads);
          CHECK(sample.guards_hold() && mean == found.mean, "%s %lld x %lld", isa, static_cast<long long>(V),
                static_cast<long long>(H));
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < 8 * bytes; ++i) {
              const int bit = static_cast<int>(sample.get(r * bytes + i / 8)) >> (i & 7) & 1;
              CHECK(bit == (i < H ? static_cast<int>(found.sample.get(r * H + i)) : 0), "%s bit [%lld, %lld]", isa,
                    static_cast<long long>(r), static_cast<long long>(i));
            }
          }
        }
      }
    }
  });
}

TEST(rbm_half_step_reports_nan) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (UnitKind kind : {UnitKind::kBernoulli, UnitKind::kGaussian}) {
      for (const bool up : {true, false}) {
        RbmShape shape = {37, 29, kind, UnitKind::kBernoulli};
        for (int where = 0; where < 5; ++where) {
          RbmModel model(shape);
          std::vector<double> states = model.states(6, !up, 3);
          if (where == 1) states[states.size() - 1] = NAN;
          if (where == 2) states[7] = INFINITY;
          if (where == 3) {
            std::vector<double> weights = RbmModel::values(37 * 29, 0.3, 1);
            weights[5 * 29 + 28] = NAN;
            model.W = Array(DType::kFloat32, weights);
          }
          if (where == 4) (up ? model.c : model.b)[20] = NAN;
          Array x(DType::kFloat32, states);
          CHECK(half_step(model, up, DType::kFloat32, x, 6, {}, DType::kFloat32, 2).bad == (where != 0),
                "%s kind %d up %d NaN at %d", isa, static_cast<int>(kind), up, where);
        }
      }
    }
  });
}

namespace {

struct Chain {
  std::vector<double> v, h;
  bool tie = false;
};

Chain exact_chain(const RbmModel& model, const double* start, const uint8_t* clamp, double beta, int64_t k,
                  uint32_t chain, uint32_t step) {
  Chain out;
  out.v.assign(start, start + model.shape.visible);
  for (int64_t t = 0; t < k; ++t) {
    const RbmDraw h = model.draw(out.v.data(), true, beta, kSeed, chain, step + static_cast<uint32_t>(2 * t));
    const RbmDraw v = model.draw(h.state.data(), false, beta, kSeed, chain, step + static_cast<uint32_t>(2 * t + 1));
    out.h = h.state;
    out.tie |= h.tie || v.tie;
    for (size_t i = 0; i < out.v.size(); ++i) out.v[i] = clamp != nullptr && clamp[i] != 0 ? start[i] : v.state[i];
  }
  return out;
}

}  // namespace

TEST(rbm_gibbs_values) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    int64_t compared = 0, ties = 0;
    for (const RbmShape& shape : rbm_shapes()) {
      if (shape.rounded && shape.visible_kind == UnitKind::kGaussian) continue;  // rounding to bfloat16 has ties too
      RbmModel model(shape);
      for (int64_t k : {0, 1, 3}) {
        for (int clamps = 0; clamps < 3; ++clamps) {
          const int64_t chains = clamps == 0 ? 45 : 5;
          const std::vector<double> start = model.states(chains, false, 9);
          std::vector<uint8_t> clamp(static_cast<size_t>((clamps == 2 ? chains : 1) * shape.visible));
          for (size_t i = 0; i < clamp.size(); ++i) clamp[i] = i * 7 % 3 == 0;
          const std::vector<float> beta = betas(clamps == 0 ? chains : clamps == 1 ? 1 : 0);
          Array v(DType::kFloat32, start), visible(shape.dtype, chains * shape.visible),
              hidden(shape.dtype, chains * shape.hidden);
          Array visible3 = visible, hidden3 = hidden;
          const auto run = [&](Array& to_v, Array* to_h, int threads) {
            return genfast::cpu::rbm_gibbs(
                {model.parameters(), DType::kFloat32, v.data(), chains, beta.empty() ? nullptr : beta.data(),
                 static_cast<int64_t>(beta.size()), clamps == 0 ? nullptr : clamp.data(), clamps == 2 ? chains : 1,
                 kSeed, k, kOffset, 4, to_v.data(), to_h == nullptr ? nullptr : to_h->data()},
                threads);
          };
          CHECK(!run(visible, k == 0 ? nullptr : &hidden, 1) && !run(visible3, k == 0 ? nullptr : &hidden3, 3));
          CHECK(visible == visible3 && hidden == hidden3, "%s %s threads", isa, shape.name().c_str());
          CHECK(visible.guards_hold() && hidden.guards_hold());
          for (int64_t r = 0; r < chains; ++r) {
            const double row_beta =
                beta.empty() ? 1.0 : static_cast<double>(beta[beta.size() == 1 ? 0 : static_cast<size_t>(r)]);
            const uint8_t* row_clamp = clamps == 0 ? nullptr : clamp.data() + (clamps == 2 ? r * shape.visible : 0);
            const Chain exact = exact_chain(model, start.data() + r * shape.visible, row_clamp, row_beta, k,
                                            static_cast<uint32_t>(kOffset + r), 4);
            ++compared;
            ties += exact.tie;
            if (exact.tie) continue;
            const auto compare = [&](const char* side, UnitKind kind, const std::vector<double>& states,
                                     const Array& found) {
              for (size_t i = 0; i < states.size(); ++i) {
                const double x = found.get(r * static_cast<int64_t>(states.size()) + static_cast<int64_t>(i));
                CHECK(std::fabs(x - states[i]) <= 4.0 * state_bound(kind, states[i]),
                      "%s %s k %lld clamps %d %s [%lld, %zu]: %g, not %g", isa, shape.name().c_str(),
                      static_cast<long long>(k), clamps, side, static_cast<long long>(r), i, x, states[i]);
              }
            };
            compare("visible", shape.visible_kind, exact.v, visible);
            if (k > 0) compare("hidden", shape.hidden_kind, exact.h, hidden);
          }
        }
      }
    }
    CHECK(ties * 50 < compared, "%s: %lld of %lld chains have ties", isa, static_cast<long long>(ties),
          static_cast<long long>(compared));
  });
}

TEST(rbm_gibbs_reports_nan) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (int where = 0; where < 3; ++where) {
      RbmModel model({37, 29});
      std::vector<double> states = model.states(6, false, 3);
      if (where == 1) states[40] = NAN;
      if (where == 2) model.b[3] = NAN;
      Array v(DType::kFloat32, states), out(DType::kFloat32, 6 * 37);
      CHECK(genfast::cpu::rbm_gibbs({model.parameters(), DType::kFloat32, v.data(), 6, nullptr, 0, nullptr, 1, kSeed, 2,
                                     0, 0, out.data(), nullptr},
                                    2) == (where != 0),
            "%s NaN at %d", isa, where);
    }
  });
}

TEST(rbm_free_energy_values) {
  for_each_isa([](const genfast::Probe&, const char* isa) {
    for (const RbmShape& shape : rbm_shapes()) {
      RbmModel model(shape);
      for (int64_t rows : {1, 33}) {
        const std::vector<double> states = model.states(rows, false, 5);
        Array v(DType::kFloat32, states), found(DType::kFloat32, rows), again = found;
        genfast::cpu::rbm_free_energy(
            {model.parameters(), DType::kFloat32, v.data(), rows, static_cast<float*>(found.data())}, 1);
        genfast::cpu::rbm_free_energy(
            {model.parameters(), DType::kFloat32, v.data(), rows, static_cast<float*>(again.data())}, 3);
        CHECK(found == again && found.guards_hold(), "%s threads", isa);
        for (int64_t r = 0; r < rows; ++r) {
          const double* row = states.data() + r * shape.visible;
          const double exact = model.free_energy(row);
          const double size = std::fabs(model.visible_energy(row)) + static_cast<double>(shape.visible + shape.hidden);
          CHECK(std::fabs(found.get(r) - exact) <= 2e-6 * size, "%s %s [%lld]: %.9g, not %.9g", isa,
                shape.name().c_str(), static_cast<long long>(r), found.get(r), exact);
        }
      }
    }
  });
}
