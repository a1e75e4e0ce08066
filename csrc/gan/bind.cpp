#include "bindings.h"
#include "gan/diff_augment.h"
#include "gan/gan_loss.h"

namespace genfast {

void bind_gan(pybind11::module_& cpu) {
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

}  // namespace genfast
