// Takes the place of csrc/common/cpu_features.cpp where the kernels for AVX-512 and AMX run in emulation.
#include <stdexcept>

#include "common/cpu_features.h"

namespace genfast {
namespace {

Isa state = Isa::kAvx512;

}  // namespace

Isa current_isa() { return state; }

bool isa_available(Isa isa) {
#if defined(GENFAST_WITH_AMX)
  if (isa == Isa::kAmx) return true;
#endif
  return isa == Isa::kBaseline || isa == Isa::kAvx512;
}

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "emulated avx512", "emulated amx"};
  return kNames[static_cast<int>(isa)];
}

void set_isa(Isa isa) {
  if (!isa_available(isa)) throw std::invalid_argument("not in this binary");
  state = isa;
}

}  // namespace genfast
