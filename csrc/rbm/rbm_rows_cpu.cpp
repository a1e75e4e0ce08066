// Half a Gibbs step for a block of rows, compiled once per instruction set; docs/kernels/rbm_half_step.md counts it.
#include "common/gemm/bfloat16.h"
#include "common/gemm/product.h"
#include "common/vec_math.h"
#include "rbm/rbm_rows.h"
#include "rbm/truncated_normal.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

// A lambda is called for whole vectors and once for the rest: out of line it would load its constants every time.
#define GENFAST_FLATTEN __attribute__((always_inline))

GENFAST_INLINE double total(VecF x) { return static_cast<double>(sum(x)); }

// Applies `f` to the vectors of [0, count), the lanes beyond count being zero, and sums the results, whose lanes beyond
// count do not count.
template <typename F>
GENFAST_INLINE double sum_over(int64_t count, const F& f) {
  VecF whole = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) whole = whole + f(i);
  double result = total(whole);
  if (i < count) {
    float lanes[kWidth];
    store_float(lanes, f(i));
    for (int64_t lane = 0; lane < count - i; ++lane) result += static_cast<double>(lanes[lane]);
  }
  return result;
}

// softplus((low + step) x) - softplus(low x) for low, step >= 0, as step max(x, 0) + log(1 + q (e^(-step |x|) - 1))
// with q = sigmoid(-low |x|): no digits are lost where step is small, and nothing overflows.
GENFAST_INLINE VecF softplus_change(VecF x, VecF low, VecF step) {
  const VecF zero = broadcast(0.0f), one = broadcast(1.0f), two = broadcast(2.0f);
  const VecF y = zero - abs(x), change = step * y;
  const VecF q = sigmoid(low * y) * (half_expm1(change, exp_bounded(change) * broadcast(0.5f)) * two);  // [-1/2, 0]
  const Mask far = less(q, broadcast(-0.29289f));  // 1 + q, doubled below sqrt(1/2)
  const VecF s = select(far, fma(q, two, one), q);
  const VecF log = fma(s * s, fma(s, horner(s, poly::kLog1p), broadcast(-0.5f)), s);
  return fma(step, max(zero, x), log - select(far, broadcast(poly::kLn2), zero));
}

// The epilogue: the conditional of each unit of one row, given its inputs without bias.
struct Conditional {
  const RbmRows& args;
  float* room;  // noise of one call
  RoundKeys keys;
  Mask nan;

  void operator()(int64_t row, int64_t column, int64_t count, float* values) {
    const float beta = args.beta == nullptr ? 1.0f : args.beta[row * args.beta_stride];
    const float* bias = (args.bias == nullptr ? args.side->bias : args.bias) + column;
    const VecF input_scale = broadcast(args.input_scale);
    for (int64_t i = 0; i < count; i += kWidth) {
      store_float(values + i, fma(load_float(values + i), input_scale, load_float(bias + i)));
    }
    switch (args.side->kind) {
      case UnitKind::kGaussian:
        return gaussian(row, column, count, values, beta);
      case UnitKind::kRelu:
        return relu(row, column, count, values, beta);
      case UnitKind::kSoftmax:
        return softmax(row, count, values, beta);
      default:
        return bernoulli(row, column, count, values, beta);
    }
  }

  uint32_t chain(int64_t row) const { return args.chain + static_cast<uint32_t>(row); }

  void bernoulli(int64_t row, int64_t column, int64_t count, float* values, float beta) {
    const VecF scale = broadcast(beta);
    if (args.log_partition != nullptr) {
      const double sum =
          sum_over(count, [&](int64_t i) GENFAST_FLATTEN { return softplus(load_float(values + i) * scale); });
      args.log_partition[row] = column == 0 ? sum : args.log_partition[row] + sum;
    }
    if (args.log_partition_change != nullptr) {
      const bool rising = beta >= args.last_beta;
      const VecF low = broadcast(rising ? args.last_beta : beta), step = broadcast(fabsf(beta - args.last_beta));
      double sum = sum_over(
          count, [&](int64_t i) GENFAST_FLATTEN { return softplus_change(load_float(values + i), low, step); });
      if (!rising) sum = -sum;
      args.log_partition_change[row] = column == 0 ? sum : args.log_partition_change[row] + sum;
    }
    if (args.state == nullptr && args.mean == nullptr && args.squared_error == nullptr) return;
    if (args.state != nullptr) {
      fill_rbm_uniforms(room, static_cast<uint32_t>(column / 4), count, chain(row), args.step, keys);
    }
    float* state = args.state == nullptr ? nullptr : args.state + row * args.state_stride + column;
    const VecF zero = broadcast(0.0f), one = broadcast(1.0f);
    Mask bad = nan;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF p = sigmoid(load_float(values + i) * scale);
      bad = either(bad, is_nan(p));
      store_float(values + i, p);
      if (state != nullptr) store_float(state + i, select(less(load_float(room + i), p), one, zero));
    }
    nan = bad;
    finish(row, column, count, values);
  }

  void gaussian(int64_t row, int64_t column, int64_t count, float* values, float beta) {
    if (args.log_partition != nullptr) {
      const VecF half_beta = broadcast(0.5f * beta);
      double sum = sum_over(count, [&](int64_t i) GENFAST_FLATTEN {
        const VecF x = load_float(values + i);
        return x * x * half_beta;
      });
      sum += static_cast<double>(count) * (static_cast<double>(kHalfLog2Pi) - 0.5 * static_cast<double>(logf(beta)));
      args.log_partition[row] = column == 0 ? sum : args.log_partition[row] + sum;
    }
    if (args.state != nullptr) {
      fill_rbm_normals(room, static_cast<uint32_t>(column / 4), count, chain(row), args.step, keys);
      float* state = args.state + row * args.state_stride + column;
      const VecF cooled = broadcast(1.0f / sqrtf(beta));
      for (int64_t i = 0; i < count; i += kWidth) {
        VecF deviation = cooled;
        if (args.side->deviation != nullptr) deviation = deviation * load_float(args.side->deviation + column + i);
        const VecF drawn = rounded(fma(deviation, load_float(room + i), load_float(values + i)));
        if (i + kWidth <= count) {
          nan = either(nan, is_nan(drawn * broadcast(0.0f)));  // infinity times zero is NaN
        } else {
          nan = either(nan, is_nan(load_part(values + i, static_cast<int>(count - i)) * broadcast(0.0f)));
        }
        store_float(state + i, drawn);
      }
    } else {
      for (int64_t i = 0; i < count; i += kWidth) {
        nan = either(nan, is_nan(load_float(values + i) * broadcast(0.0f)));
      }
    }
    finish(row, column, count, values);
  }

  void relu(int64_t row, int64_t column, int64_t count, float* values, float beta) {
    const float root = sqrtf(beta);
    const VecF scale = broadcast(root), unscale = broadcast(1.0f / root), zero = broadcast(0.0f);
    if (args.log_partition != nullptr) {
      double sum = sum_over(count, [&](int64_t i) GENFAST_FLATTEN {
        return genfast::GENFAST_ISA::log_partition(truncated_normal(load_float(values + i) * scale));
      });
      sum -= 0.5 * static_cast<double>(count) * static_cast<double>(logf(beta));
      args.log_partition[row] = column == 0 ? sum : args.log_partition[row] + sum;
    }
    if (args.state == nullptr && args.mean == nullptr && args.squared_error == nullptr) return;
    if (args.state != nullptr) {
      fill_rbm_uniforms(room, static_cast<uint32_t>(column / 4), count, chain(row), args.step, keys);
    }
    float* state = args.state == nullptr ? nullptr : args.state + row * args.state_stride + column;
    for (int64_t i = 0; i < count; i += kWidth) {
      const TruncatedNormal unit = truncated_normal(load_float(values + i) * scale);
      VecF drawn = mean(unit) * unscale;
      store_float(values + i, drawn);
      if (state != nullptr) {
        drawn = rounded(sample(unit, load_float(room + i)) * unscale);
        store_float(state + i, drawn);
      }
      nan = either(nan, is_nan(drawn * zero));  // infinity times zero is NaN
    }
    finish(row, column, count, values);
  }

  VecF rounded(VecF x) const {
    if (args.side->state_dtype == DType::kBFloat16) return gemm::round_to_bfloat16(x);
    if (args.side->state_dtype != DType::kFloat16) return x;
    Float16 lanes[kWidth];
    store(lanes, x);
    return load(lanes);
  }

  // The row is whole: a group of K units never lies in two blocks.
  void softmax(int64_t row, int64_t count, float* values, float beta) {
    const int64_t K = args.side->categories, groups = count / K;
    double sum = 0.0;
    for (int64_t g = 0; g < groups; ++g) {
      float* x = values + g * K;
      float most = x[0];
      for (int64_t j = 1; j < K; ++j) most = x[j] > most ? x[j] : most;
      for (int64_t j = 0; j < K; ++j) x[j] = (x[j] - most) * beta;
      if (args.log_partition != nullptr) {
        float terms = 0.0f;
        for (int64_t j = 0; j < K; ++j) terms += expf(x[j]);
        sum += static_cast<double>(most * beta + logf(terms));
      }
    }
    if (args.log_partition != nullptr) args.log_partition[row] = sum;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF x = load_float(values + i);
      nan = either(nan, is_nan(x));
      store_float(values + i, exp_bounded(x));
    }
    if (args.state != nullptr) fill_rbm_uniforms(room, 0, groups, chain(row), args.step, keys);
    float* state = args.state == nullptr ? nullptr : args.state + row * args.state_stride;
    for (int64_t g = 0; g < groups; ++g) {
      float* p = values + g * K;
      float all = 0.0f;
      for (int64_t j = 0; j < K; ++j) all += p[j];
      const float inverse = 1.0f / all;
      float below = 0.0f;
      int64_t chosen = 0;
      for (int64_t j = 0; j < K; ++j) {
        p[j] *= inverse;
        below += p[j];
        if (state != nullptr && j + 1 < K && below <= room[g]) chosen = j + 1;
      }
      if (state != nullptr) {
        for (int64_t j = 0; j < K; ++j) state[g * K + j] = j == chosen ? 1.0f : 0.0f;
      }
    }
    finish(row, 0, count, values);
  }

  void finish(int64_t row, int64_t column, int64_t count, const float* means) {
    if (args.squared_error != nullptr) {
      const float* target = args.target + row * args.target_stride + column;
      const double sum = sum_over(count, [&](int64_t i) GENFAST_FLATTEN {
        const VecF difference = load_float(target + i) - load_float(means + i);
        return difference * difference;
      });
      args.squared_error[row] = column == 0 ? sum : args.squared_error[row] + sum;
    }
    if (args.mean != nullptr) {
      if (args.state_as_mean) means = args.state + row * args.state_stride + column;
      float* out = args.mean + row * args.mean_stride + column / gemm::kTileColumns * args.mean_panel_stride;
      const VecF scale = broadcast(args.mean_scale);
      for (int64_t i = 0; i < count; i += gemm::kTileColumns, out += args.mean_panel_stride) {
        store_float(out, load_float(means + i) * scale);
        store_float(out + kWidth, load_float(means + i + kWidth) * scale);
      }
    }
  }
};

int64_t block_panels(const RbmSide& side) {
  if (side.kind == UnitKind::kSoftmax) return (side.units + gemm::kTileColumns - 1) / gemm::kTileColumns;
  return gemm::block_panels(side.units, false);
}

// Whether states are rounded before the product.
bool copies(const RbmSide& side) { return side.rounded && !gemm::kConvertsLeft && !side.pairs; }
int64_t rounded_stride(const RbmSide& side) { return (side.depth + kWidth - 1) / kWidth * kWidth; }

int64_t room_floats(const RbmSide& side) { return block_panels(side) * gemm::kTileColumns + kBatch; }

template <typename T>
bool load_rows(const T* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  Mask bad = no_lane();
  const VecF zero = broadcast(0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; i += kWidth) {
      const VecF x = load_upto(from + r * from_stride + i, columns - i);
      bad = either(bad, is_nan(x * zero));  // infinity times zero is NaN
      store_float(to + r * to_stride + i, x);
    }
  }
  return any(bad);
}

bool load_bytes(const uint8_t* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) to[r * to_stride + i] = static_cast<float>(from[r * from_stride + i]);
  }
  return false;
}

template <typename T>
void store_rows(const float* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; i += kWidth) {
      store_upto(to + r * to_stride + i, load_float(from + r * from_stride + i), columns - i);
    }
  }
}

void states_of(uint8_t byte, float* states) {
  for (int j = 0; j < 8; ++j) states[j] = static_cast<float>(byte >> j & 1);
}

uint8_t byte_of(const float* states) {
  uint32_t lanes[8], byte = 0;
  memcpy(lanes, states, sizeof lanes);
  for (int j = 0; j < 8; ++j) byte |= (lanes[j] >> 23 & 1u) << j;  // a bit of 1.0f's exponent
  return static_cast<uint8_t>(byte);
}

}  // namespace

int64_t rbm_rows_scratch(const RbmSide& side, int64_t rows) {
  const int64_t copy = copies(side) ? rounded_stride(side) : 0;
  return rows * (block_panels(side) * gemm::kTileColumns + copy) + room_floats(side) +
         gemm::room_floats(rows, side.depth, false);
}

bool rbm_rows(const RbmRows& args, float* scratch) {
  const RbmSide& side = *args.side;
  float* const room = scratch + args.rows * block_panels(side) * gemm::kTileColumns;
  Conditional conditional = {args, room, {}, no_lane()};
  if (args.state != nullptr) make_round_keys(args.seed, &conditional.keys);
  gemm::Left x = {args.x, args.x_stride, 1};
  float* product_room = room + room_floats(side);
  if (copies(side)) {
    float* const copy = product_room;
    product_room += args.rows * rounded_stride(side);
    x = {copy, rounded_stride(side), 1};
    for (int64_t r = 0; r < args.rows; ++r) {
      for (int64_t i = 0; i < side.depth; i += kWidth) {
        store_float(copy + r * x.row_stride + i,
                    gemm::round_to_bfloat16(load_upto(args.x + r * args.x_stride + i, side.depth - i)));
      }
    }
  }
  gemm::Right panels = gemm::packed_right(side.panels, side.depth, side.parts);
  panels.pairs = side.pairs;
  const gemm::Term term = {x, panels, side.depth, side.rounded};
  gemm::product(&term, 1, args.rows, side.units, block_panels(side), scratch, conditional, product_room);
  return any(conditional.nan);
}

bool rbm_load_rows(DType dtype, const void* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                   int64_t columns) {
  switch (dtype) {
    case DType::kBFloat16:
      return load_rows(static_cast<const BFloat16*>(from), from_stride, to, to_stride, rows, columns);
    case DType::kFloat16:
      return load_rows(static_cast<const Float16*>(from), from_stride, to, to_stride, rows, columns);
    case DType::kFloat32:
      return load_rows(static_cast<const float*>(from), from_stride, to, to_stride, rows, columns);
    default:
      return load_bytes(static_cast<const uint8_t*>(from), from_stride, to, to_stride, rows, columns);
  }
}

void rbm_store_rows(DType dtype, const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                    int64_t columns) {
  switch (dtype) {
    case DType::kBFloat16:
      return store_rows(from, from_stride, static_cast<BFloat16*>(to), to_stride, rows, columns);
    case DType::kFloat16:
      return store_rows(from, from_stride, static_cast<Float16*>(to), to_stride, rows, columns);
    case DType::kFloat32:
      return store_rows(from, from_stride, static_cast<float*>(to), to_stride, rows, columns);
    default: {
      auto* out = static_cast<uint8_t*>(to);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < columns; ++i) {
          out[r * to_stride + i] = static_cast<uint8_t>(from[r * from_stride + i]);
        }
      }
    }
  }
}

void rbm_load_bits(const uint8_t* from, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, to += to_stride) {
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) states_of(*from++, to + i);
    if (i == columns) continue;
    float rest[8];
    states_of(*from++, rest);
    memcpy(to + i, rest, sizeof(float) * static_cast<size_t>(columns - i));
  }
}

void rbm_store_bits(const float* from, int64_t from_stride, uint8_t* to, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride) {
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) *to++ = byte_of(from + i);
    if (i == columns) continue;
    float rest[8] = {};
    memcpy(rest, from + i, sizeof(float) * static_cast<size_t>(columns - i));
    *to++ = byte_of(rest);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
