// The parts of nearest_code that are compiled once per instruction set.
#pragma once

#include "common/cpu_features.h"
#include "vae/vector_quantize.h"

namespace genfast {

struct CodeCandidate {
  float score;
  int32_t code;
};

constexpr int64_t kMostCandidates = 16;  // of a row; with more, the row is measured against all codes

// Scores ||c_k||^2 / 2 - z_n . c_k of a block of rows, of which those below the row's smallest + window are kept.
struct CodeScreen {
  const float* z;  // [rows, dim]
  int64_t rows, codes, dim;
  const float* packed;        // the codebook's transpose, see gemm/pack.h, or by nearest_code_pack_coarse()
  int parts;                  // that it is packed in
  bool coarse;                // z and the codes rounded to bfloat16
  const float* half_norms;    // [codes rounded up to panels], infinity beyond the codes
  const float* window;        // [rows]
  float* best;                // [rows]
  int32_t* counts;            // [rows]: candidates, in the order of k; kMostCandidates + 1 where there are too many
  CodeCandidate* candidates;  // [rows, kMostCandidates]
};

// Rows as float32 with their squared norms in float64; true where one holds NaN or infinity.
GENFAST_DECLARE_WITH_PRODUCT(bool, nearest_code_load,
                             (DType, const void* from, int64_t rows, int64_t dim, float* to, double* norms))
GENFAST_DECLARE_WITH_PRODUCT(void, nearest_code_screen, (const CodeScreen&, float* scratch))
// Roundings that a product of this depth may have, in units of 2^-24 of the product of the norms.
GENFAST_DECLARE_WITH_PRODUCT(double, nearest_code_roundings, (int64_t dim, bool coarse))
// What rounding to bfloat16 takes from each row: norms[r] = ||x_r - rounded x_r||, no less.
GENFAST_DECLARE_WITH_PRODUCT(void, nearest_code_residuals, (const float* x, int64_t rows, int64_t dim, double* norms))
// The codebook for a coarse screening: out[nearest_code_coarse_floats(codes, dim)].
GENFAST_DECLARE_WITH_PRODUCT(int64_t, nearest_code_coarse_floats, (int64_t codes, int64_t dim))
GENFAST_DECLARE_WITH_PRODUCT(void, nearest_code_pack_coarse, (const float* x, int64_t codes, int64_t dim, float* out))
// Distances and selected codes of rows [begin, end), whose indices are known.
GENFAST_DECLARE_WITH_PRODUCT(void, nearest_code_select, (const NearestCode&, int64_t begin, int64_t end))

}  // namespace genfast
