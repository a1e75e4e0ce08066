// rotary for one instruction set; formulas in rotary.h. A row is read once and written once; the tables of a piece stay
// in the first cache while its heads pass.
#include "transformer/rotary_cpu.h"

#include "common/vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

template <bool kInverse>
GENFAST_INLINE void turn(VecF a, VecF b, VecF c, VecF s, VecF* out_a, VecF* out_b) {
  *out_a = kInverse ? a * c + b * s : a * c - b * s;
  *out_b = kInverse ? b * c - a * s : b * c + a * s;
}

template <bool kInverse, typename T>
GENFAST_INLINE void turn_halves(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
  VecF a, b;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    turn<kInverse>(load(x + i), load(x + half + i), load(cos + i), load(sin + i), &a, &b);
    store(out + i, a);
    store(out + half + i, b);
  }
  if (i < half) {
    const int count = static_cast<int>(half - i);
    turn<kInverse>(load_part(x + i, count), load_part(x + half + i, count), load_part(cos + i, count),
                   load_part(sin + i, count), &a, &b);
    store_part(out + i, a, count);
    store_part(out + half + i, b, count);
  }
}

template <bool kInverse, typename T>
GENFAST_INLINE void turn_pairs(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
  VecF low, high, a, b;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    unzip(load(x + 2 * i), load(x + 2 * i + kWidth), &a, &b);
    turn<kInverse>(a, b, load(cos + i), load(sin + i), &a, &b);
    zip(a, b, &low, &high);
    store(out + 2 * i, low);
    store(out + 2 * i + kWidth, high);
  }
  if (i < half) {
    const int count = static_cast<int>(half - i), above = 2 * count > kWidth ? 2 * count - kWidth : 0;
    low = load_upto(x + 2 * i, 2 * count);
    high = above == 0 ? broadcast(0.0f) : load_part(x + 2 * i + kWidth, above);
    unzip(low, high, &a, &b);
    turn<kInverse>(a, b, load_part(cos + i, count), load_part(sin + i, count), &a, &b);
    zip(a, b, &low, &high);
    store_upto(out + 2 * i, low, 2 * count);
    if (above != 0) store_part(out + 2 * i + kWidth, high, above);
  }
}

template <bool kInverse, bool kInterleaved>
GENFAST_INLINE void turn_row(const double* x, double* out, const double* cos, const double* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const int64_t at_a = kInterleaved ? 2 * i : i, at_b = kInterleaved ? 2 * i + 1 : half + i;
    const double a = x[at_a], b = x[at_b], c = cos[i], s = kInverse ? -sin[i] : sin[i];
    out[at_a] = a * c - b * s;
    out[at_b] = b * c + a * s;
  }
}

template <bool kInverse, bool kInterleaved, typename T>
GENFAST_INLINE void turn_row(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
  if (kInterleaved) {
    turn_pairs<kInverse>(x, out, cos, sin, half);
  } else {
    turn_halves<kInverse>(x, out, cos, sin, half);
  }
}

template <typename T, typename Table, bool kInverse, bool kInterleaved>
GENFAST_NOINLINE void rows(const Rotary& args, const RotaryPiece& piece) {
  const T* const x = static_cast<const T*>(args.x) + piece.batch * args.x_batch;
  T* const out = static_cast<T*>(args.out) + piece.batch * args.out_batch;
  const Table* const cos = static_cast<const Table*>(args.cos) + piece.batch * args.cos_batch;
  const Table* const sin = static_cast<const Table*>(args.sin) + piece.batch * args.sin_batch;
  const int64_t rest = args.dim - 2 * args.half;
  const bool heads_inside = args.x_head < args.x_row;
  const int64_t heads = piece.head_end - piece.head, count = piece.row_end - piece.row;
  for (int64_t outer = 0; outer < (heads_inside ? count : heads); ++outer) {
    for (int64_t inner = 0; inner < (heads_inside ? heads : count); ++inner) {
      const int64_t row = piece.row + (heads_inside ? outer : inner);
      const int64_t head = piece.head + (heads_inside ? inner : outer);
      const int64_t position = args.position(piece.batch, row);
      const T* const from = x + head * args.x_head + row * args.x_row;
      T* const to = out + head * args.out_head + row * args.out_row;
      turn_row<kInverse, kInterleaved>(from, to, cos + position * args.cos_row, sin + position * args.sin_row,
                                       args.half);
      if (rest != 0) memcpy(to + 2 * args.half, from + 2 * args.half, sizeof(T) * static_cast<size_t>(rest));
    }
  }
}

template <typename T, typename Table>
void piece_of(const Rotary& args, const RotaryPiece& piece) {
  if (args.interleaved) {
    args.inverse ? rows<T, Table, true, true>(args, piece) : rows<T, Table, false, true>(args, piece);
  } else {
    args.inverse ? rows<T, Table, true, false>(args, piece) : rows<T, Table, false, false>(args, piece);
  }
}

}  // namespace

void rotary_piece(const Rotary& args, const RotaryPiece& piece) {
  switch (args.dtype) {
    case DType::kFloat64:
      return piece_of<double, double>(args, piece);
    case DType::kBFloat16:
      return piece_of<BFloat16, float>(args, piece);
    case DType::kFloat16:
      return piece_of<Float16, float>(args, piece);
    default:
      return piece_of<float, float>(args, piece);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
