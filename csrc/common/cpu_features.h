// Instruction sets: which this binary holds, which this machine runs, and how a kernel is compiled once for each.
//
// A kernel file <family>/<op>_cpu.cpp is compiled several times, each time with the flags of one instruction set and
// GENFAST_ISA naming a namespace of its own; for AMX only where it multiplies matrices. Everything such a file uses is
// a template or function of that namespace or has internal linkage, and no STL: else the linker could keep the AVX-512
// copy of a shared inline function for an older CPU. tests/test_instruction_sets.py looks at the disassembly for leaks.
#pragma once

#include <cstdint>

namespace genfast {

// kAmx: AVX-512 with the matrix product on AMX tiles (common/gemm/product_amx.h).
enum class Isa : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

// The instruction set in use: the best that the machine runs, or the one GENFAST_CPU names (baseline, avx2, avx512,
// amx).
Isa current_isa();

// Whether this binary holds kernels for `isa` and the machine runs them. Of a machine with AMX, the first question asks
// the operating system to let this process use the tiles.
bool isa_available(Isa isa);

const char* isa_name(Isa isa);

// Forces an instruction set; throws std::invalid_argument where it is not available.
void set_isa(Isa isa);

// Whether bfloat16 is multiplied in pairs (common/gemm/product_bfloat16.h: on tiles with AMX, else on vectors), not
// widened: by default with AVX-512 or AMX where the machine has AVX512_BF16. Tests may ask for pairs elsewhere, where
// they are slower but right; kernels for AVX-512 cannot do without the instruction.
bool use_bfloat16_pairs();
enum class Choice : int32_t { kAuto = -1, kOff = 0, kOn = 1 };
void set_bfloat16_pairs(Choice choice);

}  // namespace genfast

// Declares `ret name args` in the namespace of each vector instruction set. AMX adds nothing but matrix products: its
// namespace names the function for AVX-512. GENFAST_WITH_AMX: the compiler knew the flags of AMX.
//
// GENFAST_DECLARE_WITH_PRODUCT: the same for files that multiply matrices, which are compiled for AMX too.
#if defined(GENFAST_WITH_AMX)
#define GENFAST_NAME_FOR_AMX(name) \
  namespace amx {                  \
  using ::genfast::avx512::name;   \
  }
#define GENFAST_DECLARE_FOR_AMX(ret, name, args) \
  namespace amx {                                \
  ret name args;                                 \
  }
#define GENFAST_IF_AMX(name) ::genfast::current_isa() == ::genfast::Isa::kAmx ? &::genfast::amx::name:
#else
#define GENFAST_NAME_FOR_AMX(name)
#define GENFAST_DECLARE_FOR_AMX(ret, name, args)
#define GENFAST_IF_AMX(name)
#endif
#define GENFAST_DECLARE_BASELINE(ret, name, args) \
  namespace baseline {                            \
  ret name args;                                  \
  }
#if defined(GENFAST_X86)
#define GENFAST_DECLARE_VECTORS(ret, name, args) \
  GENFAST_DECLARE_BASELINE(ret, name, args)      \
  namespace avx2 {                               \
  ret name args;                                 \
  }                                              \
  namespace avx512 {                             \
  ret name args;                                 \
  }
#define GENFAST_DECLARE_PER_ISA(ret, name, args) \
  GENFAST_DECLARE_VECTORS(ret, name, args)       \
  GENFAST_NAME_FOR_AMX(name)
#define GENFAST_DECLARE_WITH_PRODUCT(ret, name, args) \
  GENFAST_DECLARE_VECTORS(ret, name, args)            \
  GENFAST_DECLARE_FOR_AMX(ret, name, args)
#define GENFAST_FOR_ISA(name)                                                                         \
  (GENFAST_IF_AMX(name)::genfast::current_isa() == ::genfast::Isa::kAvx512 ? &::genfast::avx512::name \
   : ::genfast::current_isa() == ::genfast::Isa::kAvx2                     ? &::genfast::avx2::name   \
                                                                           : &::genfast::baseline::name)
#else
#define GENFAST_DECLARE_PER_ISA(ret, name, args) GENFAST_DECLARE_BASELINE(ret, name, args)
#define GENFAST_DECLARE_WITH_PRODUCT(ret, name, args) GENFAST_DECLARE_BASELINE(ret, name, args)
#define GENFAST_FOR_ISA(name) (&::genfast::baseline::name)
#endif
