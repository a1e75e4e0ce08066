// Cuts rows and long rows into pieces for the threads, and samples from float64 logits.
#include <atomic>
#include <cmath>

#include "common/memory.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "rbm/bernoulli_sample_cpu.h"

namespace genfast {

bool bernoulli_sample_double(const BernoulliSample& args, int64_t row, int64_t begin, int64_t end) {
  bool nan = false;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t i = row * args.columns + column;
    const double bias = args.bias == nullptr ? 0.0 : static_cast<const double*>(args.bias)[column];
    const double p = 1.0 / (1.0 + std::exp(-(static_cast<const double*>(args.logits)[i] + bias) * args.beta));
    const uint64_t unit = static_cast<uint64_t>(args.col_offset + column);
    const philox::Words words =
        philox::rbm_words(static_cast<uint32_t>(unit >> 2), static_cast<uint32_t>(args.row_offset + row),
                          static_cast<uint32_t>(args.step), args.seed);
    const bool is_nan = std::isnan(p);
    const bool drawn = static_cast<double>(philox::uniform(words.w[unit & 3])) < p;
    nan = nan || is_nan;
    switch (args.sample_dtype) {
      case DType::kFloat64:
        static_cast<double*>(args.sample)[i] = is_nan ? NAN : drawn;
        break;
      case DType::kFloat32:
        static_cast<float*>(args.sample)[i] = is_nan ? NAN : static_cast<float>(drawn);
        break;
      case DType::kBFloat16:
        static_cast<uint16_t*>(args.sample)[i] = is_nan ? 0x7FC0 : drawn ? 0x3F80 : 0;
        break;
      case DType::kFloat16:
        static_cast<uint16_t*>(args.sample)[i] = is_nan ? 0x7E00 : drawn ? 0x3C00 : 0;
        break;
      default:
        static_cast<uint8_t*>(args.sample)[i] = is_nan ? 255 : drawn;
    }
    if (args.prob != nullptr) static_cast<double*>(args.prob)[i] = p;
  }
  return nan;
}

namespace cpu {

bool bernoulli_sample(const BernoulliSample& args, int threads) {
  constexpr int64_t kPiece = 4096;  // columns
  const int64_t elements = args.rows * args.columns;
  if (elements == 0) return false;
  advise_huge_pages(args.sample, elements * bytes_of(args.sample_dtype));
  advise_huge_pages(args.prob, elements * bytes_of(args.dtype));
  BernoulliPiece* piece =
      args.dtype == DType::kFloat64 ? &bernoulli_sample_double : GENFAST_FOR_ISA(bernoulli_sample_piece);
  const int64_t row_pieces = (args.columns + kPiece - 1) / kPiece;
  const int useful_threads = elements < 16384 ? 1 : threads;
  std::atomic<bool> nan{false};
  parallel_for(args.rows * row_pieces, useful_threads, [&](int64_t first, int64_t last) {
    bool met = false;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / row_pieces, begin = (i % row_pieces) * kPiece;
      met |= piece(args, row, begin, begin + kPiece < args.columns ? begin + kPiece : args.columns);
    }
    if (met) nan.store(true, std::memory_order_relaxed);
  });
  return nan.load();
}

}  // namespace cpu
}  // namespace genfast
