// The CUDA kernels for Python: pointers and the stream cross as integers, 0 for none. The current device must be the
// one that the pointers and the stream belong to.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <string>

#include "bindings.h"
#include "rbm/bernoulli_sample.h"
#include "rbm/rbm_half_step_cuda.h"
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

RbmOperand rbm_operand(uintptr_t data, int64_t part_stride, int64_t stride, int parts, uintptr_t row_parts) {
  return {pointer(data), part_stride, stride, parts, pointer<const uint8_t>(row_parts)};
}

RbmDraw rbm_draw(int kind, int64_t rows, int64_t units, uintptr_t bias, uintptr_t beta, int64_t beta_count,
                 uintptr_t deviation, uint64_t seed, uintptr_t seed_pointer, int64_t chain_offset, int64_t step) {
  RbmDraw draw = {};
  draw.kind = static_cast<UnitKind>(kind);
  draw.rows = rows;
  draw.units = units;
  draw.bias = pointer<const float>(bias);
  draw.beta = pointer<const float>(beta);
  draw.beta_count = beta_count;
  draw.deviation = pointer<const float>(deviation);
  draw.seed = seed;
  draw.seed_pointer = pointer<const int64_t>(seed_pointer);
  draw.chain_offset = chain_offset;
  draw.step = step;
  return draw;
}

void rbm_prepare(int dtype, uintptr_t from, int64_t rows, int64_t columns, uintptr_t scale, int parts, uintptr_t to,
                 int64_t part_stride, int64_t stride, uintptr_t row_parts, uintptr_t execution) {
  cuda::rbm_prepare({static_cast<DType>(dtype), pointer(from), rows, columns, pointer<const float>(scale), parts,
                     pointer(to), part_stride, stride, pointer<uint8_t>(row_parts)},
                    pointer(execution));
}

void rbm_half_step(const RbmOperand& weights, const RbmOperand& x, int64_t visible, int64_t hidden, bool up,
                   RbmDraw draw, int target_dtype, uintptr_t target, int state_dtype, uintptr_t state,
                   uintptr_t operand, int64_t operand_stride, int mean_dtype, uintptr_t mean, float mean_scale,
                   uintptr_t log_partition, uintptr_t squared_error, uintptr_t execution) {
  draw.target_dtype = static_cast<DType>(target_dtype);
  draw.target = pointer(target);
  draw.state_dtype = static_cast<DType>(state_dtype);
  draw.state = pointer(state);
  draw.operand = pointer(operand);
  draw.operand_stride = operand_stride;
  draw.mean_dtype = static_cast<DType>(mean_dtype);
  draw.mean = pointer(mean);
  draw.mean_scale = mean_scale;
  draw.log_partition = pointer<float>(log_partition);
  draw.squared_error = pointer<float>(squared_error);
  cuda::rbm_half_step({weights, x, visible, hidden, up, draw}, pointer(execution));
}

RbmGibbsCuda rbm_gibbs_of(const RbmOperand& up_weights, const RbmOperand& down_weights, const RbmOperand& x,
                          int64_t visible, int64_t hidden, int64_t chains, int visible_kind, int hidden_kind, int dtype,
                          bool rounded, uintptr_t b, uintptr_t c, uintptr_t deviation, uintptr_t beta,
                          int64_t beta_count, uintptr_t clamp, int64_t clamp_rows, int target_dtype, uintptr_t target,
                          uint64_t seed, uintptr_t seed_pointer, int64_t k, int64_t chain_offset, int64_t step,
                          uintptr_t visible_out, uintptr_t hidden_out, int form) {
  return {up_weights,
          down_weights,
          x,
          visible,
          hidden,
          chains,
          static_cast<UnitKind>(visible_kind),
          static_cast<UnitKind>(hidden_kind),
          static_cast<DType>(dtype),
          rounded,
          pointer<const float>(b),
          pointer<const float>(c),
          pointer<const float>(deviation),
          pointer<const float>(beta),
          beta_count,
          pointer<const uint8_t>(clamp),
          clamp_rows,
          static_cast<DType>(target_dtype),
          pointer(target),
          seed,
          pointer<const int64_t>(seed_pointer),
          k,
          chain_offset,
          step,
          pointer(visible_out),
          pointer(hidden_out),
          nullptr,
          0,
          static_cast<RbmGibbsForm>(form)};
}

void rbm_gibbs(RbmGibbsCuda args, uintptr_t workspace, int64_t workspace_bytes, uintptr_t execution) {
  args.workspace = pointer(workspace);
  args.workspace_bytes = workspace_bytes;
  cuda::rbm_gibbs(args, pointer(execution));
}

void rbm_free_energy(int dtype, uintptr_t v, int64_t rows, int64_t visible, int64_t hidden, uintptr_t b,
                     uintptr_t inverse_variance, bool gaussian, uintptr_t log_partition, uintptr_t out,
                     uintptr_t execution) {
  cuda::rbm_free_energy(
      {static_cast<DType>(dtype), pointer(v), rows, visible, hidden, pointer<const float>(b),
       pointer<const float>(inverse_variance), gaussian, pointer<const float>(log_partition), pointer<float>(out)},
      pointer(execution));
}

void rbm_statistics(uintptr_t squared_error, int64_t rows, int64_t visible, uintptr_t data, uintptr_t model,
                    int64_t chains, uintptr_t out, uintptr_t execution) {
  cuda::rbm_statistics({pointer<const float>(squared_error), rows, visible, pointer<const float>(data),
                        pointer<const float>(model), chains, pointer<float>(out)},
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
  py::class_<RbmOperand>(m, "RbmOperand", py::module_local()).def(py::init(&rbm_operand));
  py::class_<RbmDraw>(m, "RbmDraw", py::module_local()).def(py::init(&rbm_draw));
  py::class_<RbmGibbsCuda>(m, "RbmGibbs", py::module_local()).def(py::init(&rbm_gibbs_of));
  m.def("rbm_prepare", &rbm_prepare, release);
  m.def("rbm_half_step", &rbm_half_step, release);
  m.def("rbm_gibbs_workspace", &cuda::rbm_gibbs_workspace, release);
  m.def("rbm_gibbs", &rbm_gibbs, release);
  m.def("rbm_free_energy", &rbm_free_energy, release);
  m.def("rbm_statistics", &rbm_statistics, release);
}

}  // namespace genfast
