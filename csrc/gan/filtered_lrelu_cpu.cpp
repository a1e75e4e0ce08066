// filtered_lrelu for one instruction set; formulas in filtered_lrelu.h. A row of the middle is made from the few input
// rows that it meets, passed through act (or multiplied by act' of the gate's row), and filtered along itself at once;
// a ring keeps the last of these short rows, from which the output rows are summed. The upsampled plane exists one row
// at a time, in the first cache.
#include "gan/filtered_lrelu_cpu.h"

#include "gan/fir_rows.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

// then where a > 0, other elsewhere.
GENFAST_INLINE VecD where_positive(VecD a, VecD then, VecD other) { return {a.v > 0.0 ? then.v : other.v}; }
GENFAST_INLINE VecF where_positive(VecF a, VecF then, VecF other) {
  return select(less(broadcast(0.0f), a), then, other);
}

#define GENFAST_ALWAYS inline __attribute__((always_inline))

template <typename A>
struct Activation {
  using V = typename Lanes<A>::V;
  V positive, negative, limit, minus_limit, zero;

  GENFAST_ALWAYS explicit Activation(const FilteredLrelu& args)
      : positive(broadcast(static_cast<A>(args.gain))),
        negative(broadcast(static_cast<A>(args.gain * args.slope))),
        limit(broadcast(static_cast<A>(args.limit))),
        minus_limit(broadcast(static_cast<A>(-args.limit))),
        zero(broadcast(A{0})) {}

  // The bounds come first, so that a NaN stays.
  GENFAST_ALWAYS V value(V a) const { return max(minus_limit, min(limit, a * where_positive(a, positive, negative))); }
  GENFAST_ALWAYS V slope(V a) const {
    const V factor = where_positive(a, positive, negative), y = a * factor;
    const V beyond = max(y + minus_limit, minus_limit + y * broadcast(A{-1}));  // |y| - limit
    return where_positive(beyond, zero, factor);
  }
};

template <int kUp, typename A>
GENFAST_INLINE void emit_of(const FirAxis<A>& axis, const A* buffer, A* to) {
  switch (axis.taps) {
    case 1:
      return emit_row<kUp, 1>(axis, buffer, axis.groups, axis.outputs, to);
    case 2:
      return emit_row<kUp, 2>(axis, buffer, axis.groups, axis.outputs, to);
    case 4:
      return emit_row<kUp, 4>(axis, buffer, axis.groups, axis.outputs, to);
    case 6:
      return emit_row<kUp, 6>(axis, buffer, axis.groups, axis.outputs, to);
    case 12:
      return emit_row<kUp, 12>(axis, buffer, axis.groups, axis.outputs, to);
    default:
      return emit_row<kUp, 0>(axis, buffer, axis.groups, axis.outputs, to);
  }
}

// A whole row of outputs.
template <typename A>
GENFAST_NOINLINE void emit(const FirAxis<A>& axis, const A* buffer, A* to) {
  if (axis.up == 1) return emit_of<1>(axis, buffer, to);
  if (axis.up == 2) return emit_of<2>(axis, buffer, to);
  emit_row<0, 0>(axis, buffer, axis.groups, axis.outputs, to);
}

// Row `row` of the middle, `axis_x.outputs` elements into `to`, from the rows of a plane that it meets. False where it
// meets none: it is zero then, and `to` untouched.
template <typename T, typename A>
GENFAST_NOINLINE bool middle_row(const FirAxis<A>& axis_y, const FirAxis<A>& axis_x, const T* plane, A bias,
                                 int64_t row, A* buffer, A* to) {
  const RowsRead rows = rows_read(axis_y, row);
  const RowPart part = row_part(axis_x, 0, axis_x.groups);
  if (rows.count <= 0 || part.count <= 0) return false;
  const A* const weights = axis_y.phases[row % axis_y.up].weights + rows.skipped;
  combine(plane + rows.first * axis_x.inputs + part.first, axis_x.inputs, weights, rows.count, part.count, part.at,
          axis_x, buffer);
  if (bias != 0) {
    A share = 0;
    for (int64_t j = 0; j < rows.count; ++j) share += weights[j];
    const auto added = broadcast(share * bias);
    A* const at = buffer + part.at;
    int64_t i = 0;
    for (; i + Lanes<A>::kCount <= part.count; i += Lanes<A>::kCount) store(at + i, load(at + i) + added);
    if (i < part.count) store_upto(at + i, load(at + i) + added, part.count - i);
  }
  emit(axis_x, buffer, to);
  return true;
}

// The weighted sum of rows of the ring.
template <typename T, typename A>
GENFAST_INLINE void sum_rows(const A* const* rows, const A* weights, int64_t count, int64_t width, T* out) {
  constexpr int kCount = Lanes<A>::kCount;
  for (int64_t i = 0; i < width; i += kCount) {
    typename Lanes<A>::V total = load(rows[0] + i) * broadcast(weights[0]);
    for (int64_t j = 1; j < count; ++j) total = fma(load(rows[j] + i), broadcast(weights[j]), total);
    store_upto(out + i, total, width - i);
  }
}

template <typename T, typename A>
void items(const FilteredLrelu& args, const FilteredLreluPlan<A>& plan, const FilteredLreluPiece& piece) {
  const bool turned = args.mode == FilteredLrelu::kTranspose, gated = args.mode != FilteredLrelu::kForward;
  const Activation<A> act(args);
  A* const in_buffer = static_cast<A*>(piece.buffer);
  A* const gate_buffer = in_buffer + plan.in_x.buffer;
  A* const out_buffer = gate_buffer + plan.gate_x.buffer;
  A* const middle = out_buffer + plan.out_x.buffer;
  A* const gates = middle + plan.middle;
  A* const ring = gates + plan.middle;
  fill_zero(in_buffer, plan.buffer);
  const int64_t in_plane = plan.in_y.inputs * plan.in_x.inputs, gate_plane = plan.gate_y.inputs * plan.gate_x.inputs;
  const int64_t height = plan.out_y.outputs, width = plan.out_x.outputs;
  const int64_t held = plan.out_y.phases[0].count;  // rows of the ring
  const RowPart part = row_part(plan.out_x, 0, plan.out_x.groups);
  for (int64_t item = piece.first; item < piece.last; ++item) {
    const int64_t plane = item / plan.bands, channel = plane % args.channels;
    const int64_t row0 = item % plan.bands * plan.band, row_end = least(row0 + plan.band, height);
    const T* const v = static_cast<const T*>(args.v) + plane * in_plane;
    const T* const gate = gated ? static_cast<const T*>(args.gate) + plane * gate_plane : nullptr;
    const A v_bias = args.v_bias == nullptr || turned ? A{0} : static_cast<const A*>(args.v_bias)[channel];
    const A gate_bias = args.gate_bias == nullptr || !gated ? A{0} : static_cast<const A*>(args.gate_bias)[channel];
    T* out = static_cast<T*>(args.out) + (plane * height + row0) * width;
    int64_t next = 0;  // row of the middle
    for (int64_t row = row0; row < row_end; ++row, out += width) {
      const RowsRead rows = rows_read(plan.out_y, row);
      if (rows.count <= 0 || part.count <= 0) {
        memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(width));
        continue;
      }
      for (next = most(next, rows.first); next < rows.first + rows.count; ++next) {
        A* const kept = ring + next % held * plan.row;
        bool some = middle_row(plan.in_y, plan.in_x, v, v_bias, next, in_buffer, middle);
        if (some && gated) {
          const bool known = middle_row(plan.gate_y, plan.gate_x, gate, gate_bias, next, gate_buffer, gates);
          if (!known) fill_zero(gates, plan.out_x.inputs);
        }
        if (!some) {
          fill_zero(kept, width);
          continue;
        }
        const A *const from = middle + part.first, *const by = gates + part.first;
        // The lanes beyond the row are zero in `middle`, and stay so.
        if (gated) {
          place([&](int64_t i, int64_t left) __attribute__((
                    always_inline)) { return left <= 0 ? act.zero : load(from + i) * act.slope(load(by + i)); },
                part.count, part.at, plan.out_x, out_buffer);
        } else {
          place([&](int64_t i, int64_t left)
                    __attribute__((always_inline)) { return left <= 0 ? act.zero : act.value(load(from + i)); },
                part.count, part.at, plan.out_x, out_buffer);
        }
        emit(plan.out_x, out_buffer, kept);
      }
      const A* read[FilteredLrelu::kMostTaps];
      for (int64_t j = 0; j < rows.count; ++j) read[j] = ring + (rows.first + j) % held * plan.row;
      sum_rows(read, plan.out_y.phases[0].weights + rows.skipped, rows.count, width, out);
    }
  }
}

}  // namespace

void filtered_lrelu_piece(const FilteredLrelu& args, const FilteredLreluPlan<float>& plan,
                          const FilteredLreluPiece& piece) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return items<BFloat16>(args, plan, piece);
    case DType::kFloat16:
      return items<Float16>(args, plan, piece);
    default:
      return items<float>(args, plan, piece);
  }
}

void filtered_lrelu_piece_double(const FilteredLrelu& args, const FilteredLreluPlan<double>& plan,
                                 const FilteredLreluPiece& piece) {
  items<double>(args, plan, piece);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
