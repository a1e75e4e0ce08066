// nearest_code for one instruction set: the screening product with its epilogue, and the passes over rows.
#include "vae/vector_quantize_cpu.h"

#include "common/gemm/bfloat16.h"
#include "common/gemm/gemm.h"
#include "common/gemm/product.h"
#if !defined(GENFAST_AMX)
#include "common/gemm/product_pairs.h"
#endif

namespace genfast {
namespace GENFAST_ISA {
namespace {

// Keeps, of each row, the codes within its window of the smallest score so far.
struct Screen {
  const CodeScreen& args;

  void operator()(int64_t row, int64_t column, int64_t count, const float* products) const {
    const float* const half_norms = args.half_norms + column;
    const float window = args.window[row];
    float best = args.best[row];
    VecF least = load_float(half_norms) - load_float(products);
    for (int64_t i = kWidth; i < count; i += kWidth) {
      least = min(least, load_float(half_norms + i) - load_float(products + i));
    }
    float limit = best + window;
    if (!any(less(least, broadcast(limit)))) return;
    int32_t kept = args.counts[row];
    CodeCandidate* const list = args.candidates + row * kMostCandidates;
    for (int64_t i = 0; i < count; i += kWidth) {
      const VecF scores = load_float(half_norms + i) - load_float(products + i);
      if (!any(less(scores, broadcast(limit)))) continue;
      float lanes[kWidth];
      store_float(lanes, scores);
      for (int lane = 0; lane < kWidth; ++lane) {
        if (!(lanes[lane] < limit)) continue;
        if (lanes[lane] < best) {
          best = lanes[lane];
          limit = best + window;
        }
        if (kept == kMostCandidates) kept = remaining(list, limit);
        if (kept >= kMostCandidates) {  // too many: nothing passes from now on
          args.counts[row] = static_cast<int32_t>(kMostCandidates + 1);
          args.best[row] = -INFINITY;
          return;
        }
        list[kept++] = {lanes[lane], static_cast<int32_t>(column + i + lane)};
      }
    }
    args.counts[row] = kept;
    args.best[row] = best;
  }

  static int32_t remaining(CodeCandidate* list, float limit) {
    int32_t kept = 0;
    for (int64_t i = 0; i < kMostCandidates; ++i) {
      if (list[i].score < limit) list[kept++] = list[i];
    }
    return kept;
  }
};

template <typename T>
static bool load_rows(const T* from, int64_t rows, int64_t dim, float* to, double* norms) {
  Mask bad = no_lane();
  for (int64_t r = 0; r < rows; ++r, from += dim, to += dim) {
    double norm = 0.0;
    for (int64_t i = 0; i < dim; i += kWidth) {
      const VecF x = load_upto(from + i, dim - i);
      bad = either(bad, is_nan(x * broadcast(0.0f)));  // infinity times zero is NaN
      store_upto(to + i, x, dim - i);
      float lanes[kWidth];
      store_float(lanes, x);
      for (int lane = 0; lane < kWidth; ++lane)
        norm += static_cast<double>(lanes[lane]) * static_cast<double>(lanes[lane]);
    }
    norms[r] = norm;
  }
  return any(bad);
}

static bool load_rows(const double* from, int64_t rows, int64_t dim, float* to, double* norms) {
  bool bad = false;
  for (int64_t r = 0; r < rows; ++r, from += dim, to += dim) {
    double norm = 0.0;
    for (int64_t i = 0; i < dim; ++i) {
      bad |= !(from[i] * 0.0 == 0.0);
      norm += from[i] * from[i];
      to[i] = static_cast<float>(from[i]);
    }
    norms[r] = norm;
  }
  return bad;
}

template <typename T>
static void select_rows(const NearestCode& args, int64_t begin, int64_t end) {
  const T* z = static_cast<const T*>(args.z) + begin * args.dim;
  T* selected = args.selected == nullptr ? nullptr : static_cast<T*>(args.selected) + begin * args.dim;
  for (int64_t n = begin; n < end; ++n, z += args.dim) {
    const T* const code = static_cast<const T*>(args.codebook) + args.indices[n] * args.dim;
    if (args.distances != nullptr) {
      VecF total = broadcast(0.0f);
      for (int64_t i = 0; i < args.dim; i += kWidth) {
        const VecF gap = load_upto(z + i, args.dim - i) - load_upto(code + i, args.dim - i);
        total = fma(gap, gap, total);
      }
      static_cast<float*>(args.distances)[n] = sum(total);
    }
    if (selected == nullptr) continue;
    memcpy(selected, code, sizeof(T) * static_cast<size_t>(args.dim));
    selected += args.dim;
  }
}

static void select_doubles(const NearestCode& args, int64_t begin, int64_t end) {
  const double* const z = static_cast<const double*>(args.z);
  for (int64_t n = begin; n < end; ++n) {
    const double* const code = static_cast<const double*>(args.codebook) + args.indices[n] * args.dim;
    double total = 0.0;
    for (int64_t i = 0; i < args.dim; ++i) total += (z[n * args.dim + i] - code[i]) * (z[n * args.dim + i] - code[i]);
    if (args.distances != nullptr) static_cast<double*>(args.distances)[n] = total;
    if (args.selected == nullptr) continue;
    memcpy(static_cast<double*>(args.selected) + n * args.dim, code, sizeof(double) * static_cast<size_t>(args.dim));
  }
}

}  // namespace

double nearest_code_roundings(int64_t dim, bool coarse) {
  // On tiles: six products of parts, each added, and the rest that is dropped.
  return gemm::kConvertsLeft && !coarse ? 7.0 * static_cast<double>(dim) + 16.0 : static_cast<double>(dim);
}

void nearest_code_residuals(const float* x, int64_t rows, int64_t dim, double* norms) {
  const VecF zero = broadcast(0.0f);
  for (int64_t r = 0; r < rows; ++r, x += dim) {
    VecF total = zero;
    for (int64_t i = 0; i < dim; i += kWidth) {
      const VecF value = load_upto(x + i, dim - i), rest = value - gemm::round_to_bfloat16(value);
      total = fma(rest, rest, total);
    }
    const double squares = static_cast<double>(sum(total)) * (1.0 + 1e-6 * static_cast<double>(dim));
    norms[r] = ::sqrt(squares) + static_cast<double>(dim) * 1e-19;  // squares below the least float
  }
}

bool nearest_code_load(DType dtype, const void* from, int64_t rows, int64_t dim, float* to, double* norms) {
  switch (dtype) {
    case DType::kFloat64:
      return load_rows(static_cast<const double*>(from), rows, dim, to, norms);
    case DType::kBFloat16:
      return load_rows(static_cast<const BFloat16*>(from), rows, dim, to, norms);
    case DType::kFloat16:
      return load_rows(static_cast<const Float16*>(from), rows, dim, to, norms);
    default:
      return load_rows(static_cast<const float*>(from), rows, dim, to, norms);
  }
}

#if defined(GENFAST_AMX)
int64_t nearest_code_coarse_floats(int64_t codes, int64_t dim) {
  return (codes + gemm::kTileColumns - 1) / gemm::kTileColumns * gemm_panel_floats(dim, 1);
}

void nearest_code_pack_coarse(const float* x, int64_t codes, int64_t dim, float* out) {
  const Pack args = {DType::kFloat32, x, codes, dim, true, true, nullptr, out};
  for (int64_t panel = 0; panel * gemm::kTileColumns < codes; ++panel) gemm_pack_panel(args, panel);
}
#else
int64_t nearest_code_coarse_floats(int64_t codes, int64_t dim) {
  return (codes + gemm::kTileColumns - 1) / gemm::kTileColumns * gemm::kTileColumns * ((dim + 1) / 2);
}

// [panel][pair][column], zeros beyond the codes.
void nearest_code_pack_coarse(const float* x, int64_t codes, int64_t dim, float* out) {
  for (int64_t first = 0; first < codes; first += gemm::kTileColumns) {
    for (int64_t k = 0; k < dim; k += 2) {
      for (int64_t c = 0; c < gemm::kTileColumns; c += kWidth, out += kWidth) {
        float low[kWidth] = {}, high[kWidth] = {};
        for (int64_t i = 0; i < kWidth && first + c + i < codes; ++i) {
          const float* const from = x + (first + c + i) * dim + k;
          low[i] = from[0];
          high[i] = k + 1 < dim ? from[1] : 0.0f;
        }
        store_float(out, gemm::pair_of(load_float(low), load_float(high)));
      }
    }
  }
}

// Rows rounded to bfloat16, in pairs: [rows][pairs].
static void round_rows(const float* x, int64_t rows, int64_t dim, float* out) {
  const int64_t pairs = (dim + 1) / 2;
  for (int64_t r = 0; r < rows; ++r, x += dim, out += pairs) {
    for (int64_t i = 0; i < pairs; i += kWidth) {
      const int64_t rest = dim - 2 * i;
      const VecF low = load_upto(x + 2 * i, rest);
      const VecF high = rest > kWidth ? load_upto(x + 2 * i + kWidth, rest - kWidth) : broadcast(0.0f);
      VecF even, odd;
      unzip(low, high, &even, &odd);
      store_upto(out + i, gemm::pair_of(even, odd), pairs - i);
    }
  }
}

static void screen_pairs(const CodeScreen& args, int64_t block_panels, Screen& screen, float* block, float* room) {
  using gemm::kMaxRows;
  using gemm::kTileColumns;
  const int64_t pairs = (args.dim + 1) / 2, panels = (args.codes + kTileColumns - 1) / kTileColumns;
  const int64_t stride = block_panels * kTileColumns;
  float* const groups = room + args.rows * pairs;
  round_rows(args.z, args.rows, args.dim, room);
  gemm::gather_rows(room, pairs, args.rows, pairs, groups);
  for (int64_t first = 0; first < panels; first += block_panels) {
    const int64_t last = first + block_panels < panels ? first + block_panels : panels;
    for (int64_t panel = first; panel < last; ++panel) {
      gemm::pair_tile_rows(args.rows, block + (panel - first) * kTileColumns, stride, true, {groups, 1, kMaxRows},
                           kMaxRows * pairs, args.packed + panel * pairs * kTileColumns, kTileColumns, pairs, 1.0f);
    }
    const int64_t column = first * kTileColumns, width = (last - first) * kTileColumns;
    const int64_t count = args.codes - column < width ? args.codes - column : width;
    for (int64_t row = 0; row < args.rows; ++row) screen(row, column, count, block + row * stride);
  }
}
#endif

void nearest_code_screen(const CodeScreen& args, float* scratch) {
  const int64_t panels = gemm::block_panels(args.codes, false);
  float* const room = scratch + args.rows * gemm::kTileColumns * panels;
  for (int64_t r = 0; r < args.rows; ++r) {
    args.best[r] = INFINITY;
    args.counts[r] = 0;
  }
  Screen screen = {args};
#if !defined(GENFAST_AMX)
  if (args.coarse) return screen_pairs(args, panels, screen, scratch, room);
#endif
  const gemm::Right codes = gemm::packed_right(args.packed, args.dim, args.parts);
  const gemm::Term term = {{args.z, args.dim, 1}, codes, args.dim, args.coarse};
  gemm::product(&term, 1, args.rows, args.codes, panels, scratch, screen, room);
}

void nearest_code_select(const NearestCode& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat64:
      return select_doubles(args, begin, end);
    case DType::kBFloat16:
      return select_rows<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return select_rows<Float16>(args, begin, end);
    default:
      return select_rows<float>(args, begin, end);
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
