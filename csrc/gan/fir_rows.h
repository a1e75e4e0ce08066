// Rows of an upsampling, filtering and downsampling (fir_axis.h) for one instruction set: rows are combined into the
// phases of a buffer, and outputs are made from them. Sums are float32, float64 for float64.
#pragma once

#include "gan/fir_axis.h"
#include "gan/lanes.h"

namespace genfast {
namespace GENFAST_ISA {

// ---- rows into the buffer ----

// Element p of the weighted sum of rows, of which `count` elements are left from p on; zero where none are.
// kRows: their number, 0 for any.
template <int kRows, typename T>
GENFAST_INLINE typename Lanes<T>::V weighted(const T* p, int64_t stride, const typename Lanes<T>::V* w,
                                             const typename Lanes<T>::S* weights, int64_t rows, int64_t count) {
  using V = typename Lanes<T>::V;
  if (count <= 0) return broadcast(typename Lanes<T>::S{0});
  if (kRows == 0) {
    V total = load_upto(p, count) * broadcast(weights[0]);
    for (int64_t j = 1; j < rows; ++j) total = fma(load_upto(p + j * stride, count), broadcast(weights[j]), total);
    return total;
  }
  V total = load_upto(p, count) * w[0];
#pragma GCC unroll 8
  for (int j = 1; j < kRows; ++j) total = fma(load_upto(p + j * stride, count), w[j], total);
  return total;
}

// Elements 0 ... count - 1 go to places at, at + 1, ... of the buffer (place = down index + phase), at >= 0; value(i,
// left) gives a vector of them from i on, of which `left` are there: the others, and those of left <= 0, must be zero.
// Up to 2 vectors of zeros follow the last element, which the pitch has room for.
template <typename A, typename Value>
GENFAST_INLINE void place(const Value& value, int64_t count, int64_t at, const FirAxis<A>& axis, A* buffer) {
  using V = typename Lanes<A>::V;
  constexpr int kCount = Lanes<A>::kCount;
  if (axis.down == 1) {
    A* const to = buffer + at;
    int64_t i = 0;
    for (; i + kCount <= count; i += kCount) store(to + i, value(i, kCount));
    if (i < count) store(to + i, value(i, count - i));
  } else if (axis.down == 2) {
    A* const even_to = buffer + at % 2 * axis.pitch + at / 2;
    A* const odd_to = buffer + (at + 1) % 2 * axis.pitch + (at + 1) / 2;
    V even, odd;
    int64_t i = 0;
    for (; i + 2 * kCount <= count; i += 2 * kCount) {
      unzip(value(i, kCount), value(i + kCount, kCount), &even, &odd);
      store(even_to + i / 2, even);
      store(odd_to + i / 2, odd);
    }
    if (i < count) {
      unzip(value(i, count - i), value(i + kCount, count - i - kCount), &even, &odd);
      store(even_to + i / 2, even);
      store(odd_to + i / 2, odd);
    }
  } else {
    A lanes[kCount];
    int64_t phase = at % axis.down, index = at / axis.down;
    for (int64_t i = 0; i < count; i += kCount) {
      store(lanes, value(i, count - i));
      for (int64_t l = 0; l < kCount && i + l < count; ++l) {
        buffer[phase * axis.pitch + index] = lanes[l];
        if (++phase == axis.down) phase = 0, ++index;
      }
    }
  }
}

// x: `count` elements of `rows` > 0 rows, whose weighted sum goes into the buffer.
template <int kRows, typename T, typename A>
GENFAST_INLINE void combine_rows(const T* x, int64_t stride, const A* weights, int64_t rows, int64_t count, int64_t at,
                                 const FirAxis<A>& axis, A* buffer) {
  typename Lanes<T>::V w[kRows == 0 ? 1 : kRows];
  for (int j = 0; j < kRows; ++j) w[j] = broadcast(weights[j]);
  const auto value = [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    return weighted<kRows>(x + i, stride, w, weights, rows, left);
  };
  place(value, count, at, axis, buffer);
}

template <typename T, typename A>
GENFAST_NOINLINE void combine(const T* x, int64_t stride, const A* weights, int64_t rows, int64_t count, int64_t at,
                              const FirAxis<A>& axis, A* buffer) {
  switch (rows) {
    case 1:
      return combine_rows<1>(x, stride, weights, rows, count, at, axis, buffer);
    case 2:
      return combine_rows<2>(x, stride, weights, rows, count, at, axis, buffer);
    case 3:
      return combine_rows<3>(x, stride, weights, rows, count, at, axis, buffer);
    case 4:
      return combine_rows<4>(x, stride, weights, rows, count, at, axis, buffer);
    default:
      return combine_rows<0>(x, stride, weights, rows, count, at, axis, buffer);
  }
}

// ---- outputs from the buffer ----

// Outputs of phase `phase` for the q of one vector; kTaps: their number, 0 for any.
template <int kTaps, typename A>
GENFAST_INLINE typename Lanes<A>::V filtered(const A* at, const FirPhase<A>& phase, const typename Lanes<A>::V* w,
                                             const int64_t* offsets) {
  using V = typename Lanes<A>::V;
  if (kTaps == 0) {
    V total = broadcast(A{0});
    for (int64_t j = 0; j < phase.count; ++j)
      total = fma(load(at + phase.offsets[j]), broadcast(phase.weights[j]), total);
    return total;
  }
  V total = load(at + offsets[0]) * w[0];
#pragma GCC unroll 16
  for (int j = 1; j < kTaps; ++j) total = fma(load(at + offsets[j]), w[j], total);
  return total;
}

// Outputs of q0 ... q0 + groups - 1 into the row `out` of which `left` elements remain, from a buffer whose first
// group is q0. kUp 1 or 2: the phases, of kTaps taps each (0 for any); kUp 0: any.
template <int kUp, int kTaps, typename T, typename A>
GENFAST_INLINE void emit_row(const FirAxis<A>& axis, const A* buffer, int64_t groups, int64_t left, T* out) {
  using V = typename Lanes<A>::V;
  constexpr int kCount = Lanes<A>::kCount, kPhases = kUp == 0 ? 1 : kUp, kHeld = kTaps == 0 ? 1 : kTaps;
  V w[kPhases][kHeld];
  int64_t offsets[kPhases][kHeld];
  for (int r = 0; r < kUp; ++r) {
    for (int j = 0; j < kTaps; ++j) {
      w[r][j] = broadcast(axis.phases[r].weights[j]);
      offsets[r][j] = axis.phases[r].offsets[j];
    }
  }
  if (kUp == 1) {
    int64_t q = 0;
    for (; q + kCount <= left; q += kCount)
      store(out + q, filtered<kTaps>(buffer + q, axis.phases[0], w[0], offsets[0]));
    if (q < left) store_upto(out + q, filtered<kTaps>(buffer + q, axis.phases[0], w[0], offsets[0]), left - q);
  } else if (kUp == 2) {
    V low, high;
    int64_t q = 0;
    for (; 2 * (q + kCount) <= left; q += kCount) {
      zip(filtered<kTaps>(buffer + q, axis.phases[0], w[0], offsets[0]),
          filtered<kTaps>(buffer + q, axis.phases[1], w[kPhases - 1], offsets[kPhases - 1]), &low, &high);
      store(out + 2 * q, low);
      store(out + 2 * q + kCount, high);
    }
    if (2 * q < left) {
      zip(filtered<kTaps>(buffer + q, axis.phases[0], w[0], offsets[0]),
          filtered<kTaps>(buffer + q, axis.phases[1], w[kPhases - 1], offsets[kPhases - 1]), &low, &high);
      store_upto(out + 2 * q, low, left - 2 * q);
      if (left > 2 * q + kCount) store_upto(out + 2 * q + kCount, high, left - 2 * q - kCount);
    }
  } else {
    T lanes[kCount];
    for (int64_t r = 0; r < axis.up; ++r) {
      for (int64_t q = 0; q < groups; q += kCount) {
        store(lanes, filtered<0>(buffer + q, axis.phases[r], w[0], offsets[0]));
        for (int64_t l = 0; l < kCount && axis.up * (q + l) + r < left; ++l) out[axis.up * (q + l) + r] = lanes[l];
      }
    }
  }
}

template <typename A>
GENFAST_INLINE void fill_zero(A* to, int64_t count) {
  memset(to, 0, sizeof(A) * static_cast<size_t>(count));
}

GENFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GENFAST_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// The part of a row that a tile from group q0 on reads, and its place in the buffer.
struct RowPart {
  int64_t first, count, at;
};
template <typename A>
GENFAST_INLINE RowPart row_part(const FirAxis<A>& axis, int64_t q0, int64_t groups) {
  const int64_t base = axis.down * (q0 + axis.low);
  const int64_t first = most(base, 0), last = least(axis.inputs, base + axis.down * (groups - 1 + axis.reach));
  return {first, last - first, first - base};
}

// The rows that output row `row` reads: the first one in memory, how many, and the first of their weights.
struct RowsRead {
  int64_t first, count, skipped;
};
template <typename A>
GENFAST_INLINE RowsRead rows_read(const FirAxis<A>& axis, int64_t row) {
  const FirPhase<A>& phase = axis.phases[row % axis.up];
  const int64_t first = row / axis.up * axis.down + phase.first;
  const int64_t skipped = first < 0 ? -first : 0;
  return {first + skipped, least(phase.count, axis.inputs - first) - skipped, skipped};
}

}  // namespace GENFAST_ISA
}  // namespace genfast
