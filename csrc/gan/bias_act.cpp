// Cuts the tensors into runs that depend on their shape alone, hands them to threads, and adds up what they leave, in
// one order whatever the threads.
#include "gan/bias_act.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "gan/bias_act_cpu.h"

namespace genfast {
namespace cpu {
namespace {

constexpr int64_t kPiece = 16384;               // elements that a thread takes at once
constexpr int64_t kColumns = 1024;              // neighbours of different channels: their sums stay in the first cache
constexpr int64_t kRows = 16, kMostRows = 512;  // of those columns that are added up in one go
constexpr int64_t kChunks = 256;                // of them, about, in a large tensor
constexpr int64_t kStream = int64_t{32} << 20;  // bytes from which results go past the caches

int64_t at_least(int64_t x, int64_t low) { return x < low ? low : x; }
int64_t at_most(int64_t x, int64_t high) { return x < high ? x : high; }
int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Whether the run's results, which begin `at` elements into aligned tensors, may go past the caches.
bool streams(const BiasAct& args, int64_t elements, int64_t at) {
  return args.dtype == DType::kFloat32 && elements * 4 >= kStream && at % 16 == 0 && aligned(args.out) &&
         aligned(args.to_x);
}

BiasActKernel kernel_of(const BiasAct& args) {
  return args.dtype == DType::kFloat64 ? bias_act_double_kernel(args) : GENFAST_FOR_ISA(bias_act_kernel)(args);
}

// Lines of one channel each: [outer * channels, inner].
template <typename Real>
void by_lines(const BiasAct& args, int threads) {
  const int64_t lines = args.outer * args.channels, inner = args.inner, elements = lines * inner;
  const int64_t blocks = divided(inner, kPiece), line_bytes = divided(inner, 16) * 2;
  const int64_t together = at_least(kPiece / inner, 1);  // lines a piece, where lines are short
  std::vector<Real> partial(args.sums == nullptr ? 0 : static_cast<size_t>(lines * blocks));
  BiasActKernel kernel = kernel_of(args);
  const Real *b = static_cast<const Real*>(args.b), *v_b = static_cast<const Real*>(args.v_b);
  const auto run_block = [&](int64_t line, int64_t block) {
    const int64_t first = block * kPiece, channel = line % args.channels;
    BiasActRun run;
    run.at = line * inner + first;
    run.count = at_most(kPiece, inner - first);
    run.b = b == nullptr ? nullptr : b + channel;
    run.v_b = v_b == nullptr ? nullptr : v_b + channel;
    run.sums = args.sums == nullptr ? nullptr : partial.data() + line * blocks + block;
    run.bits = args.bits == nullptr ? nullptr : args.bits + line * line_bytes + first / 8;
    run.plane = lines * line_bytes;
    run.columns = false;
    run.stream = streams(args, elements, run.at);
    kernel(args, run);
  };
  parallel_for(divided(lines, together) * blocks, elements < kPiece ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t line = piece / blocks * together;
      for (int64_t i = line; i < at_most(line + together, lines); ++i) run_block(i, piece % blocks);
    }
  });
  if (args.sums == nullptr) return;
  std::vector<double> totals(static_cast<size_t>(args.channels));
  const Real* next = partial.data();
  for (int64_t outer = 0; outer < args.outer; ++outer) {
    for (double& total : totals) {
      for (int64_t block = 0; block < blocks; ++block) total += *next++;
    }
  }
  Real* out = static_cast<Real*>(args.sums);
  for (double total : totals) *out++ = static_cast<Real>(total);
}

// Columns: the tensor as rows of `width` elements, a multiple of 16 and of channels * inner, each a column of its own.
template <typename Real>
void by_columns(const BiasAct& args, int threads) {
  const int64_t period = args.channels * args.inner, elements = args.outer * period;
  int64_t repeats = 1;
  while (repeats * period % 16 != 0 || repeats * period < kColumns / 2) repeats *= 2;
  const int64_t width = repeats * period, rows = divided(elements, width);
  const int64_t columns = at_most(width, kColumns), blocks = divided(width, columns);
  // Few chunks, because each leaves a sum a column, but no more rows than single precision adds up well.
  const int64_t together = at_least(at_most(rows / kChunks, kMostRows), at_least(kPiece / columns, kRows));
  const int64_t chunks = divided(rows, together);
  const auto repeated = [&](const void* values) {
    std::vector<Real> all;
    if (values == nullptr) return all;
    all.resize(static_cast<size_t>(width));
    for (int64_t i = 0; i < width; ++i) {
      all[static_cast<size_t>(i)] = static_cast<const Real*>(values)[i / args.inner % args.channels];
    }
    return all;
  };
  const std::vector<Real> b = repeated(args.b), v_b = repeated(args.v_b);
  std::vector<Real> partial(args.sums == nullptr ? 0 : static_cast<size_t>(chunks * width));
  BiasActKernel kernel = kernel_of(args);
  parallel_for(chunks * blocks, elements < kPiece ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t chunk = piece / blocks, column = piece % blocks * columns;
      for (int64_t row = chunk * together; row < at_most((chunk + 1) * together, rows); ++row) {
        BiasActRun run;
        run.at = row * width + column;
        run.count = at_most(at_most(columns, width - column), elements - run.at);
        if (run.count <= 0) break;
        run.b = b.empty() ? nullptr : b.data() + column;
        run.v_b = v_b.empty() ? nullptr : v_b.data() + column;
        run.sums = args.sums == nullptr ? nullptr : partial.data() + chunk * width + column;
        run.bits = args.bits == nullptr ? nullptr : args.bits + run.at / 8;
        run.plane = divided(elements, 16) * 2;
        run.columns = true;
        run.stream = streams(args, elements, run.at);
        kernel(args, run);
      }
    }
  });
  if (args.sums == nullptr) return;
  std::vector<double> wide(static_cast<size_t>(width)), totals(static_cast<size_t>(args.channels));
  const Real* next = partial.data();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (double& total : wide) total += *next++;
  }
  for (int64_t i = 0; i < width; ++i) {
    totals[static_cast<size_t>(i / args.inner % args.channels)] += wide[static_cast<size_t>(i)];
  }
  Real* out = static_cast<Real*>(args.sums);
  for (double total : totals) *out++ = static_cast<Real>(total);
}

template <typename Real>
void run(const BiasAct& args, int threads) {
  if (args.inner < BiasAct::kShortest) {
    by_columns<Real>(args, threads);
  } else {
    by_lines<Real>(args, threads);
  }
}

}  // namespace

void bias_act(const BiasAct& given, int threads) {
  BiasAct args = given;
  if (args.channels == 1) {
    args.inner *= args.outer;
    args.outer = 1;
  }
  const int64_t elements = args.outer * args.channels * args.inner;
  if (elements == 0) {
    if (args.sums != nullptr)
      std::memset(args.sums, 0, static_cast<size_t>(args.channels) * (args.dtype == DType::kFloat64 ? 8 : 4));
    return;
  }
  advise_huge_pages(args.out, elements * bytes_of(args.dtype));
  advise_huge_pages(args.to_x, elements * bytes_of(args.dtype));
  if (args.dtype == DType::kFloat64) {
    run<double>(args, threads);
  } else {
    run<float>(args, threads);
  }
}

}  // namespace cpu
}  // namespace genfast
