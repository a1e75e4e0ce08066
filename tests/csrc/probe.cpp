// Compiled once per instruction set, as the kernels are.
#include "probe.h"

#include "common/vec_math.h"
#include "rbm/truncated_normal.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

void run_philox(uint32_t* out, uint64_t group, int64_t groups, uint32_t c1, bool group_is_64_bit, uint32_t c2,
                uint32_t c3, uint64_t seed) {
  RoundKeys keys;
  make_round_keys(seed, &keys);
  for (int64_t i = 0; i < groups; i += kWidth) {
    VecU words[4];
    philox_lanes(group + static_cast<uint64_t>(i), c1, group_is_64_bit, c2, c3, keys, words);
    VecF as_floats[4];
    for (int w = 0; w < 4; ++w) as_floats[w] = as_float(words[w]);
    float lanes[kBatch];
    interleave4(as_floats, lanes);
    memcpy(out + 4 * i, lanes, sizeof lanes);
  }
}

VecU load_words(const uint32_t* p, int64_t count) {
  uint32_t lanes[kWidth];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, sizeof(uint32_t) * static_cast<size_t>(count < kWidth ? count : kWidth));
  float floats[kWidth];
  memcpy(floats, lanes, sizeof lanes);
  return as_uint(load(floats));
}

void run_exp(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(out + i, exp(load_upto(x + i, count - i)), count - i);
}

void run_log(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(out + i, log(load_upto(x + i, count - i)), count - i);
}

void run_sigmoid(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(out + i, sigmoid(load_upto(x + i, count - i)), count - i);
}

void run_tanh(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(out + i, tanh(load_upto(x + i, count - i)), count - i);
}

void run_normal_cdf(const float* x, float* out, int64_t count) {
  VecF density;
  for (int64_t i = 0; i < count; i += kWidth) {
    store_upto(out + i, normal_cdf(load_upto(x + i, count - i), &density), count - i);
  }
}

void run_normal_density(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    VecF density;
    normal_cdf(load_upto(x + i, count - i), &density);
    store_upto(out + i, density, count - i);
  }
}

void run_bits(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const Mask negative = mask_of(lane_bits(less(load(x + i), broadcast(0.0f))));
    store(out + i, select(negative, broadcast(1.0f), broadcast(2.0f)));
  }
}

void run_half_expm1_minus(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const VecF v = load_upto(x + i, count - i);
    store_upto(out + i, half_expm1_minus(v, broadcast(0.5f) * exp(v)), count - i);
  }
}

void run_half_expm1(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const VecF v = load_upto(x + i, count - i);
    store_upto(out + i, half_expm1(v, broadcast(0.5f) * exp(v)), count - i);
  }
}

void run_truncated_mean(const float* s, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_upto(out + i, mean(truncated_normal(load_upto(s + i, count - i))), count - i);
  }
}

void run_truncated_log_partition(const float* s, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_upto(out + i, log_partition(truncated_normal(load_upto(s + i, count - i))), count - i);
  }
}

void run_truncated_sample(const float* s, const float* u, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const TruncatedNormal x = truncated_normal(load_upto(s + i, count - i));
    store_upto(out + i, sample(x, load_upto(u + i, count - i)), count - i);
  }
}

void run_radius(const uint32_t* words, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(out + i, radius(load_words(words + i, count - i)), count - i);
}

void run_cos_sin(const uint32_t* words, float* cosine, float* sine, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    VecF c, s;
    cos_sin(load_words(words + i, count - i), &c, &s);
    store_upto(cosine + i, c, count - i);
    store_upto(sine + i, s, count - i);
  }
}

template <typename T>
void to_storage(const float* x, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_upto(reinterpret_cast<T*>(out + i), load_upto(x + i, count - i), count - i);
  }
}

template <typename T>
void from_storage(const uint16_t* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_upto(out + i, load_upto(reinterpret_cast<const T*>(x + i), count - i), count - i);
  }
}

void run_uniforms(float* out, uint32_t group, int64_t count, uint32_t chain, uint32_t step, uint64_t seed) {
  RoundKeys keys;
  make_round_keys(seed, &keys);
  fill_rbm_uniforms(out, group, count, chain, step, keys);
}

void run_rbm_normals(float* out, uint32_t group, int64_t count, uint32_t chain, uint32_t step, uint64_t seed) {
  RoundKeys keys;
  make_round_keys(seed, &keys);
  fill_rbm_normals(out, group, count, chain, step, keys);
}

void run_softplus(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store_upto(out + i, softplus(load_upto(x + i, count - i)), count - i);
}

void run_sums(const float* x, float* sums, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) sums[i / kWidth] = sum(load(x + i));
}

void run_sums_of(const float* x, float* sums) {
  VecF square[kWidth];
  for (int i = 0; i < kWidth; ++i) square[i] = load(x + i * kWidth);
  store(sums, sums_of(square));
}

void compare(const float* a, const float* b, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const VecF x = load_upto(a + i, count - i), y = load_upto(b + i, count - i);
    const VecF smaller = select(less(x, y), x, y);
    store_upto(out + i, select(either(is_nan(x), is_nan(y)), broadcast(7.0f), smaller), count - i);
  }
}

const Probe kProbe = {kWidth,
                      run_philox,
                      fill_normals,
                      run_uniforms,
                      run_rbm_normals,
                      run_exp,
                      run_log,
                      run_sigmoid,
                      run_softplus,
                      run_tanh,
                      run_normal_cdf,
                      run_normal_density,
                      run_bits,
                      run_half_expm1_minus,
                      run_half_expm1,
                      run_truncated_mean,
                      run_truncated_log_partition,
                      run_truncated_sample,
                      run_radius,
                      run_cos_sin,
                      to_storage<Float16>,
                      from_storage<Float16>,
                      to_storage<BFloat16>,
                      from_storage<BFloat16>,
                      run_sums,
                      run_sums_of,
                      compare};

}  // namespace

const Probe* probe() { return &kProbe; }

}  // namespace GENFAST_ISA
}  // namespace genfast
