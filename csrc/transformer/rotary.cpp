// Checks the positions and cuts the work into pieces that follow the memory order of x.
#include "transformer/rotary.h"

#include "common/memory.h"
#include "common/parallel.h"
#include "transformer/rotary_cpu.h"

namespace genfast {
namespace cpu {
namespace {

constexpr int64_t kTable = 2048;  // table entries a piece: with those of sin 16 KiB, half of a first cache

bool positions_fit(const Rotary& args) {
  const int64_t last = args.positions - 1 - args.offset;
  if (args.offset < 0) return false;
  if (args.index == nullptr) return args.rows - 1 <= last;
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t r = 0; r < (args.starts ? 1 : args.rows); ++r) {
      const int64_t at = args.index[b * args.index_batch + r * args.index_row];
      if (at < 0 || at > last - (args.starts ? args.rows - 1 : 0)) return false;
    }
  }
  return true;
}

}  // namespace

bool rotary(const Rotary& args, int threads) {
  const int64_t elements = args.batch * args.heads * args.rows * args.dim;
  if (elements == 0) return true;
  if (!positions_fit(args)) return false;
  advise_huge_pages(args.out, elements * bytes_of(args.dtype));
  // Where heads are neighbours in memory a piece has all of them, else one: consecutive pieces read the same tables.
  const bool heads_inside = args.heads > 1 && args.x_head < args.x_row;
  const int64_t half = args.half > 0 ? args.half : 1;
  int64_t block = kTable / half;
  if (heads_inside) block = 4096 / (args.heads * args.dim);
  block = block < 1 ? 1 : block < args.rows ? block : args.rows;
  const int64_t blocks = (args.rows + block - 1) / block, groups = heads_inside ? 1 : args.heads;
  auto* const piece = GENFAST_FOR_ISA(rotary_piece);
  parallel_for(args.batch * blocks * groups, elements < 16384 ? 1 : threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t group = i % groups, row = i / groups % blocks * block, batch = i / groups / blocks;
      piece(args, {batch, group, heads_inside ? args.heads : group + 1, row,
                   row + block < args.rows ? row + block : args.rows});
    }
  });
  return true;
}

}  // namespace cpu
}  // namespace genfast
