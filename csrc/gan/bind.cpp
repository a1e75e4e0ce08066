#include "bindings.h"

namespace genfast {

void bind_gan(pybind11::module_& cpu) { (void)cpu; }

}  // namespace genfast
