#include "bindings.h"
#include "vae/iwae_bound.h"
#include "vae/log_likelihood.h"
#include "vae/log_ratio.h"
#include "vae/reparameterize.h"
#include "vae/vector_quantize.h"

namespace genfast {
namespace {

ReparameterizeShape shape_of(int dtype, int64_t rows, int64_t event, int64_t samples, int64_t offset, uint64_t seed) {
  return {static_cast<DType>(dtype), rows, event, samples, offset, seed, nullptr, 1};
}

}  // namespace

// The signatures are those of csrc/cuda_bindings.cpp, where `execution` is a stream; here it is a thread count.
void bind_vae(pybind11::module_& cpu) {
  using Release = pybind11::call_guard<pybind11::gil_scoped_release>;
  cpu.def(
      "reparameterize_forward",
      [](int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t z, uintptr_t kl, int64_t rows, int64_t event,
         int64_t samples, int64_t offset, uint64_t seed, uintptr_t, int64_t, int64_t execution) {
        cpu::reparameterize_forward({shape_of(dtype, rows, event, samples, offset, seed), pointer(mu), pointer(logvar),
                                     pointer(z), pointer(kl)},
                                    static_cast<int>(execution));
      },
      Release());
  cpu.def(
      "reparameterize_backward",
      [](int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t dz, uintptr_t dkl, uintptr_t dmu, uintptr_t dlogvar,
         int64_t rows, int64_t event, int64_t samples, int64_t offset, uint64_t seed, uintptr_t, int64_t execution) {
        cpu::reparameterize_backward({shape_of(dtype, rows, event, samples, offset, seed), pointer(mu), pointer(logvar),
                                      pointer(dz), pointer(dkl), pointer(dmu), pointer(dlogvar)},
                                     static_cast<int>(execution));
      },
      Release());
  cpu.def(
      "reparameterize_jvp",
      [](int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t mu_tangent, uintptr_t logvar_tangent, uintptr_t z_tangent,
         uintptr_t kl_tangent, int64_t rows, int64_t event, int64_t samples, int64_t offset, uint64_t seed, uintptr_t,
         int64_t, int64_t execution) {
        cpu::reparameterize_jvp({shape_of(dtype, rows, event, samples, offset, seed), pointer(mu), pointer(logvar),
                                 pointer(mu_tangent), pointer(logvar_tangent), pointer(z_tangent), pointer(kl_tangent)},
                                static_cast<int>(execution));
      },
      Release());
  cpu.def(
      "log_ratio_forward",
      [](int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t z, uintptr_t ratio, int64_t rows, int64_t event,
         int64_t samples, int64_t offset, uint64_t seed, int64_t threads) {
        cpu::log_ratio_forward({shape_of(dtype, rows, event, samples, offset, seed), pointer(mu), pointer(logvar),
                                pointer(z), pointer(ratio)},
                               static_cast<int>(threads));
      },
      Release());
  cpu.def(
      "log_ratio_backward",
      [](int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t dz, uintptr_t dratio, uintptr_t weights, uintptr_t dmu,
         uintptr_t dlogvar, int64_t rows, int64_t event, int64_t samples, int64_t offset, uint64_t seed, bool path,
         int64_t threads) {
        cpu::log_ratio_backward({shape_of(dtype, rows, event, samples, offset, seed), pointer(mu), pointer(logvar),
                                 pointer(dz), pointer(dratio), pointer(weights), pointer(dmu), pointer(dlogvar), path},
                                static_cast<int>(threads));
      },
      Release());
  cpu.def(
      "log_ratio_jvp",
      [](int dtype, uintptr_t mu, uintptr_t logvar, uintptr_t mu_tangent, uintptr_t logvar_tangent, uintptr_t z_tangent,
         uintptr_t ratio_tangent, int64_t rows, int64_t event, int64_t samples, int64_t offset, uint64_t seed,
         bool path, int64_t threads) {
        cpu::log_ratio_jvp(
            {shape_of(dtype, rows, event, samples, offset, seed), pointer(mu), pointer(logvar), pointer(mu_tangent),
             pointer(logvar_tangent), pointer(z_tangent), pointer(ratio_tangent), path},
            static_cast<int>(threads));
      },
      Release());
  cpu.def(
      "iwae_bound_forward",
      [](int dtype, uintptr_t log_weights, uintptr_t bound, int64_t samples, int64_t columns, int64_t threads) {
        cpu::iwae_bound_forward({{static_cast<DType>(dtype), samples, columns}, pointer(log_weights), pointer(bound)},
                                static_cast<int>(threads));
      },
      Release());
  cpu.def(
      "iwae_bound_backward",
      [](int dtype, uintptr_t dbound, uintptr_t log_weights, uintptr_t dlog_weights, int64_t samples, int64_t columns,
         int64_t threads) {
        cpu::iwae_bound_backward({{static_cast<DType>(dtype), samples, columns},
                                  pointer(dbound),
                                  pointer(log_weights),
                                  pointer(dlog_weights)},
                                 static_cast<int>(threads));
      },
      Release());
  cpu.def(
      "iwae_bound_jvp",
      [](int dtype, uintptr_t tangent, uintptr_t log_weights, uintptr_t bound_tangent, int64_t samples, int64_t columns,
         int64_t threads) {
        cpu::iwae_bound_jvp({{static_cast<DType>(dtype), samples, columns},
                             pointer(tangent),
                             pointer(log_weights),
                             pointer(bound_tangent)},
                            static_cast<int>(threads));
      },
      Release());
  cpu.def(
      "nearest_code",
      [](int dtype, uintptr_t z, uintptr_t codebook, int64_t rows, int64_t codes, int64_t dim, uintptr_t indices,
         uintptr_t distances, uintptr_t selected, int64_t execution) {
        return static_cast<int>(
            cpu::nearest_code({static_cast<DType>(dtype), pointer(z), pointer(codebook), rows, codes, dim,
                               pointer<int64_t>(indices), pointer(distances), pointer(selected)},
                              static_cast<int>(execution)));
      },
      Release());
  cpu.def(
      "code_sums",
      [](int dtype, uintptr_t x, uintptr_t indices, int64_t rows, int64_t codes, int64_t dim, uintptr_t sums,
         uintptr_t counts, int64_t execution) {
        return cpu::code_sums({static_cast<DType>(dtype), pointer(x), pointer<const int64_t>(indices), rows, codes, dim,
                               pointer(sums), pointer<int64_t>(counts)},
                              static_cast<int>(execution));
      },
      Release());
  cpu.def(
      "log_likelihood",
      [](int likelihood, int dtype, int x_dtype, uintptr_t params, uintptr_t shared, uintptr_t x, uintptr_t value,
         uintptr_t to_params, uintptr_t to_shared, int64_t rows, int64_t planes, int64_t size, int64_t targets,
         int64_t x_rows, int64_t shared_rows, double logvar, double factor, int64_t execution) {
        return cpu::log_likelihood(
            {static_cast<Likelihood>(likelihood), static_cast<DType>(dtype), x_dtype, pointer(params), pointer(shared),
             pointer(x), pointer(value), pointer(to_params), pointer(to_shared), rows, planes, size, targets, x_rows,
             shared_rows, logvar, factor},
            static_cast<int>(execution));
      },
      Release());
  cpu.def(
      "scale_rows",
      [](int dtype, uintptr_t values, uintptr_t cotangent, int64_t rows, int64_t event, double held,
         int64_t execution) {
        cpu::scale_rows({static_cast<DType>(dtype), pointer(values), pointer(cotangent), rows, event, held},
                        static_cast<int>(execution));
      },
      Release());
}

}  // namespace genfast
