// gan_loss: values and gradients of every form, dtype and instruction set, one side alone, and what stays untouched.
#include "check.h"
#include "gan/gan_loss.h"
#include "isas.h"
#include "storage.h"

using genfast::DType;
using genfast::GanFunction;
using genfast::GanLoss;
using genfast::GanPairing;

namespace {

double value_of(GanFunction function, double y) {
  switch (function) {
    case GanFunction::kSoftplus:
      return (y > 0 ? y : 0) + std::log1p(std::exp(-std::fabs(y)));
    case GanFunction::kHinge:
      return y > 0 ? y : 0;
    case GanFunction::kSquare:
      return y * y / 2;
    default:
      return y;
  }
}

double loss_of(const GanLoss& args, const std::vector<double>& real, const std::vector<double>& fake) {
  double total = 0.0, real_mean = 0.0, fake_mean = 0.0;
  for (double x : real) real_mean += x / static_cast<double>(real.size());
  for (double x : fake) fake_mean += x / static_cast<double>(fake.size());
  const bool paired = args.pairing == GanPairing::kPaired, average = args.pairing == GanPairing::kAverage;
  for (size_t i = 0; i < real.size(); ++i) {
    const double x = real[i] - (paired ? fake[i] : average ? fake_mean : 0.0);
    total += value_of(args.function, args.real_sign * x + args.real_shift) / static_cast<double>(real.size());
  }
  for (size_t i = 0; i < fake.size() && !paired; ++i) {
    const double x = fake[i] - (average ? real_mean : 0.0);
    total += value_of(args.function, args.fake_sign * x + args.fake_shift) / static_cast<double>(fake.size());
  }
  return args.scale * total;
}

}  // namespace

TEST(gan_loss_values_and_gradients) {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal(0.0, 2.0);
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
      for (int function = 0; function < 4; ++function) {
        for (int pairing = 0; pairing < 3; ++pairing) {
          for (int64_t count : {1, 3, 17, 70, 1100}) {
            const int64_t fakes = pairing == 1 ? count : count / 2 + 1;
            std::vector<double> draws[2] = {std::vector<double>(static_cast<size_t>(count)),
                                            std::vector<double>(static_cast<size_t>(fakes))};
            for (auto& draw : draws) {
              for (double& x : draw) x = normal(random);
            }
            Array real(dtype, draws[0]), fake(dtype, draws[1]), loss(wide, 1);
            Array to_real(wide, count), to_fake(wide, fakes), alone(wide, fakes), again(wide, 1);
            for (int64_t i = 0; i < count; ++i) draws[0][static_cast<size_t>(i)] = real.get(i);
            for (int64_t i = 0; i < fakes; ++i) draws[1][static_cast<size_t>(i)] = fake.get(i);
            GanLoss args = {dtype,
                            static_cast<GanFunction>(function),
                            static_cast<GanPairing>(pairing),
                            real.data(),
                            fake.data(),
                            loss.data(),
                            to_real.data(),
                            to_fake.data(),
                            count,
                            fakes,
                            -1.0,
                            0.3017,
                            1.0,
                            0.2511,
                            pairing == 2 ? -1.0 : 1.0};
            genfast::cpu::gan_loss(args);
            const double want = loss_of(args, draws[0], draws[1]), bound = dtype == DType::kFloat64 ? 1e-13 : 2e-6;
            CHECK(std::fabs(loss.get(0) - want) <= bound * (std::fabs(want) + 4.0), "%s %s %d %d %d: %.9g, not %.9g",
                  isa, dtype_name(dtype), function, pairing, static_cast<int>(count), loss.get(0), want);
            const double step = 1e-6;
            for (int side = 0; side < 2; ++side) {
              for (int64_t i = 0; i < (side ? fakes : count); i += 37) {
                double& x = draws[side][static_cast<size_t>(i)];
                const double before = x;
                x = before + step;
                const double above = loss_of(args, draws[0], draws[1]);
                x = before - step;
                const double below = loss_of(args, draws[0], draws[1]), slope = (above - below) / (2 * step);
                x = before;
                const double got = (side ? to_fake : to_real).get(i);
                CHECK(std::fabs(got - slope) <= 1e-6 * (1 + std::fabs(slope)), "%s %s %d %d side %d: %.9g, not %.9g",
                      isa, dtype_name(dtype), function, pairing, side, got, slope);
              }
            }
            args.loss = again.data(), args.to_real = nullptr, args.to_fake = alone.data();
            genfast::cpu::gan_loss(args);
            CHECK(alone == to_fake && again == loss, "%s: the other gradient matters", isa);
            CHECK(loss.guards_hold() && to_real.guards_hold() && to_fake.guards_hold(), "%s: wrote outside", isa);
          }
        }
      }
    }
  });
}
