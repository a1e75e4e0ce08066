// Splits rows over threads, bounds the screening's error, and measures again what the screening leaves.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/gemm/gemm.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "vae/vector_quantize_cpu.h"
#include "vae/vector_quantize_exact.h"

namespace genfast {
namespace cpu {
namespace {

constexpr double kUnit = 0x1p-24;  // of float32
constexpr int64_t kLeastCoarseDim = 16;
constexpr double kLargest = 1e37;       // of what the screening takes without overflow
constexpr double kSmallest = 0x1p-120;  // covers subnormal numbers taken for zero

template <typename T>
double squared_distance(const T* z, const T* code, int64_t dim) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= dim; i += 4) {
    for (int j = 0; j < 4; ++j) {
      const double gap = static_cast<double>(z[i + j]) - static_cast<double>(code[i + j]);
      sums[j] += gap * gap;
    }
  }
  for (; i < dim; ++i) {
    const double gap = static_cast<double>(z[i]) - static_cast<double>(code[i]);
    sums[0] += gap * gap;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The first of the nearest codes among code(0) ... code(count - 1), which ascend.
template <typename T, typename Code>
int64_t nearest(const T* z, const T* codebook, int64_t dim, int64_t count, const Code& code) {
  // A sum of float64 squares is off by less than (dim + 4) 2^-53 of itself; squares below 2^-1022 may be lost.
  const double relative = 4.0 * (static_cast<double>(dim) + 4.0) * 0x1p-53;
  const double absolute = static_cast<double>(dim) * 0x1p-1020;
  int64_t best = code(0);
  double least = squared_distance(z, codebook + best * dim, dim);
  for (int64_t i = 1; i < count; ++i) {
    const int64_t k = code(i);
    const double distance = squared_distance(z, codebook + k * dim, dim);
    const double apart = relative * (distance < least ? distance : least) + absolute;
    if (distance > least + apart) continue;
    if (distance + apart < least || exactly_nearer(z, codebook + k * dim, codebook + best * dim, dim)) {
      best = k;
      least = distance;
    }
  }
  return best;
}

struct Codes {
  const float* floats;  // [codes, dim]
  const float *packed, *half_norms;
  double largest_norm;
  int parts;
  const float* coarse;  // packed for a coarse screening; null: without
  double largest_residual;
};

// A slot's memory.
struct Slot {
  float* z;
  double *norms, *residuals;
  float *window, *best;
  int32_t* counts;
  CodeCandidate* candidates;
  float *scratch, *again;  // rows that the coarse screening did not settle
};

// Scores a block of rows of floats, rows[i] of which z has at i; false for those it leaves undecided.
template <typename T, typename Decided>
void screen_rows(const NearestCode& args, const Codes& codes, const Slot& slot, const float* x, const int64_t* rows,
                 int64_t count, const T* z, const T* codebook, bool coarse, int64_t* indices, const Decided& decided) {
  const double dim = static_cast<double>(args.dim), largest = codes.largest_norm;
  const double roundings = (GENFAST_FOR_ISA(nearest_code_roundings)(args.dim, coarse) + 8.0) * kUnit;
  const double relative = roundings / (1.0 - roundings);  // negative or infinite: no bound
  for (int64_t i = 0; i < count; ++i) {
    const double norm = std::sqrt(slot.norms[rows[i]]), products = norm * largest + 0.5 * largest * largest;
    double error = relative * products + dim * kSmallest * (1.0 + norm + largest);
    if (coarse) {
      const double residual = slot.residuals[rows[i]];  // 1.01: rounded vectors may be longer, by 2^-9 each
      error = 1.01 * error + residual * largest + (norm + residual) * codes.largest_residual;
    }
    const bool bounded = roundings < 0.5 && norm < kLargest && largest < kLargest && products < kLargest;
    slot.window[i] = bounded ? static_cast<float>(2.01 * error) : std::numeric_limits<float>::infinity();
  }
  const CodeScreen screen = {x,
                             count,
                             args.codes,
                             args.dim,
                             coarse ? codes.coarse : codes.packed,
                             coarse ? 1 : codes.parts,
                             coarse,
                             codes.half_norms,
                             slot.window,
                             slot.best,
                             slot.counts,
                             slot.candidates};
  GENFAST_FOR_ISA(nearest_code_screen)(screen, slot.scratch);
  for (int64_t i = 0; i < count; ++i) {
    const CodeCandidate* const list = slot.candidates + i * kMostCandidates;
    const int32_t kept = slot.counts[i];
    int64_t within[kMostCandidates], left = 0;
    if (slot.window[i] <= std::numeric_limits<float>::max() && kept <= kMostCandidates) {
      const float limit = slot.best[i] + slot.window[i];
      for (int32_t j = 0; j < kept; ++j) {
        if (list[j].score < limit) within[left++] = list[j].code;
      }
    }
    if (left == 1) {
      indices[rows[i]] = within[0];
    } else if (left > 1) {
      indices[rows[i]] =
          nearest(z + rows[i] * args.dim, codebook, args.dim, left, [&](int64_t j) { return within[j]; });
    }
    decided(rows[i], left > 0);
  }
}

// A coarse screening, where there is one, then a finer one of the rows that keep too many codes, then all codes.
template <typename T>
void search(const NearestCode& args, const Codes& codes, const Slot& slot, const T* z, const T* codebook, int64_t begin,
            int64_t rows) {
  int64_t* const indices = args.indices + begin;
  std::vector<int64_t> all(static_cast<size_t>(rows)), again;
  for (int64_t r = 0; r < rows; ++r) all[static_cast<size_t>(r)] = r;
  const float* x = slot.z;
  if (codes.coarse != nullptr) {
    GENFAST_FOR_ISA(nearest_code_residuals)(slot.z, rows, args.dim, slot.residuals);
    screen_rows(args, codes, slot, x, all.data(), rows, z, codebook, true, indices, [&](int64_t row, bool decided) {
      if (decided) return;
      std::copy_n(slot.z + row * args.dim, args.dim, slot.again + static_cast<int64_t>(again.size()) * args.dim);
      again.push_back(row);
    });
    if (again.empty()) return;
    all.swap(again);
    x = slot.again;
  }
  screen_rows(args, codes, slot, x, all.data(), static_cast<int64_t>(all.size()), z, codebook, false, indices,
              [&](int64_t row, bool decided) {
                if (decided) return;  // else no bound, or more candidates than have room
                indices[row] = nearest(z + row * args.dim, codebook, args.dim, args.codes, [](int64_t k) { return k; });
              });
}

}  // namespace

NearestCodeStatus nearest_code(const NearestCode& args, int threads) {
  const int64_t dim = args.dim, codes = args.codes;
  const int64_t block_rows = rows_per_block(args.rows > 0 ? args.rows : 1, threads);
  const int64_t padded = round_up(codes, 64);  // whole panels of any instruction set
  const int64_t scratch = GENFAST_FOR_ISA(gemm_scratch_floats)(block_rows, codes, dim, false);
  // Below, a product is no longer than what follows it. On tiles a float32 is three bfloat16, and a product six.
  const bool coarse = dim >= kLeastCoarseDim && (current_isa() == Isa::kAmx || use_bfloat16_pairs());
  const int64_t sizes[] = {block_rows * dim,
                           2 * block_rows,
                           2 * block_rows,
                           block_rows,
                           block_rows,
                           block_rows,
                           2 * block_rows * kMostCandidates,
                           scratch,
                           coarse ? block_rows * dim : 0};
  int64_t slot_floats = 0;
  for (const int64_t size : sizes) slot_floats += round_up(size, 16);
  const int64_t coarse_floats = coarse ? GENFAST_FOR_ISA(nearest_code_coarse_floats)(codes, dim) : 0;
  Workspace workspace(packed_floats(dim, codes) + codes * dim + padded + 4 * codes + coarse_floats +
                      threads * slot_floats);
  float* const packed = workspace.take(packed_floats(dim, codes));
  float* const half_norms = workspace.take(padded);
  float* const floats = workspace.take(codes * dim);
  auto* const norms = reinterpret_cast<double*>(workspace.take(2 * codes));
  auto* const residuals = reinterpret_cast<double*>(workspace.take(2 * codes));
  float* const coarse_codes = workspace.take(coarse_floats);
  float* const slots = workspace.take(threads * slot_floats);
  auto* const load = GENFAST_FOR_ISA(nearest_code_load);
  if (load(args.dtype, args.codebook, codes, dim, floats, norms)) return NearestCodeStatus::kBadCode;
  double largest = 0.0;
  for (int64_t k = 0; k < padded; ++k) {
    if (k < codes && norms[k] > largest) largest = norms[k];
    half_norms[k] = k < codes ? static_cast<float>(0.5 * norms[k]) : std::numeric_limits<float>::infinity();
  }
  const bool wide = args.dtype == DType::kFloat64;
  const Pack pack_args = {
      wide ? DType::kFloat32 : args.dtype, wide ? floats : args.codebook, codes, dim, true, false, nullptr, packed};
  pack(pack_args, threads);
  Codes prepared = {floats, packed, half_norms, std::sqrt(largest), pack_args.parts(), nullptr, 0.0};
  if (coarse) {
    GENFAST_FOR_ISA(nearest_code_residuals)(floats, codes, dim, residuals);
    GENFAST_FOR_ISA(nearest_code_pack_coarse)(floats, codes, dim, coarse_codes);
    prepared.coarse = coarse_codes;
    prepared.largest_residual = *std::max_element(residuals, residuals + codes);
  }
  std::atomic<bool> bad{false};
  const int useful = args.rows * codes * (dim + 1) < (1 << 18) ? 1 : threads;
  parallel_slots((args.rows + block_rows - 1) / block_rows, useful, [&](int64_t index, int64_t first, int64_t last) {
    float* at = slots + index * slot_floats;
    float* parts[9];
    for (int i = 0; i < 9; ++i) {
      parts[i] = at;
      at += round_up(sizes[i], 16);
    }
    const Slot slot = {
        parts[0], reinterpret_cast<double*>(parts[1]),  reinterpret_cast<double*>(parts[2]),        parts[3],
        parts[4], reinterpret_cast<int32_t*>(parts[5]), reinterpret_cast<CodeCandidate*>(parts[6]), parts[7],
        parts[8]};
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block_rows, end = begin + block_rows < args.rows ? begin + block_rows : args.rows;
      const char* const from = static_cast<const char*>(args.z) + begin * dim * bytes_of(args.dtype);
      if (load(args.dtype, from, end - begin, dim, slot.z, slot.norms)) {
        bad.store(true, std::memory_order_relaxed);
        return;
      }
      if (wide) {
        search(args, prepared, slot, reinterpret_cast<const double*>(from), static_cast<const double*>(args.codebook),
               begin, end - begin);
      } else {
        search(args, prepared, slot, slot.z, prepared.floats, begin, end - begin);
      }
      GENFAST_FOR_ISA(nearest_code_select)(args, begin, end);
    }
  });
  return bad.load() ? NearestCodeStatus::kBadRow : NearestCodeStatus::kDone;
}

}  // namespace cpu
}  // namespace genfast
