// Sums of the rows that belong to each code. A code's rows are listed in their order first, so that a code has one
// owner and one order of sums.
#include <cstddef>
#include <vector>

#include "common/parallel.h"
#include "vae/vector_quantize.h"

namespace genfast {
namespace cpu {
namespace {

template <typename T>
void sum_codes(const CodeSums& args, const int64_t* starts, const int64_t* rows, int64_t first, int64_t last) {
  std::vector<double> total(static_cast<std::size_t>(args.dim));
  const T* const x = static_cast<const T*>(args.x);
  for (int64_t k = first; k < last; ++k) {
    for (double& value : total) value = 0.0;
    for (int64_t i = starts[k]; i < starts[k + 1]; ++i) {
      const T* const row = x + rows[i] * args.dim;
      for (int64_t j = 0; j < args.dim; ++j) total[static_cast<std::size_t>(j)] += static_cast<double>(row[j]);
    }
    T* const out = static_cast<T*>(args.sums) + k * args.dim;
    for (int64_t j = 0; j < args.dim; ++j) out[j] = static_cast<T>(total[static_cast<std::size_t>(j)]);
  }
}

}  // namespace

bool code_sums(const CodeSums& args, int threads) {
  const auto size = [](int64_t count) { return static_cast<std::size_t>(count); };
  std::vector<int64_t> starts(size(args.codes + 1), 0), rows(size(args.rows));
  for (int64_t n = 0; n < args.rows; ++n) {
    if (args.indices[n] < 0 || args.indices[n] >= args.codes) return false;
    ++starts[size(args.indices[n] + 1)];
  }
  for (int64_t k = 0; k < args.codes; ++k) {
    args.counts[k] = starts[size(k + 1)];
    starts[size(k + 1)] += starts[size(k)];
  }
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < args.rows; ++n) rows[size(next[size(args.indices[n])]++)] = n;
  // A thread's codes have about as many rows as another's.
  const int64_t parts = args.rows * args.dim < (1 << 15) ? 1 : threads;
  const auto code_of = [&](int64_t part) {
    const int64_t target = args.rows * part / parts;
    int64_t low = 0, high = args.codes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts[size(middle)] < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_for(parts, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin == 0 ? 0 : code_of(begin), last = end == parts ? args.codes : code_of(end);
    if (args.dtype == DType::kFloat64) {
      sum_codes<double>(args, starts.data(), rows.data(), first, last);
    } else {
      sum_codes<float>(args, starts.data(), rows.data(), first, last);
    }
  });
  return true;
}

}  // namespace cpu
}  // namespace genfast
