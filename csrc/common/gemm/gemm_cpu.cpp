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
      return gemm::pack_panel(static_cast<const float*>(args.w), args.rows, args.columns, args.transposed, args.rounded,
                              args.row_scale, panel, out);
  }
}

int64_t gemm_scratch_floats(int64_t rows, int64_t columns, int64_t depth, bool a_transposed) {
  return rows * gemm::kTileColumns * gemm::block_panels(columns, a_transposed) +
         (a_transposed ? gemm::gather_floats(rows) : rows * padded_stride(depth));
}

void gemm_rows(const Matmul& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t panels = gemm::block_panels(args.n, args.a_transposed);
  float* const room = scratch + (end - begin) * gemm::kTileColumns * panels;
  gemm::Left a = {args.a + begin, 1, args.m};
  if (!args.a_transposed) {  // rows a power of two apart would share the sets of the cache
    const int64_t stride = padded_stride(args.k);
    for (int64_t r = begin; r < end; ++r) {
      memcpy(room + (r - begin) * stride, args.a + r * args.k, static_cast<size_t>(args.k) * sizeof(float));
    }
    a = {room, stride, 1};
  }
  const gemm::Term term = {a, {args.b, args.k * gemm::kTileColumns, gemm::kTileColumns}, args.k};
  Store store = {args.c, args.n, begin};
  gemm::product(&term, 1, end - begin, args.n, panels, scratch, store, room);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
