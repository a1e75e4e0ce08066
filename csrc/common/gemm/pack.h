// Packs a matrix W[rows, columns] into the panels that product.h reads as B: panel p holds columns p * kTileColumns ...
// of B, zeros beyond the last column. B is W, or W transposed.
//
//   pack_panel(w, args, panel, out)      packs one panel of panel_floats(depth, args.parts()) floats
#pragma once

#if defined(GENFAST_AMX)
#include "common/gemm/pack_amx.h"
#else
#include "common/gemm/pack_fma.h"
#endif
