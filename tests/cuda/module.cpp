// The CUDA RBM kernels, emulated, behind the bindings of csrc/cuda_bindings.cpp: genfast/launch/_rbm_cuda.py runs on
// it.
#include "emulate.h"

// The kernels, their launchers and their bindings, as they are.
#include "cuda_bindings.cpp"
#include "rbm/rbm_cd.cu"
#include "rbm/rbm_free_energy.cu"
#include "rbm/rbm_gibbs.cu"
#include "rbm/rbm_half_step.cu"

extern "C" {
cudaError_t cudaGetDeviceCount(int*) { return cudaErrorNoDevice; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int*) { return cudaErrorNoDevice; }
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
}

namespace genfast {
namespace cuda {
void reparameterize_forward(const ReparameterizeForward&, void*) {}
void reparameterize_backward(const ReparameterizeBackward&, void*) {}
void reparameterize_jvp(const ReparameterizeJvp&, void*) {}
int64_t reparameterize_kl_chunks(int64_t) { return 0; }
void bernoulli_sample(const BernoulliSample&, void*) {}
}  // namespace cuda
}  // namespace genfast

PYBIND11_MODULE(genfast_emulated, m) {
  genfast::bind_cuda(m);
  m.def("set_processors", [](int count) { emulate::processors = count; });
}
