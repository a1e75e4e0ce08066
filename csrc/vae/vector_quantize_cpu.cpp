// nearest_code for one instruction set: the screening product with its epilogue, and the passes over rows.
#include "vae/vector_quantize_cpu.h"

#include "common/gemm/gemm.h"
#include "common/gemm/product.h"

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

double nearest_code_roundings(int64_t dim) {
#if defined(GENFAST_AMX)
  return 7.0 * static_cast<double>(dim) + 16.0;  // six products of parts, each added, and the rest that is dropped
#else
  return static_cast<double>(dim);
#endif
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

void nearest_code_screen(const CodeScreen& args, float* scratch) {
  const int64_t panels = gemm::block_panels(args.codes, false);
  float* const room = scratch + args.rows * gemm::kTileColumns * panels;
  const gemm::Term term = {{args.z, args.dim, 1}, gemm::packed_right(args.packed, args.dim, args.parts), args.dim};
  for (int64_t r = 0; r < args.rows; ++r) {
    args.best[r] = INFINITY;
    args.counts[r] = 0;
  }
  Screen screen = {args};
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
