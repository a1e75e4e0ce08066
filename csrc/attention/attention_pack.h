// How attention packs its operands, and the blocks they come in.
#pragma once

#include "attention/attention.h"
#include "common/gemm/product_bfloat16.h"
#include "common/vec_math.h"

namespace genfast {
namespace GENFAST_ISA {
namespace attention {

using gemm::kMaxRows;
using gemm::kTileColumns;

constexpr int64_t kMostQueries = kTileColumns > 64 ? kTileColumns : 64;
constexpr int64_t kMostKeys = 96;  // whole groups of kMaxRows, and of the eight columns of a call of Philox

GENFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GENFAST_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
GENFAST_INLINE int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }
GENFAST_INLINE int64_t up_to(int64_t x, int64_t multiple) { return parts(x, multiple) * multiple; }

// Even blocks: of at most `most`, a multiple of `unit`.
GENFAST_INLINE int64_t block_of(int64_t count, int64_t most, int64_t unit) {
  return count == 0 ? unit : up_to(parts(count, parts(count, most)), unit);
}
GENFAST_INLINE int64_t query_block(const Attention& a) { return block_of(a.queries, kMostQueries, kTileColumns); }
GENFAST_INLINE int64_t key_block(const Attention& a) {
  if (a.pages != nullptr && a.queries > kFewQueries) {  // large pages: blocks in one need no copy before packing
    for (int64_t block = smaller(a.page_size, kMostKeys) / 8 * 8; block >= kMostKeys / 2; block -= 8) {
      if (a.page_size % block == 0) return block;
    }
  }
  return block_of(a.keys, kMostKeys, a.pairs && gemm::kPairsByRows ? gemm::kPairRows : 24);
}

GENFAST_INLINE int64_t width_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
GENFAST_INLINE char* row_at(const Rows& x, DType dtype, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(x.data) + (batch * x.batch + head * x.head + row * x.row) * width_of(dtype);
}

// ---- operands ----

// Columns of B are rows of x: [panel][padded][kTileColumns], zeros beyond the last row and from depth to `padded`, less
// than a vector more. `change` is for vectors of x.
template <typename T, typename Change>
static void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t depth, int64_t padded, const Change& change,
                         float* out) {
  for (int64_t first = 0; first < rows; first += kTileColumns, out += padded * kTileColumns) {
    for (int64_t k = 0; k < depth; k += kWidth) {
      const int64_t steps = smaller(padded - k, kWidth);
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first + half * kWidth;
        VecF square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          square[i] = row + i < rows ? change(load_upto(x + (row + i) * stride + k, depth - k)) : broadcast(0.0f);
        }
        transpose(square);
        for (int64_t j = 0; j < steps; ++j) store_float(out + (k + j) * kTileColumns + half * kWidth, square[j]);
      }
    }
  }
}

// Rows of B are rows of x, times a scale: [panel][rows][kTileColumns], zeros beyond the last column.
template <typename T>
static void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, float scale, float* out) {
  const VecF factor = broadcast(scale);
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const bool second = column + kWidth < columns;
    for (int64_t i = 0; i < rows; ++i, out += kTileColumns) {
      const T* const from = x + i * stride + column;
      store_float(out, load_upto(from, columns - column) * factor);
      store_float(out + kWidth,
                  second ? load_upto(from + kWidth, columns - column - kWidth) * factor : broadcast(0.0f));
    }
  }
}

template <typename T>
static void to_float(const T* x, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; k += kWidth) store_upto(out + k, load_upto(x + k, columns - k), columns - k);
}
template <typename T>
static void from_float(const float* x, int64_t columns, float scale, T* out) {
  const VecF factor = broadcast(scale);
  for (int64_t k = 0; k < columns; k += kWidth) {
    store_upto(out + k, load_upto(x + k, columns - k) * factor, columns - k);
  }
}

// As storage_type(dtype, body): body(T{}) with the element type.
template <typename Body>
GENFAST_INLINE void with_type(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(static_cast<float*>(nullptr));
  } else if (dtype == DType::kBFloat16) {
    body(static_cast<BFloat16*>(nullptr));
  } else {
    body(static_cast<Float16*>(nullptr));
  }
}

// The same of bfloat16 in pairs (product_bfloat16.h): rows 2 i and 2 i + 1 of x are row i of B.
static void pack_row_pairs(const BFloat16* x, int64_t stride, int64_t rows, int64_t columns, float* out) {
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    for (int64_t i = 0; i < rows; i += 2, out += kTileColumns) {
      for (int64_t c = 0; c < kTileColumns; c += kWidth) {
        const int64_t some = columns - column - c;
        const BFloat16* const from = x + i * stride + column + c;
        const VecF low = some > 0 ? load_upto(from, some) : broadcast(0.0f);
        const VecF high = some > 0 && i + 1 < rows ? load_upto(from + stride, some) : broadcast(0.0f);
        store_float(out + c, as_float(bit_or(shift_right<16>(as_uint(low)), as_uint(high))));
      }
    }
    for (int64_t i = parts(rows, 2); i < gemm::pair_steps(rows); ++i, out += kTileColumns) {
      for (int c = 0; c < kTileColumns; c += kWidth) store_float(out + c, broadcast(0.0f));
    }
  }
}

// Columns of pairs, [steps][stride], to rows [columns][steps]; steps are whole vectors. Rows past the last, to a whole
// vector of them, are written too.
static void turn_pairs(const float* x, int64_t stride, int64_t steps, int64_t columns, float* out) {
  for (int64_t i = 0; i < columns; i += kWidth) {
    for (int64_t k = 0; k < steps; k += kWidth) {
      VecF square[kWidth];
      for (int l = 0; l < kWidth; ++l) square[l] = load_float(x + (k + l) * stride + i);
      transpose(square);
      for (int l = 0; l < kWidth; ++l) store_float(out + (i + l) * steps + k, square[l]);
    }
  }
}

enum class Form { kColumns, kRows, kGroups };

// The same in pairs along a row: rows of x are rows of pairs as they lie.
GENFAST_NOINLINE void pack_pairs(Form form, const void* data, int64_t stride, int64_t rows, int64_t depth, float* out) {
  const auto* const pairs = static_cast<const float*>(data);
  if (form == Form::kRows) {
    pack_row_pairs(static_cast<const BFloat16*>(data), stride, rows, depth, out);
  } else if (form == Form::kGroups) {
    gemm::pack_left_pairs(pairs, stride / 2, rows, depth / 2, out);
  } else {
    pack_columns(pairs, stride / 2, rows, depth / 2, gemm::pair_steps(depth), [](VecF x) { return x; }, out);
  }
}

// `rows` rows of x from `first`, for B by columns or by rows, or for A in groups: [group][depth][kMaxRows]. Rows for B
// are times a scale, but for pairs, which stay bfloat16: there it belongs to the product.
GENFAST_NOINLINE void pack(Form form, const Attention& a, const Rows& x, int64_t batch, int64_t head, int64_t first,
                           int64_t rows, int64_t depth, float scale, float* out) {
  const char* const data = row_at(x, a.dtype, batch, head, first);
  if (a.pairs) return pack_pairs(form, data, x.row, rows, depth, out);
  with_type(a.dtype, [&](auto* type) {
    const auto* const from = reinterpret_cast<decltype(type)>(const_cast<char*>(data));
    if (form == Form::kColumns) {
      const VecF factor = broadcast(scale);
      pack_columns(from, x.row, rows, depth, depth, [&](VecF values) { return values * factor; }, out);
    } else if (form == Form::kRows) {
      pack_rows(from, x.row, rows, depth, scale, out);
    } else {
      gemm::gather_rows(from, x.row, rows, depth, out);
    }
  });
}

// Room for either kind, numbers or pairs.
GENFAST_INLINE int64_t columns_floats(int64_t rows, int64_t depth) {
  return up_to(rows, kTileColumns) * larger(depth, gemm::pair_steps(depth));
}
GENFAST_INLINE int64_t rows_floats(int64_t rows, int64_t depth) {
  return up_to(depth, kTileColumns) * larger(rows, gemm::pair_steps(rows));
}
GENFAST_INLINE int64_t groups_floats(int64_t rows, int64_t depth) {
  const int64_t pairs = up_to(rows, gemm::kPairRows) * gemm::pair_steps(depth);
  return larger(up_to(rows, kMaxRows) * depth, pairs) + 2 * kWidth;  // stores pass the last group
}

GENFAST_NOINLINE void store_rows(DType dtype, const float* x, int64_t stride, int64_t rows, int64_t columns,
                                 float scale, const Rows& out, int64_t batch, int64_t head, int64_t first) {
  for (int64_t i = 0; i < rows; ++i) {
    char* const to = row_at(out, dtype, batch, head, first + i);
    with_type(dtype,
              [&](auto* type) { from_float(x + i * stride, columns, scale, reinterpret_cast<decltype(type)>(to)); });
  }
}

// out[i] = sum over columns of x[i, :] y[i, :].
GENFAST_NOINLINE void row_products(DType dtype, const Rows& x, const Rows& y, int64_t batch, int64_t head,
                                   int64_t first, int64_t rows, int64_t columns, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const char* const xs = row_at(x, dtype, batch, head, first + i);
    const char* const ys = row_at(y, dtype, batch, head, first + i);
    with_type(dtype, [&](auto* type) {
      const auto* const a = reinterpret_cast<decltype(type)>(const_cast<char*>(xs));
      const auto* const b = reinterpret_cast<decltype(type)>(const_cast<char*>(ys));
      VecF total = broadcast(0.0f);
      for (int64_t k = 0; k < columns; k += kWidth) {
        total = fma(load_upto(a + k, columns - k), load_upto(b + k, columns - k), total);
      }
      out[i] = sum(total);
    });
  }
}

}  // namespace attention
}  // namespace GENFAST_ISA
}  // namespace genfast
