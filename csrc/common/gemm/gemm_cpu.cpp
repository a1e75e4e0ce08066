// Packing and plain products, compiled once per instruction set.
#include "common/gemm/gemm.h"

#include "common/gemm/pack.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

struct Store {
  float* c;
  int64_t stride, first_row;
  void operator()(int64_t row, int64_t column, int64_t count, const float* values) const {
    float* out = c + (first_row + row) * stride + column;
    for (int64_t i = 0; i < count; i += kWidth) store_upto(out + i, load_float(values + i), count - i);
  }
};

}  // namespace

int64_t gemm_tile_columns() { return gemm::kTileColumns; }
int64_t gemm_tile_rows() { return gemm::kMaxRows; }

void gemm_pack_panel(const Pack& args, int64_t panel) {
  float* out = args.out + panel * gemm::kTileColumns * (args.transposed ? args.columns : args.rows);
  switch (args.dtype) {
    case DType::kBFloat16:
      return gemm::pack_panel(static_cast<const BFloat16*>(args.w), args.rows, args.columns, args.transposed,
                              args.rounded, args.row_scale, panel, out);
    case DType::kFloat16:
      return gemm::pack_panel(static_cast<const Float16*>(args.w), args.rows, args.columns, args.transposed,
                              args.rounded, args.row_scale, panel, out);
    default:
      return gemm::pack_panel(static_cast<const float*>(args.w), args.rows, args.columns, args.transposed,
                              args.rounded, args.row_scale, panel, out);
  }
}

int64_t gemm_scratch_floats(int64_t rows, int64_t columns) {
  const int64_t panels = (columns + gemm::kTileColumns - 1) / gemm::kTileColumns;
  return rows * gemm::kTileColumns * (panels < gemm::kBlockPanels ? panels : gemm::kBlockPanels);
}

void gemm_rows(const Matmul& args, int64_t begin, int64_t end, float* scratch) {
  const gemm::Left a = args.a_transposed ? gemm::Left{args.a + begin, 1, args.m}
                                         : gemm::Left{args.a + begin * args.k, args.k, 1};
  const gemm::Term term = {a, {args.b, args.k * gemm::kTileColumns, gemm::kTileColumns}, args.k};
  const int64_t panels = (args.n + gemm::kTileColumns - 1) / gemm::kTileColumns;
  Store store = {args.c, args.n, begin};
  gemm::product(&term, 1, end - begin, args.n, panels < gemm::kBlockPanels ? panels : gemm::kBlockPanels, scratch,
                store);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
