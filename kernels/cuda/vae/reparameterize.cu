// Reparameterized Gaussian sample and KL(N(mu, e^logvar) || N(0, 1)); csrc/vae/reparameterize.h states the contract.
//
//   forward   z = mu + sigma eps                  kl = sum (mu^2 + (e^logvar - 1 - logvar)) / 2
//   backward  dmu = sum_k dz + dkl mu             dlogvar = sum_k dz eps sigma / 2 + dkl expm1(logvar) / 2
//   jvp       z' = mu' + eps sigma logvar' / 2    kl' = sum (mu mu' + expm1(logvar) logvar' / 2)
//
// sigma = s s with s = e^(logvar/4), which stays finite, and products run from the inside out, so that a zero factor
// gives zero where sigma overflows. eps comes from (seed, sample, offset + index) alone and is drawn again by every
// pass.
//
// Floor: the bytes. fp32 forward with KL reads 8 and writes 4 per element, backward reads 12 and writes 8.
// Tiling: common/launch.cuh. A lane handles eight neighbours at a time (four where rows are no multiple of eight),
// one Philox call per four; 2 to 32 lanes share a row or a 1024-element chunk of it. Without a KL, rows mean nothing
// and all elements form one row.
#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/vector.cuh"
#include "vae/reparameterize.h"

namespace genfast {
namespace cuda {
namespace {

__device__ __forceinline__ uint64_t seed_of(const ReparameterizeShape& shape) {
  return shape.seed_pointer != nullptr ? static_cast<uint64_t>(__ldg(shape.seed_pointer)) : shape.seed;
}

template <int N>
__device__ __forceinline__ void normals(uint64_t group, uint32_t step, uint64_t seed, float (&eps)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float four[4];
    tensor_normals(group + i / 4, step, seed, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) eps[i + j] = four[j];
  }
}

// factor expm1(logvar) / 2, exactly zero for a zero factor: from logvar = 17 on, e^logvar stays factored as s^4.
__device__ __forceinline__ float kl_logvar(float logvar, QuarterExp e, float factor) {
  return logvar >= 17.0f ? ((0.5f * factor * e.s) * e.s) * e.s * e.s : factor * half_expm1(logvar, e.half);
}

template <typename T, int kLane, bool kZ, bool kKl>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ ReparameterizeForward args, const __grid_constant__ Segments plan) {
  constexpr int kN = width_of(kLane);
  constexpr bool kAligned = kLane != 0;
  const T* mu_pointer = static_cast<const T*>(args.mu);
  const T* logvar_pointer = static_cast<const T*>(args.logvar);
  const uint64_t seed = kZ ? seed_of(args.shape) : 0;
  const int64_t sample_stride = plan.rows * plan.columns;
  float kl = 0.0f;
  for_each_segment<kAligned, kN>(
      plan, true,
      [&](int64_t row, int64_t column, uint64_t group) {
        const int64_t base = row * plan.columns;
        float mu[kN], logvar[kN], s[kN];
        load<kAligned>(mu_pointer + base, column, plan.columns, mu);
        load<kAligned>(logvar_pointer + base, column, plan.columns, logvar);
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const QuarterExp e = exp_quarter(logvar[i]);
          s[i] = e.s;
          if (kKl) kl += fmaf(0.5f * mu[i], mu[i], half_expm1_minus_x(logvar[i], e.half));  // masked elements add zero
        }
        if (kZ) {
          T* z_pointer = static_cast<T*>(args.z) + base;
#pragma unroll 1
          for (int64_t k = 0; k < args.shape.samples; ++k, z_pointer += sample_stride) {
            float z[kN];
            normals(group, static_cast<uint32_t>(k), seed, z);
#pragma unroll
            for (int i = 0; i < kN; ++i) z[i] = fmaf(s[i] * z[i], s[i], mu[i]);
            store<kAligned>(z_pointer, column, plan.columns, z);
          }
        }
      },
      [&](int64_t row, uint32_t chunk, bool writes) {
        if (!kKl) return;
        const float total = segment_sum(kl, plan.lane_bits);
        if (writes) static_cast<float*>(args.kl)[row * plan.chunks + chunk] = total;
        kl = 0.0f;
      });
}

template <typename T, int kLane, bool kDz, bool kDkl>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const __grid_constant__ ReparameterizeBackward args, const __grid_constant__ Segments plan) {
  constexpr int kN = width_of(kLane);
  constexpr bool kAligned = kLane != 0;
  const uint64_t seed = kDz ? seed_of(args.shape) : 0;
  const int64_t sample_stride = plan.rows * plan.columns;
  for_each_segment<kAligned, kN>(
      plan, true,
      [&](int64_t row, int64_t column, uint64_t group) {
        const int64_t base = row * plan.columns;
        float logvar[kN], dmu[kN] = {}, a[kN] = {};  // a = sum_k dz eps / 16 cannot overflow
        load<kAligned>(static_cast<const T*>(args.logvar) + base, column, plan.columns, logvar);
        if (kDz) {
          const T* dz_pointer = static_cast<const T*>(args.dz) + base;
#pragma unroll 1
          for (int64_t k = 0; k < args.shape.samples; ++k, dz_pointer += sample_stride) {
            float dz[kN], eps[kN];
            load<kAligned>(dz_pointer, column, plan.columns, dz);
            normals(group, static_cast<uint32_t>(k), seed, eps);
#pragma unroll
            for (int i = 0; i < kN; ++i) {
              dmu[i] += dz[i];
              a[i] = fmaf(dz[i], eps[i] * 0.0625f, a[i]);
            }
          }
        }
        const float dkl = kDkl ? __ldg(static_cast<const float*>(args.dkl) + row) : 0.0f;
        if (args.dmu != nullptr) {
          if (kDkl) {
            float mu[kN];
            load<kAligned>(static_cast<const T*>(args.mu) + base, column, plan.columns, mu);
#pragma unroll
            for (int i = 0; i < kN; ++i) dmu[i] = fmaf(dkl, mu[i], dmu[i]);
          }
          store<kAligned>(static_cast<T*>(args.dmu) + base, column, plan.columns, dmu);
        }
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const QuarterExp e = exp_quarter(logvar[i]);
          const bool large = logvar[i] >= 17.0f;
          const float inner = kDkl && large ? fmaf((dkl * 0.0625f) * e.s, e.s, a[i]) : a[i];
          const float small = kDkl && !large ? dkl * half_expm1(logvar[i], e.half) : 0.0f;
          a[i] = fmaf((inner * e.s) * e.s, 8.0f, small);
        }
        store<kAligned>(static_cast<T*>(args.dlogvar) + base, column, plan.columns, a);
      },
      [](int64_t, uint32_t, bool) {});
}

template <typename T, int kLane, bool kZ, bool kKl>
__global__ void __launch_bounds__(kThreads)
    jvp_kernel(const __grid_constant__ ReparameterizeJvp args, const __grid_constant__ Segments plan) {
  constexpr int kN = width_of(kLane);
  constexpr bool kAligned = kLane != 0;
  const uint64_t seed = kZ ? seed_of(args.shape) : 0;
  const int64_t sample_stride = plan.rows * plan.columns;
  float kl = 0.0f;
  for_each_segment<kAligned, kN>(
      plan, true,
      [&](int64_t row, int64_t column, uint64_t group) {
        const int64_t base = row * plan.columns;
        float logvar[kN], mu_tangent[kN], logvar_tangent[kN], s[kN];
        load<kAligned>(static_cast<const T*>(args.logvar) + base, column, plan.columns, logvar);
        load<kAligned>(static_cast<const T*>(args.mu_tangent) + base, column, plan.columns, mu_tangent);
        load<kAligned>(static_cast<const T*>(args.logvar_tangent) + base, column, plan.columns, logvar_tangent);
        float mu[kN] = {};
        if (kKl) load<kAligned>(static_cast<const T*>(args.mu) + base, column, plan.columns, mu);
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const QuarterExp e = exp_quarter(logvar[i]);
          s[i] = e.s;
          if (kKl) kl += fmaf(mu[i], mu_tangent[i], kl_logvar(logvar[i], e, logvar_tangent[i]));
        }
        if (kZ) {
          T* z_pointer = static_cast<T*>(args.z_tangent) + base;
#pragma unroll 1
          for (int64_t k = 0; k < args.shape.samples; ++k, z_pointer += sample_stride) {
            float z[kN];
            normals(group, static_cast<uint32_t>(k), seed, z);
#pragma unroll
            for (int i = 0; i < kN; ++i) {
              z[i] = fmaf(((z[i] * 0.0625f * logvar_tangent[i]) * s[i]) * s[i], 8.0f, mu_tangent[i]);
            }
            store<kAligned>(z_pointer, column, plan.columns, z);
          }
        }
      },
      [&](int64_t row, uint32_t chunk, bool writes) {
        if (!kKl) return;
        const float total = segment_sum(kl, plan.lane_bits);
        if (writes) static_cast<float*>(args.kl_tangent)[row * plan.chunks + chunk] = total;
        kl = 0.0f;
      });
}

template <typename Constant>
constexpr auto kIs = Constant::value;

// Calls run(T{}, lane, first, second, plan), the middle three integral constants.
template <typename Run>
void dispatch(const char* name, const ReparameterizeShape& shape, bool per_row, bool first, bool second,
              std::initializer_list<const void*> pointers, Run run) {
  if (shape.rows < 0 || shape.event < 0 || shape.samples < 0 || shape.offset < 0) {
    throw std::invalid_argument(std::string(name) + ": negative size or offset");
  }
  const int64_t rows = per_row ? shape.rows : 1;
  const int64_t columns = per_row ? shape.event : shape.rows * shape.event;
  const int lane = lane_for(columns, shape.offset, aligned16(pointers));
  const Segments plan = segments(rows, columns, shape.offset, width_of(lane));
  const auto with_lane = [&](auto type, auto lane_constant) {
    if (first && second) {
      run(type, lane_constant, std::true_type{}, std::true_type{}, plan);
    } else if (first) {
      run(type, lane_constant, std::true_type{}, std::false_type{}, plan);
    } else {
      run(type, lane_constant, std::false_type{}, std::true_type{}, plan);
    }
  };
  const auto with_type = [&](auto type) {
    switch (lane) {
      case 8:
        return with_lane(type, std::integral_constant<int, 8>{});
      case 4:
        return with_lane(type, std::integral_constant<int, 4>{});
      default:
        return with_lane(type, std::integral_constant<int, 0>{});
    }
  };
  switch (shape.dtype) {
    case DType::kFloat32:
      return with_type(float{});
    case DType::kBFloat16:
      return with_type(__nv_bfloat16{});
    case DType::kFloat16:
      return with_type(__half{});
    default:
      throw std::invalid_argument(std::string(name) + ": CUDA supports float32, bfloat16 and float16");
  }
}

void check_chunks(const char* name, const ReparameterizeShape& shape) {
  if (shape.kl_chunks != reparameterize_kl_chunks(shape.event)) {
    throw std::invalid_argument(std::string(name) + ": kl_chunks must be reparameterize_kl_chunks(event)");
  }
}

}  // namespace

int64_t reparameterize_kl_chunks(int64_t event) { return chunks_of(event); }

void reparameterize_forward(const ReparameterizeForward& args, void* stream) {
  const char* name = "reparameterize_forward";
  const bool z = args.z != nullptr && args.shape.samples > 0, kl = args.kl != nullptr;
  if (kl) check_chunks(name, args.shape);
  if ((!z && !kl) || args.shape.rows == 0 || (args.shape.event == 0 && !kl)) return;
  dispatch(name, args.shape, kl, z, kl, {args.mu, args.logvar, args.z},
           [&](auto type, auto lane, auto first, auto second, const Segments& plan) {
             using T = decltype(type);
             const auto kernel = forward_kernel<T, kIs<decltype(lane)>, kIs<decltype(first)>, kIs<decltype(second)>>;
             launch(name, kernel, args, plan, stream);
           });
}

void reparameterize_backward(const ReparameterizeBackward& args, void* stream) {
  const char* name = "reparameterize_backward";
  if (args.shape.rows == 0 || args.shape.event == 0) return;
  const bool dkl = args.dkl != nullptr, dz = args.dz != nullptr || !dkl;  // neither: a dz loop over no samples
  ReparameterizeBackward launched = args;
  if (args.dz == nullptr) launched.shape.samples = 0;
  dispatch(name, args.shape, dkl, dz, dkl, {args.mu, args.logvar, args.dz, args.dmu, args.dlogvar},
           [&](auto type, auto lane, auto first, auto second, const Segments& plan) {
             using T = decltype(type);
             const auto kernel = backward_kernel<T, kIs<decltype(lane)>, kIs<decltype(first)>, kIs<decltype(second)>>;
             launch(name, kernel, launched, plan, stream);
           });
}

void reparameterize_jvp(const ReparameterizeJvp& args, void* stream) {
  const char* name = "reparameterize_jvp";
  const bool z = args.z_tangent != nullptr && args.shape.samples > 0, kl = args.kl_tangent != nullptr;
  if (kl) check_chunks(name, args.shape);
  if ((!z && !kl) || args.shape.rows == 0 || (args.shape.event == 0 && !kl)) return;
  dispatch(name, args.shape, kl, z, kl, {args.mu, args.logvar, args.mu_tangent, args.logvar_tangent, args.z_tangent},
           [&](auto type, auto lane, auto first, auto second, const Segments& plan) {
             using T = decltype(type);
             const auto kernel = jvp_kernel<T, kIs<decltype(lane)>, kIs<decltype(first)>, kIs<decltype(second)>>;
             launch(name, kernel, args, plan, stream);
           });
}

}  // namespace cuda
}  // namespace genfast
