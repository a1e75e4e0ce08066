// spectral_normalize for one instruction set; formulas in spectral_normalize.h.
//
// An iteration reads W once from memory: with t = W v, the product W^T u is the sum of t_r W_r divided by |t|, so that
// four rows are multiplied by v and added to the sums while they are in the cache. The scale needs sigma and reads W
// again. Floor: n + 1 reads of W and one write, n the number of iterations; backward two reads of dout, one of W, one
// write.
#include "gan/spectral_normalize_cpu.h"

#include "gan/lanes.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int kRows = 4;  // rows that share the loads of v and of the sums

// total[r] += segment r of kRows times v.
template <typename T, typename S>
GENFAST_INLINE void multiply(const T* const segments[kRows], const S* v, int64_t inner, typename Lanes<T>::V* totals) {
  for (int64_t i = 0; i < inner; i += Lanes<T>::kCount) {
    const typename Lanes<T>::V right = load_upto(v + i, inner - i);
    for (int r = 0; r < kRows; ++r) totals[r] = fma(load_upto(segments[r] + i, inner - i), right, totals[r]);
  }
}

template <typename T, typename S>
GENFAST_INLINE void accumulate(const T* const segments[kRows], const S* factors, int64_t inner, bool first, S* sums) {
  const auto zero = broadcast(S(0));
  for (int64_t i = 0; i < inner; i += Lanes<T>::kCount) {
    auto total = first ? zero : load_upto(sums + i, inner - i);
    for (int r = 0; r < kRows; ++r) total = fma(load_upto(segments[r] + i, inner - i), broadcast(factors[r]), total);
    store_upto(sums + i, total, inner - i);
  }
}

template <typename T>
GENFAST_NOINLINE void products(const SpectralLayer& layer, const void* v_any, int64_t begin, int64_t end,
                               void* product_any, void* sums_any) {
  typedef typename Lanes<T>::S S;
  const T* const weight = static_cast<const T*>(layer.weight);
  const S* const v = static_cast<const S*>(v_any);
  S* const product = static_cast<S*>(product_any);
  S* const sums = static_cast<S*>(sums_any);
  const int64_t inner = layer.inner, stride = layer.rows * inner;
  for (int64_t row = begin; row < end; row += kRows) {
    // Past the end the last row stands in: its product is not stored and its factor is zero.
    const T* starts[kRows];
    for (int r = 0; r < kRows; ++r) starts[r] = weight + (row + r < end ? row + r : end - 1) * inner;
    typename Lanes<T>::V totals[kRows];
    for (int r = 0; r < kRows; ++r) totals[r] = broadcast(S(0));
    for (int64_t o = 0; o < layer.outer; ++o) {
      const T* segments[kRows];
      for (int r = 0; r < kRows; ++r) segments[r] = starts[r] + o * stride;
      multiply(segments, v + o * inner, inner, totals);
    }
    S factors[kRows];
    for (int r = 0; r < kRows; ++r) {
      factors[r] = row + r < end ? sum(totals[r]) : S(0);
      if (row + r < end) product[row + r] = factors[r];
    }
    if (sums == nullptr) continue;
    for (int64_t o = 0; o < layer.outer; ++o) {
      const T* segments[kRows];
      for (int r = 0; r < kRows; ++r) segments[r] = starts[r] + o * stride;
      accumulate(segments, factors, inner, row == begin, sums + o * inner);
    }
  }
}

template <typename T>
double columns(const void* parts_any, int64_t count, int64_t stride, int64_t begin, int64_t end, void* out_any) {
  typedef typename Lanes<T>::S S;
  const S* const parts = static_cast<const S*>(parts_any);
  S* const out = static_cast<S*>(out_any);
  double squares = 0.0;
  for (int64_t c = begin; c < end; c += Lanes<T>::kCount) {
    auto total = load_upto(parts + c, end - c);
    for (int64_t part = 1; part < count; ++part) total = total + load_upto(parts + part * stride + c, end - c);
    store_upto(out + c, total, end - c);
    const int64_t stop = c + Lanes<T>::kCount < end ? c + Lanes<T>::kCount : end;
    for (int64_t i = c; i < stop; ++i) squares += static_cast<double>(out[i]) * static_cast<double>(out[i]);
  }
  return squares;
}

template <typename T>
void scale(const SpectralLayer& layer, double sigma, int64_t begin, int64_t end) {
  typedef typename Lanes<T>::S S;
  const T* const weight = static_cast<const T*>(layer.weight);
  T* const out = static_cast<T*>(layer.out);
  const auto divisor = broadcast(static_cast<S>(sigma));
  for (int64_t i = begin; i < end; i += Lanes<T>::kCount)
    store_upto(out + i, div(load_upto(weight + i, end - i), divisor), end - i);
}

template <typename T>
double dot(const SpectralLayer& layer, int64_t begin, int64_t end) {
  typedef typename Lanes<T>::S S;
  constexpr int kCount = Lanes<T>::kCount;
  const T* const weight = static_cast<const T*>(layer.weight);
  const T* const dout = static_cast<const T*>(layer.dout);
  double total = 0.0;
  for (int64_t block = begin; block < end; block += 64 * kCount) {  // short sums in lanes, their total in double
    const int64_t stop = block + 64 * kCount < end ? block + 64 * kCount : end;
    typename Lanes<T>::V even = broadcast(S(0)), odd = even;
    for (int64_t i = block; i < stop; i += 2 * kCount) {
      even = fma(load_upto(weight + i, stop - i), load_upto(dout + i, stop - i), even);
      if (i + kCount >= stop) break;
      odd =
          fma(load_upto(weight + i + kCount, stop - i - kCount), load_upto(dout + i + kCount, stop - i - kCount), odd);
    }
    total += static_cast<double>(sum(even + odd));
  }
  return total;
}

template <typename T>
void gradient(const SpectralLayer& layer, double sigma, double along, int64_t begin, int64_t end) {
  typedef typename Lanes<T>::S S;
  const T* const dout = static_cast<const T*>(layer.dout);
  T* const out = static_cast<T*>(layer.out);
  const S* const u = static_cast<const S*>(layer.u);
  const S* const v = static_cast<const S*>(layer.v);
  const int64_t inner = layer.inner;
  const auto divisor = broadcast(static_cast<S>(sigma));
  for (int64_t segment = begin; segment < end; ++segment) {
    const auto factor = broadcast(static_cast<S>(-along * static_cast<double>(u[segment % layer.rows])));
    const S* const columns_of = v + segment / layer.rows * inner;
    const T* const from = dout + segment * inner;
    T* const to = out + segment * inner;
    for (int64_t i = 0; i < inner; i += Lanes<T>::kCount) {
      const auto value = fma(factor, load_upto(columns_of + i, inner - i), load_upto(from + i, inner - i));
      store_upto(to + i, div(value, divisor), inner - i);
    }
  }
}

}  // namespace

void spectral_products(DType dtype, const SpectralLayer& layer, const void* v, int64_t begin, int64_t end,
                       void* product, void* sums) {
  GENFAST_BY_DTYPE(dtype, products<T>(layer, v, begin, end, product, sums))
}

double spectral_columns(DType dtype, const void* parts, int64_t count, int64_t stride, int64_t begin, int64_t end,
                        void* out) {
  return dtype == DType::kFloat64 ? columns<double>(parts, count, stride, begin, end, out)
                                  : columns<float>(parts, count, stride, begin, end, out);
}

void spectral_scale(DType dtype, const SpectralLayer& layer, double sigma, int64_t begin, int64_t end) {
  GENFAST_BY_DTYPE(dtype, scale<T>(layer, sigma, begin, end))
}

double spectral_dot(DType dtype, const SpectralLayer& layer, int64_t begin, int64_t end) {
  double total = 0.0;
  GENFAST_BY_DTYPE(dtype, total = dot<T>(layer, begin, end))
  return total;
}

void spectral_gradient(DType dtype, const SpectralLayer& layer, double sigma, double along, int64_t begin,
                       int64_t end) {
  GENFAST_BY_DTYPE(dtype, gradient<T>(layer, sigma, along, begin, end))
}

}  // namespace GENFAST_ISA
}  // namespace genfast
