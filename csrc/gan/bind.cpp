#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "gan/adain.h"
#include "gan/bias_act.h"
#include "gan/diff_augment.h"
#include "gan/filtered_lrelu.h"
#include "gan/gan_loss.h"
#include "gan/minibatch_stddev.h"
#include "gan/spectral_normalize.h"
#include "gan/upfirdn2d.h"

namespace genfast {
namespace {

void bind_bias_act(pybind11::module_& cpu) {
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

void bind_gan_loss(pybind11::module_& cpu) {
  using Release = pybind11::call_guard<pybind11::gil_scoped_release>;
  cpu.def(
      "gan_loss",
      [](int dtype, int function, int pairing, uintptr_t real, uintptr_t fake, uintptr_t loss, uintptr_t to_real,
         uintptr_t to_fake, int64_t reals, int64_t fakes, double real_sign, double real_shift, double fake_sign,
         double fake_shift, double scale) {
        cpu::gan_loss({static_cast<DType>(dtype), static_cast<GanFunction>(function), static_cast<GanPairing>(pairing),
                       pointer(real), pointer(fake), pointer(loss), pointer(to_real), pointer(to_fake), reals, fakes,
                       real_sign, real_shift, fake_sign, fake_shift, scale});
      },
      Release());
  cpu.def(
      "diff_augment",
      [](int dtype, uintptr_t x, uintptr_t out, int64_t batch, int64_t channels, int64_t height, int64_t width,
         int64_t offset, uint64_t seed, int policy, int mode, int64_t execution) {
        cpu::diff_augment({static_cast<DType>(dtype), pointer(x), pointer(out), batch, channels, height, width, offset,
                           seed, policy, mode},
                          static_cast<int>(execution));
      },
      Release());
}

// Ten integers a layer, in the order of SpectralLayer; sigma and dsigma [layers].
std::vector<SpectralLayer> layers_of(const std::vector<int64_t>& numbers) {
  std::vector<SpectralLayer> layers;
  for (size_t i = 0; i + 10 <= numbers.size(); i += 10) {
    const auto at = [&](size_t k) { return pointer(static_cast<uintptr_t>(numbers[i + k])); };
    layers.push_back({at(0), at(1), at(2), at(3), at(4), at(5), at(6), numbers[i + 7], numbers[i + 8], numbers[i + 9]});
  }
  return layers;
}

void bind_spectral_normalize(pybind11::module_& cpu) {
  cpu.def(
      "spectral_normalize",
      [](int dtype, const std::vector<int64_t>& numbers, uintptr_t sigma, int64_t iterations, double eps,
         int64_t execution) {
        const std::vector<SpectralLayer> layers = layers_of(numbers);
        cpu::spectral_normalize({static_cast<DType>(dtype), layers.data(), static_cast<int64_t>(layers.size()),
                                 pointer(sigma), nullptr, iterations, eps},
                                static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  cpu.def(
      "spectral_normalize_backward",
      [](int dtype, const std::vector<int64_t>& numbers, uintptr_t sigma, uintptr_t dsigma, int64_t execution) {
        const std::vector<SpectralLayer> layers = layers_of(numbers);
        cpu::spectral_normalize_backward({static_cast<DType>(dtype), layers.data(), static_cast<int64_t>(layers.size()),
                                          pointer(sigma), pointer(dsigma), 0, 0.0},
                                         static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

void bind_upfirdn2d(pybind11::module_& cpu) {
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

void bind_minibatch_stddev(pybind11::module_& cpu) {
  const auto args_of = [](int dtype, uintptr_t x, uintptr_t dout, uintptr_t out, int64_t batch, int64_t channels,
                          int64_t spatial, int64_t size, int64_t features, double eps) {
    return MinibatchStddev{static_cast<DType>(dtype),
                           pointer(x),
                           pointer(dout),
                           pointer(out),
                           batch,
                           channels,
                           spatial,
                           size,
                           features,
                           eps};
  };
  cpu.def(
      "minibatch_stddev",
      [args_of](int dtype, uintptr_t x, uintptr_t out, int64_t batch, int64_t channels, int64_t spatial, int64_t size,
                int64_t features, double eps, int64_t execution) {
        cpu::minibatch_stddev(args_of(dtype, x, 0, out, batch, channels, spatial, size, features, eps),
                              static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  cpu.def(
      "minibatch_stddev_backward",
      [args_of](int dtype, uintptr_t dout, uintptr_t x, uintptr_t dx, int64_t batch, int64_t channels, int64_t spatial,
                int64_t size, int64_t features, double eps, int64_t execution) {
        cpu::minibatch_stddev_backward(args_of(dtype, x, dout, dx, batch, channels, spatial, size, features, eps),
                                       static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

void bind_adain(pybind11::module_& cpu) {
  cpu.def(
      "instance_norm",
      [](int dtype, uintptr_t x, uintptr_t out, uintptr_t scale, uintptr_t shift, uintptr_t offset, uintptr_t rstd,
         int64_t planes, int64_t size, double eps, int64_t execution) {
        cpu::instance_norm({static_cast<DType>(dtype), pointer(x), nullptr, pointer(out), pointer(scale),
                            pointer(shift), pointer(offset), pointer(rstd), nullptr, nullptr, planes, size, eps},
                           static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  cpu.def(
      "instance_norm_backward",
      [](int dtype, uintptr_t dout, uintptr_t x, uintptr_t scale, uintptr_t offset, uintptr_t rstd, uintptr_t dx,
         uintptr_t dscale, uintptr_t dshift, int64_t planes, int64_t size, int64_t execution) {
        cpu::instance_norm_backward(
            {static_cast<DType>(dtype), pointer(x), pointer(dout), pointer(dx), pointer(scale), nullptr,
             pointer(offset), pointer(rstd), pointer(dscale), pointer(dshift), planes, size, 0.0},
            static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

void bind_gan(pybind11::module_& cpu) {
  bind_bias_act(cpu);
  bind_gan_loss(cpu);
  bind_spectral_normalize(cpu);
  bind_upfirdn2d(cpu);
  bind_minibatch_stddev(cpu);
  bind_adain(cpu);
}

}  // namespace genfast
