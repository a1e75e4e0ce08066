// bias_act for one instruction set; formulas in bias_act.h. Groups of 16 elements, as many as two bytes of bits hold.
#include "gan/bias_act_cpu.h"

#include "gan/activations.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kGroup = 16;
constexpr int kVectors = static_cast<int>(kGroup) / kWidth;

struct Linear {
  GENFAST_INLINE VecF value(VecF z, VecF) { return z; }
};
struct Relu {
  GENFAST_INLINE VecF value(VecF z, VecF) { return max(broadcast(0.0f), z); }
};
struct LeakyRelu {
  GENFAST_INLINE VecF value(VecF z, VecF alpha) { return select(less(broadcast(0.0f), z), z, alpha * z); }
};

// body(i, j, left) for every vector: i within the run, the j-th of its group, `left` elements in memory (a constant
// where the vector is whole); then end(i, left) for every group.
template <typename Body, typename End>
GENFAST_INLINE void for_groups(int64_t count, const Body& body, const End& end) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    for (int j = 0; j < kVectors; ++j) body(i + j * kWidth, j, int64_t{kWidth});
    end(i, kGroup);
  }
  if (i < count) {
    for (int j = 0; j < kVectors && i + j * kWidth < count; ++j) body(i + j * kWidth, j, count - i - j * kWidth);
    end(i, count - i);
  }
}

template <typename T>
GENFAST_INLINE void put(T* p, VecF x, int64_t left, bool) {
  store_upto(p, x, left);
}
GENFAST_INLINE void put(float* p, VecF x, int64_t left, bool stream) {
  if (stream && left >= kWidth) {
    stream_float(p, x);
  } else {
    store_upto(p, x, left);
  }
}

template <typename T>
const T* at(const void* p, const BiasActRun& run) {
  return static_cast<const T*>(p) + run.at;
}
template <typename T>
T* at(void* p, const BiasActRun& run) {
  return static_cast<T*>(p) + run.at;
}

// One of a call's small vectors [channels]: a value for the whole run, or for each element.
class PerChannel {
 public:
  PerChannel(const void* values, bool columns)
      : values_(static_cast<const float*>(values)),
        each_(columns && values != nullptr),
        one_(broadcast(values == nullptr || columns ? 0.0f : *static_cast<const float*>(values))) {}
  VecF get(int64_t i, int64_t left) const { return each_ ? load_upto(values_ + i, left) : one_; }

 private:
  const float* values_;
  bool each_;
  VecF one_;
};

// Sums over a channel: of the whole run, or added up for each column.
class Sums {
 public:
  Sums(void* sums, bool columns) : sums_(static_cast<float*>(sums)), columns_(columns) {
    for (int j = 0; j < kVectors; ++j) one_[j] = broadcast(0.0f);
  }
  void add(VecF x, int64_t i, int j, int64_t left) {
    if (sums_ == nullptr) return;
    if (columns_) {
      store_upto(sums_ + i, load_upto(sums_ + i, left) + x, left);
    } else if (left >= kWidth) {
      one_[j] = one_[j] + x;
    } else {
      float lanes[kWidth];
      store(lanes, x);
      for (int64_t k = left; k < kWidth; ++k) lanes[k] = 0.0f;
      one_[j] = one_[j] + load(lanes);
    }
  }
  void finish() const {
    if (sums_ == nullptr || columns_) return;
    float total = 0.0f;
    for (int j = 0; j < kVectors; ++j) total += sum(one_[j]);
    *sums_ = total;
  }

 private:
  float* sums_;
  bool columns_;
  VecF one_[kVectors];
};

GENFAST_INLINE uint32_t load_bits(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }
// A group's two bytes, zero past its elements.
GENFAST_INLINE void store_bits(uint8_t* p, uint32_t bits, int64_t left) {
  if (left < kGroup) bits &= (1u << left) - 1;
  p[0] = static_cast<uint8_t>(bits);
  p[1] = static_cast<uint8_t>(bits >> 8);
}

GENFAST_INLINE Mask both(Mask a, Mask b) { return mask_of(lane_bits(a) & lane_bits(b)); }
GENFAST_INLINE Mask not_above(VecF a, VecF b) { return mask_of(~lane_bits(less(b, a)) & ((1u << kWidth) - 1)); }

template <typename T, typename Act>
void forward(const BiasAct& args, const BiasActRun& run) {
  const T* const x = at<T>(args.x, run);
  T* const out = at<T>(args.out, run);
  const VecF alpha = broadcast(static_cast<float>(args.alpha)), gain = broadcast(static_cast<float>(args.gain));
  const VecF high = broadcast(static_cast<float>(args.clamp)), low = broadcast(static_cast<float>(-args.clamp));
  const PerChannel b(run.b, run.columns);
  const bool stream = run.stream;
  for_groups(
      run.count,
      [=](int64_t i, int, int64_t left) __attribute__((always_inline)) {
        const VecF f = gain * Act::value(load_upto(x + i, left) + b.get(i, left), alpha);
        put(out + i, max(low, min(high, f)), left, stream);
      },
      [](int64_t, int64_t) {});
  if (stream) stream_fence();
}

// With one or two planes of bits.
template <typename T, typename Act>
void forward_bits(const BiasAct& args, const BiasActRun& run) {
  const T* const x = at<T>(args.x, run);
  T* const out = at<T>(args.out, run);
  const VecF alpha = broadcast(static_cast<float>(args.alpha)), gain = broadcast(static_cast<float>(args.gain));
  const VecF high = broadcast(static_cast<float>(args.clamp)), low = broadcast(static_cast<float>(-args.clamp));
  const bool linear = args.act == Activation::kLinear, two = args.planes == 2, stream = run.stream;
  const PerChannel b(run.b, run.columns);
  uint8_t* const bits = run.bits;
  const int64_t plane = run.plane;
  uint32_t above = 0, inside = 0;
  for_groups(
      run.count,
      [=, &above, &inside](int64_t i, int j, int64_t left) __attribute__((always_inline)) {
        const VecF z = load_upto(x + i, left) + b.get(i, left), f = gain * Act::value(z, alpha);
        put(out + i, max(low, min(high, f)), left, stream);
        above |= (linear ? (1u << kWidth) - 1 : lane_bits(less(broadcast(0.0f), z))) << (j * kWidth);
        inside |= lane_bits(not_above(abs(f), high)) << (j * kWidth);
      },
      [=, &above, &inside](int64_t i, int64_t left) __attribute__((always_inline)) {
        store_bits(bits + i / 8, two ? above : above & inside, left);
        if (two) store_bits(bits + plane + i / 8, inside, left);
        above = inside = 0;
      });
  if (stream) stream_fence();
}

// The gradient of a piecewise linear activation: from bits, or from x.
template <typename T, typename Act, bool kBits>
void piecewise_gradient(const BiasAct& args, const BiasActRun& run) {
  const T* const x = kBits ? nullptr : at<T>(args.x, run);
  const T* const dy = at<T>(args.dy, run);
  T* const out = args.out == nullptr ? nullptr : at<T>(args.out, run);
  const VecF alpha = broadcast(static_cast<float>(args.alpha)), gain = broadcast(static_cast<float>(args.gain));
  const VecF high = broadcast(static_cast<float>(args.clamp)), zero = broadcast(0.0f);
  const bool leaky = args.act == Activation::kLeakyRelu, linear = args.act == Activation::kLinear;
  const bool two = args.planes == 2, stream = run.stream;
  const VecF below = broadcast(static_cast<float>(args.gain * args.alpha));
  const PerChannel b(run.b, run.columns);
  Sums sums(run.sums, run.columns);
  const uint8_t* const bits = run.bits;
  const int64_t plane = run.plane;
  uint32_t first = 0, second = 0;
  for_groups(
      run.count,
      [=, &sums, &first, &second](int64_t i, int j, int64_t left) __attribute__((always_inline)) {
        const VecF d = load_upto(dy + i, left);
        VecF result;
        if (kBits) {
          if (j == 0) {
            first = load_bits(bits + i / 8);
            if (two) second = load_bits(bits + plane + i / 8);
          }
          result = select(mask_of(first >> (j * kWidth)), d * gain, leaky ? d * below : zero);
          if (two) result = select(mask_of(second >> (j * kWidth)), result, zero);
        } else {
          const VecF z = load_upto(x + i, left) + b.get(i, left);
          result = linear ? d * gain : select(less(zero, z), d * gain, leaky ? d * below : zero);
          result = select(less(high, abs(gain * Act::value(z, alpha))), zero, result);
        }
        if (out != nullptr) put(out + i, result, left, stream);
        sums.add(result, i, j, left);
      },
      [](int64_t, int64_t) {});
  sums.finish();
  if (stream) stream_fence();
}

template <typename T, typename Act>
void gradient(const BiasAct& args, const BiasActRun& run) {
  const T *const x = at<T>(args.x, run), *const dy = at<T>(args.dy, run);
  T* const out = args.out == nullptr ? nullptr : at<T>(args.out, run);
  const VecF alpha = broadcast(static_cast<float>(args.alpha)), gain = broadcast(static_cast<float>(args.gain));
  const VecF high = broadcast(static_cast<float>(args.clamp)), zero = broadcast(0.0f);
  const bool clamped = args.clamp < 3e38, stream = run.stream;
  const PerChannel b(run.b, run.columns);
  Sums sums(run.sums, run.columns);
  for_groups(
      run.count,
      [=, &sums](int64_t i, int j, int64_t left) __attribute__((always_inline)) {
        const VecF z = load_upto(x + i, left) + b.get(i, left);
        VecF result = load_upto(dy + i, left) * (gain * Act::slopes(z, alpha).first);
        if (clamped) result = select(less(high, abs(gain * Act::value(z, alpha))), zero, result);
        if (out != nullptr) put(out + i, result, left, stream);
        sums.add(result, i, j, left);
      },
      [](int64_t, int64_t) {});
  sums.finish();
  if (stream) stream_fence();
}

template <typename T, typename Act>
void second(const BiasAct& args, const BiasActRun& run) {
  const T *const x = at<T>(args.x, run), *const dy = at<T>(args.dy, run);
  const T* const v = args.v == nullptr ? nullptr : at<T>(args.v, run);
  T* const out = args.out == nullptr ? nullptr : at<T>(args.out, run);
  T* const to_x = args.to_x == nullptr ? nullptr : at<T>(args.to_x, run);
  const VecF alpha = broadcast(static_cast<float>(args.alpha)), gain = broadcast(static_cast<float>(args.gain));
  const VecF high = broadcast(static_cast<float>(args.clamp)), zero = broadcast(0.0f);
  const bool clamped = args.clamp < 3e38, stream = run.stream;
  const PerChannel b(run.b, run.columns), v_b(run.v_b, run.columns);
  Sums sums(run.sums, run.columns);
  for_groups(
      run.count,
      [=, &sums](int64_t i, int j, int64_t left) __attribute__((always_inline)) {
        const VecF z = load_upto(x + i, left) + b.get(i, left);
        VecF w = v_b.get(i, left);
        if (v != nullptr) w = w + load_upto(v + i, left);
        w = w * gain;
        if (clamped) w = select(less(high, abs(gain * Act::value(z, alpha))), zero, w);
        const Slopes s = Act::slopes(z, alpha);
        if (out != nullptr) put(out + i, w * s.first, left, stream);
        const VecF result = w * load_upto(dy + i, left) * s.second;
        if (to_x != nullptr) put(to_x + i, result, left, stream);
        sums.add(result, i, j, left);
      },
      [](int64_t, int64_t) {});
  sums.finish();
  if (stream) stream_fence();
}

template <typename T, typename Act>
BiasActKernel piecewise(const BiasAct& args) {
  if (args.order == 0) return args.bits == nullptr ? forward<T, Act> : forward_bits<T, Act>;
  return args.bits == nullptr ? piecewise_gradient<T, Act, false> : piecewise_gradient<T, LeakyRelu, true>;
}

template <typename T, typename Act>
BiasActKernel smooth(const BiasAct& args) {
  return args.order == 0 ? forward<T, Act> : args.order == 1 ? gradient<T, Act> : second<T, Act>;
}

template <typename T>
BiasActKernel kernel_of(const BiasAct& args) {
  switch (args.act) {
    case Activation::kLinear:
      return piecewise<T, Linear>(args);
    case Activation::kRelu:
      return piecewise<T, Relu>(args);
    case Activation::kLeakyRelu:
      return piecewise<T, LeakyRelu>(args);
    case Activation::kTanh:
      return smooth<T, Tanh>(args);
    case Activation::kSigmoid:
      return smooth<T, Sigmoid>(args);
    case Activation::kElu:
      return smooth<T, Elu>(args);
    case Activation::kSoftplus:
      return smooth<T, Softplus>(args);
    case Activation::kSwish:
      return smooth<T, Swish>(args);
    default:
      return smooth<T, Gelu>(args);
  }
}

}  // namespace

BiasActKernel bias_act_kernel(const BiasAct& args) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return kernel_of<BFloat16>(args);
    case DType::kFloat16:
      return kernel_of<Float16>(args);
    default:
      return kernel_of<float>(args);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
