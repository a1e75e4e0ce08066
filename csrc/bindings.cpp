#include "bindings.h"

#include <pybind11/stl.h>

#include <optional>

#include "common/cpu_features.h"
#include "kernel_manifest.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using genfast::Isa;
  m.doc() = "genfast's compiled core; private, use genfast.ops.";

#if defined(GENFAST_WITH_CUDA)
  m.attr("has_cuda") = true;
  py::module_ cuda = m.def_submodule("cuda");
  genfast::bind_cuda(cuda);
#else
  m.attr("has_cuda") = false;
#endif
  py::module_ cpu = m.def_submodule("cpu");
  genfast::bind_vae(cpu);
  genfast::bind_rbm(cpu);
  genfast::bind_attention(cpu);
  genfast::bind_transformer(cpu);
  genfast::bind_gan(cpu);

  m.def("kernel_manifest", [] { return genfast::kKernelManifest; });
  m.def("cpu_isa", [] { return genfast::isa_name(genfast::current_isa()); });
  m.def("cpu_isas", [] {
    py::list names;
    for (Isa isa : genfast::kIsas) {
      if (genfast::isa_available(isa)) names.append(genfast::isa_name(isa));
    }
    return names;
  });
  m.def("set_cpu_isa", [](const std::string& name) {
    for (Isa isa : genfast::kIsas) {
      if (name == genfast::isa_name(isa)) return genfast::set_isa(isa);
    }
    throw std::invalid_argument("unknown instruction set '" + name + "': choose baseline, avx2, avx512 or amx");
  });
  m.def("set_bfloat16_pairs", [](std::optional<bool> choice) {  // for tests: None leaves it to the machine
    using genfast::Choice;
    genfast::set_bfloat16_pairs(!choice.has_value() ? Choice::kAuto : *choice ? Choice::kOn : Choice::kOff);
  });
  m.def("bfloat16_pairs", &genfast::use_bfloat16_pairs);
  genfast::current_isa();  // a wrong GENFAST_CPU is reported at import
}
