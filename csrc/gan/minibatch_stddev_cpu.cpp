// minibatch_stddev for one instruction set; formulas in minibatch_stddev.h.
//
// Floor: forward reads x and writes out, backward reads x and dout and writes dx. A block of kBlock elements of all
// samples of a group is read from memory once: its mean and its squared deviations stay in the first cache, x itself in
// the first or second for the passes that follow.
#include "gan/minibatch_stddev_cpu.h"

#include "gan/lanes.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kBlock = 512;

template <typename T>
struct Rows {
  const T* x;          // element `begin` of the feature, first sample of the group
  int64_t x_step;      // from a sample of the group to the next
  int64_t map_offset;  // of dout or out: where the same element is
  int64_t map_step;
};

template <typename T>
GENFAST_INLINE Rows<T> rows_of(const MinibatchStddev& args, const StddevPiece& piece, int64_t at) {
  const int64_t sample = args.channels * args.spatial, wider = (args.channels + args.features) * args.spatial;
  const int64_t element = piece.feature * args.feature_elements() + at;
  return {static_cast<const T*>(args.x) + piece.group * sample + element, args.groups() * sample,
          piece.group * wider + element, args.groups() * wider};
}

// mean (less the first sample) and variance of `count` elements, at most kBlock; copies x to `copy` where that is not
// null.
template <typename T>
GENFAST_INLINE void moments(const MinibatchStddev& args, const Rows<T>& rows, int64_t count, T* copy,
                            typename Lanes<T>::S* mean, typename Lanes<T>::S* variance) {
  typedef typename Lanes<T>::S S;
  constexpr int kCount = Lanes<T>::kCount;
  const auto zero = broadcast(S(0)), share = broadcast(static_cast<S>(1.0 / static_cast<double>(args.size)));
  // Deviations from the first sample: a mean that is large beside them costs no digits.
  for (int64_t g = 0; g < args.size; ++g) {
    const T* const x = rows.x + g * rows.x_step;
    T* const to = copy == nullptr ? nullptr : copy + g * rows.map_step;
    for (int64_t i = 0; i < count; i += kCount) {
      const auto value = load_upto(x + i, count - i);
      if (to != nullptr) store_upto(to + i, value, count - i);
      const auto total = (g == 0 ? zero : load_upto(mean + i, kCount)) + (value - load_upto(rows.x + i, count - i));
      store_upto(mean + i, g + 1 == args.size ? total * share : total, kCount);
    }
  }
  for (int64_t g = 0; g < args.size; ++g) {
    const T* const x = rows.x + g * rows.x_step;
    for (int64_t i = 0; i < count; i += kCount) {
      const auto deviation =
          (load_upto(x + i, count - i) - load_upto(rows.x + i, count - i)) - load_upto(mean + i, kCount);
      const auto total = fma(deviation, deviation, g == 0 ? zero : load_upto(variance + i, kCount));
      store_upto(variance + i, g + 1 == args.size ? total * share : total, kCount);
    }
  }
}

template <typename T>
double forward(const MinibatchStddev& args, const StddevPiece& piece) {
  typedef typename Lanes<T>::S S;
  constexpr int kCount = Lanes<T>::kCount;
  S mean[kBlock + 16], variance[kBlock + 16];
  const auto eps = broadcast(static_cast<S>(args.eps));
  double total = 0.0;
  for (int64_t at = piece.begin; at < piece.end; at += kBlock) {
    const int64_t count = piece.end - at < kBlock ? piece.end - at : kBlock;
    const Rows<T> rows = rows_of<T>(args, piece, at);
    moments<T>(args, rows, count, static_cast<T*>(args.out) + rows.map_offset, mean, variance);
    auto sums = broadcast(S(0));
    for (int64_t i = 0; i < count; i += kCount) {
      const auto sd = sqrt(load_upto(variance + i, kCount) + eps);
      if (count - i >= kCount) {
        sums = sums + sd;
      } else {
        S lanes[kCount];
        store_upto(lanes, sd, kCount);
        for (int64_t k = 0; k < count - i; ++k) total += static_cast<double>(lanes[k]);
      }
    }
    total += static_cast<double>(sum(sums));
  }
  return total;
}

template <typename T>
void backward(const MinibatchStddev& args, const StddevPiece& piece, double factor) {
  typedef typename Lanes<T>::S S;
  constexpr int kCount = Lanes<T>::kCount;
  S mean[kBlock + 16], slope[kBlock + 16];
  const auto eps = broadcast(static_cast<S>(args.eps)), along = broadcast(static_cast<S>(factor));
  for (int64_t at = piece.begin; at < piece.end; at += kBlock) {
    const int64_t count = piece.end - at < kBlock ? piece.end - at : kBlock;
    const Rows<T> rows = rows_of<T>(args, piece, at);
    moments<T>(args, rows, count, nullptr, mean, slope);
    for (int64_t i = 0; i < count; i += kCount) {
      store_upto(slope + i, div(along, sqrt(load_upto(slope + i, kCount) + eps)), kCount);
    }
    const T* const dout = static_cast<const T*>(args.dout) + rows.map_offset;
    T* const dx = static_cast<T*>(args.out) + (rows.x - static_cast<const T*>(args.x));
    for (int64_t g = 0; g < args.size; ++g) {
      const T* const x = rows.x + g * rows.x_step;
      for (int64_t i = 0; i < count; i += kCount) {
        const auto deviation =
            (load_upto(x + i, count - i) - load_upto(rows.x + i, count - i)) - load_upto(mean + i, kCount);
        const auto value =
            fma(deviation, load_upto(slope + i, kCount), load_upto(dout + g * rows.map_step + i, count - i));
        store_upto(dx + g * rows.x_step + i, value, count - i);
      }
    }
  }
}

template <typename T>
int64_t map_at(const MinibatchStddev& args, int64_t sample, int64_t feature) {
  return (sample * (args.channels + args.features) + args.channels + feature) * args.spatial;
}

template <typename T>
void write_map(const MinibatchStddev& args, int64_t sample, int64_t feature, double y) {
  T* const map = static_cast<T*>(args.out) + map_at<T>(args, sample, feature);
  const auto value = broadcast(static_cast<typename Lanes<T>::S>(y));
  for (int64_t i = 0; i < args.spatial; i += Lanes<T>::kCount) store_upto(map + i, value, args.spatial - i);
}

template <typename T>
double map_sum(const MinibatchStddev& args, int64_t sample, int64_t feature) {
  typedef typename Lanes<T>::S S;
  const T* const map = static_cast<const T*>(args.dout) + map_at<T>(args, sample, feature);
  double total = 0.0;
  for (int64_t block = 0; block < args.spatial; block += kBlock) {
    const int64_t stop = block + kBlock < args.spatial ? block + kBlock : args.spatial;
    auto sums = broadcast(S(0));
    for (int64_t i = block; i < stop; i += Lanes<T>::kCount) sums = sums + load_upto(map + i, stop - i);
    total += static_cast<double>(sum(sums));
  }
  return total;
}

}  // namespace

double minibatch_stddev_piece(const MinibatchStddev& args, const StddevPiece& piece) {
  double total = 0.0;
  GENFAST_BY_DTYPE(args.dtype, total = forward<T>(args, piece))
  return total;
}

void minibatch_stddev_map(const MinibatchStddev& args, int64_t sample, int64_t feature, double y) {
  GENFAST_BY_DTYPE(args.dtype, write_map<T>(args, sample, feature, y))
}

double minibatch_stddev_map_sum(const MinibatchStddev& args, int64_t sample, int64_t feature) {
  double total = 0.0;
  GENFAST_BY_DTYPE(args.dtype, total = map_sum<T>(args, sample, feature))
  return total;
}

void minibatch_stddev_backward_piece(const MinibatchStddev& args, const StddevPiece& piece, double factor) {
  GENFAST_BY_DTYPE(args.dtype, backward<T>(args, piece, factor))
}

}  // namespace GENFAST_ISA
}  // namespace genfast
