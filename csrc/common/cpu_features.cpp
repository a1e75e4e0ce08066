#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace genfast {
namespace {

bool machine_runs(Isa isa) {
#if defined(GENFAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

Isa parse(const std::string& name) {
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "' (GENFAST_CPU): choose baseline, avx2 or avx512");
}

void require(Isa isa) {
  if (!isa_available(isa)) {
    throw std::invalid_argument(std::string("the instruction set ") + isa_name(isa) +
                                " is not available on this machine");
  }
}

Isa initial() {
  const char* forced = std::getenv("GENFAST_CPU");
  if (forced != nullptr && *forced != '\0') {
    const Isa isa = parse(forced);
    require(isa);
    return isa;
  }
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
    if (isa_available(isa)) return isa;
  }
  return Isa::kBaseline;
}

std::atomic<int>& state() {
  static std::atomic<int> isa{static_cast<int>(initial())};
  return isa;
}

}  // namespace

bool isa_available(Isa isa) { return machine_runs(isa); }

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

Isa current_isa() { return static_cast<Isa>(state().load(std::memory_order_relaxed)); }

void set_isa(Isa isa) {
  require(isa);
  state().store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace genfast
