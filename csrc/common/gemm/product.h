// The project's CPU matrix product: sums of terms A B, with an epilogue on each finished block while it is in cache.
//
//   out[rows, columns] = sum over terms of A[rows, depth] B[depth, columns]
//
// The caller splits rows over threads: a row's sums run over terms and depth in an order of their own, so its bits
// depend neither on the split nor on the rows beside it.
//
//   product(terms, term_count, rows, columns, block_panels, block, epilogue, room)
//
// calls epilogue(row, column, count, values) for every row of every finished block of `block_panels` panels; `values`
// may be overwritten up to the block's padded width. `block` has room for rows * block_panels * kTileColumns floats,
// `room` for room_floats(rows, depth of all terms, whether an A is transposed). B is packed (pack.h) or read where it
// lies. docs/kernels/gemm.md has the tiling of each instruction set.
#pragma once

#if defined(GENFAST_AMX)
#include "common/gemm/product_amx.h"
#else
#include "common/gemm/product_fma.h"
#endif
