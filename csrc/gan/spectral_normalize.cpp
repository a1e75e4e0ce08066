// Cuts layers into pieces whose size does not depend on the number of threads, and adds partial sums in order.
#include "gan/spectral_normalize.h"

#include <cmath>
#include <cstddef>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "gan/spectral_normalize_cpu.h"

namespace genfast {
namespace cpu {
namespace {

constexpr int64_t kChunk = 32768;      // elements of a chunk of rows, at least
constexpr int64_t kMostChunks = 32;    // of one layer: each has sums over its rows, [columns]
constexpr int64_t kColumns = 2048;     // columns a piece, when the sums of the chunks are added
constexpr int64_t kElements = 16384;   // elements a piece, elementwise
constexpr int64_t kOneThread = 32768;  // elements in all that threads do not help

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A layer's state within a call. `product` is W v, `sums` the chunks' sums, then `total` their sum.
struct Work {
  int64_t chunk_rows, chunks;
  char *product, *parts, *total;
  const void* v;
  double sigma;
  std::vector<double> squares;
};

struct Piece {
  int64_t layer, begin, end, index;
};

// Pieces of `step(layer)` of `count(layer)` units each.
template <typename Count, typename Step>
std::vector<Piece> pieces_of(const SpectralNormalize& args, const Count& count, const Step& step) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t all = count(i), size = step(i);
    for (int64_t begin = 0, index = 0; begin < all; begin += size, ++index) {
      pieces.push_back({i, begin, smaller(begin + size, all), index});
    }
  }
  return pieces;
}

template <typename Run>
void run_pieces(const std::vector<Piece>& pieces, int threads, const Run& run) {
  parallel_for(static_cast<int64_t>(pieces.size()), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) run(pieces[static_cast<size_t>(i)]);
  });
}

int64_t elements_of(const SpectralNormalize& args) {
  int64_t total = 0;
  for (int64_t i = 0; i < args.count; ++i) total += args.layers[i].elements();
  return total;
}

// u = t / max(|t|, eps) and v likewise from total = W^T t, both up to the norm of t; sigma = v^T W^T u.
template <typename S>
void finish_iteration(const SpectralLayer& layer, Work* work, double eps) {
  const S* const product = reinterpret_cast<const S*>(work->product);
  const S* const total = reinterpret_cast<const S*>(work->total);
  S* const u = static_cast<S*>(layer.new_u);
  S* const v = static_cast<S*>(layer.new_v);
  double square = 0.0, column_square = 0.0;
  for (int64_t r = 0; r < layer.rows; ++r) square += static_cast<double>(product[r]) * static_cast<double>(product[r]);
  for (double part : work->squares) column_square += part;
  const double norm = std::sqrt(square), length = norm > eps || norm != norm ? norm : eps;
  const double column_norm = std::sqrt(column_square) / length;
  const double column_length = column_norm > eps || column_norm != column_norm ? column_norm : eps;
  for (int64_t r = 0; r < layer.rows; ++r) u[r] = static_cast<S>(static_cast<double>(product[r]) / length);
  const double scale = length * column_length;
  for (int64_t c = 0; c < layer.columns(); ++c) v[c] = static_cast<S>(static_cast<double>(total[c]) / scale);
  work->sigma = column_norm / column_length * column_norm;
  work->v = layer.new_v;
}

template <typename S>
void finish_given(const SpectralLayer& layer, Work* work) {
  const S* const product = reinterpret_cast<const S*>(work->product);
  const S* const u = static_cast<const S*>(layer.u);
  work->sigma = 0.0;
  for (int64_t r = 0; r < layer.rows; ++r) work->sigma += static_cast<double>(product[r]) * static_cast<double>(u[r]);
}

template <typename S>
void forward(const SpectralNormalize& args, int threads) {
  const DType dtype = args.dtype;
  const int64_t width = sizeof(S) / sizeof(float);
  std::vector<Work> work(static_cast<size_t>(args.count));
  int64_t floats = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    const SpectralLayer& layer = args.layers[i];
    Work& w = work[static_cast<size_t>(i)];
    const int64_t wanted = smaller(smaller(divide_up(layer.elements(), kChunk), kMostChunks), layer.rows);
    w.chunk_rows = layer.rows > 0 ? divide_up(layer.rows, wanted > 1 ? wanted : 1) : 1;
    w.chunks = divide_up(layer.rows, w.chunk_rows);
    w.v = layer.v;
    w.squares.resize(static_cast<size_t>(divide_up(layer.columns(), kColumns)));
    floats += width * (layer.rows + (w.chunks + 1) * layer.columns()) + 64;
    advise_huge_pages(layer.out, layer.elements() * bytes_of(dtype));
  }
  Workspace memory(floats);
  for (int64_t i = 0; i < args.count; ++i) {
    const SpectralLayer& layer = args.layers[i];
    Work& w = work[static_cast<size_t>(i)];
    w.product = reinterpret_cast<char*>(memory.take(width * layer.rows));
    w.parts = reinterpret_cast<char*>(memory.take(width * w.chunks * layer.columns()));
    w.total = reinterpret_cast<char*>(memory.take(width * layer.columns()));
  }
  const auto of = [&](int64_t i) -> Work& { return work[static_cast<size_t>(i)]; };
  const std::vector<Piece> chunks =
      pieces_of(args, [&](int64_t i) { return args.layers[i].rows; }, [&](int64_t i) { return of(i).chunk_rows; });
  const std::vector<Piece> columns =
      pieces_of(args, [&](int64_t i) { return args.layers[i].columns(); }, [](int64_t) { return kColumns; });
  auto* const products = GENFAST_FOR_ISA(spectral_products);
  auto* const add = GENFAST_FOR_ISA(spectral_columns);
  for (int64_t turn = 0; turn < (args.iterations > 0 ? args.iterations : 1); ++turn) {
    run_pieces(chunks, threads, [&](const Piece& p) {
      const SpectralLayer& layer = args.layers[p.layer];
      const Work& w = of(p.layer);
      void* const sums =
          args.iterations > 0 ? w.parts + p.index * layer.columns() * static_cast<int64_t>(sizeof(S)) : nullptr;
      products(dtype, layer, w.v, p.begin, p.end, w.product, sums);
    });
    if (args.iterations > 0) {
      run_pieces(columns, threads, [&](const Piece& p) {
        Work& w = of(p.layer);
        w.squares[static_cast<size_t>(p.index)] =
            add(dtype, w.parts, w.chunks, args.layers[p.layer].columns(), p.begin, p.end, w.total);
      });
    }
    for (int64_t i = 0; i < args.count; ++i) {
      if (args.iterations > 0) {
        finish_iteration<S>(args.layers[i], &of(i), args.eps);
      } else {
        finish_given<S>(args.layers[i], &of(i));
      }
      static_cast<S*>(args.sigma)[i] = static_cast<S>(of(i).sigma);
    }
  }
  auto* const scale = GENFAST_FOR_ISA(spectral_scale);
  const std::vector<Piece> elements =
      pieces_of(args, [&](int64_t i) { return args.layers[i].elements(); }, [](int64_t) { return kElements; });
  run_pieces(elements, threads,
             [&](const Piece& p) { scale(dtype, args.layers[p.layer], of(p.layer).sigma, p.begin, p.end); });
}

template <typename S>
void backward(const SpectralNormalize& args, int threads) {
  const DType dtype = args.dtype;
  for (int64_t i = 0; i < args.count; ++i) {
    advise_huge_pages(args.layers[i].out, args.layers[i].elements() * bytes_of(dtype));
  }
  const std::vector<Piece> elements =
      pieces_of(args, [&](int64_t i) { return args.layers[i].elements(); }, [](int64_t) { return kElements; });
  std::vector<double> parts(elements.size()), along(static_cast<size_t>(args.count), 0.0);
  auto* const dot = GENFAST_FOR_ISA(spectral_dot);
  const Piece* const first_piece = elements.data();
  run_pieces(elements, threads, [&](const Piece& p) {
    parts[static_cast<size_t>(&p - first_piece)] = dot(dtype, args.layers[p.layer], p.begin, p.end);
  });
  for (size_t i = 0; i < parts.size(); ++i) along[static_cast<size_t>(elements[i].layer)] += parts[i];
  const S* const sigma = static_cast<const S*>(args.sigma);
  const S* const dsigma = static_cast<const S*>(args.dsigma);
  for (int64_t i = 0; i < args.count; ++i) {
    double& a = along[static_cast<size_t>(i)];
    a /= static_cast<double>(sigma[i]);
    if (dsigma != nullptr) a -= static_cast<double>(dsigma[i]) * static_cast<double>(sigma[i]);
  }
  const std::vector<Piece> segments = pieces_of(
      args, [&](int64_t i) { return args.layers[i].inner > 0 ? args.layers[i].outer * args.layers[i].rows : 0; },
      [&](int64_t i) { return divide_up(kElements, args.layers[i].inner > 0 ? args.layers[i].inner : 1); });
  auto* const gradient = GENFAST_FOR_ISA(spectral_gradient);
  run_pieces(segments, threads, [&](const Piece& p) {
    gradient(dtype, args.layers[p.layer], static_cast<double>(sigma[p.layer]), along[static_cast<size_t>(p.layer)],
             p.begin, p.end);
  });
}

}  // namespace

void spectral_normalize(const SpectralNormalize& args, int threads) {
  if (elements_of(args) < kOneThread) threads = 1;
  args.dtype == DType::kFloat64 ? forward<double>(args, threads) : forward<float>(args, threads);
}

void spectral_normalize_backward(const SpectralNormalize& args, int threads) {
  if (elements_of(args) < kOneThread) threads = 1;
  args.dtype == DType::kFloat64 ? backward<double>(args, threads) : backward<float>(args, threads);
}

}  // namespace cpu
}  // namespace genfast
