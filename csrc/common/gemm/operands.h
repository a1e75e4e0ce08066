// The operands of the CPU matrix product (product.h).
#pragma once

#include "common/vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace gemm {

// Columns of B that lie together: a panel.
constexpr int kTileColumns = 2 * kWidth;

// Where the scalars of A are: element (row, k) at row * row_stride + k * step. Rows or steps are contiguous.
struct Left {
  const float* data;
  int64_t row_stride, step;
};

// Where B is: row k of panel p at p * panel_stride + k * row_stride, kTileColumns readable elements; or, where `parts`
// is not 0, what packed_right() says of the panels that pack.h made.
struct Right {
  const float* data;
  int64_t panel_stride, row_stride;
  int parts = 0;
  bool pairs = false;  // packed in pairs of bfloat16, where products are of vectors; A is then rounded
};

struct Term {
  Left a;
  Right b;
  int64_t depth;
  bool rounded = false;  // A, to bfloat16: only where kConvertsLeft, else the caller rounds
};

constexpr int kMostTerms = 2;
constexpr int kBlockPanels = 4;  // of a product whose epilogue should find its block in a near cache

}  // namespace gemm
}  // namespace GENFAST_ISA
}  // namespace genfast
