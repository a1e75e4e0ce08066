// The CUDA kernels of the RBM ops on an emulated GPU against float64: every tile, both directions, edges, parts, the
// draws of every kind of unit, and Gibbs chains in both forms. tests/test_cuda_emulated.py builds and runs it.
#include "emulate.h"

// The kernels and their launchers, as they are.
#include <random>

#include "rbm/rbm_cd.cu"
#include "rbm/rbm_free_energy.cu"
#include "rbm/rbm_gibbs.cu"
#include "rbm/rbm_half_step.cu"

namespace {

using namespace genfast;

int failures = 0;

void require(bool good, const char* what, const std::string& where) {
  if (good) return;
  if (++failures <= 20) std::fprintf(stderr, "%s; %s\n", what, where.c_str());
}

std::mt19937_64 engine(7);

double normal() { return std::normal_distribution<double>()(engine); }

template <typename T>
struct Aligned {  // 256-byte aligned and poisoned with NaN
  explicit Aligned(int64_t count) : storage(static_cast<size_t>(count) * sizeof(T) + 512, 0xFF) {
    const auto at = reinterpret_cast<uintptr_t>(storage.data());
    data = reinterpret_cast<T*>(storage.data() + (256 - at % 256));
  }
  std::vector<unsigned char> storage;
  T* data;
};

double number(DType dtype, const void* p, int64_t i) { return static_cast<double>(cuda::load_number(dtype, p, i)); }

void put(DType dtype, void* p, int64_t i, float x) {
  if (dtype == DType::kFloat32) static_cast<float*>(p)[i] = x;
  if (dtype == DType::kBFloat16) static_cast<uint16_t*>(p)[i] = split::rounded(x);
  if (dtype == DType::kFloat16) static_cast<__half*>(p)[i] = __float2half(x);
  if (bytes_of(dtype) == 1) static_cast<uint8_t*>(p)[i] = x != 0.0f;
}

int parts_of(DType dtype, bool rounded) {
  return rounded || bytes_of(dtype) == 1 || dtype == DType::kBFloat16 ? 1 : dtype == DType::kFloat16 ? 2 : 3;
}

// A matrix and its operand, through rbm_prepare.
struct Matrix {
  Matrix(DType dtype_, int64_t rows_, int64_t columns_, bool rounded, bool binary)
      : dtype(dtype_),
        rows(rows_),
        columns(columns_),
        stride((columns + 7) / 8 * 8),
        parts(parts_of(dtype, rounded)),
        values(rows * columns),
        operand_data(parts * rows * stride),
        row_parts(rows),
        exact(static_cast<size_t>(rows * columns)) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      put(dtype, values.data, i, binary ? static_cast<float>(engine() % 2) : static_cast<float>(normal()));
      exact[static_cast<size_t>(i)] = number(dtype, values.data, i);
      if (rounded) {
        exact[static_cast<size_t>(i)] =
            static_cast<double>(split::widened(split::rounded(static_cast<float>(exact[static_cast<size_t>(i)]))));
      }
    }
    cuda::rbm_prepare(
        {dtype, values.data, rows, columns, nullptr, parts, operand_data.data, rows * stride, stride, row_parts.data},
        nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      require(row_parts.data[r] >= 1 && row_parts.data[r] <= parts, "row parts out of range", "prepare");
      if (binary) require(row_parts.data[r] == 1, "0/1 rows need one part", "prepare");
      for (int64_t c = 0; c < columns; ++c) {
        double sum = 0.0;
        for (int p = 0; p < parts; ++p) {
          const auto part = operand_data.data[(p * rows + r) * stride + c];
          if (p >= row_parts.data[r]) require((part & 0x7FFF) == 0, "a part beyond row_parts", "prepare");
          sum += static_cast<double>(split::widened(part));
        }
        require(sum == exact[static_cast<size_t>(r * columns + c)], "parts do not add up", "prepare");
      }
    }
  }
  RbmOperand operand() const { return {operand_data.data, rows * stride, stride, parts, row_parts.data}; }
  double at(int64_t r, int64_t c) const { return exact[static_cast<size_t>(r * columns + c)]; }

  DType dtype;
  int64_t rows, columns, stride;
  int parts;
  Aligned<float> values;
  Aligned<uint16_t> operand_data;
  Aligned<uint8_t> row_parts;
  std::vector<double> exact;
};

struct Case {
  int64_t rows, visible, hidden;
  bool up;
  DType x, W;
  bool rounded, binary;
  UnitKind kind;
  int beta, processors;  // beta: 0 none, 1 one, 2 one a chain
};

void check_half_step(const Case& c) {
  emulate::processors = c.processors;
  const int64_t inputs = c.up ? c.visible : c.hidden, units = c.up ? c.hidden : c.visible;
  const std::string where = "rows " + std::to_string(c.rows) + " V " + std::to_string(c.visible) + " H " +
                            std::to_string(c.hidden) + (c.up ? " up" : " down") + " x " +
                            std::to_string(static_cast<int>(c.x)) + " W " + std::to_string(static_cast<int>(c.W)) +
                            " rounded " + std::to_string(c.rounded) + " kind " +
                            std::to_string(static_cast<int>(c.kind)) + " processors " + std::to_string(c.processors);
  const Matrix W(c.W, c.visible, c.hidden, c.rounded, false), x(c.x, c.rows, inputs, c.rounded, c.binary);
  const bool gaussian = c.kind == UnitKind::kGaussian;
  Aligned<float> bias(units), beta(c.rows), deviation(units), state(c.rows * units), mean(c.rows * units);
  const int64_t sums = (units + 31) / 32 * c.rows, operand_stride = (units + 7) / 8 * 8;
  Aligned<float> partition(sums), error(sums), target(c.rows * units);
  Aligned<uint16_t> operand(c.rows * operand_stride);
  Aligned<uint8_t> bits(c.rows * ((units + 31) / 32 * 4)), nan(c.rows), clamp(c.rows * units);
  std::memset(nan.data, 0, static_cast<size_t>(c.rows));
  for (int64_t i = 0; i < units; ++i) bias.data[i] = static_cast<float>(normal()), deviation.data[i] = 0.5f + i % 3;
  for (int64_t i = 0; i < c.rows; ++i) beta.data[i] = 0.25f + static_cast<float>(i % 5);
  for (int64_t i = 0; i < c.rows * units; ++i) {
    target.data[i] = static_cast<float>(engine() % 2);
    clamp.data[i] = engine() % 4 == 0;
  }
  const bool clamped = c.beta == 1;
  const uint64_t seed = engine();
  RbmDraw draw = {};
  draw.kind = c.kind;
  draw.rows = c.rows;
  draw.units = units;
  draw.bias = bias.data;
  draw.beta = c.beta == 0 ? nullptr : beta.data;
  draw.beta_count = c.beta == 0 ? 0 : c.beta == 1 ? 1 : c.rows;
  draw.deviation = gaussian ? deviation.data : nullptr;
  draw.seed = seed;
  draw.chain_offset = 11;
  draw.step = 5;
  draw.clamp = clamped ? clamp.data : nullptr;
  draw.clamp_rows = c.rows;
  draw.target = target.data;
  draw.state = state.data;
  draw.operand = operand.data;
  draw.operand_stride = operand_stride;
  draw.bits = gaussian ? nullptr : bits.data;
  draw.bits_stride = (units + 31) / 32 * 4;
  draw.bits_nan = nan.data;
  draw.mean = mean.data;
  draw.mean_scale = -0.5f;
  draw.log_partition = partition.data;
  draw.squared_error = error.data;
  cuda::rbm_half_step({W.operand(), x.operand(), c.visible, c.hidden, c.up, draw}, nullptr);

  for (int64_t r = 0; r < c.rows; ++r) {
    const double b = c.beta == 0 ? 1.0 : static_cast<double>(beta.data[c.beta == 1 ? 0 : r]);
    double partial = 0.0, gap = 0.0;
    for (int64_t u = 0; u < units; ++u) {
      double logit = static_cast<double>(bias.data[u]), terms = std::fabs(logit);
      for (int64_t k = 0; k < inputs; ++k) {
        const double term = x.at(r, k) * (c.up ? W.at(k, u) : W.at(u, k));
        logit += term, terms += std::fabs(term);
      }
      const double bound = terms * (1e-6 + static_cast<double>(inputs) * 0x1p-26);
      const double p = 1.0 / (1.0 + std::exp(-b * logit)), expected = gaussian ? logit : p;
      const double slack = gaussian ? bound : p * (1e-6 + 1.5 * b * bound * (1.0 - p)) + 1e-37;
      const int64_t i = r * units + u;
      require(std::fabs(-2.0 * static_cast<double>(mean.data[i]) - expected) <= slack, "mean", where);
      const auto words = philox::philox(static_cast<uint32_t>(u / 4), static_cast<uint32_t>(11 + r), 5,
                                        gaussian ? philox::kRbmNormal : philox::kRbmUnit, seed);
      const double got = static_cast<double>(state.data[i]);
      if (clamped && clamp.data[i] != 0) {
        require(got == static_cast<double>(target.data[i]), "clamped", where);
      } else if (gaussian) {
        float n[4];
        cuda::box_muller(words.w[0], words.w[1], n[0], n[1]);
        cuda::box_muller(words.w[2], words.w[3], n[2], n[3]);
        const double spread = static_cast<double>(n[u % 4]) * static_cast<double>(deviation.data[u]) / std::sqrt(b);
        require(std::fabs(got - logit - spread) <= bound + 1e-5 * std::fabs(spread), "gaussian state", where);
      } else {
        const double u01 = static_cast<double>(philox::uniform(words.w[u % 4]));
        if (std::fabs(u01 - p) > slack) require(got == (u01 < p ? 1.0 : 0.0), "state", where);
      }
      require(operand.data[r * operand_stride + u] == split::rounded(state.data[i]), "operand", where);
      if (!gaussian) {
        const int bit = bits.data[r * draw.bits_stride + u / 8] >> (u % 8) & 1;
        require(bit == (got == 1.0), "bits", where);
      }
      const double z = b * logit;
      partial += gaussian ? 0.5 * b * logit * logit + 0.5 * std::log(2.0 * M_PI / b)
                          : std::fmax(z, 0.0) + std::log1p(std::exp(-std::fabs(z)));
      const double off = static_cast<double>(target.data[i]) - expected;
      gap += off * off;
      if (u % 32 == 31 || u + 1 == units) {
        const auto log_partition = static_cast<double>(partition.data[u / 32 * c.rows + r]);
        const auto squares = static_cast<double>(error.data[u / 32 * c.rows + r]);
        require(std::fabs(log_partition - partial) <= 2e-5 * (std::fabs(partial) + 1.0), "log partition", where);
        require(std::fabs(squares - gap) <= 2e-5 * (gap + 1.0), "squared error", where);
        partial = gap = 0.0;
      }
    }
  }
}

struct Gibbs {
  Aligned<float> visible, hidden;
  Gibbs(int64_t chains, int64_t V, int64_t H) : visible(chains * V), hidden(chains * H) {}
};

Gibbs gibbs(RbmGibbsForm form, int processors_, int64_t chains, int64_t k, int64_t step, const Matrix& W, Matrix& v,
            const float* bias, const float* beta, UnitKind visible, UnitKind hidden, bool rounded,
            const uint8_t* clamp) {
  emulate::processors = processors_;
  Gibbs out(chains, W.rows, W.columns);
  RbmGibbsCuda args = {};
  args.up_weights = args.down_weights = W.operand();
  args.x = v.operand();
  args.visible = W.rows;
  args.hidden = W.columns;
  args.chains = chains;
  args.visible_kind = visible;
  args.hidden_kind = hidden;
  args.dtype = DType::kFloat32;
  args.rounded = rounded;
  args.b = args.c = bias;
  args.beta = beta;
  args.beta_count = beta == nullptr ? 0 : chains;
  args.clamp = clamp;
  args.clamp_rows = 1;
  args.target_dtype = v.dtype;
  args.target = v.values.data;
  args.seed = 99;
  args.k = k;
  args.step = step;
  args.visible_out = out.visible.data;
  args.hidden_out = out.hidden.data;
  args.workspace_bytes = cuda::rbm_gibbs_workspace(args);
  Aligned<unsigned char> workspace(args.workspace_bytes);
  args.workspace = workspace.data;
  args.form = form;
  cuda::rbm_gibbs(args, nullptr);
  return out;
}

void check_gibbs(int64_t chains, int64_t V, int64_t H, int64_t k, bool rounded, bool with_beta, int blocks,
                 bool with_nan) {
  const std::string where = "chains " + std::to_string(chains) + " V " + std::to_string(V) + " H " + std::to_string(H) +
                            " k " + std::to_string(k) + " rounded " + std::to_string(rounded) + " blocks " +
                            std::to_string(blocks);
  const Matrix W(DType::kFloat32, V, H, rounded, false);
  Matrix v(DType::kFloat32, chains, V, rounded, true);
  if (with_nan) {
    v.operand_data.data[2 * v.stride + V / 2] = 0x7FC0;  // chain 2
    v.values.data[2 * V + V / 2] = NAN;
  }
  Aligned<float> bias(V + H), beta(chains);
  for (int64_t i = 0; i < V + H; ++i) bias.data[i] = static_cast<float>(normal());
  for (int64_t i = 0; i < chains; ++i) beta.data[i] = 0.1f + static_cast<float>(i % 3);
  const float* betas = with_beta ? beta.data : nullptr;
  const auto bernoulli = UnitKind::kBernoulli;
  const auto run = [&](RbmGibbsForm form) {
    return gibbs(form, blocks, chains, k, 4, W, v, bias.data, betas, bernoulli, bernoulli, rounded, nullptr);
  };
  const Gibbs loop = run(RbmGibbsForm::kLaunches), resident = run(RbmGibbsForm::kResident);
  const auto same = [&](const Aligned<float>& a, const Aligned<float>& b, int64_t count) {
    return std::memcmp(a.data, b.data, static_cast<size_t>(count) * 4) == 0;
  };
  if (!with_nan) {
    require(same(loop.visible, resident.visible, chains * V), "both forms draw the same visible states", where);
    require(same(loop.hidden, resident.hidden, chains * H), "both forms draw the same hidden states", where);
  }
  for (const Gibbs* result : {&loop, &resident}) {
    for (int64_t i = 0; i < chains * V; ++i) {
      const float x = result->visible.data[i];
      require(with_nan && i / V == 2 ? std::isnan(x) : x == 0.0f || x == 1.0f, "visible states", where);
    }
    for (int64_t i = 0; i < chains * H; ++i) {
      const float x = result->hidden.data[i];
      require(with_nan && i / H == 2 ? std::isnan(x) : x == 0.0f || x == 1.0f, "hidden states", where);
    }
  }
  if (with_nan || k < 2) return;
  // A chain in two calls.
  const Gibbs first =
      gibbs(RbmGibbsForm::kAuto, blocks, chains, 1, 4, W, v, bias.data, betas, bernoulli, bernoulli, rounded, nullptr);
  std::memcpy(v.values.data, first.visible.data, static_cast<size_t>(chains * V) * 4);
  cuda::rbm_prepare({v.dtype, v.values.data, chains, V, nullptr, v.parts, v.operand_data.data, chains * v.stride,
                     v.stride, v.row_parts.data},
                    nullptr);
  const Gibbs rest = gibbs(RbmGibbsForm::kAuto, blocks, chains, k - 1, 6, W, v, bias.data, betas, bernoulli, bernoulli,
                           rounded, nullptr);
  require(same(rest.visible, resident.visible, chains * V), "a continued chain", where);
  // One step against float64, from the states before the last visible draw.
  for (int64_t r = 0; r < chains; ++r) {
    for (int64_t i = 0; i < V; ++i) {
      double logit = static_cast<double>(bias.data[i]);
      for (int64_t j = 0; j < H; ++j) logit += static_cast<double>(resident.hidden.data[r * H + j]) * W.at(i, j);
      const double p = 1.0 / (1.0 + std::exp(-logit * (with_beta ? static_cast<double>(beta.data[r]) : 1.0)));
      const auto words = philox::rbm_words(static_cast<uint32_t>(i / 4), static_cast<uint32_t>(r),
                                           static_cast<uint32_t>(4 + 2 * k - 1), 99);
      const double u = static_cast<double>(philox::uniform(words.w[i % 4]));
      if (std::fabs(u - p) > 1e-5)
        require(resident.visible.data[r * V + i] == (u < p ? 1.0f : 0.0f), "last draw", where);
    }
  }
}

// Gaussian and clamped chains: a chain in two calls is the whole, and clamped units stay.
void check_other_chains(UnitKind visible, UnitKind hidden, bool clamped) {
  const int64_t chains = 21, V = 37, H = 18;
  const std::string where = clamped ? "clamped chain" : "gaussian chain";
  const Matrix W(DType::kFloat32, V, H, false, false);
  Matrix v(DType::kFloat32, chains, V, false, false);
  Aligned<float> bias(V + H);
  Aligned<uint8_t> clamp(V);
  for (int64_t i = 0; i < V + H; ++i) bias.data[i] = static_cast<float>(normal());
  for (int64_t i = 0; i < V; ++i) clamp.data[i] = i % 3 == 0;
  const uint8_t* mask = clamped ? clamp.data : nullptr;
  const auto run = [&](int64_t k, int64_t step) {
    return gibbs(RbmGibbsForm::kAuto, 1, chains, k, step, W, v, bias.data, nullptr, visible, hidden, false, mask);
  };
  const Gibbs whole = run(3, 0), first = run(1, 0);
  for (int64_t i = 0; clamped && i < chains * V; ++i) {
    if (clamp.data[i % V] != 0) require(whole.visible.data[i] == v.values.data[i], "clamped units moved", where);
  }
  std::memcpy(v.values.data, first.visible.data, static_cast<size_t>(chains * V) * 4);
  cuda::rbm_prepare({v.dtype, v.values.data, chains, V, nullptr, v.parts, v.operand_data.data, chains * v.stride,
                     v.stride, v.row_parts.data},
                    nullptr);
  const Gibbs rest = run(2, 2);
  require(std::memcmp(rest.visible.data, whole.visible.data, static_cast<size_t>(chains * V) * 4) == 0,
          "a continued chain", where);
}

void check_free_energy(bool gaussian) {
  const int64_t rows = 19, V = 37, H = 70, tiles = 3;
  Aligned<float> v(rows * V), b(V), scale(V), partition(tiles * rows), out(rows), statistics(2);
  for (int64_t i = 0; i < rows * V; ++i) v.data[i] = static_cast<float>(normal());
  for (int64_t i = 0; i < V; ++i) b.data[i] = static_cast<float>(normal()), scale.data[i] = 0.5f + i % 2;
  for (int64_t i = 0; i < tiles * rows; ++i) partition.data[i] = static_cast<float>(normal());
  cuda::rbm_free_energy({DType::kFloat32, v.data, rows, V, H, b.data, scale.data, gaussian, partition.data, out.data},
                        nullptr);
  double all = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    double energy = 0.0;
    for (int64_t i = 0; i < V; ++i) {
      const double x = static_cast<double>(v.data[r * V + i]), bias = static_cast<double>(b.data[i]);
      energy += gaussian ? 0.5 * (x - bias) * (x - bias) * static_cast<double>(scale.data[i]) : -x * bias;
    }
    for (int64_t t = 0; t < tiles; ++t) energy -= static_cast<double>(partition.data[t * rows + r]);
    require(std::fabs(static_cast<double>(out.data[r]) - energy) < 1e-4, "free energy", "");
    all += energy / static_cast<double>(rows);
  }
  cuda::rbm_statistics({partition.data, rows, 70, out.data, out.data, 5, statistics.data}, nullptr);
  double error = 0.0, few = 0.0;
  for (int64_t i = 0; i < tiles * rows; ++i)
    error += static_cast<double>(partition.data[i]) / static_cast<double>(rows);
  for (int64_t i = 0; i < 5; ++i) few += static_cast<double>(out.data[i]) / 5.0;
  require(std::fabs(static_cast<double>(statistics.data[0]) - error) < 1e-4, "reconstruction error", "");
  require(std::fabs(static_cast<double>(statistics.data[1]) - (all - few)) < 1e-4, "free-energy gap", "");
}

}  // namespace

int main() {
  constexpr auto f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16, u8 = DType::kUInt8;
  constexpr auto bernoulli = UnitKind::kBernoulli, gaussian = UnitKind::kGaussian;
  for (const bool other : {false, true}) {
    emulate::reversed = emulate::lazy = other;
    for (const bool up : {true, false}) {
      for (const int blocks : {1, 5, 100}) {  // the large, the middle and the small tile
        const Case cases[] = {{150, 45, 70, up, u8, f32, false, true, bernoulli, 0, blocks},
                              {70, 100, 130, up, f32, f32, false, false, gaussian, 2, blocks},
                              {67, 130, 66, up, u8, bf16, false, true, bernoulli, 1, blocks}};
        for (const Case& c : cases) check_half_step(c);
      }
      check_half_step({1, 1, 1, up, f32, f32, false, false, bernoulli, 0, 100});
      check_half_step({5, 300, 290, up, f32, f32, false, true, bernoulli, 2, 100});
      check_half_step({33, 40, 40, up, bf16, f32, true, false, gaussian, 1, 100});
      check_half_step({33, 64, 96, up, f16, f16, false, false, bernoulli, 0, 100});
      check_half_step({40, 290, 33, up, f32, bf16, false, false, gaussian, 0, 100});
    }
    check_gibbs(21, 150, 37, 3, false, false, 6, false);
    check_gibbs(40, 37, 290, 2, false, true, 20, false);
    check_gibbs(70, 40, 33, 3, true, false, 4, false);
    check_gibbs(21, 75, 37, 2, false, false, 6, true);
    check_other_chains(bernoulli, bernoulli, true);
    check_other_chains(gaussian, bernoulli, false);
    check_other_chains(bernoulli, gaussian, false);
    check_free_energy(false);
    check_free_energy(true);
  }
  if (failures == 0) std::printf("all good\n");
  return failures == 0 ? 0 : 1;
}
