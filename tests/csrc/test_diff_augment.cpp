// diff_augment: shifts, rectangles and colors of small images, its transpose, threads, and what stays untouched.
#include "check.h"
#include "common/philox.h"
#include "gan/diff_augment.h"
#include "isas.h"
#include "storage.h"

using genfast::DiffAugment;
using genfast::DType;
namespace philox = genfast::philox;

namespace {

constexpr int64_t kBatch = 5, kOffset = 3;
constexpr uint64_t kSeed = 0x123456789abcdefull;

std::vector<double> drawn(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> between(-1.0, 1.0);
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = between(random);
  return values;
}

double uniform_of(int64_t image, int64_t which) {
  const uint64_t index = 8 * static_cast<uint64_t>(image) + static_cast<uint64_t>(which);
  return philox::uniform(philox::tensor_words(index / 4, 0, philox::kTensorUniform, kSeed).w[index % 4]);
}

// One image of the linear part or of the whole formula, pixel by pixel.
void augment(const Array& x, std::vector<double>* out, int64_t image, int64_t channels, int64_t height, int64_t width,
             int policy, bool affine) {
  const int64_t plane = height * width, first = image * channels * plane;
  const auto u = [&](int64_t which) { return uniform_of(kOffset + image, which); };
  const bool colored = policy & 1;
  const double b = colored && affine ? u(0) - 0.5 : 0.0, s = colored ? 2 * u(1) : 1.0, k = colored ? u(2) + 0.5 : 1.0;
  double mean = 0.0;
  for (int64_t i = 0; i < channels * plane; ++i) mean += x.get(first + i) / static_cast<double>(channels * plane);
  const auto shift = [&](double v, int64_t size) {
    const int64_t most = (size + 4) / 8;
    return policy & 2 ? static_cast<int64_t>(std::floor(v * static_cast<double>(2 * most + 1))) - most : 0;
  };
  const int64_t down = shift(u(3), height), across = shift(u(4), width);
  const auto start = [&](double v, int64_t size) {
    const int64_t side = (size + 1) / 2;
    return static_cast<int64_t>(std::floor(v * static_cast<double>(size + 1 - side % 2))) - side / 2;
  };
  const int64_t top = start(u(5), height), left = start(u(6), width);
  for (int64_t h = 0; h < height; ++h) {
    for (int64_t w = 0; w < width; ++w) {
      const int64_t from_h = h - down, from_w = w - across;
      const bool inside = from_h >= 0 && from_h < height && from_w >= 0 && from_w < width;
      const bool cut =
          (policy & 4) && h >= top && h < top + (height + 1) / 2 && w >= left && w < left + (width + 1) / 2;
      double grey = 0.0;
      for (int64_t c = 0; inside && c < channels; ++c) {
        grey += x.get(first + c * plane + from_h * width + from_w) / static_cast<double>(channels);
      }
      for (int64_t c = 0; c < channels; ++c) {
        double value = 0.0;
        if (inside && !cut) {
          value = k * s * x.get(first + c * plane + from_h * width + from_w) + k * (1 - s) * grey + (1 - k) * mean + b;
        }
        (*out)[static_cast<size_t>(first + c * plane + h * width + w)] = value;
      }
    }
  }
}

}  // namespace

TEST(diff_augment_values_and_transpose) {
  for_each_isa([&](const genfast::Probe&, const char* isa) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      for (int policy = 0; policy < 8; ++policy) {
        for (const auto& [channels, height, width] :
             {std::tuple<int64_t, int64_t, int64_t>{3, 9, 17}, {1, 16, 5}, {2, 1, 1}, {2, 3, 530}}) {
          const int64_t count = kBatch * channels * height * width;
          Array x(dtype, drawn(count, 1)), y(dtype, drawn(count, 2));
          Array out(dtype, count), again(dtype, count), linear(dtype, count), back(dtype, count);
          DiffAugment args = {dtype, x.data(), out.data(), kBatch, channels, height, width, kOffset, kSeed, policy, 0};
          genfast::cpu::diff_augment(args, 1);
          args.out = again.data();
          genfast::cpu::diff_augment(args, 3);
          CHECK(again == out, "%s: threads matter", isa);
          args.out = linear.data(), args.mode = 1;
          genfast::cpu::diff_augment(args, 1);
          args.x = y.data(), args.out = back.data(), args.mode = 2;
          genfast::cpu::diff_augment(args, 1);
          std::vector<double> want(static_cast<size_t>(count));
          for (int64_t i = 0; i < kBatch; ++i) augment(x, &want, i, channels, height, width, policy, true);
          const double bound = 4 * rounding_of(dtype) + (dtype == DType::kFloat64 ? 1e-14 : 1e-6);
          double worst = 0.0, left = 0.0, right = 0.0, size = 0.0;
          for (int64_t i = 0; i < count; ++i) {
            worst = std::fmax(worst, std::fabs(out.get(i) - want[static_cast<size_t>(i)]));
            left += linear.get(i) * y.get(i), right += x.get(i) * back.get(i);
            size += std::fabs(linear.get(i) * y.get(i)) + std::fabs(x.get(i) * back.get(i));
          }
          CHECK(worst <= 3 * bound, "%s %s policy %d: off by %g", isa, dtype_name(dtype), policy, worst);
          CHECK(std::fabs(left - right) <= bound * size + 1e-12, "%s %s policy %d: <A x, y> = %g, <x, At y> = %g", isa,
                dtype_name(dtype), policy, left, right);
          CHECK(out.guards_hold() && again.guards_hold() && back.guards_hold(), "%s: wrote outside", isa);
        }
      }
    }
  });
}
