// The nearest row of a codebook for every row of z, without the matrix of distances; docs/kernels/vector_quantize.md.
//
//   indices[n] = the lowest k with the smallest ||z_n - c_k||^2, as real numbers
//
// A product screens, first in bfloat16 where that is fast, then in float32: of each row it keeps the codes that its
// error bound does not rule out. What is left is measured in float64, and what float64 cannot tell apart is compared
// exactly (vector_quantize_exact.h).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genfast {

struct NearestCode {
  DType dtype;           // of z, codebook and selected
  const void* z;         // [rows, dim], contiguous as all
  const void* codebook;  // [codes, dim], codes > 0
  int64_t rows, codes, dim;
  int64_t* indices;  // [rows]
  void* distances;   // [rows], float64 for float64, else float32; may be null
  void* selected;    // [rows, dim], the nearest codes; may be null
};

// out[k] = the sum of the rows n of x with indices[n] = k, in the order of n whatever the threads.
struct CodeSums {
  DType dtype;  // float32 or float64
  const void* x;
  const int64_t* indices;  // [rows], each in [0, codes)
  int64_t rows, codes, dim;
  void* sums;       // [codes, dim]
  int64_t* counts;  // [codes]
};

enum class NearestCodeStatus : int32_t { kDone = 0, kBadRow = 1, kBadCode = 2 };  // NaN or infinity in z, in codebook

namespace cpu {
NearestCodeStatus nearest_code(const NearestCode& args, int threads);
// False where an index is outside [0, codes): nothing is written then.
bool code_sums(const CodeSums& args, int threads);
}  // namespace cpu

}  // namespace genfast
