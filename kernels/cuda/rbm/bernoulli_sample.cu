// Bernoulli sample from logits; csrc/rbm/bernoulli_sample.h states the contract.
//
//   p = 1 / (1 + e^-x), x = beta (logit + bias); 0 where x < -87.33        sample = u < p
//
// u is the uniform of the RBM layout of csrc/common/philox.h. NaN gives NaN (255 in uint8).
//
// Floor: the bytes, logits in and sample (and p, if wanted) out; fp32 to fp32 8 bytes an element, 5 to uint8.
// Tiling: common/launch.cuh, a lane handles eight neighbours at a time (four where columns is no multiple of eight),
// one Philox call per four.
#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/vector.cuh"
#include "rbm/bernoulli_sample.h"

namespace genfast {
namespace cuda {
namespace {

template <typename T, typename S, int kLane>
__global__ void __launch_bounds__(kThreads)
    bernoulli_kernel(const __grid_constant__ BernoulliSample args, const __grid_constant__ Segments plan) {
  constexpr int kN = width_of(kLane);
  constexpr bool kAligned = kLane != 0;
  const uint64_t seed = args.seed_pointer != nullptr ? static_cast<uint64_t>(__ldg(args.seed_pointer)) : args.seed;
  const float beta = static_cast<float>(args.beta);
  for_each_segment<kAligned, kN>(
      plan, false,
      [&](int64_t row, int64_t column, uint64_t group) {
        const int64_t base = row * plan.columns;
        float x[kN], p[kN], sample[kN];
        load<kAligned>(static_cast<const T*>(args.logits) + base, column, plan.columns, x);
        if (args.bias != nullptr) {
          float bias[kN];
          load<kAligned>(static_cast<const float*>(args.bias), column, plan.columns, bias);
#pragma unroll
          for (int i = 0; i < kN; ++i) x[i] += bias[i];
        }
        const auto chain = static_cast<uint32_t>(args.row_offset + row);
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          x[i] *= beta;
          p[i] = reciprocal_fast(1.0f + exp(clamp(-x[i], -86.0f, 87.33f)));
          p[i] = x[i] < -87.33f ? 0.0f : p[i];
        }
#pragma unroll
        for (int i = 0; i < kN; i += 4) {
          const philox::Words words =
              philox::rbm_words(static_cast<uint32_t>(group) + i / 4, chain, static_cast<uint32_t>(args.step), seed);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float drawn = philox::uniform(words.w[j]) < p[i + j] ? 1.0f : 0.0f;
            sample[i + j] = isnan(x[i + j]) ? x[i + j] : drawn;
          }
        }
        store<kAligned>(static_cast<S*>(args.sample) + base, column, plan.columns, sample);
        if (args.prob != nullptr) store<kAligned>(static_cast<T*>(args.prob) + base, column, plan.columns, p);
      },
      [](int64_t, uint32_t, bool) {});
}

constexpr const char* kName = "bernoulli_sample";

template <typename T, typename S>
void launch_typed(const BernoulliSample& args, void* stream) {
  const bool aligned = aligned16({args.logits, args.bias, args.sample, args.prob});
  const int lane = lane_for(args.columns, args.col_offset, aligned);
  const auto kernel = lane == 8   ? bernoulli_kernel<T, S, 8>
                      : lane == 4 ? bernoulli_kernel<T, S, 4>
                                  : bernoulli_kernel<T, S, 0>;
  launch(kName, kernel, args, segments(args.rows, args.columns, args.col_offset, width_of(lane)), stream);
}

template <typename T>
void launch_sample(const BernoulliSample& args, void* stream) {
  switch (args.sample_dtype) {
    case DType::kFloat32:
      return launch_typed<T, float>(args, stream);
    case DType::kBFloat16:
      return launch_typed<T, __nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return launch_typed<T, __half>(args, stream);
    case DType::kUInt8:
    case DType::kBool:
      return launch_typed<T, uint8_t>(args, stream);
    default:
      throw std::invalid_argument("bernoulli_sample: CUDA samples are float32, bfloat16, float16, uint8 or bool");
  }
}

}  // namespace

void bernoulli_sample(const BernoulliSample& args, void* stream) {
  if (args.rows < 0 || args.columns < 0 || args.row_offset < 0 || args.col_offset < 0) {
    throw std::invalid_argument("bernoulli_sample: negative size or offset");
  }
  if (args.rows == 0 || args.columns == 0) return;
  switch (args.dtype) {
    case DType::kFloat32:
      return launch_sample<float>(args, stream);
    case DType::kBFloat16:
      return launch_sample<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return launch_sample<__half>(args, stream);
    default:
      throw std::invalid_argument("bernoulli_sample: CUDA logits are float32, bfloat16 or float16");
  }
}

}  // namespace cuda
}  // namespace genfast
