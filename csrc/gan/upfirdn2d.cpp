// Makes the phases of both axes and cuts the planes into items.
#include "gan/upfirdn2d.h"

#include <cstddef>
#include <deque>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "gan/fir_plan.h"
#include "gan/upfirdn2d_cpu.h"

namespace genfast {
namespace cpu {
namespace {

constexpr int64_t kRowElements = 4096;    // of a tile of a row: 16 KiB in float32
constexpr int64_t kItemElements = 32768;  // outputs of an item, about

template <typename A>
std::vector<double> taps_of(const A* from, int64_t count, bool correlate, double gain) {
  std::vector<double> taps;
  for (int64_t k = 0; k < count; ++k) taps.push_back(gain * static_cast<double>(from[correlate ? k : count - 1 - k]));
  return taps;
}

template <typename A>
using Piece = void (*)(const Upfirdn2d&, const Upfirdn2dPlan<A>&, const Upfirdn2dPiece&);

template <typename A>
void run(const Upfirdn2d& args, Piece<A> piece, int threads) {
  const A* const filter = static_cast<const A*>(args.filter);
  std::deque<FirPlan<A>> plans;  // of the rows' axis first
  std::vector<double> of_rows;
  if (args.separable) {
    of_rows = taps_of(filter, args.taps_y, args.correlate, 1.0);
  } else {
    for (int64_t k = 0; k < args.taps_y; ++k) of_rows.push_back(static_cast<double>(k));
  }
  plans.emplace_back(of_rows, args.height, args.out_height, args.up_y, args.down_y, args.pad_y, kRowElements);
  Upfirdn2dPlan<A> plan = {};
  plan.block = args.channels, plan.blocks = 1;
  int64_t tile = kRowElements;
  if (args.channels_last) {
    plan.block = args.channels < 64 ? args.channels : 64;
    plan.blocks = (args.channels + plan.block - 1) / plan.block;
    tile = 2 * kRowElements / plan.block;
  }
  std::vector<FirAxis<A>> axes;
  for (int64_t k = 0; k < (args.separable ? 1 : args.taps_y); ++k) {
    const int64_t row = args.correlate ? k : args.taps_y - 1 - k;
    plans.emplace_back(
        taps_of(filter + (args.separable ? 0 : row * args.taps_x), args.taps_x, args.correlate, args.gain), args.width,
        args.out_width, args.up_x, args.down_x, args.pad_x, tile);
    axes.push_back(plans.back().axis());
  }
  plan.y = plans.front().axis();
  plan.x = axes.data();
  const int64_t row = args.out_width * plan.block;
  plan.band = kItemElements / row;
  plan.band = plan.band < 8 ? 8 : plan.band < args.out_height ? plan.band : args.out_height;
  plan.bands = (args.out_height + plan.band - 1) / plan.band;
  const int64_t items = args.batch * (args.channels_last ? plan.blocks : args.channels) * plan.bands;
  const int64_t sums = args.separable ? 0 : axes[0].up * axes[0].pitch;
  const int64_t elements = axes[0].buffer * (args.channels_last ? plan.block : 1) + sums + 64;
  const int64_t floats = elements * static_cast<int64_t>(sizeof(A) / sizeof(float));
  const int64_t total = args.batch * args.channels * (args.out_height * args.out_width + args.height * args.width);
  const int64_t workers = total < 16384 ? 1 : threads < items ? threads : items;
  Workspace memory(workers * (floats + 16));
  std::vector<float*> buffers;
  for (int64_t i = 0; i < workers; ++i) buffers.push_back(memory.take(floats));
  parallel_slots(items, static_cast<int>(workers), [&](int64_t slot, int64_t first, int64_t last) {
    piece(args, plan, {first, last, buffers[static_cast<std::size_t>(slot)]});
  });
}

}  // namespace

bool upfirdn2d(const Upfirdn2d& args, int threads) {
  constexpr int64_t kMost = int64_t{1} << 40;
  for (int64_t size : {args.height, args.width, args.out_height, args.out_width, args.taps_y, args.taps_x}) {
    if (size < 0 || size > kMost) return false;
  }
  for (int64_t factor : {args.up_y, args.up_x, args.down_y, args.down_x}) {
    if (factor < 1 || factor >= 65536) return false;
  }
  for (int64_t pad : {args.pad_y, args.pad_x}) {
    if (pad < -kMost || pad > kMost) return false;
  }
  if (args.taps_y < 1 || args.taps_x < 1) return false;
  const int64_t outputs = args.batch * args.channels * args.out_height * args.out_width;
  if (outputs == 0) return true;
  advise_huge_pages(args.out, outputs * bytes_of(args.dtype));
  if (args.dtype == DType::kFloat64) {
    run<double>(args, GENFAST_FOR_ISA(upfirdn2d_piece_double), threads);
  } else {
    run<float>(args, GENFAST_FOR_ISA(upfirdn2d_piece), threads);
  }
  return true;
}

}  // namespace cpu
}  // namespace genfast
