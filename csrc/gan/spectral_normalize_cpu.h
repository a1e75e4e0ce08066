// The pieces of work that spectral_normalize.cpp hands to threads. Pointers without a type are of the storage type
// where they name weights, and wide otherwise.
#pragma once

#include "common/cpu_features.h"
#include "gan/spectral_normalize.h"

namespace genfast {

// product[r] = W_r v for rows [begin, end); where `sums` is not null also sums[columns] = sum of product[r] W_r.
GENFAST_DECLARE_PER_ISA(void, spectral_products,
                        (DType, const SpectralLayer&, const void* v, int64_t begin, int64_t end, void* product,
                         void* sums))
// out[c] = sum over parts of parts[part * stride + c] for columns [begin, end); returns the sum of squares of out.
GENFAST_DECLARE_PER_ISA(double, spectral_columns,
                        (DType, const void* parts, int64_t count, int64_t stride, int64_t begin, int64_t end,
                         void* out))
// out = W / sigma of elements [begin, end).
GENFAST_DECLARE_PER_ISA(void, spectral_scale, (DType, const SpectralLayer&, double sigma, int64_t begin, int64_t end))
// <dout, W> over elements [begin, end).
GENFAST_DECLARE_PER_ISA(double, spectral_dot, (DType, const SpectralLayer&, int64_t begin, int64_t end))
// out = (dout - along u v^T) / sigma of segments [begin, end): segment s is row s % rows of outer index s / rows.
GENFAST_DECLARE_PER_ISA(void, spectral_gradient,
                        (DType, const SpectralLayer&, double sigma, double along, int64_t begin, int64_t end))

}  // namespace genfast
