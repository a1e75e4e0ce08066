// upfirdn2d for one instruction set; formulas in upfirdn2d.h. An output row is a weighted sum of the few input rows
// that its taps meet, kept in the first cache, filtered along the row: x comes from memory once, out goes there once.
#include "gan/upfirdn2d_cpu.h"

#include "gan/fir_rows.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

// A row of zeros where no input row is met.
template <typename T>
GENFAST_INLINE void zero_row(T* out, int64_t count) {
  memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(count));
}

// ---- planar ----

template <int kUp, int kTaps, typename T, typename A>
GENFAST_NOINLINE void planar_items(const Upfirdn2d& args, const Upfirdn2dPlan<A>& plan, const Upfirdn2dPiece& piece) {
  const FirAxis<A>& ax = *plan.x;
  A* const buffer = static_cast<A*>(piece.buffer);
  const bool whole = ax.groups <= ax.tile;
  if (whole) fill_zero(buffer, ax.buffer);
  for (int64_t item = piece.first; item < piece.last; ++item) {
    const int64_t plane = item / plan.bands, row0 = item % plan.bands * plan.band;
    const int64_t row_end = least(row0 + plan.band, args.out_height);
    const T* const x =
        static_cast<const T*>(args.x) + plane / args.channels * args.x_batch + plane % args.channels * args.x_channel;
    T* const out = static_cast<T*>(args.out) + plane * args.out_height * args.out_width;
    for (int64_t q0 = 0; q0 < ax.groups; q0 += ax.tile) {
      const int64_t groups = least(ax.tile, ax.groups - q0), left = least(ax.up * groups, args.out_width - ax.up * q0);
      const RowPart part = row_part(ax, q0, groups);
      if (!whole) fill_zero(buffer, ax.buffer);
      for (int64_t row = row0; row < row_end; ++row) {
        const RowsRead rows = rows_read(plan.y, row);
        T* const to = out + row * args.out_width + ax.up * q0;
        if (rows.count <= 0 || part.count <= 0) {
          zero_row(to, left);
          continue;
        }
        combine(x + rows.first * args.x_row + part.first, args.x_row,
                plan.y.phases[row % plan.y.up].weights + rows.skipped, rows.count, part.count, part.at, ax, buffer);
        emit_row<kUp, kTaps>(ax, buffer, groups, left, to);
      }
    }
  }
}

// A filter that is not separable: an output row is the sum over the rows that it meets, each filtered along itself with
// weights of its own, in `sums`, [U, pitch].
template <typename T, typename A>
GENFAST_NOINLINE void planar_full_items(const Upfirdn2d& args, const Upfirdn2dPlan<A>& plan,
                                        const Upfirdn2dPiece& piece) {
  using V = typename Lanes<A>::V;
  constexpr int kCount = Lanes<A>::kCount;
  const FirAxis<A>& layout = *plan.x;
  A* const buffer = static_cast<A*>(piece.buffer);
  A* const sums = buffer + layout.buffer;
  const A one = 1;
  for (int64_t item = piece.first; item < piece.last; ++item) {
    const int64_t plane = item / plan.bands, row0 = item % plan.bands * plan.band;
    const int64_t row_end = least(row0 + plan.band, args.out_height);
    const T* const x =
        static_cast<const T*>(args.x) + plane / args.channels * args.x_batch + plane % args.channels * args.x_channel;
    T* const out = static_cast<T*>(args.out) + plane * args.out_height * args.out_width;
    for (int64_t q0 = 0; q0 < layout.groups; q0 += layout.tile) {
      const int64_t groups = least(layout.tile, layout.groups - q0);
      const int64_t left = least(layout.up * groups, args.out_width - layout.up * q0);
      const RowPart part = row_part(layout, q0, groups);
      fill_zero(buffer, layout.buffer);
      for (int64_t row = row0; row < row_end; ++row) {
        const RowsRead rows = rows_read(plan.y, row);
        T* const to = out + row * args.out_width + layout.up * q0;
        if (rows.count <= 0 || part.count <= 0) {
          zero_row(to, left);
          continue;
        }
        fill_zero(sums, layout.up * layout.pitch);
        for (int64_t j = 0; j < rows.count; ++j) {
          const A number = plan.y.phases[row % plan.y.up].weights[rows.skipped + j];
          const FirAxis<A>& ax = plan.x[static_cast<int64_t>(number)];
          combine(x + (rows.first + j) * args.x_row + part.first, args.x_row, &one, int64_t{1}, part.count, part.at, ax,
                  buffer);
          for (int64_t r = 0; r < ax.up; ++r) {
            A* const sum = sums + r * ax.pitch;
            for (int64_t q = 0; q < groups; q += kCount) {
              V total = load(sum + q);
              for (int64_t k = 0; k < ax.phases[r].count; ++k)
                total = fma(load(buffer + q + ax.phases[r].offsets[k]), broadcast(ax.phases[r].weights[k]), total);
              store(sum + q, total);
            }
          }
        }
        T lanes[kCount];
        for (int64_t r = 0; r < layout.up; ++r) {
          for (int64_t q = 0; q < groups; q += kCount) {
            store(lanes, load(sums + r * layout.pitch + q));
            for (int64_t l = 0; l < kCount && layout.up * (q + l) + r < left; ++l)
              to[layout.up * (q + l) + r] = lanes[l];
          }
        }
      }
    }
  }
}

// ---- channels last: vectors of channels ----

template <typename T, typename A>
GENFAST_NOINLINE void channel_items(const Upfirdn2d& args, const Upfirdn2dPlan<A>& plan, const Upfirdn2dPiece& piece) {
  using V = typename Lanes<A>::V;
  constexpr int kCount = Lanes<A>::kCount;
  const FirAxis<A>& ax = *plan.x;
  A* const buffer = static_cast<A*>(piece.buffer);
  FirAxis<A> flat = ax;  // pixels follow one another in the buffer
  flat.down = 1;
  for (int64_t item = piece.first; item < piece.last; ++item) {
    const int64_t row0 = item % plan.bands * plan.band, row_end = least(row0 + plan.band, args.out_height);
    const int64_t channel = item / plan.bands % plan.blocks * plan.block, batch = item / plan.bands / plan.blocks;
    const int64_t block = least(plan.block, args.channels - channel);
    const T* const x = static_cast<const T*>(args.x) + batch * args.x_batch + channel;
    T* const out = static_cast<T*>(args.out) + batch * args.out_height * args.out_width * args.channels + channel;
    for (int64_t q0 = 0; q0 < ax.groups; q0 += ax.tile) {
      const int64_t groups = least(ax.tile, ax.groups - q0), left = least(ax.up * groups, args.out_width - ax.up * q0);
      const RowPart part = row_part(ax, q0, groups);
      for (int64_t row = row0; row < row_end; ++row) {
        const RowsRead rows = rows_read(plan.y, row);
        if (args.separable && rows.count > 0 && part.count > 0) {
          const T* const from = x + rows.first * args.x_row + part.first * args.x_column;
          const A* const weights = plan.y.phases[row % plan.y.up].weights + rows.skipped;
          if (block == args.x_column) {
            combine(from, args.x_row, weights, rows.count, part.count * block, int64_t{0}, flat, buffer);
          } else {
            for (int64_t i = 0; i < part.count; ++i)
              combine(from + i * args.x_column, args.x_row, weights, rows.count, block, i * block, flat, buffer);
          }
        }
        for (int64_t o = ax.up * q0; o < ax.up * q0 + left; ++o) {
          T* const to = out + (row * args.out_width + o) * args.channels;
          const RowsRead columns = rows_read(ax, o);
          if (rows.count <= 0 || columns.count <= 0) {
            zero_row(to, block);
            continue;
          }
          for (int64_t c = 0; c < block; c += kCount) {
            V total = broadcast(A{0});
            if (args.separable) {
              const A* const w = ax.phases[o % ax.up].weights + columns.skipped;
              const A* const at = buffer + (columns.first - part.first) * block + c;
              for (int64_t k = 0; k < columns.count; ++k) total = fma(load(at + k * block), broadcast(w[k]), total);
            } else {
              for (int64_t j = 0; j < rows.count; ++j) {
                const A number = plan.y.phases[row % plan.y.up].weights[rows.skipped + j];
                const A* const w = plan.x[static_cast<int64_t>(number)].phases[o % ax.up].weights + columns.skipped;
                const T* const at = x + (rows.first + j) * args.x_row + columns.first * args.x_column + c;
                for (int64_t k = 0; k < columns.count; ++k)
                  total = fma(load_upto(at + k * args.x_column, block - c), broadcast(w[k]), total);
              }
            }
            store_upto(to + c, total, block - c);
          }
        }
      }
    }
  }
}

// ---- the choice ----

template <int kUp, typename T, typename A>
void planar_of(const Upfirdn2d& args, const Upfirdn2dPlan<A>& plan, const Upfirdn2dPiece& piece) {
  switch (plan.x->taps) {
    case 2:
      return planar_items<kUp, 2, T>(args, plan, piece);
    case 4:
      return planar_items<kUp, 4, T>(args, plan, piece);
    case 6:
      return planar_items<kUp, 6, T>(args, plan, piece);
    default:
      return planar_items<kUp, 0, T>(args, plan, piece);
  }
}

template <typename T, typename A>
void piece_of(const Upfirdn2d& args, const Upfirdn2dPlan<A>& plan, const Upfirdn2dPiece& piece) {
  if (args.channels_last) return channel_items<T>(args, plan, piece);
  if (!args.separable) return planar_full_items<T>(args, plan, piece);
  if (plan.x->up == 1) return planar_of<1, T>(args, plan, piece);
  if (plan.x->up == 2) return planar_of<2, T>(args, plan, piece);
  planar_items<0, 0, T>(args, plan, piece);
}

}  // namespace

void upfirdn2d_piece(const Upfirdn2d& args, const Upfirdn2dPlan<float>& plan, const Upfirdn2dPiece& piece) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return piece_of<BFloat16>(args, plan, piece);
    case DType::kFloat16:
      return piece_of<Float16>(args, plan, piece);
    default:
      return piece_of<float>(args, plan, piece);
  }
}

void upfirdn2d_piece_double(const Upfirdn2d& args, const Upfirdn2dPlan<double>& plan, const Upfirdn2dPiece& piece) {
  piece_of<double>(args, plan, piece);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
