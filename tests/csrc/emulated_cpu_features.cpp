// Takes the place of csrc/common/cpu_features.cpp where kernels for AVX-512 or AMX run in emulation.
#include <stdexcept>

#include "common/cpu_features.h"

namespace genfast {
namespace {

Isa state = Isa::kAvx512;
Choice pairs = Choice::kAuto;

}  // namespace

Isa current_isa() { return state; }

bool isa_available(Isa isa) {
#if defined(GENFAST_WITH_AMX)
  if (isa == Isa::kAmx) return true;
#endif
  return isa != Isa::kAmx;
}

const char* isa_name(Isa isa) {
#if defined(GENFAST_EMULATED_AVX512)
  constexpr const char* kNames[] = {"baseline", "avx2", "emulated avx512", "emulated amx"};
#else
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "emulated amx"};
#endif
  return kNames[static_cast<int>(isa)];
}

void set_isa(Isa isa) {
  if (!isa_available(isa)) throw std::invalid_argument("not in this binary");
  state = isa;
}

bool use_bfloat16_pairs() {
#if !defined(GENFAST_EMULATED_AVX512) && defined(GENFAST_WITH_AMX)
  if (state == Isa::kAvx512 && !__builtin_cpu_supports("avx512bf16")) return false;
#endif
  return pairs == Choice::kOn;
}

void set_bfloat16_pairs(Choice choice) { pairs = choice; }

}  // namespace genfast
