// Makes the phases of the three stages and cuts the planes into bands of output rows.
#include "gan/filtered_lrelu.h"

#include <cstddef>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "gan/filtered_lrelu_cpu.h"
#include "gan/fir_plan.h"

namespace genfast {
namespace cpu {
namespace {

constexpr int64_t kWhole = int64_t{1} << 30;  // rows are not tiled

template <typename A>
using Piece = void (*)(const FilteredLrelu&, const FilteredLreluPlan<A>&, const FilteredLreluPiece&);

// The taps as they correlate; turned: those of the transpose.
template <typename A>
std::vector<double> taps_of(const void* filter, int64_t count, bool correlate, double gain) {
  const A* const from = static_cast<const A*>(filter);
  std::vector<double> taps;
  for (int64_t k = 0; k < count; ++k) taps.push_back(gain * static_cast<double>(from[correlate ? k : count - 1 - k]));
  return taps;
}

template <typename A>
void run(const FilteredLrelu& a, Piece<A> piece, int threads) {
  const bool turned = a.mode == FilteredLrelu::kTranspose;
  const double up_gain = static_cast<double>(a.up_y) * static_cast<double>(a.up_x);
  const int64_t ut = a.up_taps, dt = a.down_taps;
  // U along both axes, D, and what the transpose makes of them: factors swapped, filters turned, pad' = taps - 1 - pad.
  const auto up_y = taps_of<A>(a.up_filter, ut, a.correlate, 1.0);
  const auto up_x = taps_of<A>(a.up_filter, ut, a.correlate, up_gain);
  const auto down = taps_of<A>(a.down_filter, dt, a.correlate, 1.0);
  const auto up_y_turned = taps_of<A>(a.up_filter, ut, !a.correlate, 1.0);
  const auto up_x_turned = taps_of<A>(a.up_filter, ut, !a.correlate, up_gain);
  const auto down_turned = taps_of<A>(a.down_filter, dt, !a.correlate, 1.0);
  const FirPlan<A> gate_y(up_y, a.in_height, a.mid_height, a.up_y, 1, a.pad_y, kWhole);
  const FirPlan<A> gate_x(up_x, a.in_width, a.mid_width, a.up_x, 1, a.pad_x, kWhole);
  const FirPlan<A> spread_y(down_turned, a.out_height, a.mid_height, a.down_y, 1, dt - 1, kWhole);
  const FirPlan<A> spread_x(down_turned, a.out_width, a.mid_width, a.down_x, 1, dt - 1, kWhole);
  const FirPlan<A> down_y(down, a.mid_height, a.out_height, 1, a.down_y, 0, kWhole);
  const FirPlan<A> down_x(down, a.mid_width, a.out_width, 1, a.down_x, 0, kWhole);
  const FirPlan<A> gather_y(up_y_turned, a.mid_height, a.in_height, 1, a.up_y, ut - 1 - a.pad_y, kWhole);
  const FirPlan<A> gather_x(up_x_turned, a.mid_width, a.in_width, 1, a.up_x, ut - 1 - a.pad_x, kWhole);
  FilteredLreluPlan<A> plan = {};
  plan.gate_y = gate_y.axis(), plan.gate_x = gate_x.axis();
  plan.in_y = turned ? spread_y.axis() : gate_y.axis();
  plan.in_x = turned ? spread_x.axis() : gate_x.axis();
  plan.out_y = turned ? gather_y.axis() : down_y.axis();
  plan.out_x = turned ? gather_x.axis() : down_x.axis();
  const int64_t height = plan.out_y.outputs, width = plan.out_x.outputs, planes = a.batch * a.channels;
  plan.band = planes >= 4 * threads ? height : (height * planes + 4 * threads - 1) / (4 * threads);
  plan.band = plan.band < 16 ? 16 : plan.band;
  plan.bands = (height + plan.band - 1) / plan.band;
  plan.middle = (a.mid_width + 64) / 16 * 16;
  plan.row = (width + 32) / 16 * 16;
  const int64_t ring = plan.out_y.phases[0].count;
  plan.buffer = plan.in_x.buffer + plan.gate_x.buffer + plan.out_x.buffer + 2 * plan.middle + ring * plan.row;
  const int64_t floats = plan.buffer * static_cast<int64_t>(sizeof(A) / sizeof(float));
  const int64_t items = planes * plan.bands;
  const int64_t workers = planes * a.mid_height * a.mid_width < 16384 ? 1 : threads < items ? threads : items;
  Workspace memory(workers * (floats + 16));
  std::vector<float*> buffers;
  for (int64_t i = 0; i < workers; ++i) buffers.push_back(memory.take(floats));
  parallel_slots(items, static_cast<int>(workers), [&](int64_t slot, int64_t first, int64_t last) {
    piece(a, plan, {first, last, buffers[static_cast<std::size_t>(slot)]});
  });
}

}  // namespace

bool filtered_lrelu(const FilteredLrelu& args, int threads) {
  constexpr int64_t kMost = int64_t{1} << 28;
  for (int64_t size :
       {args.in_height, args.in_width, args.mid_height, args.mid_width, args.out_height, args.out_width}) {
    if (size < 0 || size > kMost) return false;
  }
  for (int64_t factor : {args.up_y, args.up_x, args.down_y, args.down_x}) {
    if (factor < 1 || factor >= 65536) return false;
  }
  for (int64_t taps : {args.up_taps, args.down_taps}) {
    if (taps < 1 || taps > FilteredLrelu::kMostTaps) return false;
  }
  if (args.pad_y < -kMost || args.pad_y > kMost || args.pad_x < -kMost || args.pad_x > kMost) return false;
  const bool turned = args.mode == FilteredLrelu::kTranspose;
  const int64_t outputs = args.batch * args.channels * (turned ? args.in_height : args.out_height) *
                          (turned ? args.in_width : args.out_width);
  if (outputs == 0) return true;
  advise_huge_pages(args.out, outputs * bytes_of(args.dtype));
  if (args.dtype == DType::kFloat64) {
    run<double>(args, GENFAST_FOR_ISA(filtered_lrelu_piece_double), threads);
  } else {
    run<float>(args, GENFAST_FOR_ISA(filtered_lrelu_piece), threads);
  }
  return true;
}

}  // namespace cpu
}  // namespace genfast
