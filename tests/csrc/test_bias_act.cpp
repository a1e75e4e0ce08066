// bias_act: the function, its gradient from x and from bits, and the gradient of that, in every geometry; threads, and
// what must stay untouched.
#include "check.h"
#include "gan/bias_act.h"
#include "isas.h"
#include "storage.h"

using genfast::Activation;
using genfast::BiasAct;
using genfast::DType;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr int kActivations = 9;

std::vector<double> drawn(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0.0, 2.0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = normal(random);
  return values;
}

struct Exact {
  double f, first, second;
};

// By definition, for z of moderate size.
Exact exact(Activation act, double z, double alpha) {
  const double p = 1.0 / (1.0 + std::exp(-z)), slope = p * (1.0 - p), t = std::tanh(z);
  const double density = std::exp(-0.5 * z * z) / std::sqrt(2.0 * std::acos(-1.0));
  const double cdf = 0.5 * std::erfc(-z / std::sqrt(2.0)), e = alpha * std::exp(z);
  switch (act) {
    case Activation::kLinear:
      return {z, 1.0, 0.0};
    case Activation::kRelu:
      return {z > 0 ? z : 0.0, z > 0 ? 1.0 : 0.0, 0.0};
    case Activation::kLeakyRelu:
      return {z > 0 ? z : alpha * z, z > 0 ? 1.0 : alpha, 0.0};
    case Activation::kTanh:
      return {t, 1.0 - t * t, -2.0 * t * (1.0 - t * t)};
    case Activation::kSigmoid:
      return {p, slope, slope * (1.0 - 2.0 * p)};
    case Activation::kElu:
      return {z > 0 ? z : alpha * std::expm1(z), z > 0 ? 1.0 : e, z > 0 ? 0.0 : e};
    case Activation::kSoftplus:
      return {std::log1p(std::exp(z)), p, slope};
    case Activation::kSwish:
      return {z * p, p + z * slope, slope * (2.0 + z * (1.0 - 2.0 * p))};
    default:
      return {z * cdf, cdf + z * density, density * (2.0 - z * z)};
  }
}

double bound_of(DType dtype) { return dtype == DType::kFloat64 ? 1e-13 : rounding_of(dtype) + 2e-6; }

bool near(double got, double want, double scale, DType dtype) {
  return std::fabs(got - want) <= bound_of(dtype) * (std::fabs(want) + scale) + 1e-7 * (dtype == DType::kFloat16);
}

struct Geometry {
  int64_t outer, channels, inner;
};
constexpr Geometry kGeometries[] = {{2, 3, 35}, {3, 5, 1},  {1, 2, 16385}, {7, 1, 13}, {65, 3, 31},  {2, 530, 2},
                                    {1, 1, 33}, {4, 2, 32}, {0, 3, 40},    {2, 3, 0},  {300, 16, 1}, {1, 1, 1}};

struct Call {
  Array x, b, dy, v, v_b;
  BiasAct args = {};

  Call(DType dtype, Activation act, const Geometry& g, double clamp)
      : x(dtype, drawn(g.outer * g.channels * g.inner, 1)),
        b(wide(dtype), drawn(g.channels, 2)),
        dy(dtype, drawn(g.outer * g.channels * g.inner, 3)),
        v(dtype, drawn(g.outer * g.channels * g.inner, 4)),
        v_b(wide(dtype), drawn(g.channels, 5)) {
    args.dtype = dtype, args.act = act;
    args.x = x.data(), args.b = b.data(), args.dy = dy.data(), args.v = v.data(), args.v_b = v_b.data();
    args.outer = g.outer, args.channels = g.channels, args.inner = g.inner;
    args.alpha = 0.3, args.gain = 1.5, args.clamp = clamp;
  }
  static DType wide(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }
  int64_t channel(int64_t i) const { return i / args.inner % args.channels; }
};

// Runs an order with one thread and with three, and checks the results against `want`(i) -> {out, to_x}.
template <typename Want>
void run_and_check(Call* call, int order, const char* isa, const Want& want) {
  BiasAct& args = call->args;
  args.order = order;
  const DType wide = Call::wide(args.dtype);
  Array out(args.dtype, call->x.size()), to_x = out, sums(wide, args.channels);
  Array again[3] = {out, to_x, sums};
  args.out = out.data(), args.to_x = order == 2 ? to_x.data() : nullptr, args.sums = order > 0 ? sums.data() : nullptr;
  genfast::cpu::bias_act(args, 1);
  std::vector<double> totals(static_cast<size_t>(args.channels)), sizes = totals;
  for (int64_t i = 0; i < call->x.size(); ++i) {
    const std::pair<double, double> right = want(i);
    const double scale = order == 0 ? 1e-3 : std::fabs(call->dy.get(i)) + std::fabs(call->v.get(i)) + 1.0;
    CHECK(near(out.get(i), right.first, scale, args.dtype), "%s act %d order %d %s: out[%d] = %.9g, not %.9g", isa,
          static_cast<int>(args.act), order, dtype_name(args.dtype), static_cast<int>(i), out.get(i), right.first);
    if (order == 2) {
      CHECK(near(to_x.get(i), right.second, 2 * scale * scale, args.dtype), "%s act %d %s: to_x[%d] = %.9g, not %.9g",
            isa, static_cast<int>(args.act), dtype_name(args.dtype), static_cast<int>(i), to_x.get(i), right.second);
    }
    const double term = order == 2 ? right.second : right.first;
    totals[static_cast<size_t>(call->channel(i))] += term;
    sizes[static_cast<size_t>(call->channel(i))] += std::fabs(term) + 1.0;
  }
  for (int64_t c = 0; order > 0 && c < args.channels; ++c) {
    const double total = totals[static_cast<size_t>(c)], size = sizes[static_cast<size_t>(c)];
    CHECK(std::fabs(sums.get(c) - total) <= (args.dtype == DType::kFloat64 ? 1e-13 : 4e-6) * size,
          "%s act %d order %d %s: sums[%d] = %.9g, not %.9g", isa, static_cast<int>(args.act), order,
          dtype_name(args.dtype), static_cast<int>(c), sums.get(c), total);
  }
  args.out = again[0].data(), args.to_x = order == 2 ? again[1].data() : nullptr;
  args.sums = order > 0 ? again[2].data() : nullptr;
  genfast::cpu::bias_act(args, 3);
  CHECK(out == again[0] && to_x == again[1] && sums == again[2], "%s order %d: threads matter", isa, order);
  CHECK(out.guards_hold() && to_x.guards_hold() && sums.guards_hold(), "%s order %d: wrote outside", isa, order);
}

}  // namespace

TEST(bias_act_values) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (const Geometry& g : kGeometries) {
      for (DType dtype : kDTypes) {
        for (int a = 0; a < kActivations; ++a) {
          const double clamp = a % 2 == 0 ? 2.0 : INFINITY;
          const Activation act = static_cast<Activation>(a);
          Call call(dtype, act, g, clamp);
          const auto values = [&](int64_t i) {
            const double z = call.x.get(i) + call.b.get(call.channel(i));
            Exact e = exact(act, z, 0.3);
            e.f *= 1.5, e.first *= 1.5, e.second *= 1.5;
            if (std::fabs(e.f) > clamp) e.first = e.second = 0.0, e.f = std::copysign(clamp, e.f);
            return e;
          };
          run_and_check(&call, 0, isa, [&](int64_t i) { return std::make_pair(values(i).f, 0.0); });
          const auto gradient = [&](int64_t i) { return std::make_pair(call.dy.get(i) * values(i).first, 0.0); };
          run_and_check(&call, 1, isa, gradient);
          if (a > 2) {
            run_and_check(&call, 2, isa, [&](int64_t i) {
              const double w = call.v.get(i) + call.v_b.get(call.channel(i));
              return std::make_pair(w * values(i).first, w * call.dy.get(i) * values(i).second);
            });
            continue;
          }
          call.args.planes = act == Activation::kLeakyRelu && std::isfinite(clamp) ? 2 : 1;
          const bool one_line = g.channels == 1 || g.inner < BiasAct::kShortest;
          const int64_t line = one_line ? call.x.size() : g.inner, lines = one_line ? 1 : g.outer * g.channels;
          Array bits(DType::kUInt8, call.args.planes * lines * ((line + 15) / 16 * 2));
          call.args.bits = static_cast<uint8_t*>(bits.data());
          run_and_check(&call, 0, isa, [&](int64_t i) { return std::make_pair(values(i).f, 0.0); });
          CHECK(bits.guards_hold(), "%s: bits outside", isa);
          call.args.x = nullptr;
          run_and_check(&call, 1, isa, gradient);
        }
      }
    }
  });
}

TEST(bias_act_only_sums) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    Call call(DType::kFloat32, Activation::kSigmoid, {3, 2, 50}, INFINITY);
    Array sums(DType::kFloat32, 2), same = sums, out(DType::kFloat32, 300);
    call.args.order = 1, call.args.sums = sums.data();
    genfast::cpu::bias_act(call.args, 2);
    call.args.out = out.data(), call.args.sums = same.data();
    genfast::cpu::bias_act(call.args, 2);
    CHECK(sums == same && std::isfinite(sums.get(0)), "%s", isa);
  });
}
