// Cuts the work into pieces whose size does not depend on the number of threads.
#include <cstddef>

#include "common/memory.h"
#include "common/parallel.h"
#include "vae/log_ratio_cpu.h"

namespace genfast {
namespace cpu {
namespace {

// Elements of z a piece: 64 KiB an array in float32, which stays in the second cache.
constexpr int64_t kPiece = 16384;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs run(piece) on whole rows of some samples. Sums over rows of no elements are zero.
template <typename Run>
void for_row_pieces(const ReparameterizeShape& shape, void* ratio, int threads, const Run& run) {
  if (shape.rows == 0 || shape.samples == 0) return;
  if (shape.event == 0) {
    const int64_t bytes = shape.samples * shape.rows * (shape.dtype == DType::kFloat64 ? 8 : 4);
    for (int64_t i = 0; i < bytes; ++i) static_cast<char*>(ratio)[i] = 0;
    return;
  }
  const int64_t samples = shape.samples < kPieceSamples ? shape.samples : kPieceSamples;
  const int64_t rows = kPiece / samples / shape.event > 1 ? kPiece / samples / shape.event : 1;
  const int64_t row_pieces = divide_up(shape.rows, rows);
  parallel_for(row_pieces * divide_up(shape.samples, samples), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i % row_pieces * rows, k = i / row_pieces * samples;
      run(RowPiece{row, row + rows < shape.rows ? row + rows : shape.rows, k,
                   k + samples < shape.samples ? k + samples : shape.samples});
    }
  });
}

// Runs run(begin, end) on flat elements, a multiple of 16 of them a piece.
template <typename Run>
void for_flat_pieces(const ReparameterizeShape& shape, int threads, const Run& run) {
  const int64_t elements = shape.rows * shape.event;
  const int64_t piece = shape.samples > kPiece / 64 ? 64 : divide_up(kPiece, shape.samples * 16) * 16;
  parallel_for(divide_up(elements, piece), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      run(i * piece, (i + 1) * piece < elements ? (i + 1) * piece : elements);
    }
  });
}

}  // namespace

void log_ratio_forward(const LogRatioForward& args, int threads) {
  const ReparameterizeShape& shape = args.shape;
  advise_huge_pages(args.z, shape.samples * shape.rows * shape.event * bytes_of(shape.dtype));
  LogRatioForwardPiece* piece =
      shape.dtype == DType::kFloat64 ? &log_ratio_forward_double : GENFAST_FOR_ISA(log_ratio_forward_piece);
  for_row_pieces(shape, args.ratio, threads, [&](const RowPiece& rows) { piece(args, rows); });
}

void log_ratio_backward(const LogRatioBackward& args, int threads) {
  const ReparameterizeShape& shape = args.shape;
  if (shape.samples == 0) return;
  LogRatioBackwardPiece* piece =
      shape.dtype == DType::kFloat64 ? &log_ratio_backward_double : GENFAST_FOR_ISA(log_ratio_backward_piece);
  for_flat_pieces(shape, threads, [&](int64_t begin, int64_t end) { piece(args, begin, end); });
}

void log_ratio_jvp(const LogRatioJvp& args, int threads) {
  const ReparameterizeShape& shape = args.shape;
  advise_huge_pages(args.z_tangent, shape.samples * shape.rows * shape.event * bytes_of(shape.dtype));
  LogRatioJvpPiece* piece =
      shape.dtype == DType::kFloat64 ? &log_ratio_jvp_double : GENFAST_FOR_ISA(log_ratio_jvp_piece);
  for_row_pieces(shape, args.ratio_tangent, threads, [&](const RowPiece& rows) { piece(args, rows); });
}

}  // namespace cpu
}  // namespace genfast
