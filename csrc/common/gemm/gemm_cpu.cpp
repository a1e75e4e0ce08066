// Packing and plain products, compiled once per instruction set.
#include "common/gemm/gemm.h"
#include "common/gemm/pack.h"
#include "common/gemm/product.h"

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

#if defined(GENFAST_AMX)
void gemm_configure_tiles() { _tile_loadconfig(&gemm::kTileConfig); }
void gemm_release_tiles() { _tile_release(); }
#else
void gemm_configure_tiles() {}
void gemm_release_tiles() {}
#endif

int64_t gemm_most_rows() { return gemm::kMostRows; }
int64_t gemm_panel_floats(int64_t depth, int parts) { return gemm::panel_floats(depth, parts); }

void gemm_pack_panel(const Pack& args, int64_t panel) {
  float* out = args.out + panel * gemm::panel_floats(args.transposed ? args.columns : args.rows, args.parts());
  switch (args.dtype) {
    case DType::kBFloat16:
      return gemm::pack_panel(static_cast<const BFloat16*>(args.w), args, panel, out);
    case DType::kFloat16:
      return gemm::pack_panel(static_cast<const Float16*>(args.w), args, panel, out);
    default:
      return gemm::pack_panel(static_cast<const float*>(args.w), args, panel, out);
  }
}

int64_t gemm_scratch_floats(int64_t rows, int64_t columns, int64_t depth, bool a_transposed) {
  return rows * gemm::kTileColumns * gemm::block_panels(columns, a_transposed) +
         gemm::room_floats(rows, depth, a_transposed);
}

void gemm_rows(const Matmul& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = end - begin, panels = gemm::block_panels(args.n, args.a_transposed);
  float* const room = scratch + rows * gemm::kTileColumns * panels;
  const gemm::Left a =
      args.a_transposed ? gemm::Left{args.a + begin, 1, args.m} : gemm::Left{args.a + begin * args.k, args.k, 1};
  const gemm::Term term = {a, gemm::packed_right(args.b, args.k, 3), args.k};
  Store store = {args.c, args.n, begin};
  gemm::product(&term, 1, rows, args.n, panels, scratch, store, room);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
