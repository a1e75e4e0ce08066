// bernoulli_sample for float32, bfloat16 and float16: compiled once per instruction set. Blocks of kBlock columns keep
// the uniforms in the first cache; docs/kernels/bernoulli_sample.md counts the instructions.
#include "rbm/bernoulli_sample_cpu.h"

#include "common/vec_math.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kBlock = 512;

void store(double* p, VecF x) {
  float lanes[kWidth];
  store_float(lanes, x);
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<double>(lanes[i]);
}

template <typename T>
VecF nan_sample(VecF) {
  return broadcast(scalar_from_bits(0x7FC00000u));
}
template <>
VecF nan_sample<uint8_t>(VecF) {
  return broadcast(255.0f);
}

template <typename T, typename S>
bool piece(const BernoulliSample& args, int64_t row, int64_t begin, int64_t end) {
  const T* logits = static_cast<const T*>(args.logits) + row * args.columns;
  const float* bias = static_cast<const float*>(args.bias);
  S* sample = static_cast<S*>(args.sample) + row * args.columns;
  T* prob = args.prob == nullptr ? nullptr : static_cast<T*>(args.prob) + row * args.columns;
  const VecF beta = broadcast(static_cast<float>(args.beta)), zero = broadcast(0.0f), one = broadcast(1.0f);
  const uint32_t chain = static_cast<uint32_t>(args.row_offset + row), step = static_cast<uint32_t>(args.step);
  float room[kBlock + 4 + kBatch];
  RoundKeys keys;
  make_round_keys(args.seed, &keys);
  Mask nan = no_lane();
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    const uint64_t unit = static_cast<uint64_t>(args.col_offset + at);
    const int64_t skipped = static_cast<int64_t>(unit & 3);
    fill_rbm_uniforms(room, static_cast<uint32_t>(unit >> 2), skipped + count, chain, step, keys);
    const float* uniforms = room + skipped;
    for (int64_t i = 0; i < count; i += kWidth) {
      VecF x = load_upto(logits + at + i, count - i);
      if (bias != nullptr) x = x + load_upto(bias + at + i, count - i);
      const VecF p = sigmoid(x * beta);
      const Mask bad = is_nan(p);
      nan = either(nan, bad);
      const VecF drawn = select(less(load(uniforms + i), p), one, zero);
      const VecF out = select(bad, nan_sample<S>(p), drawn);
      if (count - i >= kWidth) {
        store(sample + at + i, out);
      } else {
        S lanes[kWidth];
        store(lanes, out);
        for (int64_t j = 0; j < count - i; ++j) sample[at + i + j] = lanes[j];
      }
      if (prob != nullptr) store_upto(prob + at + i, p, count - i);
    }
  }
  return any(nan);
}

template <typename T>
bool for_sample_dtype(const BernoulliSample& args, int64_t row, int64_t begin, int64_t end) {
  switch (args.sample_dtype) {
    case DType::kFloat32:
      return piece<T, float>(args, row, begin, end);
    case DType::kFloat64:
      return piece<T, double>(args, row, begin, end);
    case DType::kBFloat16:
      return piece<T, BFloat16>(args, row, begin, end);
    case DType::kFloat16:
      return piece<T, Float16>(args, row, begin, end);
    default:
      return piece<T, uint8_t>(args, row, begin, end);
  }
}

}  // namespace

bool bernoulli_sample_piece(const BernoulliSample& args, int64_t row, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return for_sample_dtype<BFloat16>(args, row, begin, end);
    case DType::kFloat16:
      return for_sample_dtype<Float16>(args, row, begin, end);
    default:
      return for_sample_dtype<float>(args, row, begin, end);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
