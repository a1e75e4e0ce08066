// What the baseline files see of the matrix product (product.h): packing, and plain products.
#pragma once

#include "common/cpu_features.h"
#include "common/dtype.h"

namespace genfast {

// B = W or W' in panels, see pack.h. W is float32, bfloat16 or float16, contiguous.
struct Pack {
  DType dtype;
  const void* w;  // [rows, columns]
  int64_t rows, columns;
  bool transposed;
  bool rounded;            // to bfloat16
  const float* row_scale;  // [rows] or null; only without `transposed`
  float* out;              // packed_floats(...)
  bool pairs = false;      // of bfloat16, where products are of vectors; only `rounded`

  // bfloat16 numbers that a weight is the sum of, where products run on bfloat16 tiles.
  inline __attribute__((always_inline)) int parts() const {
    return rounded || (dtype == DType::kBFloat16 && row_scale == nullptr) ? 1 : 3;
  }
};

// C = op(A) op(B), all row-major and contiguous, float32.
struct Matmul {
  const float* a;  // [m, k], or [k, m] where a_transposed
  const float* b;  // packed panels of op(B), [k, n]
  float* c;        // [m, n]
  int64_t m, n, k;
  bool a_transposed;
};

GENFAST_DECLARE_WITH_PRODUCT(int64_t, gemm_tile_columns, ())
GENFAST_DECLARE_WITH_PRODUCT(int64_t, gemm_tile_rows, ())
GENFAST_DECLARE_WITH_PRODUCT(int64_t, gemm_most_rows, ())  // that a thread should take at a time
GENFAST_DECLARE_WITH_PRODUCT(int64_t, gemm_panel_floats, (int64_t depth, int parts))
GENFAST_DECLARE_WITH_PRODUCT(void, gemm_pack_panel, (const Pack&, int64_t panel))
GENFAST_DECLARE_WITH_PRODUCT(int64_t, gemm_scratch_floats,
                             (int64_t rows, int64_t columns, int64_t depth, bool a_transposed))
GENFAST_DECLARE_WITH_PRODUCT(void, gemm_rows, (const Matmul&, int64_t begin, int64_t end, float* scratch))

// Between these a thread may call pair_tile_rows() (product_bfloat16.h): its AMX tiles are configured, where there are
// any. Released ones cost nothing at a change of context.
GENFAST_DECLARE_WITH_PRODUCT(void, gemm_configure_tiles, ())
GENFAST_DECLARE_WITH_PRODUCT(void, gemm_release_tiles, ())

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Floats from one row to the next of a buffer of `columns`: whole tiles, and an odd number of cache lines, so that the
// rows of a column do not share the sets of the cache.
inline int64_t padded_stride(int64_t columns) {
  const int64_t lines = round_up(columns, 32) / 16;
  return 16 * (lines % 2 == 0 ? lines + 1 : lines);
}

// Rows that a thread takes at a time: an even share of all, at most gemm_most_rows().
int64_t rows_per_block(int64_t rows, int threads);

namespace cpu {
void pack(const Pack& args, int threads);
int64_t packed_floats(int64_t depth, int64_t columns);  // enough for any number of parts
// c = op(a) op(b) with b [k, n], or [n, k] where b_transposed.
void matmul(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k, bool a_transposed,
            bool b_transposed, int threads);
}  // namespace cpu

}  // namespace genfast
