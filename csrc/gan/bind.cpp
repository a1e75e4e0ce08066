#include "bindings.h"
#include "gan/upfirdn2d.h"

namespace genfast {

void bind_gan(pybind11::module_& cpu) {
  cpu.def(
      "upfirdn2d",
      [](int dtype, uintptr_t x, uintptr_t out, uintptr_t filter, bool separable, bool correlate, bool channels_last,
         int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
         int64_t x_batch, int64_t x_channel, int64_t x_row, int64_t x_column, int64_t taps_y, int64_t taps_x,
         int64_t up_y, int64_t up_x, int64_t down_y, int64_t down_x, int64_t pad_y, int64_t pad_x, double gain,
         int64_t execution) {
        return cpu::upfirdn2d({static_cast<DType>(dtype),
                               pointer(x),
                               pointer(out),
                               pointer(filter),
                               separable,
                               correlate,
                               channels_last,
                               batch,
                               channels,
                               height,
                               width,
                               out_height,
                               out_width,
                               x_batch,
                               x_channel,
                               x_row,
                               x_column,
                               taps_y,
                               taps_x,
                               up_y,
                               up_x,
                               down_y,
                               down_x,
                               pad_y,
                               pad_x,
                               gain},
                              static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace genfast
