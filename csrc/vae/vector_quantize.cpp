// Splits rows over threads, bounds the screening's error, and measures again what the screening leaves.
#include <atomic>
#include <cmath>
#include <limits>

#include "common/gemm/gemm.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "vae/vector_quantize_cpu.h"
#include "vae/vector_quantize_exact.h"

namespace genfast {
namespace cpu {
namespace {

constexpr double kUnit = 0x1p-24;       // of float32
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
};

// A slot's memory.
struct Slot {
  float* z;
  double* norms;
  float *window, *best;
  int32_t* counts;
  CodeCandidate* candidates;
  float* scratch;
};

template <typename T>
void search(const NearestCode& args, const Codes& codes, const Slot& slot, const T* z, const T* codebook, int64_t begin,
            int64_t rows) {
  const double dim = static_cast<double>(args.dim), largest = codes.largest_norm;
  const double roundings = (GENFAST_FOR_ISA(nearest_code_roundings)(args.dim) + 8.0) * kUnit;
  const double relative = roundings / (1.0 - roundings);  // negative or infinite: no bound
  for (int64_t r = 0; r < rows; ++r) {
    const double norm = std::sqrt(slot.norms[r]), products = norm * largest + 0.5 * largest * largest;
    const double error = relative * products + dim * kSmallest * (1.0 + norm + largest);
    const bool bounded = roundings < 0.5 && norm < kLargest && largest < kLargest && products < kLargest;
    slot.window[r] = bounded ? static_cast<float>(2.01 * error) : std::numeric_limits<float>::infinity();
  }
  CodeScreen screen = {slot.z,           rows,        args.codes, args.dim,    codes.packed,   codes.parts,
                       codes.half_norms, slot.window, slot.best,  slot.counts, slot.candidates};
  GENFAST_FOR_ISA(nearest_code_screen)(screen, slot.scratch);
  for (int64_t r = 0; r < rows; ++r) {
    const CodeCandidate* const list = slot.candidates + r * kMostCandidates;
    const int32_t kept = slot.counts[r];
    int64_t within[kMostCandidates], count = 0;
    if (slot.window[r] <= std::numeric_limits<float>::max() && kept <= kMostCandidates) {
      const float limit = slot.best[r] + slot.window[r];
      for (int32_t i = 0; i < kept; ++i) {
        if (list[i].score < limit) within[count++] = list[i].code;
      }
    }
    const T* const row = z + r * args.dim;
    int64_t& index = args.indices[begin + r];
    if (count == 1) {
      index = within[0];
    } else if (count > 1) {
      index = nearest(row, codebook, args.dim, count, [&](int64_t i) { return within[i]; });
    } else {  // no bound, or more candidates than have room
      index = nearest(row, codebook, args.dim, args.codes, [](int64_t i) { return i; });
    }
  }
}

}  // namespace

NearestCodeStatus nearest_code(const NearestCode& args, int threads) {
  const int64_t dim = args.dim, codes = args.codes;
  const int64_t block_rows = rows_per_block(args.rows > 0 ? args.rows : 1, threads);
  const int64_t padded = round_up(codes, 64);  // whole panels of any instruction set
  const int64_t scratch = GENFAST_FOR_ISA(gemm_scratch_floats)(block_rows, codes, dim, false);
  const int64_t sizes[] = {
      block_rows * dim, 2 * block_rows, block_rows, block_rows, block_rows, 2 * block_rows * kMostCandidates, scratch};
  int64_t slot_floats = 0;
  for (const int64_t size : sizes) slot_floats += round_up(size, 16);
  Workspace workspace(packed_floats(dim, codes) + codes * dim + padded + 2 * codes + threads * slot_floats);
  float* const packed = workspace.take(packed_floats(dim, codes));
  float* const half_norms = workspace.take(padded);
  float* const floats = workspace.take(codes * dim);
  auto* const norms = reinterpret_cast<double*>(workspace.take(2 * codes));
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
  const Codes prepared = {floats, packed, half_norms, std::sqrt(largest), pack_args.parts()};
  std::atomic<bool> bad{false};
  const int useful = args.rows * codes * (dim + 1) < (1 << 18) ? 1 : threads;
  parallel_slots((args.rows + block_rows - 1) / block_rows, useful, [&](int64_t index, int64_t first, int64_t last) {
    float* at = slots + index * slot_floats;
    float* parts[7];
    for (int i = 0; i < 7; ++i) {
      parts[i] = at;
      at += round_up(sizes[i], 16);
    }
    const Slot slot = {parts[0], reinterpret_cast<double*>(parts[1]),  parts[2],
                       parts[3], reinterpret_cast<int32_t*>(parts[4]), reinterpret_cast<CodeCandidate*>(parts[5]),
                       parts[6]};
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
