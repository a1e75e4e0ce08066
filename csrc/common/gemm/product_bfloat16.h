// Products of tiles of bfloat16 in pairs (product_pairs.h says what they are): on AMX tiles where the instruction set
// has them, else on vectors. The layouts of B are the same; of A, and how far operands are padded, the constants tell.
//
//   kPairsByRows                         A must lie by rows, else columns and packed groups will do
//   kPairRows                            rows of A that go together
//   pair_steps(depth)                    pairs of a depth as packed, zeros beyond the last
//   pack_left_pairs(x, stride, rows, pairs, out)      A from rows of pairs, kPairRows together
//   pair_tile_rows(rows, out, stride, fresh, a, group_stride, b, b_stride, steps, factor)
#pragma once

#if defined(GENFAST_AMX)
#include "common/gemm/product_tiles.h"
#else
#include "common/gemm/product_pairs.h"
#endif
