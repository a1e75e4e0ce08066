// Splits packing and plain products over threads.
#include "common/gemm/gemm.h"

#include "common/memory.h"
#include "common/parallel.h"

namespace genfast {

int64_t rows_per_block(int64_t rows, int threads) {
  const int64_t most = GENFAST_FOR_ISA(gemm_most_rows)();
  const int64_t tile = GENFAST_FOR_ISA(gemm_tile_rows)();
  const int64_t share = (rows + threads - 1) / threads;  // of a thread
  if (share <= most) return share > 0 ? share : 1;
  const int64_t blocks = (share + most - 1) / most;
  return round_up((share + blocks - 1) / blocks, tile);
}

namespace cpu {

int64_t packed_floats(int64_t depth, int64_t columns) {
  const int64_t tile = GENFAST_FOR_ISA(gemm_tile_columns)();
  return (columns + tile - 1) / tile * GENFAST_FOR_ISA(gemm_panel_floats)(depth, 3);
}

void pack(const Pack& args, int threads) {
  auto* const panel = GENFAST_FOR_ISA(gemm_pack_panel);
  const int64_t tile = GENFAST_FOR_ISA(gemm_tile_columns)();
  const int64_t columns = args.transposed ? args.rows : args.columns;
  const int useful = args.rows * args.columns < 32768 ? 1 : threads;
  parallel_for((columns + tile - 1) / tile, useful, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) panel(args, p);
  });
}

void matmul(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k, bool a_transposed,
            bool b_transposed, int threads) {
  if (m == 0 || n == 0) return;
  const int64_t block_rows = rows_per_block(m, threads);
  const int64_t scratch_floats = GENFAST_FOR_ISA(gemm_scratch_floats)(block_rows, n, k, a_transposed);
  Workspace workspace(packed_floats(k, n) + threads * round_up(scratch_floats, 16));
  float* packed = workspace.take(packed_floats(k, n));
  float* scratch = workspace.take(threads * round_up(scratch_floats, 16));
  pack({DType::kFloat32, b, b_transposed ? n : k, b_transposed ? k : n, b_transposed, false, nullptr, packed}, threads);
  const Matmul args = {a, packed, c, m, n, k, a_transposed};
  auto* const rows = GENFAST_FOR_ISA(gemm_rows);
  const int useful = m * n * k < (1 << 18) ? 1 : threads;
  parallel_slots((m + block_rows - 1) / block_rows, useful, [&](int64_t slot, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t end = (i + 1) * block_rows < m ? (i + 1) * block_rows : m;
      rows(args, i * block_rows, end, scratch + slot * round_up(scratch_floats, 16));
    }
  });
}

}  // namespace cpu
}  // namespace genfast
