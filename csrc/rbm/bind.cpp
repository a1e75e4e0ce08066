#include "bindings.h"
#include "common/gemm/gemm.h"
#include "rbm/bernoulli_sample.h"
#include "rbm/rbm_ais.h"
#include "rbm/rbm_cd.h"
#include "rbm/rbm_gibbs.h"
#include "rbm/rbm_half_step.h"

namespace genfast {

namespace {

RbmParameters parameters_of(int dtype, uintptr_t W, int64_t visible, int64_t hidden, uintptr_t b, uintptr_t c,
                            uintptr_t inverse_variance, uintptr_t deviation, int visible_kind, int hidden_kind,
                            int64_t visible_categories, int64_t hidden_categories, bool rounded) {
  return {static_cast<DType>(dtype),
          pointer(W),
          visible,
          hidden,
          pointer<const float>(b),
          pointer<const float>(c),
          pointer<const float>(inverse_variance),
          pointer<const float>(deviation),
          static_cast<UnitKind>(visible_kind),
          static_cast<UnitKind>(hidden_kind),
          visible_categories,
          hidden_categories,
          rounded};
}

}  // namespace

void bind_rbm(pybind11::module_& cpu) {
  cpu.def(
      "bernoulli_sample",
      [](int dtype, int sample_dtype, uintptr_t logits, uintptr_t bias, uintptr_t sample, uintptr_t prob, int64_t rows,
         int64_t columns, double beta, uint64_t seed, uintptr_t, int64_t row_offset, int64_t col_offset, int64_t step,
         int64_t execution) {
        return cpu::bernoulli_sample(
            {static_cast<DType>(dtype), static_cast<DType>(sample_dtype), pointer(logits), pointer(bias),
             pointer(sample), pointer(prob), rows, columns, beta, seed, nullptr, row_offset, col_offset, step},
            static_cast<int>(execution));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());

  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  pybind11::class_<RbmParameters>(cpu, "RbmParameters").def(pybind11::init(&parameters_of));
  cpu.def(
      "rbm_half_step",
      [](const RbmParameters& parameters, bool up, int state_dtype, uintptr_t x, int64_t rows, uintptr_t beta,
         int64_t beta_count, uint64_t seed, int64_t chain_offset, int64_t step, int sample_dtype, uintptr_t sample,
         uintptr_t mean, bool x_packed, bool sample_packed, int threads) {
        return cpu::rbm_half_step(
            {parameters, up, static_cast<DType>(state_dtype), pointer(x), rows, pointer<const float>(beta), beta_count,
             seed, chain_offset, step, static_cast<DType>(sample_dtype), pointer(sample), pointer(mean), x_packed,
             sample_packed},
            threads);
      },
      release);
  cpu.def(
      "rbm_free_energy",
      [](const RbmParameters& parameters, int state_dtype, uintptr_t v, int64_t rows, uintptr_t out, int threads) {
        cpu::rbm_free_energy({parameters, static_cast<DType>(state_dtype), pointer(v), rows, pointer<float>(out)},
                             threads);
      },
      release);
  cpu.def(
      "rbm_gibbs",
      [](const RbmParameters& parameters, int state_dtype, uintptr_t v, int64_t chains, uintptr_t beta,
         int64_t beta_count, uintptr_t clamp, int64_t clamp_rows, uint64_t seed, int64_t k, int64_t chain_offset,
         int64_t step, uintptr_t visible, uintptr_t hidden, int threads) {
        return cpu::rbm_gibbs(
            {parameters, static_cast<DType>(state_dtype), pointer(v), chains, pointer<const float>(beta), beta_count,
             pointer<const uint8_t>(clamp), clamp_rows, seed, k, chain_offset, step, pointer(visible), pointer(hidden)},
            threads);
      },
      release);
  cpu.def(
      "rbm_cd",
      [](const RbmParameters& parameters, int v_dtype, uintptr_t v, int64_t rows, int chains_dtype, uintptr_t chains,
         int64_t chain_count, uintptr_t visible_offset, uintptr_t hidden_offset, uint64_t seed, int64_t k,
         int64_t chain_offset, int64_t step, bool sample_hidden, uintptr_t dW, uintptr_t db, uintptr_t dc,
         uintptr_t moved, uintptr_t statistics, uintptr_t hidden_mean, uintptr_t moving_W, uintptr_t velocity,
         double rate, double momentum, double weight_decay, int threads) {
        const RbmSgd sgd = {static_cast<float>(rate), static_cast<float>(momentum), static_cast<float>(weight_decay),
                            pointer<float>(moving_W), pointer<float>(velocity)};
        return cpu::rbm_cd({parameters,
                            static_cast<DType>(v_dtype),
                            pointer(v),
                            rows,
                            static_cast<DType>(chains_dtype),
                            pointer(chains),
                            chain_count,
                            pointer<const float>(visible_offset),
                            pointer<const float>(hidden_offset),
                            seed,
                            k,
                            chain_offset,
                            step,
                            sample_hidden,
                            pointer<float>(dW),
                            pointer<float>(db),
                            pointer<float>(dc),
                            pointer(moved),
                            pointer<float>(statistics),
                            pointer<float>(hidden_mean),
                            moving_W == 0 ? nullptr : &sgd},
                           threads);
      },
      release);
  cpu.def(
      "rbm_ais",
      [](const RbmParameters& parameters, uintptr_t base_bias, uintptr_t bias, uintptr_t betas, int64_t count,
         int64_t chains, bool start, uint64_t seed, int64_t chain_offset, int64_t step, uintptr_t state,
         uintptr_t log_weights, int threads) {
        return cpu::rbm_ais(
            {parameters, pointer<const double>(base_bias), pointer<const double>(bias), pointer<const double>(betas),
             count, chains, start, seed, chain_offset, step, pointer<float>(state), pointer<double>(log_weights)},
            threads);
      },
      release);
  cpu.def(
      "matmul",
      [](uintptr_t a, uintptr_t b, uintptr_t c, int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed,
         int threads) {
        cpu::matmul(pointer<const float>(a), pointer<const float>(b), pointer<float>(c), m, n, k, a_transposed,
                    b_transposed, threads);
      },
      release);
}

}  // namespace genfast
