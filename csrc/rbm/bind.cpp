#include "bindings.h"
#include "rbm/bernoulli_sample.h"

namespace genfast {

void bind_rbm(pybind11::module_& cpu) {
  cpu.def(
      "bernoulli_sample",
      [](int dtype, int sample_dtype, uintptr_t logits, uintptr_t bias, uintptr_t sample, uintptr_t prob, int64_t rows,
         int64_t columns, double beta, uint64_t seed, uintptr_t, int64_t row_offset, int64_t col_offset, int64_t step,
         int64_t execution) {
        return cpu::bernoulli_sample(
            {static_cast<DType>(dtype), static_cast<DType>(sample_dtype), pointer(logits), pointer(bias),
             pointer(sample), pointer(prob), rows, columns, beta, seed, nullptr, row_offset, col_offset, step},
            static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace genfast
