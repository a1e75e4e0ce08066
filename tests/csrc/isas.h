// The instruction sets that this binary holds and this machine runs (AVX-512 and AMX also where they are emulated).
#pragma once

#include <vector>

#include "probe.h"

inline std::vector<genfast::Isa> isas() {
  std::vector<genfast::Isa> found;
  for (genfast::Isa isa : genfast::kIsas) {
    if (genfast::isa_available(isa)) found.push_back(isa);
  }
  return found;
}

// Runs body(probe, name) with each instruction set in force.
template <typename Body>
void for_each_isa(const Body& body) {
  const genfast::Isa before = genfast::current_isa();
  for (genfast::Isa isa : isas()) {
    genfast::set_isa(isa);
    body(*GENFAST_FOR_ISA(probe)(), genfast::isa_name(isa));
  }
  genfast::set_isa(before);
}
