// Takes the place of csrc/common/cpu_features.cpp where the AVX-512 kernels run through SIMDe: all may be chosen.
#include <stdexcept>

#include "common/cpu_features.h"

namespace genfast {
namespace {

Isa state = Isa::kAvx512;

}  // namespace

Isa current_isa() { return state; }
bool isa_available(Isa isa) { return isa == Isa::kBaseline || isa == Isa::kAvx512; }
const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }
void set_isa(Isa isa) {
  if (!isa_available(isa)) throw std::invalid_argument("not in this binary");
  state = isa;
}

}  // namespace genfast
