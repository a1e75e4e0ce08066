#include "bindings.h"
#include "gan/bias_act.h"

namespace genfast {

void bind_gan(pybind11::module_& cpu) {
  cpu.def(
      "bias_act",
      [](int dtype, int act, int order, uintptr_t x, uintptr_t b, uintptr_t dy, uintptr_t v, uintptr_t v_b,
         uintptr_t out, uintptr_t to_x, uintptr_t sums, uintptr_t bits, int planes, int64_t outer, int64_t channels,
         int64_t inner, double alpha, double gain, double clamp, int64_t execution) {
        cpu::bias_act({static_cast<DType>(dtype), static_cast<Activation>(act), order, pointer(x), pointer(b),
                       pointer(dy), pointer(v), pointer(v_b), pointer(out), pointer(to_x), pointer(sums),
                       pointer<uint8_t>(bits), planes, outer, channels, inner, alpha, gain, clamp},
                      static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace genfast
