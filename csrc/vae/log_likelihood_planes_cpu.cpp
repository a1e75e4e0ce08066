// Classes and mixtures of discretized logistics, whose positions have many parameters, for float32, bfloat16 and
// float16: compiled once per instruction set. The planes of a block of positions are copied side by side, because
// planes that lie a power of two apart would evict one another; gradients take the place of the parameters there.
#include "vae/log_likelihood_values.h"
#include "vae/row_sums.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kMaxBlock = 64;

// Calls segment(first position in the block, row, column, count) for the parts of rows in a block.
template <typename Segment>
void for_segments(int64_t size, int64_t at, int64_t count, const Segment& segment) {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (at + done) / size, column = (at + done) % size;
    const int64_t left = size - column, part = left < count - done ? left : count - done;
    segment(done, row, column, part);
    done += part;
  }
}

// [planes, block] floats of the positions [at, at + count); lanes beyond are zero.
void gather(const void* base, int32_t dtype, int64_t rows, int64_t planes, int64_t size, int64_t at, int64_t count,
            int64_t block, float* scratch) {
  for (int64_t q = 0; count < block && q < planes; ++q) {
    for (int64_t i = count; i < block; ++i) scratch[q * block + i] = 0.0f;
  }
  for_segments(size, at, count, [&](int64_t first, int64_t row, int64_t column, int64_t part) {
    const int64_t start = (row % rows) * planes * size + column;
    if (size == 1 && dtype == static_cast<int32_t>(DType::kFloat32)) {
      const float* from = static_cast<const float*>(base) + start;
      for (int64_t q = 0; q < planes; ++q) scratch[q * block + first] = from[q];
      return;
    }
    for (int64_t q = 0; q < planes; ++q) {
      floats_of(base, dtype, start + q * size, part, scratch + q * block + first, true);
    }
  });
}

void scatter(const float* scratch, int64_t block, const LogLikelihood& args, int64_t at, int64_t count) {
  for_segments(args.size, at, count, [&](int64_t first, int64_t row, int64_t column, int64_t part) {
    const int64_t start = row * args.planes * args.size + column;
    if (args.size == 1 && args.dtype == DType::kFloat32) {
      float* to = static_cast<float*>(args.to_params) + start;
      for (int64_t q = 0; q < args.planes; ++q) to[q] = scratch[q * block + first];
      return;
    }
    for (int64_t q = 0; q < args.planes; ++q) {
      store_floats(scratch + q * block + first, part, args.to_params, args.dtype, start + q * args.size);
    }
  });
}

bool categorical(const LogLikelihood& args, int64_t at, int64_t count, int64_t block, float* scratch, float* terms) {
  int64_t labels[kMaxBlock];
  bool valid = true;
  for_segments(args.size, at, count, [&](int64_t first, int64_t row, int64_t column, int64_t part) {
    const int64_t* x = static_cast<const int64_t*>(args.x) + (row % args.x_rows) * args.size + column;
    for (int64_t i = 0; i < part; ++i) {
      const bool inside = x[i] >= 0 && x[i] < args.planes;
      labels[first + i] = inside ? x[i] : 0;
      valid = valid && inside;
    }
  });
  if (!valid) return false;
  const VecF factor = broadcast(static_cast<float>(args.factor));
  for (int64_t i = 0; i < count; i += kWidth) {
    VecF most = load(scratch + i), total = broadcast(0.0f);
    for (int64_t q = 1; q < args.planes; ++q) most = max(most, load(scratch + q * block + i));
    float chosen[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) chosen[j] = i + j < count ? scratch[labels[i + j] * block + i + j] : 0.0f;
    for (int64_t q = 0; q < args.planes; ++q) {
      const VecF e = exp(load(scratch + q * block + i) - most);
      total = total + e;
      if (args.to_params != nullptr) store(scratch + q * block + i, e);
    }
    store(terms + i, (load(chosen) - most) - log(total));
    if (args.to_params == nullptr) continue;
    const VecF scale = negative(div(factor, total));
    for (int64_t q = 0; q < args.planes; ++q) store(scratch + q * block + i, load(scratch + q * block + i) * scale);
    for (int64_t j = 0; j < kWidth && i + j < count; ++j) {
      scratch[labels[i + j] * block + i + j] += static_cast<float>(args.factor);
    }
  }
  return true;
}

struct Coupling {
  VecF value, slope;  // tanh and its derivative
};
GENFAST_INLINE Coupling coupling_of(VecF x) {
  const VecF p = sigmoid(x + x), q = sigmoid(negative(x + x));
  return {p - q, broadcast(4.0f) * p * q};
}

template <int kChannels>
bool mixture(const LogLikelihood& args, const float* targets, int64_t count, int64_t block, float* scratch,
             float* terms) {
  constexpr int64_t kGroups = kChannels == 1 ? 2 : 3;
  const int64_t components = args.planes / (1 + kGroups * kChannels);
  const bool unit =
      args.x_dtype != static_cast<int32_t>(DType::kUInt8) && args.x_dtype != static_cast<int32_t>(DType::kBool);
  const bool wanted = args.to_params != nullptr;
  const VecF factor = broadcast(static_cast<float>(args.factor));
  Mask bad = no_lane();
  for (int64_t i = 0; i < count; i += kWidth) {
    VecF centre[kChannels];
    Mask bottom[kChannels], top[kChannels];
    for (int c = 0; c < kChannels; ++c) {
      const VecF level = levels_of(load(targets + c * block + i), unit, &bad);
      centre[c] = fma(level, broadcast(2.0f * kHalfBin), broadcast(-1.0f));
      bottom[c] = less(level, broadcast(0.5f));
      top[c] = less(broadcast(254.5f), level);
    }
    const auto plane = [&](int c, int64_t group, int64_t m) {
      return scratch + ((1 + c * kGroups + group) * components + m) * block + i;
    };
    VecF heaviest = load(scratch + i), weights = broadcast(0.0f), total = broadcast(0.0f), most = broadcast(-3e38f);
    for (int64_t m = 1; m < components; ++m) heaviest = max(heaviest, load(scratch + m * block + i));
    float* const likely = scratch + args.planes * block;  // [components, kWidth]
    for (int64_t m = 0; m < components; ++m) {
      const VecF weight = load(scratch + m * block + i) - heaviest;
      const VecF e = exp(weight);
      weights = weights + e;
      if (wanted) store(scratch + m * block + i, e);
      VecF log_p = weight, shift[3] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
      Coupling by[3];
      if (kChannels == 3) {
        for (int c = 0; c < 3; ++c) by[c] = coupling_of(load(plane(c % kChannels, 2, m)));
        shift[1] = by[0].value * centre[0];
        shift[2] = fma(by[1].value, centre[0], by[2].value * centre[1 % kChannels]);
      }
      VecF to_mean[kChannels];
      for (int c = 0; c < kChannels; ++c) {
        VecF to_scale;
        log_p = log_p + logistic_bin(centre[c], bottom[c], top[c], load(plane(c, 0, m)) + shift[c],
                                     load(plane(c, 1, m)), &to_mean[c], &to_scale);
        if (!wanted) continue;
        store(plane(c, 0, m), to_mean[c]);
        store(plane(c, 1, m), to_scale);
      }
      if (kChannels == 3 && wanted) {
        store(plane(0, 2, m), to_mean[1 % kChannels] * centre[0] * by[0].slope);
        store(plane(1 % kChannels, 2, m), to_mean[2 % kChannels] * centre[0] * by[1].slope);
        store(plane(2 % kChannels, 2, m), to_mean[2 % kChannels] * centre[1 % kChannels] * by[2].slope);
      }
      store(likely + m * kWidth, log_p);
      most = max(most, log_p);
    }
    for (int64_t m = 0; m < components; ++m) {
      const VecF e = exp(load(likely + m * kWidth) - most);
      store(likely + m * kWidth, e);
      total = total + e;
    }
    store(terms + i, most + (log(total) - log(weights)));
    if (!wanted) continue;
    const VecF scale = div(factor, total), prior = div(factor, weights);
    for (int64_t m = 0; m < components; ++m) {
      const VecF share = load(likely + m * kWidth) * scale;
      store(scratch + m * block + i, share - load(scratch + m * block + i) * prior);
      for (int64_t g = 0; g < kGroups; ++g) {
        for (int c = 0; c < kChannels; ++c) store(plane(c, g, m), share * load(plane(c, g, m)));
      }
    }
  }
  return !any(bad);
}

}  // namespace

bool log_likelihood_planes_piece(const LogLikelihood& args, int64_t begin, int64_t end, float* scratch,
                                 KlPartials* partials) {
  RowSums<float> sums(static_cast<float*>(args.value), args.size, begin, partials);
  const int64_t block = block_of_planes(args.planes);
  float terms[kMaxBlock + kWidth], targets[3 * kMaxBlock + kWidth];
  bool valid = true;
  for (int64_t at = begin; at < end; at += block) {
    const int64_t count = end - at < block ? end - at : block;
    gather(args.params, static_cast<int32_t>(args.dtype), args.rows, args.planes, args.size, at, count, block, scratch);
    if (args.likelihood == Likelihood::kCategorical) {
      valid = categorical(args, at, count, block, scratch, terms) && valid;
    } else {
      gather(args.x, args.x_dtype, args.x_rows, args.targets, args.size, at, count, block, targets);
      valid = (args.targets == 1 ? mixture<1>(args, targets, count, block, scratch, terms)
                                 : mixture<3>(args, targets, count, block, scratch, terms)) &&
              valid;
    }
    if (!valid) break;
    if (args.to_params != nullptr) scatter(scratch, block, args, at, count);
    sums.add(at, count, [&](int64_t i, int64_t n) { return segment_sum(terms + i, n); });
  }
  sums.finish();
  return valid;
}

}  // namespace GENFAST_ISA
}  // namespace genfast
