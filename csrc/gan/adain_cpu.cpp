// instance_norm for one instruction set; formulas in adain.h.
//
// Floor: forward reads x and writes out, backward reads x and dout and writes dx. A plane is read for its mean, for its
// deviations and for the result: from memory once where it fits the caches. Sums are short float sums (blocks of 64
// vectors), their total float64.
#include "gan/adain_cpu.h"

#include "gan/lanes.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

// The total over [0, size) of value(i, count): lanes beyond count must be zero.
template <typename T, typename Value>
GENFAST_INLINE double total_of(int64_t size, const Value& value) {
  typedef typename Lanes<T>::S S;
  constexpr int64_t kCount = Lanes<T>::kCount, kBlock = 64 * kCount;
  double total = 0.0;
  for (int64_t block = 0; block < size; block += kBlock) {
    const int64_t stop = block + kBlock < size ? block + kBlock : size;
    auto even = broadcast(S(0)), odd = even;
    int64_t i = block;
    for (; i + 2 * kCount <= stop; i += 2 * kCount) {
      even = even + value(i, kCount);
      odd = odd + value(i + kCount, kCount);
    }
    for (; i < stop; i += kCount) even = even + value(i, stop - i);
    total += static_cast<double>(sum(even + odd));
  }
  return total;
}

// The sum of the squares of (x - first - offset); lanes beyond the end would not be zero and are added one by one.
template <typename T>
GENFAST_INLINE double squares_of(const T* x, int64_t size, typename Lanes<T>::S first, typename Lanes<T>::S offset) {
  typedef typename Lanes<T>::S S;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const auto shift = broadcast(first), mean = broadcast(offset);
  const int64_t whole = size / kCount * kCount;
  double total = total_of<T>(whole, [&](int64_t i, int64_t) {
    const auto deviation = (load_upto(x + i, kCount) - shift) - mean;
    return deviation * deviation;
  });
  if (whole < size) {
    S lanes[kCount];
    store_upto(lanes, (load_upto(x + whole, size - whole) - shift) - mean, kCount);
    for (int64_t k = 0; k < size - whole; ++k) total += static_cast<double>(lanes[k]) * static_cast<double>(lanes[k]);
  }
  return total;
}

template <typename T>
GENFAST_INLINE typename Lanes<T>::S first_of(const T* x) {
  typename Lanes<T>::S lanes[Lanes<T>::kCount];
  store_upto(lanes, load_upto(x, 1), Lanes<T>::kCount);
  return lanes[0];
}

template <typename T>
void forward(const InstanceNorm& args, int64_t begin, int64_t end) {
  typedef typename Lanes<T>::S S;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t size = args.size, whole = size / kCount * kCount;
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const x = static_cast<const T*>(args.x) + plane * size;
    T* const out = static_cast<T*>(args.out) + plane * size;
    const S first = first_of(x);
    const auto shift = broadcast(first);
    double mean = total_of<T>(whole, [&](int64_t i, int64_t) { return load_upto(x + i, kCount) - shift; });
    if (whole < size) {
      S lanes[kCount];
      store_upto(lanes, load_upto(x + whole, size - whole) - shift, kCount);
      for (int64_t k = 0; k < size - whole; ++k) mean += static_cast<double>(lanes[k]);
    }
    const S offset = static_cast<S>(mean / static_cast<double>(size));
    const double variance = squares_of(x, size, first, offset) / static_cast<double>(size);
    const S rstd = static_cast<S>(1.0 / ::sqrt(variance + args.eps));
    static_cast<S*>(args.offset)[plane] = offset;
    static_cast<S*>(args.rstd)[plane] = rstd;
    const S scale = args.scale == nullptr ? S(1) : static_cast<const S*>(args.scale)[plane];
    const auto factor = broadcast(scale * rstd), center = broadcast(offset);
    const auto bias = broadcast(args.shift == nullptr ? S(0) : static_cast<const S*>(args.shift)[plane]);
    for (int64_t i = 0; i < size; i += kCount) {
      store_upto(out + i, fma((load_upto(x + i, size - i) - shift) - center, factor, bias), size - i);
    }
  }
}

template <typename T>
void backward(const InstanceNorm& args, int64_t begin, int64_t end) {
  typedef typename Lanes<T>::S S;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t size = args.size;
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* const x = static_cast<const T*>(args.x) + plane * size;
    const T* const dout = static_cast<const T*>(args.dout) + plane * size;
    T* const dx = static_cast<T*>(args.out) + plane * size;
    const auto shift = broadcast(first_of(x)), center = broadcast(static_cast<const S*>(args.offset)[plane]);
    const S rstd = static_cast<const S*>(args.rstd)[plane];
    const double dshift = total_of<T>(size, [&](int64_t i, int64_t count) { return load_upto(dout + i, count); });
    // Lanes beyond the end have a cotangent of zero.
    const double along = static_cast<double>(rstd) * total_of<T>(size, [&](int64_t i, int64_t count) {
                           return load_upto(dout + i, count) * ((load_upto(x + i, count) - shift) - center);
                         });
    static_cast<S*>(args.dscale)[plane] = static_cast<S>(along);
    static_cast<S*>(args.dshift)[plane] = static_cast<S>(dshift);
    const S scale = args.scale == nullptr ? S(1) : static_cast<const S*>(args.scale)[plane];
    const auto factor = broadcast(scale * rstd), mean = broadcast(static_cast<S>(dshift / static_cast<double>(size)));
    const auto slope = broadcast(static_cast<S>(along / static_cast<double>(size) * static_cast<double>(rstd)));
    for (int64_t i = 0; i < size; i += kCount) {
      const auto deviation = (load_upto(x + i, size - i) - shift) - center;
      store_upto(dx + i, ((load_upto(dout + i, size - i) - mean) - deviation * slope) * factor, size - i);
    }
  }
}

}  // namespace

void instance_norm_planes(const InstanceNorm& args, int64_t begin, int64_t end) {
  GENFAST_BY_DTYPE(args.dtype, forward<T>(args, begin, end))
}

void instance_norm_backward_planes(const InstanceNorm& args, int64_t begin, int64_t end) {
  GENFAST_BY_DTYPE(args.dtype, backward<T>(args, begin, end))
}

}  // namespace GENFAST_ISA
}  // namespace genfast
