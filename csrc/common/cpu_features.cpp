#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(GENFAST_WITH_AMX)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace genfast {
namespace {

#if defined(GENFAST_WITH_AMX)
bool cpu_has_bfloat16_products() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 5 & 1) != 0;  // AVX512_BF16
}

bool cpu_has_amx() {
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  const bool tiles = (d >> 24 & 1) != 0 && (d >> 22 & 1) != 0;  // AMX-TILE, AMX-BF16
  return tiles && cpu_has_bfloat16_products();
}

// Linux saves the tiles of a process only after this request; it holds for all its threads and for forks.
bool system_grants_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool may_use_amx() {
  static const bool may = cpu_has_amx() && system_grants_tiles();
  return may;
}
#else  // the compiler does not know these instructions
bool cpu_has_bfloat16_products() { return false; }
bool may_use_amx() { return false; }
#endif

bool machine_runs(Isa isa) {
#if defined(GENFAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAmx:
      return avx512 && may_use_amx();
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

Isa parse(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("unknown instruction set '" + name +
                              "' (GENFAST_CPU): choose baseline, avx2, avx512 or amx");
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
  for (Isa isa : {Isa::kAmx, Isa::kAvx512, Isa::kAvx2}) {
    if (isa_available(isa)) return isa;
  }
  return Isa::kBaseline;
}

std::atomic<Choice> pairs{Choice::kAuto};

std::atomic<int>& state() {
  static std::atomic<int> isa{static_cast<int>(initial())};
  return isa;
}

}  // namespace

bool isa_available(Isa isa) { return machine_runs(isa); }

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(isa)];
}

Isa current_isa() { return static_cast<Isa>(state().load(std::memory_order_relaxed)); }

void set_isa(Isa isa) {
  require(isa);
  state().store(static_cast<int>(isa), std::memory_order_relaxed);
}

bool use_bfloat16_pairs() {
  static const bool in_hardware = cpu_has_bfloat16_products();
  const Choice choice = pairs.load(std::memory_order_relaxed);
  const bool wide = current_isa() == Isa::kAvx512 || current_isa() == Isa::kAmx;
#if defined(GENFAST_WITH_AMX)
  const bool possible = in_hardware || !wide;
#else
  const bool possible = true;  // kernels for AVX-512 then have no such instruction
#endif
  return possible && (choice == Choice::kAuto ? in_hardware && wide : choice == Choice::kOn);
}

void set_bfloat16_pairs(Choice choice) { pairs.store(choice, std::memory_order_relaxed); }

}  // namespace genfast
