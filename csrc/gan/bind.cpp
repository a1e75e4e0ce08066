#include "bindings.h"
#include "gan/filtered_lrelu.h"
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
  cpu.def(
      "filtered_lrelu",
      [](int dtype, int mode, uintptr_t v, uintptr_t gate, uintptr_t out, uintptr_t v_bias, uintptr_t gate_bias,
         uintptr_t up_filter, uintptr_t down_filter, int64_t up_taps, int64_t down_taps, bool correlate, int64_t batch,
         int64_t channels, int64_t in_height, int64_t in_width, int64_t mid_height, int64_t mid_width,
         int64_t out_height, int64_t out_width, int64_t up_y, int64_t up_x, int64_t down_y, int64_t down_x,
         int64_t pad_y, int64_t pad_x, double gain, double slope, double limit, int64_t execution) {
        return cpu::filtered_lrelu({static_cast<DType>(dtype),
                                    static_cast<FilteredLrelu::Mode>(mode),
                                    pointer(v),
                                    pointer(gate),
                                    pointer(out),
                                    pointer(v_bias),
                                    pointer(gate_bias),
                                    pointer(up_filter),
                                    pointer(down_filter),
                                    up_taps,
                                    down_taps,
                                    correlate,
                                    batch,
                                    channels,
                                    in_height,
                                    in_width,
                                    mid_height,
                                    mid_width,
                                    out_height,
                                    out_width,
                                    up_y,
                                    up_x,
                                    down_y,
                                    down_x,
                                    pad_y,
                                    pad_x,
                                    gain,
                                    slope,
                                    limit},
                                   static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace genfast
