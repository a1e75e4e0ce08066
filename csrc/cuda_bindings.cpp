// The CUDA kernels for Python: pointers and the stream cross as integers, 0 for none. The current device must be the
// one that the pointers and the stream belong to.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <string>

#include "bindings.h"
#include "rbm/bernoulli_sample.h"
#include "vae/reparameterize.h"

namespace genfast {
namespace {

namespace py = pybind11;

// Any error, a missing driver among them, means 0 devices; cudaGetDeviceCount then leaves its argument as it was.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The CUDA version that the driver supports; 0 without a driver. Asked of the driver itself, because the static runtime
// returns the same error for a driver that is missing and for one that is too old.
int driver_version() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return 0;
  int version = 0;
  const auto get = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  if (get == nullptr || get(&version) != 0) version = 0;
  return version;  // the library stays loaded: the runtime uses it too
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? "ok" : "no device";
  cudaGetLastError();
  const int driver = driver_version();
  if (driver == 0) return "no driver";
  if (error == cudaErrorInsufficientDriver) {
    return "driver too old: it supports CUDA " + version_name(driver) + ", genfast was built with CUDA " +
           version_name(runtime_version()) + "; update the driver, or install a genfast wheel built for an older CUDA";
  }
  if (error == cudaErrorNoDevice) return "no device";
  return std::string("error: ") + cudaGetErrorString(error);
}

std::pair<int, int> compute_capability(int device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("compute_capability: CUDA error: ") + cudaGetErrorString(error));
  }
  return {major, minor};
}

ReparameterizeShape shape_of(int dtype, int64_t rows, int64_t event, int64_t samples, int64_t offset, uint64_t seed,
                             uintptr_t seed_pointer, int64_t kl_chunks) {
  return {
      static_cast<DType>(dtype), rows, event, samples, offset, seed, pointer<const int64_t>(seed_pointer), kl_chunks};
}

void reparameterize_forward(int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t z, uintptr_t kl, int64_t rows,
                            int64_t event, int64_t samples, int64_t offset, uint64_t seed, uintptr_t seed_pointer,
                            int64_t kl_chunks, uintptr_t execution) {
  cuda::reparameterize_forward({shape_of(dtype, rows, event, samples, offset, seed, seed_pointer, kl_chunks),
                                pointer(mu), pointer(logvar), pointer(z), pointer(kl)},
                               pointer(execution));
}

void reparameterize_backward(int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t dz, uintptr_t dkl, uintptr_t dmu,
                             uintptr_t dlogvar, int64_t rows, int64_t event, int64_t samples, int64_t offset,
                             uint64_t seed, uintptr_t seed_pointer, uintptr_t execution) {
  cuda::reparameterize_backward({shape_of(dtype, rows, event, samples, offset, seed, seed_pointer, 0), pointer(mu),
                                 pointer(logvar), pointer(dz), pointer(dkl), pointer(dmu), pointer(dlogvar)},
                                pointer(execution));
}

void reparameterize_jvp(int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t mu_tangent, uintptr_t logvar_tangent,
                        uintptr_t z_tangent, uintptr_t kl_tangent, int64_t rows, int64_t event, int64_t samples,
                        int64_t offset, uint64_t seed, uintptr_t seed_pointer, int64_t kl_chunks, uintptr_t execution) {
  cuda::reparameterize_jvp(
      {shape_of(dtype, rows, event, samples, offset, seed, seed_pointer, kl_chunks), pointer(mu), pointer(logvar),
       pointer(mu_tangent), pointer(logvar_tangent), pointer(z_tangent), pointer(kl_tangent)},
      pointer(execution));
}

void bernoulli_sample(int dtype, int sample_dtype, uintptr_t logits, uintptr_t bias, uintptr_t sample, uintptr_t prob,
                      int64_t rows, int64_t columns, double beta, uint64_t seed, uintptr_t seed_pointer,
                      int64_t row_offset, int64_t col_offset, int64_t step, uintptr_t execution) {
  cuda::bernoulli_sample(
      {static_cast<DType>(dtype), static_cast<DType>(sample_dtype), pointer(logits), pointer(bias), pointer(sample),
       pointer(prob), rows, columns, beta, seed, pointer<const int64_t>(seed_pointer), row_offset, col_offset, step},
      pointer(execution));
}

}  // namespace

void bind_cuda(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("device_count", &device_count, release);
  m.def("driver_version", &driver_version, release);
  m.def("runtime_version", &runtime_version, release);
  m.def("status", &status, release);
  m.def("compute_capability", &compute_capability, release);
  m.def("reparameterize_forward", &reparameterize_forward, release);
  m.def("reparameterize_backward", &reparameterize_backward, release);
  m.def("reparameterize_jvp", &reparameterize_jvp, release);
  m.def("reparameterize_kl_chunks", &cuda::reparameterize_kl_chunks, release);
  m.def("bernoulli_sample", &bernoulli_sample, release);
}

}  // namespace genfast
