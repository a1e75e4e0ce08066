// One line a family in bindings.cpp; pointers cross as integers, 0 for none.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace genfast {

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_vae(pybind11::module_& cpu);
void bind_rbm(pybind11::module_& cpu);
void bind_attention(pybind11::module_& cpu);
void bind_transformer(pybind11::module_& cpu);
void bind_gan(pybind11::module_& cpu);
#if defined(GENFAST_WITH_CUDA)
void bind_cuda(pybind11::module_& cuda);
#endif

}  // namespace genfast
