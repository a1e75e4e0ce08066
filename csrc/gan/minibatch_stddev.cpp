// Cuts features into pieces whose size does not depend on the number of threads, and adds their sums in order.
#include "gan/minibatch_stddev.h"

#include <cstddef>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "gan/minibatch_stddev_cpu.h"

namespace genfast {
namespace cpu {
namespace {

constexpr int64_t kPiece = 16384;  // elements of x a piece, of all samples of the group together

// Pieces of every group and feature, those of one feature in order.
class Pieces {
 public:
  explicit Pieces(const MinibatchStddev& args)
      : features_(args.features), elements_(args.feature_elements()), size_(kPiece / args.size) {
    size_ = size_ < 512 ? 512 : size_ / 64 * 64;
    each_ = (elements_ + size_ - 1) / size_;
    count_ = args.groups() * features_ * each_;
  }
  int64_t count() const { return count_; }
  int64_t each() const { return each_; }
  StddevPiece operator[](int64_t i) const {
    const int64_t begin = i % each_ * size_, end = begin + size_;
    return {i / each_ / features_, i / each_ % features_, begin, end < elements_ ? end : elements_};
  }

 private:
  int64_t features_, elements_, size_, each_, count_;
};

int threads_for(const MinibatchStddev& args, int threads) {
  return args.batch * args.channels * args.spatial < 16384 ? 1 : threads;
}

}  // namespace

void minibatch_stddev(const MinibatchStddev& args, int threads) {
  threads = threads_for(args, threads);
  const int64_t maps = args.batch * args.features;
  advise_huge_pages(args.out, args.batch * (args.channels + args.features) * args.spatial * bytes_of(args.dtype));
  const Pieces pieces(args);
  std::vector<double> sums(static_cast<size_t>(pieces.count()));
  auto* const piece = GENFAST_FOR_ISA(minibatch_stddev_piece);
  parallel_for(pieces.count(), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) sums[static_cast<size_t>(i)] = piece(args, pieces[i]);
  });
  const size_t each = static_cast<size_t>(pieces.each());
  std::vector<double> means(static_cast<size_t>(args.groups() * args.features), 0.0);
  for (size_t i = 0; i < means.size(); ++i) {
    for (size_t k = 0; k < each; ++k) means[i] += sums[i * each + k];
    means[i] /= static_cast<double>(args.feature_elements());
  }
  auto* const map = GENFAST_FOR_ISA(minibatch_stddev_map);
  parallel_for(maps, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t sample = i / args.features, feature = i % args.features;
      map(args, sample, feature, means[static_cast<size_t>(sample % args.groups() * args.features + feature)]);
    }
  });
}

void minibatch_stddev_backward(const MinibatchStddev& args, int threads) {
  threads = threads_for(args, threads);
  advise_huge_pages(args.out, args.batch * args.channels * args.spatial * bytes_of(args.dtype));
  const int64_t maps = args.batch * args.features;
  std::vector<double> sums(static_cast<size_t>(maps)), factors(static_cast<size_t>(args.groups() * args.features), 0.0);
  auto* const map_sum = GENFAST_FOR_ISA(minibatch_stddev_map_sum);
  parallel_for(maps, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      sums[static_cast<size_t>(i)] = map_sum(args, i / args.features, i % args.features);
    }
  });
  const double scale = 1.0 / (static_cast<double>(args.size) * static_cast<double>(args.feature_elements()));
  for (int64_t i = 0; i < maps; ++i) {
    const int64_t group = i / args.features % args.groups();
    factors[static_cast<size_t>(group * args.features + i % args.features)] += scale * sums[static_cast<size_t>(i)];
  }
  const Pieces pieces(args);
  auto* const piece = GENFAST_FOR_ISA(minibatch_stddev_backward_piece);
  parallel_for(pieces.count(), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const StddevPiece p = pieces[i];
      piece(args, p, factors[static_cast<size_t>(p.group * args.features + p.feature)]);
    }
  });
}

}  // namespace cpu
}  // namespace genfast
