#include "bindings.h"
#include "transformer/rotary.h"

namespace genfast {

void bind_transformer(pybind11::module_& cpu) {
  cpu.def(
      "rotary",
      [](int dtype, uintptr_t x, uintptr_t out, uintptr_t cos, uintptr_t sin, uintptr_t index, int64_t batch,
         int64_t heads, int64_t rows, int64_t dim, int64_t half, int64_t positions, int64_t x_batch, int64_t x_head,
         int64_t x_row, int64_t out_batch, int64_t out_head, int64_t out_row, int64_t cos_batch, int64_t cos_row,
         int64_t sin_batch, int64_t sin_row, int64_t index_batch, int64_t index_row, int64_t offset, bool starts,
         bool interleaved, bool inverse, int64_t execution) {
        return cpu::rotary({static_cast<DType>(dtype),
                            pointer(x),
                            pointer(out),
                            pointer(cos),
                            pointer(sin),
                            pointer<const int64_t>(index),
                            batch,
                            heads,
                            rows,
                            dim,
                            half,
                            positions,
                            x_batch,
                            x_head,
                            x_row,
                            out_batch,
                            out_head,
                            out_row,
                            cos_batch,
                            cos_row,
                            sin_batch,
                            sin_row,
                            index_batch,
                            index_row,
                            offset,
                            starts,
                            interleaved,
                            inverse},
                           static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace genfast
